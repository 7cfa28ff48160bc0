"""SparseFFN: a GLU FFN cut into a shared block and routed experts, with thresholds if the plan has them.

It is made from its layer's section of config.json (:func:`layer_config`), and cut out of a dense FFN by
:func:`build_ffn`. T tokens, H hidden, S shared width, I widest routed expert, E routed experts, k active.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import moedge.convert.ops  # noqa: F401  registers torch.ops.moedge
from moedge import MoEdgeError
from moedge.convert import adapters, routers, zeros
from moedge.convert.kept_inputs import KeepsLarge
from moedge.convert.ops import activate
from moedge.convert.plan import RAMP, LayerPlan

_THRESHOLDS = ("x_threshold", "shared_h_threshold", "h_threshold")
FLOAT32 = ("mlp.router", "mlp.selection_bias", "mlp.scale", "mlp.no_bias", *(f"mlp.{name}" for name in _THRESHOLDS))
"""Kept in float32 whatever the model's dtype: bfloat16 rounding flips ranks of experts (docs/methods.md 1.4)."""


class SparseFFN(KeepsLarge):
    """A GLU FFN cut into a shared block and routed experts.

    ``y = shared(x) + sum over selected e of w_e (E_e(x) + expert_bias_e) + sum over the others of compensation_e +
    output_bias``.
    With thresholds the experts read x, and the down projections h, without their small values
    (:mod:`moedge.convert.ops.gather`); the router reads all of x.

    It is made from its layer's section of config.json alone (see :func:`layer_config`), with empty weights. Without
    experts (a static plan) only the shared block and the output bias run.

    Attributes:
        layer_index: position in the model.
        num_experts: E. top_k: k; settable, and with ``top_k = num_experts`` and unit weights the FFN is the dense one.
        activation: ``silu``, ``gelu_tanh`` or ``gelu``.
        straight_through: for training: the weights of selected experts get the gradient of a softmax over all experts,
            and keep their values. A weight that is always 1 (top-1 softmax, unit) would teach the router nothing.
        record_routes: when True, ``last_routes`` holds the selected experts of the latest call, int32 [T, k].
        count, choose: see :class:`KeepsLarge`; places are ``x``, and ``h`` of the shared block.
        expert_widths: neurons of each routed expert, without padding.
    """

    shared_gate: torch.Tensor
    shared_up: torch.Tensor
    shared_down: torch.Tensor
    router: nn.Module | None
    selection_bias: torch.Tensor | None
    scale: torch.Tensor | None
    compensation: torch.Tensor | None
    expert_bias: torch.Tensor | None
    output_bias: torch.Tensor | None
    x_threshold: torch.Tensor | None
    shared_h_threshold: torch.Tensor | None
    h_threshold: torch.Tensor | None
    shared_gate_bias: torch.Tensor | None
    shared_up_bias: torch.Tensor | None

    def __init__(self, layer_index: int, hidden_size: int, spec: dict[str, Any]) -> None:
        super().__init__()
        gather = spec.get("gather", {})
        self._start_keeping(layer_index, gather.get("ramp", RAMP))
        self.num_experts: int = spec["num_experts"]
        self.top_k: int = spec["top_k"]
        self.activation: str = spec["activation"]
        self.combine: str = spec["combine"]
        self.expert_widths: list[int] = spec.get("expert_widths", [spec["expert_width"]] * spec["num_experts"])
        self.straight_through = False
        self.record_routes = False
        self.last_routes: torch.Tensor | None = None
        experts, inner, shared = self.num_experts, spec["expert_width"], spec["shared_width"]
        if not 0 <= self.top_k <= experts:
            raise MoEdgeError(f"Layer {layer_index}: top_k={self.top_k} of {experts} experts cannot be selected.")
        shapes: dict[str, tuple[int, ...]] = {"shared_gate": (shared, hidden_size), "shared_up": (shared, hidden_size)}
        shapes |= {"shared_down": (hidden_size, shared)}
        # Experts keep a bias of gate or up as the weight of one more input that is always 1: every kernel of the
        # routed FFN then has it without knowing.
        self.biased: bool = spec.get("biased", False)
        for name in ("shared_gate_bias", "shared_up_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(shared)) if self.biased else None)
        if experts:
            columns = hidden_size + self.biased
            shapes |= {"gate": (experts, inner, columns), "up": (experts, inner, columns)}
            shapes |= {"down": (experts, hidden_size, inner)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        optional = {"selection_bias": (experts,), "scale": (experts,), "compensation": (experts, hidden_size)}
        optional["expert_bias"] = (experts, hidden_size)
        for name, shape in {**optional, "output_bias": (hidden_size,)}.items():
            # Buffers that are saved: a plain tensor would be lost on save or .to(device), the known CMoE bug.
            dtype = torch.float32 if f"mlp.{name}" in FLOAT32 else None
            self.register_buffer(name, torch.zeros(shape, dtype=dtype) if name in spec["tensors"] else None)
        thresholds = {"x_threshold": (hidden_size,), "shared_h_threshold": (shared,), "h_threshold": (experts, inner)}
        for name, shape in thresholds.items():
            wanted = gather.get("x" if name == "x_threshold" else "h", False) and 0 not in shape
            self.register_buffer(name, torch.ones(shape, dtype=torch.float32) if wanted else None)
        self.router = None
        if experts:
            options = spec["router"]["options"]
            self.router = routers.build(spec["router"]["kind"], experts, hidden_size, self.activation, options)
            self._bind_router()

    def _bind_router(self) -> None:
        if isinstance(self.router, routers.OracleRouter):
            self.router.bind(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the FFN output, same shape and dtype as x [..., H]."""
        flat = x.reshape(-1, x.shape[-1])
        kept = self.kept("x", flat, self.x_threshold)
        if self.router is None:
            return self._shared(kept).reshape(x.shape)
        if len(self.shared_gate):
            y = self._shared(kept)
            y = y + self._routed(flat, kept, y.dtype)
        else:  # matrices of no rows are nothing that a quantiser or TensorRT should have to know
            kind = flat.device.type
            autocast = torch.is_autocast_enabled(kind)
            y = self._routed(flat, kept, torch.get_autocast_dtype(kind) if autocast else flat.dtype)
            y = y if self.output_bias is None else y + self.output_bias
        return y.reshape(x.shape)

    def thresholds(self) -> dict[str, torch.Tensor]:
        """Return the thresholds by place: ``x``, ``h`` of the shared block, ``expert_h``."""
        places = zip(("x", "h", "expert_h"), _THRESHOLDS, strict=True)
        values = ((place, getattr(self, name)) for place, name in places)
        return {place: value for place, value in values if value is not None}

    def _shared(self, flat: torch.Tensor) -> torch.Tensor:
        """Return what the shared block gives for tokens [T, H], output bias included."""
        gate = F.linear(flat, self.shared_gate, self.shared_gate_bias)
        hidden = activate(gate, self.activation) * F.linear(flat, self.shared_up, self.shared_up_bias)
        return F.linear(self.kept("h", hidden, self.shared_h_threshold), self.shared_down, self.output_bias)

    def _routed(self, flat: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return what the selected experts add for tokens [T, H]: the router reads ``flat``, the experts ``kept``."""
        assert self.router is not None
        kind = flat.device.type
        experts = (self.gate, self.up, self.down, self.compensation)
        if torch.is_autocast_enabled(kind):  # it does not see into the operators, and must not round the router
            with torch.autocast(kind, enabled=False):
                scores = self.router(flat.float())
            kept, *experts = (None if t is None else t.to(dtype) for t in (kept, *experts))  # type: ignore[assignment]
        else:
            scores = self.router(flat.float())
        indices, weights = torch.ops.moedge.route(scores, self.selection_bias, self.scale, self.top_k, self.combine)
        if self.straight_through:
            p = torch.softmax(scores, dim=-1).gather(-1, indices.long())
            weights = weights + (p - p.detach())
        if self.record_routes:
            self.last_routes = indices
        inputs = F.pad(kept, (0, 1), value=1.0) if self.biased else kept
        gather = () if self.h_threshold is None else (self.h_threshold, self.ramp)
        if self.count is not None:
            self.count("h", *self._routed_hidden(inputs, indices))
        y = torch.ops.moedge.sparse_glu(inputs, indices, weights, *experts, self.activation, *gather)
        if self.expert_bias is not None:
            # Standard operators and no reshape by k: it exports to every target, and k may be changed there.
            y = y + torch.zeros_like(scores).scatter(1, indices.long(), weights).to(y.dtype) @ self.expert_bias
        return y

    def _routed_hidden(self, inputs: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return h of the selected experts, without padding neurons, and their thresholds: for the count alone.

        Without thresholds all of them are read: then only the number of values means anything.
        """
        widths = torch.tensor(self.expert_widths, device=inputs.device)
        if self.h_threshold is None:
            return inputs.new_empty(int(widths[indices.long()].sum())), None
        rows, offsets, _ = torch.ops.moedge.dispatch(inputs, indices, self.num_experts)
        hidden = torch.ops.moedge.grouped_glu(rows, offsets, self.gate, self.up, self.activation)
        owner = torch.repeat_interleave(offsets.diff().long())
        real = torch.arange(hidden.shape[1], device=hidden.device) < widths[owner].unsqueeze(1)
        return hidden[real], self.h_threshold[owner][real]

    def _own_float32(self) -> set[int]:
        """Router, selection bias and scale are never cast either."""
        own = {id(tensor) for tensor in (self.selection_bias, self.scale) if tensor is not None}
        own |= {id(parameter) for parameter in self.router.parameters()} if self.router is not None else set()
        return own | super()._own_float32()


def layer_config(
    layer: LayerPlan, activation: str, *, biased: bool = False, output_bias: bool = False
) -> dict[str, Any]:
    """Return what config.json says about one layer: all that :class:`SparseFFN` needs to build itself.

    Args:
        biased: the dense FFN has a bias in gate or up. output_bias: it has one in down.
    """
    router = layer.router and {"kind": layer.router.kind, "options": layer.router.options}
    optional = ("selection_bias", "scale", "compensation", "expert_bias", "output_bias")
    return {
        **layer_facts(layer),
        "activation": activation,
        "router": router if layer.experts else None,
        "tensors": [
            name for name in optional if getattr(layer, name) is not None or (name == "output_bias" and output_bias)
        ],
        **({"biased": True} if biased else {}),
    }


def layer_facts(layer: LayerPlan) -> dict[str, Any]:
    """Return what a layer plan alone decides of :func:`layer_config`."""
    return {
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "shared_width": len(layer.shared),
        "expert_width": layer.expert_width,
        "expert_widths": [len(expert) for expert in layer.experts],
        "combine": layer.combine,
        **({"gather": gather} if (gather := _gather(layer)) else {}),
    }


def _gather(layer: LayerPlan) -> dict[str, Any] | None:
    """Return which values of the FFN are left out where they are small."""
    if layer.x_threshold is None and layer.h_threshold is None:
        return None
    return {"x": layer.x_threshold is not None, "h": layer.h_threshold is not None, "ramp": layer.ramp}


def block_config(block: adapters.FFN, layer: LayerPlan) -> dict[str, Any]:
    """Return :func:`layer_config` of a layer of one dense FFN."""
    biased = block.gate_bias is not None or block.up_bias is not None
    return layer_config(layer, block.hidden_act, biased=biased, output_bias=block.down_bias is not None)


def _with_bias(weight: torch.Tensor, bias: torch.Tensor | None, biased: bool) -> torch.Tensor:
    """Return [D, H], or [D, H + 1] with the bias (zero where there is none) as last column."""
    if not biased:
        return weight
    column = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight, column[:, None]], dim=1)


def _padded(layer: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return the neurons of each expert, int64 [E, I], and which of them are no padding, bool [E, I]."""
    widths = np.array([len(expert) for expert in layer.experts])
    real = np.arange(layer.expert_width) < widths[:, None]
    neurons = np.zeros(real.shape, np.int64)
    neurons[real] = np.concatenate(layer.experts)
    return neurons, real


@torch.no_grad()
def build_ffn(block: adapters.FFN, layer: LayerPlan) -> SparseFFN:
    """Cut one dense FFN by its layer plan; the result owns copies of the rows and columns it uses."""
    weight = block.down
    spec = block_config(block, layer)
    with torch.device("meta"):
        ffn = SparseFFN(block.index, weight.shape[0], spec)
    gate, up, down = block.gate, block.up, weight if layer.down is None else torch.from_numpy(layer.down).to(weight)
    if layer.zeros is not None:
        gate, up, down = zeros.clear(layer.zeros, gate, up, down)

    def own(name: str, tensor: torch.Tensor) -> None:
        setattr(ffn, name, nn.Parameter(tensor.contiguous(), requires_grad=False))

    shared = torch.from_numpy(layer.shared.astype(np.int64)).to(weight.device)
    dense_gate = _with_bias(gate, block.gate_bias, ffn.biased)
    dense_up = _with_bias(up, block.up_bias, ffn.biased)
    inputs = weight.shape[0]
    own("shared_gate", dense_gate[shared, :inputs])
    own("shared_up", dense_up[shared, :inputs])
    own("shared_down", down[:, shared])
    if ffn.biased:
        own("shared_gate_bias", dense_gate[shared, inputs])
        own("shared_up_bias", dense_up[shared, inputs])
    if layer.experts:
        neurons, real = (torch.from_numpy(part).to(weight.device) for part in _padded(layer))
        own("gate", dense_gate[neurons].masked_fill_(~real[..., None], 0))
        own("up", dense_up[neurons].masked_fill_(~real[..., None], 0))
        own("down", down[:, neurons].masked_fill_(~real, 0).transpose(0, 1))
        assert layer.router is not None  # LayerPlan.validate
        router = routers.from_plan(layer.router, layer.num_experts, weight.shape[0], block.hidden_act)
        ffn.router = router.to(weight.device).requires_grad_(False)
        ffn._bind_router()
    set_thresholds(ffn, layer, weight.device)
    for name in spec["tensors"]:
        dtype = torch.float32 if f"mlp.{name}" in FLOAT32 else weight.dtype
        value = getattr(layer, name)
        tensor = None if value is None else torch.from_numpy(value).to(weight.device)
        if name == "output_bias" and block.down_bias is not None:
            own_bias = block.down_bias.float()
            tensor = own_bias.clone() if tensor is None else tensor + own_bias
        assert tensor is not None
        setattr(ffn, name, tensor.to(dtype, copy=True))
    return ffn.train(block.module.training)


def set_thresholds(ffn: SparseFFN, layer: LayerPlan, device: torch.device) -> None:
    """Give a layer's thresholds to the inputs, the shared neurons and the experts, [H], [S] and [E, I]."""
    if layer.x_threshold is not None:
        ffn.x_threshold = torch.from_numpy(layer.x_threshold).to(device, copy=True)
    if layer.h_threshold is None:
        return
    if len(layer.shared):
        ffn.shared_h_threshold = torch.from_numpy(layer.h_threshold[layer.shared]).to(device)
    if layer.experts:
        neurons, real = _padded(layer)
        each = np.where(real, layer.h_threshold[neurons], np.float32(1))  # of a neuron that only pads: h is 0 there
        ffn.h_threshold = torch.from_numpy(each).to(device)
