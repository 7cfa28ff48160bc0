"""Peer ``openvino``: OpenVINO's CPU plugin, the cache inside the plugin, as optimum-intel and openvino-genai run it.

A folder of optimum-intel (``openvino_model.xml``) has its cache as states already; of the bundle of target ``openvino``
each ``past_key_values`` input is made the state that its ``present`` output feeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.peers.engine import PeerEngine, cannot_open, version


class OpenVinoEngine(PeerEngine):
    """A folder of optimum-intel or a bundle for OpenVINO; see :class:`moedge.runtime.peers.engine.PeerEngine`.

    It computes in float32, not in the bfloat16 that the plugin would take by default where the processor has it; the
    type of its cache is the plugin's own choice.

    Raises:
        MoEdgeError: the folder cannot be opened.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, max_length: int | None = None) -> None:
        super().__init__(path, threads=threads, max_length=max_length)
        import openvino

        core, self._tensor = openvino.Core(), openvino.Tensor
        try:
            model = core.read_model(_graph(self._path))
            self._empty = _make_stateful(model)
            self.bits, dtype = _weights(model)
            hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            compiled = core.compile_model(model, "CPU", hints | {"INFERENCE_NUM_THREADS": self._threads})
            self._request: Any = compiled.create_infer_request()
            vocabulary = compiled.output("logits").partial_shape[-1].get_length()
        except RuntimeError as error:
            raise cannot_open("openvino", self._path, error) from error
        self._inputs = {name for value in compiled.inputs for name in value.names}
        self._texts = 0
        self.info = self._info("openvino", version("openvino"), dtype, int(vocabulary), longest=None)

    def close(self) -> None:
        """Free the request and with it the model."""
        self._request = None

    def _begin(self, ids: np.ndarray) -> tuple[np.ndarray, Any]:
        self._request.reset_state()
        for state in self._request.query_state():
            if state.name in self._empty:  # begins without rows, and the graph takes their number from here
                _, heads, _, size = self._empty[state.name]
                state.state = self._tensor(np.zeros((len(ids), heads, 0, size), dtype=np.float32))
        self._texts += 1
        return self._go_on(ids, (self._texts, 0))

    def _go_on(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        number, before = state
        rows, new = ids.shape
        places = np.arange(before, before + new, dtype=np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, before + new), dtype=np.int64),
            "position_ids": np.broadcast_to(places, ids.shape),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        wanted = {name: np.ascontiguousarray(value) for name, value in feeds.items() if name in self._inputs}
        # The request's buffers are written again by the next call.
        logits = self._request.infer(wanted)["logits"][:, -1:].astype(np.float32)
        return logits, (number, before + new)

    def _holds(self, state: Any) -> bool:
        return bool(state[0] == self._texts)


def _graph(folder: Path) -> Path:
    """The file to read; of a MoEdge bundle only that of a target for OpenVINO, whose hashes are checked."""
    from moedge.export.manifest import MANIFEST

    if (folder / MANIFEST).is_file():
        from moedge.export import targets
        from moedge.export.bundle import open_bundle

        bundle = open_bundle(folder)
        row = targets.known(bundle.manifest.target)
        if row is None or row.family != "openvino":
            raise MoEdgeError(
                f"Peer openvino cannot open {folder}, a bundle for {bundle.manifest.target}; export it with "
                "`moedge export --target openvino`."
            )
        return Path(bundle.model_path)
    named = folder / "openvino_model.xml"
    return named if named.is_file() else folder / "model.onnx"


def _make_stateful(model: Any) -> dict[str, list[int]]:
    """Turn each pair of ``past_key_values.X`` and ``present.X`` of a model into a state, in place.

    Returns:
        Name of each of these states -> its shape [B, G, T, D], with -1 for what changes.
    """
    from openvino._offline_transformations import apply_make_stateful_transformation

    pairs: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    for value in model.inputs:
        name = next((name for name in value.names if name.startswith("past_key_values.")), None)
        if name is not None:
            pairs[name] = name.replace("past_key_values.", "present.")
            lengths = [-1 if size.is_dynamic else size.get_length() for size in value.partial_shape]
            shapes[name + pairs[name]] = lengths  # how the transformation calls a state
    if pairs:
        apply_make_stateful_transformation(model, pairs)
    return shapes


def _weights(model: Any) -> tuple[int | None, str]:
    """Bits of the integer type that holds most weights (None: a floating one does), and that type."""
    counts: dict[str, int] = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1:
            kind = node.get_element_type().get_type_name()
            counts[kind] = counts.get(kind, 0) + int(np.prod(list(node.shape)))
    kind = max(counts, key=lambda name: counts[name], default="f32")
    floats = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    return (None, floats[kind]) if kind in floats else (int(kind.strip("iu")), f"int{kind.strip('iu')} weights")
