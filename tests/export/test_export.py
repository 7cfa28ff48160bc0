"""Exported bundles mean what PyTorch computes, in every phase, and refuse to be changed."""

import json
import shutil

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch

from moedge import MoEdgeError
from moedge.export import bundle
from moedge.export.graph.build import values_by_name
from moedge.export.lowering.check import selftest
from moedge.export.lowering.ort import cpu as ort_cpu
from moedge.export.lowering.ort import moe as ort_moe
from moedge.export.pipeline import export
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.engines.pytorch import TorchEngine

ALL = [f"{kind}/{target}" for kind in ("dense", "moe") for target in ("portable", "ort-cpu")]
# Two fp32 evaluations of a 2-layer model: some ten products of at most 64 terms in another order, each 64 * 2^-24.
RELATIVE = 4e-5


def relative(actual, expected):
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ALL)
def test_prefill_and_decode_match_pytorch(bundles, checkpoints, name):
    ids = np.random.default_rng(1).integers(0, 256, (1, 24))
    reference = TorchEngine(checkpoints[name.split("/")[0]], taps=True)
    engine = OrtEngine(bundles[name], taps=True)
    want, got = reference.prefill(ids[:, :20]), engine.prefill(ids[:, :20])
    for position in range(20, 24):
        assert relative(got.logits, want.logits) < RELATIVE
        for layer, experts in (want.routes or {}).items():
            np.testing.assert_array_equal(got.routes[layer], experts)
        token = ids[:, position : position + 1]
        want, got = reference.decode(token, want.cache), engine.decode(token, got.cache)
    assert relative(got.logits, want.logits) < RELATIVE


@pytest.mark.parametrize("name", ALL)
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(bundles, name):
    rng = np.random.default_rng(2)
    short, long = rng.integers(0, 256, (1, 6)), rng.integers(0, 256, (1, 9))
    ids = np.concatenate([np.concatenate([np.full((1, 3), 258), short], axis=1), long])
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    engine = OrtEngine(bundles[name])
    step = engine.prefill(ids[:, :8], mask[:, :8])
    step = engine.decode(ids[:, 8:], step.cache)
    for row, alone in enumerate((short, long)):
        single = engine.decode(alone[:, -1:], engine.prefill(alone[:, :-1]).cache)
        assert relative(step.logits[row, -1], single.logits[0, -1]) < RELATIVE


@pytest.mark.parametrize("name", ["moe/portable", "moe/ort-cpu"])
def test_every_expert_selected_is_the_dense_model(bundles, checkpoints, name):
    ids = np.random.default_rng(3).integers(0, 256, (1, 30))
    dense = TorchEngine(checkpoints["dense"]).prefill(ids).logits
    assert relative(OrtEngine(bundles[name], top_k=6).prefill(ids).logits, dense) < RELATIVE
    assert relative(OrtEngine(bundles[name]).prefill(ids).logits, dense) > 100 * RELATIVE  # and sparse it is not


