"""Peer ``torch.compile``: the dense checkpoint in PyTorch, its whole decoder compiled by inductor.

Compiling belongs to the first calls, which are not timed: minutes for a prompt and as long for a token, on a CPU with
g++. ``dynamic=True`` makes one graph for every length; a batch of one and of several are two.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from moedge import MoEdgeError
from moedge.runtime.engines.pytorch import TorchEngine


class CompiledEngine(TorchEngine):
    """A dense checkpoint under ``torch.compile``; see :class:`moedge.runtime.engines.pytorch.TorchEngine`.

    Args:
        path: the checkpoint's folder.
        threads: as of every engine.
        max_length: the model's own limit counts; accepted for the sake of a common call.
        dtype: as PyTorch's.
        device: as PyTorch's.

    Raises:
        MoEdgeError: no C++ compiler for the CPU, or the folder cannot be loaded.
    """

    bits = None

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        max_length: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise MoEdgeError("Peer torch.compile needs a C++ compiler on the CPU; install g++, or name one in CXX.")
        super().__init__(path, threads=threads, dtype=dtype, device=device, last_logits=True)
        if self.info.model.moe:
            raise MoEdgeError(f"Peer torch.compile runs the dense parent; {path} is converted: give it as an engine.")
        module = self._module
        module.forward = self._torch.compile(module.forward, dynamic=True)
        self.info = replace(self.info, name="torch.compile dense")
