"""The first rows as the model sees them, before any weight is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune_api.job import FineTuneJob
from finetune_api.prompt_format import Message, RenderError, Rendering
from finetune_trainer.data.block import DataSource
from finetune_trainer.data.conversation import Conversation, RowError
from finetune_trainer.data.read import ReadReport, check_report, read_rows
from finetune_trainer.data.render import renderings_of
from finetune_trainer.data.shapes import MESSAGES
from finetune_trainer.data.tokenize import TokenizedSequence, merge


@dataclass(frozen=True)
class PreviewRow:
    """One row as it is trained on."""

    row: int
    """Line number in the data file, from 1."""
    text: str
    """The whole rendered text with its leading BOS; `input_ids` are its tokens."""
    input_ids: list[int]
    loss_mask: list[int]
    """1 for each token that the model must produce, else 0; as long as `input_ids`."""
    inference_prompt: str
    """The text the model is given to produce the last assistant message."""
    inference_ids: list[int]
    """Tokens of `inference_prompt`, as a server makes them from that text alone."""
    spans: list[tuple[str, bool]] = field(default_factory=list)
    """The text in stretches, each with whether it is trained on."""
    notes: list[str] = field(default_factory=list)
    """What is particular about this row (cut, tokenized again, several sequences)."""


def preview(source: DataSource, count: int) -> list[PreviewRow]:
    """The first `count` rows of `source`, cut at its context length as in training.

    Bad rows that the job allows are passed over; the numbers of the others show where.

    Raises:
        JobError: DataInvalid, a bad row among those read that the job does not allow, or none that is good.
    """
    report = ReadReport()
    found: list[PreviewRow] = []
    for row in read_rows(source.path, source.rules, report):
        try:
            renderings = renderings_of(source.renderer, row.conversation)
            found.append(_preview_row(source, row.line, row.conversation, renderings))
        except (RowError, RenderError) as error:
            report.refuse(row.line, error)
        if len(found) >= count or (report.invalid_rows and not source.max_invalid_share):
            break
    # Where the job allows bad rows their share of the whole file decides, which the first rows do not show.
    check_report(source.name, report, 1.0 if source.max_invalid_share else 0.0)
    return found


def _preview_row(source: DataSource, line: int, conversation: Conversation, renderings: list[Rendering]) -> PreviewRow:
    whole = renderings[0]
    tokenized = merge(source.tokenizer.tokenize(renderings, train_all=source.train_all))
    main = tokenized.sequences[0]
    notes = []
    if conversation.shape != MESSAGES:
        notes.append(f"read as {conversation.shape}")
    if untrained := sum(not message.trained for message in conversation.messages if message.role == "assistant"):
        notes.append(f"{untrained} of its answers are not trained on (weight 0)")
    if tokenized.retokenized:
        notes.append("the prompt alone has other tokens than within the whole text: tokenized again, split at its end")
    if len(tokenized.sequences) > 1:
        notes.append(
            f"trained as {len(tokenized.sequences)} sequences, since one cannot begin with every turn's prompt"
        )
    if whole.brought:
        notes.append("an answer begins or ends with text that prompt_format.assistant writes around it: written once")
    if source.bos_id is not None and main.ids[:2] == [source.bos_id] * 2:
        notes.append("begins with two BOS tokens, one of prompt_format.bos and one of its own: remove one of the two")
    if source.context_length is not None and len(main.ids) > source.context_length:
        notes.append(f"cut from {len(main.ids)} to {source.context_length} tokens")
        main = main.truncated(source.context_length)
        if not any(sequence.truncated(source.context_length).spans for sequence in tokenized.sequences):
            notes.append("nothing is left to train on, so the row is dropped")
    prompt = whole.inference_prompt() if whole.turns else _prompt(source, conversation)
    return PreviewRow(
        row=line,
        text=whole.text,
        input_ids=main.ids,
        loss_mask=_loss_mask(main),
        inference_prompt=prompt,
        inference_ids=source.tokenizer.prompt_ids(prompt),
        spans=[(whole.text, True)] if source.train_all else trained_spans(whole),
        notes=notes,
    )


def _prompt(source: DataSource, conversation: Conversation) -> str:
    """What is asked for the last answer of a row in which no turn is told apart; nothing for a plain text."""
    if conversation.text is not None:
        return ""
    return source.renderer.prompt(_before_last_answer(conversation.messages), conversation.tools)


def _before_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """What the last assistant message answers; all messages where it answers none."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and index]
    return messages[: answers[-1]] if answers else messages


def _loss_mask(sequence: TokenizedSequence) -> list[int]:
    return [int(trained) for trained in sequence.trained]


def trained_spans(rendering: Rendering) -> list[tuple[str, bool]]:
    """The text in stretches, each with whether the model must produce it."""
    spans = []
    position = 0
    for turn in rendering.turns:
        spans.append((rendering.text[position : turn.prompt_end], False))
        spans.append((rendering.text[turn.prompt_end : turn.end], True))
        position = turn.end
    spans.append((rendering.text[position:], False))
    return [(text, trained) for text, trained in spans if text]


def preview_rows(job: FineTuneJob, count: int) -> tuple[list[PreviewRow], list[str]]:
    """The first `count` rows of a job's training data, and warnings about its format with this tokenizer.

    Needs tokenizer and configuration of the model, never its weights.

    Raises:
        JobError: the model's tokenizer or the data cannot be had, or rows are bad.
    """
    from finetune_trainer.inputs import data_source, load_model_inputs

    inputs = load_model_inputs(job.spec)
    return preview(data_source(job.spec, inputs, job.spec.train_path), count), inputs.warnings
