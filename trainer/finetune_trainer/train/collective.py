"""The few things ranks must agree on, over a group of their own on CPU so that no GPU waits for them.

Collectives are for what every rank does at about the same time. Where one rank works and the others wait, they meet
through the store first: `on_first`, `on_node_first`, `from_first`, `share_folder` and `barrier` may take hours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from finetune_trainer.train.meetings import WAIT_LIMIT, Meetings

TIMEOUT = timedelta(minutes=15)
"""After which a collective is given up: so long no rank is behind the others without having failed or hung."""

T = TypeVar("T")


class Ranks:
    """This process among all of the job's; alone it answers at once.

    Args:
        timeout: of a collective.
        wait_limit: for the work of other ranks.
    """

    def __init__(self, *, timeout: timedelta = TIMEOUT, wait_limit: timedelta = WAIT_LIMIT) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.world_size > 1 else 0
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1
        self._group: dist.ProcessGroup | None = None
        if self.world_size == 1:
            return
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        everyone = self.gather((self.rank - self.local_rank, os.getpid()))
        self._nodes = len({first for first, _ in everyone})
        here = {rank: pid for rank, (first, pid) in enumerate(everyone) if first == self.rank - self.local_rank}
        # The group's name is in the keys: another Ranks of this process has its own.
        store = PrefixStore(f"ranks/{self._group.group_name}", _get_default_store())
        self._meetings = Meetings(store, rank=self.rank, processes=here, limit=wait_limit)

    @property
    def is_first(self) -> bool:
        """Rank 0, which alone writes results."""
        return self.rank == 0

    @property
    def is_node_first(self) -> bool:
        """The first rank of its node, which fetches and tokenizes for the others there."""
        return self.local_rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is true on any rank."""
        if self._group is None:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(value) for value in tensor.tolist()]

    def sums(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return [float(value) for value in tensor.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order, on every rank."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        return self.on_first(lambda: value)

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank. An exception there ends the job for all."""
        if self._group is None:
            return work()
        with self.failing_together():
            box = [work() if self.is_first else None]
        self._meetings.meet(comes=self.is_first, expected=1)
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]  # T came from rank 0

    def on_node_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank of this node, on every rank of the node, once it is done everywhere.

        An exception on any node ends the job for all.
        """
        if self._group is None:
            return work()
        with self.failing_together():
            value = work() if self.is_node_first else None
        self._meetings.meet(comes=self.is_node_first, expected=self._nodes)
        return self.gather(value)[self.rank - self.local_rank]  # type: ignore[no-any-return]  # as in on_first

    def share_folder(self, folder: Path) -> Path:
        """A folder that every rank of this node can read, with the files of rank 0's `folder`.

        The other nodes get copies, since they may not see rank 0's disk.
        """
        if self.world_size > self.local_world_size:
            files = {path.name: path.read_bytes() for path in folder.iterdir()} if self.is_first else None
            files = self.from_first(files)
            if self.is_node_first and not self.is_first:
                folder.mkdir(parents=True)
                for name, content in files.items():
                    (folder / name).write_bytes(content)
        return self.on_node_first(lambda: folder)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._group is not None:
            self._meetings.meet(comes=True, expected=self.world_size)

    def failing_together(self) -> AbstractContextManager[None]:
        """A block whose exceptions the other ranks learn of, so that none of them waits for this one in vain."""
        return nullcontext() if self._group is None else self._meetings.telling()
