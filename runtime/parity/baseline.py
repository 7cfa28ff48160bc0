"""Beside last time: what a verification finds worse than an older one of the same engines on the same text.

Both may be within every limit. A check is worse when it passed before and does not now, or when it uses more of its
limit and that is neither noise nor a trifle.

* **Noise.** A figure that is known window by window in both results, which read the same windows, is paired: it grew
  when Student's interval of the mean difference over windows lies above 0. A share of decisions is a count out of as
  many: it grew when so many more wrong ones would be chance too rarely, were both equally good (binomial, given the
  sum). Decisions after which an engine goes its own way are no such count: one that changes early changes later ones.
  Of answers to tasks those count that differ from the reference's, and for accuracy those that it alone has right. All
  checks together are wrong in one verification in a hundred at most (:data:`_FALSE`, divided by their number:
  Bonferroni). What is neither, and what fewer than 5 windows tell, grew when it is :data:`FACTOR` times as large.
  Rounding alone, in another order of sums, makes an error up to twice as large (configs/tolerances.yaml takes that
  factor for errors of one token), and KL, which is quadratic, four times.
* **Trifles.** Less than a hundredth of the limit, unless the value is :data:`FACTOR` times as large: a hundred releases
  that are each worse by less would be needed to get from 0 to the limit.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from moedge import MoEdgeError
from moedge._files import read_json, sha256_file
from moedge.runtime.bench.stats import binomial_cdf, t_quantile
from moedge.runtime.parity.figures import CheckFacts
from moedge.runtime.parity.results import BaselineCheck, BaselineFacts, BaselineOutcome, Verification

_SCHEMA = "moedge.verify/1"
_TRIFLE = 0.01
_FEWEST = 5
_FALSE = 0.01
"""Chance that a verification of an engine that is as good as before says that something is worse."""
FACTOR = {"error": 2.0, "kl": 4.0}
"""How many times as large rounding alone may make a value."""


class Baseline(NamedTuple):
    """An older result and where it was read."""

    file: Path
    sha256: str
    result: Verification


def read(file: Path) -> Baseline:
    """Read what an older ``moedge verify --json`` printed.

    Raises:
        MoEdgeError: it cannot be read, or is something else.
    """
    mend = "give what an older `moedge verify --json` printed"
    found = read_json(file, mend)
    if found.get("schema") != _SCHEMA or not isinstance(found.get("parity"), list):
        raise MoEdgeError(f"{file} is not of schema {_SCHEMA}; {mend}.")
    return Baseline(file, sha256_file(file), cast("Verification", found))


def compare(result: Verification, baseline: Baseline) -> BaselineFacts:
    """Say what of ``result`` is worse.

    Returns:
        ``outcome``: ``worse``; ``not worse``; or ``not compared``, where a comparison or a check of the baseline has no
        counterpart on the same text or questions. ``checks``: what was compared; ``sentences``: what is worse or
        missing.

    Raises:
        MoEdgeError: the baseline lacks a part of what its schema promises.
    """
    try:
        return _compared(result, baseline)
    except (KeyError, TypeError, AttributeError) as error:
        raise MoEdgeError(f"{baseline.file} is damaged ({error!r}); give a whole result of --json.") from error


def _compared(result: Verification, baseline: Baseline) -> BaselineFacts:
    old = baseline.result
    missing: list[str] = []
    pairs: list[_Pair] = []
    parts = ["accuracy"]
    if old["text"] == result["text"]:
        parts = ["identity", "parity", "shapes", *parts]
    else:
        missing.append(f"It was measured on {old['text']}, this on {result['text']}, which cannot be compared.")
    then, now = ([entry for part in parts for entry in one.get(part) or []] for one in _loose(old, result))
    for before in then:
        after = _counterpart(before, then, now)
        if after is None:
            missing.append(f"{before['name']} is only in the baseline.")
        elif _other_text(before, after):
            missing.append(f"{after['name']}: not compared: another text.")
        elif _read(before) != _read(after):
            missing.append(f"{after['name']}: the baseline has other windows, tokens or questions.")
        else:
            found, gone = _paired(before, after)
            pairs += found
            missing += [f"{after['name']}: check {name} is only in the baseline." for name in gone]
    level = _FALSE / max(1, len(pairs))
    checks = [_beside(*pair, level) for pair in pairs]
    worse = [check for check in checks if check["worse"]]
    outcome: BaselineOutcome = "worse" if worse else "not compared" if missing or not checks else "not worse"
    sentences = [*(_said(check) for check in worse), *missing]
    return {
        "file": str(baseline.file),
        "sha256": baseline.sha256,
        "outcome": outcome,
        "sentences": sentences,
        "checks": checks,
    }


def _loose(*results: Verification) -> list[dict[str, Any]]:
    return [cast("dict[str, Any]", one) for one in results]


def _read(entry: Any) -> list[Any]:
    """What a comparison was made on: windows and tokens, the rows of other shapes, or questions."""
    asked = [[task[name] for name in ("task", "version", "data", "questions")] for task in entry.get("tasks", [])]
    return [*(entry.get(name) for name in ("tokens", "prompts", "shots")), asked]


def _other_text(before: Any, after: Any) -> bool:
    """Whether both say which tokens they read, and these differ: a text's name is not its content."""
    one, two = (entry.get("text_sha256") for entry in (before, after))
    return bool(one and two and one != two)


