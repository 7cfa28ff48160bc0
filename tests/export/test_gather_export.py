"""Models that leave small values out, on every target: exported, lowered, compared with PyTorch, mistakes caught."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from moedge import MoEdgeError
from moedge._files import atomic_dir
from moedge.convert import modeling
from moedge.export.bundle import open_bundle
from moedge.export.graph.build import Builder, array_of, constant_of
from moedge.export.graph.nodes import KEEPS
from moedge.export.lowering import gather
from moedge.export.lowering.ort import products
from moedge.export.lowering.ort.gathered import FuseGather
from moedge.export.lowering.ort.quantized import INT8_LIMIT
from moedge.export.lowering.ort.routed import FuseRouted
from moedge.export.lowering.trt import engine as tensorrt
from moedge.export.lowering.trt import gathered as trt_gathered
from moedge.export.lowering.trt.gathered import GatherProducts
from moedge.export.pipeline import export, lower
from moedge.export.quantize import moments
from moedge.runtime.engines import open_engine
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine
from moedge.runtime.parity.given import pair

IDS = np.random.default_rng(1).integers(0, 256, (1, 24))
GROWTH = (1 + 0.1 * (2 + 1 / 0.1) ** 2) ** 0.5
"""A rounding of a value on a ramp of 0.1 counts 2 + 1 / 0.1 times, and at most one of ten is (lowering/gather.py)."""
# Two float32 evaluations of a 2-layer model: some fifteen products of at most 64 terms in another order, 64 * 2^-24.
FLOAT = 6e-5 * GROWTH
# Four blocks, each within HALF_LIMIT of its own output, added to one residual stream.
HALF = 4 * tensorrt.HALF_LIMIT * GROWTH
# Two blocks with thresholds, within INT8_LIMIT of their own output as a rule, added to one residual stream.
INT8 = 2 * INT8_LIMIT
KINDS = [
    "gather only",
    "gather only, every linear layer",
    "routed",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("compensation", "biases", "GELU")),
]
QUANTISED = ("ort-cpu-int8", "ort-cpu-int4", "tensorrt-rtx-int8", "tensorrt-rtx-int4")


def relative(actual: Any, expected: Any) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


class Folders:
    """A checkpoint and its portable bundle of each kind, and other bundles, made when they are first asked for."""

    def __init__(self, root: Path, make: Any) -> None:
        self.root, self._make = root, make

    def checkpoint(self, kind: str) -> Path:
        path = self.root / kind / "moe"
        if not path.exists():
            self._make(kind, path)
        return path

    def portable(self, kind: str) -> Path:
        path = self.root / kind / "bundles"
        return path / "portable" if path.exists() else export(self.checkpoint(kind), path, [], label=kind)["portable"]

    def bundle(self, kind: str, target: str, *, plain: bool = False, **options: Any) -> Path:
        """``plain``: it has no operators of ours, for the caller lets no compiler be found."""
        path = self.root / kind / f"{target} {options}{' plain' * plain}"
        if not path.exists():
            with atomic_dir(path) as partial:
                lower(target, self.portable(kind), partial, **options)
        return path


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any, convert_tiny: Any, gathered: Any, gather_only: Any
) -> Folders:
    def make(kind: str, path: Path) -> None:
        facts = {"biases": {"mlp_bias": True}, "GELU": {"hidden_act": "gelu_pytorch_tanh"}}
        options = facts.get(kind.rpartition(", ")[2], {})
        options = {"hidden": 64, "width": 256} if "wide" in kind else options
        model = tiny_model("llama", **options)
        model.model.norm.weight.data *= 2  # logits with a standard deviation that the limits of verify are derived for
        parts = {"x alone": {"h": False}, "h alone": {"x": False}}.get(kind, {})
        for layer in model.model.layers if "wide" in kind else ():  # weights of 0.2 make attention sharper than trained
            layer.self_attn.q_proj.weight.data *= 0.25
        plan = (
            gather_only(model, **({"linears": "all", "ramp": 2.0} if "every" in kind else {}))
            if kind.startswith("gather only")
            else gathered(convert_tiny(model, "cmoe"), model, **parts)
        )
        if "compensation" in kind:
            fill = np.random.default_rng(2).normal(0, 0.1, (6, 32)).astype(np.float32)
            plan = replace(plan, layers=[replace(layer, compensation=fill) for layer in plan.layers])
        modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, path)

    return Folders(tmp_path_factory.mktemp("gather"), make)


def check(engine: Any, reference: Any, limit: float) -> None:
    """Prefill of 20 tokens and four decoded ones; every token has the reference's experts."""
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        assert 0 < relative(got.logits, want.logits) < limit
        for layer, experts in (want.routes or {}).items():
            np.testing.assert_array_equal(np.sort(got.routes[layer]), np.sort(experts))
        token = IDS[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)


