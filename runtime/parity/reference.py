"""A reference that is kept: what one run of a right engine answered, in a file that needs no torch to be judged by.

``ref.safetensors`` holds the text as token ids, what :mod:`.shortened` keeps of the logits of every token, which
experts each layer chose for it and by how much these scored above the others, and, for the first tokens of the text
(the *probe*), the stream that passes from layer to layer (:mod:`moedge.export.graph.layers`) and what each router
ranked its experts by. :mod:`.against` says what these judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moedge import MoEdgeError, __version__
from moedge._files import refuse_pointer, sha256_file, write_bytes
from moedge._progress import Progress
from moedge.convert.adapters import MOE_PREFIX
from moedge.convert.moe_adapters import FAMILIES as NATIVE
from moedge.export import manifest as manifests
from moedge.export.graph.layers import STREAM
from moedge.export.manifest import EngineManifest, Manifest
from moedge.export.targets import PORTABLE
from moedge.runtime.engines import Engine, ReplayEngine, Step, open_engine
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.engines.protocol import Opening
from moedge.runtime.parity.compare import steps
from moedge.runtime.parity.routing import Leads
from moedge.runtime.parity.sample import Sample
from moedge.runtime.parity.shortened import Shortened, joined, shortened
from moedge.runtime.run import run_folder

PROBE = 96
"""Tokens at the beginning of the text whose stream is kept, two thirds of them of one prefill, the others decoded."""


class Identity(BaseModel):
    """Which model it is, by every hash that is known of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | None = None
    """Of weights, config and tokenizer (:func:`moedge.convert.sources.identity`)."""
    bundle: str | None = None
    """Content hash of the portable bundle."""
    plan: str | None = None
    """Of the conversion; other training of the same conversion may have the same."""

    def told(self) -> str:
        """The hashes that are known, for people."""
        known = {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name)}
        return ", ".join(f"{name} {sha256[:12]}" for name, sha256 in known.items()) or "no hash"

    def same(self, other: Identity) -> bool | None:
        """Whether both are the same model, by the first hash that both know; None where they know none."""
        for name in type(self).model_fields:
            one, two = getattr(self, name), getattr(other, name)
            if one and two:
                return bool(one == two)
        return None


class Facts(BaseModel):
    """What the file says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["moedge.reference/1"] = Field(alias="schema")
    text: str
    prefill: int
    probe: int
    """Tokens of the probe. Fewer than :data:`PROBE` where windows are shorter."""
    probe_prefill: int
    identity: Identity
    engine: dict[str, Any]
    """What answered, as :meth:`moedge.runtime.engines.info.EngineInfo.as_json` gives it."""
    moedge: str
    sha256: str
    """Over the name, type, shape and bytes of every array."""


@dataclass(frozen=True)
class Probe:
    """The first P tokens of the text, read by themselves: another prefill than the text's, so answers of their own."""

    answers: Shortened
    routes: dict[int, np.ndarray]
    """By layer int32 [P, k]."""
    streams: dict[int, np.ndarray]
    """By layer float32 [P, H], and behind the last."""
    scores: dict[int, np.ndarray]
    """By layer float32 [P, E]; empty of a model without routers, or with routers inside experts."""


@dataclass(frozen=True)
class Reference:
    """A kept reference."""

    facts: Facts
    windows: np.ndarray
    """int64 [N, L], the text."""
    answers: Shortened
    """Of the tokens in the order in which :func:`moedge.runtime.parity.compare.steps` feeds them."""
    routes: dict[int, np.ndarray]
    """By layer int32 [T, k], in that order."""
    leads: dict[int, np.ndarray]
    """By layer float32 [T], in that order: how much the worst expert that was taken scores above the best one that was
    left out, of the layer's largest score in the text. Empty where ``probe.scores`` is, and in files of versions that
    kept none."""
    probe: Probe
    path: Path
    sha256: str
    """Of the file."""

    def as_json(self) -> dict[str, Any]:
        """What the file is, for programs."""
        stated = self.facts.model_dump(mode="json", by_alias=True, exclude={"sha256"})
        size = self.path.stat().st_size
        return {**stated, "file": str(self.path), "bytes": size, "sha256": self.sha256, "tokens": self.windows.size}

    def told(self) -> str:
        """What the file is, for people."""
        return (
            f"{self.path}: {self.path.stat().st_size / 2**20:.1f} MiB, sha256 {self.sha256}\n"
            f"{self.windows.size:,} tokens of {self.facts.text} by {self.info.name}, {self.facts.identity.told()}"
        )

    @property
    def info(self) -> EngineInfo:
        """What answered, and where that is kept."""
        engine = dict(self.facts.engine)
        model = EngineModel.model_validate(engine.pop("model"))
        return EngineInfo(**{**engine, "device": f"{engine['device']}, kept in {self.path.name}"}, model=model)


