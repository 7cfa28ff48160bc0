"""What a device timed: intervals over rounds, ratios paired by round, and NVIDIA's format for comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.runtime.commands import device_report
from moedge.runtime.device import moedge_archive, moedge_timing
from moedge.runtime.parity.recorded import Recorded
from moedge.runtime.report import jetson_llm_benchmark


def guard(**change: Any) -> dict[str, Any]:
    settings = {"power_mode": "15W", "clocks_locked": None}
    told = {"others_cores": 0.1, "stolen_cores": None, "mhz": None, "gpu_mhz": [624.75, 1300.5], "hottest_c": 60.5}
    seen = {"trusted": False, "concerns": [{"says": "Hot."}], "notes": ["15W."], "spread": [{"cv": 0.01}]}
    return {"settings": settings, **told, **seen, **change}


def result_of(kind: str) -> dict[str, Any]:
    """A device's result as its script writes it, without what nobody reads here."""
    device = {"name": "Orin", "compute_capability": "8.7", "runtime": "tensorrt 10.3", "system": "Linux 5.15"}
    about = {"schema": "moedge.device-result/1", "kind": kind, "label": "moe", "engine": {"dtype": "float16"}}
    about |= {"device": {**device, "memory_bytes": {"free": 1, "total": 2}}}
    if kind == "verify":
        check = {"name": "mean_kl", "value": 0.001, "relation": "<=", "limit": 0.01, "passed": True, "decided": True}
        return {**about, "logits": {}, "judged": None, "routing": {}, "checks": [check], "passed": True}
    times = moedge_timing.Times([[100.0], [110.0]], [[10.0, 12.0], [14.0, 20.0]])
    energy = {"source": None, "reason": "no rails", "joules_per_prompt": None, "joules_per_token": None}
    row = {"ttft_ms": moedge_timing.summary(times.ttft), "tpot_ms": moedge_timing.summary(times.tpot)}
    row |= {"rounds": times.rounds(), "energy": energy}
    gains = {name: moedge_timing.speedup(times.ttft, times.ttft) for name in ("ttft_ms", "tpot_ms")}
    protocol = {"batch": 1, "prompt": 512, "decode": 2, "repeats": 2, "warmup": 1, "note": ""}
    environment = {"l4t": "36.4.7", "guard": guard()}
    return {
        **about,
        **row,
        "protocol": protocol,
        "environment": environment,
        "dense": {"label": "d", **row, "speedup": gains},
    }


def damaged(kind: str, place: str, value: Any) -> dict[str, Any]:
    """A result with another value at a dotted place; without it where ``value`` is ``...``."""
    found = json.loads(json.dumps(result_of(kind)))
    *above, last = place.split(".")
    below = found
    for key in above:
        below = below[key]
    if value is ...:
        del below[last]
    else:
        below[last] = value
    return found


@pytest.mark.parametrize("kind", ["verify", "bench"])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_whole_result_is_printed(
    kind: str, as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result_of(kind)))
    assert device_report.device_report([tmp_path / "r.json"], as_json=as_json) == 0
    shown = capsys.readouterr().out
    if as_json:
        assert json.loads(shown) == {str(tmp_path / "r.json"): result_of(kind)}, "as it is in the file"
    else:
        assert "Orin, SM87, tensorrt 10.3, Linux 5.15" in shown


