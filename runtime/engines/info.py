"""What a number was measured on: the facts that an engine states about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from moedge.configs.generation_config import GenerationConfig
from moedge.export.manifest import Facts


class EngineModel(Facts):
    """The model that an engine runs. Facts of its manifest without a field here are kept (``model_extra``)."""

    vocab_size: int
    target: str = ""
    """Of its bundle or engine; ``torch`` for a checkpoint."""
    label: str = ""
    moe: bool = False
    routed: bool = False
    """Whether a layer chooses experts: a pruned MoE may have none."""
    gathered: bool = False
    """Whether a layer leaves small values out (docs/gather.md)."""
    eos_token_ids: list[int] = Field(default_factory=list)
    max_position_embeddings: int | None = None
    max_length: int | None = None
    """Tokens that a cache can hold."""
    rope_boundary: int | None = None
    """Tokens after which the rotary factors change (:mod:`moedge.runtime.engines.longrope`)."""
    top_k: int | None = None
    """Experts of each layer that the caller asked for."""
    weights_of: str | None = None
    """Target of the quantised bundle whose de-quantised weights took the place of the graph's own."""
    generation: GenerationConfig = Field(default_factory=GenerationConfig)

    def __getitem__(self, key: str) -> Any:
        """Return a fact by its name, as programs that knew this as a dictionary ask for it.

        Raises:
            KeyError: there is no such fact.
        """
        if key in type(self).model_fields or key in (self.model_extra or {}):
            return getattr(self, key)
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a fact by its name, or ``default`` where there is none."""
        try:
            return self[key]
        except KeyError:
            return default

    @property
    def longest(self) -> int | None:
        """Tokens that one text can have, where that is known."""
        return self.max_length or self.max_position_embeddings


@with_config(ConfigDict(extra="forbid"))
class EngineFacts(TypedDict):
    """What a number was measured on, see :class:`moedge.runtime.engines.info.EngineInfo`."""

    name: str
    runtime: str
    device: str
    dtype: str
    threads: Annotated[int, Field(ge=0)]
    model: dict[str, Any]


@dataclass(frozen=True)
class EngineInfo:
    """What a number was measured on: printed beside every number."""

    name: str
    """Short label for tables, e.g. ``"ort-cpu moe"``."""
    runtime: str
    """Runtime and version, e.g. ``"onnxruntime 1.31.1"``."""
    device: str
    """Device, e.g. ``"CPU"``."""
    dtype: str
    """Weight dtype, e.g. ``"float32"``."""
    threads: int
    model: EngineModel
    max_batch: int | None = None
    """Most rows of one call; None: as many as there is memory for."""
    padding: bool = True
    """Whether the rows of a call may be of different length (padded on the left)."""

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU, where kernels add in the same order in every call."""
        return self.device == "CPU"

    def as_json(self) -> EngineFacts:
        """Return the entry of results."""
        return {
            "name": self.name,
            "runtime": self.runtime,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "model": self.model.document(),
        }
