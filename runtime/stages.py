"""What ``moedge run`` does, stage by stage.

Each body below takes its parameters and the folders of earlier stages, calls one of the three packages and writes its
result; nothing else. How stages are keyed, reused and written is in :mod:`moedge.runtime.recipe`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._files import digest, write_json
from moedge.configs.recipe import CONVERT_SECTIONS, Recipe
from moedge.runtime import devices, held_out, run_folder
from moedge.runtime.recipe import Context, Stage, cached_sha256

_ALWAYS = ("_files.py", "runtime/run_folder.py")
_CONVERT = (*_ALWAYS, "runtime/held_out.py", "convert", "export/ops.py")
_EXPORT = (*_CONVERT, "export")
_ENGINES = (*_CONVERT, "export/bundle.py", "runtime/engines", "runtime/stats.py")
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
    calibration_text = {
        "spec": text.calibration,
        "is": fingerprint(text.calibration, text=True),
        "every": text.holdout_every,
    }
    held_out = [{"spec": spec, "is": fingerprint(spec, text=True)} for spec in text.held_out]
    texts = {"calibration": calibration_text, "held_out": held_out}
    convert = recipe.convert.model_dump(mode="json")
    needs = method_needs(convert)
    domains = _domains(convert, text.holdout_every) if "domains" in needs else {}
    texts |= {"domains": domains["texts"]} if domains else {}
    first_text = {**texts, "held_out": held_out[:1]}
    exported = recipe.export.model_dump(exclude={"dense_parent", "build"})
    if "ort-cuda" in recipe.export.targets:
        from moedge.runtime.engines.onnxruntime import check_cuda

        check_cuda(f"{recipe.name}: export.targets: ort-cuda")
    measured = {"texts": first_text, "machine": machine, "dense_parent": recipe.export.dense_parent}
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
            {**recipe.calibration.model_dump(), "text": calibration_text, **_measured(convert), "domains": domains},
            reads=("source",),
            sources=_CONVERT,
            libraries=_TORCH,
        ),
        Stage(
            "convert",
            f"convert every FFN: {notation(convert)}",
            convert_stage,
            convert,
            reads=("source", "calibrate") if needs else ("source",),
            sources=_CONVERT,
            libraries=(*_TORCH, "scipy", "safetensors"),
        ),
        Stage(
            "export",
            f"write ONNX bundles: {', '.join(recipe.export.targets)}",
            export,
            {**exported, "kind": "moe", "notation": notation(convert)},
            reads=("source", "convert"),
            sources=_EXPORT,
            libraries=(*_TORCH, *_ONNX),
        ),
    ]
    if recipe.export.build:
        profiles = [devices.load(name).model_dump(mode="json", by_alias=True) for name in recipe.export.build]
        stages.append(
            Stage(
                "build",
                f"build the engine for {', '.join(recipe.export.build)}",
                build_engine,
                {"devices": recipe.export.build, "profiles": profiles},
                reads=("export",),
                sources=(*_ALWAYS, "export/bundle.py", "runtime/build.py", "runtime/devices.py", "runtime/device"),
                libraries=("tensorrt-rtx-cu13",),
            )
        )
    if dense:
        stages.append(
            Stage(
                "export-dense",
                "the same for the dense parent",
                export,
                {**exported, "kind": "dense"},
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
            {**recipe.verify.model_dump(), **measured},
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
            {**recipe.bench.model_dump(), **measured},
            reads=("source", "convert", "export", *dense),
            sources=(*_ENGINES, "runtime/bench.py"),
            libraries=(*_TORCH, "onnxruntime"),
        ),
        Stage(
            "report",
            "write the report",
            report,
            {"recipe": recipe.model_dump()},
            reads=("source", "calibrate", "convert", "export", *dense, "evaluate", "verify", "bench"),
            sources=(*_ALWAYS, "runtime/report"),
            libraries=("jinja2", "matplotlib"),
        ),
    ]
    return stages


def method_needs(convert: dict[str, Any]) -> tuple[str, ...]:
    """What the method of a ``convert`` section reads besides the model; see ``convert.methods.Method.needs``."""
    from moedge.convert.methods import METHODS

    return METHODS[convert["method"]].needs


def _measured(convert: dict[str, Any]) -> dict[str, Any]:
    """What calibration keeps. The ATopK marks are always made: the controls of ``evaluate`` read them."""
    from moedge.convert.methods import METHODS

    needs, marks = method_needs(convert), CONVERT_SECTIONS["cmoe"]().model_dump()
    parents = METHODS[convert["method"]].parents
    return {
        **{name: convert.get(name, marks[name]) for name in ("k_a", "profile")},
        "gate_signal": convert["signal"] if "gate_profile" in needs else None,
        "keep_windows": "tokens" in needs,
        **({"statistics": False} if parents == "moe" else {}),
    }


def _domains(convert: dict[str, Any], every: int) -> dict[str, Any]:
    """What the windows of a method's domains are made from; the keys but ``texts`` are those of ``domains.read``."""
    texts = [
        {"name": name, "spec": spec, "is": fingerprint(spec, text=True), "every": every}
        for name, spec in convert["domains"].items()
    ]
    return {"texts": texts, **{name: convert[name] for name in ("length", "samples", "score_samples", "seed")}}


