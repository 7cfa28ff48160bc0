"""What ``import moedge`` offers: each stage as one function.

The names in :data:`moedge.__all__` and the arguments here are what versions promise. Every function takes paths as text
or :class:`~pathlib.Path`, returns what it made, prints nothing, and raises :class:`moedge.MoEdgeError`, whose message
is one or two sentences, for whatever a user can mend. The commands of the same names take the same words.

A model is a Hugging Face folder, a ``.gguf`` file, a hub id ``org/name`` or ``asset:NAME``; a text is ``asset:NAME`` or
a text file (``.jsonl``, or any other with a document a line). ``progress`` is called with (steps done, steps in all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.convert.plan import MoEPlan as MoEPlan
from moedge.runtime.engines import Engine
from moedge.runtime.engines import open_engine as open_engine
from moedge.runtime.measures import bench as bench
from moedge.runtime.measures import evaluate as evaluate
from moedge.runtime.measures import verify as verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moedge.runtime.text.generate import GenerationResult
    from moedge.runtime.text.tokenizer import Message, Tokenizer

PathLike = str | Path
Dtype = Literal["float32", "bfloat16", "float16"]


def convert_model(
    model: PathLike,
    out: PathLike,
    *,
    method: str = "cmoe",
    text: PathLike | Sequence[PathLike] = "asset:wiki",
    windows: int = 8,
    length: int = 2048,
    batch_size: int = 1,
    bos: bool | None = None,
    revision: str | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    **params: Any,
) -> MoEPlan:
    """Convert a dense model, as ``moedge convert`` does: leave out small values, or cut its FFNs into experts.

    The checkpoint is a Hugging Face folder with the plan beside the weights. Equal inputs give equal files.

    Args:
        model: the dense model; it is read, not changed.
        out: folder for the checkpoint.
        method: a name that ``moedge methods`` lists.
        text: to calibrate on; several share the windows.
        windows: how many token windows are read, ``length``: tokens in a window, ``batch_size``: windows in a forward
            pass. ``bos``: start each with the BOS token; None: as the tokenizer does.
        revision: branch, tag or commit of a hub id.
        device: where PyTorch computes: ``cpu``, ``cuda`` or ``cuda:N``.
        force: replace ``out``.
        progress: of each of the stages source, calibrate and convert.
        params: the method's own, such as ``experts=16, shared=6, active=6``; ``moedge methods NAME`` lists them.

    Returns:
        The plan: per layer which neurons are shared, which expert has which, the router, and where it came from.

    Raises:
        MoEdgeError: an unknown method or parameter, an impossible value, a model that cannot be opened or is not of a
            family that is known, too little text, or ``out`` is in use. Nothing is left in ``out`` then.
    """
    document = {
        "name": "convert",
        "model": {"source": str(model), "revision": revision, "device": device},
        "text": {"calibration": [str(text)] if isinstance(text, str | Path) else list(map(str, text))},
        "calibration": {"windows": windows, "length": length, "batch_size": batch_size, "bos": bos},
        "convert": {"method": method, **params},
    }
    return _converted(document, Path(out), force=force, progress=progress or _quiet)


def load(
    checkpoint: PathLike, *, dtype: Dtype | Literal["auto"] = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a dense model or a converted checkpoint in PyTorch.

    A converted model is an ordinary transformers model: padding on either side, every cache, ``generate``,
    ``torch.compile``, gradient checkpointing and sharded saves work as for its parent.

    Args:
        checkpoint: of :func:`convert_model`, or a dense model.
        dtype: of the weights; ``auto`` is what was saved. Routers stay in float32.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        MoEdgeError: it cannot be opened, or its plan and its weights are not of the same conversion.
    """
    from moedge.convert import modeling, sources

    folder = Path(checkpoint)
    if (folder / "plan.json").is_file():
        model, _, tokenizer = modeling.load(folder, dtype, device)
        return model, tokenizer
    folder = sources.resolve(str(checkpoint)).folder
    return sources.load_model(folder, dtype, device), sources.load_tokenizer(folder)