def _counterpart(before: Any, then: list[Any], now: list[Any]) -> Any:
    """The entry of the same name; else the only other one of the same kind of engines, for a folder may have moved."""
    for entry in now:
        if entry["name"] == before["name"]:
            return entry
    named = {entry["name"] for entry in then} & {entry["name"] for entry in now}
    alike = [[e for e in entries if e["name"] not in named and _kind(e) == _kind(before)] for entries in (then, now)]
    return alike[1][0] if len(alike[0]) == len(alike[1]) == 1 else None


def _kind(entry: Any) -> tuple[str, ...]:
    reference = entry.get("reference") or {"name": "itself", "model": {}}  # of an engine in other shapes
    rounded = reference["model"].get("weights_of")
    kept = "kept_reference" in entry
    return (entry["schema"], reference["name"], entry["test"]["name"], str(rounded), str(kept))


_Pair = tuple[CheckFacts, CheckFacts, Any, Any]
"""A check before and now, and the comparisons that they are of."""


def _paired(before: Any, after: Any) -> tuple[list[_Pair], list[str]]:
    """The checks that both comparisons have, and the names of those that the older one alone has."""
    older, newer = ({check["name"]: check for check in _checks_of(entry)} for entry in (before, after))
    pairs = [(older[name], check, before, after) for name, check in newer.items() if name in older]
    # "not compared" is a check only where something was not.
    return pairs, [name for name in older if name not in newer and not name.endswith(".not_compared")]


def _checks_of(entry: Any) -> list[CheckFacts]:
    if "verdict" in entry:
        # Older versions had the number of standard errors in this name.
        return [
            cast(
                "CheckFacts",
                {**check, "name": re.sub(r"drift_beyond_\d+_errors$", "drift_beyond_errors", check["name"])},
            )
            for check in entry["verdict"]["checks"]
        ]
    named = {"name": "identity.max_rel_error", "value": entry["max_rel_error"], "relation": "<="}
    return [cast("CheckFacts", {**named, "limit": entry["limit"], "passed": entry["passed"]})]


def _beside(old: CheckFacts, new: CheckFacts, before: Any, after: Any, level: float) -> BaselineCheck:
    found: BaselineCheck = {
        "comparison": after["name"],
        "name": new["name"],
        "before": old["value"],
        "now": new["value"],
        "limit": new["limit"],
        "relation": new["relation"],
        "interval": None,
        "worse": False,
        "reason": "",
    }
    if new["value"] is None or old["value"] is None or not new["passed"]:
        lost = not new["passed"] and old["passed"]
        return {**found, "worse": lost, "reason": "it passed before" if lost else ""}
    a, b = (_badness(check) for check in (old, new))
    if b <= a:
        return found
    limit, factor = _badness({**new, "value": new["limit"]}), FACTOR["kl" if _is_kl(new["name"]) else "error"]
    jump = b > factor * a
    if b - a < _TRIFLE * limit and not jump:
        return found
    windows = [_windows(entry, new["name"]) for entry in (before, after)]
    (wrong, count), (more, same) = (_wrong(entry, check) for entry, check in ((before, old), (after, new)))
    if count and count == same:
        grew = more > wrong and _chance(wrong, more) <= level
        reason = f"too many of {count:,} for chance"
    elif windows[0] and windows[1] and len(windows[0]) == len(windows[1]) >= _FEWEST:
        found["interval"] = interval = _interval(new["name"], *map(np.array, windows), level=level)
        grew, reason = interval[0] > 0, f"paired over {len(windows[0])} windows"
    else:
        grew, reason = jump, f"more than {factor:g} times as large"
    return {**found, "worse": bool(grew), "reason": reason if grew else ""}


