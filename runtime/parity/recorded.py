"""Judge what an engine gave on its device, from the file that ``verify.py`` of a device archive wrote there.

The device has no MoEdge and no reference. It records every answer: logits, the experts that each layer selected and
what its router read. Here the reference replays those choices (:mod:`.replay`), so every token is judged,
whatever experts rounding chose there.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge._progress import Progress
from moedge.configs.tolerances import Profile
from moedge.runtime.device.moedge_archive import ANSWERS_SCHEMA
from moedge.runtime.engines import Engine, Step
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.parity import compare as parity
from moedge.runtime.parity.metrics import Cursor, TokenErrors, text_sha256
from moedge.runtime.parity.replay import Replay
from moedge.runtime.parity.results import Parity
from moedge.runtime.parity.routing import RouteAgreement

_DAMAGED = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error),  # cut off, or bytes that changed
    *(ValueError, KeyError, TypeError, AttributeError),  # another file, or a part that is not there
)


class Recorded:
    """The answers of one engine on its device; ``info`` as of an engine.

    Args:
        path: ``verify-answers.npz``.

    Raises:
        MoEdgeError: it cannot be read, or is something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
            about = json.loads(str(found.pop("about")))
            if about["schema"] != ANSWERS_SCHEMA:
                raise ValueError(f"its schema is {about['schema']!r}")
            self.routed = any(layer["num_experts"] for layer in (about["moe"] or {}).get("layers", {}).values())
            cases: dict[int, dict[str, Any]] = {}
            for name, array in found.items():
                number, part = name.split(".", 1)
                cases.setdefault(int(number), {})[part] = array
            self.cases = [_checked(number, cases[number]) for number in sorted(cases)]
            if not self.cases:
                raise ValueError("it holds no answers")
            self.tokens = sum(len(case["ids"]) for case in self.cases)
            dtype = str(about["dtype"])
            facts = {"label": about["label"], "target": "tensorrt", "moe": about["kind"] == "moe"}
            model = EngineModel.model_validate({**about["model"], **facts, "routed": self.routed})
        except _DAMAGED as error:
            raise MoEdgeError(
                f"{path} cannot be read as the answers of a device ({error}); run verify.py there again."
            ) from error
        shown = all(_layers(case, part) for case in self.cases for part in ("routes", "router_inputs"))
        if self.routed and not shown:
            raise MoEdgeError(
                f"{path} does not say which experts the engine chose and what its routers read; build it there without "
                "--no-taps, from an archive of this version."
            )
        self.info = EngineInfo(
            name=f"tensorrt {about['kind']}", runtime="tensorrt", device=f"recorded in {path.name}",
            dtype=dtype,
            threads=1, model=model,
        )  # fmt: skip

    def steps(self) -> Iterator[tuple[str, np.ndarray, Step, np.ndarray]]:
        """Yield (phase, fed ids [1, S], the engine's step, the tokens that follow: -1 after the last)."""
        for case in self.cases:
            ids, prompt = case["ids"], int(case["prompt"])
            targets = np.append(ids[1:], -1)
            parts = {part: _layers(case, part) for part in ("routes", "router_inputs")}
            for start, end in ((0, prompt), *((at, at + 1) for at in range(prompt, len(ids)))):
                rows = slice(start, end)
                taps = {part: {layer: array[rows] for layer, array in found.items()} for part, found in parts.items()}
                logits = case["logits"][None, rows].astype(np.float32)
                step = Step(logits, None, taps["routes"] or None, taps["router_inputs"] or None)
                yield "decode" if start else "prefill", ids[None, rows], step, targets[rows]


def _checked(number: int, case: dict[str, Any]) -> dict[str, Any]:
    """Return a case that has all of its parts, a row of each for every token.

    Raises:
        ValueError: it has not.
    """
    if missing := [part for part in ("ids", "prompt", "logits") if part not in case]:
        raise ValueError(f"case {number} lacks {' and '.join(missing)}")
    tokens = case["ids"].shape
    if len(tokens) != 1 or not 1 <= int(case["prompt"]) <= tokens[0] or case["logits"].ndim != 2:
        raise ValueError(f"case {number} is no prompt with its answers")
    if short := [name for name, array in case.items() if name != "prompt" and len(array) != tokens[0]]:
        raise ValueError(f"case {number} has {tokens[0]} tokens, and not as many rows of {short[0]}")
    for part in ("routes", "router_inputs"):
        _layers(case, part)
    return case


def _layers(case: dict[str, Any], part: str) -> dict[int, np.ndarray]:
    return {int(name.split(".")[1]): array for name, array in case.items() if name.startswith(f"{part}.")}


def compare(reference: Engine, recorded: Recorded, limits: Profile, progress: Progress | None = None) -> Parity:
    """Compare recorded answers with ``reference``; see :func:`moedge.runtime.parity.compare`.

    Raises:
        MoEdgeError: engines of different vocabularies or routing, or a reference that cannot replay.
    """
    parity.same_vocabulary(reference, recorded)
    phases, routes = TokenErrors.by_phase(limits), RouteAgreement()
    replay = Replay(parity.replaying(reference, recorded), limits) if recorded.routed else None
    cache: Any = None
    done, cursor = 0, Cursor()
    for phase, ids, test, targets in recorded.steps():
        at = cursor.at(phase, ids)
        one = reference.prefill(ids) if phase == "prefill" else reference.decode(ids, cache)
        cache = one.cache
        phases[phase].add(one.logits[0], test.logits[0], targets, routes.add(one.routes, test.routes), at)
        if replay is not None:
            replay.add(phase, ids, test, targets, at)
        done += ids.size
        if progress:
            progress(done, recorded.tokens)
    longest = max(len(case["ids"]) for case in recorded.cases)
    shape, prefill = (len(recorded.cases), longest), min(int(case["prompt"]) for case in recorded.cases)
    found = parity.judged(reference, recorded, shape, prefill, phases, routes, limits, True, replay)
    return {**found, "text_sha256": text_sha256(case["ids"] for case in recorded.cases)}
