"""What ``moedge run`` does, stage by stage.

Each body below takes its parameters and the folders of earlier stages, calls one of the three packages and writes its
result; nothing else. How stages are keyed, reused and written is in :mod:`moedge.runtime.recipe`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._files import digest, write_json
from moedge.configs.recipe import Recipe
from moedge.runtime import run_folder
from moedge.runtime.recipe import Context, Stage, cached_sha256

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from moedge.convert.calibration import TextSet

_ALWAYS = ("_files.py", "runtime/stages.py", "runtime/run_folder.py")
_CONVERT = (*_ALWAYS, "convert", "export/ops.py")
_EXPORT = (*_CONVERT, "export")
_ENGINES = (*_CONVERT, "export/bundle.py", "runtime/engines", "runtime/stats.py")
_STALE = ("portable dense", "ort-cpu dense")
_TORCH = ("torch", "transformers")
_ONNX = ("onnx", "onnx-ir", "onnxscript", "onnxruntime")


def build(recipe: Recipe, machine: dict[str, Any]) -> list[Stage]:
    """Return the stages of a recipe, in order.

    Args:
        machine: facts about this machine; part of the key of what is measured on it.

    Raises:
        MoEdgeError: a model or text file that the recipe names does not exist.
    """
    model, text = recipe.model, recipe.text
    calibration_text = {"spec": text.calibration, "is": fingerprint(text.calibration), "every": text.holdout_every}
    held_out = [{"spec": spec, "is": fingerprint(spec)} for spec in text.held_out]
    texts = {"calibration": calibration_text, "held_out": held_out}
    first_text = {"calibration": calibration_text, "held_out": held_out[:1]}
    convert = recipe.convert.model_dump()
    export = recipe.export.model_dump(exclude={"dense_parent"})
    dense = ("export-dense",) if recipe.export.dense_parent else ()
    stages = [
        Stage(
            "source",
            "open the dense model",
            source,
            {**model.model_dump(), "is": fingerprint(model.source)},
            sources=(*_ALWAYS, "convert/sources.py", "convert/assets.py", "convert/adapters.py"),
            libraries=(*_TORCH, "gguf"),
            identity=source_identity,
            check=lambda folder: recipe.check_model(
                run_folder.read_json(folder / "source.json")["config"], recipe.name
            ),
        ),
        Stage(
            "calibrate",
            f"measure activations on {recipe.calibration.windows * recipe.calibration.length:,} tokens",
            calibrate,
            {**recipe.calibration.model_dump(), "text": calibration_text}
            | {name: convert[name] for name in ("k_a", "profile")},
            reads=("source",),
            sources=_CONVERT,
            libraries=_TORCH,
        ),
        Stage(
            "convert",
            f"split every FFN: {notation(convert)}",
            convert_stage,
            convert,
            reads=("source", "calibrate"),
            sources=_CONVERT,
            libraries=(*_TORCH, "scipy", "safetensors"),
        ),
        Stage(
            "export",
            f"write ONNX bundles: {', '.join(recipe.export.targets)}",
            export_moe,
            {**export, "notation": notation(convert)},
            reads=("source", "convert"),
            sources=_EXPORT,
            libraries=(*_TORCH, *_ONNX),
        ),
    ]
    if dense:
        stages.append(
            Stage(
                "export-dense",
                "the same for the dense parent",
                export_dense,
                export,
                reads=("source",),
                sources=_EXPORT,
                libraries=(*_TORCH, *_ONNX),
            )
        )
    stages += [
        Stage(
            "evaluate",
            "measure quality against the controls",
            evaluate,
            {**recipe.evaluate.model_dump(), "texts": texts},
            reads=("source", "calibrate", "convert"),
            sources=_CONVERT,
            libraries=_TORCH,
        ),
        Stage(
            "verify",
            "compare the ONNX engines with PyTorch",
            verify,
            {**recipe.verify.model_dump(), "texts": first_text, "machine": machine},
            reads=("source", "convert", "export", *dense),
            sources=(
                *_ENGINES,
                "runtime/parity.py",
                "runtime/verification.py",
                "configs/tolerances.py",
                "configs/tolerances.yaml",
            ),
            libraries=(*_TORCH, "onnx", "onnxruntime"),
        ),
        Stage(
            "bench",
            "time the engines side by side",
            bench,
            {**recipe.bench.model_dump(), "texts": first_text, "machine": machine},
            reads=("source", "convert", "export", *dense),
            sources=(*_ENGINES, "runtime/bench.py"),
            libraries=(*_TORCH, "onnxruntime"),
        ),
        Stage(
            "report",
            "write the report",
            report,
            {"recipe": recipe.model_dump(), "machine": machine},
            reads=("source", "calibrate", "convert", "export", *dense, "evaluate", "verify", "bench"),
            sources=(*_ALWAYS, "runtime/report"),
            libraries=("jinja2", "matplotlib"),
        ),
    ]
    return stages


def notation(convert: dict[str, Any]) -> str:
    """CMoE's short form, e.g. ``cmoe S6A6E16``: shared, active, experts."""
    return f"{convert['method']} S{convert['shared']}A{convert['active']}E{convert['experts']}"


