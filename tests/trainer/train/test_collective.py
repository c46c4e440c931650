"""Ranks in processes of their own: one works for longer than a collective may take, fails, or dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.train.collective import Ranks
from tests.fork_server import fork_server

_TIMEOUT_SECONDS = 2.0
_LONG_SECONDS = _TIMEOUT_SECONDS + 0.5

_context = fork_server("torch.distributed", "finetune_trainer.train.collective")

Part = Callable[[Ranks, Path], Any]


def _long(value: Any) -> Any:
    time.sleep(_LONG_SECONDS)
    return value


def _fail() -> Any:
    raise JobError(Reason.HUB_UNAVAILABLE, "The hub does not answer.")


def _die() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def waits(ranks: Ranks, folder: Path) -> Any:
    """Everything that may take long, and a collective after it."""
    found = [ranks.on_first(lambda: _long("first")), ranks.from_first(ranks.rank)]
    found += [ranks.on_node_first(lambda: _long(ranks.rank) if ranks.is_first else ranks.rank)]
    shared = folder / f"node-{ranks.rank - ranks.local_rank}"
    if ranks.is_first:
        shared.mkdir()
        (shared / "file").write_text("content")
    found += [(ranks.share_folder(shared) / "file").read_text()]
    if ranks.is_first:
        _long(None)
    ranks.barrier()
    return [*found, ranks.sums([1.0]), ranks.any(ranks.is_first), ranks.gather(ranks.rank)]


def fails_on_first(ranks: Ranks, _: Path) -> Any:
    return ranks.on_first(_fail)


def fails_on_last_node(ranks: Ranks, _: Path) -> Any:
    return ranks.on_node_first(lambda: _fail() if ranks.rank > 0 else None)


def fails_elsewhere(ranks: Ranks, _: Path) -> Any:
    with ranks.failing_together():
        return ranks.barrier() if ranks.rank else _fail()


def dies_on_first(ranks: Ranks, _: Path) -> Any:
    return ranks.on_first(_die)


def _rank(part: Part, folder: Path, port: int, rank: int, world_size: int, nodes: int, answers: Any) -> None:
    here = world_size // nodes
    os.environ |= {"LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", store=TCPStore("127.0.0.1", port), rank=rank, world_size=world_size)
    try:
        answers.put((rank, part(Ranks(timeout=timedelta(seconds=_TIMEOUT_SECONDS)), folder)))
    except JobError as error:
        answers.put((rank, (error.reason, error.message)))


def run(part: Part, folder: Path, *, world_size: int, nodes: int = 1, answering: int | None = None) -> dict[int, Any]:
    """What `part` returned or raised, by rank; `answering` ranks live to tell."""
    # Held by none of the ranks, as in a real job.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = _context.Queue()
    processes = [
        _context.Process(target=_rank, args=(part, folder, store.port, rank, world_size, nodes, answers))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        expected = world_size if answering is None else answering
        # A dead child stays a zombie, which lives to `kill`, until somebody asks for it: as elastic does all the time.
        found: dict[int, Any] = {}
        deadline = time.monotonic() + 30
        while len(found) < expected and time.monotonic() < deadline:
            multiprocessing.active_children()
            found |= dict([answers.get()]) if not answers.empty() else {}
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert len(found) == expected
    return found


def test_a_rank_may_work_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    found = run(waits, tmp_path, world_size=4, nodes=2)
    for rank in range(4):
        assert found[rank] == ["first", 0, rank // 2 * 2, "content", [4.0], True, [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("part", "nodes", "cause"), [(fails_on_first, 1, 0), (fails_on_last_node, 2, 1), (fails_elsewhere, 1, 0)]
)
def test_nobody_waits_for_a_rank_that_failed(tmp_path: Path, part: Part, nodes: int, cause: int) -> None:
    found = run(part, tmp_path, world_size=2, nodes=nodes)
    assert found[cause] == (Reason.HUB_UNAVAILABLE, "The hub does not answer.")
    reason, message = found[1 - cause]
    assert reason is Reason.PEER_FAILED
    assert f"rank {cause} failed: The hub does not answer." in message


def test_nobody_waits_for_a_rank_that_was_killed(tmp_path: Path) -> None:
    found = run(dies_on_first, tmp_path, world_size=2, answering=1)
    reason, message = found[1]
    assert reason is Reason.PEER_FAILED
    assert "rank 0 vanished" in message
