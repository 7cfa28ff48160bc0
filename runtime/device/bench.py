"""Time the engine of this archive: first token and time per token at batch 1, greedy.

    python3 bench.py --prompt 512 --decode 64

The archive of its dense parent is timed in the same rounds where it lies beside this one (unpacked, its engine built),
or where ``--dense`` says. Writes ``bench-result.json`` with the power mode, clocks, heat and energy that the device
tells, and says when the measurement is not to be trusted. Set the power mode first: ``sudo nvpmodel -m 0 && sudo
jetson_clocks``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_archive, moedge_timing, moedge_trt, moedge_watch
else:  # in an archive the files lie side by side
    import moedge_archive
    import moedge_timing
    import moedge_trt
    import moedge_watch

MOE, DENSE = "this archive", "dense parent"


def main() -> int:
    """Measure ``--repeats`` rounds after ``--warmup`` ones."""
    folder = Path(__file__).resolve().parent
    options = _options(folder)
    moedge_trt.check_writable(options.out, "--out")
    manifest, facts, session = moedge_archive.open_session(folder)
    beside = None if options.alone else options.dense or _dense_beside(folder, manifest)
    sessions = {MOE: session}
    parent: dict[str, Any] | None = None
    if beside is not None:
        parent = _parent(beside, manifest)
        _, _, sessions[DENSE] = moedge_archive.open_session(beside)
        print(f"beside: {parent['label']} in {beside}", file=sys.stderr)
        if parent["dtype"] != manifest["dtype"]:
            said = f"the dense parent is in {parent['dtype']} and this archive in {manifest['dtype']}"
            print(f"note: {said}, so the gain is of both, the conversion and the type", file=sys.stderr)
    protocol = _protocol(sessions, options)
    recorded = np.concatenate([case["ids"][0] for case in moedge_archive.golden(folder)])
    ids = np.resize(recorded, protocol.prompt)[None]  # repeated golden text: real tokens, so routing is not degenerate
    with moedge_watch.Recorder(list(sessions)) as recorder:
        times = moedge_timing.time_engines(sessions, ids, protocol, recorder.mark, recorder.after)
    rounds = {label: found.rounds() for label, found in times.items()}
    judged = {label: {name: found[name] for name in ("ttft_ms", "tpot_ms")} for label, found in rounds.items()}
    result = {
        **{"schema": moedge_archive.RESULT_SCHEMA, "kind": "bench", "label": manifest["label"]},
        **{"archive_sha256": manifest["content_sha256"], "device": moedge_archive.device_facts(session)},
        "engine": facts,
        "protocol": {"batch": 1, **vars(protocol), "note": options.note},
        **_row(times[MOE], rounds[MOE], recorder.energy(MOE, protocol.repeats, protocol.decode)),
        "environment": recorder.environment(judged, protocol.warmup),
    }
    if parent is not None:
        row = _row(times[DENSE], rounds[DENSE], recorder.energy(DENSE, protocol.repeats, protocol.decode))
        gains = {
            f"{name}_ms": moedge_timing.speedup(getattr(times[DENSE], name), getattr(times[MOE], name))
            for name in ("ttft", "tpot")
        }
        about = {key: parent[key] for key in ("label", "model", "dtype")}
        result["dense"] = {**about, "archive_sha256": parent["content_sha256"], **row, "speedup": gains}
    _print(result)
    for opened in sessions.values():
        opened.close()
    moedge_archive.finish(result, options.out)
    return 0


def _options(folder: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dense", type=Path, help="folder of the dense parent's archive, its engine built")
    parser.add_argument("--alone", action="store_true", help="time nothing beside it")
    parser.add_argument(
        "--note", default="", help="what the device cannot tell, such as cooling: stored with the result"
    )
    parser.add_argument("--out", type=Path, default=folder / "bench-result.json")
    options = parser.parse_args()
    if min(options.prompt, options.decode, options.repeats) < 1 or options.warmup < 0:
        parser.error("--prompt, --decode and --repeats must be at least 1, --warmup at least 0")
    return options


def _parent(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of the dense parent's archive.

    Raises:
        moedge_trt.DeviceError: it is of no dense model, or of another one.
    """
    found = moedge_archive.open_archive(folder)
    if found["kind"] != "dense":
        raise moedge_trt.DeviceError(f"{folder} is no archive of a dense model; give the dense parent's, or --alone.")
    if differs := moedge_archive.other_model(found["model"], manifest["model"]):
        raise moedge_trt.DeviceError(
            f"{folder} is of another model than this archive ({differs}); give the dense parent's, or --alone."
        )
    return found


