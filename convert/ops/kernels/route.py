"""Route: the k best experts of each token and their weights.

One program a token. An expert's place in the order is the number of experts that beat it, so there is no sort, no
loop over k and no dependence on the order of execution: all E places are computed at once and each selected expert
writes its own slot.

Bytes: 4*T*E read, 8*T*k written. Operations: T*E*E comparisons. Latency-bound at every size that occurs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moedge.convert.ops.kernels.launch import Extent, Launch, fixed, power_of_two

MOST_EXPERTS = 512
RULES = ("unit", "scaled", "softmax", "probability", "normalised")


@triton.jit
def _selection_key(scores_ptr, bias_ptr, e, EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr):
    key = tl.load(scores_ptr + e, mask=e < EXPERTS, other=float("-inf"))
    if HAS_BIAS:
        key += tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0)
    # NaN counts as the largest value, as in torch.sort; without this its place would be undefined.
    return tl.where(key != key, float("inf"), key)


@triton.jit
def _route(
    scores_ptr,
    bias_ptr,
    scale_ptr,
    indices_ptr,
    weights_ptr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RULE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    scores_ptr += token * EXPERTS
    e = tl.arange(0, BLOCK_E)
    key = _selection_key(scores_ptr, bias_ptr, e, EXPERTS, HAS_BIAS)
    place = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, EXPERTS, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = _selection_key(scores_ptr, bias_ptr, j, EXPERTS, HAS_BIAS)
        ahead = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < e[:, None]))
        place += tl.sum((ahead & (j < EXPERTS)[None, :]).to(tl.int32), 1)
    chosen = (place < TOP_K) & (e < EXPERTS)

    weight = tl.full([BLOCK_E], 1.0, tl.float32)
    if RULE == "normalised":
        score = tl.load(scores_ptr + e, mask=chosen, other=0.0)
        weight = score / tl.sum(score, 0)
    elif RULE != "unit":
        score = tl.load(scores_ptr + e, mask=e < EXPERTS, other=float("-inf"))
        if RULE == "softmax":
            score = tl.where(chosen, score, float("-inf"))
        power = tl.exp(score - tl.max(score, 0))
        weight = power / tl.sum(power, 0)
        if RULE == "scaled":
            weight = 1.0 + weight * tl.load(scale_ptr + e, mask=e < EXPERTS, other=0.0)
    slot = token * TOP_K + place
    tl.store(indices_ptr + slot, e, mask=chosen)
    tl.store(weights_ptr + slot, weight, mask=chosen)


@triton.jit
def route(
    scores_ptr, bias_ptr, indices_ptr, weights_ptr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RULE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Scores float32 [T, E], bias float32 [E] -> indices int32 [T, k], weights float32 [T, k]."""
    _route(scores_ptr, bias_ptr, scores_ptr, indices_ptr, weights_ptr, EXPERTS, TOP_K, RULE, HAS_BIAS, BLOCK_E, BLOCK_J)


@triton.jit
def route_scaled(
    scores_ptr, bias_ptr, scale_ptr, indices_ptr, weights_ptr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RULE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The same with scale float32 [E] for the rule ``scaled``."""
    _route(scores_ptr, bias_ptr, scale_ptr, indices_ptr, weights_ptr, EXPERTS, TOP_K, RULE, HAS_BIAS, BLOCK_E, BLOCK_J)


def launch(*, experts: int, top_k: int, rule: str, bias: bool = True) -> Launch:
    """Return the launch for T = n tokens.

    Args:
        experts: E, at most :data:`MOST_EXPERTS`.
        top_k: k, 1..E.
        rule: a name in :data:`RULES`.
        bias: whether there is a selection bias; without one any float32 pointer may be passed for it.
    """
    if not 1 <= top_k <= experts <= MOST_EXPERTS:
        raise ValueError(f"top_k {top_k} of {experts} experts: need 1 <= k <= E <= {MOST_EXPERTS}")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    scaled = rule == "scaled"
    block = power_of_two(experts)
    inputs = {"scores_ptr": "fp32", "bias_ptr": "fp32"} | ({"scale_ptr": "fp32"} if scaled else {})
    return Launch(
        kernel="route.route_scaled" if scaled else "route.route",
        inputs=inputs,
        outputs={"indices_ptr": "i32", "weights_ptr": "fp32"},
        constants={
            "EXPERTS": experts,
            "TOP_K": top_k,
            "RULE": rule,
            "HAS_BIAS": bias,
            "BLOCK_E": block,
            # At most 8,192 comparisons at once: 64 a thread.
            "BLOCK_J": min(block, max(16, 8192 // block)),
        },
        grid=(Extent(1, 0, 1), fixed(1)),
        warps=1 if experts <= 64 else 4,
    )


def cost(*, tokens: int, experts: int, top_k: int) -> tuple[int, int]:
    """Return (bytes moved, operations) of one call."""
    return 4 * (tokens * experts + 2 * experts) + 8 * tokens * top_k, tokens * experts * experts
