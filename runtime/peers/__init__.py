"""Peers: other programs that run the dense parent, timed beside our engines; one row each.

``moedge bench --peer``, ``moedge export --peer``, ``moedge doctor`` and the table in docs/bench.md ask these rows. A
new peer is one file with a subclass of :class:`moedge.runtime.peers.engine.PeerEngine` and one row. Nothing heavy is
imported here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moedge import MoEdgeError
from moedge._registry import Registry
from moedge._versions import installed


@dataclass(frozen=True)
class Peer:
    """What one peer is: what it opens, what it needs, what makes that."""

    name: str
    summary: str
    """For people: ``doctor``, docs."""
    takes: str
    """What the path in ``NAME:PATH`` must be, in words."""
    holds: tuple[str, ...]
    """Files, one of which lies in such a folder; or the endings of such a file."""
    opens: str
    """``module:class`` of its engine; called with the path, ``threads`` and ``max_length``."""
    packages: tuple[str, ...]
    """Distributions that it needs."""
    extra: str
    """Of pyproject.toml, which installs them."""
    builds: str | None = None
    """``module:function(checkpoint, out, precision)`` that makes what it opens of a dense checkpoint; None: nothing of
    ours does, and ``takes`` says what to do."""
    build_needs: tuple[str, ...] = ()
    """Distributions that ``builds`` needs."""
    precisions: tuple[str, ...] = ()
    """That ``builds`` can make, the default first."""
    built: str = ""
    """What ``builds`` writes: a file of this name, or with "" a folder."""
    runs_on: Literal["CPU", "CPU or GPU"] = "CPU"
    """Where it runs here."""
    pytorch: bool = False
    """It takes ``device`` and ``dtype`` of a checkpoint in PyTorch, too."""

    def missing(self) -> list[str]:
        """Return the distributions that are not installed."""
        return missing(self.packages)

    def check(self, path: Path) -> None:
        """Refuse what cannot be opened, before an hour of timing.

        Raises:
            MoEdgeError: what is missing, and the command that installs it; or what the path should be.
        """
        if lacking := self.missing():
            raise not_installed(self, lacking)
        if not path.exists():
            raise MoEdgeError(f"--peer {self.name}:{path}: nothing is there; give {self.takes}.")
        found = any((path / name).is_file() for name in self.holds) or path.suffix in self.holds
        if not found:
            raise MoEdgeError(f"--peer {self.name}:{path}: that is not {self.takes}.")

    def engine(self, path: Path, **options: Any) -> Any:
        """Open ``path`` as an engine (:class:`moedge.runtime.engines.Engine`).

        Raises:
            MoEdgeError: as :meth:`check`, or the program cannot open it.
        """
        self.check(path)
        return _named(self.opens)(path, **options)

    def build(self, checkpoint: Path, out: Path, precision: str) -> None:
        """Make what it opens of a dense checkpoint, at ``out``, which is not there yet.

        Raises:
            MoEdgeError: it cannot be made of this model, or here.
        """
        assert self.builds is not None
        _named(self.builds)(checkpoint, out, precision)


_HERE = "moedge.runtime.peers"
_ROWS = (
    Peer(
        "genai", "onnxruntime-genai, ONNX Runtime's own generator",
        takes="a folder with genai_config.json (of `moedge export --peer genai`, of its own builder, or a bundle)",
        holds=("genai_config.json",), opens=f"{_HERE}.genai:GenaiEngine",
        packages=("onnxruntime-genai",), extra="genai",
        builds=f"{_HERE}.genai_builder:build", build_needs=("onnxruntime-genai", "transformers", "onnx-ir"),
        precisions=("int4", "int8", "fp32"),
    ),
    Peer(
        "llama.cpp", "llama.cpp in llama-cpp-python, which is compiled for this processor when it is installed",
        takes="a .gguf file (of `moedge export --peer llama.cpp`, or any of this model)",
        holds=(".gguf",), opens=f"{_HERE}.llama_cpp:LlamaCppEngine",
        packages=("llama-cpp-python",), extra="llama-cpp",
        builds="moedge.convert.sources.gguf_write:build", build_needs=("gguf", "torch"),
        precisions=("Q4_0", "Q4_1", "Q8_0", "F16", "F32"), built="model.gguf",
    ),
    Peer(
        "openvino", "OpenVINO's CPU plugin",
        takes="a folder with openvino_model.xml (of optimum-intel) or the bundle of `moedge export --target openvino`",
        holds=("openvino_model.xml", "model.onnx"), opens=f"{_HERE}.openvino:OpenVinoEngine",
        packages=("openvino",), extra="openvino",
    ),
    Peer(
        "torch.compile", "PyTorch's compiler (inductor) on the checkpoint",
        takes="the dense checkpoint's folder, with config.json",
        holds=("config.json",), opens=f"{_HERE}.torch_compile:CompiledEngine",
        packages=("torch", "transformers"), extra="cpu", runs_on="CPU or GPU", pytorch=True,
    ),
)  # fmt: skip

_ALL = Registry("peer", _ROWS)
register, unregister, every, names, find = (_ALL.register, _ALL.unregister, _ALL.every, _ALL.names, _ALL.find)
"""See :class:`moedge._registry.Registry`."""


@dataclass(frozen=True)
class Given:
    """One ``--peer [NAME=]KIND:PATH``."""

    label: str
    peer: Peer
    path: Path


def parse(text: str) -> Given:
    """Read ``genai:FOLDER``, or ``NAME=genai:FOLDER`` with a name for tables.

    Raises:
        MoEdgeError: it has no path, or an unknown peer.
    """
    name, equals, rest = text.partition("=")
    label, said = (name, rest) if equals and ":" not in name else (text, text)
    kind, colon, path = said.partition(":")
    if not colon or not path or not label:
        raise MoEdgeError(f"--peer {text} is not NAME:PATH, with a name of {', '.join(names())}.")
    return Given(label, find(kind), Path(path))


def buildable(text: str) -> tuple[Peer, str]:
    """Read ``genai`` or ``genai:int8``, what `moedge export --peer` makes.

    Returns:
        The row, and the precision.

    Raises:
        MoEdgeError: nothing of ours makes that, in that precision.
    """
    name, _, precision = text.partition(":")
    row = find(name)
    if row.builds is None:
        ours = " or ".join(names(lambda row: row.builds is not None))
        raise MoEdgeError(f"--peer {name} is for {ours}; {name} takes {row.takes}.")
    if precision and precision not in row.precisions:
        raise MoEdgeError(f"--peer {text}: {name} is made in {', '.join(row.precisions)}, not in {precision!r}.")
    return row, precision or row.precisions[0]


def missing(names: Sequence[str]) -> list[str]:
    """Return the distributions that are not installed."""
    return [name for name in names if not installed(name)]


def not_installed(row: Peer, lacking: Sequence[str]) -> MoEdgeError:
    """What to say where distributions of a peer are missing."""
    return MoEdgeError(
        f"Peer {row.name} needs {' and '.join(lacking)}, which is not installed; install it with: "
        f"pip install 'moedge[{row.extra}]'"
    )


def _named(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