def fingerprint(spec: str) -> str:
    """Return what changes when the file, folder or asset behind a model or text spec changes.

    Raises:
        MoEdgeError: an unknown asset or a path that does not exist.
    """
    if spec.startswith("asset:"):
        from moedge.convert import assets

        return digest(asdict(assets.find(spec.removeprefix("asset:"))))
    path = Path(spec).expanduser()
    if path.is_file():
        return cached_sha256(path)
    if path.is_dir():
        return digest(_top_files(path))
    if path.suffix or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise MoEdgeError(f"{spec} does not exist; give an existing file or folder, a hub id org/name or asset:NAME.")
    return "hub"


def _top_files(folder: Path) -> dict[str, str]:
    # Links are followed: a folder in the Hugging Face cache is made of them.
    return {path.name: cached_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


# --- source ---------------------------------------------------------------------------------------------------------


def source(context: Context) -> None:
    """Open the dense model; the folder itself stays where it is (it is big), and source.json points to it."""
    from moedge.convert.sources import resolve

    found = resolve(context.params["source"], context.params["revision"])
    folder = found.folder.resolve()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(
        context.out / "source.json",
        {
            "schema": "moedge.source/1",
            **{name: getattr(found, name) for name in ("spec", "kind", "sha256", "label")},
            "folder": str(folder),
            "files": _top_files(folder),
            "config": config,
        },
    )


def source_identity(folder: Path) -> str | None:
    """Identity of the model that source.json points to, or None when its files are gone or changed."""
    record = run_folder.read_json(folder / "source.json")
    where = Path(record["folder"])
    if not where.is_dir() or _top_files(where) != record["files"]:
        return None
    return digest({"sha256": record["sha256"], "label": record["label"]})


# --- calibrate, convert, export -------------------------------------------------------------------------------------


def calibrate(context: Context) -> None:
    """Run calibration text through the dense model; keep each layer's statistics."""
    from moedge.convert import calibration
    from moedge.convert.sources import load_model, load_tokenizer

    params, folder = context.params, _dense(context)
    text = _calibration_text(params["text"])
    windows = calibration.windows(
        load_tokenizer(folder), text, params["length"], params["windows"], bos=params["bos"], name="calibration"
    )
    statistics = calibration.collect(
        load_model(folder),
        windows,
        k_a=params["k_a"],
        profile=params["profile"],
        batch_size=params["batch_size"],
        progress=context.progress,
    )
    calibration.save(statistics, context.out / "statistics.safetensors")
    write_json(
        context.out / "calibration.json",
        {
            "schema": "moedge.calibration/1",
            "text": params["text"]["spec"],
            "text_sha256": text.sha256,
            "documents": len(text.documents),
            "windows": params["windows"],
            "length": params["length"],
            "bos": params["bos"],
            "tokens": int(windows.size),
            "tokens_sha256": digest(windows.tolist()),
        },
    )


def convert_stage(context: Context) -> None:
    """Make the plan, apply it and save the MoE checkpoint."""
    from moedge.convert import calibration, modeling
    from moedge.convert.methods import METHODS
    from moedge.convert.sources import load_model, load_tokenizer

    folder = _dense(context)
    params = {key: value for key, value in context.params.items() if key != "method"}
    model = load_model(folder)
    plan = METHODS[context.params["method"]].function(
        calibration.load(context.inputs["calibrate"] / "statistics.safetensors"),
        model,
        **params,
        source_sha256=_source(context)["sha256"],
        provenance=run_folder.read_json(context.inputs["calibrate"] / "calibration.json"),
        progress=context.progress,
    )
    modeling.apply(plan, model)
    modeling.save(model, plan, load_tokenizer(folder), context.out / "checkpoint")


def export_moe(context: Context) -> None:
    """Export the MoE checkpoint, one bundle for each target."""
    _export(context, run_folder.checkpoint(context.inputs["convert"].parent), f" {context.params['notation']}")


def export_dense(context: Context) -> None:
    """Export the dense parent in the same way."""
    _export(context, _dense(context), "")


def _export(context: Context, checkpoint: Path, suffix: str) -> None:
    from moedge.export.pipeline import export

    def step(what: str, done: int, total: int) -> None:
        context.progress(done, total)
        if done < total:
            context.note(what)

    params, label = context.params, f"{_source(context)['label']}{suffix}"
    export(checkpoint, context.out, params["targets"], label=label, max_length=params["max_length"], progress=step)


# --- evaluate, verify, bench, report --------------------------------------------------------------------------------


def evaluate(context: Context) -> None:
    """Measure perplexity and divergence from the parent, of the MoE and of its controls, on held-out text."""
    from moedge.convert import calibration
    from moedge.convert import evaluate as quality
    from moedge.convert.methods.baselines import CONTROLS, SEEDED
    from moedge.convert.plan import MoEPlan
    from moedge.convert.sources import load_model, load_tokenizer

    params, folder = context.params, _dense(context)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    texts = {text.name: text for text in _held_out_texts(params["texts"])}
    count = params["tokens"] // params["window"]
    windows = {
        name: _windows(tokenizer, text, params["window"], count, params["bos"], "evaluation")
        for name, text in texts.items()
    }
    plan = MoEPlan.load(run_folder.checkpoint(context.inputs["convert"].parent))
    statistics = calibration.load(context.inputs["calibrate"] / "statistics.safetensors")
    plans: dict[str, MoEPlan | list[MoEPlan]] = {plan.method: plan}
    for name in params["controls"]:
        seeds = params["seeds"] if name in SEEDED else [0]
        plans[name] = [CONTROLS[name](plan, statistics, model, seed) for seed in seeds]
    documents = {name: f"{len(text.documents)} held-out documents" for name, text in texts.items()}
    result = quality.evaluate(
        model,
        plans,
        windows,
        {"window": params["window"], "bos": params["bos"], "documents": documents},
        batch_size=params["batch_size"],
        progress=context.progress,
    )
    write_json(context.out / "evaluation.json", result)


def verify(context: Context) -> None:
    """Compare every ONNX engine with PyTorch, and every MoE with all experts selected with the dense parent."""
    from moedge.convert.sources import load_tokenizer
    from moedge.runtime.verification import verify_run

    params = context.params
    (text,) = _held_out_texts(params["texts"])
    count = -(-params["tokens"] // params["window"])
    windows = _windows(load_tokenizer(_dense(context)), text, params["window"], count, False, "verification")
    result = verify_run(
        _engines(context),
        windows,
        prefill=params["prefill"],
        tolerances=params["tolerances"],
        text=text.name,
        progress=context.progress,
        note=context.note,
    )
    write_json(context.out / "verify.json", result)


def bench(context: Context) -> None:
    """Time all engines, interleaved, on one prompt of held-out text."""
    from functools import partial

    from moedge.convert.sources import load_tokenizer
    from moedge.runtime import bench as benchmark
    from moedge.runtime.engines import open_engine

    params = context.params
    (text,) = _held_out_texts(params["texts"])
    ids = _windows(load_tokenizer(_dense(context)), text, params["prompt"], 1, False, "benchmark")[0]
    engines = {
        label: partial(open_engine, path, threads=params["threads"]) for label, path in _engines(context).items()
    }
    options = {name: params[name] for name in ("prompt", "decode", "repeats", "warmup")}
    result = benchmark.bench(engines, ids, **options, progress=context.progress)
    write_json(context.out / "bench.json", {**result, "text": text.name})


def report(context: Context) -> None:
    """Write report.json, report.md and report.html from what the other stages left."""
    from moedge.runtime.report import write

    write(
        context.inputs["source"].parent, context.out, recipe=context.params["recipe"], machine=context.params["machine"]
    )


# --- shared ---------------------------------------------------------------------------------------------------------


def _source(context: Context) -> dict[str, Any]:
    return run_folder.read_json(context.inputs["source"] / "source.json")


def _dense(context: Context) -> Path:
    return Path(_source(context)["folder"])


def _engines(context: Context) -> dict[str, Path]:
    found = run_folder.engines(context.inputs["source"].parent)
    # An export of the dense parent that an older recipe left behind is not part of this run.
    return {label: path for label, path in found.items() if "export-dense" in context.inputs or label not in _STALE}


def _calibration_text(text: dict[str, Any]) -> TextSet:
    from moedge.convert import calibration

    return calibration.split(calibration.read_text(text["spec"]), text["every"])[0]


def _held_out_texts(texts: dict[str, Any]) -> list[TextSet]:
    """Held-out documents of each text: those the split keeps back, or all of a text that calibration never saw."""
    from moedge.convert import calibration

    found = []
    for entry in texts["held_out"]:
        text = calibration.read_text(entry["spec"])
        if entry["is"] == texts["calibration"]["is"]:
            text = calibration.split(text, texts["calibration"]["every"])[1]
        found.append(text)
    return found


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: TextSet, length: int, count: int, bos: bool, name: str
) -> np.ndarray:
    from moedge.convert import calibration

    return calibration.windows(tokenizer, text, length, count, bos=bos, name=name)
