"""The ``moedge`` command. Each command imports its stage when called, so ``--help`` is quick and needs no torch."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moedge import MoEdgeError, __version__

app = typer.Typer(
    name="moedge",
    help="Turn a dense GLU language model into a Mixture-of-Experts, prove that nothing broke, ship it as ONNX.",
    epilog="Start with: moedge run smollm2-135m",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Causes of an OSError that lie with the machine, not with this program: they get a sentence, not a traceback."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all physical cores by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print the whole result as JSON on stdout.")]
Text = Annotated[str, typer.Option(help="asset:NAME or a path to a .txt, .utf8 or .jsonl file (UTF-8).")]


def _command(name: str) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Register a command; a :class:`MoEdgeError` becomes one red line, what it returns becomes the exit code."""

    def register(function: Callable[..., int | None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **options: Any) -> None:
            try:
                code = function(*args, **options)
            except MoEdgeError as error:
                _say_error(str(error))
                raise typer.Exit(error.exit_code) from None
            except KeyboardInterrupt:
                _say_error("Interrupted; nothing half-written is left. Resume with the same command.")
                raise typer.Exit(INTERRUPTED) from None
            except OSError as error:
                if error.errno not in _OUTSIDE:
                    raise
                where = f" ({error.filename})" if error.filename else ""
                _say_error(
                    f"{error.strerror}{where}; nothing half-written is left. Make room or choose another folder."
                )
                raise typer.Exit(MoEdgeError.exit_code) from None
            except MemoryError:
                _say_error("Out of memory; close other programs, or lower the batch sizes and windows.")
                raise typer.Exit(MoEdgeError.exit_code) from None
            if code:
                raise typer.Exit(code)

        app.command(name)(guarded)
        return guarded

    return register


def _say_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(f"error: {message}", style="red"))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moedge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@_command("run")
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a packaged recipe, or path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages, what is cached, disk and memory; do nothing.")
    ] = False,
    force: Annotated[
        list[str] | None, typer.Option("--force", metavar="STAGE", help="Redo this stage (may be repeated).")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Redo this stage and every later one.")
    ] = None,
) -> int | None:
    """Do everything: open, calibrate, convert, export, evaluate, verify, bench, report.

    What is already done and unchanged is reused, so an interrupted run resumes with the same command. Exits with 1
    when an engine does not compute what PyTorch computes.

    \b
    Examples:
      moedge run smollm2-135m
      moedge run my-recipe.yaml --out runs/try-2 --dry-run
      moedge run smollm2-135m --from verify
    """
    from moedge.runtime.commands.run import run as command

    return command(recipe, out, dry_run=dry_run, force=force or [], start=start)


@_command("convert")
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
    force: Force = False,
) -> None:
    """Turn a dense model into a Mixture-of-Experts checkpoint.

    The result is a Hugging Face folder (config.json, safetensors, tokenizer) plus plan.json, and works with
    AutoModelForCausalLM after `import moedge.convert.modeling`.

    \b
    Examples:
      moedge convert asset:smollm2-135m-instruct build/moe
      moedge convert ./my-llama build/moe --text my.txt --shared 3 --active 3 --experts 8
      moedge convert ./my-llama build/moe --method expertweaver --set experts=32 --set k=24
    """
    from moedge.runtime.commands.convert import convert as command
    from moedge.runtime.commands.convert import parse_settings

    named = {"shared": shared, "active": active, "experts": experts, "k_a": k_a, "padding": padding}
    command(
        model,
        out,
        revision=revision,
        text=text,
        calibration={"windows": windows, "length": length},
        settings={"method": method, **parse_settings(settings or [], named)},
        force=force,
    )


@_command("methods")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method; all by default.")] = None, as_json: Json = False
) -> None:
    """List the conversion methods: where each comes from, what it needs, its parameters and their defaults.

    \b
    Examples:
      moedge methods
      moedge methods expertweaver
    """
    from moedge.runtime.commands.methods import methods as command

    command(name, as_json=as_json)


