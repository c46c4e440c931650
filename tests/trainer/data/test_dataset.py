"""Tokenized data: complete or absent, made once for the same inputs, with every row accounted for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.prompt_format import PromptFormat
from finetune_trainer.data import dataset
from finetune_trainer.data.conversation import RowRules
from finetune_trainer.data.dataset import DataSource, prepare
from finetune_trainer.data.render import FormatRenderer
from finetune_trainer.data.tokenizer import ModelTokenizer
from finetune_trainer.errors import JobError
from tests.real_tokenizers import llama_3, smollm2
from tests.trainer.run.tiny_job import CHATML, rows, write_rows

PASS_THROUGH = {"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}<|end_of_text|>"}


def source(path: Path, model: ModelTokenizer, made: dict[str, Any], **changes: Any) -> DataSource:
    """The data file with a format, as a job would describe it."""
    prompt_format = PromptFormat(**made)
    whole = DataSource(
        path=path,
        name=path.name,
        rules=RowRules(needs_answer=True, strip_whitespace=False),
        renderer=FormatRenderer(prompt_format, model.automatic_bos),
        tokenizer=model.row_tokenizer(),
        settings={"tokenizer": model.fingerprint(), "format": prompt_format.model_dump()},
        context_length=None,
        train_all=False,
        max_invalid_share=0.0,
        max_dropped_share=0.1,
        bos_id=model.tokenizer.bos_token_id if model.automatic_bos else None,
    )
    return replace(whole, **changes)


@pytest.fixture
def chat(tmp_path: Path) -> DataSource:
    """40 rows of ChatML."""
    return source(write_rows(tmp_path / "train.jsonl", rows(40)), smollm2(), CHATML)


def folders(cache: Path) -> list[Path]:
    return list(cache.iterdir()) if cache.exists() else []


def test_what_is_mapped_is_what_was_tokenized(chat: DataSource, tmp_path: Path) -> None:
    data = prepare(chat, tmp_path / "cache")
    assert len(data) == data.stats.rows == data.stats.kept_rows == 40
    lines = chat.path.read_text().splitlines()
    for row in range(len(data)):
        messages = json.loads(lines[row])["messages"]
        (rendering,) = chat.renderer.render([_message(message) for message in messages])
        fresh = smollm2().row_tokenizer().tokenize([rendering])[0]
        mapped = data.sequences(row)
        assert [ids.tolist() for ids, _ in mapped] == [sequence.ids for sequence in fresh.sequences]
        assert [trained.tolist() for _, trained in mapped] == [sequence.trained for sequence in fresh.sequences]
        assert data.row_trained_tokens[row] == sum(int(trained.sum()) for _, trained in mapped)
        assert data.row_tokens[row] == sum(len(ids) for ids, _ in mapped)
        assert data.lines[row] == row + 1
    assert data.stats.trainable_tokens == int(data.row_trained_tokens.sum())
    assert data.stats.tokens == int(data.row_tokens.sum())


def _message(message: dict[str, str]) -> Any:
    from finetune_api.prompt_format import Message

    return Message(message["role"], message["content"])


def test_the_same_inputs_are_tokenized_once(chat: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(chat, tmp_path / "cache")
    monkeypatch.setattr(dataset, "_write", lambda *_: pytest.fail("tokenized again"))
    assert prepare(chat, tmp_path / "cache").folder == first.folder


CHANGES: dict[str, Callable[[DataSource], DataSource]] = {
    "format": lambda chat: source(chat.path, smollm2(), CHATML | {"bos": "x"}),
    "tokenizer": lambda chat: source(chat.path, llama_3(), CHATML),
    "context_length": lambda chat: replace(chat, context_length=40),
    "task": lambda chat: replace(chat, train_all=True),
    "rules": lambda chat: replace(chat, rules=RowRules(needs_answer=False, strip_whitespace=False)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_decides_the_tokens_decides_the_cache(
    chat: DataSource, tmp_path: Path, change: Callable[[DataSource], DataSource]
) -> None:
    first = prepare(chat, tmp_path / "cache")
    assert prepare(change(chat), tmp_path / "cache").folder != first.folder


def test_changed_data_and_changed_code_are_tokenized_anew(
    chat: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(chat, tmp_path / "cache")
    write_rows(chat.path, rows(41))
    second = prepare(chat, tmp_path / "cache")
    assert len(second) == 41
    monkeypatch.setattr(dataset, "_code_version", lambda: "another")
    third = prepare(chat, tmp_path / "cache")
    assert len({first.folder, second.folder, third.folder}) == 3


def test_a_failure_leaves_nothing_behind(chat: DataSource, tmp_path: Path) -> None:
    with chat.path.open("a") as file:
        file.write("not json\n")
    with pytest.raises(JobError, match="line 41: is not JSON"):
        prepare(chat, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_another_process_that_was_faster_wins(
    chat: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = prepare(chat, tmp_path / "cache").folder
    kept = tmp_path / "kept"
    winner.rename(kept)
    write = dataset._write

    def slow(*arguments: Any) -> None:
        write(*arguments)
        shutil.copytree(kept, winner)

    monkeypatch.setattr(dataset, "_write", slow)
    assert prepare(chat, tmp_path / "cache").folder == winner
    assert folders(tmp_path / "cache") == [winner]


def test_cut_rows_are_counted_and_those_left_without_a_target_are_dropped(chat: DataSource, tmp_path: Path) -> None:
    whole = prepare(chat, tmp_path / "cache")
    limit = int(np.percentile(whole.row_tokens, 60))
    cut = prepare(replace(chat, context_length=limit, max_dropped_share=1.0), tmp_path / "cache")
    longer = int((whole.row_tokens > limit).sum())
    assert cut.stats.truncated_rows == longer > 0
    assert cut.stats.dropped_rows + cut.stats.kept_rows == 40
    assert int(cut.row_tokens.max()) <= limit
    assert int(cut.row_trained_tokens.min()) > 0
    (told,) = cut.stats.notices
    assert f"{longer} of 40 rows are longer than the {limit} tokens of context_length and lose their end" in told
    assert ("dropped" in told) == (cut.stats.dropped_rows > 0)


@pytest.mark.parametrize("less", [0, 1])
def test_rows_that_lose_their_end_are_refused_where_more_do_than_is_allowed(
    chat: DataSource, tmp_path: Path, less: int
) -> None:
    whole = prepare(chat, tmp_path / "cache")
    limit = int(np.percentile(whole.row_tokens, 60))
    longer = int((whole.row_tokens > limit).sum())
    strict = replace(chat, context_length=limit, max_dropped_share=1.0, max_truncated_share=(longer - less) / 40)
    if less:
        with pytest.raises(JobError, match=rf"{longer} of 40 rows are longer.*raise max_truncated_row_share"):
            prepare(strict, tmp_path / "cache")
    else:
        assert prepare(strict, tmp_path / "cache").stats.truncated_rows == longer


def test_too_many_rows_without_a_target_end_it_with_what_to_change(chat: DataSource, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"40 of 40 rows have nothing left.*context_length is 8.*raise context_length"):
        prepare(replace(chat, context_length=8), tmp_path / "cache")


def test_allowed_bad_rows_are_left_out_counted_and_named(chat: DataSource, tmp_path: Path) -> None:
    with chat.path.open("a") as file:
        file.write('{"messages": []}\n')
    data = prepare(replace(chat, max_invalid_share=0.1), tmp_path / "cache")
    assert (data.stats.rows, data.stats.invalid_rows, data.stats.kept_rows) == (41, 1, 40)
    assert "1 invalid rows were left out: line 41" in data.stats.notices[0]


def test_keys_without_a_meaning_are_named(tmp_path: Path) -> None:
    row = rows(1)[0] | {"id": 7}
    row["messages"][0]["weight"] = 0
    data = prepare(source(write_rows(tmp_path / "train.jsonl", [row]), smollm2(), CHATML), tmp_path / "cache")
    assert [notice for notice in data.stats.notices if "'id'" in notice]
    assert [notice for notice in data.stats.notices if "'messages[].weight'" in notice]


GUARD_ROW = {
    "messages": [
        {"role": "system", "content": "<|begin_of_text|>[INST] Task: Check for unsafe content.\n\n"},
        {"role": "user", "content": "Answer safe or unsafe. [/INST]"},
        {"role": "assistant", "content": "unsafe\nO3"},
    ]
}


@pytest.mark.parametrize(("bos", "count"), [("", 1), ("<|begin_of_text|>", 2)])
def test_data_that_bring_their_own_bos_get_no_second_one(tmp_path: Path, bos: str, count: int) -> None:
    """The guide's Llama Guard data; a format that adds another all the same is named."""
    path = write_rows(tmp_path / "train.jsonl", [GUARD_ROW])
    data = prepare(source(path, llama_3(), PASS_THROUGH | {"bos": bos}), tmp_path / "cache")
    ((ids, _),) = data.sequences(0)
    assert ids.tolist().count(llama_3().tokenizer.bos_token_id) == count
    assert any("two BOS" in notice for notice in data.stats.notices) is (count == 2)


