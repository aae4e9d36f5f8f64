"""Data parallelism with processes of one thread each.

On a shared machine two such processes beat one process with two threads: the threads of one
operation wait for each other whenever another program takes a core.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that train the same model on different pictures."""

    rank: int
    count: int

    @property
    def is_first(self) -> bool:
        """Whether this one logs, evaluates and saves."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors with their mean over all workers, in place."""
        tensors = list(tensors)
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def average_value(self, value: float) -> float:
        """The mean of a number over all workers."""
        tensor = torch.tensor([value], dtype=torch.float64)
        self.average([tensor])
        return tensor.item()

    def average_buffers(self, model: nn.Module) -> None:
        """Agree on the running statistics of all BatchNorms."""
        self.average(b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var")))


def run_workers(count: int, function: Callable[[Worker], None]) -> None:
    """Run a function, which must be picklable, in `count` processes (in this one if that is 1)."""
    if count == 1:
        function(Worker(0, 1))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "rendezvous"
        arguments = (count, store.as_uri(), function)
        torch.multiprocessing.spawn(_start, arguments, nprocs=count, daemon=True)


def _start(rank: int, count: int, store: str, function: Callable[[Worker], None]) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    function(Worker(rank, count))
    dist.destroy_process_group()