def applied(path: Path) -> dict[str, bool]:
    return {
        entry["rewrite"]: entry["self_test"] is None or entry["self_test"]["passed"]
        for entry in open_bundle(path).manifest.document()["lowering"]
        if entry["status"] == "applied"
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["portable", "openvino", "ort-cpu"])
def test_float32_targets_are_the_model(folders: Folders, kind: str, target: str) -> None:
    path = folders.portable(kind) if target == "portable" else folders.bundle(kind, target)
    check(OrtEngine(path, taps=True), TorchEngine(folders.checkpoint(kind), taps=True), FLOAT)
    assert all(applied(path).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("target", "options"), [("tensorrt", {"tensorrt": "10.13"}), ("tensorrt-rtx", {})])
def test_half_precision_targets_are_the_model(
    folders: Folders, kind: str, target: str, options: dict[str, Any]
) -> None:
    path = folders.bundle(kind, target, **options)
    check(open_engine(path, taps=True), TorchEngine(folders.checkpoint(kind), taps=True), HALF)
    assert applied(path)["KeepLarge -> Abs, Sub, Div, Clip, Mul"]
    assert (GatherProducts(None).name in applied(path)) == (target == "tensorrt")


def plugins_of(path: Path) -> list[str]:
    """The plugin nodes of a bundle's graph, in its order."""
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node if node.domain == "moedge"]


FFN = ["GatheredGLU", "GatheredLinear"]


@pytest.mark.parametrize(
    ("kind", "options", "layer"),
    [
        ("gather only", {"tensorrt": "10.13"}, FFN),
        ("gather only", {"tensorrt": "10.13", "dtype": "bfloat16"}, FFN),
        ("gather only", {"tensorrt": "10.3"}, []),
        ("gather only", {"tensorrt": "10.13", "experts": "merged"}, []),
        ("gather only, biases", {"tensorrt": "10.13"}, ["GatheredLinear"] * 3),
        ("gather only, GELU", {"tensorrt": "10.13"}, ["GatheredLinear"] * 3),
        ("routed", {"tensorrt": "10.13"}, FFN),  # of the shared block: thresholds of experts have no kernel
        ("x alone", {"tensorrt": "10.13"},
         ["Route", *["GatheredLinear"] * 2, "Dispatch", "GroupedGLU", "GroupedLinear", "Combine"]),
    ],
    ids=str,
)  # fmt: skip
def test_tensorrt_reads_the_weights_of_kept_values_where_it_takes_kernels(
    folders: Folders, kind: str, options: dict[str, Any], layer: list[str]
) -> None:
    path = folders.bundle(kind, "tensorrt", **options)
    assert sorted(plugins_of(path)) == sorted(layer * 2)
    rewrites, manifest = applied(path), open_bundle(path).manifest
    assert all(rewrites.values())
    assert (GatherProducts(None).name in rewrites) == bool(layer)
    assert (manifest.plugins is not None) == bool(layer)
    assert any("multiplied by zeros" in limit for limit in manifest.limits) == (not layer)
    if options.get("dtype") != "bfloat16":
        check(open_engine(path, taps=True), TorchEngine(folders.checkpoint(kind), taps=True), HALF)


def test_rtx_has_kernels_for_kept_values_where_they_are_asked_for(folders: Folders) -> None:
    said = {
        entry["rewrite"]: entry["reason"]
        for entry in open_bundle(folders.bundle("gather only", "tensorrt-rtx")).manifest.document()["lowering"]
        if entry["status"] == "refused"
    }
    assert "--expert-form plugins" in said[GatherProducts(None).name]
    path = folders.bundle("gather only", "tensorrt-rtx", experts="plugins")
    assert plugins_of(path) == FFN * 2
    assert any("libmoedge_launch.so" in limit for limit in open_bundle(path).manifest.limits)
    check(open_engine(path), TorchEngine(folders.checkpoint("gather only")), HALF)


