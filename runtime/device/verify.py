"""Compare the engine of this archive with the answers that its float32 graph gave when the archive was made.

    python3 verify.py

Prefill of each recorded prompt, then decoding of the recorded tokens. Where rounding turned a close decision of a
router, the answers that follow are another composition of experts: those are shown, and ``moedge verify`` judges them
from ``verify-answers.npz``. Those before it are judged here. Writes ``verify-result.json``. Exit code 1 when a check
fails or is not decided here, 2 when the engine cannot run.
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
    parser.add_argument("--answers", type=Path, default=folder / "verify-answers.npz")
    options = parser.parse_args()
    manifest, facts, session = moedge_archive.open_session(folder)
    wanted, given, steady = [], [], []
    answers: dict[str, np.ndarray] = {}
    wanted_routes: dict[int, list[np.ndarray]] = {}
    given_routes: dict[int, list[np.ndarray]] = {}
    for number, case in enumerate(moedge_archive.golden(folder)):
        ids, prompt = case["ids"], case["prompt"]
        reads: list[dict[int, np.ndarray]] = []
        logits, routes, cache = session.start(ids[:, :prompt], np.ones((1, prompt), np.int64), reads=reads)
        steps = [(logits[0], routes)]
        for position in range(prompt, ids.shape[1]):
            logits, routes, cache = session.step(ids[:, position : position + 1], cache, reads=reads)
            steps.append((logits[0], routes))
        every = np.concatenate([logits for logits, _ in steps])
        wanted.append(case["logits"])
        given.append(every[prompt - 1 :])
        chosen = {layer: np.concatenate([part[layer] for _, part in steps]) for layer in routes}
        for layer, recorded in case["routes"].items():
            if layer in chosen:
                wanted_routes.setdefault(layer, []).append(recorded)
                given_routes.setdefault(layer, []).append(chosen[layer])
        if not case["routes"]:
            steady.append(np.ones(len(given[-1]), bool))
        elif chosen:
            steady.append(moedge_compare.unchanged(case["routes"], chosen)[prompt - 1 :])
        else:  # an engine without taps shows nothing
            steady.append(np.zeros(len(given[-1]), bool))
        answers |= moedge_archive.answers(number, ids, prompt, every, chosen, reads)
    reference, test = np.concatenate(wanted), np.concatenate(given)
    clean, margin = np.concatenate(steady), manifest["limits"]["near_tie_margin"]
    found = moedge_compare.logits(reference, test, margin)
    judged = moedge_compare.logits(reference[clean], test[clean], margin) if clean.any() else None
    routing = moedge_compare.routes(
        {layer: np.concatenate(parts) for layer, parts in wanted_routes.items()},
        {layer: np.concatenate(parts) for layer, parts in given_routes.items()},
    )
    checks = moedge_compare.judge(found, judged, manifest["limits"])
    passed = all(check["passed"] for check in checks)
    for check in checks:
        mark = "pass" if check["passed"] else "FAIL" if check["decided"] else "----"
        print(f"{mark}  {check['name']:22} {check['value']}  ({check['relation']} {check['limit']})")
    if found["non_finite"] and session.dtype == "float16":
        print("A value left float16's range (65,504): make the archive again with --half bfloat16.")
    if not clean.all():
        so = "" if checks[-1]["passed"] else ", so the arithmetic is not decided"
        print(
            f"{len(clean) - clean.sum()} of {len(clean)} tokens follow a changed choice of experts and are not judged "
            f"here{so}; where MoEdge is installed: moedge verify CHECKPOINT {options.answers.name}"
        )
    result = {
        **{"schema": moedge_archive.RESULT_SCHEMA, "kind": "verify", "label": manifest["label"]},
        **{"archive_sha256": manifest["content_sha256"], "device": moedge_archive.device_facts(session)},
        **{"engine": facts, "logits": found, "judged": judged, "routing": routing},
        **{"checks": checks, "passed": passed},
    }
    session.close()
    moedge_archive.write_answers(manifest, answers, options.answers)
    moedge_archive.finish(result, options.out)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(moedge_archive.run(main))
