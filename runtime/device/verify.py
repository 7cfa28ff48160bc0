"""Compare the engine of this archive with the answers that its float32 graph gave when the archive was made.

    python3 verify.py

Prefill of each recorded prompt, then decoding of the recorded tokens: logits, distributions, choices and expert sets.
Writes ``verify-result.json``. Exit code 1 when a check fails, 2 when the engine cannot run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_archive, moedge_compare
else:  # in an archive the files lie side by side
    import moedge_archive
    import moedge_compare


def main() -> int:
    """Run every recorded case and judge them together."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=folder / "verify-result.json")
    options = parser.parse_args()
    manifest, facts, session = moedge_archive.open_session(folder)
    wanted, given = [], []
    wanted_routes: dict[int, list[np.ndarray]] = {}
    given_routes: dict[int, list[np.ndarray]] = {}
    for case in moedge_archive.golden(folder):
        ids, prompt = case["ids"], case["prompt"]
        logits, routes, cache = session.start(ids[:, :prompt], np.ones((1, prompt), np.int64), last=True)
        steps = [(logits[0], routes)]
        for position in range(prompt, ids.shape[1]):
            logits, routes, cache = session.step(ids[:, position : position + 1], cache)
            steps.append((logits[0], routes))
        wanted.append(case["logits"])
        given.append(np.concatenate([logits for logits, _ in steps]))
        for layer, recorded in case["routes"].items():
            if layer in routes:
                wanted_routes.setdefault(layer, []).append(recorded)
                given_routes.setdefault(layer, []).append(np.concatenate([part[layer] for _, part in steps]))
    found = moedge_compare.logits(np.concatenate(wanted), np.concatenate(given), manifest["limits"]["near_tie_margin"])
    routing = moedge_compare.routes(
        {layer: np.concatenate(parts) for layer, parts in wanted_routes.items()},
        {layer: np.concatenate(parts) for layer, parts in given_routes.items()},
    )
    checks = moedge_compare.judge(found, routing, manifest["limits"])
    passed = all(check["passed"] for check in checks)
    for check in checks:
        mark = "pass" if check["passed"] else "FAIL"
        print(f"{mark}  {check['name']:22} {check['value']}  ({check['relation']} {check['limit']})")
    if found["non_finite"] and session.dtype == "float16":
        print("A value left float16's range (65,504): make the archive again with --dtype bfloat16.")
    result = {
        **{"schema": moedge_archive.RESULT_SCHEMA, "kind": "verify", "label": manifest["label"]},
        **{"archive_sha256": manifest["content_sha256"], "device": moedge_archive.device_facts(session)},
        **{"engine": facts, "logits": found, "routing": routing, "checks": checks, "passed": passed},
    }
    session.close()
    moedge_archive.finish(result, options.out)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(moedge_archive.run(main))
