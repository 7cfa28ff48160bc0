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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from moedge.runtime.device import moedge_archive, moedge_compare, moedge_trt
else:  # in an archive the files lie side by side
    import moedge_archive
    import moedge_compare
    import moedge_trt


def main() -> int:
    """Run every recorded case and judge them together."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=folder / "verify-result.json")
    parser.add_argument("--answers", type=Path, default=folder / "verify-answers.npz")
    options = parser.parse_args()
    moedge_trt.check_writable(options.out, "--out")
    moedge_trt.check_writable(options.answers, "--answers")
    manifest, facts, session = moedge_archive.open_session(folder)
    cases = [_Case.of(number, case, session) for number, case in enumerate(moedge_archive.golden(folder))]
    reference, test = (np.concatenate([getattr(case, name) for case in cases]) for name in ("wanted", "given"))
    clean, margin = np.concatenate([case.steady for case in cases]), manifest["limits"]["near_tie_margin"]
    found = moedge_compare.logits(reference, test, margin)
    judged = moedge_compare.logits(reference[clean], test[clean], margin) if clean.any() else None
    routing = moedge_compare.routes(
        *(_joined([getattr(case, name) for case in cases]) for name in ("recorded", "shown"))
    )
    checks = moedge_compare.judge(found, judged, manifest["limits"])
    passed = all(check["passed"] for check in checks)
    _print(checks, clean, options.answers)
    if found["non_finite"] and session.dtype == "float16":
        print("A value left float16's range (65,504): make the archive again with --half bfloat16.")
    result = {
        **{"schema": moedge_archive.RESULT_SCHEMA, "kind": "verify", "label": manifest["label"]},
        **{"archive_sha256": manifest["content_sha256"], "device": moedge_archive.device_facts(session)},
        **{"engine": facts, "logits": found, "judged": judged, "routing": routing},
        **{"checks": checks, "passed": passed},
    }
    session.close()
    answers = {name: array for case in cases for name, array in case.answers.items()}
    moedge_archive.write_answers(manifest, answers, options.answers)
    moedge_archive.finish(result, options.out)
    return 0 if passed else 1


@dataclass(frozen=True)
class _Case:
    """One recorded case beside what the engine gave: A answers (logits [A, V]), L tokens, k experts."""

    wanted: np.ndarray
    given: np.ndarray
    steady: np.ndarray
    """bool [A]: no choice of experts before it differs, so the answer is judged here."""
    recorded: dict[int, np.ndarray]
    """int [L, k] by layer, of the layers that the engine shows."""
    shown: dict[int, np.ndarray]
    answers: dict[str, np.ndarray]

    @classmethod
    def of(cls, number: int, case: dict[str, Any], session: Any) -> _Case:
        """Run a case: its prompt at once, then the recorded tokens one by one."""
        ids, prompt = case["ids"], case["prompt"]
        reads: list[dict[int, np.ndarray]] = []
        logits, routes, cache = session.start(ids[:, :prompt], np.ones((1, prompt), np.int64), reads=reads)
        steps = [(logits[0], routes)]
        for position in range(prompt, ids.shape[1]):
            logits, routes, cache = session.step(ids[:, position : position + 1], cache, reads=reads)
            steps.append((logits[0], routes))
        every = np.concatenate([logits for logits, _ in steps])
        given = every[prompt - 1 :]
        chosen = {layer: np.concatenate([part[layer] for _, part in steps]) for layer in routes}
        if not case["routes"]:
            steady = np.ones(len(given), bool)
        elif chosen:
            steady = moedge_compare.unchanged(case["routes"], chosen)[prompt - 1 :]
        else:  # an engine without taps shows nothing
            steady = np.zeros(len(given), bool)
        recorded = {layer: routes for layer, routes in case["routes"].items() if layer in chosen}
        shown = {layer: chosen[layer] for layer in recorded}
        answers = moedge_archive.answers(number, ids, prompt, every, chosen, reads)
        return cls(case["logits"], given, steady, recorded, shown, answers)


def _joined(cases: list[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """One array a layer over all cases."""
    layers = dict.fromkeys(layer for case in cases for layer in case)
    return {layer: np.concatenate([case[layer] for case in cases if layer in case]) for layer in layers}


def _print(checks: list[dict[str, Any]], clean: np.ndarray, answers: Path) -> None:
    for check in checks:
        mark = "pass" if check["passed"] else "FAIL" if check["decided"] else "----"
        print(f"{mark}  {check['name']:22} {check['value']}  ({check['relation']} {check['limit']})")
    if not clean.all():
        so = "" if checks[-1]["passed"] else ", so the arithmetic is not decided"
        print(
            f"{len(clean) - clean.sum()} of {len(clean)} tokens follow a changed choice of experts and are not judged "
            f"here{so}; where MoEdge is installed: moedge verify CHECKPOINT {answers.name}"
        )


if __name__ == "__main__":
    sys.exit(moedge_archive.run(main))
