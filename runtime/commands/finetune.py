"""``moedge finetune``: a checkpoint is trained and becomes a checkpoint again, with the curve of its recovery."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge._files import atomic_dir, check_writable, spare
from moedge.configs.errors import checked
from moedge.runtime.commands._options import Converted, Force, Threads
from moedge.runtime.commands._settings import parse_settings
from moedge.runtime.engines.given import existing
from moedge.runtime.progress import single
from moedge.runtime.run import held_out, run_folder
from moedge.runtime.tables import Sheet

if TYPE_CHECKING:
    from moedge.convert.plan import MoEPlan
    from moedge.convert.train.settings import TrainSettings


def finetune(
    checkpoint: Converted,
    out: Annotated[Path, typer.Argument(help="Folder for the trained checkpoint.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Text to train on (may be repeated); asset:wiki by default.")
    ] = None,
    held_out_text: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out", help="Text to measure perplexity on; by default what training holds out of its own text."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Budget in tokens: exact, repeatable.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes, evaluations included.")] = None,
    train: Annotated[
        str | None, typer.Option(help="What is trained, joined by +; lora+scale+router by default.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the low-rank updates; 8 by default.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; 2e-4 by default.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens in a window; 512 by default.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows per forward pass of one process; 4 by default.")
    ] = None,
    distill: Annotated[str | None, typer.Option(help="Learn from the dense parent too: logits or hidden.")] = None,
    dense: Annotated[str | None, typer.Option(help="The dense parent, for --distill: folder, hub id, asset:.")] = None,
    balance: Annotated[str | None, typer.Option(help="Even the experts' load: bias (CMoE's rule) or loss.")] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16; routers stay in float32.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; docs/finetune.md lists them."),
    ] = None,
    eval_windows: Annotated[int, typer.Option(min=1, help="Windows of each held-out text.")] = 8,
    holdout_every: Annotated[int, typer.Option(min=2, help="Every so many documents are never trained on.")] = 10,
    state: Annotated[Path | None, typer.Option(help="Where an interrupted run is kept; beside OUT by default.")] = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Train a converted checkpoint to get quality back; the result is a checkpoint again, with its curve.

    The same command resumes an interrupted run. Under `accelerate launch` it runs on many processes.

    \b
    Examples:
      moedge finetune build/moe build/tuned --minutes 10
      moedge finetune build/moe build/tuned --tokens 200000 --distill logits --dense asset:smollm2-135m-instruct
      moedge finetune build/moe build/tuned --tokens 50000 --train router+norms+lora --balance bias --set lora_alpha=16
    """
    if not (existing(checkpoint) / "plan.json").is_file():
        raise MoEdgeError(f"{checkpoint} is not a checkpoint of `moedge convert`: it has no plan.json.")
    named = {"tokens": tokens, "minutes": minutes, "trainable": train, "lora_rank": lora_rank, "lr": lr}
    named |= {"length": length, "batch": batch_size, "distill": distill, "balance": balance}
    wanted = _settings(checkpoint, parse_settings(settings or [], named | {"mixed_precision": precision}), dense)
    if out.exists() and not force and any(out.iterdir()):
        raise MoEdgeError(f"Output folder {out} already exists and is not empty; pass --force to replace it.")
    if threads:
        import torch

        torch.set_num_threads(threads)
    texts = _Texts(text or ["asset:wiki"], held_out_text, holdout_every, eval_windows)
    where = state or out.with_name(f".{out.name}.training")
    inputs: list[Path | str] = [checkpoint, *([] if dense is None else [dense]), *texts.trained]
    inputs += texts.measured or []
    _check_state(where, out, inputs)
    _train(checkpoint, out, wanted, dense, texts, where, inputs, force=force)


@dataclass(frozen=True)
class _Texts:
    """What is trained on, and what is measured: texts of its own, or held-out documents of the same ones."""

    trained: list[str]
    measured: list[str] | None
    every: int
    """Of the documents of a text that is trained on, every so manyth is held out."""
    windows: int
    """Of each text that is measured."""


def _check_state(state: Path, out: Path, inputs: list[Path | str]) -> None:
    """Refuse a place for the saved training, which is deleted in the end, that holds anything else.

    Raises:
        MoEdgeError: it and ``out`` lie in each other, it holds other files or an input, or it cannot be written.
    """
    one, other = state.resolve(), out.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise MoEdgeError(
            f"--state {state} and the output {out} lie in one another, and saved training is deleted in the end; name "
            "a folder of its own."
        )
    if state.is_dir() and any(state.iterdir()) and not (state / "state.json").is_file():
        raise MoEdgeError(f"--state {state} holds other files, which saved training would replace; name a new folder.")
    check_writable(state / "state.json", "--state")
    spare(state, inputs, "--state")


def _settings(checkpoint: Path, given: dict[str, Any], dense: str | None) -> TrainSettings:
    """What was asked for, over what is recommended for the checkpoint; refused where it cannot work."""
    from moedge.convert.plan import MoEPlan
    from moedge.convert.train.finetune import recommended

    asked = {key: value for key, value in given.items() if value is not None}
    wanted: TrainSettings = settings_from({**recommended(MoEPlan.load(checkpoint)), **asked})
    if wanted.distill != "none" and dense is None:
        raise MoEdgeError(f"--distill {wanted.distill} needs --dense: the dense model that was converted.")
    if wanted.distill == "none" and dense is not None:
        raise MoEdgeError("--dense is learnt from with --distill; say how: logits or hidden.")
    config = run_folder.read_json(checkpoint / "config.json", "convert again")
    held_out.check_positions(config.get("max_position_embeddings"), wanted.length, "--length")
    return wanted


