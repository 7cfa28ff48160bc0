"""How fast the engines of a run are: each beside its dense parent in the same precision, and beside PyTorch's."""

from __future__ import annotations

from typing import Any

from moedge.runtime.bench.stats import between
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef

METRICS = (("tpot_ms", "Decoding"), ("ttft_ms", "Reading the prompt"))


def ratio(report: dict[str, Any], metric: str, label: str, baseline: str | None) -> dict[str, Any] | None:
    """The benchmark's paired ratio of two engines (> 1: ``label`` is faster), or None when one was not measured."""
    for entry in report["speed"]["points"][0]["ratios"]:
        if (entry["metric"], entry["label"], entry["baseline"]) == (metric, label, baseline):
            return dict(entry)
    return None


def _timed(report: dict[str, Any]) -> list[EngineRef]:
    bundles = [EngineRef(bundle["target"], bundle["kind"]) for bundle in report["bundles"]]
    known = {str(ref): ref for ref in (TORCH_MOE, TORCH_DENSE, *bundles)}
    return [known[row["label"]] for row in report["speed"]["points"][0]["rows"] if row["label"] in known]


def pairs(report: dict[str, Any]) -> list[tuple[EngineRef, EngineRef]]:
    """Each converted model that was timed, and the dense engine that it has to beat.

    That is the dense model of the same target: the same runtime, the same precision. A portable bundle, whose dense
    parent is nobody's choice for speed and not timed, has to beat ONNX Runtime's float32 one.
    """
    timed = _timed(report)
    dense = [ref for ref in timed if ref.role == "dense"]
    plain = [ref for ref in dense if ref.row and ref.row.family == "ort" and not ref.quantised and not ref.row.gpu]
    found = []
    for ref in timed:
        own = [one for one in dense if one.target == ref.target]
        if not own and ref.row is not None and ref.row.family == "portable":
            own = plain
        if ref.role == "moe" and own:
            found.append((ref, own[0]))
    return found


def compared(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels of what is said aloud: each converted bundle and its own dense one, and the first beside PyTorch's."""
    bundles = [ref for ref in _timed(report) if ref.role == "moe" and ref.row and ref.row.family != "portable"]
    own = [(one, dense) for one, dense in pairs(report) if one in bundles]
    return [(str(one), str(dense)) for one, dense in (*own, *((ref, TORCH_DENSE) for ref in bundles[:1]))]


def columns(report: dict[str, Any], metric: str, label: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Ratios of one engine to its dense parent and to the dense model in PyTorch."""
    own = {str(one): str(dense) for one, dense in pairs(report)}.get(label)
    return ratio(report, metric, label, own), ratio(report, metric, label, str(TORCH_DENSE))


def sentences(report: dict[str, Any]) -> list[str]:
    """Say what each converted bundle gains over its dense parent, and the first of them over PyTorch."""
    said = []
    for metric, words in METRICS:
        for label, baseline in compared(report):
            entry = ratio(report, metric, label, baseline)
            if entry:
                said.append(
                    f"{words}: {label} runs at {entry['speedup']:.2f} times the speed of {baseline} "
                    f"(95% interval: {between(entry['ci95'])}), {entry['verdict']}."
                )
    return said
