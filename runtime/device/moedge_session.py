"""Run an engine: two execution contexts, keys and values in two halves of one buffer that take turns.

Shapes: B batch, S new tokens, P past tokens, L = P + S, G key/value heads, D head size, V vocabulary, T = B*S.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device.moedge_cuda import Buffer, Cuda
    from moedge.runtime.device.moedge_trt import DECODE, PREFILL, DeviceError, load_tensorrt, logger_class
else:  # in an archive the files lie side by side
    from moedge_cuda import Buffer, Cuda
    from moedge_trt import DECODE, PREFILL, DeviceError, load_tensorrt, logger_class


ALIGNMENT = 256
"""Bytes: what TensorRT asks of the address of every tensor (IExecutionContext::setTensorAddress)."""
LAUNCH = ("Launch", "moedge")
"""Name and namespace of the plugin library's only plugin."""


def _creators(trt: Any) -> set[tuple[str, str]]:
    return {(creator.name, creator.plugin_namespace) for creator in trt.get_plugin_registry().all_creators}


_loaded: str | None = None
"""File of the plugin library that this process loaded; TensorRT loads one, once."""


def _plugins_reason() -> str:
    """Why a plugin failed, if one did: TensorRT's own log says only that. Libraries of older engines do not tell."""
    if _loaded is None:
        return ""
    try:
        tell = ctypes.CDLL(_loaded).moedgeLaunchReason
    except (OSError, AttributeError):
        return ""
    tell.restype = ctypes.c_char_p
    return str(tell().decode(errors="replace"))


SIZES = {"float16": 2, "bfloat16": 2}
"""Bytes of a number of the cache. They stay on the device, so numpy, which has no bfloat16, never sees them."""
Taps = dict[int, np.ndarray]
"""An array by layer: the experts that it selected, or what its router read."""


class Cache:
    """Keys and values of one batch, in two halves that take turns as past and present, and its ids and mask [B, P]."""

    def __init__(self, buffer: Buffer, slot: int, ids: np.ndarray, mask: np.ndarray) -> None:
        self.buffer, self.slot, self.ids, self.mask = buffer, slot, ids, mask
        self.turn = 0

    def past(self, index: int, count: int) -> int:
        """Address of tensor ``index`` of ``count`` in the half that holds the past."""
        return self.buffer.address + (self.turn * count + index) * self.slot

    def present(self, index: int, count: int) -> int:
        """Address of the same tensor in the other half."""
        return self.buffer.address + ((1 - self.turn) * count + index) * self.slot


