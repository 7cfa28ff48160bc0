"""Which engine of a run is compared with which: a converted model has to beat its dense parent in its own precision."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from moedge.runtime.report import gains

TIMES = {"torch dense": 80.0, "torch moe": 100.0, "ort-cpu dense": 20.0, "ort-cpu moe": 16.0, "portable moe": 25.0}
TIMES |= {"ort-cpu-int8 dense": 12.0, "ort-cpu-int8 moe": 10.0, "tensorrt-rtx moe": 2.0, "tensorrt-rtx dense": 3.0}


def report(*labels: str) -> dict[str, Any]:
    """What a report says of these engines; prompts gain what tokens do."""
    ratios = [
        {"metric": metric, "label": one, "baseline": two, "speedup": TIMES[two] / TIMES[one], "ci95": [1.0, 1.5]}
        for metric in ("ttft_ms", "tpot_ms")
        for one, two in permutations(labels, 2)
    ]
    refs = [label.split() for label in labels if not label.startswith("torch")]
    return {
        "bundles": [
            {"label": " ".join(ref), "target": ref[0], "kind": ref[1]} for ref in [*refs, ["portable", "dense"]]
        ],
        "speed": {
            "points": [
                {"rows": [{"label": label} for label in labels], "ratios": [{**one, "verdict": "so"} for one in ratios]}
            ]
        },
    }


def labels(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(one), str(two)) for one, two in gains.pairs(found)]


def test_each_has_the_dense_parent_of_its_own_precision() -> None:
    assert labels(report(*TIMES)) == [
        ("torch moe", "torch dense"),
        ("ort-cpu moe", "ort-cpu dense"),
        ("portable moe", "ort-cpu dense"),  # its own is not timed
        ("ort-cpu-int8 moe", "ort-cpu-int8 dense"),
        ("tensorrt-rtx moe", "tensorrt-rtx dense"),
    ]
    assert labels(report("portable moe", "ort-cpu-int8 moe", "ort-cpu-int8 dense", "tensorrt-rtx dense")) == [
        ("ort-cpu-int8 moe", "ort-cpu-int8 dense")  # neither integers nor a GPU are a portable bundle's parent
    ]


def test_columns_of_a_row_are_its_two_comparisons() -> None:
    found = report(*TIMES)
    own, torch = gains.columns(found, "tpot_ms", "ort-cpu-int8 moe")
    assert (own and own["speedup"], torch and torch["speedup"]) == pytest.approx((1.2, 8.0))
    own, torch = gains.columns(found, "tpot_ms", "ort-cpu-int8 dense")
    assert own is None
    assert torch is not None


def test_a_run_of_integers_alone_says_what_they_gain() -> None:
    said = gains.sentences(report("torch dense", "torch moe", "ort-cpu-int8 moe", "portable moe", "ort-cpu-int8 dense"))
    assert said == [
        "Decoding: ort-cpu-int8 moe runs at 1.20 times the speed of ort-cpu-int8 dense "
        "(95% interval: 1.00 to 1.50), so.",
        "Decoding: ort-cpu-int8 moe runs at 8.00 times the speed of torch dense (95% interval: 1.00 to 1.50), so.",
        "Reading the prompt: ort-cpu-int8 moe runs at 1.20 times the speed of ort-cpu-int8 dense "
        "(95% interval: 1.00 to 1.50), so.",
        "Reading the prompt: ort-cpu-int8 moe runs at 8.00 times the speed of torch dense "
        "(95% interval: 1.00 to 1.50), so.",
    ]


def test_without_dense_bundles_there_is_pytorch() -> None:
    found = report("torch dense", "torch moe", "ort-cpu moe", "portable moe")
    assert gains.compared(found) == [("ort-cpu moe", "torch dense")]
    assert [sentence.split(" times")[0] for sentence in gains.sentences(found)] == [
        "Decoding: ort-cpu moe runs at 5.00",
        "Reading the prompt: ort-cpu moe runs at 5.00",
    ]
    assert gains.sentences(report("torch dense", "torch moe")) == []
