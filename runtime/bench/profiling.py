"""Where an ONNX Runtime bundle spends its time: milliseconds by operator and by part of the model.

ONNX Runtime's own profiler times every node of the graph that it runs. Prefill and decode are kept apart. The same text
is read and decoded several times, and of one step a node counts with the shortest of its times: what else a machine
does only adds to them. Over the steps of decode it counts with the mean: their work differs where the cache grows and
where small values are left out, so that the shortest step is a step of less work. Nodes are grouped by what they
compute: the optimised graph is cut at its fused norms, the piece with an attention node is attention, the piece that
makes the logits is the head, the others are FFNs; inside an FFN, what the ``MoE``, ``QMoE`` or ``RoutedGLU`` node takes
its experts and weights from is the router (in float32 with the shared experts' gate and up, which are one product with
it). What no norm feeds (embedding, masks, lengths) is ``input``. A graph without fused norms (``portable``) is not
grouped.

Recording costs a few microseconds a node, more than a small node takes. The cheapest node of the run is taken as that
cost and subtracted from every node; ``outside`` is what the unprofiled run takes beyond the nodes: the executor, the
binding of inputs, the choice of the token. Where nothing ran undisturbed it is noise, and can be negative.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.export import manifest as manifests
from moedge.export import targets
from moedge.runtime.engines import Engine

SCHEMA = "moedge.profile/1"
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_ATTENTION = ("GroupQueryAttention", "Attention", "MultiHeadAttention", "CausalAttention")
_EXPERTS = ("MoE", "QMoE", "RoutedGLU")
GROUPS = ("attention", "router", "experts", "dense FFN", "norms", "head", "input")
"""``dense FFN`` is a whole unconverted FFN, or the shared experts of a converted one with the sum of both."""


def profile(
    path: str | Path, ids: np.ndarray, *, prompt: int, decode: int, repeats: int, threads: int | None = None
) -> dict[str, Any]:
    """Profile one bundle at batch 1: ``repeats`` times a prompt and ``decode`` greedy steps, after one that is dropped.

    Args:
        path: a bundle that ONNX Runtime runs; needs the ``onnx`` package.
        ids: int64 [>= prompt].

    Returns:
        JSON-ready dict of schema ``moedge.profile/1``: for ``prefill`` and ``decode`` the unprofiled milliseconds
        ``ms`` (each step's shortest, mean over the steps), ``recording_us`` subtracted from each node, and
        ``operators`` and ``groups``: rows of name, nodes, ms and share of ``ms``. ``weights``: bytes that each group
        stores.

    Raises:
        MoEdgeError: no such bundle, or ``onnx`` is not installed.
    """
    from moedge.runtime.engines.ort import OrtEngine

    onnx = _onnx()
    ids = np.asarray(ids, dtype=np.int64).reshape(1, -1)[:, :prompt]
    engine = OrtEngine(path, threads=threads, last_logits=True)
    plain = [_run(engine, ids, decode) for _ in range(repeats + 1)][1:]
    engine.close()
    with tempfile.TemporaryDirectory(prefix="moedge-profile-") as folder:
        engine = OrtEngine(path, threads=threads, last_logits=True, trace=folder)
        for _ in range(repeats + 1):
            _run(engine, ids, decode)
        events = json.loads(engine.end_trace().read_text(encoding="utf-8"))
        engine.close()
        graph = onnx.load(Path(folder) / "optimized.onnx", load_external_data=False).graph
    groups = group_nodes(graph)
    weights = group_weights(graph, groups)
    runs = split_runs(events)[decode + 1 :]
    phases = {
        "prefill": runs[:: decode + 1],
        "decode": [run for number, run in enumerate(runs) if number % (decode + 1)],
    }
    times = {
        "prefill": min(first for first, _ in plain),
        "decode": float(np.min([steps for _, steps in plain], axis=0).mean()),
    }
    result: dict[str, Any] = {"schema": SCHEMA, "threads": engine.info.threads, "prompt": prompt, "weights": weights}
    steps = {"prefill": 1, "decode": decode}
    return result | {phase: summary(runs, groups, times[phase], steps[phase]) for phase, runs in phases.items()}


def profilable(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return the bundles that ONNX Runtime runs; asked before an hour of timing, of which profiles come last.

    Raises:
        MoEdgeError: there is none, or ``onnx`` is not installed.
    """
    rows = {label: targets.known(_target(path)) for label, path in folders.items()}
    found = {label: folders[label] for label, row in rows.items() if row is not None and row.engine is None}
    if not found:
        raise MoEdgeError("Only bundles that ONNX Runtime runs can be profiled, and there is none among these engines.")
    _onnx()
    return found


def _onnx() -> Any:
    """The package that reads graphs."""
    try:
        import onnx
    except ImportError as error:
        raise MoEdgeError("Profiling needs the onnx package; install it with: pip install onnx") from error
    return onnx


def profiles(
    folders: Mapping[str, Path],
    ids: np.ndarray,
    *,
    progress: Callable[[int, int], None] | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Profile every bundle of :func:`profilable`, one after the other: label -> what :func:`profile` returns.

    Raises:
        MoEdgeError: there is none.
    """
    found = profilable(folders)
    result = {}
    for number, (label, path) in enumerate(found.items()):
        result[label] = profile(path, ids, **sizes)
        if progress:
            progress(number + 1, len(found))
    return result


def _target(path: Path) -> str:
    manifest = manifests.read(path)
    return manifest.target if manifest else ""


def _run(engine: Engine, ids: np.ndarray, decode: int) -> tuple[float, list[float]]:
    """Milliseconds of one prefill and of each decode step."""
    times = []
    step, token = None, 0
    for _ in range(decode + 1):
        start = time.perf_counter()
        step = engine.prefill(ids) if step is None else engine.decode(np.array([[token]], dtype=np.int64), step.cache)
        token = int(step.logits[0, -1].argmax())
        times.append(1e3 * (time.perf_counter() - start))
    return times[0], times[1:]


def split_runs(events: list[dict[str, Any]]) -> list[dict[str, tuple[str, float]]]:
    """One dict a ``model_run`` event, in order: node -> (operator, microseconds)."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    starts = np.array([start for start, _ in spans])
    runs: list[dict[str, tuple[str, float]]] = [{} for _ in spans]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            number = int(np.searchsorted(starts, event["ts"], side="right")) - 1
            if number >= 0 and event["ts"] <= spans[number][1]:
                name = event["name"].removesuffix("_kernel_time")
                runs[number][name] = (event["args"]["op_name"], float(event["dur"]))
    return runs


def summary(
    runs: list[dict[str, tuple[str, float]]], groups: dict[str, str], total_ms: float, steps: int = 1
) -> dict[str, Any]:
    """Reduce the runs of one phase to rows by operator and by group; see :func:`profile`.

    Args:
        runs: of :func:`split_runs`: ``steps`` of them, and the same again in every repeat.
        groups: of :func:`group_nodes`.
        total_ms: what a step took without the recorder.
        steps: how many differ.

    Raises:
        MoEdgeError: no run, or none with a node.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for step in range(steps):
        for name, (kind, duration) in _shortest(runs[step::steps]).items():
            samples[name].append(duration)
            kinds[name] = kind
    if not samples:
        raise MoEdgeError(
            "ONNX Runtime's profiler recorded no node; this is a bug, report it with the runtime version."
        )
    times = {name: sum(values) / len(values) for name, values in samples.items()}
    recording = min(times.values())

    def rows(key: Callable[[str], str]) -> list[dict[str, Any]]:
        found: dict[str, list[float]] = defaultdict(list)
        for name, value in times.items():
            part = len(samples[name]) / steps  # of the steps, in which the node ran
            found[key(name)].append(part * (value - recording) / 1e3)
        table = [
            {"name": name, "nodes": len(values), "ms": sum(values), "share": sum(values) / total_ms}
            for name, values in found.items()
        ]
        return sorted(table, key=lambda row: -row["ms"])

    operators = rows(lambda name: kinds[name])
    spent = sum(row["ms"] for row in operators)
    outside = {"name": "outside", "nodes": 0, "ms": total_ms - spent, "share": 1 - spent / total_ms}
    grouped = [*rows(lambda name: groups.get(name, "other")), outside] if groups else []
    return {
        "ms": total_ms,
        "nodes": len(times),
        "recording_us": recording,
        "operators": [*operators, outside],
        "groups": grouped,
    }


def _shortest(repeats: list[dict[str, tuple[str, float]]]) -> dict[str, tuple[str, float]]:
    """Node -> operator and the shortest of its times in repeats of one step."""
    found: dict[str, tuple[str, float]] = {}
    for run in repeats:
        for name, (kind, duration) in run.items():
            found[name] = (kind, min(duration, found.get(name, (kind, duration))[1]))
    return found


def group_nodes(graph: Any) -> dict[str, str]:
    """Name the group (one of :data:`GROUPS`) of every node of an optimised graph; {} when it has no fused norm."""
    nodes = list(graph.node)
    norms = {node.name for node in nodes if node.op_type in _NORMS}
    if not norms:
        return {}
    maker = {output: node for node in nodes for output in node.output if output}
    piece = _pieces(nodes, norms, maker)
    kind: dict[str, str] = {}
    for node in nodes:
        if node.name in piece:
            if node.op_type in _ATTENTION:
                kind[piece[node.name]] = "attention"
            elif "logits" in node.output:
                kind[piece[node.name]] = "head"
    groups = {}
    for node in nodes:
        if node.name in norms:
            groups[node.name] = "norms"
        else:
            groups[node.name] = kind.get(piece[node.name], "dense FFN") if node.name in piece else "input"
    routing = [maker[name] for name in _group_experts(nodes, groups) if name in maker]
    while routing:
        source = routing.pop()
        if groups[source.name] == "dense FFN":
            groups[source.name] = "router"
            routing += [maker[name] for name in source.input if name in maker]
    return groups


def group_weights(graph: Any, groups: dict[str, str]) -> dict[str, int]:
    """Bytes of the weights of each group of an optimised graph; one that several nodes read counts where most is made.

    A tied table is looked up in ``input`` and multiplied by in the head: it counts for the head, which reads all of it.
    """
    from onnx import helper

    sizes = {
        tensor.name: math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
    }
    owner: dict[str, str] = {}
    for node in graph.node:
        group = groups.get(node.name)
        for name in node.input:
            if name in sizes and group is not None and (name not in owner or owner[name] == "input"):
                owner[name] = group
    found: dict[str, int] = defaultdict(int)
    for name, group in owner.items():
        found[group] += sizes[name]
    return dict(found)


def _pieces(nodes: list[Any], norms: set[str], maker: dict[str, Any]) -> dict[str, str]:
    """Join the nodes behind some norm by the values between them, norms left out: node -> a node of its piece."""
    root: dict[str, str] = {}
    behind: set[str] = set()  # nodes that some norm feeds; the graph is in topological order
    for node in nodes:
        sources = [maker[name].name for name in node.input if name in maker]
        if any(source in norms or source in behind for source in sources):
            behind.add(node.name)
            if node.name not in norms:
                root[node.name] = node.name

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for node in nodes:
        if node.name in root:
            for source in (maker[name].name for name in node.input if name in maker):
                if source in root:
                    root[find(node.name)] = find(source)
    return {name: find(name) for name in root}


def _group_experts(nodes: list[Any], groups: dict[str, str]) -> list[str]:
    """Put experts into ``groups``; return the values that say which experts run, with which weights."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    routing: list[str] = []
    for node in nodes:
        if node.op_type in _EXPERTS:
            groups[node.name] = "experts"
            routing += node.input[1:]  # the first input is the tokens
        elif node.op_type == "NonZero" and groups[node.name] == "dense FFN":
            # An expert's own products: from the tokens that chose it to the sum of its rows into the output.
            inside = [node]
            while inside:
                part = inside.pop()
                if groups[part.name] == "dense FFN":
                    groups[part.name] = "experts"
                    if part.op_type != "ScatterND":
                        inside += [reader for output in part.output for reader in readers.get(output, [])]
            routing += node.input
    return routing