@pytest.mark.parametrize("name", ["dense/portable", "moe/portable"])
def test_the_portable_file_is_valid_and_runs_in_the_reference_evaluator(bundles, checkpoints, name):
    from onnx.reference import ReferenceEvaluator

    path = bundles[name] / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    inlined = onnx.inliner.inline_local_functions(model)
    assert {node.domain for node in inlined.graph.node} <= {"", "ai.onnx"}
    ids = np.random.default_rng(4).integers(0, 256, (1, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(7)[None]}
    for value in model.graph.input[3:]:
        shape = [d.dim_value or {0: 1, 2: 0}[i] for i, d in enumerate(value.type.tensor_type.shape.dim)]
        feeds[value.name] = np.zeros(shape, np.float32)
    logits = ReferenceEvaluator(model).run(["logits"], feeds)[0]
    assert relative(logits, TorchEngine(checkpoints[name.split("/")[0]]).prefill(ids).logits) < RELATIVE


def test_inputs_and_outputs_carry_optimum_names_and_dynamic_shapes(bundles):
    graph = onnx.load(bundles["moe/portable"] / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    past = ["batch_size", 2, "past_sequence_length", 8]
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{n}.{part}": past for n in range(2) for part in ("key", "value")},
        "logits": ["batch_size", "sequence_length", 260],
        **{
            f"present.{n}.{part}": ["batch_size", 2, "past_sequence_length + sequence_length", 8]
            for n in range(2)
            for part in ("key", "value")
        },
    }


def test_lowering_fuses_every_layer_and_records_an_executed_test(bundles):
    manifest = bundle.open_bundle(bundles["moe/ort-cpu"]).manifest.document()
    assert [entry["status"] for entry in manifest["lowering"][:3]] == ["applied"] * 3
    for entry in manifest["lowering"][:3]:
        assert entry["self_test"]["passed"]
        assert 0 < entry["self_test"]["max_rel_error"] < 2e-6  # 0 would mean that nothing was compared
    graph = onnx.load(bundles["moe/ort-cpu"] / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("RoutedGLU") == kinds.count("GroupQueryAttention") == 2
    assert not [node for node in graph.node if node.domain == "moedge"]


def test_the_first_and_the_last_layer_are_executed(bundles, monkeypatch):
    graph = ir.load(bundles["moe/portable"] / "model.onnx")
    outputs = [str(node.outputs[0].name) for node in graph.graph if node.op_type == "SparseGLU"]
    compare, tested = selftest.compare_ffn, []

    def recorded(block, before, after, routed, *rest, **named):
        tested.append(routed)
        return compare(block, before, after, routed, *rest, **named)

    monkeypatch.setattr(selftest, "compare_ffn", recorded)
    ort_cpu.lower(graph, max_length=64)
    assert len(set(outputs)) > 1
    assert set(tested) == {outputs[0], outputs[-1]}


def _mutated(bundles, monkeypatch, **patches):
    """Run the MoE rewrite with a mistake in it, and its self-test."""
    for name, replacement in patches.items():
        monkeypatch.setattr(ort_moe, name, replacement)
    before = ir.load(bundles["moe/portable"] / "model.onnx")
    after = before.clone()
    edge = next(str(node.outputs[0].name) for node in before.graph if node.op_type == "SparseGLU")
    ort_moe.FuseMoE().apply(after)
    stacks = [value.const_value for value in after.graph.initializers.values() if ".gate_up" in value.name]
    assert [type(stack) for stack in stacks] == [ir.LazyTensor] * 2, "a copy of the model's experts in memory"
    return selftest.compare("MoE", before, after, [edge], 2e-6)


def test_the_self_test_passes_the_rewrite_as_it_is(bundles, monkeypatch):
    assert _mutated(bundles, monkeypatch).passed


MISTAKES = {
    "gate and up swapped": {"interleave": lambda gate, up: ort_moe_interleave(up, gate)},
    "halves stacked instead of interleaved": {"interleave": lambda gate, up: np.concatenate([gate, up], axis=1)},
    "unselected experts not hidden": {"UNSELECTED": 0.0},
}
ort_moe_interleave = ort_moe.interleave


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_self_test_catches(bundles, monkeypatch, mistake):
    assert not _mutated(bundles, monkeypatch, **MISTAKES[mistake]).passed


@pytest.mark.parametrize(("rule", "compensated"), [("scaled", True), ("softmax", False)])
def test_weighted_routers_lower_through_log_weights(tmp_path, checkpoints, rule, compensated):
    """One layer's block with non-unit weights, selection bias and compensation, before and after the rewrite."""
    from moedge.convert import modeling
    from moedge.export.trace import trace

    model, _, _ = modeling.load(checkpoints["moe"])
    generator = torch.Generator().manual_seed(5)
    for block in (module for module in model.modules() if isinstance(module, modeling.SparseFFN)):
        block.combine = rule
        block.selection_bias = 0.01 * torch.randn(6, generator=generator)
        block.scale = torch.rand(6, generator=generator) if rule == "scaled" else None
        block.compensation = 0.1 * torch.randn(6, 32, generator=generator) if compensated else None
    before = trace(model)
    after = before.clone()
    edge = [str(node.outputs[0].name) for node in before.graph if node.op_type == "SparseGLU"][-1]
    rule = ort_moe.FuseMoE()
    assert rule.refuse(after) is None
    done = rule.apply(after)
    assert done.count == 2
    assert done.taps[1].output in values_by_name(after)
    test = selftest.compare("MoE", before, after, [edge], 2e-6)
    assert test.passed
    assert test.max_rel_error > 0


def test_a_model_with_another_activation_keeps_standard_operators(bundles, monkeypatch):
    model = ir.load(bundles["moe/portable"] / "model.onnx")
    for node in model.graph:
        if node.op_type == "SparseGLU":
            node.attributes["activation"] = ir.AttrString("activation", "gelu")
    assert "SiLU" in str(ort_moe.FuseMoE().refuse(model))


def test_export_refuses_what_it_cannot_do(checkpoints, tmp_path):
    with pytest.raises(MoEdgeError, match="Unknown target 'npu'; known: portable, ort-cpu"):
        export(checkpoints["dense"], tmp_path, ["npu"], label="x")
    for kind in ("int4", "int8"):
        with pytest.raises(
            MoEdgeError, match=rf"ort-cuda-{kind} does not exist: .* ort-cuda \(float16\).*, or ort-cpu-{kind}"
        ):
            export(checkpoints["dense"], tmp_path, [f"ort-cuda-{kind}"], label="x")
    with pytest.raises(MoEdgeError, match=r"has no config\.json"):
        export(tmp_path, tmp_path / "out", ["portable"], label="x")
    (tmp_path / "full" / "portable").mkdir(parents=True)
    (tmp_path / "full" / "portable" / "mine.txt").write_text("keep")
    with pytest.raises(MoEdgeError, match="--force"):
        export(checkpoints["dense"], tmp_path / "full", ["portable"], label="x")
    assert (tmp_path / "full" / "portable" / "mine.txt").read_text() == "keep"
    assert not list(tmp_path.glob("**/.*partial"))


@pytest.fixture
def copied(bundles, tmp_path):
    return shutil.copytree(bundles["moe/portable"], tmp_path / "bundle")


def test_opening_verifies_every_byte(copied):
    assert bundle.open_bundle(copied).manifest.document()["kind"] == "moe"
    data = copied / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    with pytest.raises(MoEdgeError, match=r"model\.onnx\.data was changed or damaged"):
        bundle.open_bundle(copied)


def _rewrite_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _write_number(folder, text):
    _rewrite_manifest(folder, lambda m: m.update(x=12345.5))
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("12345.5", text))


def _nested(levels):
    """Lists in lists; the manifest around them is one level more."""
    return [_nested(levels - 1)] if levels > 1 else []


def _list_outside(manifest):
    manifest["files"]["../secret"] = {"sha256": "0" * 64, "size": 1}


def _list_long(manifest):
    manifest["files"]["a" * 256] = {"sha256": "0" * 64, "size": 1}


def _list_absolute(manifest):
    manifest["files"]["/etc/passwd"] = {"sha256": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.onnx").unlink(), "lacks model.onnx"),
        (lambda f: (f / "extra.so").write_text("x"), "extra.so, which its manifest does not list"),
        (lambda f: (f / "manifest.json").unlink(), "is not a bundle"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "cannot be read: it is not valid JSON"),
        (lambda f: _rewrite_manifest(f, lambda m: m.update(x=_nested(100))), "nested more than 100 deep"),
        (lambda f: _rewrite_manifest(f, lambda m: m.update(x=float("nan"))), "NaN is no number"),
        (lambda f: _rewrite_manifest(f, lambda m: m.update(x=-float("inf"))), "-Infinity is no number"),
        (lambda f: _write_number(f, "1e999"), "1e999 is no number"),
        (lambda f: _rewrite_manifest(f, _list_long), r"Unsafe path 'a+' in .*: File name too long"),
        (lambda f: _rewrite_manifest(f, lambda m: m.update(schema="moedge.bundle/99")), "not of schema"),
        (lambda f: _rewrite_manifest(f, lambda m: m.pop("cache")), "lacks cache"),
        (lambda f: _rewrite_manifest(f, lambda m: m.update(io=[])), "damaged: io is not"),
        (lambda f: _rewrite_manifest(f, lambda m: m.update(cache=None)), "damaged: cache is not"),
        (lambda f: _rewrite_manifest(f, lambda m: m.update(moe=3)), "damaged: moe is not"),
        (lambda f: _rewrite_manifest(f, lambda m: m["files"].update({"model.onnx": 1})), "the entry of model.onnx is"),
        (lambda f: _rewrite_manifest(f, _list_outside), "must stay inside"),
        (lambda f: _rewrite_manifest(f, _list_absolute), "must stay inside"),
    ],
)
def test_opening_refuses_a_damaged_or_hostile_bundle(copied, damage, message):
    damage(copied)
    with pytest.raises(MoEdgeError, match=message):
        bundle.open_bundle(copied)


