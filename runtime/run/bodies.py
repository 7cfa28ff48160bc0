"""The work of each stage of ``moedge run``.

A body takes its parameters and the folders of earlier stages, calls one of the three packages and writes its result;
nothing else. What comes after what, and when a result is used again, is in :mod:`moedge.runtime.run.stages`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge._files import digest, read_json, write_json
from moedge._progress import named
from moedge.runtime.run import held_out, run_folder
from moedge.runtime.run.engine import Context
from moedge.runtime.run.fingerprint import top_files

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

# --- source ---------------------------------------------------------------------------------------------------------


def source(context: Context) -> None:
    """Open the dense model; the folder itself stays where it is (it is big), and source.json points to it."""
    from moedge.convert.sources import resolve, tokenizer_files

    found = resolve(context.params["source"], context.params["revision"])
    folder = found.folder.resolve()
    tokenizer_files.check(folder)
    config = read_json(folder / "config.json", "download or save the model again")
    write_json(
        context.out / "source.json",
        {
            "schema": "moedge.source/1",
            **{name: getattr(found, name) for name in ("spec", "kind", "sha256", "label")},
            "folder": str(folder),
            "files": top_files(folder),
            "config": config,
        },
    )


def source_identity(folder: Path) -> str | None:
    """Identity of the model that source.json points to, or None when its files are gone or changed."""
    record = run_folder.read_json(folder / "source.json")
    where = Path(record["folder"])
    if not where.is_dir() or top_files(where) != record["files"]:
        return None
    return run_folder.source_digest(record)


# --- calibrate, convert, export -------------------------------------------------------------------------------------


def calibrate(context: Context) -> None:
    """Run calibration text through the dense model; keep the token windows and each layer's statistics."""
    from safetensors.numpy import save_file

    from moedge.convert import calibration, domains, gather
    from moedge.convert.methods import gather as method
    from moedge.convert.sources import load_tokenizer

    params, folder = context.params, run_folder.dense(context.root)
    tokenizer = load_tokenizer(folder)
    bos = calibration.starts_with_bos(tokenizer, params["bos"])
    windows, facts = held_out.calibration_windows(
        tokenizer, params["text"], params["length"], params["windows"], bos=bos
    )
    if params["domains"]:
        options = {key: value for key, value in params["domains"].items() if key != "texts"}
        found, facts["domains"] = domains.read(tokenizer, params["domains"]["texts"], bos=bos, **options)
        domains.save(found, context.out / "domains.safetensors")
    gate = None
    if params["gate_signal"]:  # a window is a sample; its BOS token is an attention sink and counts in no mean
        exclude = (tokenizer.bos_token_id,) if bos else ()
        gate = calibration.GateSampling(signal=params["gate_signal"], exclude=exclude)
    model = _opened(folder, params["device"], context) if params["values"] or params["statistics"] else None
    if params["values"]:
        settings = method.GatherParams(**params["values"])
        ladders = method.measure(windows, model, settings, context.progress)
        gather.save(ladders, context.out / "values.safetensors", settings.measured())
    if params["statistics"]:
        statistics = calibration.collect(
            model,
            windows,
            k_a=params["k_a"],
            profile=params["profile"],
            gate=gate,
            batch_size=params["batch_size"],
            progress=context.progress,
        )
        calibration.save(statistics, context.out / "statistics.safetensors")
    save_file({"windows": windows}, context.out / "windows.safetensors")
    write_json(
        context.out / "calibration.json",
        {
            "schema": "moedge.calibration/1",
            "windows": params["windows"],
            "length": params["length"],
            "bos": bos,
            "tokens": int(windows.size),
            "tokens_sha256": digest(windows.tolist()),
            **facts,
        },
    )


def _opened(folder: Path, device: str, context: Context) -> PreTrainedModel:
    """Open the dense model, whole or layer by layer; say so in the second case."""
    from moedge.convert import offload
    from moedge.convert.sources import open_model

    model = open_model(folder, device)
    if offload.is_offloaded(model):
        context.note("the model is larger than half of the free memory: one layer is read at a time")
    return model


