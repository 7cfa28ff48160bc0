"""What other programs read in a bundle: family, tokenizer, genai's description, and the type of every value."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest

from moedge.export import bundle, loaders
from moedge.export.graph import shapes
from moedge.export.manifest import CacheFacts, ModelFacts
from moedge.export.pipeline import export
from moedge.runtime.engines.ort import OrtEngine
from moedge.runtime.text.generate import generate
from moedge.runtime.text.tokenizer import Tokenizer

ALL = [f"{kind}/{target}" for kind in ("dense", "moe") for target in ("portable", "ort-cpu")]
IDS = np.random.default_rng(1).integers(0, 256, (1, 12))


@pytest.fixture(scope="module")
def openvino(checkpoints: dict[str, Path], tmp_path_factory: Any) -> dict[str, Path]:
    made = export(checkpoints["moe"], tmp_path_factory.mktemp("openvino"), ["openvino"], label="moe")
    return made


def test_a_bundle_names_the_family_that_other_loaders_know(bundles, checkpoints):
    from transformers import AutoConfig, AutoTokenizer

    before = json.loads((checkpoints["moe"] / "config.json").read_text())
    assert before["model_type"] == "moedge_llama", "the checkpoint stays ours"
    for target in ("portable", "ort-cpu"):
        config = AutoConfig.from_pretrained(bundles[f"moe/{target}"])
        assert (type(config).__name__, config.architectures) == ("LlamaConfig", ["LlamaForCausalLM"])
        facts = bundle.open_bundle(bundles[f"moe/{target}"]).manifest.document()["model"]
        assert config.num_key_value_heads == facts["num_kv_heads"]
        # transformers 4 knows the class by this name only.
        described = json.loads((bundles[f"moe/{target}"] / "tokenizer_config.json").read_text())
        assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert described["model_input_names"] == ["input_ids", "attention_mask"], "there it returns token types, too"
        text = "Grüße, 世界!"
        theirs = AutoTokenizer.from_pretrained(bundles[f"moe/{target}"])(text)["input_ids"]
        assert theirs == Tokenizer(bundles[f"moe/{target}"]).encode(text)


@pytest.mark.parametrize("name", ALL)
def test_genai_config_describes_the_graph_that_it_lies_beside(bundles, name):
    folder = bundles[name]
    manifest = bundle.open_bundle(folder).manifest.document()
    described = json.loads((folder / "genai_config.json").read_text())
    decoder = described["model"]["decoder"]
    for side in ("inputs", "outputs"):
        named = [
            template % layer if "%d" in template else template
            for template in decoder[side].values()
            for layer in range(decoder["num_hidden_layers"] if "%d" in template else 1)
        ]
        assert sorted(named) == sorted(manifest["io"][side])
    cache = next(v for v in onnx.load(folder / decoder["filename"]).graph.input if v.name == "past_key_values.0.key")
    dims = [dim.dim_value for dim in cache.type.tensor_type.shape.dim]
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (dims[1], dims[3])
    assert described["model"]["eos_token_id"] == [257]
    assert described["model"]["context_length"] == described["search"]["max_length"] == 256
    assert described["search"]["past_present_share_buffer"] == name.endswith("ort-cpu")


def test_genai_runs_operators_of_ours(bundles):
    og = pytest.importorskip("onnxruntime_genai")
    folder = bundles["moe/ort-cpu"]
    operators = bundle.open_bundle(folder).manifest.operators
    if operators is None:
        pytest.skip("needs g++")
    described = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert described["custom_ops_library"] == operators.library
    assert "custom_ops_library" not in (bundles["dense/ort-cpu"] / "genai_config.json").read_text()
    model, tokenizer, text = og.Model(str(folder)), Tokenizer(folder), "The capital of France is"
    prompt = tokenizer.encode(text)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 16)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    engine = OrtEngine(folder, threads=1)
    ours = generate(engine, tokenizer, text, max_new_tokens=16).ids
    engine.close()
    assert generator.get_sequence(0)[len(prompt) :].tolist() == list(ours)
    assert len(set(ours)) > 4


CONCAT = CacheFacts(kind="concat")


@pytest.mark.parametrize("pad", [None, -1])  # Llama 2 says -1
def test_a_model_without_end_and_padding_still_gets_what_genai_requires(pad, tmp_path):
    facts: dict[str, Any] = {"model_type": "llama", "eos_token_ids": [], "bos_token_id": None, "pad_token_id": None}
    sizes = ("vocab_size", "hidden_size", "head_dim", "num_attention_heads", "num_kv_heads", "num_layers")
    facts |= dict.fromkeys((*sizes, "max_position_embeddings"), 8)
    facts["pad_token_id"] = pad
    described = loaders.genai_config(tmp_path, ModelFacts(**facts), CONCAT)["model"]
    assert described["pad_token_id"] == 0
    assert "bos_token_id" not in described
    assert "eos_token_id" not in described


def genai(folder: Path, generation: dict[str, Any], **facts: Any) -> dict[str, Any]:
    sizes = ("hidden_size", "head_dim", "num_attention_heads", "num_kv_heads", "num_layers")
    model: dict[str, Any] = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 8192} | facts
    model |= {"eos_token_ids": [3, 4, 999], "bos_token_id": 1, "pad_token_id": 0, **dict.fromkeys(sizes, 8)}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return loaders.genai_config(folder, ModelFacts(**model), CONCAT)


def test_genai_gets_what_the_model_asks_of_the_search(tmp_path):
    asked = {
        **{"repetition_penalty": 1.1, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_length": 5},
        **{"no_repeat_ngram_size": 3, "suppress_tokens": [5], "do_sample": True, "max_length": 20},
    }
    described = genai(tmp_path, asked)
    search = {key: value for key, value in asked.items() if key not in ("suppress_tokens", "do_sample", "max_length")}
    assert described["search"] == {
        **{"do_sample": False, "max_length": 8192, "num_beams": 1, "past_present_share_buffer": False},
        **search,
    }
    assert described["model"]["eos_token_id"] == [3, 4], "ids outside of the vocabulary cannot come"
    assert genai(tmp_path, {})["search"].keys() & search.keys() == set()


@pytest.mark.parametrize(
    ("facts", "kind", "length"),
    [
        ({"model_type": "phi3", "rope_boundary": 4096}, "phi3", 8192),  # genai reads these again at 4,097 tokens
        ({"model_type": "phi3", "rope_boundary": 2048}, "decoder", 2048),
        ({"model_type": "llama", "rope_boundary": 4096}, "decoder", 4096),
        ({"model_type": "llama", "rope_boundary": 9000}, "decoder", 8192),
        ({"model_type": "phi3", "rope_boundary": None}, "decoder", 8192),
        ({"model_type": "phi3"}, "decoder", 8192),
    ],
)
def test_genai_passes_no_boundary_of_longrope_that_it_does_not_know(facts, kind, length, tmp_path):
    described = genai(tmp_path, {}, **facts)
    assert described["model"]["type"] == kind
    assert described["model"]["context_length"] == described["search"]["max_length"] == length


@pytest.mark.parametrize("name", [*ALL, "openvino"])
def test_every_value_of_a_bundle_has_its_type_and_shape(bundles, openvino, values_match_their_shapes, name):
    """int8 and int4: quantized/. ort-cuda: test_ort_cuda.py. TensorRT: test_tensorrt.py."""
    assert values_match_their_shapes(openvino[name] if name == "openvino" else bundles[name]) > 40


@pytest.mark.parametrize("name", ["dense/portable", "moe/portable"])
def test_what_functions_hold_is_inferred_by_onnx_when_inlined(bundles, name):
    """A viewer shows a function's body once, without types."""
    inlined = onnx.inliner.inline_local_functions(onnx.load(bundles[name] / "model.onnx"))
    graph = onnx.shape_inference.infer_shapes(inlined, data_prop=True).graph
    ranked = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type and value.type.tensor_type.HasField("shape")
    }
    made = [name for node in graph.node for name in node.output if name]
    assert len(made) > 110
    assert [name for name in made if name not in ranked] == []