def test_opening_refuses_a_link(copied, tmp_path):
    target = tmp_path / "elsewhere"
    shutil.move(copied / "model.onnx.data", target)
    (copied / "model.onnx.data").symlink_to(target)
    with pytest.raises(MoEdgeError, match="symbolic link"):
        bundle.open_bundle(copied)


def _attribute(node):
    node.attribute.append(onnx.helper.make_attribute("value", onnx.TensorProto(name="hidden", dims=[1], data_type=1)))
    return node.attribute[-1].t


def _subgraph(graph):
    inner = onnx.helper.make_graph([], "inner", [], [], [onnx.TensorProto(name="hidden", dims=[1], data_type=1)])
    outer = onnx.helper.make_graph([onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner)], "outer", [], [])
    graph.node.append(onnx.helper.make_node("Loop", ["n"], ["z"], body=outer))
    return graph.node[-1].attribute[0].g.node[0].attribute[0].g.initializer[0]


def _sparse(model, part):
    tensor = getattr(model.graph.sparse_initializer.add(), part)
    tensor.name, tensor.data_type = "hidden", 1 if part == "values" else 7
    return tensor


def _several(node):
    node.attribute.add(name="values", type=onnx.AttributeProto.TENSORS).tensors.add(name="hidden", dims=[1])
    return node.attribute[-1].tensors[0]