def notation(convert: dict[str, Any]) -> str:
    """The method and its layout for people, e.g. ``cmoe S6A6E16``."""
    from moedge.convert.methods import METHODS

    return f"{convert['method']} {METHODS[convert['method']].layout(convert)}"


def fingerprint(spec: str, *, text: bool = False) -> str:
    """Return what changes when the file, folder or asset behind a model spec (or a text spec) changes.

    Raises:
        MoEdgeError: an unknown asset, or a path that does not exist.
    """
    if spec.startswith("asset:"):
        from moedge.convert import assets

        return digest(asdict(assets.find(spec.removeprefix("asset:"))))
    path = Path(spec).expanduser()
    if path.is_file():
        return cached_sha256(path)
    if text:
        raise MoEdgeError(f"The text {spec} does not exist; give a .txt, .utf8 or .jsonl file, or asset:NAME.")
    if path.is_dir():
        return digest(_top_files(path))
    if spec.endswith(".gguf") or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise MoEdgeError(f"Model {spec} does not exist; give a folder, a .gguf file, a hub id org/name or asset:NAME.")
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
    """Run calibration text through the dense model; keep each layer's statistics, and the token windows if asked to."""
    from safetensors.numpy import save_file

    from moedge.convert import calibration, domains
    from moedge.convert.sources import load_model, load_tokenizer

    params, folder = context.params, run_folder.dense(context.root)
    text, tokenizer = held_out.calibration_text(params["text"]), load_tokenizer(folder)
    windows = calibration.windows(
        tokenizer, text, params["length"], params["windows"], bos=params["bos"], name="calibration"
    )
    facts: dict[str, Any] = {}
    if params["domains"]:
        options = {key: value for key, value in params["domains"].items() if key != "texts"}
        found, facts["domains"] = domains.read(tokenizer, params["domains"]["texts"], bos=params["bos"], **options)
        domains.save(found, context.out / "domains.safetensors")
    gate = None
    if params["gate_signal"]:  # a window is a sample; its BOS token is an attention sink and counts in no mean
        exclude = (tokenizer.bos_token_id,) if params["bos"] else ()
        gate = calibration.GateSampling(signal=params["gate_signal"], exclude=exclude)
    if params.get("statistics", True):  # a Mixture-of-Experts has them for each expert, made when it is split
        statistics = calibration.collect(
            load_model(folder),
            windows,
            k_a=params["k_a"],
            profile=params["profile"],
            gate=gate,
            batch_size=params["batch_size"],
            progress=context.progress,
        )
        calibration.save(statistics, context.out / "statistics.safetensors")
    if params["keep_windows"]:
        save_file({"windows": windows}, context.out / "windows.safetensors")
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
            **facts,
        },
    )


def convert_stage(context: Context) -> None:
    """Make the plan on float32 weights, apply it and save the MoE checkpoint in the dense model's own dtype."""
    import torch
    from safetensors.numpy import load_file

    from moedge.convert import calibration, domains, modeling
    from moedge.convert.methods import METHODS
    from moedge.convert.sources import load_model, load_tokenizer, own_dtype

    folder, calibrated = run_folder.dense(context.root), context.root / "calibrate"
    method = METHODS[context.params["method"]]
    params = {key: value for key, value in context.params.items() if key != "method"}
    model = load_model(folder)
    data: Any = None
    if "tokens" in method.needs:
        data = load_file(calibrated / "windows.safetensors")["windows"]
    elif "domains" in method.needs:
        data = domains.load(calibrated / "domains.safetensors")
    elif "statistics" in method.needs:
        data = calibration.load(calibrated / "statistics.safetensors")
    plan = method.function(
        data,
        model,
        **params,
        source_sha256=run_folder.source(context.root)["sha256"],
        provenance=run_folder.read_json(calibrated / "calibration.json") if method.needs else {},
        progress=context.progress,
    )
    modeling.apply(plan, model).to(getattr(torch, own_dtype(folder)))
    modeling.save(model, plan, load_tokenizer(folder), context.out / "checkpoint")


def export(context: Context) -> None:
    """Export the MoE checkpoint, or the dense parent in the same way, one bundle for each target."""
    from moedge.export import pipeline

    def step(what: str, done: int, total: int) -> None:
        context.progress(done, total)
        if done < total:
            context.note(what)

    params = context.params
    moe = params["kind"] == "moe"
    label = run_folder.source(context.root)["label"] + (f" {params['notation']}" if moe else "")
    folder = run_folder.checkpoint(context.root) if moe else run_folder.dense(context.root)
    pipeline.export(folder, context.out, params["targets"], label=label, max_length=params["max_length"], progress=step)