def _unknown(model: ir.Model) -> list[str]:
    """Values of the main graph without a type or a rank, as ``operator: name``."""
    return [
        f"{node.op_type}: {output.name}"
        for node in model.graph
        for output in node.outputs
        if output.name and (output.dtype is None or output.shape is None)
    ]


def test_types_are_inferred_through_contrib_operators(bundles):
    graph = ir.load(bundles["moe/ort-cpu"] / "model.onnx")
    want = {value.name: (value.dtype, value.shape) for node in graph.graph for value in node.outputs if value.name}
    borders = {"GroupQueryAttention"}  # its cache comes from the trace: present = past + new
    for node in graph.graph:
        for value in node.outputs if node.op_type not in borders else ():
            if not value.is_graph_output():
                value.shape = value.type = None
    assert len(_unknown(graph)) > 40
    shapes.complete(graph)
    assert _unknown(graph) == []
    for node in graph.graph:
        for value in node.outputs:
            if value.name:
                assert (value.dtype, len(value.shape)) == (want[value.name][0], len(want[value.name][1]))
                static = [(a, b) for a, b in zip(value.shape, want[value.name][1], strict=True) if isinstance(a, int)]
                assert all(a == b for a, b in static)


def test_openvino_gets_standard_operators_without_functions_and_the_same_numbers(openvino):
    folder = openvino["openvino"]
    model = onnx.load(folder / "model.onnx")
    assert not model.functions
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    rewrite = bundle.open_bundle(folder).manifest.document()["lowering"][0]
    assert rewrite["self_test"]["passed"]
    assert rewrite["nodes"] == 6  # two layers of attention, route and experts
    one, two = (OrtEngine(openvino[target], taps=True) for target in ("portable", "openvino"))
    want, got = one.prefill(IDS), two.prefill(IDS)
    for _ in range(2):
        # The runtime inlines the functions itself, so it is the same arithmetic.
        np.testing.assert_array_equal(got.logits, want.logits)
        for layer, experts in want.routes.items():
            np.testing.assert_array_equal(got.routes[layer], experts)
        want, got = one.decode(IDS[:, :1], want.cache), two.decode(IDS[:, :1], got.cache)
