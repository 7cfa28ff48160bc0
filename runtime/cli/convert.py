"""Dense model to MoE checkpoint: by a method, and trained afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moedge.runtime.cli._app import Device, Force, Json, Text, Threads, command

PANEL = "Convert"


@command("convert", PANEL)
def convert(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, .gguf file, hub id org/name, or asset:NAME.")],
    out: Annotated[Path, typer.Argument(help="Folder for the MoE checkpoint.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    text: Text = "asset:wiki",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 8,
    length: Annotated[int, typer.Option(min=8, help="Tokens per calibration window.")] = 2048,
    method: Annotated[str, typer.Option(help="Conversion method; `moedge methods` lists them.")] = "cmoe",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method (may be repeated)."),
    ] = None,
    shared: Annotated[int | None, typer.Option(min=0, help="Always-on experts; cmoe: 6.")] = None,
    active: Annotated[int | None, typer.Option(min=1, help="Routed experts that run for a token; cmoe: 6.")] = None,
    experts: Annotated[
        int | None, typer.Option(min=2, help="Experts in all; must divide the FFN width; cmoe: 16.")
    ] = None,
    k_a: Annotated[
        int | None, typer.Option("--k-a", min=1, help="Strongest neurons that a token marks; cmoe: 10.")
    ] = None,
    padding: Annotated[
        str | None, typer.Option(help="'uneven' allows a width that the experts do not divide; 'none' by default.")
    ] = None,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Turn a dense model into a Mixture-of-Experts checkpoint.

    The result is a Hugging Face folder (config.json, safetensors, tokenizer) plus plan.json, and works with
    AutoModelForCausalLM after `import moedge.convert.modeling`.

    \b
    Examples:
      moedge convert asset:smollm2-135m-instruct build/moe
      moedge convert ./my-llama build/moe --text my.txt --shared 3 --active 3 --experts 8
      moedge convert ./my-llama build/moe --method moedge --device cuda
      moedge convert ./my-llama build/moe --method expertweaver --set experts=32 --set k=24
    """
    from moedge.runtime.commands.convert import convert as body
    from moedge.runtime.commands.convert import parse_settings

    named = {"shared": shared, "active": active, "experts": experts, "k_a": k_a, "padding": padding}
    body(
        model,
        out,
        revision=revision,
        device=device,
        text=text,
        calibration={"windows": windows, "length": length},
        settings={"method": method, **parse_settings(settings or [], named)},
        force=force,
    )


@command("methods", PANEL)
def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all by default.")] = None, as_json: Json = False
) -> None:
    """List the conversion methods: where each comes from, what it needs, its parameters and their defaults.

    \b
    Examples:
      moedge methods
      moedge methods expertweaver
    """
    from moedge.runtime.commands.methods import methods as body

    body(name, as_json=as_json)


@command("domains", PANEL)
def domains(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, .gguf file, hub id org/name, or asset:NAME.")],
    out: Annotated[Path, typer.Argument(help="Folder for affinity.json, affinity.html and affinity.png.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method dive (may be repeated)."),
    ] = None,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Find out which named texts are so alike that one pruned expert serves them (DIVE's first step).

    \b
    Examples:
      moedge domains asset:smollm2-135m-instruct build/domains
      moedge domains ./my-llama build/domains --set 'domains={"mail": "mail.txt", "code": "code.txt"}' --set experts=2
    """
    from moedge.runtime.commands.convert import parse_settings
    from moedge.runtime.commands.domains import domains as body

    body(model, out, settings=parse_settings(settings or [], {}), device=device, force=force)


@command("retrain", PANEL)
def retrain(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint that `moedge convert --method dive` wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the retrained checkpoint.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Budget of both stages together; 100,000.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another setting, e.g. lr=1e-3 (may be repeated)."),
    ] = None,
    force: Force = False,
) -> None:
    """Retrain a DIVE checkpoint on its domains: the router alone, then router, norms and low-rank expert updates.

    Held-out perplexity of every domain is measured before, between and after, and kept in retrain.json. The same
    command goes on after an interruption.

    \b
    Examples:
      moedge retrain build/dive build/dive-trained --tokens 50000 --set router_lr=1e-3 --set lr=1e-3
    """
    from moedge.runtime.commands.convert import parse_settings
    from moedge.runtime.commands.retrain import retrain as body

    body(checkpoint, out, settings=parse_settings(settings or [], {"tokens": tokens}), force=force)


@command("finetune", PANEL)
def finetune(
    checkpoint: Annotated[Path, typer.Argument(help="MoE checkpoint from `moedge convert`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the trained checkpoint.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", help="Text to train on (may be repeated); asset:wiki by default.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure perplexity on; by default what training holds out of its own text."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Budget in tokens: exact, repeatable.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes, evaluations included.")] = None,
    train: Annotated[
        str | None, typer.Option(help="What is trained, joined by +; lora+scale+router by default.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the low-rank updates; 8 by default.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; 2e-4 by default.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens in a window; 512 by default.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows in a pass of one process; 4 by default.")] = None,
    distill: Annotated[str | None, typer.Option(help="Learn from the dense parent too: logits or hidden.")] = None,
    parent: Annotated[str | None, typer.Option(help="The dense parent, for --distill: folder, hub id, asset:.")] = None,
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
      moedge finetune build/moe build/tuned --tokens 200000 --distill logits --parent asset:smollm2-135m-instruct
      moedge finetune build/moe build/tuned --tokens 50000 --train router+norms+lora --balance bias --set lora_alpha=16
    """
    from moedge.runtime.commands.convert import parse_settings
    from moedge.runtime.commands.finetune import finetune as body

    named = {"tokens": tokens, "minutes": minutes, "trainable": train, "lora_rank": lora_rank, "lr": lr}
    named |= {"length": length, "batch": batch, "distill": distill, "balance": balance, "mixed_precision": precision}
    body(
        checkpoint,
        out,
        text=text or ["asset:wiki"],
        held_out_texts=held_out,
        every=holdout_every,
        eval_windows=eval_windows,
        parent=parent,
        options=parse_settings(settings or [], named),
        state=state,
        threads=threads,
        force=force,
    )
