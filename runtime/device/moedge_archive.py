"""Open a device archive's folder: verify every file, find the engine that was built in it."""

from __future__ import annotations

import io
import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_session, moedge_trt
else:  # in an archive the files lie side by side
    import moedge_session
    import moedge_trt

SCHEMA = "moedge.device-archive/1"
MANIFEST = "manifest.json"
ENGINE = "engine.plan"
ENGINE_FACTS = "engine.json"
RESULT_SCHEMA = "moedge.device-result/1"
ANSWERS_SCHEMA = "moedge.device-answers/1"
MODEL_FACTS = ("num_layers", "hidden_size", "vocab_size", "num_kv_heads")
"""What a conversion leaves as it was in the dense parent."""


def open_archive(folder: Path) -> dict[str, Any]:
    """Return the manifest after checking the hash of every file that it lists.

    Raises:
        moedge_trt.DeviceError: another schema, or a file that is missing or changed.
    """
    manifest = moedge_trt.read_json(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise moedge_trt.DeviceError(f"{folder / MANIFEST} is not of schema {SCHEMA}; make the archive again.")
    for name, entry in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or moedge_trt.sha256(path) != entry["sha256"]:
            raise moedge_trt.DeviceError(f"{path} is missing, a link or damaged; unpack the archive again.")
    return manifest


def open_session(folder: Path) -> tuple[dict[str, Any], dict[str, Any], moedge_session.Session]:
    """Return the manifest, the facts of the built engine, and a session of it.

    Raises:
        moedge_trt.DeviceError: the engine is missing, changed, of another graph, or cannot run here.
    """
    manifest = open_archive(folder)
    if not (folder / ENGINE_FACTS).is_file():
        raise moedge_trt.DeviceError(f"{folder} has no engine yet; run: python3 build_engine.py")
    facts = moedge_trt.read_json(folder / ENGINE_FACTS)
    if facts.get("graph_sha256") != manifest["files"]["model.onnx"]["sha256"]:
        raise moedge_trt.DeviceError(f"{folder / ENGINE} was built from another graph; run: python3 build_engine.py")
    plan = moedge_trt.read_checked(folder / ENGINE, facts.get("sha256", ""))
    return manifest, facts, moedge_session.Session(plan, facts)


def other_model(one: Mapping[str, Any], two: Mapping[str, Any]) -> str | None:
    """Say how the ``model`` facts of two manifests differ, where a model and its conversion do not; None if nowhere."""
    names = [name for name in MODEL_FACTS if one.get(name) != two.get(name)]
    return ", ".join(f"{name} {one.get(name)} against {two.get(name)}" for name in names) or None


def golden(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded cases: ``ids`` int64 [1, L], ``prompt`` tokens, ``logits`` [L-prompt+1, V], ``routes``."""
    cases = []
    for number, case in enumerate(json.loads((folder / "golden.json").read_text(encoding="utf-8"))["cases"]):
        routes = {
            int(layer): np.load(folder / f"golden.{number}.routes.{layer}.npy", allow_pickle=False)
            for layer in case["routed_layers"]
        }
        ids = np.array([case["ids"]], dtype=np.int64)
        recorded = np.load(folder / f"golden.{number}.logits.npy", allow_pickle=False)
        cases.append({"ids": ids, "prompt": case["prompt_tokens"], "logits": recorded, "routes": routes})
    return cases


def answers(
    number: int,
    ids: np.ndarray,
    prompt: int,
    logits: np.ndarray,
    routes: dict[int, np.ndarray],
    reads: list[dict[int, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Name what the engine gave in one case, as ``moedge verify`` reads it: all that route replay needs.

    Args:
        number: of the case.
        ids: int64 [1, L], of which ``prompt`` were read at once and the others one by one.
        prompt: tokens.
        logits: float32 [L, V], kept as float16 where the engine gave that.
        routes: int32 [L, k] by layer; empty for an engine without taps.
        reads: by call, float32 by layer, what its router read.
    """
    with np.errstate(over="ignore"):
        half = logits.astype(np.float16)
    given = half if np.array_equal(half, logits, equal_nan=True) else logits
    case = {"ids": ids[0], "prompt": np.array(prompt), "logits": given}
    case |= {f"routes.{layer}": chosen for layer, chosen in routes.items()}
    for layer in reads[0] if reads else ():
        case[f"router_inputs.{layer}"] = np.concatenate([part[layer] for part in reads])
    return {f"{number}.{name}": array for name, array in case.items()}


def write_answers(manifest: dict[str, Any], found: dict[str, np.ndarray], path: Path) -> None:
    """Write every case's :func:`answers`, whole or not at all."""
    about = {"schema": ANSWERS_SCHEMA, "archive_sha256": manifest["content_sha256"]}
    about |= {key: manifest[key] for key in ("label", "kind", "model", "moe", "dtype")}
    stream = io.BytesIO()
    np.savez_compressed(stream, about=np.array(json.dumps(about)), **found)  # type: ignore[arg-type]
    moedge_trt.write_bytes(path, stream.getvalue())


def device_facts(session: moedge_session.Session) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = Path("/proc/device-tree/model")
    try:
        name = model.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        name = session.cuda.name() or platform.machine()
    free, total = session.cuda.memory()
    return {
        "name": name,
        "compute_capability": session.cuda.capability(),
        "runtime": session.version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "memory_bytes": {"free": free, "total": total},
    }


def finish(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all, and say where."""
    moedge_trt.write_bytes(path, (json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    print(f"wrote {path}; read it with: moedge device-report {path.name}")


def run(main: Callable[[], int]) -> int:
    """Run a script's main function; a DeviceError becomes one line and exit code 2."""
    try:
        return main()
    except moedge_trt.DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