def _train(
    checkpoint: Path,
    out: Path,
    wanted: TrainSettings,
    parent: str | None,
    texts: _Texts,
    where: Path,
    inputs: list[Path | str],
    *,
    force: bool,
) -> None:
    """Read the texts and train; every process of `accelerate launch` runs this, the first one writes.

    Args:
        where: the saved training, of this run alone; deleted in the end.
        inputs: what must not be deleted.
    """
    from moedge.convert import sources
    from moedge.convert.plan import MoEPlan
    from moedge.convert.train import finetune as core
    from moedge.convert.train import training

    given, plan = None if parent is None else sources.resolve(parent), MoEPlan.load(checkpoint)
    tokenizer = sources.load_tokenizer(checkpoint)
    windows, measured, about = _texts(tokenizer, plan, texts, wanted)
    accelerator = training.make(wanted)
    main = accelerator.is_main_process
    with ExitStack() as stack:
        reporter = stack.enter_context(single("finetune", f"{checkpoint} -> {out}")) if main else None
        if reporter and where.is_dir():
            reporter.note(f"resuming from {where}")
        if reporter and given and not plan.made_of(given.sha256):
            reporter.note(f"{parent} is not the folder that was converted (its files differ); it is learnt from")
        # Only the first process writes; the others get a folder that they never use.
        partial = stack.enter_context(atomic_dir(out, force=force, inputs=inputs)) if main else out
        record = core.finetune(
            checkpoint,
            partial,
            windows,
            wanted,
            held_out=measured,
            parent=given.folder if given else None,
            state=where,
            about=about,
            accelerator=accelerator,
            on_eval=(lambda entry: reporter.note(_line(entry))) if reporter else None,
            progress=reporter.progress if reporter else None,
        )
        if main:
            from moedge.runtime.report.curve import draw

            draw(record, partial / "curve.png")
    if main:
        shutil.rmtree(where, ignore_errors=True)
        _print(record, out)


def settings_from(options: dict[str, Any]) -> Any:
    """Check options and return ``TrainSettings``.

    Raises:
        MoEdgeError: an unknown one, or a value that is not possible.
    """
    from moedge.convert.train.settings import TrainSettings

    given = dict(options)
    lora = {key.removeprefix("lora_"): given.pop(key) for key in list(given) if key.startswith("lora_")}
    if lora:
        given["lora"] = lora
    return checked(TrainSettings, given, called=_option)


_OPTIONS = {
    "trainable": "--train",
    "mixed_precision": "--precision",
    "lora_rank": "--lora-rank",
    "batch": "--batch-size",
} | {name: f"--{name}" for name in ("tokens", "minutes", "lr", "length", "distill", "balance")}
"""What the command calls the settings that have an option of their own."""


def _option(path: str) -> str:
    name = path.replace(".", "_")
    return _OPTIONS.get(name, f"--set {name}")


def _texts(
    tokenizer: Any, plan: MoEPlan, texts: _Texts, settings: TrainSettings
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return windows to train on, windows to measure on by text name, and JSON about both.

    Raises:
        MoEdgeError: a text of which the conversion, or an earlier training, held out other documents.
    """
    import numpy as np

    from moedge.convert import calibration
    from moedge.convert.train import finetune

    parts, limit, trained = [], settings.tokens, []
    for spec in texts.trained:
        documents, _ = held_out.calibration_text({"spec": spec, "every": texts.every})
        trained.append(documents.sha256)
        parts.append(finetune.all_windows(tokenizer, documents, settings.length, limit=limit))
    measured: dict[str, Any] = {}
    named: dict[str, str] = {}
    for spec in texts.measured if texts.measured is not None else texts.trained:
        # A text that was or is trained on gives its held-out documents, any other one all of them.
        found, _ = held_out.beside([plan], spec, texts.every, trained)
        name = held_out.own_name(found.name, measured)
        measured[name] = calibration.windows(
            tokenizer, found, settings.length, texts.windows, bos=None, name="held-out"
        )
        named[name] = spec
    windows = np.concatenate(parts)
    about = {
        "text": texts.trained,
        "text_sha256": trained,
        "train_windows": len(windows),
        "held_out": named,
        "held_out_every": texts.every,
        "held_out_tokens": {name: int(ids[:, 1:].size) for name, ids in measured.items()},
        "window": settings.length,
    }
    return windows, measured, about


def _line(entry: dict[str, Any]) -> str:
    ppl = ", ".join(f"{name} {value:.2f}" for name, value in entry["ppl"].items())
    loss = "" if entry["loss"] is None else f", training loss {entry['loss']:.3f}"
    return f"step {entry['step']}, {entry['tokens']:,} tokens, {entry['seconds']:.0f} s: perplexity {ppl}{loss}"


def _print(record: dict[str, Any], out: Path) -> None:
    table = Sheet()
    for heading in ("held-out text", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "held-out text" else "right")
    first, last = record["curve"][0]["ppl"], record["curve"][-1]["ppl"]
    for name, before in first.items():
        table.add_row(name, f"{before:.2f}", f"{last[name]:.2f}", f"{100 * (last[name] / before - 1):+.1f}%")
    console = Console()
    console.print(table)
    trained = ", ".join(f"{name} {count:,}" for name, count in record["trained"].items())
    speed = record["tokens"] / max(record["seconds"], 1e-9)
    console.print(
        escape(
            f"{out}: {record['steps']} steps, {record['tokens']:,} tokens in {record['seconds']:.0f} s "
            f"({speed:.0f} tokens/s with evaluations); trained: {trained}; finetune.json and curve.png are in it"
        ),
        highlight=False,
        soft_wrap=True,
    )
