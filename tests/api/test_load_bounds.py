"""What is said about a job is short, whatever is in it, and nothing in it makes reading it slow or end in an error."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from finetune_api import spec_errors
from finetune_api.answer_literals import MOST_BORDERS, answer_literals, borders
from finetune_api.load import LoadResult, load_job, load_manifest
from finetune_api.problem import MOST, Problem, first_ones
from finetune_api.prompt_format import TEMPLATE_LIMIT, PromptFormat
from finetune_api.spec_errors import LOOKED_AT, Finding
from tests.api.extremes import nested
from tests.api.jobs import manifest, spec

MORE = "and {} more, which are named once these are gone."


def _last(problems: list[Problem]) -> str:
    assert len(problems) == MOST + 1
    assert problems[-1].path == ""
    return problems[-1].message


def test_empty_values_are_named_up_to_a_number() -> None:
    empty = {f"k{number}": {f"x{inner}": None for inner in range(50)} for number in range(100)}
    result = load_manifest(manifest(deepspeed=empty))
    assert result.job is not None
    assert _last(result.warnings) == MORE.format(4991)  # 5000, and that deepspeed has no effect
    assert result.warnings[0] == Problem("spec.deepspeed.k0.x0", "x0 is empty, so it counts as not given.")


def test_an_empty_value_in_a_list_is_an_absent_one_too() -> None:
    result = load_manifest(manifest(workers={"env": [{"name": "A", "value": "b", "valueFrom": None}]}))
    assert [problem.path for problem in result.warnings] == ["spec.workers.env[0].valueFrom"]
    assert result.job is not None
    assert result.job.spec.workers.env[0].value_from is None


def test_mistakes_are_named_up_to_a_number_and_in_the_order_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    sentence = Finding.problem

    def counted(finding: Finding) -> Problem:
        made.append(finding.path)
        return sentence(finding)

    monkeypatch.setattr(Finding, "problem", counted)
    unknown = {f"no_key_{number:04d}": 1 for number in range(3000)}
    result = load_manifest(manifest(**unknown))
    assert _last(result.errors) == MORE.format(3000 - MOST)
    assert [problem.path for problem in result.errors[:2]] == ["spec.no_key_0000", "spec.no_key_0001"]
    # Each sentence is a search for what was meant.
    assert len(made) == MOST


@pytest.mark.parametrize("count", [LOOKED_AT, LOOKED_AT + 1, 9 * LOOKED_AT])
def test_of_very_many_mistakes_the_rest_is_only_counted(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    dotted = spec_errors.dotted

    def noted(keys: Sequence[str | int]) -> str:
        looked.append(dotted(keys))
        return looked[-1]

    monkeypatch.setattr(spec_errors, "dotted", noted)
    result = load_manifest(manifest(**{f"{number}": 1 for number in range(count)}))
    assert _last(result.errors) == MORE.format(count - MOST)
    assert len(looked) == LOOKED_AT


def test_a_few_are_all_named() -> None:
    few = [Problem(f"a{number}", "b") for number in range(MOST)]
    assert first_ones(few) == few
    assert first_ones(few, 3) == [*few, Problem("", MORE.format(3))]


def test_what_is_quoted_is_short_and_does_nothing_to_a_terminal() -> None:
    (problem,) = first_ones([Problem("\x1b[31m\u202e" + "k" * 1000, "a\nb" + "\x00" * 5000)])
    assert problem.path.startswith(r"\x1b[31m\u202ekkk")
    assert problem.message.startswith(r"a\nb\x00\x00")
    assert problem.path.endswith("…")
    assert (problem.path + problem.message).isprintable()
    assert len(problem.message) < 5000


def test_of_a_long_key_or_word_the_beginning_is_compared_with_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    near = difflib.get_close_matches

    def noted(word: str, *arguments: Any, **more: Any) -> list[str]:
        compared.append(word)
        return near(word, *arguments, **more)

    monkeypatch.setattr(difflib, "get_close_matches", noted)
    for made in ({"lora" * 10_000: 1}, {"lora_config": {"bias": "none" * 10_000}}):
        assert load_manifest(manifest(**made)).job is None
    assert compared
    assert max(map(len, compared)) <= 64


LONG = TEMPLATE_LIMIT - len("{instruction}")


@pytest.mark.parametrize("key", ["a" * 60_000, "\x1b]0;title\x07", "\ud800", "a.b[0]"])
def test_no_key_makes_a_sentence_long_or_impossible_to_print(key: str) -> None:
    for made in ({key: 1}, {"deepspeed": {key: None}}, {"lora_config": {key: 1}}, {"worker_resources": {key: 1}}):
        result = load_manifest(manifest(**made))
        for problem in [*result.errors, *result.warnings]:
            assert len(str(problem)) < 2000
            assert str(problem).isprintable()
            str(problem).encode()


DEEP = {
    "JSON lists": '{"deepspeed": {"a": ' + "[" * 200_000 + "]" * 200_000 + "}}",
    "JSON maps": '{"deepspeed": ' + '{"a":' * 150_000 + "1" + "}" * 150_000 + "}",
    "JSON lists in a number": '{"num_epochs": ' + "[" * 900 + "]" * 900 + "}",
    "YAML lists": "deepspeed: " + "[" * 20_000 + "]" * 20_000,
    "YAML maps": "deepspeed: " + "{a: " * 20_000 + "}" * 20_000,
    "YAML blocks": "deepspeed:\n" + "".join(f"{' ' * level}a:\n" for level in range(1, 1000)),
    "YAML sequences": "deepspeed: \n  " + "- " * 20_000 + "a",
}


@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
def test_what_is_nested_without_end_gets_one_sentence(text: str) -> None:
    result = load_job(text, source="job.yaml")
    assert result.job is None
    assert result.errors
    for problem in result.errors:
        assert problem.message.endswith(".")


@pytest.mark.parametrize("levels", [40, 400, 900])
@pytest.mark.parametrize("kind", ["[]", "{}"])
@pytest.mark.parametrize("key", [*spec(), "workers", "logger", "deepspeed", "classifier_config", "unknown"])
def test_what_is_nested_deeply_gets_a_sentence_at_its_place(key: str, kind: str, levels: int) -> None:
    result = load_manifest(manifest(**{key: nested(levels, kind)}))
    assert result.job is None
    assert any(problem.path.startswith("spec") for problem in result.errors)
    assert len(result.errors) <= MOST + 1


def test_what_the_server_keeps_in_metadata_may_be_nested_without_end() -> None:
    deep = nested(900, "{}")
    kept = {"managedFields": [{"manager": "x", "fieldsV1": deep}], "ownerReferences": [deep], "name": "guard"}
    result = load_manifest({**manifest(), "metadata": kept})
    assert result.errors == []
    assert result.job is not None
    assert result.job.metadata.managed_fields == kept["managedFields"]


@pytest.mark.parametrize("text", ["0x" + "f" * 5000, "1" * 4000, "0b" + "1" * 1025, "-1" + "0" * 309])
@pytest.mark.parametrize("form", ["num_epochs: {}", '{{"num_epochs": {}}}', "deepspeed: {{a: {}}}"])
def test_a_number_that_nobody_could_print_gets_a_sentence(text: str, form: str) -> None:
    (problem,) = load_job(form.format(text), source="job.yaml").errors
    assert problem.message.startswith("job.yaml ")
    assert problem.message.endswith(".")
    assert "number" in problem.message


def test_a_huge_number_from_elsewhere_gets_a_sentence() -> None:
    for number in (10**5000, -(10**400)):
        for key in ("num_epochs", "learning_rate", "model_id"):
            (problem,) = load_manifest(manifest(**{key: number})).errors
            assert problem.path == f"spec.{key}"


BEYOND_ASCII = "as a regular expression is in ASCII"
"""Each range up to U+FFFF takes 5 ms where case is ignored, and what any module's name may be has few characters."""

