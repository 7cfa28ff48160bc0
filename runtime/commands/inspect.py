"""``moedge inspect``: what a run folder, checkpoint, bundle or model folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.export import manifest as manifests
from moedge.export.manifest import EngineManifest, Sealed
from moedge.runtime.commands._options import Json
from moedge.runtime.engines import build
from moedge.runtime.engines.given import existing, local
from moedge.runtime.report.sizes import size_rows
from moedge.runtime.report.zeros import zeros_sentence
from moedge.runtime.run import run_folder
from moedge.runtime.tables import Sheet


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Run folder, MoE checkpoint, plan.json, bundle, engine, or a model folder.")
    ],
    as_json: Json = False,
) -> None:
    """Print what a run, a plan, a checkpoint or a bundle holds.

    Checked are the hashes of a plan and of all files of a bundle or an engine; weights of a checkpoint have none.

    \b
    Examples:
      moedge inspect runs/smollm2-135m
      moedge inspect runs/smollm2-135m/export/ort-cpu --json
    """
    facts = describe(local(path))
    if as_json:
        print(json.dumps(facts, indent=2, sort_keys=True, allow_nan=False))
        return
    console = Console()
    table = Sheet(show_header=False, title=escape(f"{facts['kind']} {path}"))
    shown = _with_layers(facts)
    for key, value in shown.items():
        if not isinstance(value, list):
            table.add_row(f"[bold]{key}[/bold]", escape(_words(value)))
    console.print(table)
    for key, rows in shown.items():
        if isinstance(rows, list) and rows:
            console.print(_table(key, rows))


def _with_layers(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a bundle or an engine with its layers as rows; neighbours that are alike share one."""
    moe = facts.get("moe")
    if not moe:
        return facts
    rows: list[dict[str, Any]] = []
    for layer, shape in sorted((int(index), shape) for index, shape in moe["layers"].items()):
        if rows and rows[-1]["shape"] == shape and rows[-1]["last"] == layer - 1:
            rows[-1]["last"] = layer
        else:
            rows.append({"first": layer, "last": layer, "shape": shape})
    layers = [
        {"layer": str(row["first"]) if row["first"] == row["last"] else f"{row['first']}-{row['last']}", **row["shape"]}
        for row in rows
    ]
    named = {**facts, "moe": {name: value for name, value in moe.items() if name != "layers"}}
    return {"kind": named.pop("kind"), "layers": layers, **named}


