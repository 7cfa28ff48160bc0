"""What ``import moedge`` offers: each stage as one function.

The names in :data:`moedge.__all__` and the arguments here are what versions promise. Every function takes paths as text
or :class:`~pathlib.Path`, returns what it made, prints nothing, and raises :class:`moedge.MoEdgeError`, whose message
is one or two sentences, for whatever a user can mend. The commands of the same names take the same words.

A model is a Hugging Face folder, a ``.gguf`` file, a hub id ``org/name`` or ``asset:NAME``; a text is ``asset:NAME`` or
a ``.txt``, ``.utf8`` or ``.jsonl`` file. ``progress`` is called with (steps done, steps in all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.convert.plan import MoEPlan as MoEPlan
from moedge.runtime.engines import Engine
from moedge.runtime.engines import open_engine as open_engine

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
    text: PathLike = "asset:wiki",
    windows: int = 8,
    length: int = 2048,
    batch_size: int = 1,
    bos: bool = False,
    revision: str | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    **params: Any,
) -> MoEPlan:
    """Turn a dense model into a Mixture-of-Experts checkpoint, as ``moedge convert`` does.

    The checkpoint is a Hugging Face folder with the plan beside the weights. Equal inputs give equal files.

    Args:
        model: the dense model; it is read, not changed.
        out: folder for the checkpoint.
        method: a name that ``moedge methods`` lists.
        text: to calibrate on.
        windows: how many token windows are read, ``length``: tokens in a window, ``batch_size``: windows in a forward
            pass. ``bos``: start each with the BOS token.
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
    from moedge.configs.recipe import conversion_from
    from moedge.runtime.run.conversion import write_checkpoint

    where = "convert_model"
    recipe = conversion_from(
        {
            "name": "convert",
            "model": {"source": str(model), "revision": revision, "device": device},
            "text": {"calibration": str(text)},
            "calibration": {"windows": windows, "length": length, "batch_size": batch_size, "bos": bos},
            "convert": {"method": method, **params},
        },
        where=where,
        called=_argument,
    )
    write_checkpoint(
        recipe,
        Path(out),
        force=force,
        check=lambda config: recipe.check_model(config, where, called=_argument),
        progress=progress or _quiet,
        note=_quiet,
    )
    return MoEPlan.load(Path(out))


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
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write a checkpoint or a dense model as ONNX bundles, one folder a target; ``portable`` is always among them.

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
        force: replace bundles that are there.
        progress: in targets.

    Returns:
        Target -> folder.

    Raises:
        MoEdgeError: an unknown target, a model without a tokenizer or that cannot be traced, a bundle that is there
            already, or a lowering that fails its own test. Each bundle is whole or absent.
    """
    from moedge.export import targets as registry
    from moedge.export.pipeline import export
    from moedge.runtime.engines.given import local
    from moedge.runtime.run import held_out, run_folder

    wanted = list(targets or registry.default())
    registry.check_form(expert_form)
    asked: list[tuple[str, bool, Callable[[registry.Target], bool]]] = [
        (f"expert_form={expert_form!r}", bool(expert_form), lambda row: expert_form in row.expert_forms),
        (f"half={half!r}", bool(half), registry.has_dtypes),
        ("calibration", calibration is not None, lambda row: row.calibrated),
        ("zero_points", zero_points, lambda row: row.zero_points),
    ]
    for words, given, takes in asked:
        if given:
            registry.check_taken(words, takes, wanted)
    if tensorrt:
        _check_version(tensorrt)
    folder = local(Path(checkpoint))
    if not (folder / "config.json").is_file():
        raise MoEdgeError(f"{folder} is not a checkpoint folder: it has no config.json.")
    if max_length is not None:
        config = run_folder.read_json(folder / "config.json", "download or save the model again")
        held_out.check_positions(config.get("max_position_embeddings"), max_length, "max_length")
    name = str(checkpoint) if folder != Path(checkpoint) else folder.name or folder.resolve().name
    step = progress or _quiet
    return export(
        folder,
        Path(out),
        wanted,
        label=label or name,
        max_length=max_length,
        tensorrt=tensorrt,
        experts=expert_form,
        dtype=half,
        force=force,
        progress=lambda _, done, total: step(done, total),
        calibration=calibration,
        zero_points=zero_points,
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
    stop: Iterable[str] = (),
    on_text: Callable[[str], None] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> GenerationResult:
    """Continue a prompt or answer a chat; what the model's ``generation_config.json`` asks for is obeyed.

    Args:
        model: a bundle, engine or checkpoint, opened for this call; or what :func:`open_engine` returned, which is
            faster for many prompts and needs ``tokenizer``.
        prompt: text, or chat messages ``{"role", "content"}`` for the model's chat template.
        tokenizer: of the model: its folder, or what ``moedge.runtime.text.tokenizer.open_tokenizer`` returned.
        max_new_tokens: at most this many; fewer where the model's context ends.
        sample: draw tokens as the model's file says. Greedy by default, unless one of the next four is given.
        temperature: 0 is greedy. top_k: of so many likeliest tokens. top_p: of the smallest set with this probability.
            min_p: of the tokens with at least this share of the likeliest one's probability.
        seed: of the draws.
        stop: texts that end the answer, besides the model's own.
        on_text: called with each new piece of text.
        threads, device, dtype: of an engine that is opened here; the last two are for checkpoints, which PyTorch runs.

    Returns:
        ``text`` without the prompt, ``ids``, ``finish_reason`` (``eos``, ``stop`` or ``length``), ``ttft_s`` (seconds),
        ``decode_tokens_per_s``, ``settings`` and ``notes``: what the model's files ask for and was not done.

    Raises:
        MoEdgeError: the model cannot be opened, an impossible setting, an empty or too long prompt, or no chat
            template.
    """
    from moedge.runtime.engines.given import local
    from moedge.runtime.text import generate as text
    from moedge.runtime.text.tokenizer import Tokenizer, open_tokenizer

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sample": sample, "temperature": temperature}
    options |= {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "stop": stop, "on_text": on_text}
    if isinstance(model, str | Path):
        folder = local(Path(model))
        given = tokenizer if isinstance(tokenizer, Tokenizer) else open_tokenizer(Path(tokenizer or folder))
        pytorch = {"device": device, "dtype": dtype}
        engine = open_engine(folder, threads=threads, pytorch=pytorch, last_logits=True)
        try:
            return text.generate(engine, given, prompt, **options)
        finally:
            engine.close()
    if tokenizer is None:
        raise MoEdgeError("An open engine does not know its tokenizer; pass tokenizer, for example the model's folder.")
    given = tokenizer if isinstance(tokenizer, Tokenizer) else open_tokenizer(Path(tokenizer))
    return text.generate(model, given, prompt, **options)


def verify(
    reference: PathLike,
    test: PathLike | None = None,
    *,
    text: PathLike = "asset:wiki",
    tokens: int = 2048,
    window: int = 256,
    prefill: int = 224,
    tolerances: PathLike = "float32",
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two engines on real text: logits, distributions, best tokens, chosen experts.

    Args:
        reference: a checkpoint or bundle; or a run folder of ``moedge run``, all of whose pairs are compared.
        test: a bundle, engine or checkpoint; None for a run folder.
        text: to compare on.
        tokens: how many, in windows of ``window`` tokens; the first ``prefill`` of each are fed at once, the rest one
            by one.
        tolerances: YAML file of limits over the packaged ones; by default the packaged ones for float32 weights.
        threads: on the CPU. device: where PyTorch computes.
        progress: in tokens.

    Returns:
        JSON of schema ``moedge.verify/1``. ``outcome`` is ``passed``, ``failed`` or ``not decided``; ``parity`` holds
        one entry a comparison, with every check, its value and its limit in ``verdict.checks``.

    Raises:
        MoEdgeError: something named is not there or cannot be compared, or there is too little text. An engine that is
            wrong is an outcome, not an error.
    """
    from moedge.runtime.parity.given import verify_given

    return verify_given(
        Path(reference),
        None if test is None else Path(test),
        text=str(text),
        tokens=tokens,
        window=window,
        prefill=prefill,
        tolerances=tolerances,
        threads=threads,
        device=device,
        progress=progress,
    )