def identity_of(folder: Path) -> Identity:
    """Find out which model a bundle, an engine folder or a checkpoint holds.

    Raises:
        MoEdgeError: it cannot be read.
    """
    manifest = manifests.read(folder)
    if manifest is not None:
        own = manifests.content_hash(folder) if manifest.target == PORTABLE else manifest.parent
        # An engine's parent is the bundle that it was built of, not the portable one.
        bundle = None if isinstance(manifest, EngineManifest) else own
        return Identity(
            checkpoint=manifest.checkpoint, bundle=bundle, plan=manifest.moe.plan_sha256 if manifest.moe else None
        )
    from moedge.convert import sources

    plan = folder / "plan.json"
    sha256 = run_folder.read_json(plan).get("sha256") if plan.is_file() else None
    return Identity(checkpoint=sources.identity(folder), plan=sha256)


def how_to_open(folder: Path) -> dict[str, Any]:
    """How to open the engine whose answers are to be kept.

    Raises:
        MoEdgeError: it is an engine folder, or a bundle whose weights are another model's after rounding.
    """
    manifest = manifests.read(folder)
    if manifest is None:
        config = run_folder.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = str(config.get("model_type", ""))
        routed = kind.startswith(MOE_PREFIX)
        replay = routed and kind.removeprefix(MOE_PREFIX) not in NATIVE
    elif not isinstance(manifest, Manifest) or manifest.target != PORTABLE:
        raise MoEdgeError(
            f"A reference is kept of a checkpoint or of a portable bundle; {folder} is of target {manifest.target}."
        )
    else:
        routed = bool(manifest.layers)
        replay = bool(manifest.routed_layers) and not (manifest.moe and manifest.moe.nested)
    return {"taps": routed, "replay": replay, "layers": "shown", "spots": STREAM}


def keep_given(
    folder: Path,
    path: Path,
    *,
    sample: Sample,
    opening: Opening,
    force: bool = False,
    progress: Progress | None = None,
) -> Reference:
    """Keep the reference of what a user names.

    Args:
        folder: checkpoint, portable bundle, or a run folder, whose converted checkpoint is taken.
        path: the file to write.
        sample: the text.
        opening: ``threads`` and ``pytorch`` of the engine.
        force: replace ``path``.

    Raises:
        MoEdgeError: ``path`` exists, the folder holds nothing that a reference can be kept of, or too little text.
    """
    if path.exists() and not force:
        raise MoEdgeError(f"{path} exists already; pass --force to replace it.")
    if run_folder.is_run(folder):
        folder = run_folder.converted(folder)
    how = how_to_open(folder)
    name, windows = sample.windows(folder)
    identity = identity_of(folder)
    with closing(open_engine(folder, **opening, **how)) as engine:
        return keep(engine, windows, path, text=name, prefill=sample.prefill, identity=identity, progress=progress)


def keep(
    engine: Engine,
    windows: np.ndarray,
    path: Path,
    *,
    text: str,
    prefill: int,
    identity: Identity,
    progress: Progress | None = None,
) -> Reference:
    """Run the text and write what a later comparison needs.

    Args:
        engine: opened to show the stream that layers read; a routed one with ``taps`` and, unless it holds experts
            inside experts, ``replay``.
        windows: int64 [N, L], the text. path: the file; it is replaced.
        text: its name. prefill: tokens of each window that are read at once.
        identity: of the model.
        progress: called with (tokens done, tokens in all).
    """
    parts: list[Shortened] = []
    routes: dict[int, list[np.ndarray]] = {}
    leads = Leads()
    for _, _, step, _, targets in steps(engine, [], windows, prefill, progress):
        parts.append(shortened(step.logits[0], targets))
        for layer, chosen in (step.routes or {}).items():
            routes.setdefault(layer, []).append(chosen)
        leads.add(_scores(engine, step), step.routes or {})
    boundary = engine.info.model.rope_boundary
    probe = min(PROBE, windows.shape[1], boundary or PROBE)
    probe_prefill = max(1, probe * 2 // 3)
    probed = _probed(engine, windows[0], probe, probe_prefill)
    arrays = {"ids": windows.astype(np.int32)}
    arrays |= _arrays("", joined(parts), {layer: np.concatenate(found) for layer, found in routes.items()})
    arrays |= {f"leads.{layer}": found for layer, found in leads.shares().items()}
    arrays |= _arrays("probe.", probed.answers, probed.routes)
    arrays |= {f"probe.streams.{layer}": found for layer, found in probed.streams.items()}
    arrays |= {f"probe.scores.{layer}": found for layer, found in probed.scores.items()}
    facts = Facts(
        schema="moedge.reference/1", text=text, prefill=prefill, probe=probe, probe_prefill=probe_prefill,
        identity=identity, engine=_engine_facts(engine.info), moedge=__version__, sha256=_digest(arrays),
    )  # fmt: skip
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(arrays, metadata={"moedge": facts.model_dump_json(by_alias=True)}))
    return load(path)


