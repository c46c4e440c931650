"""A real vLLM answers token for token what was trained, for every format, tokenizer, rank and architecture."""

from __future__ import annotations

from itertools import pairwise

from tests.serving.conversations import answered
from tests.serving.results import Results
from tests.serving.served import Served


def test_the_server_makes_the_trained_prompt_of_the_messages(served: Served, results: Results) -> None:
    with results.measured(served.adapter.case, "prompt"):
        assert [reply.prompt_ids for reply in served.replies] == served.prompt_ids


def test_chat_answers_with_pefts_tokens(served: Served, results: Results) -> None:
    with results.measured(served.adapter.case, "chat"):
        assert [reply.ids for reply in served.replies] == served.peft_answers


def test_completions_of_the_token_ids_are_pefts(served: Served, results: Results) -> None:
    with results.measured(served.adapter.case, "ids"):
        replies = [served.complete(ids) for ids in served.prompt_ids]
        assert [reply.prompt_ids for reply in replies] == served.prompt_ids
        assert [reply.ids for reply in replies] == served.peft_answers


def test_completions_of_the_text_are_pefts_where_no_special_tokens_are_added(served: Served, results: Results) -> None:
    with results.measured(served.adapter.case, "text"):
        prompts = [row["inference_prompt"] for row in served.adapter.previewed]
        replies = [served.complete(text, add_special_tokens=False) for text in prompts]
        assert [reply.prompt_ids for reply in replies] == served.prompt_ids
        assert [reply.ids for reply in replies] == served.peft_answers


def test_an_answer_ends_where_training_ended_it(served: Served, results: Results) -> None:
    by_text = served.adapter.case.by_text
    with results.measured(served.adapter.case, "stop", "by text" if by_text else "yes"):
        assert ("stop_strings" in served.adapter.stops) == by_text
        trained = [row["messages"][-1]["content"] for row in answered()]
        if by_text:
            assert {reply.finish_reason for reply in served.replies} == {"length"}
            replies = [reply for dialogue in served.dialogues for reply in dialogue]
        else:
            replies = served.replies
        assert {reply.finish_reason for reply in replies} == {"stop"}
        assert [reply.text.strip() for reply in replies] == trained


def test_each_prompt_begins_with_the_prompt_and_the_answer_before(served: Served, results: Results) -> None:
    with results.measured(served.adapter.case, "turns"):
        for dialogue in served.dialogues:
            assert len(dialogue) == 3
            for before, after in pairwise(dialogue):
                whole = [*before.prompt_ids, *before.ids]
                assert after.prompt_ids[: len(whole)] == whole


def test_the_answers_are_not_the_base_models(served: Served, results: Results) -> None:
    with results.measured(served.adapter.case, "effect"):
        base = [served.complete(ids, model=str(served.adapter.base)) for ids in served.prompt_ids]
        same = [one.ids == other.ids for one, other in zip(base, served.replies, strict=True)]
        assert not any(same)
