"""How a worker hears that it should stop."""

from __future__ import annotations

import os
import signal

import pytest

from finetune_trainer.signals import STOP_SIGNALS, StopFlag, StopRequested, stop_at_once


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_while_it_prepares_a_signal_ends_the_work(number: signal.Signals) -> None:
    with pytest.raises(StopRequested, match=number.name), stop_at_once():
        signal.raise_signal(number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_while_it_trains_the_first_signal_raises_a_flag_and_the_second_ends_the_work(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
        with pytest.raises(StopRequested):
            signal.raise_signal(signal.SIGTERM)


def test_the_previous_handlers_return() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_at_once():
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.is_set()
        with pytest.raises(StopRequested):
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_forked_child_dies_of_the_signal_instead_of_handling_it() -> None:
    """A data loader or pool worker knows nothing of the flag, and would otherwise live on."""
    with StopFlag() as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert not stop.is_set()
