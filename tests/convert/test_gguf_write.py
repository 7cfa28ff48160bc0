"""A dense checkpoint becomes the GGUF file that llama.cpp's own converter would write, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moedge import MoEdgeError
from moedge.convert.sources import gguf_files, gguf_write

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_sizes_are_those_of_the_converter(
    case: str, tiny_model: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """The converter is played by tests/convert/conftest.py, which takes its names from the gguf package."""
    model = tiny_model(**CASES[case])
    model.save_pretrained(tmp_path / "dense")
    gguf_write.build(tmp_path / "dense", tmp_path / "ours.gguf", "F32")
    ours = gguf_files.read(tmp_path / "ours.gguf")
    theirs = gguf_files.read(write_gguf(tmp_path / "theirs.gguf", model))
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        np.testing.assert_array_equal(gguf_files.values(ours, name), gguf_files.values(theirs, name))
    start = f"{ours.architecture}."
    wanted = {key: value for key, value in theirs.metadata.items() if key.startswith(start) and "sliding" not in key}
    assert {key: ours.metadata.get(key) for key in wanted} == wanted
    assert len(ours.metadata["tokenizer.ggml.tokens"]) == model.config.vocab_size


def test_matrices_are_quantised_and_vectors_are_not(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(hidden=64, width=64)
    model.save_pretrained(tmp_path / "dense")
    gguf_write.build(tmp_path / "dense", tmp_path / "made.gguf", "Q8_0")
    made = gguf_files.read(tmp_path / "made.gguf")
    assert made.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    kinds = {len(tensor.shape): tensor.tensor_type for tensor in made.tensors.values()}
    assert kinds == {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType.Q8_0}
    want = model.state_dict()["model.layers.0.mlp.down_proj.weight"].numpy()
    got = gguf_files.values(made, "blk.0.ffn_down.weight")
    # A block of 32 has one scale, stored in half precision: half a step of the largest value's 127th.
    assert np.abs(got - want).max() <= np.abs(want).max() / 127 * (0.5 + 127 * 2.0**-11)


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("mistral", ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters"]),
        ("qwen3", ["head_dim", "num_key_value_heads"]),
    ],
)
def test_sizes_that_config_json_leaves_out_are_those_of_transformers(
    family: str, left_out: list[str], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    made_of = AutoConfig.for_model(family, **sizes, num_attention_heads=32, sliding_window=None)
    AutoModelForCausalLM.from_config(made_of).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in left_out}))
    # What Mistral's own programs read, beside the weights that transformers reads.
    save_file({"layers.0.attention.wq.weight": np.zeros((4, 4), np.float32)}, tmp_path / "consolidated.safetensors")
    gguf_write.build(tmp_path, tmp_path / "made.gguf", "F32")
    made = gguf_files.read(tmp_path / "made.gguf")
    names = {
        "num_key_value_heads": "attention.head_count_kv",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "context_length",
        "head_dim": "attention.key_length",
    }
    for key, name in names.items():
        if key in left_out:
            assert made.metadata[f"{made.architecture}.{name}"] == pytest.approx(getattr(made_of, key))


def test_a_window_that_only_the_config_class_names_is_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model("mistral", layers=1, sliding_window=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoEdgeError, match="a sliding window of 4096 is not written"):
        gguf_write.build(tmp_path, tmp_path / "made.gguf", "F32")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"family": "gemma2"}, r"a gemma2 model is not written as GGUF here \(known: llama, mistral, qwen2, qwen3\)"),
        ({"family": "mistral", "sliding_window": 64}, "a sliding window of 64 is not written as GGUF here"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "a scaled rotary embedding is not written as GGUF here",
        ),
    ],
)
def test_what_would_be_another_model_is_refused(
    more: dict[str, Any], said: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model(**more).save_pretrained(tmp_path / "dense")
    with pytest.raises(MoEdgeError, match=said):
        gguf_write.build(tmp_path / "dense", tmp_path / "made.gguf", "F32")
    assert not (tmp_path / "made.gguf").exists()


def test_a_width_without_whole_blocks_is_refused(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    tiny_model(hidden=32, width=48).save_pretrained(tmp_path / "dense")
    with pytest.raises(MoEdgeError, match=r"cannot be stored as Q4_0: .*; take F16"):
        gguf_write.build(tmp_path / "dense", tmp_path / "made.gguf", "Q4_0")