def _is_kl(name: str) -> bool:
    return any(part == "kl" or part.startswith("kl_") for part in name.split("."))


def _badness(check: CheckFacts) -> float:
    """How far a value is from the best, 0."""
    value = check["value"]
    assert value is not None
    return value if check["relation"] == "<=" else 1 - value


def _interval(name: str, old: np.ndarray, new: np.ndarray, *, level: float) -> list[float]:
    """Student's interval of how much more the new windows [N] are off than the old; ``level`` lies beyond each end."""
    if name.endswith("perplexity.drift"):  # it has a sign, and either way is a drift
        old, new = (values * np.sign(values.mean()) for values in (old, new))
    difference = new - old
    reach = t_quantile(1 - level, len(old) - 1) * float(difference.std(ddof=1)) / math.sqrt(len(old))
    return [float(difference.mean()) - reach, float(difference.mean()) + reach]


def _windows(entry: Any, name: str) -> list[float]:
    """The values of a check's figure window by window; empty where they are not known."""
    first, _, rest = name.partition(".")
    source = (entry.get("replay") or {}) if first == "arithmetic" else entry
    judged = {"arithmetic": source.get("tokens"), "text": entry.get("kept_reference", {}).get("judged_tokens")}
    tokens = (entry.get("overall") or {}).get("tokens")
    if judged.get(first, tokens) != tokens:
        return []  # of some windows only, or in another order
    phase, _, figure = (rest if first in ("arithmetic", "text") else name).partition(".")
    found: list[float] = ((source.get("by_window") or {}).get(phase) or {}).get(figure) or []
    return found


def _wrong(entry: Any, check: CheckFacts) -> tuple[int, int]:
    """How many decisions of a check are wrong, and of how many; of 0 where they are not known or not independent."""
    if "tasks" in entry:
        of = entry["overall"]
        for task in entry["tasks"]:
            of = task if check["name"].startswith(f"{task['task']}.") else of
        lost = "accuracy_drop" in check["name"]
        wrong = of["only_reference"] if lost else round((1 - of["agreement"]) * of["questions"])
        return wrong, int(of["questions"])
    count = _decisions(entry, check["name"]) if check["relation"] == ">=" else 0
    return round(_badness(check) * count), count


def _decisions(entry: Any, name: str) -> int:
    """Of how many independent decisions a check is a share; 0 where that is not known.

    Not in a comparison that runs free although its experts may differ: one changed choice changes all later ones.
    """
    parts = name.split(".")
    replay = entry.get("replay") or {}
    if parts[-1] == "agreement" and parts[-2] in ("top1", "top5"):
        if parts[0] == "text" or (parts[0] != "arithmetic" and (entry.get("routing") or {}).get("compared")):
            return 0
        source = replay if parts[0] == "arithmetic" else entry
        return int(source["phases"][parts[-3]][parts[-2]].get("compared") or 0)
    layers = entry.get("by_layer") or {}
    facts = {"router": replay.get("router") or layers.get("router"), "kept": replay.get("kept")}
    return int((facts.get(parts[0]) or {}).get("decisions") or 0)


def _chance(old: int, new: int) -> float:
    """The probability of at least ``new`` of all wrong decisions on the new side, were both sides equally good."""
    return float(binomial_cdf(old + new, 0.5)[old])


def _said(check: BaselineCheck) -> str:
    now, before = ("none" if value is None else f"{value:.3g}" for value in (check["now"], check["before"]))
    interval = check["interval"]
    more = f", {interval[0]:+.2g} to {interval[1]:+.2g}" if interval else ""
    return (
        f"{check['comparison']}: {check['name']} is {now}, was {before} (limit {check['relation']} {check['limit']:g}; "
        f"{check['reason']}{more})."
    )


def lines(found: BaselineFacts) -> list[str]:
    """What the terminal shows, with rich's markup."""
    from rich.markup import escape

    style = {"worse": "yellow", "not worse": "green", "not compared": "yellow"}[found["outcome"]]
    head = f"[{style}]beside {escape(found['file'])}: {found['outcome']}[/{style}]"
    return [*(escape(sentence) for sentence in found["sentences"]), head]