@pytest.mark.parametrize(
    ("kind", "place", "value", "said"),
    [
        (
            "bench",
            "device",
            {},
            "lacks device.name, device.compute_capability, device.runtime, device.system, device.mem",
        ),
        ("bench", "device.memory_bytes", ..., "lacks device.memory_bytes;"),
        ("bench", "device.memory_bytes", {"total": "64 GB"}, "device.memory_bytes.total is not what it should be"),
        ("bench", "ttft_ms", {}, "lacks ttft_ms.p50, ttft_ms.p90, ttft_ms.p99, ttft_ms.ci95_low, ttft_ms.ci95_high;"),
        ("bench", "tpot_ms", [1.0], "tpot_ms is not what it should be"),
        ("bench", "tpot_ms.p50", "fast", "tpot_ms.p50 is not what it should be"),
        ("bench", "tpot_ms.p99", float("nan"), "a number in it is not finite"),
        ("bench", "protocol.decode", 0, "protocol.decode is not what it should be"),
        ("bench", "protocol.note", ..., "lacks protocol.note;"),
        ("bench", "rounds.e2e_ms", [], "rounds.e2e_ms is not what it should be"),
        ("bench", "rounds.e2e_ms", [1.0], "rounds is not what it should be"),
        ("bench", "energy", {}, "lacks energy.source, energy.reason, energy.joules_per_token;"),
        ("bench", "environment.guard", {}, "lacks environment.guard.trusted"),
        ("bench", "environment.guard", guard(concerns=[]), "environment.guard is not what it should be"),
        ("bench", "environment.guard.gpu_mhz", [1.0], "environment.guard.gpu_mhz is not what it should be"),
        ("bench", "dense", {}, "lacks dense.label"),
        ("bench", "dense.speedup.ttft_ms", None, "dense.speedup.ttft_ms is not what it should be"),
        ("bench", "engine", [], "engine is not what it should be"),
        ("bench", "kind", [], "is not a result of verify.py or bench.py"),
        ("verify", "device", None, "device is not what it should be"),
        ("verify", "checks", [], "checks is not what it should be"),
        ("verify", "checks", [{}], "lacks checks.0.name"),
        ("verify", "passed", False, "passed is not what its checks say"),
        ("verify", "passed", "yes", "passed is not what it should be"),
    ],
)
def test_a_damaged_result_is_one_sentence(kind: str, place: str, value: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(damaged(kind, place, value)))
    for form, as_json in ((None, False), (None, True), ("jetson-llm-benchmark", False)):
        with pytest.raises(MoEdgeError) as error:
            device_report.device_report([tmp_path / "r.json"], form=form, as_json=as_json)
        assert said in str(error.value)
        assert str(error.value).startswith(f"{tmp_path / 'r.json'} ")
        assert "\n" not in str(error.value)


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
        "environment": {"l4t": "36.4.7", "guard": guard()},
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


def answered(path: Path, **parts: Any) -> Path:
    """``verify-answers.npz`` of one case of 3 tokens, 2 of them the prompt, with ``parts`` in place of its own."""
    about: dict[str, Any] = {"content_sha256": "0", "label": "toy", "kind": "dense", "moe": None, "dtype": "float16"}
    case = moedge_archive.answers(0, np.array([[5, 6, 7]]), 2, np.zeros((3, 8), np.float32), {}, [])
    case = {name: array for name, array in {**case, **parts}.items() if array is not None}
    moedge_archive.write_answers({**about, "model": {"vocab_size": 8}}, case, path)
    return path


def test_whole_answers_are_read(tmp_path: Path) -> None:
    found = Recorded(answered(tmp_path / "a.npz"))
    assert (found.tokens, found.info.dtype, found.routed) == (3, "float16", False)
    assert [(phase, ids.tolist()) for phase, ids, _, _ in found.steps()] == [("prefill", [[5, 6]]), ("decode", [[7]])]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.95])
def test_answers_that_were_cut_off_are_one_sentence(tmp_path: Path, kept: float) -> None:
    path = answered(tmp_path / "a.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(MoEdgeError, match=r"a.npz cannot be read as the answers of a device .*; run verify.py there"):
        Recorded(path)


def test_answers_with_changed_bytes_are_one_sentence(tmp_path: Path) -> None:
    path = answered(tmp_path / "a.npz", **{"0.logits": np.random.default_rng(0).normal(size=(3, 8))})
    content = bytearray(path.read_bytes())
    place = content.index(b"0.logits.npy") + 150
    content[place : place + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(MoEdgeError, match=r"a.npz cannot be read as the answers of a device"):
        Recorded(path)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"0.prompt": None}, "case 0 lacks prompt"),
        ({"0.prompt": None, "0.logits": None}, "case 0 lacks prompt and logits"),
        ({"0.ids": None, "0.prompt": None, "0.logits": None}, "it holds no answers"),
        ({"0.prompt": np.array(4)}, "case 0 is no prompt with its answers"),
        ({"0.logits": np.zeros((2, 8))}, "case 0 has 3 tokens, and not as many rows of logits"),
        ({"0.routes.x": np.zeros((3, 1))}, "invalid literal"),
    ],
)
def test_answers_without_a_part_are_one_sentence(tmp_path: Path, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(MoEdgeError) as error:
        Recorded(answered(tmp_path / "a.npz", **parts))
    assert f"a.npz cannot be read as the answers of a device ({said}" in str(error.value)