class Session:
    """A deserialized engine with its two execution contexts.

    Args:
        plan: serialized engine, its hash already checked (deserializing is running code).
        facts: what ``moedge build`` or ``build_engine.py`` recorded beside it: ``target``, ``model``, ``profiles``
            (``max_length``, ``max_prompt``, ``batch``), ``taps``, ``dtype`` (of weights and cache; float16 by default).
        library: file of the plugin library that the engine needs, its hash already checked, if it needs one.

    Raises:
        DeviceError: no GPU, no TensorRT, or the engine was built for another device or version.
    """

    def __init__(self, plan: bytes, facts: dict[str, Any], *, library: str | None = None) -> None:
        self.cuda = Cuda()
        self.facts, self.model, self.limits = facts, facts["model"], facts["profiles"]
        trt = load_tensorrt(facts["target"])
        self.version = f"{facts['target']} {trt.__version__}"
        self._log = logger_class(trt)()
        if library is not None and LAUNCH not in _creators(trt):
            trt.get_plugin_registry().load_library(library)
            global _loaded
            _loaded = library
            if LAUNCH not in _creators(trt):
                raise DeviceError(f"{self.version} does not load the plugin library {library}; build the engine again.")
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise DeviceError(
                f"{self.version} cannot load this engine on a GPU of compute capability {self.cuda.capability()}: "
                f"{self._reason()}"
            )
        self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._past = [name for name in self._names if name.startswith("past_key_values.")]
        self.dtype = str(facts.get("dtype", "float16"))
        if self.dtype not in SIZES:
            raise DeviceError(f"This engine is of type {self.dtype}; known: {', '.join(SIZES)}. Build it again.")
        # A bfloat16 graph gives float32 logits.
        self._given = np.dtype("float16" if self.dtype == "float16" else "float32")
        self._check_types(trt)
        self._contexts = []
        for profile in (PREFILL, DECODE):
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream.value or 0):
                raise DeviceError(
                    f"{self.version}: no execution context for profile {profile}: "
                    f"{_plugins_reason() or 'is there enough memory?'}"
                )
            self._contexts.append(context)
        self.cuda.synchronize()
        rows = self.limits["batch"] * self.limits["max_prompt"]
        self._logits = self.cuda.allocate(rows * self.model["vocab_size"] * self._given.itemsize)
        self._taps = {int(layer): tap for layer, tap in facts["taps"].items()}
        self._indices = {layer: self.cuda.allocate(rows * tap["top_k"] * 4) for layer, tap in self._taps.items()}
        self._reads = {}  # what each layer's router reads, [T, H]: name, type and place, of engines that show it
        for layer, tap in self._taps.items():
            if "reads" in tap:
                kind = np.dtype(tap["reads_dtype"])
                buffer = self.cuda.allocate(rows * self.model["hidden_size"] * kind.itemsize)
                self._reads[layer] = (tap["reads"], kind, buffer)
        self._inputs = {
            name: self.cuda.allocate(self.limits["batch"] * self.limits["max_length"] * 8)
            for name in ("input_ids", "attention_mask", "position_ids")
        }

    def start(
        self, ids: np.ndarray, mask: np.ndarray, *, last: bool = False, reads: list[Taps] | None = None
    ) -> tuple[np.ndarray, Taps, Cache]:
        """Read a prompt int64 [B, S] with its mask [B, S], in pieces where one call is too short; see :meth:`step`.

        Raises:
            DeviceError: as for :meth:`step`, or a prompt that would be read with short and long factors of longrope.
        """
        self._check_pieces(mask)
        per_row = self.model["num_kv_heads"] * self.limits["max_length"] * self.model["head_dim"] * SIZES[self.dtype]
        slot = -(-len(ids) * per_row // ALIGNMENT) * ALIGNMENT
        cache = Cache(self.cuda.allocate(2 * len(self._past) * slot), slot, ids[:, :0], mask[:, :0])
        return self._read(ids, cache, mask, last=last, reads=reads)

    def step(
        self,
        ids: np.ndarray,
        cache: Cache,
        mask: np.ndarray | None = None,
        *,
        last: bool = False,
        reads: list[Taps] | None = None,
    ) -> tuple[np.ndarray, Taps, Cache]:
        """Run ``ids`` int64 [B, S] after ``cache``, in pieces where one call is too short.

        Args:
            ids: tokens.
            cache: what :meth:`start` or this returned.
            mask: int64 [B, S] of the new tokens, 0 for padding on the left; ones by default.
            last: return the logits of the last position only. The engine computes all of them, but for a prompt the
                copy to the host costs more than that.
            reads: a list to append to, of this call: what each layer's router read, float32 [T, H] by layer, of engines
                that show it (``reads`` in their taps).

        Returns:
            Logits float32 [B, S or 1, V], selected experts int32 [T, k] by layer (engines built with taps), the cache.

        Raises:
            DeviceError: no token, more rows or tokens than the profiles allow, or the engine fails.
        """
        mask = np.ones(ids.shape, np.int64) if mask is None else mask
        whole = np.concatenate([cache.mask, mask], axis=1)
        past = cache.mask.shape[1]
        if past and self._crosses(whole, past):
            text = np.concatenate([cache.ids, ids], axis=1)
            del cache.buffer  # free before the same is allocated again
            return self._again(text, whole, ids.shape[1], last=last, reads=reads)
        return self._read(ids, cache, mask, last=last, reads=reads)

    def _read(
        self, ids: np.ndarray, cache: Cache, mask: np.ndarray, *, last: bool, reads: list[Taps] | None
    ) -> tuple[np.ndarray, Taps, Cache]:
        """Run int64 [B, S] in as few calls as the profiles allow; arguments and result as in :meth:`step`."""
        length, longest, past = ids.shape[1], self.limits["max_prompt"], cache.mask.shape[1]
        logits: list[np.ndarray] = []
        routes: list[Taps] = []
        parts: list[Taps] | None = None if reads is None else []
        done = 0
        while done < length or not logits:
            # Beyond what the prefill profile has as a past, the decode profile takes one token at a time.
            new = min(longest, length - done) if past + done <= self.limits["max_length"] - longest else 1
            piece = slice(done, done + new)
            part, chosen = self._call(ids[:, piece], cache, mask[:, piece], last=last, reads=parts)
            logits, routes = [*([] if last else logits), part], [*routes, chosen]
            done += max(new, 1)
        if reads is not None and parts is not None:
            reads.append(_joined(parts, len(ids)))
        return logits[0] if len(logits) == 1 else np.concatenate(logits, axis=1), _joined(routes, len(ids)), cache

    def _call(
        self, ids: np.ndarray, cache: Cache, mask: np.ndarray, *, last: bool, reads: list[Taps] | None
    ) -> tuple[np.ndarray, Taps]:
        """Run int64 [B, S] in one call; the cache then holds them, too."""
        batch, new = ids.shape
        mask = np.concatenate([cache.mask, mask], axis=1)
        length = mask.shape[1]
        past = length - new
        text = np.concatenate([cache.ids, ids], axis=1)
        profile = DECODE if new == 1 and past else PREFILL
        self._check(batch, new, length)
        positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)[:, -new:]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        # Kept until the end of this call: their copies are asynchronous.
        arrays = {name: np.ascontiguousarray(array, dtype=np.int64) for name, array in feeds.items()}
        self._run(self._contexts[profile], arrays, cache, past)
        logits, routes = self._download_logits(batch, new, last=last), self._download_routes(batch * new)
        if reads is not None:
            reads.append(self._download_reads(batch * new))
        cache.turn, cache.ids, cache.mask = 1 - cache.turn, text, mask
        return logits, routes

    def _run(self, context: Any, arrays: dict[str, np.ndarray], cache: Cache, past: int) -> None:
        """Bind every input and output, and start the engine; the caller keeps ``arrays`` alive until it has ended."""
        for name, array in arrays.items():
            self.cuda.upload(self._inputs[name].address, array)
            self._bind(context, name, self._inputs[name].address, array.shape)
        count = len(self._past)
        shape = (len(arrays["input_ids"]), self.model["num_kv_heads"], past, self.model["head_dim"])
        for index, name in enumerate(self._past):
            self._bind(context, name, cache.past(index, count), shape)
            self._bind(context, name.replace("past_key_values.", "present."), cache.present(index, count))
        self._bind(context, "logits", self._logits.address)
        for layer, tap in self._taps.items():
            self._bind(context, tap["output"], self._indices[layer].address)
        for name, _, buffer in self._reads.values():
            self._bind(context, name, buffer.address)
        if not context.execute_async_v3(self.cuda.stream.value or 0):
            raise DeviceError(f"{self.version} failed to run: {self._reason()}")

    def _download_logits(self, batch: int, new: int, *, last: bool) -> np.ndarray:
        """Logits float32 [B, new, V] of the call that ran, or [B, 1, V] of the last position."""
        vocabulary = self.model["vocab_size"]
        logits = np.empty((batch, 1 if last else new, vocabulary), self._given)
        if last:
            for row in range(batch):
                place = (row * new + new - 1) * vocabulary * self._given.itemsize
                self.cuda.download(logits[row], self._logits.address + place)
        else:
            self.cuda.download(logits, self._logits.address)
        return logits.astype(np.float32, copy=False)

    def _download_routes(self, tokens: int) -> Taps:
        """Selected experts int32 [T, k] by layer."""
        routes = {}
        for layer, tap in self._taps.items():
            routes[layer] = np.empty((tokens, tap["top_k"]), np.int32)
            self.cuda.download(routes[layer], self._indices[layer].address)
        return routes

    def _download_reads(self, tokens: int) -> Taps:
        """What each layer's router read, float32 [T, H] by layer."""
        read = {}
        for layer, (_, kind, buffer) in self._reads.items():
            read[layer] = np.empty((tokens, self.model["hidden_size"]), kind)
            self.cuda.download(read[layer], buffer.address)
        return {layer: array.astype(np.float32, copy=False) for layer, array in read.items()}

    def _crosses(self, mask: np.ndarray, past: int) -> bool:
        """Whether longrope changes its factors after the first ``past`` columns of ``mask`` [B, L]."""
        limit = self.model.get("rope_boundary")
        return limit is not None and bool(mask.sum(axis=1).max() > limit >= mask[:, :past].sum(axis=1).max())

    def _check_pieces(self, mask: np.ndarray) -> None:
        longest = self.limits["max_prompt"]
        if mask.shape[1] > longest and self._crosses(mask, longest):
            limit = self.model["rope_boundary"]
            raise DeviceError(
                f"Beyond {limit} tokens longrope changes its factors, so {mask.shape[1]} tokens must be read at once, "
                f"and this engine reads at most {longest}: build it with --max-prompt {mask.shape[1]} or more."
            )

    def _again(
        self, text: np.ndarray, mask: np.ndarray, new: int, *, last: bool, reads: list[Taps] | None
    ) -> tuple[np.ndarray, Taps, Cache]:
        """Read the whole text again with the long factors; what is returned is of its last ``new`` tokens."""
        batch, parts = len(text), list[Taps]()
        logits, routes, cache = self.start(text, mask, last=last, reads=parts)

        def ending(found: Taps) -> Taps:
            rows = {layer: array.reshape(batch, -1, array.shape[1])[:, -new:] for layer, array in found.items()}
            return {layer: array.reshape(-1, array.shape[2]) for layer, array in rows.items()}

        if reads is not None:
            reads.append(ending(parts[0]))
        return logits[:, -new:], ending(routes), cache

    def _check_types(self, trt: Any) -> None:
        """Raise a DeviceError when the engine's own types are not those that its description promises.

        Buffers are sized by them, and a type of another size would be written past their end.
        """
        names = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int32": "INT32"}
        presents = [name.replace("past_key_values.", "present.") for name in self._past]
        wanted = {"logits": str(self._given)} | dict.fromkeys([*self._past, *presents], self.dtype)
        for tap in self.facts["taps"].values():
            wanted[tap["output"]] = "int32"
            if "reads" in tap:
                wanted[tap["reads"]] = str(np.dtype(tap["reads_dtype"]))
        for name, dtype in wanted.items():
            found = self._engine.get_tensor_dtype(name)
            if found != getattr(trt.DataType, names.get(dtype, ""), None):
                raise DeviceError(f"Tensor {name} of this engine is {found}, not {dtype}; build it again.")

    def _bind(self, context: Any, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Give a tensor its address and, for an input, its shape."""
        taken = shape is None or context.set_input_shape(name, shape)
        if not taken or not context.set_tensor_address(name, address):
            what = f"tensor {name}" + (f" of shape {shape}" if shape is not None else "")
            raise DeviceError(f"{self.version} does not take {what}: {self._reason()}")

    def _reason(self) -> str:
        return _plugins_reason() or (self._log.errors or ["no reason given"])[-1]

    def _check(self, batch: int, new: int, length: int) -> None:
        limits = self.limits
        if new < 1:
            raise DeviceError("There is no token to run.")
        if batch > limits["batch"]:
            raise DeviceError(f"{batch} rows, but this engine was built for at most {limits['batch']} (--batch).")
        if length > limits["max_length"]:
            raise DeviceError(f"{length} tokens do not fit: this engine holds at most {limits['max_length']}.")

    def close(self) -> None:
        """Free the engine and its buffers."""
        self._contexts, self._engine, self._runtime = [], None, None
        self._inputs, self._indices, self._reads = {}, {}, {}
        del self._logits
        self.cuda.close()


def _joined(parts: list[Taps], batch: int) -> Taps:
    """Join what the pieces of a prompt gave, each [T, n]: the rows of a batch, one after the other."""
    found = {}
    for layer in parts[0]:
        rows = [part[layer].reshape(batch, -1, part[layer].shape[1]) for part in parts]
        found[layer] = np.concatenate(rows, axis=1).reshape(-1, rows[0].shape[2])
    return found