def test_the_bodies_of_plugins_are_the_standard_operators_bit_for_bit(folders: Folders) -> None:
    """What is judged on a CPU is the same in both forms, and so the verdict is."""
    paths = [
        folders.bundle("gather only", "tensorrt", tensorrt="10.13", **more) for more in ({}, {"experts": "merged"})
    ]
    plugins, standard = (open_engine(path).prefill(IDS).logits for path in paths)
    np.testing.assert_array_equal(plugins, standard)


def test_every_linear_layer_is_a_plugin_for_rows_of_tokens(folders: Folders, values_match_their_shapes: Any) -> None:
    """The kernels take [T, K]: attention and the output projection read [B, S, K]. A tied table is stored once."""
    kind = "gather only, every linear layer"
    path, standard = (
        folders.bundle(kind, "tensorrt", tensorrt="10.13", **more) for more in ({}, {"experts": "merged"})
    )
    found = plugins_of(path)
    assert (found.count("GatheredGLU"), found.count("GatheredLinear")) == (2, 2 * 5 + 1)
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert {ranks[name] for n in graph.node if n.domain == "moedge" for name in (n.input[0], n.output[0])} == {2}
    assert [list(tensor.dims) for tensor in graph.initializer if 260 in tensor.dims] == [[32, 260]]
    assert values_match_their_shapes(path) > len(found)
    check(open_engine(path), TorchEngine(folders.checkpoint(kind)), HALF)
    plugins, masked = (open_engine(each).prefill(IDS).logits for each in (path, standard))
    np.testing.assert_array_equal(plugins, masked)


