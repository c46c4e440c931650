"""A budget gives so many at once and so many per second to each key, to nobody more, and remembers a bounded number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.serving import budget as budget_module
from finetune_operator.serving.budget import Budget


class Setting:
    """A budget whose time is moved by hand."""

    def __init__(self, burst: float = 3, per_second: float = 0.5) -> None:
        self.seconds = 100.0
        self.budget = Budget[str](burst, per_second, clock=lambda: self.seconds)

    def taken(self, key: str = "one", tries: int = 10) -> int:
        """How many of so many tries got one."""
        return sum(self.budget.take(key) for _ in range(tries))


def test_a_burst_is_given_at_once_and_then_what_time_brings() -> None:
    setting = Setting()
    assert setting.taken() == 3
    setting.seconds += 4
    assert setting.taken() == 2
    setting.seconds += 1000
    assert setting.taken() == 3


def test_keys_do_not_share() -> None:
    setting = Setting()
    assert (setting.taken("one"), setting.taken("other")) == (3, 3)


def test_what_is_given_back_can_be_taken_again_and_never_makes_more_than_the_burst() -> None:
    setting = Setting()
    setting.taken()
    setting.budget.give_back("one")
    assert setting.taken() == 1
    for _ in range(10):
        setting.budget.give_back("one")
    assert setting.taken() == 3


def test_the_wait_is_over_when_it_says() -> None:
    setting = Setting()
    assert setting.budget.wait_seconds("one") == 0
    setting.taken()
    assert not setting.budget.has("one")
    wait = setting.budget.wait_seconds("one")
    assert wait == 2
    setting.seconds += wait
    assert setting.budget.wait_seconds("one") == 0
    assert setting.taken() == 1


def test_of_many_keys_the_one_that_was_used_longest_ago_is_forgotten() -> None:
    setting = Setting()
    for number in range(2 * budget_module.KEYS):
        setting.budget.take(str(number))
    assert len(setting.budget) == budget_module.KEYS
    assert setting.taken(str(2 * budget_module.KEYS - 1)) == 2
    assert setting.taken("0") == 3


def test_a_key_that_has_all_again_is_not_remembered() -> None:
    setting = Setting()
    setting.budget.take("one")
    setting.budget.give_back("one")
    assert len(setting.budget) == 0


@given(
    burst=st.integers(1, 20),
    per_second=st.floats(0.1, 10),
    steps=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 10)), max_size=30),
)
def test_nobody_ever_gets_more_than_burst_and_rate_allow(
    burst: int, per_second: float, steps: list[tuple[float, int]]
) -> None:
    setting = Setting(burst, per_second)
    taken, passed = 0, 0.0
    for seconds, tries in steps:
        setting.seconds += seconds
        passed += seconds
        taken += setting.taken(tries=tries)
        assert taken <= burst + passed * per_second + 1e-6
