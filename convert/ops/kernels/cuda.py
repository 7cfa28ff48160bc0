"""Run the kernels on tensors: the CUDA implementation of the operators in ``convert/ops``.

Signatures and results are the operators'. Tensors may live on a CUDA device or, with ``TRITON_INTERPRET=1``, on the
CPU. Routing and accumulation are float32; the weights of the experts stay in their own type.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch

from moedge.convert.ops.gather import kept
from moedge.convert.ops.kernels import combine as _combine
from moedge.convert.ops.kernels import dispatch as _dispatch
from moedge.convert.ops.kernels import gathered as _gathered
from moedge.convert.ops.kernels import gathered_glu as _gathered_glu
from moedge.convert.ops.kernels import gathered_linear as _gathered_linear
from moedge.convert.ops.kernels import grouped_glu as _glu
from moedge.convert.ops.kernels import grouped_linear as _linear
from moedge.convert.ops.kernels import route as _route
from moedge.convert.ops.kernels.grouped import path_for
from moedge.convert.ops.kernels.launch import DTYPES, Launch


def kernel_of(launch: Launch) -> Any:
    """Return the Triton function of a launch."""
    module, function = launch.kernel.split(".")
    return getattr(import_module(f"moedge.convert.ops.kernels.{module}"), function)


def run(launch: Launch, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], n: int) -> None:
    """Launch on tensors, all contiguous, in the order of the launch; ``n`` is its dynamic size. Nothing for n = 0."""
    if n == 0:
        return
    scalars = [n] * len(launch.scalars)
    with _current(inputs[0].device):
        kernel_of(launch)[launch.programs(n)](
            *inputs, *scalars, *outputs, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
        )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _dtype(x: torch.Tensor) -> str:
    return DTYPES[str(x.dtype).removeprefix("torch.")]


OLDEST = (8, 0)
"""The first compute capability that Triton has tensor-core code for; before it, products spill kilobytes a thread."""


@cache
def _too_old(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST


def supports(operator: str, arguments: Sequence[Any]) -> bool:
    """Whether the kernels take an operator's arguments; if not, its PyTorch implementation is used.

    Refused: float64, more than ``route.MOST_EXPERTS`` experts, and experts of a single neuron, which are faster as one
    dense product; and everything on GPUs older than :data:`OLDEST` (T4, RTX 20).
    """
    floats = (torch.float32, torch.float16, torch.bfloat16)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    if any(t.is_floating_point() and t.dtype not in floats for t in tensors):
        return False
    if _too_old(tensors[0].device):
        return False
    if operator.startswith("gathered"):
        return True
    if operator == "route":
        experts = arguments[0].shape[1]
    elif operator == "dispatch":
        experts = arguments[2]
    elif operator == "combine":
        experts = 0 if arguments[4] is None else arguments[4].shape[0]
    elif operator == "sparse_glu":
        experts = arguments[3].shape[0]
        if arguments[3].shape[1] == 1:
            return False
    else:
        experts = arguments[1].numel() - 1
    return experts <= _route.MOST_EXPERTS


def route(
    scores: torch.Tensor, selection_bias: torch.Tensor | None, scale: torch.Tensor | None, top_k: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`moedge.convert.ops.route`."""
    tokens, experts = scores.shape
    launch = _route.launch(experts=experts, top_k=top_k, rule=rule, bias=selection_bias is not None)
    scores = scores.contiguous()
    inputs = [scores, scores if selection_bias is None else selection_bias.contiguous()]
    if rule == "scaled":
        if scale is None:
            raise ValueError("rule 'scaled' needs the scale tensor [E]")
        inputs.append(scale.contiguous())
    indices = scores.new_empty((tokens, top_k), dtype=torch.int32)
    weights = scores.new_empty((tokens, top_k))
    run(launch, inputs, [indices, weights], tokens)
    return indices, weights


