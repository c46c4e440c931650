"""A data file of conversations, as a ChatML job describes it."""

from __future__ import annotations

from pathlib import Path

from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data.conversation import RowRules
from finetune_trainer.data.dataset import DataSource
from finetune_trainer.data.render import FormatRenderer
from finetune_trainer.data.tokenizer import load_tokenizer
from tests.trainer.run.tiny_job import CHATML


def source_of(path: Path, model: Path) -> DataSource:
    """The data file as a ChatML job describes it."""
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    made = PromptFormat.model_validate(CHATML)
    return DataSource(
        path=path,
        name=path.name,
        rules=RowRules(needs_answer=True, strip_whitespace=False),
        renderer=FormatRenderer(made, tokenizer.automatic_bos),
        tokenizer=tokenizer.row_tokenizer(),
        settings={"tokenizer": tokenizer.fingerprint(), "format": made.model_dump()},
        context_length=None,
        train_all=False,
        max_invalid_share=0.0,
        max_dropped_share=0.1,
    )
