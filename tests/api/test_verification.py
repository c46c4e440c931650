"""A verification's last words fit into a termination message, and its exit code says the same."""

from __future__ import annotations

import json

import pytest

from finetune_api.verification import VerificationMessage


@pytest.mark.parametrize(("verified", "code"), [(True, 0), (False, 1), (None, 2)])
def test_the_verdict_is_in_words_and_code(verified: bool | None, code: int) -> None:
    message = VerificationMessage(verified=verified, message="Fine.")
    assert json.loads(message.to_bytes()) == {"verified": verified, "message": "Fine."}
    assert message.exit_code == code
    assert VerificationMessage.parse(message.to_bytes()) == message


def test_a_long_message_is_cut_and_stays_whole() -> None:
    data = VerificationMessage(verified=False, message="é\udcff" * 9000).to_bytes()
    assert len(data) <= 4096
    assert json.loads(data)["message"].endswith("…")


@pytest.mark.parametrize("data", [b"", b"Traceback", b"{}", b'{"verified": "yes and no"}', b"[]"])
def test_another_programs_last_words_are_no_verdict(data: bytes) -> None:
    assert VerificationMessage.parse(data) is None
