"""Requests are counted from the audit log, in which the API server may just be writing."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cluster.audit import AuditLog

USER = "system:serviceaccount:finetune-system:operator"


def line(name: str) -> str:
    """A request about the object of that name."""
    event = {
        "user": {"username": USER},
        "verb": "get",
        "stage": "ResponseComplete",
        "objectRef": {"resource": "pods", "name": name},
        "requestReceivedTimestamp": "2026-01-31T12:00:00Z",
    }
    return json.dumps(event) + "\n"


def test_a_position_is_behind_a_whole_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log", "finetune-system")
    assert log.position() == 0
    first, second = line("a" * 100_000), line("second")
    for half in (0, 1, len(second) // 2, len(second) - 1):
        log.file.write_text(first + second[:half])
        position = log.position()
        with log.file.open("a") as file:
            file.write(second[half:])
        assert [request.name for request in log.requests(USER, position)] == ["second"], half
    assert log.position() == len(first + second)
