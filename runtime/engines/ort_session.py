"""ONNX Runtime's sessions: how a bundle's graph is opened, on which provider, and what is refused there."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export import targets
from moedge.export.manifest import Manifest, Operators
from moedge.export.ort_ops import library as ort_ops

_OLDEST_CUDA = (1, 28)
"""The first whose CUDA kernel of ``MoE`` reads its SwiGLU attributes (onnxruntime-genai #2062, onnxruntime #28467)."""


_HEAVY = {
    *("MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "MoE", "QMoE", "GroupQueryAttention", "RotaryEmbedding"),
    *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
}
"""What a bundle is made for. Nodes that compute sizes are put on the CPU on purpose."""


def not_on(session: Any, provider: str) -> dict[str, int]:
    """Count by operator the nodes of a session that do the work and were not given to ``provider``.

    ONNX Runtime gives a node without a kernel there to the CPU and says nothing. The session must have been opened with
    ``session.record_ep_graph_assignment_info``.
    """
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != provider:
            found.update(node.op_type for node in part.get_nodes() if node.op_type in _HEAVY)
    return dict(found)


def check_cuda(what: Path | str) -> None:
    """Refuse what is made for ONNX Runtime's CUDA provider where there is none.

    Raises:
        MoEdgeError: there is none.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MoEdgeError("Running a bundle needs ONNX Runtime; install it with: pip install 'moedge[cuda]'") from error
    if targets.CUDA not in onnxruntime.get_available_providers():
        raise MoEdgeError(
            f"{what} is for ONNX Runtime's CUDA provider, which onnxruntime {onnxruntime.__version__} here does not "
            "have; run it on a machine with an NVIDIA GPU and `pip install 'moedge[cuda]'`, or use ort-cpu."
        )
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < _OLDEST_CUDA:
        oldest = ".".join(map(str, _OLDEST_CUDA))
        raise MoEdgeError(
            f"{what} needs onnxruntime-gpu {oldest} or newer, this is {onnxruntime.__version__}: the CUDA kernel of "
            "older ones gates experts by other constants, without an error; pip install 'moedge[cuda]'."
        )


def ort_value(array: np.ndarray, device: str = "cpu") -> Any:
    """Wrap an array for ONNX Runtime without a copy on the CPU; the caller keeps it alive."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)


def session_options(threads: int) -> Any:
    """Options of every session: all optimisations, ``threads`` threads that do not wait for work by spinning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: warnings about unused initializers are noise to a user
    # Worker threads stop spinning when a run ends; else an idle engine steals the cores from the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(
    folder: Path,
    manifest: Manifest,
    threads: int,
    graph: bytes | None,
    weights: dict[str, tuple[np.ndarray, Any]],
    trace: str | Path | None = None,
) -> tuple[Any, str]:
    """Open the graph of a bundle and return the session and ONNX Runtime's version.

    Args:
        folder: the bundle.
        manifest: of it.
        threads: intra-op threads.
        graph: what to run in place of the bundle's graph, with the bundle's weights.
        weights: arrays and their OrtValues by name, in place of weights of the file; the caller keeps them alive.
        trace: see :class:`moedge.runtime.engines.ort.OrtEngine`.

    Raises:
        MoEdgeError: ONNX Runtime is not installed, cannot load the graph, or would leave work to the CPU.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MoEdgeError("Running a bundle needs ONNX Runtime; install it with: pip install 'moedge[cpu]'") from error
    options = session_options(threads)
    path = folder / manifest.io.model
    model: str | bytes = str(path)
    if manifest.quantization and manifest.quantization.form == "DequantizeLinear":
        # Fold the weights when the graph is loaded. Otherwise each call unpacks all of them, or ONNX Runtime takes a
        # product of its own that rounds activations to int8, which the engine of this graph does not.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if manifest.operators is not None:
        _register(options, folder, manifest.operators)
    if weights:  # not add_initializer: it leaves some of the file's own values in use (1.31.1, no error)
        options.add_external_initializers(list(weights), [value for _, value in weights.values()])
    if graph is not None:
        model = graph
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if trace is not None:
        _trace_to(Path(trace), options)
    provider = targets.find(manifest.target).provider
    if provider == targets.CUDA:
        # CUDA and cuDNN from pip packages are on no loader path; only a process that imported torch has them already.
        with contextlib.redirect_stdout(sys.stderr):  # it reports there what it does not find
            onnxruntime.preload_dlls()
    # On by default: products of float32, the routers', would round what they read to 11 bits, as many as float16.
    settings = {"use_tf32": "0"} if provider == targets.CUDA else {}
    if settings:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[provider], provider_options=[settings])
    except Exception as error:
        raise MoEdgeError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error
    _check_placed(session, provider, path)
    return session, onnxruntime.__version__


def _register(options: Any, folder: Path, operators: Operators) -> None:
    """Let a session load the library of operators that a bundle carries; its hash was checked with all the others."""
    library = ort_ops.of_bundle(folder, operators)
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # made for another C library, or for a newer libstdc++
        try:
            options.register_custom_ops_library(str(ort_ops.compiled_from(folder, operators)))
        except Exception as again:
            raise MoEdgeError(
                f"ONNX Runtime cannot load the operators of {folder} ({str(error).splitlines()[0]}), nor compiled here "
                f"from their sources in the bundle: {str(again).splitlines()[0]}"
            ) from error


def _trace_to(folder: Path, options: Any) -> None:
    """Record every node, and write the optimised graph."""
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "trace")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # With a file of its own the weights may pass 2 GiB.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")


def _check_placed(session: Any, provider: str, path: Path) -> None:
    """Refuse a session that would run elsewhere than asked, in whole or in part."""
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on with the CPU, with a warning in its log
        raise MoEdgeError(f"ONNX Runtime could not start {provider} for {path}; check the driver and cuDNN.")
    if provider == targets.CUDA and (fallen := not_on(session, provider)):
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(fallen.items()))
        raise MoEdgeError(
            f"ONNX Runtime would run parts of {path.parent} on the CPU ({counted}), for its CUDA provider has no "
            "kernel for them as they are: update onnxruntime-gpu, or take --target ort-cpu."
        )
