"""Quality of a conversion beside its controls: perplexity and KL to the dense parent on held-out text.

The protocol is that of :mod:`moedge.convert.scoring`; all variants run on the same windows. Rows are compared where
they read the same share of the FFN weights for a token (:mod:`moedge.convert.reads`), counted on these windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from moedge.convert import forms, modeling, prompted, reads, scoring
from moedge.convert.methods import METHODS
from moedge.convert.methods.baselines import CEILINGS
from moedge.convert.plan import MoEPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress

_Means = tuple[list[float], list[float]]
"""(Mean NLL, dense first; mean KL), of all variants."""
_Scores = dict[str, _Means]
"""By text."""
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
        ``second_half`` has the same rows over the second half of every window, and those of plans whose neurons the
        first half chooses (:mod:`moedge.convert.prompted`), which stand there alone.
    """
    variants = {label: [plan] if isinstance(plan, MoEPlan) else list(plan) for label, plan in plans.items()}
    every = [plan for group in variants.values() for plan in group]
    dense, others, shares = _states(dense_model, every, texts, batch_size, dense_states, progress)
    scores: _Scores = {}
    behind: _Scores = {}
    for name, ids in texts.items():
        scores[name], behind[name] = _score(dense_model, ids, dense[name], [other[name] for other in others])
    rows = [row for row in _rows(variants, scores, shares) if row["form"] != "prompted"]
    second = _rows(variants, behind, shares)
    printed = {**protocol, "dtype": str(dense_model.dtype).removeprefix("torch.")}
    printed["tokens"] = {name: int(ids[:, 1:].size) for name, ids in texts.items()}
    tokens = {name: len(ids) * (ids.shape[1] - 1 - prompted.prompt_length(ids.shape[1])) for name, ids in texts.items()}
    return {
        "schema": EVALUATION_SCHEMA,
        "protocol": printed,
        "rows": rows,
        "second_half": {"tokens": tokens, "rows": second},
        "verdict": verdict(rows, second),
        "where": forms.sentences([*rows, *(row for row in second if row["form"] == "prompted")]),
    }


def _score(
    model: PreTrainedModel, ids: np.ndarray, dense: torch.Tensor, others: list[torch.Tensor]
) -> tuple[_Means, _Means]:
    """Return (NLL, dense first; KL) over windows [N, L], and the same of what stands behind their first halves."""
    prompt = prompted.prompt_length(ids.shape[1])
    found, counts = [], []
    for part in (slice(0, prompt), slice(prompt, None)):
        targets = ids[:, 1:][:, part]
        if targets.size:
            found.append(scoring.score_all(model, targets, dense[:, part], [states[:, part] for states in others]))
            counts.append(targets.size)
    nll, kl = (np.average(np.array(values), axis=0, weights=counts) for values in zip(*found, strict=True))
    return (nll.tolist(), kl.tolist()), found[-1]


def _rows(
    variants: Mapping[str, list[MoEPlan]], scores: _Scores, shares: list[dict[str, float]]
) -> list[dict[str, Any]]:
    """Return the dense parent's row and those of the variants."""
    dense_ppl = {name: _perplexity(nll[0]) for name, (nll, _) in scores.items()}
    rows = [_row("dense", "dense", 1.0, [dense_ppl], None, None)]
    rows[0] |= {"form": "dense", "ffn_read_share": 1.0, "ffn_read_shares": dict.fromkeys(scores, 1.0)}
    position = 0
    for label, group in variants.items():
        part = range(position, position := position + len(group))
        rows.append(_row_of(label, group, scores, part) | _reads(group, [shares[i] for i in part]))
    return rows


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
        width = int(plan.model["intermediate_size"])
        if forms.form(plan) == "prompted":
            modeling.check_fits(plan, dense_model)
            with prompted.in_place(dense_model, plan.layers):
                states, _ = hidden_states(width)
            shares = dict.fromkeys(texts, cast("float", reads.of_plan(plan)))  # of the tokens behind the prompts
        else:
            with scoring.swapped(dense_model, plan):
                states, shares = hidden_states(width)
        others.append(states)
        read.append(shares)
    return dense, others, read


def verdict(rows: list[dict[str, Any]], second: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Say whether the first method beats each control that reads as many weights (within :data:`READ_TOLERANCE`).

    It beats a control when its perplexity is lower on every text (for seeded controls, than the mean over seeds).
    Controls that are chosen by a window's first half are compared by ``second``, the rows of the second halves.

    Returns:
        ``{"router_beats": {control: bool}, "sentences": [...]}``.
    """
    methods = [row for row in rows if row["kind"] == "method"]
    controls = [row for row in rows if row["kind"] == "control" and row["label"] not in CEILINGS]
    if not methods:
        return {"router_beats": {}, "sentences": []}
    method = methods[0]
    beats, sentences, apart = {}, [], []
    behind = next((row for row in second if row["label"] == method["label"]), method)
    pairs = [(method, control) for control in controls]
    for own_row, control in [*pairs, *((behind, row) for row in second if row["form"] == "prompted")]:
        if abs(control["ffn_read_share"] - method["ffn_read_share"]) > READ_TOLERANCE:
            apart.append(f"{control['label']} ({control['ffn_read_share']:.1%})")
            continue
        ppl = {name: (value, control["ppl"][name]) for name, value in own_row["ppl"].items()}
        lost = [f"{name} ({own:.2f} against {other:.2f})" for name, (own, other) in ppl.items() if not own < other]
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


def _row_of(label: str, group: list[MoEPlan], scores: _Scores, part: range) -> dict[str, Any]:
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