def convert_stage(context: Context) -> None:
    """Make the plan on float32 weights, apply it and save the MoE checkpoint in the dense model's own dtype."""
    import torch
    from safetensors.numpy import load_file

    from moedge.convert import calibration, domains, gather, methods, modeling, offload, processes
    from moedge.convert.sources import load_tokenizer, own_dtype

    folder, calibrated = run_folder.dense(context.root), context.root / "calibrate"
    params = dict(context.params["convert"])
    name = params.pop("method")
    needs = methods.METHODS[name].needs
    model = _opened(folder, context.params["device"], context)
    windows = load_file(calibrated / "windows.safetensors")["windows"] if needs or params["gather"] else None
    data: Any = None
    if "tokens" in needs:
        data = windows
    elif "domains" in needs:
        data = domains.load(calibrated / "domains.safetensors")
    elif "statistics" in needs:
        data = calibration.load(calibrated / "statistics.safetensors")
    thresholds = methods.gather_settings(context.params["convert"])
    kept = gather.load(calibrated / "values.safetensors", model, thresholds.measured()) if thresholds else None
    plan = methods.convert(
        name,
        data,
        model,
        **params,
        ladders=kept,
        token_windows=windows,
        source_sha256=run_folder.source(context.root)["sha256"],
        provenance={} if windows is None else run_folder.read_json(calibrated / "calibration.json"),
        progress=context.progress,
    )
    if processes.rank():  # the first process writes
        return
    offload.cast(modeling.apply(plan, model), getattr(torch, own_dtype(folder)))
    modeling.save(model, plan, load_tokenizer(folder), context.out / "checkpoint")


def export(context: Context) -> None:
    """Export the MoE checkpoint, or the dense parent in the same way, one bundle for each target."""
    from moedge.export import pipeline

    params = context.params
    moe = params["kind"] == "moe"
    label = run_folder.source(context.root)["label"] + (f" {params['notation']}" if moe else "")
    folder = run_folder.checkpoint(context.root) if moe else run_folder.dense(context.root)
    pipeline.export(
        folder,
        context.out,
        params["targets"],
        label=label,
        max_length=params["max_length"],
        dtype=params.get("dtype"),
        progress=named(context.progress, context.note),
        portable=context.root / params["portable"] if "portable" in params else None,
    )


def build_engine(context: Context) -> None:
    """Make one engine of the MoE for every device of the recipe; no GPU is needed, and none executes it."""
    from moedge.runtime.engines import build
    from moedge.runtime.run.refs import EngineRef

    bundle = run_folder.bundles(context.root)[EngineRef("tensorrt-rtx", "moe")]
    facts = build.build(bundle, context.out / "tensorrt-rtx", context.params["devices"]).build
    assert facts is not None, "an engine that was just built says how"
    context.note(f"{facts.engine_bytes / 2**20:.0f} MiB, {facts.layers} layers; not executed here")


# --- evaluate, verify, bench, report --------------------------------------------------------------------------------


def evaluate(context: Context) -> None:
    """Measure perplexity and divergence from the parent, of the MoE and of its controls, on held-out text."""
    from safetensors.numpy import load_file

    from moedge.convert import calibration
    from moedge.convert import evaluate as quality
    from moedge.convert.methods.baselines import CONTROLS, SEEDED, refusal
    from moedge.convert.plan import MoEPlan
    from moedge.convert.sources import load_model, load_tokenizer

    params, folder = context.params, run_folder.dense(context.root)
    tokenizer, model = load_tokenizer(folder), load_model(folder, device=params["device"])
    texts = {text.name: text for text in held_out.texts(params["texts"])}
    count = params["tokens"] // params["window"]
    bos = calibration.starts_with_bos(tokenizer, params["bos"])
    windows = {
        name: held_out.windows(tokenizer, text, params["window"], count, bos=bos, name="evaluation")
        for name, text in texts.items()
    }
    plan = MoEPlan.load(run_folder.checkpoint(context.root))
    calibrated = load_file(context.root / "calibrate" / "windows.safetensors")["windows"]
    measured = context.root / "calibrate" / "statistics.safetensors"
    statistics = calibration.load(measured) if measured.exists() else []
    plans: dict[str, MoEPlan | list[MoEPlan]] = {plan.method: plan}
    skipped = {name: reason for name in params["controls"] if (reason := refusal(name, plan))}
    for name in params["controls"]:
        if name in skipped:
            continue
        seeds = params["seeds"] if name in SEEDED else [0]
        plans[name] = [CONTROLS[name](plan, statistics, model, seed, calibrated) for seed in seeds]
    documents = {name: f"{len(text.documents)} held-out documents" for name, text in texts.items()}
    result = quality.evaluate(
        model,
        plans,
        windows,
        {"window": params["window"], "bos": bos, "documents": documents, "texts": list(windows)},
        batch_size=params["batch_size"],
        progress=context.progress,
    )
    write_json(context.out / "evaluation.json", {**result, "skipped": skipped})
    if params["diagnostics"]:
        from moedge.convert import diagnostics, modeling

        converted, _, _ = modeling.load(run_folder.checkpoint(context.root), device=params["device"])
        found = {
            name: {"documents": documents[name], **diagnostics.diagnose(converted, ids, dense_model=model)}
            for name, ids in windows.items()
        }
        write_json(context.out / "diagnostics.json", {"schema": diagnostics.DIAGNOSTICS_SCHEMA, "texts": found})


