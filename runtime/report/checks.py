"""The checks of one verification for other programs: rows, JUnit XML for CI servers, Markdown for a pull request."""

from __future__ import annotations

from typing import NamedTuple

from moedge.runtime.parity import verdict
from moedge.runtime.parity.figures import CheckFacts, LayersFacts, Replayed
from moedge.runtime.parity.outcomes import mark
from moedge.runtime.parity.results import ParityEntry, Verification
from moedge.runtime.report import ci


class Row(NamedTuple):
    """One check of one comparison."""

    comparison: str
    name: str
    value: float | None
    relation: str
    limit: float
    outcome: verdict.Outcome

    @property
    def shown(self) -> str:
        """The value for people."""
        return "none" if self.value is None else f"{self.value:.6g}"


def rows(result: Verification) -> list[Row]:
    """Every check of a verify result."""
    found: list[Row] = []
    for same in result["identity"]:
        value, outcome = same["max_rel_error"], verdict.entry_outcome(same)
        found.append(Row(same["name"], "identity.max_rel_error", value, "<=", same["limit"], outcome))
    for entry in (*result["parity"], *result.get("shapes", []), *result.get("accuracy", [])):
        found += [_row(entry["name"], check) for check in entry["verdict"]["checks"]]
    return found


def _row(comparison: str, check: CheckFacts) -> Row:
    values = (check["name"], check["value"], check["relation"], check["limit"], verdict.outcome_of(check))
    return Row(comparison, *values)


def junit_xml(result: Verification, *, gate: bool = False) -> str:
    """The checks as JUnit XML, one test case each, for a CI server; what is not decided is a failure that says so.

    What is worse than a baseline is a further test case: skipped with its reason, or with ``gate`` a failure.
    """
    compared = [*result["identity"], *result["parity"]]
    where = {entry["name"]: entry["location"]["sentence"] for entry in compared if "location" in entry}
    cases = [_case(row, where.get(row.comparison)) for row in rows(result)]
    for shaped in result.get("shapes", []):
        cases += [ci.Case(shaped["name"], name, "skipped", reason) for name, reason in shaped["not_run"].items()]
    if baseline := result.get("baseline"):
        case = ci.Case("baseline", baseline["file"])
        if baseline["outcome"] != "not worse":
            said = "; ".join([baseline["outcome"], *baseline["sentences"]])
            case = case._replace(state="failure" if gate else "skipped", said=said)
        cases.append(case)
    return ci.junit_xml("moedge verify", cases)


def _case(row: Row, where: str | None) -> ci.Case:
    if row.outcome is verdict.Outcome.PASSED:
        return ci.Case(row.comparison, row.name)
    said = f"{row.outcome.value}: {row.name} is {row.value}, must be {row.relation} {row.limit}"
    return ci.Case(row.comparison, row.name, "failure", said if where is None else f"{said}. {where}")


def markdown(result: Verification) -> str:
    """The outcome first, one line a comparison, then what did not pass and what is worse; ends with a line end."""
    from moedge.runtime.report import environment

    template = environment(html=False).get_template("checks.md.j2")
    every = rows(result)
    return template.render(
        result=result,
        verdict=mark(result["outcome"]).verdict,
        entries=[(entry, _worst_margin(entry)) for entry in result["parity"]],
        more=[*result.get("shapes", []), *result.get("accuracy", [])],
        missed=[row for row in every if row.outcome is not verdict.Outcome.PASSED],
        count=len(every),
    )


def _worst_margin(entry: ParityEntry) -> Row | None:
    """The check that is nearest to its limit, of those with a limit other than 0."""
    own = [_row(entry["name"], check) for check in entry["verdict"]["checks"]]
    shares = {row: share for row in own if (share := used(row)) is not None}
    return max(shares, key=lambda row: shares[row], default=None)


def used(row: Row) -> float | None:
    """How much of its limit a check uses, 0 to 1; None where there is nothing to use.

    Of a share that must be large, what counts is how far it is from 1.
    """
    if row.value is None:
        return None
    value, limit = (row.value, row.limit) if row.relation == "<=" else (1 - row.value, 1 - row.limit)
    return value / limit if limit > 0 else None


def said(result: Verification) -> list[str]:
    """What the comparisons found beside their checks, in lines for people."""
    found: list[str] = []
    for same in result["identity"]:
        if "location" in same:  # a parity check has it among its notes
            found.append(f"{same['name']}: {same['location']['sentence']}")
    for entry in result["parity"]:
        if replay := entry.get("replay"):
            found += [explained(entry, replay), parts(entry)]
        elif layers := entry.get("by_layer"):
            found += [_by_layer(entry, layers), parts(entry)]
        found += [f"{entry['name']}: {note}" for note in entry["verdict"]["notes"]]
    for shaped in result.get("shapes", []):
        not_run = [f"{name} was not run: {reason}." for name, reason in shaped["not_run"].items()]
        found += [f"{shaped['name']}: {note}" for note in (*shaped["verdict"]["notes"], *not_run)]
    for answers in result.get("accuracy", []):
        found += [f"{answers['name']}: {note}" for note in answers["verdict"]["notes"]]
    return found


def _shown(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _by_layer(entry: ParityEntry, layers: LayersFacts) -> str:
    kept = entry["kept_reference"]
    return (
        f"{entry['name']}: each of {len(layers['layers'])} layers alone, on {layers['tokens']} tokens, is within "
        f"{_shown(layers['worst_rel_error'], '.2g')} of what the reference's layer adds (layer "
        f"{layers['worst_layer']}); free-running KL between {_shown(kept['known_kl'], '.2g')} and "
        f"{_shown(entry['overall']['kl_ref_test']['mean'], '.2g')} (logits that were not kept hide the rest)"
    )


def explained(entry: ParityEntry, replay: Replayed) -> str:
    """One sentence: the error of the arithmetic, the choices, and what changed ones cost."""
    free, forced, kept = entry["overall"], replay["overall"], replay.get("kept")
    routed = replay["router"]["compared"] or kept is None
    right, same = [], ""
    if routed:
        right.append(f"router right in {_shown(replay['router'].get('agreement'), '.4%')} of its decisions")
        same = f"the same set in {_shown(entry['routing'].get('agreement'), '.1%')}, "
    if kept is not None:
        right.append(f"{_shown(kept.get('agreement'), '.4%')} of values rightly kept or left out")
    return (
        f"{entry['name']}: KL {_shown(forced['kl_ref_test']['mean'], '.3g')} under the engine's own "
        f"{'choice of experts' if kept is None else 'choices'} (the arithmetic), {', '.join(right)}; "
        f"free-running KL {_shown(free['kl_ref_test']['mean'], '.3g')}, {same}perplexity "
        f"x{_shown(free['perplexity']['ratio'], '.3f')} (the cost of changed choices, a property of the model)"
    )


def parts(entry: ParityEntry) -> str:
    """The outcome of each part of a verdict, in a line."""
    said = []
    for name, passed in entry["verdict"]["parts"].items():
        checked = [check for check in entry["verdict"]["checks"] if check["name"].startswith(f"{name}.")]
        outcomes = [verdict.outcome_of(check) for check in checked] or [verdict.outcome_of({"passed": passed})]
        said.append(f"{name} {mark(verdict.Outcome.over(outcomes)).word}")
    return f"{entry['name']}: {', '.join(said)}"
