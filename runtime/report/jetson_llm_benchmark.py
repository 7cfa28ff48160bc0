"""A device's ``bench-result.json`` in the JSON of NVIDIA's skill ``jetson-llm-benchmark``: beside vLLM and others.

The keys are those that ``bench_vllm.sh`` of NVIDIA/skills prints (version of 2026); the names of boards are those of
its ``detect_jetson.sh``. What vLLM calls ITL are our samples of a token; its TPOT is the mean over one answer. An
answer of ``output_len`` tokens holds the first one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.report.device_result import Benched, DeviceResult

FORMAT = "jetson-llm-benchmark"
_BOARDS = (("thor", "thor"), ("agx orin", "orin-agx"), ("orin nx", "orin-nx"), ("orin nano", "orin-nano"))
"""Part of /proc/device-tree/model -> name of the board."""
_LINES = {"thor": ("thor", "thor-agx")}
_SIZES = {"orin-agx": ((56, 64), (28, 32)), "orin-nx": ((14, 16), (7, 8)), "orin-nano": ((7, 8), (3, 4))}
"""Board -> (least GiB that the system tells, GB of the variant)."""
_UNKNOWN = "unknown"


def convert(result: DeviceResult) -> dict[str, Any]:
    """Return a benchmark's result of a device in that format.

    Raises:
        MoEdgeError: it is no benchmark, or one of an older archive without its rounds.
    """
    if result["kind"] != "bench" or "rounds" not in result:
        raise MoEdgeError(f"{FORMAT} holds a benchmark of a current archive: give a bench-result.json, or bench again.")
    protocol, device, environment = result["protocol"], result["device"], result.get("environment")
    board = _board(device["name"])
    generation, line = _LINES.get(board, ("orin", board) if board != _UNKNOWN else (_UNKNOWN, _UNKNOWN))
    guard = environment["guard"] if environment else None
    return {
        "skill": FORMAT,
        "runtime": f"moedge ({device['runtime']})",
        "model": result["label"],
        "sku": board,
        "generation": generation,
        "product_line": line,
        "variant": _variant(board, device["memory_bytes"]["total"] / 2**30),
        "l4t": (environment and environment.get("l4t")) or _UNKNOWN,
        "benchmark_mode": "native",
        "container": "",
        "config": {
            "input_len": protocol["prompt"],
            "output_len": protocol["decode"] + 1,
            "num_prompts": protocol["repeats"],
        },
        "runs": [_run(result, protocol["decode"])],
        "warnings": [*(concern["says"] for concern in guard["concerns"]), *guard["notes"]] if guard else [],
    }


def _run(result: Benched, decode: int) -> dict[str, float]:
    first, whole = (np.asarray(result["rounds"][name]) for name in ("ttft_ms", "e2e_ms"))
    return {
        "concurrency": 1,
        "ttft_ms_p50": result["ttft_ms"]["p50"],
        "ttft_ms_p99": result["ttft_ms"]["p99"],
        "itl_ms_p50": result["tpot_ms"]["p50"],
        "itl_ms_p99": result["tpot_ms"]["p99"],
        "tpot_ms_p50": float(np.median((whole - first) / decode)),
        "throughput_tok_s": float(1e3 * (decode + 1) * len(whole) / whole.sum()),
        "e2e_latency_ms_p50": float(np.median(whole)),
    }


def _board(model: str) -> str:
    return next((board for part, board in _BOARDS if part in model.lower()), _UNKNOWN)


def _variant(board: str, gib: float) -> str:
    size = next((size for least, size in _SIZES.get(board, ()) if gib >= least), None)
    return board if size is None else f"{board}-{size}gb"
