"""An engine opened with ``last_logits`` gives the last row of what it gives without."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from moedge.runtime.engines import open_engine


@pytest.mark.parametrize("which", ["dense/portable", "moe/portable", "dense/ort-cpu", "moe/ort-cpu", "dense", "moe"])
def test_the_last_row_is_the_same(which: str, bundles: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    folder = bundles[which] if "/" in which else checkpoints[which]
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 60, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :4] = 0  # a padded row ends where the other does
    with (
        closing(open_engine(folder, threads=1)) as one,
        closing(open_engine(folder, threads=1, last_logits=True)) as two,
    ):
        full, last = one.prefill(ids, mask), two.prefill(ids, mask)
        for _ in range(2):
            assert full.logits.shape[1] > 1 or full.logits.shape == last.logits.shape
            assert last.logits.shape == (2, 1, full.logits.shape[2])
            # One product of another height: sums in another order, some 64 terms.
            limit = 64**0.5 * 2**-23 * np.abs(full.logits).max()
            np.testing.assert_allclose(last.logits[:, 0], full.logits[:, -1], rtol=0, atol=limit)
            more = generator.integers(3, 60, (2, 1))
            full, last = one.decode(more, full.cache), two.decode(more, last.cache)
