"""Gather what the stages of a run left into one JSON-ready dict of schema ``moedge.report/1``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moedge import MoEdgeError, __version__
from moedge.export import manifest as manifests
from moedge.export.manifest import Manifest
from moedge.runtime.parity.verdict import Outcome, outcome_of, run_outcome
from moedge.runtime.report import gains
from moedge.runtime.run import run_folder
from moedge.runtime.run.run_folder import read_json

REPORT_SCHEMA = "moedge.report/1"


def build(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a run folder whose stages are finished.

    Raises:
        MoEdgeError: a stage's result is missing or damaged.
    """
    source = read_json(run / "source" / "source.json")
    # An older recipe of the same run may have left stages behind that this one does not ask for.
    unasked = {"build": not recipe["export"]["build"], "export-dense": not recipe["export"]["dense_parent"]}
    stages = [read_json(path) for path in (run / name / "stage.json" for name in _ORDER) if path.is_file()]
    stages = [stage for stage in stages if not unasked.get(stage["stage"])]
    bundles = run_folder.bundles(run, dense=recipe["export"]["dense_parent"])
    evaluation = read_json(run / "evaluate" / "evaluation.json")
    verification = read_json(run / "verify" / "verify.json")
    speed = read_json(run / "bench" / "bench.json")
    outcome = run_outcome(verification)
    result = {
        "schema": REPORT_SCHEMA,
        "name": recipe["name"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "passed": outcome is Outcome.PASSED,
        "outcome": outcome.value,
        "model": {
            **{name: source[name] for name in ("label", "spec", "kind", "sha256")},
            "config": {name: source["config"].get(name) for name in _CONFIG},
        },
        "conversion": _conversion(run) | {"ffn_read_share": _method_row(evaluation)["ffn_read_share"]},
        "quality": evaluation,
        "verification": verification,
        "speed": speed,
        "bundles": [_bundle(str(ref), folder) for ref, folder in bundles.items()],
        "machine": speed["machine"],
        "versions": {"moedge": __version__, **_merge(stage["parts"]["versions"] for stage in stages)},
        "stages": [
            {
                "stage": stage["stage"],
                "key": stage["key"],
                "seconds": stage["seconds"],
                "bytes": sum(file["size"] for file in stage["outputs"].values()),
            }
            for stage in stages
        ],
        "recipe": recipe,
    }
    if (run / "evaluate" / "diagnostics.json").is_file():
        result["diagnostics"] = read_json(run / "evaluate" / "diagnostics.json")
    if recipe.get("frontier", {}).get("run"):
        result["frontier"] = read_json(run / "frontier" / "table" / "frontier.json")
    result["sentences"] = sentences(result)
    return result


_CONFIG = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
_ORDER = ["source", "calibrate", "convert", "export", "build", "export-dense", "evaluate", "verify", "bench"]


def _merge(entries: Any) -> dict[str, str]:
    return {name: version for entry in entries for name, version in entry.items()}


def _conversion(run: Path) -> dict[str, Any]:
    """The plan in numbers, from plan.json alone (its hash was checked when the stages read it)."""
    plan = read_json(run_folder.checkpoint(run) / "plan.json")
    width = plan["model"]["intermediate_size"]
    config = read_json(run_folder.checkpoint(run) / "config.json")["moedge"]["layers"]
    layers = []
    for index, (layer, shape) in enumerate(zip(plan["layers"], config, strict=True)):
        widths = layer["expert_widths"]
        active = shape["shared_width"] + layer["top_k"] * (sum(widths) / len(widths) if widths else 0.0)
        layers.append(
            {
                "layer": index,
                "shared_width": shape["shared_width"],
                "experts": len(widths),
                "expert_width": shape["expert_width"],
                "top_k": layer["top_k"],
                "active_fraction": active / width,
                "report": layer["report"],
            }
        )
    from moedge.convert.methods import METHODS  # names and formats only, no torch

    params, provenance = plan["params"], dict(plan["provenance"])
    affinity = provenance.pop("affinity", None)
    if affinity:
        affinity["domains"] = provenance.pop("domains", [])
    return {
        "method": plan["method"],
        "notation": METHODS[plan["method"]].layout(params),
        "params": params,
        "plan_sha256": plan["sha256"],
        "active_fraction": sum(layer["active_fraction"] for layer in layers) / len(layers),
        **_zeros(run, plan["layers"]),
        "calibration": provenance,
        "layers": layers,
        **({"affinity": affinity} if affinity else {}),
    }


def _method_row(evaluation: dict[str, Any]) -> dict[str, Any]:
    return next(dict(row) for row in evaluation["rows"] if row["kind"] == "method")


def _zeros(run: Path, layers: list[dict[str, Any]]) -> dict[str, float]:
    """``zero_fraction`` of the FFN weights, if the plan sets any to zero; only then its tensors are read."""
    if not any("zero_share" in layer["report"] for layer in layers):
        return {}
    from moedge.convert.plan import MoEPlan  # numpy and safetensors only

    return {"zero_fraction": MoEPlan.load(run_folder.checkpoint(run)).zero_share}


def _bundle(label: str, folder: Path) -> dict[str, Any]:
    manifest = manifests.read(folder)
    if not isinstance(manifest, Manifest):
        raise MoEdgeError(f"{folder} is not a bundle; run `moedge run` on its recipe again.")
    document = manifest.document()
    return {
        "label": label,
        "target": manifest.target,
        "kind": manifest.kind,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "cache": document["cache"],
        "lowering": document["lowering"],
        "files": {name: entry.sha256 for name, entry in manifest.files.items()},
    }


def _counted(checks: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    outcomes = [outcome_of(check) for check in checks]
    failed, open_ones = (outcomes.count(kind) for kind in (Outcome.FAILED, Outcome.NOT_DECIDED))
    said = [f"All {len(outcomes)} {what} passed."] if outcomes and not failed and not open_ones else []
    if failed:
        said.append(f"{failed} of {len(outcomes)} {what} FAILED.")
    if open_ones:
        said.append(f"{open_ones} of {len(outcomes)} {what} are not decided, which is no pass: their notes say why.")
    return said


def sentences(report: dict[str, Any]) -> list[str]:
    """What the run showed, in plain sentences: parity, quality against the controls, speed."""
    verification, quality = report["verification"], report["quality"]
    checks = [check for entry in verification["parity"] for check in entry["verdict"]["checks"]]
    said = _counted((*verification["identity"], *checks), "checks of the exported engines against PyTorch")
    checks = [check for entry in verification.get("shapes", []) for check in entry["verdict"]["checks"]]
    said += _counted(checks, "checks in other shapes (batches, padding, pieces, twice)")
    answers = verification.get("accuracy", [])
    said += _counted([check for entry in answers for check in entry["verdict"]["checks"]], "checks of answers to tasks")
    if verification.get("identity_note"):
        said.append(verification["identity_note"])
    said += [f"{label}: {why}." for label, why in sorted(verification.get("not_executed", {}).items())]
    said += [*quality["verdict"]["sentences"], *quality.get("where", [])]
    said += [f"The control '{name}' was left out: {why}." for name, why in quality.get("skipped", {}).items()]
    said += gains.sentences(report)
    said += [one["verdict"]["sentence"] for one in report.get("frontier", {}).get("measured", [])]
    return said
