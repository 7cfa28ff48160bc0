"""From a lowered graph to the kernels of its plugins: which constants they need, and the PTX for a device.

What the plugins are, and how TensorRT gets them, is in :mod:`moedge.runtime.device.moedge_plugins`, which also works
on a device; this half needs Triton, and only when it compiles.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._children import module
from moedge._files import atomic_dir
from moedge.convert.ops.kernels.launch import Launch
from moedge.runtime.device.moedge_plugins import PLUGINS, Binary, Plugin, key_of


def launch_of(plugin: Plugin, options: Mapping[str, Any], tactic: int) -> Launch:
    """Return the kernel of a tactic (needs Triton)."""
    path = {"path": plugin.tactics[tactic - 1]} if plugin.tactics else {}
    launch: Launch = import_module(f"moedge.convert.ops.kernels.{plugin.module}").launch(**options, **path)
    return launch


class Compiler:
    """Compiles with Triton, on the machine that builds the engine."""

    def get(self, plugin: Plugin, options: Mapping[str, Any], tactic: int, capability: int) -> Binary:
        """See :class:`moedge.runtime.device.moedge_plugins.Kernels`."""
        from moedge.convert.ops.kernels.compile import PLUGIN_SHARED, compile_launch

        launch = launch_of(plugin, options, tactic)
        made = compile_launch(launch, capability, most_shared=PLUGIN_SHARED)
        return Binary(made.name, made.ptx, made.threads, made.shared, launch.grid, bool(launch.scalars))


@dataclass(frozen=True)
class Request:
    """A plugin with the constants of one node."""

    plugin: str
    options: Mapping[str, Any]


def write_library(folder: Path, requests: Sequence[Request], capabilities: Sequence[int]) -> None:
    """Compile every tactic of every request for every compute capability into ``folder``.

    Writes ``kernels.json`` (launch data by request, sha256 of each file) and one PTX file a distinct kernel. The same
    input gives the same bytes.
    """
    compiler, entries = Compiler(), {}
    with atomic_dir(folder) as made:
        for request in requests:
            plugin = PLUGINS[request.plugin]
            for capability in capabilities:
                for tactic in plugin.tactic_numbers:
                    binary = compiler.get(plugin, request.options, tactic, capability)
                    digest = hashlib.sha256(binary.ptx.encode()).hexdigest()
                    (made / f"{digest[:16]}.ptx").write_text(binary.ptx, encoding="utf-8", newline="\n")
                    entries[key_of(plugin, request.options, tactic, capability)] = {
                        "name": binary.name,
                        "sha256": digest,
                        "threads": binary.threads,
                        "shared": binary.shared,
                        "grid": [[extent.times, extent.plus, extent.over] for extent in binary.grid],
                        "takes_size": binary.takes_size,
                    }
        index = {"format": 1, "kernels": dict(sorted(entries.items()))}
        (made / "kernels.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def check_triton() -> None:
    """Raise a MoEdgeError when Triton is not installed."""
    if find_spec("triton") is None:
        raise MoEdgeError(
            "The kernels of TensorRT plugins are compiled with Triton, which is not installed: pip install "
            "'moedge[plugins]', or choose experts in standard operators with --tensorrt 10.8."
        )


def compile_library(folder: Path, requests: Sequence[Request], capabilities: Sequence[int]) -> None:
    """:func:`write_library` in a process of its own: Triton reads once whether it shall interpret or compile.

    Raises:
        MoEdgeError: Triton is not installed, or a kernel does not compile.
    """
    check_triton()
    asked = {"requests": [asdict(request) for request in requests], "capabilities": list(capabilities)}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = module(__name__, str(folder))
    done = subprocess.run(
        command, input=json.dumps(asked), env=environment, capture_output=True, text=True, timeout=3600, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].rpartition("MoEdgeError: ")[2]
        raise MoEdgeError(
            f"The kernels of the TensorRT plugins do not compile: {reason.rstrip('.')}; choose experts in standard "
            "operators with --tensorrt 10.8."
        )


if __name__ == "__main__":
    _asked = json.load(sys.stdin)
    write_library(Path(sys.argv[1]), [Request(**request) for request in _asked["requests"]], _asked["capabilities"])
