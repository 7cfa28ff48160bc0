"""Quality of a conversion beside its controls: perplexity and KL to the dense parent on held-out text.

The protocol is that of :mod:`moedge.convert.scoring`; all variants run on the same windows. Rows are compared where
they read the same share of the FFN weights for a token (:mod:`moedge.convert.reads`), counted on these windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moedge.convert import forms, reads, scoring
from moedge.convert.methods import METHODS
from moedge.convert.methods.baselines import CEILINGS
from moedge.convert.plan import MoEPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

EVALUATION_SCHEMA = "moedge.evaluation/1"
READ_TOLERANCE = 0.02
"""Rows whose shares of the FFN weights read differ by no more than this count as equal. Controls have the active width
of the plan under test; what then differs is the router (0.4 % for CMoE's S6A6E16 on SmolLM2, 1.2 % for S8A40E64)."""


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
        dense_states: :func:`moedge.convert.scoring.last_hidden_states` of the dense model on these texts, if they are
            known already.
        protocol: JSON to print with the numbers, e.g. window, bos, documents; dtype and tokens are added.
        progress: called with (windows done, windows in all), over all variants and texts.

    Returns:
        ``moedge.evaluation/1``: schema, protocol, rows, verdict, and ``where``: who can run which rows faster.
    """
    variants = {label: [plan] if isinstance(plan, MoEPlan) else list(plan) for label, plan in plans.items()}
    every = [plan for group in variants.values() for plan in group]
    dense, others, shares = _states(dense_model, every, texts, batch_size, dense_states, progress)
    scores = {
        name: scoring.score_all(dense_model, ids[:, 1:], dense[name], [other[name] for other in others])
        for name, ids in texts.items()
    }
    dense_ppl = {name: _perplexity(nll[0]) for name, (nll, _) in scores.items()}
    rows = [_row("dense", "dense", 1.0, [dense_ppl], None, None)]
    rows[0] |= {"form": "dense", "ffn_read_share": 1.0, "ffn_read_shares": dict.fromkeys(texts, 1.0)}
    position = 0
    for label, group in variants.items():
        part = range(position, position := position + len(group))
        rows.append(_row_of(label, group, scores, part) | _reads(group, [shares[i] for i in part]))
    printed = {**protocol, "dtype": str(dense_model.dtype).removeprefix("torch.")}
    printed["tokens"] = {name: int(ids[:, 1:].size) for name, ids in texts.items()}
    return {
        "schema": EVALUATION_SCHEMA,
        "protocol": printed,
        "rows": rows,
        "verdict": verdict(rows),
        "where": forms.sentences(rows),
    }


def _states(
    dense_model: PreTrainedModel,
    plans: list[MoEPlan],
    texts: Mapping[str, np.ndarray],
    batch_size: int,
    dense_states: Mapping[str, torch.Tensor] | None,
    progress: Progress | None,
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]], list[dict[str, float]]]:
    """Return the last hidden states of the dense model and of each plan, and what each plan reads, by text.

    The states are small ([tokens, H] a variant); logits are not. All variants can therefore be scored together, chunk
    by chunk, and the dense logits exist once instead of once a variant.
    """
    total = ((dense_states is None) + len(plans)) * sum(map(len, texts.values()))
    done = 0

    def hidden_states(width: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        nonlocal done
        found: dict[str, torch.Tensor] = {}
        shares: dict[str, float] = {}
        for name, ids in texts.items():

            def step(windows: int, _: int, before: int = done) -> None:
                if progress:
                    progress(before + windows, total)

            with reads.counted(dense_model) as counts:
                found |= scoring.last_hidden_states(dense_model, {name: ids}, batch_size=batch_size, progress=step)
            shares[name] = counts.share(width)
            done += len(ids)
        return found, shares

    known = {name: states.to(dense_model.device) for name, states in (dense_states or {}).items()}
    dense = known or hidden_states(1)[0]
    others, read = [], []
    for plan in plans:
        with scoring.swapped(dense_model, plan):
            states, shares = hidden_states(int(plan.model["intermediate_size"]))
        others.append(states)
        read.append(shares)
    return dense, others, read


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Say whether the first method beats each control that reads as many weights (within :data:`READ_TOLERANCE`).

    It beats a control when its perplexity is lower on every text (for seeded controls, than the mean over seeds).

    Returns:
        ``{"router_beats": {control: bool}, "sentences": [...]}``.
    """
    methods = [row for row in rows if row["kind"] == "method"]
    controls = [row for row in rows if row["kind"] == "control" and row["label"] not in CEILINGS]
    if not methods:
        return {"router_beats": {}, "sentences": []}
    method = methods[0]
    beats, sentences, apart = {}, [], []
    for control in controls:
        if abs(control["ffn_read_share"] - method["ffn_read_share"]) > READ_TOLERANCE:
            apart.append(f"{control['label']} ({control['ffn_read_share']:.1%})")
            continue
        pairs = {name: (ppl, control["ppl"][name]) for name, ppl in method["ppl"].items()}
        lost = [f"{name} ({own:.2f} against {other:.2f})" for name, (own, other) in pairs.items() if not own < other]
        beats[control["label"]] = not lost
        if lost:
            sentences.append(f"{method['label']} loses to the control '{control['label']}' on {' and '.join(lost)}.")
    if beats and all(beats.values()):
        equal = f"that reads as many FFN weights for a token, within {READ_TOLERANCE:.0%} of the dense FFN's"
        sentences.append(f"{method['label']} beats every control {equal}: {', '.join(beats)}.")
    if apart:
        own = f"{method['label']} ({method['ffn_read_share']:.1%})"
        sentences.append(f"Not compared with {own}, as they read another share of the FFN weights: {', '.join(apart)}.")
    return {"router_beats": beats, "sentences": sentences}


def _row_of(
    label: str, group: list[MoEPlan], scores: dict[str, tuple[list[float], list[float]]], part: range
) -> dict[str, Any]:
    """Return the row of a variant; ``part`` says where its plans are in the scores, (NLL, dense first; KL) by text."""
    perplexities = [{name: _perplexity(nll[1 + i]) for name, (nll, _) in scores.items()} for i in part]
    divergences = [{name: kl[i] for name, (_, kl) in scores.items()} for i in part]
    seeds = [plan.params["seed"] for plan in group] if "seed" in group[0].params else None
    kind = "method" if group[0].method in METHODS else "control"
    width = float(np.mean([layer.active_width for layer in group[0].layers]))
    fraction = width / group[0].model["intermediate_size"]
    row = _row(label, kind, fraction, perplexities, divergences, seeds)
    if zero := float(np.mean([plan.zero_share for plan in group])):
        row["zero_weight_fraction"] = zero  # such a row runs every neuron; its zeros are not in the active width
    return row


def _reads(group: list[MoEPlan], shares: list[dict[str, float]]) -> dict[str, Any]:
    """Return what a variant's plans read, by text and in the mean over texts, and what kind of FFNs they have."""
    by_text = {name: float(np.mean([share[name] for share in shares])) for name in shares[0]}
    read = float(np.mean(list(by_text.values())))
    return {"form": forms.form(group[0]), "ffn_read_share": read, "ffn_read_shares": by_text}


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
