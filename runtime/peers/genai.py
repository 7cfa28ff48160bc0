"""Peer ``genai``: a folder in onnxruntime-genai.

A generator is made for each text, as a program that answers requests does. Its tokens are given, not drawn by its own
search: on SmolLM2-135M in int4 both take as long (median CPU time of 60 tokens 15.3 and 14.8 ms, least 11.9 and 11.8).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moedge._files import read_json
from moedge.runtime.peers.engine import PeerEngine, cannot_open, version


class GenaiEngine(PeerEngine):
    """A folder with genai_config.json; see :class:`moedge.runtime.peers.engine.PeerEngine`.

    One row at a time: a generator of several rows takes tokens from outside only once.

    Raises:
        MoEdgeError: the folder cannot be opened.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, max_length: int | None = None) -> None:
        super().__init__(path, threads=threads, max_length=max_length)
        import onnxruntime_genai as genai

        self._genai = genai
        facts = read_json(self._path / "genai_config.json", "make the folder again")
        try:
            config = genai.Config(str(self._path))
            session = {"intra_op_num_threads": self._threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._model: Any = genai.Model(config)
            vocabulary, longest = int(facts["model"]["vocab_size"]), facts["model"].get("context_length")
            graph = str(facts["model"]["decoder"]["filename"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise cannot_open("genai", self._path, error) from error
        self.bits, dtype = weights_of(self._path / graph)
        self.info = self._info("genai", version("onnxruntime-genai"), dtype, vocabulary, longest=longest, max_batch=1)

    def close(self) -> None:
        """Free the session."""
        self._model = None

    def _begin(self, ids: np.ndarray) -> tuple[np.ndarray, Any]:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._max_length, do_sample=False)
        return self._go_on(ids, self._genai.Generator(self._model, parameters))

    def _go_on(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        state.append_tokens(ids.astype(np.int32))
        logits = np.asarray(state.get_logits(), dtype=np.float32)
        return logits[:, -1:].reshape(len(ids), 1, -1), state


def weights_of(graph: Path) -> tuple[int | None, str]:
    """Bits of the integer weights of an ONNX graph (None: it has none), and its type in words."""
    try:
        import onnx
    except ImportError:
        return None, "not told (needs the onnx package)"
    model = onnx.load(graph, load_external_data=False).graph
    found = {
        attribute.i
        for node in model.node
        for attribute in node.attribute
        if node.op_type in _QUANTISED and attribute.name in ("bits", "expert_weight_bits")
    }
    if found:
        return min(found), " and ".join(f"int{bits}" for bits in sorted(found)) + " weights"
    types = [tensor.data_type for tensor in model.initializer if len(tensor.dims) == 2]
    kind = max(set(types), key=types.count) if types else onnx.TensorProto.FLOAT
    return None, _TYPES.get(onnx.TensorProto.DataType.Name(kind), "not told")


_QUANTISED = ("MatMulNBits", "QMoE", "GatherBlockQuantized")
_TYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