def bench(
    models: Sequence[PathLike] | Mapping[str, PathLike],
    *,
    text: PathLike = "asset:wiki",
    prompt: int = 512,
    decode: int = 64,
    repeats: int = 10,
    warmup: int = 1,
    memory: bool = True,
    threads: int | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time engines side by side at batch 1, greedy, in rounds whose order rotates.

    Args:
        models: bundles, engines and checkpoints, labelled by their paths or by the keys of a mapping.
        text: whose first ``prompt`` tokens are the prompt, by the first model's tokenizer.
        decode: tokens generated after the first one.
        repeats: rounds that count, ``warmup``: rounds before them that do not.
        memory: also measure peak memory and load time, each in a process of its own.
        threads: on the CPU. device, dtype: of checkpoints, which PyTorch runs.
        progress: in runs of an engine.

    Returns:
        JSON of schema ``moedge.bench/1``. ``rows`` hold, per model, ``ttft_ms`` (time to first token) and ``tpot_ms``
        (time per token), milliseconds with percentiles and a 95% interval, ``decode_tokens_per_s``, ``peak_rss_mib``
        and ``load_s``; ``ratios`` hold the speed-ups.

    Raises:
        MoEdgeError: no model or one that cannot be opened, too little text, or an engine that fails.
    """
    from moedge.runtime.bench import latency
    from moedge.runtime.engines.given import local
    from moedge.runtime.text.windows import token_windows

    named = models if isinstance(models, Mapping) else {str(path): path for path in models}
    if not named or len(named) < len(models):
        raise MoEdgeError("bench needs at least one model, and each one once.")
    folders = {label: local(Path(path)) for label, path in named.items()}
    name, windows = token_windows(next(iter(folders.values())), str(text), prompt, 1)
    opening: dict[str, Any] = {"threads": threads, "pytorch": {"device": device, "dtype": dtype}, "last_logits": True}
    result = latency.bench(
        {label: partial(open_engine, folder, **opening) for label, folder in folders.items()},
        windows[0],
        prompt=prompt,
        decode=decode,
        repeats=repeats,
        warmup=warmup,
        memory=memory,
        progress=progress,
    )
    return {**result, "text": name}


def evaluate(
    models: PathLike | Sequence[PathLike],
    texts: Sequence[PathLike] = ("asset:wiki",),
    *,
    tasks: Sequence[str] = (),
    task_data: Mapping[str, PathLike] | None = None,
    shots: int = 0,
    limit: int | None = None,
    tokens: int = 8192,
    window: int = 512,
    bos: bool = False,
    holdout_every: int = 10,
    batch_size: int = 4,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity on held-out text, and accuracy on lm-eval tasks (needs ``moedge[eval]``).

    Of a text that one of the models was calibrated or trained on, only documents that it has not seen are scored.

    Args:
        models: checkpoints, dense models or run folders; all are scored on the same documents.
        texts: to score.
        tasks: of lm-eval, ``task_data``: their local data, ``shots``: solved examples in front of a question,
            ``limit``: only so many questions.
        tokens: of each text, ``window``: tokens scored together, ``bos``: start each window with the BOS token.
        holdout_every: of a text that a model has seen, every so manyth document is taken.
        batch_size: windows or questions in a forward pass.
        device: where PyTorch computes.
        progress: in windows.

    Returns:
        JSON of schema ``moedge.scores/1``: ``rows`` with ``model``, ``perplexity`` by text (``ppl``; ``nll`` in nats a
        token; ``tokens``) and ``tasks``; ``protocol`` says what was measured.

    Raises:
        MoEdgeError: a model, text or task that cannot be had, or windows beyond what a model was made for.
    """
    from moedge.runtime.run.scores import scores

    return scores(
        [models] if isinstance(models, str | Path) else models,
        texts=[str(text) for text in texts],
        tasks=tasks,
        task_data={name: Path(path).expanduser() for name, path in (task_data or {}).items()},
        shots=shots,
        limit=limit,
        tokens=tokens,
        window=window,
        bos=bos,
        every=holdout_every,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )


def _argument(setting: str) -> str:
    """What :func:`convert_model` calls a recipe's key, or ``key: value``."""
    key, colon, value = setting.partition(": ")
    name = {"model.source": "model", "text.calibration": "text"}.get(key, key.split(".", 1)[-1])
    return f"{name}={value!r}" if colon else name


def _check_version(tensorrt: str) -> None:
    """Refuse what is no version of TensorRT."""
    from moedge.runtime.device.moedge_plugins import refusal
    from moedge.runtime.device.moedge_trt import DeviceError

    try:
        refusal(tensorrt)
    except DeviceError as error:
        raise MoEdgeError(str(error)) from None


def _quiet(*_: object) -> None:
    """No progress."""
