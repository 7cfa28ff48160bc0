"""Build the engine of this archive, on the device it is for.

    python3 build_engine.py

Needs numpy and the Python package of TensorRT (JetPack has both). A timing cache is kept in ``timing.cache``. With
``--target tensorrt-rtx --compute-capability 8.9`` the same graph is built with TensorRT for RTX, on any machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_archive, moedge_cuda, moedge_plugins, moedge_trt
else:  # in an archive the files lie side by side
    import moedge_archive
    import moedge_cuda
    import moedge_plugins
    import moedge_trt


def main() -> int:
    """Build, write ``engine.plan`` and ``engine.json``."""
    folder = Path(__file__).resolve().parent
    manifest = moedge_archive.open_archive(folder)
    limits = manifest["profiles"]
    options = _options(limits)
    trt = moedge_trt.load_tensorrt(options.target)
    capabilities = _capabilities(options, manifest)
    if "plugins" in manifest:
        if options.target != "tensorrt":
            raise moedge_trt.DeviceError(
                "This archive has plugins, which TensorRT for RTX does not take; export target tensorrt-rtx."
            )
        # Before the graph is parsed: the parser looks every node up in the registry.
        library = moedge_plugins.Library(folder / moedge_plugins.FOLDER)
        moedge_plugins.register(library, capability=int(capabilities[0].replace(".", "")))
    limits = {"max_length": options.max_length, "max_prompt": options.max_prompt, "batch": options.batch}
    outputs, taps = moedge_trt.tap_outputs({} if options.no_taps else manifest["taps"])
    print(f"building with {options.target} {trt.__version__} for SM{', SM'.join(capabilities)}: this takes minutes")
    plan, built = moedge_trt.build(
        trt,
        folder / "model.onnx",
        moedge_trt.profile_shapes(manifest["model"], **limits),
        compute_capabilities=capabilities if options.target == "tensorrt-rtx" else None,
        taps=outputs,
        timing_cache=folder / "timing.cache",
    )
    engine = folder / moedge_archive.ENGINE
    moedge_trt.write_bytes(engine, plan)
    facts = {
        "target": options.target,
        "dtype": manifest["dtype"],
        "model": manifest["model"],
        "profiles": limits,
        "taps": taps,
        "compute_capabilities": capabilities,
        "versions": {trt.__name__: trt.__version__},
        "build": built,
        "graph_sha256": manifest["files"]["model.onnx"]["sha256"],
        "sha256": moedge_trt.sha256(engine),
    }
    moedge_trt.write_bytes(folder / moedge_archive.ENGINE_FACTS, (json.dumps(facts, indent=2) + "\n").encode())
    print(f"built {engine}: {len(plan) / 2**20:.0f} MiB, {built['layers']} layers, {built['build_s']:.0f} s")
    return 0


def _options(limits: dict[str, int]) -> argparse.Namespace:
    """The command line; ``limits`` are the archive's, the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-length", type=int, default=limits["max_length"], help="longest sequence in tokens")
    parser.add_argument("--max-prompt", type=int, default=limits["max_prompt"], help="most tokens of one prefill call")
    parser.add_argument("--batch", type=int, default=limits["batch"], help="most rows of a call; tuned for that many")
    parser.add_argument("--no-taps", action="store_true", help="leave out the selected experts (no routing check)")
    parser.add_argument("--target", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt")
    parser.add_argument("--compute-capability", action="append", help="tensorrt-rtx only: GPUs to build for")
    options = parser.parse_args()
    if options.target == "tensorrt" and options.compute_capability:
        parser.error("--compute-capability is for --target tensorrt-rtx: TensorRT builds for the GPU that is here")
    return options


def _capabilities(options: argparse.Namespace, manifest: dict[str, Any]) -> list[str]:
    """The GPUs to build for; TensorRT builds for the one that is here."""
    if options.target != "tensorrt":
        return options.compute_capability or [manifest["device"]["compute_capability"]]
    cuda = moedge_cuda.Cuda()
    here, wanted = cuda.capability(), manifest["device"]["compute_capability"]
    cuda.close()
    if here != wanted and "plugins" in manifest:
        raise moedge_trt.DeviceError(
            f"The kernels of this archive are for compute capability {wanted}, this GPU has {here}; make an "
            "archive for this device with `moedge pack`."
        )
    if here != wanted:
        print(f"note: this archive was made for compute capability {wanted}; this GPU has {here}", file=sys.stderr)
    return [here]


if __name__ == "__main__":
    sys.exit(moedge_archive.run(main))