def test_a_weight_by_channel_is_stored_once(folders: Folders) -> None:
    """Prompts and single tokens read the same rows."""
    graph = onnx.load(folders.bundle("gather only", "tensorrt", tensorrt="10.13") / "model.onnx").graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer if ".mlp." in tensor.name and len(tensor.dims) == 2]
    wanted = [(32, 64), (32, 64), (2, 64), (64, 32)]  # gate, up, limits, down
    assert sorted(shapes) == sorted(wanted * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", QUANTISED)
def test_quantised_targets_are_the_model_of_their_weights(folders: Folders, kind: str, target: str) -> None:
    if (kind, target) == ("biases", "tensorrt-rtx-int4"):
        with pytest.raises(MoEdgeError, match="its rows of 33 inputs are no whole number of blocks of 16"):
            folders.bundle(kind, target)
        return
    path = folders.bundle(kind, target)
    stored = OrtEngine(folders.portable(kind), taps=True, weights_of=path)
    rewrites = applied(path)
    assert all(rewrites.values())
    if {FuseGather.name, FuseRouted.name} & set(rewrites):
        # Operators of our own round activations to int8 in any case, which turns near ties of experts.
        got, want = OrtEngine(path).prefill(IDS).logits[0], stored.prefill(IDS).logits[0]
        errors = [relative(one, other) for one, other in zip(got, want, strict=True)]
        assert 0 < np.median(errors) < INT8
    elif target.startswith("ort"):
        check(OrtEngine(path, taps=True, float32_activations=True), stored, FLOAT)
    else:
        check(OrtEngine(path, taps=True), stored, HALF)
    classes = {
        entry["tensor_class"]: entry for entry in open_bundle(path).manifest.document()["quantization"]["classes"]
    }
    assert (
        classes["thresholds"]["bytes"]
        == classes["thresholds"]["float_bytes"]
        == 4 * (2 * (32 + 64) + (2 * (32 + 32) + 32 if "every" in kind else 0))
    )


def test_cuda_takes_the_model_without_experts(folders: Folders) -> None:
    path = folders.bundle("gather only", "ort-cuda")
    assert any("float16" in name for name in applied(path))
    with pytest.raises(MoEdgeError, match=r"^Cannot lower for ort-cuda: hidden values .*; use --target portable or"):
        folders.bundle("routed", "ort-cuda")


def test_a_kernel_of_whole_experts_takes_them_when_their_hidden_values_are_kept(
    folders: Folders, without_compiler: Any
) -> None:
    """Inputs are left out before the kernel, which knows nothing of it; ort-cuda and QMoE then apply too."""
    with without_compiler():
        plain = {t: folders.bundle("x alone", t, plain=True) for t in ("ort-cpu", "ort-cpu-int8")}
        routed = folders.bundle("routed", "ort-cpu", plain=True)
    assert applied(plain["ort-cpu"])["Route + SparseGLU -> MoE"]
    assert applied(plain["ort-cpu-int8"])["Route + SparseGLU -> QMoE"]
    assert applied(folders.bundle("x alone", "ort-cuda"))["Route + SparseGLU -> MoE"]
    assert any("as plugins" in name for name in applied(folders.bundle("x alone", "tensorrt", tensorrt="10.13")))
    check(OrtEngine(plain["ort-cpu"], taps=True), TorchEngine(folders.checkpoint("x alone")), FLOAT)
    refused = {
        (entry["rewrite"], entry["reason"])
        for entry in open_bundle(routed).manifest.document()["lowering"]
        if entry["status"] == "refused"
    }
    assert ("Route + SparseGLU -> MoE", KEEPS) in refused


@pytest.mark.parametrize("target", ["openvino", "ort-cpu", "tensorrt-rtx"])
def test_hidden_values_alone_are_left_out(folders: Folders, target: str) -> None:
    if target == "tensorrt-rtx":  # in half precision a near tie of experts turns at one token: replayed, as ever
        assert verified(folders.portable("h alone"), folders.bundle("h alone", target))["verdict"]["passed"]
        return
    check(OrtEngine(folders.bundle("h alone", target), taps=True), TorchEngine(folders.checkpoint("h alone")), FLOAT)


def test_tensorrts_own_layer_and_the_plugins_refuse_thresholds_of_hidden_values(folders: Folders) -> None:
    for form, version in (("native", "11.0"), ("plugins", "10.13")):
        with pytest.raises(MoEdgeError, match=r"hidden values of the experts .*; take --expert-form merged"):
            folders.bundle("routed", "tensorrt", tensorrt=version, experts=form)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 has no package for this platform")
@pytest.mark.parametrize("kind", ["gather only", "routed"])
def test_tensorrt_for_rtx_builds_it_without_a_gpu(folders: Folders, kind: str) -> None:
    from moedge.runtime.device import moedge_trt

    opened = open_bundle(folders.bundle(kind, "tensorrt-rtx"))
    shapes = moedge_trt.profile_shapes(opened.manifest.document()["model"], max_length=64, max_prompt=32)
    trt = moedge_trt.load_tensorrt("tensorrt-rtx")
    plan, _ = moedge_trt.build(trt, opened.model_path, shapes, compute_capabilities=["8.6"], taps={})
    assert len(plan) > opened.manifest.document()["files"]["model.onnx.data"]["size"]


def test_moments_for_gptq_are_of_the_values_that_are_kept(folders: Folders) -> None:
    """By hand: the moments of down's inputs in the shared block, and in each expert, from PyTorch."""
    model, _, _ = modeling.load(folders.checkpoint("routed"))
    windows = np.random.default_rng(3).integers(0, 256, (3, 24))
    found = moments.moments(open_bundle(folders.portable("routed")), windows)
    for ffn in modeling.sparse_ffns(model):
        ffn.record_routes = True
        seen: list[torch.Tensor] = []
        handle = ffn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        routes = []
        for window in torch.from_numpy(windows):
            with torch.no_grad():
                model(window[None])
            routes.append(ffn.last_routes)
        handle.remove()
        keep, name = torch.ops.moedge.keep_large, f"model.model.layers.{ffn.layer_index}.mlp"
        x = keep(torch.cat(seen), ffn.x_threshold, ffn.ramp)
        assert 0.2 < float((x == 0).float().mean()) < 0.8
        np.testing.assert_allclose(found[f"{name}.gate"], (x.T @ x).numpy(), rtol=1e-4, atol=1e-4)
        for expert in range(ffn.num_experts):
            rows = x[(torch.cat(routes) == expert).any(dim=1)]
            h = torch.nn.functional.silu(rows @ ffn.gate[expert].T) * (rows @ ffn.up[expert].T)
            h = keep(h, ffn.h_threshold[expert], ffn.ramp)
            np.testing.assert_allclose(found[f"{name}.down"][expert], (h.T @ h).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gather only, wide", {}), ("gather only, wide", {"experts": "plugins"}), ("routed", {})],
    ids=str,
)
def test_verify_passes_in_half_precision(folders: Folders, kind: str, options: dict[str, Any]) -> None:
    entry = verified(folders.portable(kind), folders.bundle(kind, "tensorrt-rtx", **options))
    assert not [check for check in entry["verdict"]["checks"] if not check["passed"]]


# --- verify, and mistakes ---


def verified(reference: Path, test: Path) -> dict[str, Any]:
    windows = np.random.default_rng(1).integers(0, 256, (2, 64))
    (entry,) = pair(reference, test, "random", windows, 24, "float32", {"threads": 1}, lambda *_: None)["parity"]
    return entry


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("kind", ["gather only", "routed"])
def test_verify_passes_in_float32(folders: Folders, kind: str, target: str) -> None:
    path = folders.portable(kind) if target == "portable" else folders.bundle(kind, target)
    entry = verified(folders.checkpoint(kind), path)
    assert entry["verdict"]["passed"], [check for check in entry["verdict"]["checks"] if not check["passed"]]


def thresholds(name: str, change: Any) -> Any:
    def apply(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.name.endswith(f".{name}"):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(array)), tensor.name))

    return apply


