"""The checks that guard the kernel tests catch what they claim to; launch rules; the operators' CUDA registration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedge.convert import ops

triton = pytest.importorskip("triton")  # Linux only
tl = pytest.importorskip("triton.language")


@triton.jit
def faulty(x_ptr, y_ptr, N: tl.constexpr, FAULT: tl.constexpr):
    i = tl.program_id(0) * 8 + tl.arange(0, 8)
    x = tl.load(x_ptr + i, mask=(i < N) | (FAULT == "read past the end"), other=0.0)
    if FAULT == "write past the end":
        tl.store(y_ptr + i, x)
    elif FAULT == "write before the start":
        tl.store(y_ptr + i - 1, x, mask=i < N)
    elif FAULT == "two programs write":
        tl.store(y_ptr + i % 8, x, mask=i < N)
        tl.store(y_ptr + i, x, mask=(i < N) & (i >= 8))
    elif FAULT == "two lanes write":
        tl.store(y_ptr + i // 2, x, mask=i < N)
    elif FAULT == "read what another program writes":
        tl.store(y_ptr + i, x, mask=i < N)
        tl.store(y_ptr + i, tl.load(y_ptr + i - 8, mask=(i >= 8) & (i < N), other=0.0), mask=i < N)
    elif FAULT == "read before writing":
        tl.store(y_ptr + i, tl.load(y_ptr + i, mask=i < N, other=0.0), mask=i < N)
    elif FAULT == "write to an input":
        tl.store(x_ptr + i, x, mask=i < N)
    elif FAULT == "leave a gap":
        tl.store(y_ptr + i, x, mask=(i < N) & (i != 3))
    else:
        tl.store(y_ptr + i, x, mask=i < N)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("read past the end", "load outside every tensor"),
        ("write past the end", "store outside every tensor"),
        ("write before the start", "store outside every tensor"),
        ("two programs write", "race: two programs store"),
        ("two lanes write", "race: two lanes store"),
        ("read what another program writes", "race: load of y_ptr that another program stores"),
        ("read before writing", "before anything was stored"),
        ("write to an input", "store to the input x_ptr"),
        ("leave a gap", "1 elements of y_ptr were never stored"),
        (None, None),
    ],
)
def test_every_kind_of_fault_is_caught_and_named(
    interpreter: Callable[..., Any], request: pytest.FixtureRequest, fault: str | None, named: str | None
) -> None:
    buffer = sys.modules[type(interpreter([])).__module__].Buffer
    n = 13
    # The tensors are slices: an access beside them stays within the process's memory.
    x, y = torch.randn(64)[16 : 16 + n], torch.zeros(64)[16 : 16 + n]
    watch = interpreter([buffer("x_ptr", x, False), buffer("y_ptr", y, True)])

    def launch() -> None:
        faulty[(2,)](x, y, n, fault)
        watch.check_complete()

    if fault is None:
        launch()
        assert torch.equal(x, y)
    else:
        with pytest.raises(Exception, match=named):
            launch()


@given(
    counts=st.lists(st.integers(0, 300), min_size=2, max_size=64),
    path=st.sampled_from(("gemm16", "gemm32", "gemm64")),
)
def test_the_grid_holds_the_tiles_of_every_split(counts: list[int], path: str) -> None:
    """The rule knows the number of rows only; whatever their split, each expert's tiles fit."""
    from moedge.convert.ops.kernels import grouped, grouped_linear

    launch = grouped_linear.launch(hidden=70, width=40, experts=len(counts), dtype="fp16", path=path)
    rows, block = sum(counts), grouped.PATHS[path]
    needed = sum(-(-count // block) for count in counts)
    assert needed <= launch.programs(rows)[0] <= needed + len(counts)


def test_grids_are_formulas_of_one_size() -> None:
    """What TensorRT evaluates symbolically, written out for known sizes."""
    from moedge.convert.ops.kernels import combine, dispatch, grouped_glu, route

    assert route.launch(experts=8, top_k=2, rule="unit").programs(300) == (300, 1)
    assert dispatch.launch(hidden=1100, experts=8, top_k=3, dtype="fp16").programs(11) == (3, 2)  # 33 rows by 16
    glu = {"hidden": 64, "width": 100, "experts": 8, "activation": "silu", "dtype": "fp16"}
    assert grouped_glu.launch(**glu, path="gemv").programs(5)[0] == 5
    assert grouped_glu.launch(**glu, path="gemm16").programs(33) == ((33 + 8 * 15) // 16, 2)
    assert combine.launch(hidden=600, experts=8, top_k=2, dtype="fp16", compensated=False).programs(9) == (3, 2)
    assert combine.launch(hidden=600, experts=8, top_k=2, dtype="fp16", compensated=True).programs(17) == (2, 5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"path": "gemm8"}, "unknown path"),
        ({"dtype": "fp64"}, "activations of type fp64"),
    ],
)
def test_launches_that_no_kernel_has_are_refused(wrong: dict[str, Any], said: str) -> None:
    from moedge.convert.ops.kernels import grouped_linear, route

    options = {"hidden": 8, "width": 8, "experts": 2, "dtype": "fp16", "path": "gemv"} | wrong
    with pytest.raises(ValueError, match=said):
        grouped_linear.launch(**options)
    with pytest.raises(ValueError, match="need 1 <= k <= E <= 512"):
        route.launch(experts=513, top_k=1, rule="unit")


