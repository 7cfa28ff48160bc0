"""``moedge generate``: text from any engine, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.configs.generation_config import shown
from moedge.export import targets
from moedge.runtime.commands._options import Device, Dtype, Threads
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.given import local
from moedge.runtime.engines.info import EngineInfo
from moedge.runtime.engines.protocol import Opening
from moedge.runtime.run import run_folder
from moedge.runtime.run.refs import Role
from moedge.runtime.text import generate as generation
from moedge.runtime.text.tokenizer import Message, open_tokenizer

MODELS: dict[str, Role] = {"moe": "moe", "dense": "dense"}
ENGINES = (*targets.names(lambda row: row.engine is None), "torch")


def _given(prompt: str) -> str:
    """The prompt, or stdin for ``-``. An argument that is not UTF-8 comes with surrogates, which no tokenizer takes."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise MoEdgeError("The prompt is not UTF-8 text; convert it, for example with iconv.") from error
    return text


def _mass(given: str | float) -> float:
    """Read a share above 0 (the range of an option has no open end)."""
    try:
        if 0 < float(given) <= 1:
            return float(given)
    except ValueError:
        pass
    raise typer.BadParameter(f"{given} is not above 0 and at most 1.")


def generate(
    model: Annotated[Path, typer.Argument(help="Run folder, bundle, checkpoint or dense model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads it from stdin.")],
    which: Annotated[str, typer.Option("--model", help="Run folders: moe or dense.")] = "moe",
    engine: Annotated[str, typer.Option(help=f"Run folders: {', '.join(ENGINES)}.")] = "ort-cpu",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a chat message (the model's template).")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample as the model's generation_config.json says; else greedy.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample with this temperature; 0 is greedy, the default.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from this many most likely tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(parser=_mass, metavar="0<P<=1", help="Sample from the smallest set with this mass."),
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from tokens with this share of the best one's mass.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampler.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text (may be repeated).")
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Generate text and print it as it comes.

    What the model's generation_config.json asks for is obeyed (repetition penalty, ends of text, ...) or named on
    stderr; docs/generation.md lists it. Text is greedy unless one of --sample, --temperature, --top-k, --top-p, --min-p
    asks for sampling; what these do not say is as in the file.

    Bundles may carry a library of operators, and engines kernels: native code. Open only those whose origin you trust.

    \b
    Examples:
      moedge generate runs/smollm2-135m "The capital of France is"
      moedge generate runs/smollm2-135m "Explain rain to a child." --chat --sample
      moedge generate runs/smollm2-135m "Explain rain to a child." --chat --temperature 0.7 --top-p 0.9
    """
    for option, value, known in (("--model", which, MODELS), ("--engine", engine, ENGINES)):
        if value not in known:
            raise MoEdgeError(f"{option} {value}: unknown; choose {' or '.join(known)}.")
    folder = run_folder.pick(model, model=MODELS[which], target=engine) if run_folder.is_run(model) else local(model)
    sampling = {"sample": sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options = sampling | {"max_new_tokens": max_new_tokens, "seed": seed, "stop": stop or []}
    opening: Opening = {"threads": threads, "pytorch": {"device": device, "dtype": dtype}}
    _generate(folder, _given(prompt), chat, options, opening)


def _generate(folder: Path, text: str, chat: bool, options: dict[str, Any], opening: Opening) -> None:
    """Print the answer as it comes, and then what ran."""
    tokenizer = open_tokenizer(folder)
    request: str | list[Message] = [{"role": "user", "content": text}] if chat else text
    opened = open_engine(folder, last_logits=True, **opening)
    before = [] if chat else [text]  # printed once the prompt is known to fit

    def show(piece: str) -> None:
        print(*before, piece, sep="", end="", flush=True)
        before.clear()

    try:
        result = generation.generate(opened, tokenizer, request, on_text=show, **options)
        show("\n")
        info = opened.info
    finally:
        opened.close()
    _summarise(result, info)


def _summarise(result: generation.GenerationResult, info: EngineInfo) -> None:
    """Say on stderr what ran, how fast, and what was not done."""
    rate = f", {result.decode_tokens_per_s:.1f} tokens/s" if result.decode_tokens_per_s else ""
    how = shown({name: value for name, value in result.settings.items() if name != "do_sample"})
    _say(
        f"{info.name}, {info.runtime}, {info.dtype}, {info.threads} threads: {len(result.ids)} tokens, "
        f"first after {result.ttft_s * 1e3:.0f} ms{rate}, ended by {result.finish_reason}; "
        f"{'sampled' if result.settings.get('do_sample') else 'greedy'}{f' ({how})' if how else ''}"
    )
    for note in result.notes:
        _say(f"note: {note}")


def _say(sentence: str) -> None:
    Console(stderr=True).print(escape(sentence), style="dim", highlight=False, soft_wrap=True)