def _dense_beside(folder: Path, manifest: dict[str, Any]) -> Path | None:
    """Find the one folder beside this one that holds the archive of the same dense model with an engine.

    Where there are several, none is chosen; they are named.
    """
    found: dict[Path, Any] = {}
    for path in sorted(folder.parent.glob(f"*/{moedge_archive.MANIFEST}")):
        if path.parent == folder or not (path.parent / moedge_archive.ENGINE_FACTS).is_file():
            continue
        other = moedge_trt.read_json(path)
        if other.get("schema") != moedge_archive.SCHEMA or other.get("kind") != "dense":
            continue
        if differs := moedge_archive.other_model(other["model"], manifest["model"]):
            print(f"not beside: {path.parent} is of another model ({differs})", file=sys.stderr)
        else:
            found[path.parent] = other.get("dtype")
    if len(found) > 1:
        listed = ", ".join(f"{path} ({dtype})" for path, dtype in found.items())
        print(f"not beside: several archives of the dense parent ({listed}); name one with --dense", file=sys.stderr)
        return None
    return next(iter(found), None)


def _protocol(sessions: dict[str, Any], options: argparse.Namespace) -> moedge_timing.Protocol:
    """Shorten the prompt to what every engine holds; say so.

    Raises:
        moedge_trt.DeviceError: there is no room for a prompt.
    """
    longest = min(session.limits["max_length"] for session in sessions.values())
    most = min(session.limits["max_prompt"] for session in sessions.values())
    prompt = min(options.prompt, most, longest - options.decode)
    if prompt < 1:
        raise moedge_trt.DeviceError(
            f"--decode {options.decode} leaves no room for a prompt: this engine holds {longest} tokens."
        )
    if prompt < options.prompt:
        print(f"note: this engine takes {prompt} of {options.prompt} prompt tokens", file=sys.stderr)
    return moedge_timing.Protocol(prompt, options.decode, options.repeats, options.warmup)


def _row(times: moedge_timing.Times, rounds: dict[str, list[float]], energy: dict[str, Any]) -> dict[str, Any]:
    """What was measured of one engine."""
    ttft, tpot = moedge_timing.summary(times.ttft), moedge_timing.summary(times.tpot)
    return {
        **{"ttft_ms": ttft, "tpot_ms": tpot, "decode_tokens_per_s": 1e3 / tpot["p50"]},
        **{"rounds": rounds, "energy": energy},
    }


def _print(result: dict[str, Any]) -> None:
    for row in (result, *([result["dense"]] if "dense" in result else [])):
        joules = row["energy"]["joules_per_token"]
        print(
            f"{row['label']}: first token {row['ttft_ms']['p50']:.2f} ms, per token {row['tpot_ms']['p50']:.3f} ms, "
            f"{row['decode_tokens_per_s']:.1f} tokens/s, "
            + (f"energy not told ({row['energy']['reason']})" if joules is None else f"{joules:.3f} J a token")
        )
    for name, words in (("ttft_ms", "first token"), ("tpot_ms", "per token")):
        if "dense" in result:
            gain = result["dense"]["speedup"][name]
            low, high = gain["ci95_low"], gain["ci95_high"]
            interval = "no interval from one round" if low is None else f"{low:.2f} to {high:.2f}"
            print(f"{words}: {gain['speedup']:.2f} times as fast ({interval})")
    guard = result["environment"]["guard"]
    for concern in guard["concerns"]:
        print(f"NOT TO BE TRUSTED: {concern['says']}")
    for note in guard["notes"]:
        print(f"note: {note}")


if __name__ == "__main__":
    sys.exit(moedge_archive.run(main))