@pytest.mark.parametrize(("answer", "noticed"), [("unsafe\nO3", False), ("unsafe </s>", True), ("unsafe ", True)])
def test_answers_that_bring_the_formats_own_text_get_it_once(tmp_path: Path, answer: str, noticed: bool) -> None:
    messages = [*GUARD_ROW["messages"][:2], {"role": "assistant", "content": answer}]
    path = write_rows(tmp_path / "train.jsonl", [{"messages": messages}])
    made = PASS_THROUGH | {"assistant": "{instruction} </s>"}
    data = prepare(source(path, llama_3(), made), tmp_path / "cache")
    ((ids, _),) = data.sequences(0)
    assert str(llama_3().tokenizer.decode(ids)).endswith(f"{answer.removesuffix(' </s>').rstrip(' ')} </s>")
    assert any("written once" in notice for notice in data.stats.notices) is noticed


def test_the_end_of_sequence_is_trained_although_it_also_fills_padding(tmp_path: Path) -> None:
    """Masking by the id of the padding would hide it: SmolLM2's are the same."""
    model = smollm2()
    assert model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
    data = prepare(source(write_rows(tmp_path / "train.jsonl", rows(3)), model, CHATML), tmp_path / "cache")
    from finetune_trainer.model.batch import IGNORED, pad

    sequences = [pair for row in range(3) for pair in data.sequences(row)]
    batch = pad(sequences, model.tokenizer.pad_token_id)
    answers = sum(message["role"] == "assistant" for row in rows(3) for message in row["messages"])
    assert int((batch.targets == model.tokenizer.eos_token_id).sum()) == answers
    assert (batch.targets[batch.attention_mask == 0] == IGNORED).all()