@_command("domains")
def domains(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, .gguf file, hub id org/name, or asset:NAME.")],
    out: Annotated[Path, typer.Argument(help="Folder for affinity.json, affinity.html and affinity.png.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method dive (may be repeated)."),
    ] = None,
    force: Force = False,
) -> None:
    """Find out which named texts are so alike that one pruned expert serves them (DIVE's first step).

    \b
    Examples:
      moedge domains asset:smollm2-135m-instruct build/domains
      moedge domains ./my-llama build/domains --set 'domains={"mail": "mail.txt", "code": "code.txt"}' --set experts=2
    """
    from moedge.runtime.commands.convert import parse_settings
    from moedge.runtime.commands.domains import domains as command

    command(model, out, settings=parse_settings(settings or [], {}), force=force)


@_command("retrain")
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
    from moedge.runtime.commands.retrain import retrain as command

    command(checkpoint, out, settings=parse_settings(settings or [], {"tokens": tokens}), force=force)


@_command("ablate")
def ablate(
    study: Annotated[str, typer.Argument(help="A packaged study, or the path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
) -> None:
    """Compare conversion methods, switches of a method, and controls on one held-out protocol; training-free.

    A study is a YAML file; every row is kept, so an interrupted study goes on where it stopped.

    \b
    Examples:
      moedge ablate smollm2-135m-methods
      moedge ablate my-study.yaml --out runs/my-study
    """
    from moedge.runtime.commands.ablate import ablate as command

    command(study, out)


@_command("finetune")
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
    from moedge.runtime.commands.finetune import finetune as command

    named = {"tokens": tokens, "minutes": minutes, "trainable": train, "lora_rank": lora_rank, "lr": lr}
    named |= {"length": length, "batch": batch, "distill": distill, "balance": balance, "mixed_precision": precision}
    command(
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


@_command("export")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="MoE checkpoint from `moedge convert`, or a dense model folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the bundles, one sub-folder per target.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="portable, ort-cpu, ort-cpu-int8, ort-cpu-int4, tensorrt or tensorrt-rtx (may be repeated); by "
            "default the first two.",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the model in reports; the folder's name by default.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt + answer in tokens; the model's own limit by default.")
    ] = None,
    force: Force = False,
) -> None:
    """Write an ONNX bundle with KV cache for each target.

    \b
    Examples:
      moedge export build/moe build/bundles
      moedge export ./my-llama build/dense --target ort-cpu
    """
    from moedge.runtime.commands.export import export as command

    command(checkpoint, out, targets=target, label=label, max_length=max_length, force=force)


@_command("build")
def build(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle of target tensorrt-rtx or tensorrt.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder for the engine.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Device profile: a name or a .yaml file (may be repeated).")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence; at most 2048 by default.")] = None,
    max_prompt: Annotated[
        int | None, typer.Option(min=2, help="Most prompt tokens in one call; half of --max-length by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most rows of a call.")] = 1,
    taps: Annotated[bool, typer.Option("--taps", help="Also output the selected experts, to verify routing.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT: timing cache to read and update.")] = None,
    list_devices: Annotated[bool, typer.Option("--list", help="Print the device profiles and exit.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build a TensorRT engine. For TensorRT for RTX this needs no GPU; TensorRT builds on the device itself.

    \b
    Examples:
      moedge build --list
      moedge export build/moe build/bundles --target tensorrt-rtx
      moedge build build/bundles/tensorrt-rtx build/engine --device rtx-4090 --device rtx-3090
    """
    from moedge.runtime.commands import build as commands

    if list_devices:
        commands.list_devices()
        return
    if bundle is None or out is None or not device:
        raise MoEdgeError("Give a bundle, an output folder and --device NAME; `moedge build --list` shows the names.")
    commands.build(
        bundle,
        out,
        device=device,
        max_length=max_length,
        max_prompt=max_prompt,
        batch=batch,
        taps=taps,
        timing_cache=timing_cache,
        force=force,
        as_json=as_json,
    )


@_command("bundle")
def bundle(
    source: Annotated[Path, typer.Argument(help="Checkpoint, or a folder with the bundles portable and tensorrt.")],
    out: Annotated[Path, typer.Argument(help="The archive (.tar).")],
    target: Annotated[str, typer.Option(help="Device profile: a name (`moedge build --list`) or a .yaml file.")],
    label: Annotated[str | None, typer.Option(help="Name of the model in results.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence; at most 2048 by default.")] = None,
    max_prompt: Annotated[int | None, typer.Option(min=2, help="Most prompt tokens in one call.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most rows of a call.")] = 1,
    force: Force = False,
) -> None:
    """Pack one archive for a device: graph, tokenizer, recorded answers, and scripts that build, verify and time there.

    The scripts need numpy and TensorRT's Python package only. The same input gives the same bytes.

    \b
    Example:
      moedge bundle build/moe moe-orin.tar --target jetson-agx-orin
    """
    from moedge.runtime.commands.bundle import bundle as command

    command(
        source,
        out,
        target=target,
        label=label,
        max_length=max_length,
        max_prompt=max_prompt,
        batch=batch,
        force=force,
    )


@_command("report")
def report(
    results: Annotated[list[Path], typer.Argument(help="verify-result.json and bench-result.json of a device.")],
    as_json: Json = False,
) -> int | None:
    """Print what verify.py and bench.py of a device archive wrote. Exits with 1 when a verification failed.

    \b
    Example:
      moedge report verify-result.json bench-result.json
    """
    from moedge.runtime.commands.report import report as command

    return command(results, as_json=as_json)


@_command("export-hf")
def export_hf(
    checkpoint: Annotated[Path, typer.Argument(help="MoE checkpoint from `moedge convert`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the Hugging Face checkpoint.")],
    text: Text = "asset:wiki",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure router scores and logits on.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 128,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print; write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint that stock transformers, vLLM and SGLang load, without code of ours.

    Models with a linear router and unit weights become Glm4MoeForCausalLM, pruned models without experts a narrower
    model of their own family. What cannot be represented is refused with the reason.

    \b
    Examples:
      moedge export-hf build/moe build/stock
      moedge export-hf build/moe build/stock --text my.txt --dry-run
    """
    from moedge.runtime.commands.export_hf import export_hf as command

    command(checkpoint, out, text=text, tokens=tokens, window=window, dry_run=dry_run, force=force, as_json=as_json)


@_command("verify")
def verify(
    reference: Annotated[
        Path, typer.Argument(help="Run folder (all its pairs), or the reference: bundle or checkpoint.")
    ],
    test: Annotated[Path | None, typer.Argument(help="Bundle or checkpoint to compare with the reference.")] = None,
    text: Text = "asset:wiki",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare on.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of a window in one prefill; the rest is decoded.")] = 224,
    tolerances: Annotated[str, typer.Option(help="Profile in configs/tolerances.yaml.")] = "float32",
    threads: Threads = None,
    as_json: Json = False,
    junit: Annotated[Path | None, typer.Option(help="Also write the checks as JUnit XML to this file.")] = None,
) -> int | None:
    """Compare two engines on real text: logits, KL, top-1 and top-5, expert sets. Exits with 1 when a check fails.

    \b
    Examples:
      moedge verify runs/smollm2-135m
      moedge verify build/moe build/bundles/ort-cpu --junit verify.xml
    """
    from moedge.runtime.commands.verify import verify as command

    return command(
        reference,
        test,
        text=text,
        tokens=tokens,
        window=window,
        prefill=prefill,
        tolerances=tolerances,
        threads=threads,
        as_json=as_json,
        junit=junit,
    )


@_command("bench")
def bench(
    engines: Annotated[list[Path], typer.Argument(help="One run folder, or bundles and checkpoints to time together.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 64,
    repeats: Annotated[int, typer.Option(min=3, help="Timed rounds.")] = 10,
    threads: Threads = None,
    text: Text = "asset:wiki",
    as_json: Json = False,
) -> None:
    """Time engines side by side at batch 1: time to first token, time per token, memory, load time.

    \b
    Examples:
      moedge bench runs/smollm2-135m
      moedge bench build/dense/ort-cpu build/bundles/ort-cpu --decode 128
    """
    from moedge.runtime.commands.bench import bench as command

    command(engines, prompt=prompt, decode=decode, repeats=repeats, threads=threads, text=text, as_json=as_json)


@_command("generate")
def generate(
    model: Annotated[Path, typer.Argument(help="Run folder, bundle or checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads it from stdin.")],
    which: Annotated[str, typer.Option("--model", help="Run folders: moe or dense.")] = "moe",
    target: Annotated[
        str, typer.Option(help="Run folders: ort-cpu, ort-cpu-int8, ort-cpu-int4, portable or torch.")
    ] = "ort-cpu",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a chat message (the model's template).")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 picks the most likely token (greedy).")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the smallest set with this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    threads: Threads = None,
) -> None:
    """Generate text and print it as it comes.

    \b
    Examples:
      moedge generate runs/smollm2-135m "The capital of France is"
      moedge generate runs/smollm2-135m "Explain rain to a child." --chat --temperature 0.7
    """
    from moedge.runtime.commands.generate import generate as command

    command(
        model,
        prompt,
        which=which,
        target=target,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threads=threads,
    )


@_command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(help="Run folder, MoE checkpoint, bundle, or a model folder.")],
    as_json: Json = False,
) -> None:
    """Print what a run, a plan, a checkpoint or a bundle holds, after checking its hashes.

    \b
    Examples:
      moedge inspect runs/smollm2-135m
      moedge inspect runs/smollm2-135m/export/ort-cpu --json
    """
    from moedge.runtime.commands.inspect import inspect as command

    command(path, as_json=as_json)


@_command("diagnose")
def diagnose(
    path: Annotated[Path, typer.Argument(help="MoE checkpoint or run folder.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="asset:NAME or a .txt, .utf8 or .jsonl file (may be repeated); asset:wiki by default."),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense parent to measure errors against; a run folder knows its own.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 4096,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 512,
    holdout_every: Annotated[
        int, typer.Option(min=2, help="Of the calibration text only every Nth document is used, the held-out ones.")
    ] = 10,
    stability: Annotated[
        bool, typer.Option("--stability", help="Convert again on halves and on each text; compare the partitions.")
    ] = False,
    k_a: Annotated[
        int, typer.Option("--k-a", min=1, help="A neuron is dead when no token has it among its k-a strongest.")
    ] = 10,
    plot: Annotated[Path | None, typer.Option(help="Also draw the first text to this .svg or .png file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the whole result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Show what the routers do: agreement with the best choice, load, dead neurons, errors, partition stability.

    \b
    Examples:
      moedge diagnose runs/smollm2-135m
      moedge diagnose build/moe --dense ./my-llama --text my.txt --text other.txt --stability --plot routing.svg
    """
    from moedge.runtime.commands.diagnose import diagnose as command

    command(
        path,
        texts=text or ["asset:wiki"],
        dense=dense,
        tokens=tokens,
        window=window,
        every=holdout_every,
        stability=stability,
        k_a=k_a,
        plot=plot,
        out=out,
        as_json=as_json,
    )


@_command("evaluate")
def evaluate(
    models: Annotated[list[Path], typer.Argument(help="MoE checkpoints, dense models, or a run folder (both of its).")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Perplexity on this text: asset:NAME or a file (may be repeated); asset:wiki by default."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks with commas between, e.g. arc_easy,piqa.")] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option("--task-data", metavar="TASK=FILE", help="Local data of a task (.arrow, .jsonl, .parquet, .csv)."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples in front of a question.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each task.")] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 8192,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window; windows do not overlap.")] = 512,
    bos: Annotated[bool, typer.Option("--bos", help="Start every window with the begin-of-sequence token.")] = False,
    holdout_every: Annotated[
        int, typer.Option(min=2, help="Of the calibration text only every Nth document is used, the held-out ones.")
    ] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows or questions per forward pass.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Also write the whole result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on held-out text and accuracy on lm-eval tasks (needs moedge[eval]), all from local data.

    \b
    Examples:
      moedge evaluate runs/smollm2-135m --text asset:wiki --text asset:c4
      moedge evaluate ./my-llama build/moe --tasks arc_easy,piqa,sciq --limit 200
    """
    from moedge.runtime.commands.evaluate import evaluate as command

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    command(
        models,
        texts=text or ([] if names else ["asset:wiki"]),
        tasks=names,
        task_data=task_data or [],
        shots=shots,
        limit=limit,
        tokens=tokens,
        window=window,
        bos=bos,
        every=holdout_every,
        batch_size=batch_size,
        out=out,
        as_json=as_json,
    )


@_command("doctor")
def doctor(as_json: Json = False) -> None:
    """Say which runtimes, versions and devices are here, and which lowerings are therefore possible.

    \b
    Example:
      moedge doctor
    """
    from moedge.runtime.commands.doctor import doctor as command

    command(as_json=as_json)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model's text must never crash a terminal that is not UTF-8
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
