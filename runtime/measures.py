"""The public functions that measure: verify, bench, evaluate. :mod:`moedge.runtime.api` offers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.runtime.engines import open_engine

if TYPE_CHECKING:
    from moedge.convert.tasks import Questions

PathLike = str | Path
Dtype = Literal["float32", "bfloat16", "float16"]


def verify(
    reference: PathLike,
    test: PathLike | None = None,
    *,
    text: PathLike = "asset:wiki",
    tokens: int = 2048,
    window: int = 256,
    prefill: int = 224,
    tolerances: PathLike = "float32",
    tasks: str | Sequence[str] = (),
    task_data: Mapping[str, PathLike] | None = None,
    shots: int = 0,
    limit: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    thorough: bool = False,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two engines on real text: logits, distributions, best tokens, chosen experts.

    Args:
        reference: a checkpoint or bundle; or a run folder of ``moedge run``, all of whose pairs are compared.
        test: a bundle, engine or checkpoint; None for a run folder.
        text: to compare on.
        tokens: how many, in windows of ``window`` tokens; the first ``prefill`` of each are fed at once, the rest one
            by one. With 0 only answers to ``tasks`` are compared.
        tolerances: YAML file of limits over the packaged ones; by default the packaged ones for float32 weights.
        tasks: of lm-eval (needs ``moedge[eval]``), whose questions the test must answer as the reference does;
            ``task_data``, ``shots``, ``limit``: as for :func:`evaluate`.
        threads: on the CPU. device: where PyTorch computes.
        thorough: also larger batches, longer rows and a text of ``max_length`` tokens in the checks of other shapes.
        max_length: tokens of that text, also without ``thorough``; 2,048 by default.
        progress: in tokens, then in answers.

    Returns:
        JSON of schema ``moedge.verify/1``. ``outcome`` is ``passed``, ``failed`` or ``not decided``; ``parity`` holds
        one entry a comparison, with every check, its value and its limit in ``verdict.checks``; ``shapes`` one entry an
        engine, read in batches, in pieces and twice; ``accuracy`` one a comparison of answers, where tasks were asked.

    Raises:
        MoEdgeError: something named is not there or cannot be compared, or there is too little text. An engine that is
            wrong is an outcome, not an error.
    """
    from moedge.runtime.parity.accuracy import Gate
    from moedge.runtime.parity.given import verify_given
    from moedge.runtime.parity.sample import Sample

    one, two = Path(reference), None if test is None else Path(test)
    gate = Gate.of(one, two, _questions(tasks, task_data, shots, limit), tolerances)
    if not tokens and gate is None:
        raise MoEdgeError("There is nothing to compare: no tokens of text, and no tasks.")
    found = None
    if tokens:
        found = verify_given(
            one,
            two,
            sample=Sample(str(text), tokens, window, prefill),
            tolerances=tolerances,
            threads=threads,
            device=device,
            thorough=thorough,
            max_length=max_length,
            progress=progress,
        )
    if gate is not None:
        found = gate.added(found, threads=threads, device=device, progress=progress)
    return dict(found or {})