def dispatch(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`moedge.convert.ops.dispatch`."""
    tokens, top_k = indices.shape
    launch = _dispatch.launch(hidden=x.shape[1], experts=num_experts, top_k=top_k, dtype=_dtype(x))
    rows = x.new_empty((tokens * top_k, x.shape[1]))
    offsets = indices.new_empty((num_experts + 1,)) if tokens else indices.new_zeros((num_experts + 1,))
    inverse = indices.new_empty((tokens * top_k,))
    run(launch, [x.contiguous(), indices.contiguous()], [rows, offsets, inverse], tokens)
    return rows, offsets, inverse


def _path(rows: torch.Tensor, experts: int, tokens: int | None) -> str:
    # An operator alone does not know T; then every row may be a token of its own.
    return path_for(tokens or rows.shape[0], rows.shape[0] // tokens if tokens else 1, experts)


def grouped_glu(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    h_threshold: torch.Tensor | None = None,
    ramp: float = 0.0,
    *,
    tokens: int | None = None,
) -> torch.Tensor:
    """See :func:`moedge.convert.ops.grouped_glu`; ``tokens`` (T) chooses the path."""
    experts, width, hidden = gate.shape
    launch = _glu.launch(
        hidden=hidden,
        width=width,
        experts=experts,
        activation=activation,
        dtype=_dtype(rows),
        path=_path(rows, experts, tokens),
    )
    y = rows.new_empty((rows.shape[0], width))
    run(launch, [rows.contiguous(), offsets, gate.contiguous(), up.contiguous()], [y], rows.shape[0])
    if h_threshold is not None:  # the expert that owns row r is the number of experts that end at or before r
        owner = torch.searchsorted(offsets[1:], torch.arange(len(y), device=y.device, dtype=offsets.dtype), right=True)
        y = kept(y, h_threshold[owner], ramp)
    return y


def grouped_linear(
    rows: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, *, tokens: int | None = None
) -> torch.Tensor:
    """See :func:`moedge.convert.ops.grouped_linear`; ``tokens`` (T) chooses the path."""
    experts, hidden, width = weight.shape
    launch = _linear.launch(
        hidden=hidden, width=width, experts=experts, dtype=_dtype(rows), path=_path(rows, experts, tokens)
    )
    y = rows.new_empty((rows.shape[0], hidden))
    run(launch, [rows.contiguous(), offsets, weight.contiguous()], [y], rows.shape[0])
    return y


def combine(
    rows: torch.Tensor,
    inverse: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    compensation: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`moedge.convert.ops.combine`."""
    tokens, top_k = weights.shape
    # Without compensation the kernel does not look at E; k keeps the number of compiled variants down.
    experts = top_k if compensation is None else compensation.shape[0]
    launch = _combine.launch(
        hidden=rows.shape[1],
        experts=experts,
        top_k=top_k,
        dtype=_dtype(rows),
        compensated=compensation is not None,
    )
    inputs = [rows.contiguous(), inverse, indices.contiguous(), weights.contiguous()]
    if compensation is not None:
        inputs.append(compensation.to(rows.dtype).contiguous())
    y = rows.new_empty((tokens, rows.shape[1]))
    run(launch, inputs, [y], tokens)
    return y


def sparse_glu(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    compensation: torch.Tensor | None,
    activation: str,
    h_threshold: torch.Tensor | None = None,
    ramp: float = 0.0,
) -> torch.Tensor:
    """See :func:`moedge.convert.ops.sparse_glu`: four launches, no synchronisation with the host."""
    tokens = x.shape[0]
    rows, offsets, inverse = dispatch(x, indices, gate.shape[0])
    hidden = grouped_glu(rows, offsets, gate, up, activation, h_threshold, ramp, tokens=tokens)
    return combine(grouped_linear(hidden, offsets, down, tokens=tokens), inverse, indices, weights, compensation)


def gathered_glu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, h_limits: torch.Tensor, activation: str
) -> torch.Tensor:
    """See :func:`moedge.convert.ops.gathered_glu`."""
    hidden, width = gate.shape
    path = _gathered.path_for(len(x))
    launch = _gathered_glu.launch(hidden=hidden, width=width, activation=activation, dtype=_dtype(x), path=path)
    y = x.new_empty((len(x), width))
    run(launch, [x.contiguous(), gate.contiguous(), up.contiguous(), h_limits.contiguous()], [y], len(x))
    return y


def gathered_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See :func:`moedge.convert.ops.gathered_linear`."""
    inputs, outputs = weight.shape
    path = _gathered.path_for(len(x))
    launch = _gathered_linear.launch(inputs=inputs, outputs=outputs, dtype=_dtype(x), path=path)
    y = x.new_empty((len(x), outputs))
    run(launch, [x.contiguous(), weight.contiguous()], [y], len(x))
    return y
