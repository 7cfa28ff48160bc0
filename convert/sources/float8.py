"""Float8 weights with scales by blocks (``quant_method: fp8``): what transformers de-quantizes rightly, or a refusal.

A weight [R, C] of ``name`` is float8 (e4m3) and stands beside ``name_scale_inv`` [ceil(R / b0), ceil(C / b1)] for
blocks of b0 x b1: each block is multiplied by its scale. transformers takes R / (number of scale rows) for b0, which is
another number where the last block is not whole: 192 rows in blocks of 128 become two blocks of 96, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedge import MoEdgeError

KIND = "F8_E4M3"
_SCALE = "_scale_inv"
_SCALE_KINDS = ("F32", "BF16", "F16")


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights are float8 with scales by blocks."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "fp8"


def check(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Refuse what would be de-quantized to other weights.

    Args:
        folder: for messages.
        config: content of config.json.
        tensors: name -> (dtype as safetensors writes it, shape) of all tensors of the folder.

    Raises:
        MoEdgeError: a weight without its scales, of another float8 or integer type, or whose last blocks are not whole.
    """
    block = config["quantization_config"].get("weight_block_size")
    pair = isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    if block is not None and not pair:
        raise MoEdgeError(f"{folder / 'config.json'}: weight_block_size is {block!r}, not two numbers.")
    advice = "give the float model that it was made from"
    for name, (kind, shape) in tensors.items():
        if kind not in (KIND, "F64", "F32", "F16", "BF16"):
            raise MoEdgeError(f"{folder}: {name} is {kind}, which is not de-quantized here; {advice}.")
        if kind != KIND:
            continue
        scale_kind, grid = tensors.get(f"{name}{_SCALE}", (None, []))
        if scale_kind not in _SCALE_KINDS:
            raise MoEdgeError(f"{folder}: {name} is float8 without float scales ({name}{_SCALE}); {advice}.")
        whole = [[1] * len(shape), [1], []] if block is None else []
        if block is not None and len(shape) == 2:
            whole = [[-(-size // edge) for size, edge in zip(shape, block, strict=True)]]
            if any(size % edge and size > edge for size, edge in zip(shape, block, strict=True)):
                raise MoEdgeError(
                    f"{folder}: {name} is {shape}, no whole number of blocks of {block}, which transformers "
                    f"de-quantizes wrongly; {advice}."
                )
        if list(grid) not in whole:
            raise MoEdgeError(
                f"{folder}: the scales of {name} {shape} are {list(grid)}, which weight_block_size {block} does not "
                f"give; {advice}."
            )
