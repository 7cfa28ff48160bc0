"""Time the engine of this archive: first token and time per token at batch 1, greedy.

    python3 bench.py --prompt 512 --decode 64

Writes ``bench-result.json``. Set the power mode first (``nvpmodel``, ``jetson_clocks``) and say it with ``--note``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_archive, moedge_compare, moedge_trt
else:  # in an archive the files lie side by side
    import moedge_archive
    import moedge_compare
    import moedge_trt


def main() -> int:
    """Measure ``--repeats`` rounds after ``--warmup`` ones."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--note", default="", help="power mode, cooling: stored with the result")
    parser.add_argument("--out", type=Path, default=folder / "bench-result.json")
    options = parser.parse_args()
    if min(options.prompt, options.decode, options.repeats) < 1 or options.warmup < 0:
        parser.error("--prompt, --decode and --repeats must be at least 1, --warmup at least 0")
    manifest, facts, session = moedge_archive.open_session(folder)
    free_before = session.cuda.memory()[0]
    longest = session.limits["max_length"]
    prompt = min(options.prompt, session.limits["max_prompt"], longest - options.decode)
    if prompt < 1:
        raise moedge_trt.DeviceError(
            f"--decode {options.decode} leaves no room for a prompt: this engine holds {longest} tokens."
        )
    if prompt < options.prompt:
        print(f"note: this engine takes {prompt} of {options.prompt} prompt tokens", file=sys.stderr)
    recorded = np.concatenate([case["ids"][0] for case in moedge_archive.golden(folder)])
    ids = np.resize(recorded, prompt)[None]  # repeated golden text: real tokens, so that routing is not degenerate
    first, per_token = [], []
    lowest_free = free_before
    for number in range(options.warmup + options.repeats):
        start = time.perf_counter()
        logits, _, cache = session.start(ids, np.ones_like(ids), last=True)
        token = int(logits[0, -1].argmax())
        ttft = 1e3 * (time.perf_counter() - start)
        steps = []
        for _ in range(options.decode):
            start = time.perf_counter()
            logits, _, cache = session.step(np.array([[token]]), cache)
            token = int(logits[0, -1].argmax())
            steps.append(1e3 * (time.perf_counter() - start))
        if number >= options.warmup:
            first.append(ttft)
            per_token += steps
        lowest_free = min(lowest_free, session.cuda.memory()[0])
    ttft_ms, tpot_ms = moedge_compare.timing(first), moedge_compare.timing(per_token)
    print(
        f"first token {ttft_ms['p50']:.2f} ms, per token {tpot_ms['p50']:.3f} ms, {1e3 / tpot_ms['p50']:.1f} tokens/s"
    )
    protocol = {"batch": 1, "prompt": prompt, "decode": options.decode, "repeats": options.repeats}
    result = {
        **{"schema": moedge_archive.RESULT_SCHEMA, "kind": "bench", "label": manifest["label"]},
        **{"archive_sha256": manifest["content_sha256"], "device": moedge_archive.device_facts(session)},
        **{"engine": facts, "protocol": {**protocol, "warmup": options.warmup, "note": options.note}},
        **{"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "decode_tokens_per_s": 1e3 / tpot_ms["p50"]},
        "cache_and_work_bytes": free_before - lowest_free,
    }
    session.close()
    moedge_archive.finish(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(moedge_archive.run(main))
