"""The list of mutants that nobody could notice: each has a reason, and changes lines that there are."""

from __future__ import annotations

import importlib
import inspect

import pytest

from tests.mutation.__main__ import EQUIVALENT, Mutant, equivalents, read_diff, read_list


@pytest.mark.parametrize("mutant", sorted(equivalents(), key=str), ids=str)
def test_a_mutant_of_the_list_changes_lines_that_there_are(mutant: Mutant) -> None:
    module, _, name = mutant.function.partition(":")
    lines = [line.strip() for line in inspect.getsource(importlib.import_module(module)).splitlines()]
    assert f"def {name.rpartition('.')[2]}(" in " ".join(lines)
    assert all(line.strip() in lines for line in mutant.before.splitlines())
    assert mutant.before != mutant.after


def test_the_list_is_read() -> None:
    block = "# The same either way.\n@ finetune_operator.policy.retry:exhausted\n-return a > b\n+return a >= b"
    assert list(read_list(f"# A heading.\n\n{block}\n\n")) == [
        Mutant("finetune_operator.policy.retry:exhausted", "return a > b", "return a >= b")
    ]
    assert len(list(read_list(EQUIVALENT.read_text()))) == len(equivalents())


@pytest.mark.parametrize("block", ["@ f\n-a\n+b", "# why\n-a\n+b", "# why\n@ f"])
def test_a_block_without_a_reason_a_function_or_a_change_is_refused(block: str) -> None:
    with pytest.raises(ValueError, match=r"equivalent\.txt: a block needs"):
        list(read_list(block))


def test_a_mutant_is_told_by_what_it_changes() -> None:
    diff = "# x: survived\n--- a.py\n+++ a.py\n@@ -8,4 +8,4 @@\n     wait = 1\n-    return a > b\n+    return a >= b\n"
    assert read_diff("finetune_operator.policy.retry.x_exhausted__mutmut_3", diff) == Mutant(
        "finetune_operator.policy.retry:exhausted", "return a > b", "return a >= b"
    )
    assert read_diff("a.b.xǁConditionWriterǁ_set__mutmut_12", diff).function == "a.b:ConditionWriter._set"
