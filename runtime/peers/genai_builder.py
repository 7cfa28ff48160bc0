"""onnxruntime-genai's own builder, by its command line: a dense checkpoint becomes what peer ``genai`` opens."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from moedge import MoEdgeError
from moedge._children import module

_OPTIONS = {
    "int4": ("-p", "int4", "--extra_options", "accuracy_level=4", "block_size=32"),
    "int8": ("-p", "int8", "--extra_options", "accuracy_level=4", "block_size=32"),
    "fp32": ("-p", "fp32"),
}
"""The formats of our own quantised bundles: blocks of 32, activations rounded to 8 bits."""


def build(checkpoint: Path, out: Path, precision: str) -> None:
    """Write genai's folder of ``checkpoint`` to ``out``.

    Raises:
        MoEdgeError: the builder fails, with the last line that it said.
    """
    with tempfile.TemporaryDirectory() as cache:
        options = ("-i", str(checkpoint), "-o", str(out), "-e", "cpu", "-c", cache, *_OPTIONS[precision])
        command = module("onnxruntime_genai.models.builder", *options)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (out / "genai_config.json").is_file():
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}, no output"])[-1]
        raise MoEdgeError(f"onnxruntime-genai's builder cannot make {precision} of {checkpoint}: {last}")
