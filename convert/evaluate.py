"""Quality of a conversion beside its controls: perplexity and KL to the dense parent on held-out text.

Protocol: fixed windows of ids, each scored on its own; the negative log-likelihood is averaged over every id but the
first of a window (the BOS token when the protocol has one). All variants run on the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from moedge.convert import adapters, modeling
from moedge.convert.methods import METHODS
from moedge.convert.plan import MoEPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]

EVALUATION_SCHEMA = "moedge.evaluation/1"
_CHUNK = 256
"""Positions whose logits [256, V] exist at a time."""
_BOUNDS = ("oracle router",)
"""Rows that no router can be asked to beat: they compute every expert."""


def perplexity(
    model: PreTrainedModel, token_windows: np.ndarray, *, batch_size: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Return ``{"ppl", "nll", "tokens"}`` of a model on windows int64 [N, L]; ``nll`` in nats a token.

    Args:
        batch_size: windows in one forward pass.
        progress: called with (windows done, windows in all).
    """
    nll, tokens = 0.0, 0
    for start, hidden in _hidden_states(model, token_windows, batch_size):
        targets = torch.from_numpy(token_windows[start : start + len(hidden), 1:])
        nll += _score(model, hidden, targets, None)[0]
        tokens += targets.numel()
        if progress:
            progress(start + len(hidden), len(token_windows))
    return {"ppl": math.exp(nll / tokens), "nll": nll / tokens, "tokens": tokens}