def export_model(
    checkpoint: PathLike,
    out: PathLike,
    targets: Sequence[str] | None = None,
    *,
    label: str | None = None,
    max_length: int | None = None,
    half: Literal["float16", "bfloat16"] | None = None,
    tensorrt: str | None = None,
    expert_form: str | None = None,
    calibration: Any = None,
    zero_points: bool = False,
    stock_operators: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write a checkpoint or a dense model as ONNX bundles, one folder a target; ``portable`` is always among them.

    All are written or none. What ``out`` holds of other targets, and engines, stay when they are of the same graph.

    Args:
        checkpoint: of :func:`convert_model`, or a dense model.
        out: folder that receives ``out/<target>/``.
        targets: names that ``moedge doctor`` lists; ``portable`` and ``ort-cpu`` by default.
        label: name of the model in results; the folder's name by default.
        max_length: longest sequence in tokens (cache and rotary tables); the model's own by default.
        half: half-precision type of the targets that leave the choice; float16 by default.
        tensorrt: version of TensorRT on the device that the bundle ``tensorrt`` is for; the newest by default.
        expert_form: of the experts in TensorRT bundles; chosen by what the version can do by default.
        calibration: int64 [N, L], token windows by which 4-bit weights are chosen (GPTQ) instead of rounded.
        zero_points: or, fit the levels of each block of 4-bit weights to its range (``ort-cpu-int4``).
        stock_operators: use none of our own operators for ONNX Runtime on a CPU, so that any program opens the bundles.
        force: replace bundles of ``targets`` that are there, and drop bundles and engines that are not of the same
            graph. What is neither stays.
        progress: in targets.

    Returns:
        Target -> folder.

    Raises:
        MoEdgeError: an unknown target, a model without a tokenizer or that cannot be traced, a bundle that is there
            already or is of another graph, something else in ``out``, or a lowering that fails its own test.
    """
    from moedge.export.pipeline import export
    from moedge.runtime.engines.given import local
    from moedge.runtime.run import exporting

    asked = exporting.Asked(tensorrt, expert_form, half, calibration is not None, zero_points, stock_operators)
    wanted = exporting.check(targets, asked, asked.in_python())
    folder = local(Path(checkpoint))
    exporting.check_checkpoint(folder, max_length, "max_length")
    return export(
        folder,
        Path(out),
        wanted,
        label=label or exporting.label(Path(checkpoint), folder),
        max_length=max_length,
        tensorrt=tensorrt,
        experts=expert_form,
        dtype=half,
        force=force,
        progress=lambda _, done, total: (progress or _quiet)(done, total),
        calibration=calibration,
        zero_points=zero_points,
        stock_operators=stock_operators,
    )


def generate(
    model: PathLike | Engine,
    prompt: str | Sequence[Message],
    *,
    tokenizer: Tokenizer | PathLike | None = None,
    max_new_tokens: int = 128,
    sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Iterable[str] = (),
    on_text: Callable[[str], None] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> GenerationResult:
    """Continue a prompt or answer a chat; what the model's ``generation_config.json`` asks for is obeyed.

    Args:
        model: a bundle, engine or checkpoint, opened for this call; or what :func:`open_engine` returned, which is
            faster for many prompts and needs ``tokenizer``.
        prompt: text, or chat messages ``{"role", "content"}`` for the model's chat template. A chat also ends at the
            tokenizer's end-of-text token, which templates close turns with.
        tokenizer: of the model: its folder, or what ``moedge.runtime.text.tokenizer.open_tokenizer`` returned.
        max_new_tokens: at most this many; fewer where the model's context ends.
        sample: draw tokens as the model's file says, with transformers' defaults. Greedy by default (ties to the lower
            id), unless one of the next four is given.
        temperature: 0 is greedy. top_k: of so many likeliest tokens, 0: of all. top_p: of the smallest set with this
            probability, 0 < top_p <= 1. min_p: of the tokens with at least this share of the likeliest one's.
        seed: of the draws; equal seeds give equal text on one engine.
        stop: text or texts that end the answer, besides the model's own; they are not part of it. Special tokens count
            by their text.
        on_text: called with each new piece of text: whole characters, nothing that is later taken back.
        threads, device, dtype: of an engine that is opened here; the last two are for checkpoints, which PyTorch runs.

    Returns:
        ``text`` without the prompt, ``ids``, ``finish_reason`` (``eos``, ``stop`` or ``length``), ``ttft_s`` (seconds),
        ``decode_tokens_per_s``, ``settings`` and ``notes``: what the model's files ask for and was not done.

    Raises:
        MoEdgeError: the model cannot be opened, an impossible setting, an empty or too long prompt, or no chat
            template.
    """
    from moedge.runtime.text import generate as text

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sample": sample, "temperature": temperature}
    options |= {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "stop": stop, "on_text": on_text}
    if isinstance(model, str | Path):
        return _generated(model, prompt, tokenizer, options, threads=threads, device=device, dtype=dtype)
    if tokenizer is None:
        raise MoEdgeError("An open engine does not know its tokenizer; pass tokenizer, for example the model's folder.")
    return text.generate(model, _tokenizer(tokenizer), prompt, **options)


def _argument(setting: str) -> str:
    """What :func:`convert_model` calls a recipe's key, or ``key: value``."""
    key, colon, value = setting.partition(": ")
    name = {"model.source": "model", "text.calibration": "text"}.get(key, key.split(".", 1)[-1])
    return f"{name}={value!r}" if colon else name


def _converted(document: dict[str, Any], out: Path, *, force: bool, progress: Progress) -> MoEPlan:
    """Write the checkpoint that the sections of a recipe describe, and read its plan."""
    from moedge.configs.recipe import conversion_from
    from moedge.runtime.run.conversion import write_checkpoint

    where = "convert_model"
    recipe = conversion_from(document, where=where, called=_argument)
    write_checkpoint(
        recipe,
        out,
        force=force,
        check=lambda config: recipe.check_model(config, where, called=_argument),
        progress=progress,
        note=_quiet,
    )
    return MoEPlan.load(out)


def _generated(
    model: PathLike,
    prompt: str | Sequence[Message],
    tokenizer: Tokenizer | PathLike | None,
    options: dict[str, Any],
    *,
    threads: int | None,
    device: str,
    dtype: str,
) -> GenerationResult:
    """Open an engine for one text."""
    from moedge.runtime.engines.given import local
    from moedge.runtime.text import generate as text

    folder = local(Path(model))
    given = _tokenizer(tokenizer or folder)
    engine = open_engine(folder, threads=threads, pytorch={"device": device, "dtype": dtype}, last_logits=True)
    try:
        return text.generate(engine, given, prompt, **options)
    finally:
        engine.close()


def _tokenizer(given: Tokenizer | PathLike) -> Tokenizer:
    from moedge.runtime.text.tokenizer import Tokenizer, open_tokenizer

    return given if isinstance(given, Tokenizer) else open_tokenizer(Path(given))


def _quiet(*_: object) -> None:
    """No progress."""
