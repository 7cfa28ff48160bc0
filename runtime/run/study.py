"""What ``moedge ablate`` does, stage by stage: each row of a study is one stage, so an interrupted study goes on.

All rows share one protocol: the calibration windows and their statistics, and the held-out windows with the dense
parent's last hidden states, are made once.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from moedge._files import digest, write_json
from moedge.configs.study import Row, Sparsity, Study
from moedge.runtime.run import held_out, run_folder
from moedge.runtime.run.engine import Context, Stage
from moedge.runtime.run.fingerprint import fingerprint
from moedge.runtime.run.stages import CONVERT_CODE, open_dense

STUDY_SCHEMA = "moedge.study/1"
_LIBRARIES = ("torch", "transformers", "scipy")


def build(study: Study) -> list[Stage]:
    """Return the stages of a study, in order.

    Raises:
        MoEdgeError: a model or text file that the study names does not exist.
    """
    texts = [{**text.model_dump(), "is": fingerprint(text.source, text=True)} for text in study.texts]
    protocol = {"texts": texts, "window": study.window, "bos": study.bos, "device": study.model.device}
    rows = [(row, sparsity) for sparsity in study.sparsities for row in study.rows]
    marks = sorted({_marks(study, row, sparsity) for row, sparsity in rows})
    found = [
        open_dense(study.model),
        Stage(
            "calibrate",
            "measure activations on the calibration windows",
            calibrate,
            {**protocol, "marks": [list(pair) for pair in marks]},
            reads=("source",),
            sources=CONVERT_CODE,
            libraries=_LIBRARIES,
        ),
        Stage(
            "dense",
            "measure the dense parent on the held-out windows",
            dense,
            {**protocol, "batch_size": study.batch_size},
            reads=("source",),
            sources=CONVERT_CODE,
            libraries=_LIBRARIES,
        ),
    ]
    parents = {study.parent(row).label for row in study.rows if row.control}
    measured = [_row_stage(study, sparsity, row, keep=row.label in parents) for row, sparsity in rows]
    found += measured
    names = [stage.name for stage in measured]
    found.append(
        Stage(
            "table",
            "write results.md and results.json",
            table,
            {"study": study.model_dump(mode="json"), "rows": names},
            reads=("source", "calibrate", "dense", *names),
            sources=(*CONVERT_CODE, "runtime/report"),
        )
    )
    return found


def _row_stage(study: Study, sparsity: Sparsity, row: Row, *, keep: bool) -> Stage:
    from moedge.convert.methods.baselines import SEEDED

    params: dict[str, Any] = {"label": row.label, "sparsity": sparsity.name, "batch_size": study.batch_size}
    params |= {"device": study.model.device, "marks": list(_marks(study, row, sparsity))}
    reads: tuple[str, ...] = ("source", "calibrate", "dense")
    if row.method is not None:
        params |= {"method": row.method, "params": study.parameters(row, sparsity), "keep": keep}
    else:
        seeds = study.seeds if row.control in SEEDED else [0]
        params |= {"control": row.control, "params": {}, "seeds": seeds, "of": _name(sparsity, study.parent(row))}
        reads = (*reads, params["of"])
    what = f"{row.label} at {sparsity.name}"
    body = method_row if row.method is not None else control_row
    return Stage(_name(sparsity, row), what, body, params, reads=reads, sources=CONVERT_CODE, libraries=_LIBRARIES)


def _marks(study: Study, row: Row, sparsity: Sparsity) -> tuple[int, str]:
    """The marks, (k_a, profile), that a row reads; a control reads those of its method's row."""
    from moedge.convert.methods import METHODS

    method = row if row.method else study.parent(row)
    params = study.parameters(method, sparsity)
    needs = METHODS[str(method.method)].needs
    return (params.get("k_a", 10), params.get("profile", "raw")) if "statistics" in needs else (10, "raw")


def _statistics(calibrated: Path, marks: list[Any]) -> Path:
    """Where the statistics with some marks, [k_a, profile], are kept."""
    return calibrated / f"statistics-{marks[0]}-{marks[1]}.safetensors"


def _name(sparsity: Sparsity, row: Row) -> str:
    """Folder name of a row: readable, and unique because labels are."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{sparsity.name} {row.label}".lower()).strip("-")
    return f"{slug}-{digest([sparsity.name, row.label])[:6]}"


# --- stage bodies ---------------------------------------------------------------------------------------------------


def _windows(context: Context, which: str) -> dict[str, Any]:
    """Windows int64 [N, L] of each text, ``which`` "calibration" or "held_out"; names are the texts'."""
    from moedge.convert import calibration
    from moedge.convert.sources import load_tokenizer

    tokenizer = load_tokenizer(run_folder.dense(context.root))
    found: dict[str, Any] = {}
    names: list[str] = []  # of all texts, so that one has the same name in both
    for entry in context.params["texts"]:
        text = calibration.read_text(entry["source"])
        names.append(held_out.own_name(text.name, names))
        if not entry[which]:
            continue
        if entry["calibration"]:  # else all of it is held out
            text = calibration.split(text, entry["holdout_every"])[0 if which == "calibration" else 1]
        length, bos = context.params["window"], context.params["bos"]
        found[names[-1]] = held_out.windows(tokenizer, text, length, entry[which], bos=bos, name=which)
    return found


