"""Which engines of a run are compared with which."""

from __future__ import annotations

from moedge.runtime.parity.comparisons import Comparison, Group, comparisons, grouped
from moedge.runtime.run.refs import TORCH_DENSE, TORCH_MOE, EngineRef

PORTABLE, ORT, INT4 = (EngineRef(target, "moe") for target in ("portable", "ort-cpu", "ort-cpu-int4"))
PARENT = EngineRef("ort-cpu-int4", "dense")
RUN = [TORCH_DENSE, TORCH_MOE, PORTABLE, ORT, INT4, PARENT]


def test_every_engine_is_compared_and_none_with_itself() -> None:
    assert [one.name for one in comparisons(RUN, TORCH_DENSE)] == [
        "torch moe = torch dense",
        "portable moe = torch dense",
        "ort-cpu moe = torch dense",
        "ort-cpu-int4 dense vs torch dense",
        "portable moe vs torch moe",
        "ort-cpu moe vs torch moe",
        "ort-cpu-int4 moe vs torch moe",
        "ort-cpu-int4 moe vs its de-quantised weights",
    ]
    assert {one.kind for one in comparisons(RUN, None)} == {"parity", "kernels"}, "an identity needs a reference"
    assert comparisons([TORCH_MOE], TORCH_MOE) == []


def test_a_reference_runs_once_for_its_tests_and_on_its_own_weights_for_each_quantised_one() -> None:
    int8 = EngineRef("ort-cpu-int8", "moe")
    groups = grouped(comparisons([*RUN, int8], TORCH_DENSE), windows=8)
    assert groups[Group("identity", TORCH_DENSE, 2)] == [TORCH_MOE, PORTABLE, ORT]
    assert groups[Group("parity", TORCH_MOE, 8)] == [PORTABLE, ORT, INT4, int8]
    assert groups[Group("parity", TORCH_DENSE, 2)] == [PARENT]
    assert groups[Group("kernels", PORTABLE, 2, INT4)] == [INT4]
    assert groups[Group("kernels", PORTABLE, 2, int8)] == [int8]
    assert len(groups) == 5
    assert Comparison("parity", TORCH_MOE, ORT).windows(1) == 1