def bench(
    models: Sequence[PathLike] | Mapping[str, PathLike],
    *,
    text: PathLike = "asset:wiki",
    prompt: int | Sequence[int] = 512,
    decode: int | Sequence[int] = 64,
    batch: int | Sequence[int] = 1,
    depth: int | Sequence[int] = 0,
    threads: int | Sequence[int] | None = None,
    repeats: int = 10,
    warmup: int = 1,
    min_duration: float = 0.0,
    memory: bool = True,
    device: str = "cpu",
    dtype: Dtype = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time engines side by side, greedy, in rounds whose order rotates; a list of numbers makes a sweep.

    Args:
        models: bundles, engines and checkpoints, labelled by their paths or by the keys of a mapping.
        text: whose first tokens are the prompt, by the first model's tokenizer.
        prompt: its tokens. decode: tokens generated after the first one. batch: rows that are read and decoded
            together. depth: tokens in the cache before the prompt is read. threads: on the CPU.
        repeats: rounds of a point that count, ``warmup``: rounds before them that do not, ``min_duration``: seconds
            that they take; all at least.
        memory: also measure peak memory and load time at the first point, each in a process of its own.
        device, dtype: of checkpoints, which PyTorch runs.
        progress: in runs of an engine.

    Returns:
        JSON of schema ``moedge.bench/2`` (runtime/bench/bench.schema.json). ``engines`` hold, per model,
        ``peak_rss_mib`` and ``load_s``; each of ``points`` has ``rows`` with ``label``, ``ttft_ms`` (time to first
        token) and ``tpot_ms`` (time per token), milliseconds with percentiles and 95% intervals, and
        ``decode_tokens_per_s``; its ``ratios`` hold the speed-ups.

    Raises:
        MoEdgeError: no model or one that cannot be opened, too little text, or an engine that fails.
    """
    from moedge.runtime.bench import latency
    from moedge.runtime.bench.points import grid, tokens_of
    from moedge.runtime.engines.given import local
    from moedge.runtime.text.windows import token_windows

    named = models if isinstance(models, Mapping) else {str(path): path for path in models}
    if not named or len(named) < len(models):
        raise MoEdgeError("bench needs at least one model, and each one once.")
    counts = [None] if threads is None else _several(threads)
    points = grid(_several(prompt), _several(decode), _several(batch), _several(depth), counts)
    folders = {label: local(Path(path)) for label, path in named.items()}
    name, windows = token_windows(next(iter(folders.values())), str(text), tokens_of(points), 1)
    opening: dict[str, Any] = {"pytorch": {"device": device, "dtype": dtype}, "last_logits": True}
    result = latency.bench(
        {label: partial(open_engine, folder, **opening) for label, folder in folders.items()},
        windows[0],
        points,
        repeats=repeats,
        warmup=warmup,
        min_duration=min_duration,
        memory=memory,
        progress=progress,
    )
    return {**result, "text": name}


def _several(given: int | Sequence[int]) -> Sequence[int]:
    return [given] if isinstance(given, int) else given


def evaluate(
    models: PathLike | Sequence[PathLike],
    texts: PathLike | Sequence[PathLike] = ("asset:wiki",),
    *,
    tasks: str | Sequence[str] = (),
    task_data: Mapping[str, PathLike] | None = None,
    shots: int = 0,
    limit: int | None = None,
    tokens: int = 8192,
    window: int = 512,
    bos: bool | None = None,
    holdout_every: int = 10,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity on held-out text, and accuracy on lm-eval tasks (needs ``moedge[eval]``).

    Of a text that one of the models was calibrated or trained on, only documents that it has not seen are scored.

    Args:
        models: checkpoints, dense models, bundles, engines or run folders (their dense parent and checkpoint); all are
            scored on the same documents.
        texts: to score.
        tasks: of lm-eval, ``task_data``: their local data, ``shots``: solved examples in front of a question,
            ``limit``: only so many questions.
        tokens: of each text, ``window``: tokens scored together, ``bos``: start each window with the BOS token; None:
            as each model's tokenizer does.
        holdout_every: of a text that a model has seen, every so manyth document is taken.
        batch_size: windows or questions in a forward pass.
        threads: on the CPU. device: where PyTorch computes.
        progress: in windows, then in answers.

    Returns:
        JSON of schema ``moedge.scores/1``: ``rows`` with ``model``, ``engine`` (what it was measured on),
        ``perplexity`` by text (``ppl``; ``nll`` in nats a token; ``tokens``; ``ffn_read_share``, see
        :mod:`moedge.convert.reads`) and ``tasks``; ``paired`` sets the answers of each model beside the first one's,
        and a bundle's beside the checkpoint's before it: agreement, accuracy of both, the drop and its interval;
        ``protocol`` says what was measured.

    Raises:
        MoEdgeError: a model, text or task that cannot be had, or windows beyond what a model was made for.
    """
    from moedge.runtime.run.scores import Evaluation, scores

    evaluation = Evaluation(
        texts=[str(text) for text in ([texts] if isinstance(texts, str | Path) else texts)],
        questions=_questions(tasks, task_data, shots, limit),
        tokens=tokens,
        window=window,
        bos=bos,
        holdout_every=holdout_every,
        batch_size=batch_size,
        device=device,
        threads=threads,
    )
    return scores([models] if isinstance(models, str | Path) else models, evaluation, progress=progress)


def _questions(
    tasks: str | Sequence[str], task_data: Mapping[str, PathLike] | None, shots: int, limit: int | None
) -> Questions:
    from moedge.convert.tasks import Questions

    data = {name: Path(path).expanduser() for name, path in (task_data or {}).items()}
    return Questions((tasks,) if isinstance(tasks, str) else tuple(tasks), data, shots, limit)
