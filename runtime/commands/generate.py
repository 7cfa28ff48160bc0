"""``moedge generate``: text from any engine, as it comes."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moedge import MoEdgeError
from moedge.export import targets
from moedge.runtime.commands import models
from moedge.runtime.engines import open_engine
from moedge.runtime.run import run_folder
from moedge.runtime.run.refs import Role
from moedge.runtime.text import generate as generation
from moedge.runtime.text.generation_config import shown
from moedge.runtime.text.tokenizer import Message, open_tokenizer

MODELS: dict[str, Role] = {"moe": "moe", "dense": "dense"}
TARGETS = (*targets.names(lambda row: row.engine is None), "torch")


def _given(prompt: str) -> str:
    """The prompt, or stdin for ``-``. An argument that is not UTF-8 comes with surrogates, which no tokenizer takes."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise MoEdgeError("The prompt is not UTF-8 text; convert it, for example with iconv.") from error
    return text


def generate(
    path: Path,
    prompt: str,
    *,
    which: str,
    target: str,
    chat: bool,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    stop: list[str],
    threads: int | None,
    pytorch: dict[str, str],
) -> None:
    """Stream the prompt (unless it is a chat) and its continuation to stdout; speed and notes go to stderr."""
    for option, value, known in (("--model", which, MODELS), ("--target", target, TARGETS)):
        if value not in known:
            raise MoEdgeError(f"{option} {value}: unknown; choose {' or '.join(known)}.")
    folder = (
        run_folder.pick(path, model=MODELS[which], target=target) if run_folder.is_run(path) else models.local(path)
    )
    text = _given(prompt)
    tokenizer = open_tokenizer(folder)
    request: str | list[Message] = [{"role": "user", "content": text}] if chat else text
    engine = open_engine(folder, threads=threads, pytorch=pytorch, last_logits=True)
    before = [] if chat else [text]  # printed once the prompt is known to fit

    def show(piece: str) -> None:
        print(*before, piece, sep="", end="", flush=True)
        before.clear()

    try:
        result = generation.generate(
            engine,
            tokenizer,
            request,
            max_new_tokens=max_new_tokens,
            sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            on_text=show,
        )
        show("\n")
        info = engine.info
    finally:
        engine.close()
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