def _arrays(prefix: str, answers: Shortened, routes: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    found = {f"{prefix}answers.{each.name}": getattr(answers, each.name) for each in fields(Shortened)}
    return found | {f"{prefix}routes.{layer}": _small(chosen) for layer, chosen in routes.items()}


def probing(window: np.ndarray, probe: int, prefill: int) -> Iterator[tuple[str, slice, np.ndarray, np.ndarray]]:
    """The steps in which the first ``probe`` tokens of a window int64 [L] are fed.

    Yields:
        phase, which tokens, their ids int64 [1, S], and the tokens that follow int64 [S], -1 after the last.
    """
    targets = np.append(window[1:], -1)
    for start, end in ((0, prefill), *((at, at + 1) for at in range(prefill, probe))):
        rows = slice(start, end)
        yield "decode" if start else "prefill", rows, window[None, rows], targets[rows]


def _probed(engine: Engine, window: np.ndarray, probe: int, prefill: int) -> Probe:
    """Read the probe with an engine that shows its stream."""
    answers: list[Shortened] = []
    found: dict[str, dict[int, list[np.ndarray]]] = {"routes": {}, "streams": {}, "scores": {}}
    cache: Any = None
    for phase, _, ids, targets in probing(window, probe, prefill):
        step = engine.prefill(ids) if phase == "prefill" else engine.decode(ids, cache)
        cache = step.cache
        answers.append(shortened(step.logits[0], targets))
        scores = _scores(engine, step)
        streams = {layer: values for (layer, _), values in (step.layers or {}).items()}
        for name, by_layer in (("routes", step.routes or {}), ("streams", streams), ("scores", scores)):
            for layer, values in by_layer.items():
                found[name].setdefault(layer, []).append(values)
    whole = {name: {layer: np.concatenate(parts) for layer, parts in each.items()} for name, each in found.items()}
    return Probe(joined(answers), **whole)


def _scores(engine: Engine, step: Step) -> dict[int, np.ndarray]:
    """By layer float32 [T, E]: what each router ranked its experts by; empty where the engine cannot say."""
    if step.router_inputs and isinstance(engine, ReplayEngine):
        return engine.scores(step.router_inputs)
    return {}


def load(path: Path) -> Reference:
    """Read a kept reference.

    Raises:
        MoEdgeError: it is not there, is none, or was changed.
    """
    mend = "keep it again with `moedge verify CHECKPOINT --save-reference FILE`"
    if not path.is_file():
        raise MoEdgeError(f"No kept reference at {path}; {mend}.")
    refuse_pointer(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            stated = (file.metadata() or {}).get("moedge")
        facts = Facts.model_validate(json.loads(stated or "{}"))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        said = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else str(error)
        raise MoEdgeError(f"{path} cannot be read as a kept reference ({said}); {mend}.") from error
    if _digest(arrays) != facts.sha256:
        raise MoEdgeError(f"{path} was changed or damaged: its arrays do not have the hash that it states; {mend}.")
    try:
        return _made(path, facts, arrays)
    except (KeyError, ValueError) as error:
        raise MoEdgeError(f"{path} lacks a part of a kept reference ({error}); {mend}.") from error


def _made(path: Path, facts: Facts, arrays: dict[str, np.ndarray]) -> Reference:
    def by_layer(kind: str) -> dict[int, np.ndarray]:
        start = f"{kind}."
        found = {int(name.removeprefix(start)): array for name, array in arrays.items() if name.startswith(start)}
        return dict(sorted(found.items()))

    def answered(prefix: str) -> tuple[Shortened, dict[int, np.ndarray]]:
        answers = Shortened(*(arrays[f"{prefix}answers.{each.name}"] for each in fields(Shortened)))
        return answers, {layer: found.astype(np.int32) for layer, found in by_layer(f"{prefix}routes").items()}

    probe = Probe(*answered("probe."), by_layer("probe.streams"), by_layer("probe.scores"))
    windows = arrays["ids"].astype(np.int64)
    return Reference(facts, windows, *answered(""), by_layer("leads"), probe, path, sha256_file(path))


def _engine_facts(info: EngineInfo) -> dict[str, Any]:
    """What a result says of an engine, but for the settings of its generation, which nothing here reads."""
    found = info.as_json()
    return {**found, "model": {name: value for name, value in found["model"].items() if name != "generation"}}


def _small(chosen: np.ndarray) -> np.ndarray:
    """Experts [T, k] as the narrowest type that holds them."""
    return chosen.astype(np.uint8 if chosen.max(initial=0) < 256 else np.uint16)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{value.dtype.str}:{value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