def evaluate(
    dense_model: PreTrainedModel,
    plans: Mapping[str, MoEPlan | Sequence[MoEPlan]],
    texts: Mapping[str, np.ndarray],
    protocol: Mapping[str, Any],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the dense parent, a conversion and its controls.

    The plans are applied one after the other to the one dense model, whose FFNs are put back each time; the dense
    model's last hidden states, not its logits, are kept for the KL.

    Args:
        plans: label -> plan, or several plans of one control (one a seed), reported as mean and standard deviation.
            A plan of a method in ``METHODS`` is a row of kind ``method``, any other one a ``control``.
        texts: name -> windows int64 [N, L].
        protocol: JSON to print with the numbers, e.g. window, bos, documents; dtype and tokens are added.
        progress: called with (windows done, windows in all), over all variants and texts.

    Returns:
        ``moedge.evaluation/1``: schema, protocol, rows and verdict.
    """
    variants = {label: [plan] if isinstance(plan, MoEPlan) else list(plan) for label, plan in plans.items()}
    total = (1 + sum(map(len, variants.values()))) * sum(map(len, texts.values()))
    done = 0

    def tick(windows: int) -> None:
        nonlocal done
        done += windows
        if progress:
            progress(done, total)

    kept: dict[str, torch.Tensor] = {}
    dense_ppl: dict[str, float] = {}
    for name, ids in texts.items():
        parts, nll = [], 0.0
        for start, hidden in _hidden_states(dense_model, ids, batch_size):
            parts.append(hidden)
            nll += _score(dense_model, hidden, torch.from_numpy(ids[start : start + len(hidden), 1:]), None)[0]
            tick(len(hidden))
        kept[name] = torch.cat(parts)
        dense_ppl[name] = math.exp(nll / ids[:, 1:].size)
    rows = [_row("dense", "dense", 1.0, [dense_ppl], None, None)]
    for label, group in variants.items():
        perplexities, divergences = [], []
        for plan in group:
            with swapped(dense_model, plan):
                results = {
                    name: _compare(dense_model, ids, kept[name], batch_size, tick) for name, ids in texts.items()
                }
            perplexities.append({name: ppl for name, (ppl, _) in results.items()})
            divergences.append({name: kl for name, (_, kl) in results.items()})
        seeds = [plan.params["seed"] for plan in group] if "seed" in group[0].params else None
        kind = "method" if group[0].method in METHODS else "control"
        width = float(np.mean([layer.active_width for layer in group[0].layers]))
        fraction = width / group[0].model["intermediate_size"]
        rows.append(_row(label, kind, fraction, perplexities, divergences, seeds))
    printed = {**protocol, "dtype": str(dense_model.dtype).removeprefix("torch.")}
    printed["tokens"] = {name: int(ids[:, 1:].size) for name, ids in texts.items()}
    return {"schema": EVALUATION_SCHEMA, "protocol": printed, "rows": rows, "verdict": verdict(rows)}


@contextmanager
def swapped(model: PreTrainedModel, plan: MoEPlan) -> Iterator[PreTrainedModel]:
    """Run a block with the plan's FFNs in the dense model; its own FFNs come back afterwards."""
    modeling.check_fits(plan, model)
    blocks = adapters.ffns(model)
    try:
        for block, layer in zip(blocks, plan.layers, strict=True):
            model.set_submodule(block.name, modeling.build_ffn(block, layer))
        yield model
    finally:
        for block in blocks:
            model.set_submodule(block.name, block.module)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Say whether the first method's router beats each control of equal active width.

    It beats a control when its perplexity is lower on every text (for seeded controls, than the mean over seeds).

    Returns:
        ``{"router_beats": {control: bool}, "sentences": [...]}``.
    """
    methods = [row for row in rows if row["kind"] == "method"]
    controls = [row for row in rows if row["kind"] == "control" and row["label"] not in _BOUNDS]
    if not methods:
        return {"router_beats": {}, "sentences": []}
    method = methods[0]
    beats, sentences = {}, []
    for control in controls:
        pairs = {name: (ppl, control["ppl"][name]) for name, ppl in method["ppl"].items()}
        lost = [f"{name} ({own:.2f} against {other:.2f})" for name, (own, other) in pairs.items() if not own < other]
        beats[control["label"]] = not lost
        if lost:
            sentences.append(f"{method['label']} loses to the control '{control['label']}' on {' and '.join(lost)}.")
    if controls and all(beats.values()):
        sentences.append(f"{method['label']} beats every control of equal active width: {', '.join(beats)}.")
    return {"router_beats": beats, "sentences": sentences}


def _row(
    label: str,
    kind: str,
    fraction: float,
    perplexities: list[dict[str, float]],
    divergences: list[dict[str, float]] | None,
    seeds: list[int] | None,
) -> dict[str, Any]:
    def over_seeds(values: list[dict[str, float]], statistic: Callable[..., Any]) -> dict[str, float]:
        return {name: float(statistic([value[name] for value in values])) for name in values[0]}

    several = seeds is not None and len(seeds) > 1
    return {
        "label": label,
        "kind": kind,
        "active_width_fraction": fraction,
        "ppl": over_seeds(perplexities, np.mean),
        "ppl_std": over_seeds(perplexities, lambda values: np.std(values, ddof=1)) if several else None,
        "kl_to_dense": over_seeds(divergences, np.mean) if divergences else None,
        "seeds": seeds,
    }


def _compare(
    model: PreTrainedModel, ids: np.ndarray, dense: torch.Tensor, batch_size: int, tick: Callable[[int], None]
) -> tuple[float, float]:
    """Return (perplexity, mean KL(dense || this) in nats a token)."""
    nll = kl = 0.0
    for start, hidden in _hidden_states(model, ids, batch_size):
        targets = torch.from_numpy(ids[start : start + len(hidden), 1:])
        added = _score(model, hidden, targets, dense[start : start + len(hidden)])
        nll, kl = nll + added[0], kl + added[1]
        tick(len(hidden))
    tokens = ids[:, 1:].size
    # A broken control can overflow exp; the report needs a finite number.
    return math.exp(min(nll / tokens, 700.0)), kl / tokens


def _hidden_states(model: PreTrainedModel, ids: np.ndarray, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first window, last hidden states [b, L-1, H] of every position that predicts the next id)."""
    for start in range(0, len(ids), batch_size):
        with torch.inference_mode():
            batch = torch.from_numpy(ids[start : start + batch_size]).to(model.device)
            hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        yield start, hidden


@torch.inference_mode()
def _score(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, dense: torch.Tensor | None
) -> tuple[float, float]:
    """Return (sum of NLL, sum of KL(dense || this)) over all positions, logits made chunk by chunk."""
    head = model.get_output_embeddings()
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(hidden.device)
    reference = None if dense is None else dense.reshape(-1, dense.shape[-1])
    nll = kl = 0.0
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        logp = F.log_softmax(head(flat[part]).float(), dim=-1)
        nll += float(F.nll_loss(logp, wanted[part], reduction="sum"))
        if reference is not None:
            target = F.log_softmax(head(reference[part]).float(), dim=-1)
            kl += float(F.kl_div(logp, target, reduction="sum", log_target=True))
    return nll, kl
