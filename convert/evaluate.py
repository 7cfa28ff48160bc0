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

from moedge.convert import adapters, modeling
from moedge.convert.methods import METHODS
from moedge.convert.methods.baselines import CEILINGS
from moedge.convert.plan import MoEPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]

EVALUATION_SCHEMA = "moedge.evaluation/1"
_CHUNK = 256
"""Positions whose logits [256, V] exist at a time."""


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
        nll += _score_all(model, targets.numpy(), hidden, [])[0][0] * targets.numel()
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
    dense_states: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare the dense parent, a conversion and its controls.

    The plans are applied one after the other to the one dense model, whose FFNs are put back each time; the dense
    model's last hidden states, not its logits, are kept for the KL.

    Args:
        plans: label -> plan, or several plans of one control (one a seed), reported as mean and standard deviation.
            A plan of a method in ``METHODS`` is a row of kind ``method``, any other one a ``control``.
        texts: name -> windows int64 [N, L].
        dense_states: :func:`last_hidden_states` of the dense model on these texts, if they are known already.
        protocol: JSON to print with the numbers, e.g. window, bos, documents; dtype and tokens are added.
        progress: called with (windows done, windows in all), over all variants and texts.

    Returns:
        ``moedge.evaluation/1``: schema, protocol, rows and verdict.
    """
    variants = {label: [plan] if isinstance(plan, MoEPlan) else list(plan) for label, plan in plans.items()}
    runs = (dense_states is None) + sum(map(len, variants.values()))
    each = sum(map(len, texts.values()))
    done = 0

    def hidden_states() -> dict[str, torch.Tensor]:
        nonlocal done
        before = done

        def step(windows: int, _: int) -> None:
            nonlocal done
            done = before + windows
            if progress:
                progress(done, runs * each)

        return last_hidden_states(dense_model, texts, batch_size=batch_size, progress=step)

    # Last hidden states are small ([tokens, H] a variant); logits are not. All variants are therefore scored together,
    # chunk by chunk, and the dense logits exist once instead of once a variant.
    known = {name: states.to(dense_model.device) for name, states in (dense_states or {}).items()}
    dense = known or hidden_states()
    others: list[dict[str, torch.Tensor]] = []
    for group in variants.values():
        for plan in group:
            with swapped(dense_model, plan):
                others.append(hidden_states())
    scores = {
        name: _score_all(dense_model, ids[:, 1:], dense[name], [other[name] for other in others])
        for name, ids in texts.items()
    }
    dense_ppl = {name: _perplexity(nll[0]) for name, (nll, _) in scores.items()}
    rows = [_row("dense", "dense", 1.0, [dense_ppl], None, None)]
    position = 0
    for label, group in variants.items():
        part = range(position, position := position + len(group))
        perplexities = [{name: _perplexity(nll[1 + i]) for name, (nll, _) in scores.items()} for i in part]
        divergences = [{name: kl[i] for name, (_, kl) in scores.items()} for i in part]
        seeds = [plan.params["seed"] for plan in group] if "seed" in group[0].params else None
        kind = "method" if group[0].method in METHODS else "control"
        width = float(np.mean([layer.active_width for layer in group[0].layers]))
        fraction = width / group[0].model["intermediate_size"]
        row = _row(label, kind, fraction, perplexities, divergences, seeds)
        if zero := float(np.mean([plan.zero_share for plan in group])):
            row["zero_weight_fraction"] = zero  # such a row runs every neuron; its zeros are not in the active width
        rows.append(row)
    printed = {**protocol, "dtype": str(dense_model.dtype).removeprefix("torch.")}
    printed["tokens"] = {name: int(ids[:, 1:].size) for name, ids in texts.items()}
    return {"schema": EVALUATION_SCHEMA, "protocol": printed, "rows": rows, "verdict": verdict(rows)}


def last_hidden_states(
    model: PreTrainedModel,
    texts: Mapping[str, np.ndarray],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Return the last hidden states of every position that predicts a next id, [N, L-1, H] per text.

    Args:
        texts: name -> windows int64 [N, L].
        progress: called with (windows done, windows in all).
    """
    found, done, total = {}, 0, sum(map(len, texts.values()))
    for name, ids in texts.items():
        parts = []
        for _, hidden in _hidden_states(model, ids, batch_size):
            parts.append(hidden)
            done += len(hidden)
            if progress:
                progress(done, total)
        found[name] = torch.cat(parts)
    return found


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
    controls = [row for row in rows if row["kind"] == "control" and row["label"] not in CEILINGS]
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


def _perplexity(nll: float) -> float:
    """exp of a mean NLL, finite for the report even where a broken control overflows it."""
    return math.exp(min(nll, 700.0))


def _hidden_states(model: PreTrainedModel, ids: np.ndarray, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first window, last hidden states [b, L-1, H] of every position that predicts the next id)."""
    adapters.check_ids(model, ids)
    for start in range(0, len(ids), batch_size):
        with torch.inference_mode():
            batch = torch.from_numpy(ids[start : start + batch_size]).to(model.device)
            hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        yield start, hidden


@torch.inference_mode()
def _score_all(
    model: PreTrainedModel, targets: np.ndarray, dense: torch.Tensor, others: list[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Return the mean NLL of dense and every other variant, and the mean KL(dense || variant), nats a token.

    With logits z and v of dense and variant, ``KL = sum_i p_i (z_i - v_i) - lse(z) + lse(v)``, ``p = exp(z - lse(z))``:
    one product over the vocabulary per variant.

    Args:
        targets: int64 [N, L-1]. dense: last hidden states [N, L-1, H]; others: the same of each variant.
    """
    head = model.get_output_embeddings()
    flat = [states.reshape(-1, states.shape[-1]) for states in (dense, *others)]
    wanted = torch.from_numpy(np.ascontiguousarray(targets)).reshape(-1, 1).to(dense.device)
    nll, kl = np.zeros(len(flat)), np.zeros(len(others))
    for start in range(0, len(wanted), _CHUNK):
        part = slice(start, start + _CHUNK)
        for i, states in enumerate(flat):
            logits = head(states[part]).float()
            lse = logits.logsumexp(dim=-1, keepdim=True)
            nll[i] += float((lse - logits.gather(-1, wanted[part])).sum(dtype=torch.float64))
            if i == 0:
                p = (logits - lse).exp_()
                negative_entropy = _dot(p, logits) - lse
            else:
                kl[i - 1] += float((negative_entropy - _dot(p, logits) + lse).sum(dtype=torch.float64))
    return (nll / len(wanted)).tolist(), (kl / len(wanted)).tolist()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise dot product of [T, V] and [T, V] without a [T, V] intermediate."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)
