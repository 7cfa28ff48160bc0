"""Open bundles with optimum, onnxruntime-genai and OpenVINO, in the environment of requirements.txt, without moedge.

usage: python check.py WORK.json RESULT.json

WORK.json holds ``bundles``: each with ``path``, ``loaders``, ``prompts`` (text and ids), ``new_tokens``, ``ends`` (ids
that end a text), ``pad`` (id), ``steps`` (a prompt and the tokens to feed after it), ``logits`` (where to write theirs)
and ``cache`` (key/value heads and their size). RESULT.json gets, for each loader, what it computed or its error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 1
"""Sums of the quantised kernels depend on it, choices of experts on those, and with them the text."""


def optimum(bundle: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of ``ORTModelForCausalLM.generate``: each prompt alone, then all in one left-padded batch."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle["path"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    model = ORTModelForCausalLM.from_pretrained(bundle["path"], session_options=options)
    pad = bundle["pad"]

    def generate(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
        made = model.generate(**inputs, max_new_tokens=bundle["new_tokens"], do_sample=False, pad_token_id=pad)
        width = inputs["input_ids"].shape[1]
        return [until_end(row, bundle["ends"]) for row in made[:, width:].tolist()]

    def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    texts = [prompt["text"] for prompt in bundle["prompts"]]
    taken = [model.num_key_value_heads, model.embed_size_per_head]
    # optimum-onnx 0.1.0 takes both from the family's name and is wrong for some (docs/interop.md names this remedy).
    model.num_key_value_heads, model.embed_size_per_head = bundle["cache"]
    return {
        "cache": taken,
        "encoded": [tokenizer(text)["input_ids"] for text in texts],
        "alone": [generate(tokenizer(text, return_tensors="pt"))[0] for text in texts],
        "batch": generate(batch([prompt["ids"] for prompt in bundle["prompts"]])),
    }


def genai(bundle: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of onnxruntime-genai's generator with the settings of the bundle's own genai_config.json."""
    import onnxruntime_genai as og

    config = og.Config(bundle["path"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)

    def generate(row: list[int]) -> list[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(row) + bundle["new_tokens"])
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([row], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return until_end([int(token) for token in generator.get_sequence(0)[len(row) :]], bundle["ends"])

    return {
        "encoded": [tokenizer.encode(prompt["text"]).tolist() for prompt in bundle["prompts"]],
        "alone": [generate(prompt["ids"]) for prompt in bundle["prompts"]],
    }


def openvino(bundle: dict[str, Any]) -> dict[str, Any]:
    """OpenVINO's CPU plugin in float32: logits of each step with its own cache, and greedy tokens of each prompt."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(Path(bundle["path"]) / "model.onnx")
    # The plugin computes in bfloat16 by default where the processor has it.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [value.get_any_name() for value in model.inputs]
    past = {name: model.input(name).partial_shape for name in names if name.startswith("past_key_values.")}
    empty = {
        name: np.zeros((1, shape[1].get_length(), 0, shape[3].get_length()), np.float32) for name, shape in past.items()
    }

    def step(ids: list[int], length: int, cache: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, length + len(ids)), np.int64),
            "position_ids": np.arange(length, length + len(ids), dtype=np.int64)[None],
        }
        result = compiled({**feeds, **cache})
        # The request's buffers are written again by the next call.
        return result["logits"][0].copy(), {
            name: result[name.replace("past_key_values.", "present.")].copy() for name in cache
        }

    def generate(row: list[int]) -> list[int]:
        made: list[int] = []
        logits, cache = step(row, 0, empty)
        while len(made) < bundle["new_tokens"] and (token := int(logits[-1].argmax())) not in bundle["ends"]:
            made.append(token)
            logits, cache = step([token], len(row) + len(made) - 1, cache)
        return made

    seen, length, cache = [], 0, empty
    for ids in bundle["steps"]:
        logits, cache = step(ids, length, cache)
        seen.append(logits)
        length += len(ids)
    target = Path(bundle["logits"])
    np.save(target, np.concatenate(seen))
    return {"logits": str(target), "alone": [generate(prompt["ids"]) for prompt in bundle["prompts"]]}


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens before the one that ends the text: some programs keep that one or pad after it."""
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)


LOADERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "optimum": optimum,
    "genai": genai,
    "openvino": openvino,
}


def main(work: Path, result: Path) -> None:
    found: dict[str, Any] = {"versions": {}, "bundles": {}}
    for name in ("optimum-onnx", "optimum", "transformers", "onnxruntime", "onnxruntime-genai", "openvino"):
        found["versions"][name] = version(name)
    for bundle in json.loads(work.read_text())["bundles"]:
        entry = found["bundles"][bundle["name"]] = {}
        for loader in bundle["loaders"]:
            try:
                entry[loader] = LOADERS[loader](bundle)
            except Exception as error:  # each program has its own; the report names it
                entry[loader] = {"error": f"{type(error).__name__}: {error}"}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