def calibrate(context: Context) -> None:
    """Keep the calibration windows, texts interleaved, and the statistics of every FFN on them."""
    from safetensors.numpy import save_file

    from moedge.convert import calibration
    from moedge.convert.sources import load_model, load_tokenizer

    folder = run_folder.dense(context.root)
    each = _windows(context, "calibration")
    ids = held_out.interleaved(list(each.values()))
    tokenizer = load_tokenizer(folder)
    bos = calibration.starts_with_bos(tokenizer, context.params["bos"])
    model = load_model(folder, device=context.params["device"])
    gate = calibration.GateSampling(exclude=(tokenizer.bos_token_id,) if bos else ())
    for k_a, profile in context.params["marks"]:
        statistics = calibration.collect(model, ids, k_a=k_a, profile=profile, gate=gate, progress=context.progress)
        calibration.save(statistics, _statistics(context.out, [k_a, profile]))
    save_file({"windows": ids}, context.out / "windows.safetensors")
    counts = {name: int(windows.size) for name, windows in each.items()}
    write_json(context.out / "calibration.json", {"tokens": counts, "bos": bos, "tokens_sha256": digest(ids.tolist())})


def dense(context: Context) -> None:
    """Keep the held-out windows and the dense parent's last hidden states on them."""
    import torch
    from safetensors.torch import save_file

    from moedge.convert import scoring
    from moedge.convert.sources import load_model

    model = load_model(run_folder.dense(context.root), device=context.params["device"])
    windows = _windows(context, "held_out")
    states = scoring.last_hidden_states(
        model, windows, batch_size=context.params["batch_size"], progress=context.progress
    )
    tensors = {f"states.{name}": value.contiguous() for name, value in states.items()}
    save_file(
        tensors | {f"ids.{name}": torch.from_numpy(ids) for name, ids in windows.items()},
        context.out / "dense.safetensors",
    )


def method_row(context: Context) -> None:
    """Convert by a method, and measure."""
    from safetensors.numpy import load_file

    from moedge.convert import calibration, methods
    from moedge.convert.sources import load_model

    params, calibrated = context.params, context.root / "calibrate"
    needs = methods.METHODS[params["method"]].needs
    model = load_model(run_folder.dense(context.root), device=context.params["device"])
    windows = load_file(calibrated / "windows.safetensors")["windows"]
    data: Any = None
    if "tokens" in needs:
        data = windows
    elif "statistics" in needs:
        data = calibration.load(_statistics(calibrated, params["marks"]))
    started = time.perf_counter()
    about = run_folder.read_json(calibrated / "calibration.json")
    plan = methods.convert(params["method"], data, model, **params["params"], token_windows=windows, provenance=about)
    seconds = time.perf_counter() - started
    if params["keep"]:
        plan.save(context.out)
    _measure(context, model, [plan], "method", seconds)


def control_row(context: Context) -> None:
    """Make a control of another row's plan, once a seed, and measure."""
    from safetensors.numpy import load_file

    from moedge.convert import calibration
    from moedge.convert.methods import baselines
    from moedge.convert.plan import MoEPlan
    from moedge.convert.sources import load_model

    params, calibrated = context.params, context.root / "calibrate"
    model = load_model(run_folder.dense(context.root), device=params["device"])
    parent = MoEPlan.load(context.root / params["of"])
    statistics = calibration.load(_statistics(calibrated, params["marks"]))
    windows = load_file(calibrated / "windows.safetensors")["windows"]
    make = baselines.CONTROLS[params["control"]]
    started = time.perf_counter()
    plans = [make(parent, statistics, model, seed, windows) for seed in params["seeds"]]
    _measure(context, model, plans, "control", (time.perf_counter() - started) / len(plans))


def _measure(context: Context, model: Any, plans: list[Any], kind: str, seconds: float) -> None:
    from safetensors.torch import load_file

    from moedge.convert import evaluate

    kept = load_file(context.root / "dense" / "dense.safetensors")
    states = {key.removeprefix("states."): value for key, value in kept.items() if key.startswith("states.")}
    windows = {key.removeprefix("ids."): value.numpy() for key, value in kept.items() if key.startswith("ids.")}
    result = evaluate.evaluate(
        model,
        {context.params["label"]: plans},
        windows,
        {},
        batch_size=context.params["batch_size"],
        dense_states=states,
        progress=context.progress,
    )
    half = result["second_half"]
    first, *rows = result["rows"]
    first |= {"tokens": result["protocol"]["tokens"]}
    half["rows"][0] |= {"tokens": half["tokens"]}
    about = {"kind": kind, "sparsity": context.params["sparsity"], "seconds": seconds}
    about |= {"plans": [plan.sha256 for plan in plans], "params": context.params["params"]}
    whole = {**rows[0], **about} if rows else None  # None: scored on second halves alone
    behind = {"dense": half["rows"][0], "row": {**half["rows"][1], **about}}
    write_json(context.out / "row.json", {"schema": STUDY_SCHEMA, "dense": first, "row": whole, "second_half": behind})


def table(context: Context) -> None:
    """Join the rows."""
    from moedge.runtime.report.study import write

    results = [run_folder.read_json(context.root / name / "row.json") for name in context.params["rows"]]
    write(
        context.out,
        study=context.params["study"],
        model=run_folder.source(context.root)["label"],
        calibration=run_folder.read_json(context.root / "calibrate" / "calibration.json"),
        results=results,
    )


def results(root: Path) -> Path:
    """The table of a finished study."""
    return root / "table" / "results.md"
