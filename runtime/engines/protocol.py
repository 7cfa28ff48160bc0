"""What parity, benchmark and generation know of an engine: what it does, and what one call returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from typing_extensions import TypedDict

from moedge.export.graph.layers import LayerPoint
from moedge.export.manifest import GatherPlace
from moedge.runtime.engines.info import EngineInfo


@dataclass
class Step:
    """Result of one forward call.

    ``logits`` float32 [B, S, V] for the S positions that were fed, or [B, 1, V] for the last of them when opened with
    ``last_logits=True``; ``cache`` to pass on; ``routes`` per layer the
    selected experts, int32 [B*S, k] sorted by decreasing score, when the engine was opened with ``taps=True``;
    ``router_inputs`` per layer what its router read, float32 [B*S, H], when opened with ``router_inputs=True``;
    ``scores`` with them, per layer, what the engine ranked its experts by (selection bias included), float32 [B*S, E],
    or None where the runtime does not show it; ``left_out_of`` and ``kept`` with them, by layer and place
    (:mod:`moedge.export.graph.kept`), the values float32 [B*S, K] of which small ones are left out, and what is left;
    ``layers`` the values between the parts of the model, float32 [B*S, H] by point, when opened with ``layers``.
    """

    logits: np.ndarray
    cache: Any
    routes: dict[int, np.ndarray] | None = None
    router_inputs: dict[int, np.ndarray] | None = None
    scores: dict[int, np.ndarray] | None = None
    left_out_of: dict[GatherPlace, np.ndarray] | None = None
    kept: dict[GatherPlace, np.ndarray] | None = None
    layers: dict[LayerPoint, np.ndarray] | None = None


LayerMode = Literal["shown", "given"]
"""How an engine is opened: its steps hold ``layers``; and each part also reads what it is given instead of what the
part before made (:class:`LayerEngine`). The option ``spots`` says which values, all by default."""


class TorchOptions(TypedDict, total=False):
    """Where and in what PyTorch computes; a bundle's own target says both."""

    device: str
    dtype: str


class Opening(TypedDict, total=False):
    """What is said of every engine that is opened, whatever runs it (:func:`moedge.runtime.engines.open_engine`)."""

    threads: int | None
    pytorch: TorchOptions | None


class Engine(Protocol):
    """A loaded model that runs prefill and decode. A cache belongs to the engine that made it and is used once."""

    info: EngineInfo

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        """Run ``ids`` int64 [B, S] from an empty cache. ``attention_mask`` int64 [B, S], 0 for (left) padding."""
        ...

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        """Run ``ids`` int64 [B, S] (S is 1 when generating) after what ``cache`` holds.

        The result is that of one reading of the whole text, also where longrope changes its factors: that step then
        takes as long as a prefill.
        """
        ...

    def close(self) -> None:
        """Free the runtime's memory."""
        ...


@runtime_checkable
class BranchingEngine(Protocol):
    """An engine that continues one text in several ways, and reads what they share once."""

    info: EngineInfo
    branch_rows: int | None
    """Most rows of a branch; None: as many as of any other call."""

    def read(self, ids: np.ndarray) -> Any:
        """Return the cache of ``ids`` int64 [B, S], for :meth:`branch`, without logits where the runtime can."""
        ...

    def branch(self, ids: np.ndarray, cache: Any) -> Step:
        """As :meth:`Engine.decode`, but ``cache`` is left as it was, for the next branch; the step's own is None."""
        ...


@runtime_checkable
class ReplayEngine(Protocol):
    """An engine, opened with ``replay=True``, that can be told what to choose: the reference of route replay.

    It is told which experts to run, whose weights follow the layer's rule from the engine's own scores, and by which
    factor, 0 to 1, to multiply each value of which small ones are left out. With ``taps=True`` its steps hold
    ``router_inputs`` and ``left_out_of``, too.
    """

    info: EngineInfo

    def prefill(
        self,
        ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        experts: dict[int, np.ndarray] | None = None,
        factors: dict[GatherPlace, np.ndarray] | None = None,
    ) -> Step:
        """As :meth:`Engine.prefill` with what is given instead of the model's own choices.

        Args:
            experts: by layer int [B*S, k]. factors: by place float32 [B*S, K].
        """
        ...

    def decode(
        self,
        ids: np.ndarray,
        cache: Any,
        *,
        experts: dict[int, np.ndarray] | None = None,
        factors: dict[GatherPlace, np.ndarray] | None = None,
    ) -> Step:
        """As :meth:`Engine.decode`, with ``experts`` and ``factors`` as in :meth:`prefill`."""
        ...

    def factors(self, left_out_of: dict[GatherPlace, np.ndarray]) -> dict[GatherPlace, np.ndarray]:
        """What the model's thresholds multiply each value by, float32 [T, K] of 0 to 1, for values of that shape.

        Raises:
            MoEdgeError: the model leaves nothing out there, or of another number of values.
        """
        ...

    def scores(self, router_inputs: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What each layer ranks its experts by, float32 [T, E], when its router reads float32 [T, H].

        The selection bias is included: the k best are selected, ties to the lower index.
        """
        ...

    def close(self) -> None:
        """Free the runtime's memory."""
        ...


class LayerEngine(ReplayEngine, Protocol):
    """An engine, opened with ``layers="given"``, whose every part computes alone, from values that it is given.

    ``Step.layers`` then holds what each part made of what it was given: its own error, without those of the parts
    before it. With ``spots=STREAM`` (:mod:`moedge.export.graph.layers`) the parts are whole layers. ``layers="shown"``
    gives :meth:`cached` and ``Step.layers`` of an ordinary run.
    """

    def prefill(
        self,
        ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        experts: dict[int, np.ndarray] | None = None,
        factors: dict[GatherPlace, np.ndarray] | None = None,
        given: dict[LayerPoint, np.ndarray] | None = None,
    ) -> Step:
        """As :meth:`ReplayEngine.prefill`.

        Args:
            given: by point float32 [B*S, H]; every point that the engine shows.
        """
        ...

    def decode(
        self,
        ids: np.ndarray,
        cache: Any,
        *,
        experts: dict[int, np.ndarray] | None = None,
        factors: dict[GatherPlace, np.ndarray] | None = None,
        given: dict[LayerPoint, np.ndarray] | None = None,
    ) -> Step:
        """As :meth:`ReplayEngine.decode`, with ``given`` as in :meth:`prefill`."""
        ...

    def cached(self, cache: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return by layer the keys and the values that a cache holds, float32 [B, G, T, D]; it is not used up."""
        ...
