"""Data parallelism over processes: each has its part of the calibration windows, and every sum is that of all.

``torchrun`` starts the processes and :func:`start` joins them on Accelerate. Windows are dealt out in order
(:func:`span`); what is counted or summed over tokens goes through :func:`total`, what is kept of every token through
:func:`joined`. The sums are the same bits in all processes, so all of them decide alike and hold the same plan; the
first one writes it. Against one process a sum is in another order, which is rounding.

In one process all of this gives back what it is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError

if TYPE_CHECKING:
    import numpy as np
    import torch

_GONE = re.compile(r"connection (closed|reset)|broken pipe|remote process exited", re.IGNORECASE)
"""What gloo and NCCL say when the process at the other end has ended."""
PATIENCE = timedelta(days=7)
"""Processes wait so long for one that downloads, hashes or writes; one that ends takes the others with it anyway."""
_state: Any = None
"""Accelerate's PartialState, where there are several processes."""


def start(device: str = "cpu") -> None:
    """Join the processes that ``torchrun`` started; without it nothing happens.

    Args:
        device: where models are computed; ``cuda``: each process of a machine takes a GPU of its own.
    """
    global _state
    if _state is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        _state = PartialState(cpu=device == "cpu", timeout=PATIENCE)


def count() -> int:
    """How many processes there are."""
    return 1 if _state is None else int(_state.num_processes)


def rank() -> int:
    """Which one this is; the first is 0."""
    return 0 if _state is None else int(_state.process_index)


@contextmanager
def first_alone() -> Iterator[None]:
    """Run a block in the first process before the others: what it leaves in a cache is then there."""
    if rank():
        _wait()
    yield
    if not rank():
        _wait()


def _wait() -> None:
    """Wait until all processes are here."""
    if _state is not None:
        with _ended_together():
            _state.wait_for_everyone()


PIECE = 512
"""Longest piece of a window on which scores are measured: logits of a whole piece are held, and their gradients."""


def of_tokens(windows: np.ndarray, tokens: int) -> np.ndarray:
    """Return pieces, int64 [n, min(L, 512)], of windows [N, L] that hold about ``tokens``; each process gets one.

    The first piece of every window comes before the second of any: windows of several texts take turns, and a few long
    ones would be of the first texts alone.
    """
    count_of, length = windows.shape
    size = min(length, PIECE)
    pieces = windows[:, : length // size * size].reshape(count_of, -1, size).swapaxes(0, 1).reshape(-1, size)
    return pieces[: max(count(), tokens // size)]


def span(windows: int) -> slice:
    """Return which of some windows are this process's.

    Raises:
        MoEdgeError: there are fewer windows than processes.
    """
    if windows < count():
        raise MoEdgeError(
            f"{windows} windows cannot be shared by {count()} processes; give more (--windows), or start fewer."
        )
    ends = [windows * number // count() for number in (rank(), rank() + 1)]
    return slice(*ends)


def total(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the processes, of the same shape in each; exact where all but one hold zeros."""
    if _state is None:
        return value
    import torch

    found = value.detach().to(_state.device, copy=True).contiguous()
    with _ended_together():
        torch.distributed.all_reduce(found)
    return found.to(value.device)


def added(value: float) -> float:
    """Return the sum of a number over the processes, in float64."""
    if _state is None:
        return value
    import torch

    return float(total(torch.tensor(value, dtype=torch.float64)))


def mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values [T] of all processes' tokens."""
    return values.mean() if _state is None else total(values.sum()) / added(len(values))


def joined(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows [n, ...] of all processes, those of the first process first; n may differ."""
    if _state is None:
        return rows
    import torch

    counts = torch.zeros(count(), dtype=torch.int64)
    counts[rank()] = len(rows)
    ends = total(counts).cumsum(dim=0).tolist()
    whole = rows.new_zeros(ends[-1], *rows.shape[1:])
    whole[ends[rank()] - len(rows) : ends[rank()]] = rows
    return total(whole)


@contextmanager
def _ended_together() -> Iterator[None]:
    """End quietly where another process has ended: it has said why."""
    try:
        yield
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        raise SystemExit(MoEdgeError.exit_code) from None