OPERATORS = ("route", "dispatch", "grouped_glu", "grouped_linear", "combine", "sparse_glu", "gathered_glu",
             "gathered_linear")  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_a_cuda_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moedge::{name}", "CUDA")


def test_what_the_kernels_do_not_take_runs_in_pytorch() -> None:
    from moedge.convert.ops.kernels import cuda

    scores, x = torch.randn(2, 600), torch.randn(2, 8)
    indices, offsets = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)
    gate, down = torch.randn(2, 4, 8), torch.randn(2, 8, 4)
    weights = torch.ones(2, 1)
    assert cuda.supports("route", (scores[:, :512], None, None, 1, "unit"))
    assert not cuda.supports("route", (scores, None, None, 1, "unit"))
    assert not cuda.supports("dispatch", (x.double(), indices, 2))
    assert not cuda.supports("dispatch", (x, indices, 1536))
    assert cuda.supports("grouped_glu", (x, offsets, gate, gate, "silu"))
    assert cuda.supports("gathered_glu", (x, gate[0].T, gate[0].T, torch.ones(2, 4), "silu"))
    assert not cuda.supports("gathered_linear", (x.double(), gate[0].T.double()))
    assert cuda.supports("combine", (x, indices, indices, weights, None))
    assert not cuda.supports("combine", (x, indices, indices, weights, torch.randn(1536, 8)))
    assert cuda.supports("sparse_glu", (x, indices, weights, gate, gate, down, None, "silu"))
    assert not cuda.supports("sparse_glu", (x, indices, weights, gate[:, :1], gate[:, :1], down[..., :1], None, "silu"))


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True)])
def test_gpus_that_triton_has_no_tensor_core_code_for_run_pytorch(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], taken: bool
) -> None:
    """On a T4 Triton's products spill kilobytes a thread; cuBLAS does not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moedge.convert.ops.kernels import cuda

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda._too_old.cache_clear()
    with FakeTensorMode():
        x, weight = (torch.empty(8, 8, device="cuda", dtype=torch.float16) for _ in range(2))
        offsets = torch.empty(3, device="cuda", dtype=torch.int32)
    assert cuda.supports("gathered_linear", (x, weight)) is taken
    assert cuda.supports("grouped_linear", (x, offsets, weight)) is taken
    cuda._too_old.cache_clear()


def test_the_cuda_kernel_of_an_operator_is_triton_and_without_triton_pytorch(
    monkeypatch: pytest.MonkeyPatch, interpreter: Callable[..., Any]
) -> None:
    from moedge.convert.ops.kernels import cuda

    scores = torch.tensor([[0.5, 2.0, 1.0]])
    on_cuda = ops.route._backend_fns["cuda"]
    launched: list[str] = []
    plain = cuda.run
    monkeypatch.setattr(cuda, "run", lambda launch, *rest: (launched.append(launch.kernel), plain(launch, *rest)))
    assert on_cuda(scores, None, None, 2, "unit")[0].tolist() == [[1, 2]]
    assert launched == ["route.route"]
    for name in [name for name in sys.modules if name.startswith("moedge.convert.ops.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    import moedge.export

    monkeypatch.delattr(moedge.export, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert on_cuda(scores, None, None, 2, "unit")[0].tolist() == [[1, 2]]
    assert launched == ["route.route"]
