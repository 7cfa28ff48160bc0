"""What a device timed: intervals over rounds, ratios paired by round, and NVIDIA's format for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.runtime.commands import device_report
from moedge.runtime.device import moedge_timing
from moedge.runtime.report import jetson_llm_benchmark


def test_a_benchmark_in_the_format_of_jetson_llm_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times are chosen so that each figure has a value of its own: two rounds of a prompt and two more tokens."""
    times = moedge_timing.Times([[100.0], [110.0]], [[10.0, 12.0], [14.0, 20.0]])
    ttft, tpot = moedge_timing.summary(times.ttft), moedge_timing.summary(times.tpot)
    result = {
        **{"schema": "moedge.device-result/1", "kind": "bench", "label": "moe", "engine": {}},
        "device": {
            **{"name": "NVIDIA Jetson AGX Orin Developer Kit", "runtime": "tensorrt 10.3", "compute_capability": "8.7"},
            **{"system": "Linux", "memory_bytes": {"free": 1, "total": int(61.4 * 2**30)}},
        },
        "protocol": {"batch": 1, "prompt": 512, "decode": 2, "repeats": 2, "warmup": 1, "note": ""},
        **{"ttft_ms": ttft, "tpot_ms": tpot, "rounds": times.rounds()},
        "environment": {"l4t": "36.4.7", "guard": {"concerns": [{"says": "Hot."}], "notes": ["15W."]}},
    }
    (tmp_path / "b.json").write_text(json.dumps(result))
    assert device_report.device_report([tmp_path / "b.json"], form="jetson-llm-benchmark") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        **{"skill": "jetson-llm-benchmark", "runtime": "moedge (tensorrt 10.3)", "model": "moe"},
        **{"sku": "orin-agx", "generation": "orin", "product_line": "orin-agx", "variant": "orin-agx-64gb"},
        **{"l4t": "36.4.7", "benchmark_mode": "native", "container": ""},
        "config": {"input_len": 512, "output_len": 3, "num_prompts": 2},
        "runs": [
            {
                "concurrency": 1,
                **{"ttft_ms_p50": 105.0, "ttft_ms_p99": pytest.approx(109.9)},
                **{"itl_ms_p50": 13.0, "itl_ms_p99": pytest.approx(19.82)},
                # Means of the answers: 11 and 17.
                "tpot_ms_p50": 14.0,
                # Six tokens in 122 + 144 ms.
                "throughput_tok_s": pytest.approx(6e3 / 266),
                "e2e_latency_ms_p50": 133.0,
            }
        ],
        "warnings": ["Hot.", "15W."],
    }
    with pytest.raises(MoEdgeError, match="Unknown format 'csv'; known: jetson-llm-benchmark"):
        device_report.device_report([tmp_path / "b.json"], form="csv")
    (tmp_path / "b.json").write_text(json.dumps({name: value for name, value in result.items() if name != "rounds"}))
    with pytest.raises(MoEdgeError, match="bench again"):
        device_report.device_report([tmp_path / "b.json"], form="jetson-llm-benchmark")


@pytest.mark.parametrize(
    ("model", "gib", "names"),
    [
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            7.4,
            ("orin-nano", "orin", "orin-nano-8gb"),
        ),
        ("NVIDIA Jetson Orin NX 16GB", 15.3, ("orin-nx", "orin", "orin-nx-16gb")),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122.8, ("thor", "thor", "thor")),
        ("NVIDIA H100", 80, ("unknown", "unknown", "unknown")),
    ],
)
def test_names_of_boards(model: str, gib: float, names: tuple[str, str, str]) -> None:
    times = moedge_timing.Times([[1.0]], [[1.0]])
    result = {
        "kind": "bench",
        "label": "x",
        "device": {"name": model, "runtime": "r", "memory_bytes": {"total": int(gib * 2**30)}},
        "protocol": {"prompt": 1, "decode": 1, "repeats": 1},
        **{"ttft_ms": moedge_timing.summary(times.ttft), "tpot_ms": moedge_timing.summary(times.tpot)},
        "rounds": times.rounds(),
    }
    found = jetson_llm_benchmark.convert(result)
    assert (found["sku"], found["generation"], found["variant"]) == names
    assert found["product_line"] == ("thor-agx" if names[0] == "thor" else names[0])


def test_intervals_on_a_device_are_those_of_rounds() -> None:
    """Samples of a round share the machine's mood: an interval of single samples would be a quarter as wide."""
    draw = np.random.default_rng(0)
    rounds = draw.normal(10, 1, (12, 1)) + draw.normal(0, 0.05, (12, 64))
    found = moedge_timing.summary(rounds)
    low, high = found["ci95_low"], found["ci95_high"]
    assert low is not None
    assert high is not None
    single = draw.integers(0, rounds.size, (2000, rounds.size))
    narrow = np.ptp(np.percentile(np.median(rounds.reshape(-1)[single], axis=1), [2.5, 97.5]))
    assert high - low > 3 * narrow
    few = moedge_timing.summary(rounds[:5])
    assert few["ci95_low"] is few["ci95_high"] is None, "five rounds tell no interval of a median"


def test_ratios_on_a_device_are_paired_by_round() -> None:
    drift = np.array([[1.0], [1.0], [3.0], [1.2], [2.0], [5.0]])
    found = moedge_timing.speedup(20 * drift, 10 * drift)
    assert (found["speedup"], found["ci95_low"], found["ci95_high"]) == pytest.approx((2, 2, 2))
    assert found["verdict"] == "faster"
    assert moedge_timing.speedup(10 * drift, 20 * drift)["verdict"] == "slower"
    same = moedge_timing.speedup(np.array([[1.0], [1.2], [0.9]]), np.array([[1.1], [1.0], [1.0]]))
    assert same["verdict"] == "no difference shown"
    one = moedge_timing.speedup(20 * drift[:1], 10 * drift[:1])
    assert (one["ci95_low"], one["verdict"]) == (None, "no difference shown")
