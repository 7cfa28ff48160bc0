"""Peer ``llama.cpp``: a GGUF file in llama-cpp-python.

Of the packages with llama.cpp in them this is the one whose interface is kept, and it is compiled where it is
installed, for that processor: prebuilt ones stop at AVX2 and would show llama.cpp slower than it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from moedge.runtime.peers.engine import PeerEngine, cannot_open, version


class LlamaCppEngine(PeerEngine):
    """A GGUF file; see :class:`moedge.runtime.peers.engine.PeerEngine`. One row; it holds one text at a time.

    Raises:
        MoEdgeError: the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, max_length: int | None = None) -> None:
        super().__init__(path, threads=threads, max_length=max_length)
        import llama_cpp

        self._api = llama_cpp
        try:
            self._llama: Any = llama_cpp.Llama(
                str(self._path),
                n_ctx=self._max_length,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                n_gpu_layers=0,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise cannot_open("llama.cpp", self._path, error) from error
        self._vocabulary = int(self._llama.n_vocab())
        self._texts = 0  # begun so far: it holds the last one
        self.bits, dtype = self._weights()
        longest = int(llama_cpp.llama_model_n_ctx_train(self._llama.model))
        self.info = self._info(
            "llama.cpp", version("llama-cpp-python"), dtype, self._vocabulary, longest=longest, max_batch=1
        )

    def close(self) -> None:
        """Free the weights and the cache."""
        self._llama.close()

    def _begin(self, ids: np.ndarray) -> tuple[np.ndarray, Any]:
        self._llama.reset()
        self._texts += 1
        return self._go_on(ids, self._texts)

    def _go_on(self, ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        self._llama.eval(ids[0].tolist())
        last = self._api.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(last, shape=(self._vocabulary,)).astype(np.float32)[None, None], state

    def _holds(self, state: Any) -> bool:
        return bool(state == self._texts)

    def _weights(self) -> tuple[int | None, str]:
        """Bits of most of the weights, and their type with the mean bits a weight, scales included."""
        import ctypes

        said = ctypes.create_string_buffer(256)
        model = self._llama.model
        self._api.llama_model_desc(model, said, 256)
        kind = said.value.decode(errors="replace").split("B ")[-1].split("M ")[-1].removeprefix("all ").strip()
        mean = 8 * self._api.llama_model_size(model) / max(1, self._api.llama_model_n_params(model))
        found = re.search(r"I?Q(\d)", kind)
        return int(found[1]) if found else None, f"{kind}, {mean:.1f} bits a weight"