PATTERNS = {
    "a{99999999999999999999}": "the repetition number is too large",
    "(" * 200 + ")" * 50: "is not a regular expression",
    "[[a]": None,
    "(?:(?:a{1,65535}){1,65535}){1,65535}": None,
    "(" * 128 + ")" * 128: None,
    "(a+)+$": None,
    "\\": "bad escape",
    "(?i)[" + "".join(f"{chr(0xA1 + number)}-\uffff" for number in range(83)) + "]": BEYOND_ASCII,
    "(?i)[" + "".join(rf"{chr(0x41 + number)}-\uffff" for number in range(26)) + "]": BEYOND_ASCII,
    r"[!-\U0010ffff]": BEYOND_ASCII,
    r"a\\\N{LATIN SMALL LETTER A}": BEYOND_ASCII,
    "couché": BEYOND_ASCII,
    r"(?i)[\x00-\xff]\\u": None,
}


def _layers(pattern: str) -> dict[str, Any]:
    return {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": pattern}


@pytest.mark.parametrize(("pattern", "part"), PATTERNS.items(), ids=ascii)
def test_whatever_a_regular_expression_is_there_is_a_job_or_a_sentence(pattern: str, part: str | None) -> None:
    for config in ({"target_modules": pattern}, {"exclude_modules": pattern}, _layers(pattern)):
        result = load_manifest(manifest(lora_config=config))
        assert (result.job is None) == (part is not None)
        assert part is None or part in result.errors[0].message


TAILS = {
    "tags": "<a>" * (LONG // 3),
    "tags and spaces": "<a>" + " b" * (LONG // 2 - 2),
    "astral": "<a>" + "\U0001f600 " * (LONG // 2 - 2),
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=list(TAILS))
def test_an_end_of_turn_of_thousands_of_tags_is_refused(tail: str) -> None:
    """Each would be a text of its own that an answer may end with: half a gigabyte of them."""
    texts = {"system": "{instruction}", "user": "{instruction}", "assistant": "{instruction}" + tail}
    (problem,) = load_manifest(manifest(generation_config={"prompt_format": texts})).errors
    assert problem.path == "spec.generation_config.prompt_format"
    assert "shorten the text with which an answer ends" in problem.message


def test_an_end_of_turn_of_a_few_tags_is_not() -> None:
    tail = "<a> " * (MOST_BORDERS // 2 - 1)
    made = PromptFormat(system="{instruction}", user="{instruction}", assistant="{instruction}" + tail)
    assert made.literals.ends[0] == tail


def test_where_a_stop_may_begin_or_end() -> None:
    spaces = re.compile(r"^\s+|\s+$")
    for tail in ("", " ", "a", " a", "a ", " a b ", "\n a\u2003", "a" + " " * 50 + "b", "\x1c\u3000"):
        assert borders(tail) == {border for match in spaces.finditer(tail) for border in match.span()}, repr(tail)
    assert borders(" <s> a") == {0, 1, 4, 5}
    assert answer_literals("", "</s> ", "").ends == ("</s> ", "</s>")


def test_looking_for_them_goes_through_the_text_twice_however_much_white_space_it_has() -> None:
    looked: list[int] = []

    class Counted(str):
        def lstrip(self, *arguments: Any) -> str:
            looked.append(len(self))
            return super().lstrip(*arguments)

        def rstrip(self, *arguments: Any) -> str:
            looked.append(len(self))
            return super().rstrip(*arguments)

    assert borders(Counted("a" + " " * 10_000 + "b")) == set()
    assert looked == [10_002, 10_002]


def test_a_key_that_is_given_twice_is_found_among_many() -> None:
    pairs = ",".join(f'"k{number}": 1' for number in range(50_000))
    result = load_job(f'{{{pairs},"k49999": 2}}', source="job.json")
    assert result.errors[0].message == "job.json is not a job: the key 'k49999' is given twice."


def _said(result: LoadResult) -> list[str]:
    return [str(problem) for problem in [*result.errors, *result.warnings]]


def test_a_refused_kind_of_job_is_told_so_whatever_its_block_holds() -> None:
    for block in ({"label_tokens": ["a"]}, {"unheard_of": 1}, {}, [1], "text", nested(500, "{}")):
        (problem,) = load_manifest(manifest(classifier_config=block)).errors
        assert problem.path == "spec.classifier_config"
        assert "not supported" in problem.message


def test_random_depth_in_json_is_no_end(tmp_path: Any) -> None:
    for levels in range(900, 1100, 7):
        text = json.dumps(manifest()).replace('"lora_config": {}', '"lora_config": ' + "[" * levels + "]" * levels)
        assert _said(load_job(text, source="job.json"))