def router_reads_what_is_kept(graph: onnx.GraphProto) -> None:
    for keep in [node for node in graph.node if node.op_type == "KeepLarge" and "x_threshold" in node.input[1]]:
        for node in graph.node:
            if keep.input[0] in node.input and node is not keep:
                node.input[:] = [keep.output[0] if name == keep.input[0] else name for name in node.input]
    nodes = ordered(list(graph.node), graph)
    del graph.node[:]
    graph.node.extend(nodes)


def up_reads_everything(graph: onnx.GraphProto) -> None:
    """Of the shared block: gate reads the masked inputs, up all of them."""
    for keep in [node for node in graph.node if node.op_type == "KeepLarge" and "x_threshold" in node.input[1]]:
        readers = [node for node in graph.node if node.op_type == "Gemm" and node.input[0] == keep.output[0]]
        assert [node.input[1].rpartition(".")[2] for node in readers] == ["shared_gate", "shared_up"]
        readers[1].input[0] = keep.input[0]


def ordered(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in an order in which every value is made before it is read."""
    made = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    done: list[onnx.NodeProto] = []
    while len(done) < len(nodes):
        for node in nodes:
            if made.issuperset(node.input) and not made.issuperset(node.output):
                made |= set(node.output)
                done.append(node)
    return done


MISTAKES = {
    "channels of x in another order": thresholds("x_threshold", lambda t: t[::-1]),
    "channels of h in another order": thresholds("h_threshold", lambda t: t[..., ::-1]),
    "channels of the shared h in another order": thresholds("shared_h_threshold", lambda t: t[::-1]),
    "thresholds of x ignored": thresholds("x_threshold", lambda t: np.full_like(t, 1e-30)),
    "thresholds of h ignored": thresholds("h_threshold", lambda t: np.full_like(t, 1e-30)),
    "each x has its neighbour's threshold": thresholds("x_threshold", lambda t: np.roll(t, 1)),
    "each h has its neighbour's threshold": thresholds("h_threshold", lambda t: np.roll(t, 1, axis=-1)),
    "the score is ignored: one threshold a layer": thresholds("x_threshold", lambda t: np.full_like(t, np.median(t))),
    "the router reads the masked inputs": router_reads_what_is_kept,
    "gate reads the masked inputs and up does not": up_reads_everything,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_catches_a_mistake(folders: Folders, tmp_path: Path, broken_copy: Any, mistake: str) -> None:
    broken = broken_copy(folders.portable("routed"), tmp_path / "broken", MISTAKES[mistake])
    assert not verified(folders.checkpoint("routed"), broken)["verdict"]["passed"]


def wrong(change: Any) -> Any:
    """``lowering.gather.keep_large`` with thresholds that are changed."""
    right = gather.keep_large

    def keep_large(builder: Any, x: Any, threshold: Any, ramp: float) -> Any:
        array = np.ascontiguousarray(change(array_of(threshold)))
        return right(builder, x, builder.initializer(f"{threshold.name}.wrong", array), ramp)

    return keep_large


CHANGES = {
    "the thresholds of hidden values are in another order": lambda t: t[..., ::-1],
    "each hidden value has the threshold of its neighbour": lambda t: np.roll(t, 1, axis=-1),
    "the small hidden values are kept": lambda t: np.full_like(t, 1e-30),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_in_the_experts_fails_the_self_test_by_its_name(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, without_compiler: Any
) -> None:
    monkeypatch.setattr(products, "keep_large", wrong(CHANGES[name]))
    with without_compiler(), pytest.raises(MoEdgeError, match=f"Self-test of .* failed: .*It looks like: .*{name}"):
        lower("ort-cpu", folders.portable("routed"), tmp_path)


@pytest.mark.parametrize("name", CHANGES)
def test_a_mistake_in_standard_operators_fails_the_self_test(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(gather, "keep_large", wrong(CHANGES[name]))
    with pytest.raises(MoEdgeError, match="Self-test of 'KeepLarge -> Abs, Sub, Div, Clip, Mul' failed"):
        lower("tensorrt-rtx", folders.portable("gather only"), tmp_path)


def limits_of(change: Any) -> Any:
    """The thresholds of hidden values, changed, and the ramps that belong to them."""
    right = trt_gathered._limits

    def limits(builder: Any, keep: Any) -> Any:
        value = right(builder, keep)
        array = array_of(value)
        wrong = np.ascontiguousarray(change(array[0])).astype(np.float32)
        return builder.initializer(f"{value.name}.wrong", np.stack([wrong, wrong * np.float32(0.1)]))

    return limits


BY_CHANNEL = trt_gathered._by_channel


def unturned(builder: Any, product: Any) -> Any:
    """The numbers of a weight in the order in which they were, one row for each output."""
    right = BY_CHANNEL(builder, product)
    array = array_of(right)
    return builder.initializer(f"{right.name}.wrong", np.ascontiguousarray(array.T).reshape(array.shape))


PLUGIN_MISTAKES = {
    **{name: ("_limits", limits_of(change)) for name, change in CHANGES.items()},
    "the weights are not turned": ("_by_channel", unturned),
}


@pytest.mark.parametrize("name", PLUGIN_MISTAKES)
def test_a_mistake_in_plugins_fails_the_self_test(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(trt_gathered, *PLUGIN_MISTAKES[name])
    with pytest.raises(MoEdgeError, match=r"Self-test of 'KeepLarge, products -> GatheredGLU.*' failed"):
        lower("tensorrt", folders.portable("gather only"), tmp_path, tensorrt="10.13")


def test_a_tied_embedding_that_is_looked_up_wrongly_fails_the_self_test(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trt_gathered._looked_up

    def next_token(graph: Any, product: Any) -> list[str]:
        names = right(graph, product)
        for node in [node for node in graph.graph if node.op_type == "Gather" and "axis" in node.attributes]:
            if names and node.inputs[0].name.endswith(".by_channel"):
                builder = Builder(graph, before=node)
                node.replace_input_with(1, builder.node("Sub", [node.inputs[1], constant_of(builder, 1)]))
        return names

    monkeypatch.setattr(trt_gathered, "_looked_up", next_token)
    with pytest.raises(MoEdgeError, match=r"Self-test of 'KeepLarge, products -> GatheredGLU.*' failed"):
        lower("tensorrt", folders.portable("gather only, every linear layer"), tmp_path, tensorrt="10.13")


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_with_kernels_computes_what_its_graph_computes(folders: Folders, tmp_path: Path, target: str) -> None:
    """On a GPU: built for it, run by it, prefill and decode, beside ONNX Runtime on the function bodies."""
    from moedge.configs import devices
    from moedge.runtime.device.moedge_cuda import Cuda
    from moedge.runtime.engines import build

    pytest.importorskip(target.replace("-", "_"))
    cuda = Cuda()
    here = cuda.capability()
    cuda.close()
    known = {name: devices.load(name) for name in devices.names()}
    fitting = [name for name, device in known.items() if device.compute_capability == here and target in device.targets]
    if not fitting or here == "7.5":
        pytest.skip(f"{target} has no engines with kernels for compute capability {here}, or no profile has it")
    path = folders.bundle("gather only", target, experts="plugins")
    build.build(path, tmp_path / "engine", fitting[:1], max_length=64, max_prompt=24)
    reference, engine = open_engine(path), open_engine(tmp_path / "engine")
    want, got = reference.prefill(IDS[:, :20]), engine.prefill(IDS[:, :20])
    for position in range(20, 24):
        assert relative(got.logits, want.logits) < HALF
        token = IDS[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    engine.close()
