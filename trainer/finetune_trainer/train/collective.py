"""The few things ranks must agree on, over a group of their own on CPU so that no GPU waits for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the others: rank 0 may be fetching a large model or uploading a checkpoint."""


T = TypeVar("T")


class Ranks:
    """This process among all of the job's; alone it answers at once."""

    def __init__(self) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.world_size > 1 else 0
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.world_size > 1 else None

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
        if self._group is None:
            return flag
        tensor = torch.tensor([int(flag)])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return bool(tensor.item())

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
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank. An exception there ends the job for all."""
        return self.from_first(work() if self.is_first else None)  # type: ignore[no-any-return]  # T came from rank 0

    def on_node_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank of this node, on every rank of the node."""
        found = self.gather(work() if self.is_node_first else None)
        return found[self.rank - self.local_rank]  # type: ignore[no-any-return]  # T came from the node's first rank

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
            dist.barrier(group=self._group)
