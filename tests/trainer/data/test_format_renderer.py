"""What a declared format cannot render is refused, since nothing of a row may be lost."""

from __future__ import annotations

import pytest

from finetune_api.prompt_format import Message, PromptFormat
from finetune_trainer.data.conversation import RowError
from finetune_trainer.data.render import FormatRenderer


def test_a_system_message_without_a_user_to_carry_it_is_refused() -> None:
    prompt_format = PromptFormat(
        system="{instruction}\n", user="{system}{instruction}", assistant="{instruction}</s>", system_in_user=True
    )
    with pytest.raises(RowError, match="no user message to carry it"):
        FormatRenderer(prompt_format, None).render([Message("system", "Be brief."), Message("assistant", "Yes.")])
