"""What the progress bar shows, and the endpoint that feeds it."""

from __future__ import annotations

import queue

import httpx
import pytest

from finetune_api.outcome import Metric, ProgressReport, TrainerStatus
from finetune_cli.progress import BarState, bar_state, progress_endpoint


def _status(percent: int | None = None, left: int | None = None, **metrics: str) -> TrainerStatus:
    return TrainerStatus(
        progress_percentage=percent,
        estimated_remaining_seconds=left,
        metrics=[Metric(name=name, value=value) for name, value in metrics.items()],
        last_updated_time="2026-01-01T00:00:00+00:00",
    )


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (_status(phase="Preparing"), BarState("Preparing", 0, None, "")),
        (_status(40, phase="Preparing"), BarState("Preparing", 40, 100, "40 %")),
        (
            _status(
                25, 90, phase="Running", current_step="5", total_steps="20", loss="1.2345", tokens_per_second="1234.5"
            ),
            BarState("Running", 5, 20, "step 5/20  loss 1.234  1,234 tokens/s  1 min 30 s left"),
        ),
        # Figures that were not measured are left out, and so is what is no number.
        (
            _status(phase="Running", current_step="5", total_steps="20", loss="nan"),
            BarState("Running", 5, 20, "step 5/20"),
        ),
        (_status(99, phase="Publishing", current_step="20", total_steps="20"), BarState("Publishing", 0, None, "")),
        # A stock KubeflowCallback names no phase.
        (_status(0, current_step="1", total_steps="4"), BarState("Running", 1, 4, "step 1/4")),
    ],
)
def test_a_report_becomes_one_line(status: TrainerStatus, expected: BarState) -> None:
    assert bar_state(status) == expected


def test_reports_with_the_token_arrive_and_others_do_not() -> None:
    received: queue.Queue[TrainerStatus] = queue.Queue()
    report = ProgressReport(trainer_status=_status(7, phase="Running")).model_dump_json()
    with progress_endpoint("the-token", received.put) as url:
        answers = [
            httpx.post(url, content=report, headers={"Authorization": f"Bearer {token}"}, trust_env=False).status_code
            for token in ("wrong", "the-token")
        ]
    assert answers == [401, 200]
    assert received.get_nowait().progress_percentage == 7
    assert received.empty()


def test_the_endpoint_listens_on_loopback_only_and_is_gone_afterwards() -> None:
    with progress_endpoint("the-token", lambda _status: None) as url:
        assert url.startswith("http://127.0.0.1:")
    with pytest.raises(httpx.ConnectError):
        httpx.post(url, trust_env=False)