def verify(context: Context) -> None:
    """Compare every ONNX engine with PyTorch, and every MoE with all experts selected with the dense parent."""
    from moedge.configs import tolerances
    from moedge.convert.sources import load_tokenizer
    from moedge.convert.tasks import Questions
    from moedge.runtime.parity import shapes
    from moedge.runtime.parity.accuracy import Gate
    from moedge.runtime.parity.suite import verify_run

    params = context.params
    given = params["tolerances"] if isinstance(params["tolerances"], str) else tolerances.Given(**params["tolerances"])
    profile, limits = tolerances.chosen(given)
    (text,) = held_out.texts(params["texts"])
    tokenizer = load_tokenizer(run_folder.dense(context.root))

    def read(length: int, count: int = 1) -> np.ndarray:
        return held_out.windows(tokenizer, text, length, count, bos=None, name="verification")

    windows = read(params["window"], -(-params["tokens"] // params["window"]))
    found, not_executed = run_folder.executable(run_folder.engines(context.root, dense_bundles=params["dense_parent"]))
    for label, reason in not_executed.items():
        context.note(f"{label}: {reason}")
    asked = Questions(tuple(params["tasks"]), shots=params["shots"], limit=params["limit"])
    gate = Gate.of_run(found, asked, given) if asked.tasks else None  # first: it may find that nobody can be asked
    result = verify_run(
        found,
        windows,
        prefill=params["prefill"],
        tolerances=profile,
        limits=limits,
        text=text.name,
        threads=params["threads"],
        pytorch={"device": params["device"]},
        asked=shapes.asked(windows, read, thorough=params["thorough"], max_length=params["max_length"]),
        progress=context.progress,
        note=context.note,
    )
    if gate:
        how = {"threads": params["threads"], "device": params["device"]}
        result = gate.added(result, **how, progress=context.progress, note=context.note)
    write_json(context.out / "verify.json", {**result, "not_executed": not_executed})


def bench(context: Context) -> None:
    """Time all engines, interleaved, on one prompt of held-out text."""
    from functools import partial

    from moedge.convert.sources import load_tokenizer
    from moedge.export.targets import PORTABLE
    from moedge.runtime.bench import latency as benchmark
    from moedge.runtime.bench import profiling
    from moedge.runtime.bench.headroom import add_headroom
    from moedge.runtime.bench.points import Point
    from moedge.runtime.engines import open_engine
    from moedge.runtime.run.refs import EngineRef

    params = context.params
    (text,) = held_out.texts(params["texts"])
    points = [Point(prompt=params["prompt"], decode=params["decode"])]
    ids = held_out.windows(
        load_tokenizer(run_folder.dense(context.root)), text, params["prompt"], 1, bos=None, name="benchmark"
    )[0]
    found, not_executed = run_folder.executable(run_folder.engines(context.root, dense_bundles=params["dense_parent"]))
    found.pop(EngineRef(PORTABLE, "dense"), None)  # nobody's choice for speed: the lowered parent is the one to beat
    pytorch = {name: params[name] for name in ("device", "dtype")}
    folders = {str(ref): path for ref, path in found.items()}
    engines = {
        label: partial(open_engine, path, threads=params["threads"], pytorch=pytorch, last_logits=True)
        for label, path in folders.items()
    }
    options = {name: params[name] for name in ("repeats", "warmup")}
    profiled = profiling.profilable(folders) if params["profile"] else {}
    result = benchmark.bench(engines, ids, points, **options, batches=True, progress=context.progress)
    if profiled:
        sizes = {name: params[name] for name in ("prompt", "decode", "repeats", "threads")}
        result["profiles"] = profiling.profiles(profiled, ids, **sizes)
    add_headroom(result, folders)
    write_json(context.out / "bench.json", {**result, "text": text.name, "not_executed": not_executed})


def report(context: Context) -> None:
    """Write report.json, report.md and report.html from what the other stages left."""
    from moedge.runtime.report import write

    write(context.root, context.out, recipe=context.params["recipe"])
