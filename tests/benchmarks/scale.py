"""Memory and time of a conversion against the size of the model; docs/scale.md holds measured figures.

    python tests/benchmarks/scale.py                             # two widths, two depths each
    python tests/benchmarks/scale.py --hidden 4096 --width 11008 --layers 1 --shared 2 --active 10

Each row is a process of its own: a random-init Llama is calibrated on random ids, planned by CMoE and converted in
place. ``over`` is the peak of resident memory less what the model holds before the step, so it is the cost of the
conversion itself. Linux only (it resets the peak through /proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
SMALL = [(512, 1408, 4), (512, 1408, 16), (1024, 2816, 4), (1024, 2816, 16)]
"""Hidden, FFN width, layers."""


def resident(field: str) -> float:
    """Return VmRSS or VmHWM (its peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


class Step:
    """Measures a block: seconds, CPU seconds, and the peak of memory above what was there before."""

    def __enter__(self) -> Step:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        self.before, self.wall, self.cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.facts = {
            "seconds": round(time.perf_counter() - self.wall, 2),
            "cpu_seconds": round(time.process_time() - self.cpu, 2),
            "over_mib": round(resident("VmHWM") - self.before),
        }


def measure(hidden: int, width: int, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Convert one random-init model in this process."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moedge.convert import calibration, methods, modeling

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=1024,
        max_position_embeddings=args.length,
    )
    torch.manual_seed(0)
    before = resident("VmRSS")
    dtype = getattr(torch, args.dtype)
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    windows = np.random.default_rng(0).integers(0, 1024, (args.tokens // args.length, args.length))
    layer = 3 * hidden * width * dtype.itemsize
    # One small window first: thread pools and lazy imports are no cost of a conversion.
    calibration.collect(model, windows[:1, :8], k_a=args.k_a)
    steps = {}
    with Step() as steps["calibrate"]:
        statistics = calibration.collect(model, windows, k_a=args.k_a)
    import ot  # noqa: F401  not part of the time of a layer
    from scipy import optimize, sparse  # noqa: F401

    layout = {"shared": args.shared, "active": args.active, "experts": args.experts}
    with Step() as steps["plan"]:
        plan = methods.convert("cmoe", statistics, model, **layout, k_a=args.k_a)
    with Step() as steps["apply"]:
        modeling.apply(plan, model)
    return {
        "hidden": hidden,
        "width": width,
        "layers": layers,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "routed_neurons": sum(map(len, plan.layers[0].experts)),
        "iterations": [item.report["iterations"] for item in plan.layers],
        "threads": torch.get_num_threads(),
        "model_mib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / MIB),
        "layer_ffn_mib": round(layer / MIB),
        "statistics_mib": round(layers * (statistics[0].top_neurons.nbytes + 8 * width) / MIB, 1),
        "start_mib": round(before),
        **{name: step.facts for name, step in steps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--k-a", type=int, default=10)
    parser.add_argument("--shared", type=int, default=6)
    parser.add_argument("--active", type=int, default=6)
    parser.add_argument("--experts", type=int, default=16)
    args = parser.parse_args()
    if args.hidden and args.width and args.layers:
        print(json.dumps(measure(args.hidden, args.width, args.layers, args)))
        return
    for hidden, width, layers in SMALL:
        shape = ["--hidden", hidden, "--width", width, "--layers", layers]
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *map(str, shape)], check=True)


if __name__ == "__main__":
    main()