def build_engine(context: Context) -> None:
    """Make one engine of the MoE for every device of the recipe; no GPU is needed, and none executes it."""
    from moedge.runtime import build

    bundle = run_folder.bundles(context.root)["tensorrt-rtx moe"]
    facts = build.build(bundle, context.out / "tensorrt-rtx", context.params["devices"])["build"]
    context.note(f"{facts['engine_bytes'] / 2**20:.0f} MiB, {facts['layers']} layers; not executed here")


# --- evaluate, verify, bench, report --------------------------------------------------------------------------------


def evaluate(context: Context) -> None:
    """Measure perplexity and divergence from the parent, of the MoE and of its controls, on held-out text."""
    from moedge.convert import calibration
    from moedge.convert import evaluate as quality
    from moedge.convert.methods.baselines import CONTROLS, SEEDED, refusal
    from moedge.convert.plan import MoEPlan
    from moedge.convert.sources import load_model, load_tokenizer

    params, folder = context.params, run_folder.dense(context.root)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    texts = {text.name: text for text in held_out.texts(params["texts"])}
    count = params["tokens"] // params["window"]
    windows = {
        name: held_out.windows(tokenizer, text, params["window"], count, bos=params["bos"], name="evaluation")
        for name, text in texts.items()
    }
    plan = MoEPlan.load(run_folder.checkpoint(context.root))
    statistics = calibration.load(context.root / "calibrate" / "statistics.safetensors")
    plans: dict[str, MoEPlan | list[MoEPlan]] = {plan.method: plan}
    skipped = {name: reason for name in params["controls"] if (reason := refusal(name, plan))}
    for name in params["controls"]:
        if name in skipped:
            continue
        seeds = params["seeds"] if name in SEEDED else [0]
        plans[name] = [CONTROLS[name](plan, statistics, model, seed) for seed in seeds]
    documents = {name: f"{len(text.documents)} held-out documents" for name, text in texts.items()}
    result = quality.evaluate(
        model,
        plans,
        windows,
        {"window": params["window"], "bos": params["bos"], "documents": documents, "texts": list(windows)},
        batch_size=params["batch_size"],
        progress=context.progress,
    )
    write_json(context.out / "evaluation.json", {**result, "skipped": skipped})
    if params["diagnostics"]:
        from moedge.convert import diagnostics, modeling

        converted, _, _ = modeling.load(run_folder.checkpoint(context.root))
        found = {
            name: {"documents": documents[name], **diagnostics.diagnose(converted, ids, dense_model=model)}
            for name, ids in windows.items()
        }
        write_json(context.out / "diagnostics.json", {"schema": diagnostics.DIAGNOSTICS_SCHEMA, "texts": found})


def verify(context: Context) -> None:
    """Compare every ONNX engine with PyTorch, and every MoE with all experts selected with the dense parent."""
    from moedge.convert.sources import load_tokenizer
    from moedge.runtime.verification import verify_run

    params = context.params
    (text,) = held_out.texts(params["texts"])
    count = -(-params["tokens"] // params["window"])
    windows = held_out.windows(
        load_tokenizer(run_folder.dense(context.root)), text, params["window"], count, bos=False, name="verification"
    )
    found, not_executed = run_folder.executable(run_folder.engines(context.root, dense_bundles=params["dense_parent"]))
    for label, reason in not_executed.items():
        context.note(f"{label}: {reason}")
    result = verify_run(
        found,
        windows,
        prefill=params["prefill"],
        tolerances=params["tolerances"],
        text=text.name,
        threads=params["threads"],
        progress=context.progress,
        note=context.note,
    )
    write_json(context.out / "verify.json", {**result, "not_executed": not_executed})


def bench(context: Context) -> None:
    """Time all engines, interleaved, on one prompt of held-out text."""
    from functools import partial

    from moedge.convert.sources import load_tokenizer
    from moedge.runtime import bench as benchmark
    from moedge.runtime.engines import open_engine

    params = context.params
    (text,) = held_out.texts(params["texts"])
    ids = held_out.windows(
        load_tokenizer(run_folder.dense(context.root)), text, params["prompt"], 1, bos=False, name="benchmark"
    )[0]
    found, not_executed = run_folder.executable(run_folder.engines(context.root, dense_bundles=params["dense_parent"]))
    found.pop("portable dense", None)  # nobody's choice for speed: the lowered parent is the one to beat
    engines = {label: partial(open_engine, path, threads=params["threads"]) for label, path in found.items()}
    options = {name: params[name] for name in ("prompt", "decode", "repeats", "warmup")}
    result = benchmark.bench(engines, ids, **options, progress=context.progress)
    write_json(context.out / "bench.json", {**result, "text": text.name, "not_executed": not_executed})


def report(context: Context) -> None:
    """Write report.json, report.md and report.html from what the other stages left."""
    from moedge.runtime.report import write

    write(context.root, context.out, recipe=context.params["recipe"])