PLACES = {
    "a weight": lambda model: next(t for t in model.graph.initializer if t.external_data),
    "values of a sparse weight": lambda model: _sparse(model, "values"),
    "indices of a sparse weight": lambda model: _sparse(model, "indices"),
    "an attribute": lambda model: _attribute(model.graph.node.add(op_type="Constant")),
    "several in an attribute": lambda model: _several(model.graph.node.add(op_type="Other")),
    "a graph in a graph": lambda model: _subgraph(model.graph),
    "a function": lambda model: _attribute(model.functions[0].node.add(op_type="Constant")),
    "a graph in a function": lambda model: _subgraph(model.functions[0]),
}


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "tokenizer.bin"])
@pytest.mark.parametrize("place", PLACES)
def test_external_data_may_only_point_to_listed_files(copied, place, location):
    model = onnx.load(copied / "model.onnx", load_external_data=False)
    tensor = PLACES[place](model)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {entry.key: entry.value for entry in tensor.external_data} | {"location": location}
    del tensor.external_data[:]
    tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in entries.items())
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(MoEdgeError, match=r"must stay inside|lies in unlisted file"):
        bundle.check_external_data(copied / "model.onnx", {"model.onnx", "model.onnx.data"})
    next(entry for entry in tensor.external_data if entry.key == "location").value = "model.onnx.data"
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    bundle.check_external_data(copied / "model.onnx", {"model.onnx", "model.onnx.data"})


def test_two_exports_of_one_checkpoint_are_the_same_bytes(bundles, checkpoints, tmp_path, traced_anew):
    again = export(checkpoints["moe"], tmp_path, ["ort-cpu"], label="moe")
    for target, path in again.items():
        assert bundle.open_bundle(path).sha256 == bundle.open_bundle(bundles[f"moe/{target}"]).sha256


def test_an_engine_refuses_external_data_outside_even_when_the_hashes_agree(copied, tmp_path):
    model = onnx.load(copied / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../secret"
    (tmp_path / "secret").write_bytes(b"\0" * 1_000_000)
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").unlink()
    bundle.seal(copied, bundle.Manifest.model_validate(manifest))
    with pytest.raises(MoEdgeError, match="must stay inside"):
        OrtEngine(copied)