def _words(value: Any) -> str:
    """A fact for people: names and values with commas between, without what is not known."""
    if isinstance(value, dict):
        inner = {name: each for name, each in value.items() if each not in (None, "", {})}
        said = [f"{name} ({_words(v)})" if isinstance(v, dict) else f"{name} {_words(v)}" for name, v in inner.items()]
        return ", ".join(said) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _table(title: str, rows: list[dict[str, Any]]) -> Sheet:
    table = Sheet(title=escape(title))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        table.add_column(escape(column))
    for row in rows:
        table.add_row(*(escape(_cell(row.get(column))) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def describe(path: Path) -> dict[str, Any]:
    """Return what ``path`` holds as plain JSON; ``kind`` is run, study, moe checkpoint, bundle, engine or dense model.

    Raises:
        MoEdgeError: it is none of these, or it is damaged.
    """
    if path.name == "plan.json" and path.is_file():
        path = path.parent
    if run_folder.is_run(path):
        return _run(path)
    if (path / "manifest.json").is_file():
        engine = isinstance(manifests.read(path), EngineManifest)
        return _engine(path) if engine else _bundle(path)
    if (path / "plan.json").is_file():
        return _checkpoint(path)
    if (path / "config.json").is_file():
        return {"kind": "dense model", **_config(path)}
    hint = run_folder.bundles_below(existing(path))
    raise MoEdgeError(f"{path} is not a run folder, a checkpoint, a bundle, an engine or a model folder.{hint}")


def _config(path: Path) -> dict[str, Any]:
    config = run_folder.read_json(path / "config.json", "download or save the model again")
    names = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "hidden_act", "vocab_size")
    facts = {name: config.get(name) for name in (*names, "max_position_embeddings")}
    facts["hidden_act"] = config.get("hidden_activation") or facts["hidden_act"]  # Gemma's name for it
    return facts


def _run(path: Path) -> dict[str, Any]:
    facts = _recorded(path / "run.json")
    if (path / "report.json").is_file():
        facts["passed"] = run_folder.read_json(path / "report.json").get("passed")
    facts["stages"] = []
    for stage in sorted(path.rglob("stage.json"), key=lambda file: file.stat().st_mtime):
        if any(part.startswith(".") for part in stage.relative_to(path).parts):
            continue  # half-written
        entry = run_folder.read_json(stage)
        size = sum(file["size"] for file in entry["outputs"].values())
        facts["stages"].append(
            {
                "stage": entry["stage"],
                "seconds": entry["seconds"],
                "MiB": round(size / 2**20, 1),
                "key": entry["key"][:16],
            }
        )
    facts["engines"] = [{"engine": str(ref), "folder": str(folder)} for ref, folder in run_folder.engines(path).items()]
    return facts


def _recorded(file: Path) -> dict[str, Any]:
    """What a run was asked for: a recipe, or of `moedge ablate` a study."""
    record = run_folder.read_json(file)
    kind = "study" if "study" in record else "run"
    try:
        given = record["study" if kind == "study" else "recipe"]
        found = {"kind": kind, "name": given["name"], "model": given["model"]["source"]}
        return found | ({"convert": given["convert"]} if kind == "run" else {})
    except (KeyError, TypeError) as error:
        raise MoEdgeError(f"{file} is damaged: it does not say what was run; give the same command again.") from error


def _checkpoint(path: Path) -> dict[str, Any]:
    from moedge.convert import reads
    from moedge.convert.plan import MoEPlan

    plan = MoEPlan.load(path)
    width = int(plan.model["intermediate_size"])
    layers = []
    for index, layer in enumerate(plan.layers):
        if layer.children is not None:
            layers.append(_nested(index, layer.children, width))
            continue
        stored, zero = layer.stored_weights(int(plan.model["hidden_size"]))
        layers.append(
            {
                "layer": index,
                "shared": len(layer.shared),
                "experts": layer.num_experts,
                "width": layer.expert_width,
                "top_k": layer.top_k,
                "active": layer.active_width / width,
                **({"zeros": zero / stored} if zero else {}),
                **({"thresholds of": ", ".join(_thresholds(layer))} if layer.gathers else {}),
                "router": layer.router.kind if layer.router else None,
                "dead neurons": layer.report.get("dead_share"),
            }
        )
    return {
        "kind": "moe checkpoint" if (path / "config.json").is_file() else "plan",
        "plan": plan.sha256,
        "method": plan.method,
        "params": plan.params,
        "parent": plan.model,
        "provenance": plan.provenance,
        "ffn_read_share": reads.of_plan(plan),
        **({"zeros": zeros_sentence(plan.zero_share)} if plan.zero_share else {}),
        "layers": layers,
    }


def _thresholds(layer: Any) -> list[str]:
    """Of what a layer leaves out small values: ``x``, ``h``, ``qkv``, ``o``, ``head``."""
    return [name.removesuffix("_threshold") for name in layer.thresholds]


def _nested(index: int, children: list[Any], width: int) -> dict[str, Any]:
    """One row for a layer whose parent has experts; ``kept dense`` of them were not split."""
    split = [child for child in children if child.experts]
    row: dict[str, Any] = {"layer": index, "parents": len(children), "kept dense": len(children) - len(split)}
    if split:
        active = sum(child.active_width for child in children) / len(children) / width
        first = split[0]
        row |= {"shared": len(first.shared), "experts": first.num_experts, "width": first.expert_width}
        row |= {"top_k": first.top_k, "active": active, "router": first.router.kind}
    return row


def _engine(path: Path) -> dict[str, Any]:
    manifest = build.open_file(path).manifest
    document = manifest.document()
    names = ("target", "dtype", "label", "profiles", "model", "moe", "build", "estimate", "versions", "parent")
    return {
        "kind": "engine",
        **{name: document.get(name) for name in names},
        "devices": ", ".join(manifest.devices),
        "compute_capabilities": ", ".join(manifest.compute_capabilities),
        "holds": manifest.kind,
        "files": _files(manifest),
    }


def _files(manifest: Sealed) -> list[dict[str, Any]]:
    return [{"file": name, "MiB": entry.size / 2**20, "sha256": entry.sha256} for name, entry in manifest.files.items()]


def _bundle(path: Path) -> dict[str, Any]:
    from moedge.export.bundle import open_bundle

    manifest = open_bundle(path).manifest
    document = manifest.document()
    lowering = []
    for entry in manifest.lowering:
        error = entry.self_test.max_rel_error if entry.self_test else None
        shown = {name: getattr(entry, name) for name in ("rewrite", "nodes", "status", "reason")}
        quantised = entry.self_test.quantisation_error if entry.self_test else None
        lowering.append({**shown, "self-test error": error, **({"quantisation error": quantised} if quantised else {})})
    return {
        "kind": "bundle",
        **{name: document.get(name) for name in ("target", "label", "model", "moe", "cache", "versions", "parent")},
        "holds": manifest.kind,
        **({"sizes": size_rows(manifest.quantization)} if manifest.quantization else {}),
        "lowering": lowering,
        "files": _files(manifest),
    }
