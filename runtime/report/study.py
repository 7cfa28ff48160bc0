"""Tables of a study (``moedge ablate``): results.json for programs, results.md for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moedge._files import write_json, write_text
from moedge.convert import forms

STUDY_RESULTS_SCHEMA = "moedge.study-results/1"
_AXES = {"skipped": "each FFN skipped", "read": "the FFN weights read for a token"}


def write(
    out: Path, *, study: dict[str, Any], model: str, calibration: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    """Write both files into ``out``.

    Args:
        study: the study as JSON. model: label of the dense parent. calibration: tokens of each calibration text.
        results: what each row left, in the order of the table: ``{"dense": row, "row": row}``.
    """
    whole = Rows(results[0]["dense"], [result["row"] for result in results if result["row"]])
    behind = [result["second_half"] for result in results]
    second = Rows(behind[0]["dense"], [one["row"] for one in behind])
    data = {"schema": STUDY_RESULTS_SCHEMA, "study": study, "model": model, "calibration": calibration}
    write_json(out / "results.json", {**data, **asdict(whole), "second_half": asdict(second)})
    write_text(out / "results.md", markdown(study, model, calibration, whole, second))


@dataclass(frozen=True)
class Rows:
    """The dense parent's row and the others, over whole windows or over their second halves."""

    dense: dict[str, Any]
    rows: list[dict[str, Any]]


def markdown(study: dict[str, Any], model: str, calibration: dict[str, Any], whole: Rows, second: Rows) -> str:
    """The protocol, then one table for each sparsity, and one of second halves where a row is scored on them alone."""
    dense, names = whole.dense, list(whole.dense["ppl"])
    used = ", ".join(f"{count:,} of {name}" for name, count in calibration["tokens"].items())
    held = ", ".join(f"{dense['tokens'][name]:,} of {name}" for name in names)
    lines = [
        f"Model: {model}. Calibration: {used} tokens. Measured on held-out documents: {held} predicted tokens, windows "
        f"of {study['window']}{' that start with BOS' if calibration['bos'] else ''}, each scored on its own, float32.",
        "",
        f"Seeds of random controls: {', '.join(map(str, study['seeds']))} (mean ± standard deviation). `active` is the "
        "share of the FFN's neurons that run for a token, and where weights are zero the share of these (dense storage "
        "saves nothing by them); `read` is the share of the FFN weights that a token reads, router included, counted "
        "on these texts; `seconds` is the time to make the plan.",
    ]
    for sparsity in study["sparsities"]:
        name = sparsity["name"]
        lines += ["", f"### {name} of {_AXES[study['axis']]}", "", *_table(whole, name)]
        here = [row for row in second.rows if row["sparsity"] == name]
        if prompted := forms.prompted({"second_half": {"rows": here}}):
            count = ", ".join(f"{second.dense['tokens'][text]:,} of {text}" for text in names)
            lines += ["", f"Second halves of the windows ({count} tokens), as {', '.join(prompted)} needs the first:"]
            lines += ["", *_table(second, name)]
    labelled = {row["label"]: row for row in (*whole.rows, *second.rows)}
    lines += ["", *(f"- {sentence}" for sentence in forms.sentences(labelled.values()))]
    return "\n".join(lines) + "\n"


def _table(found: Rows, sparsity: str) -> list[str]:
    """Return the lines of one table."""
    names = list(found.dense["ppl"])
    header = ["", *(f"{text} ppl" for text in names), *(f"{text} KL" for text in names), "active", "read", "seconds"]
    ppl = [f"{found.dense['ppl'][text]:.2f}" for text in names]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    lines.append(_line(["dense", *ppl, *["0"] * len(names), "100 %", "100 %", ""]))
    for row in (one for one in found.rows if one["sparsity"] == sparsity):
        label = f"**{row['label']}**" if row["kind"] == "method" else row["label"]
        spread = row["ppl_std"]
        ppl = [_ppl(row["ppl"][text], spread[text] if spread else None) for text in names]
        kl = [f"{row['kl_to_dense'][text]:.3f}" for text in names]
        active = f"{100 * row['active_width_fraction']:.1f} %"
        if zero := row.get("zero_weight_fraction"):
            active += f", {100 * zero:.1f} % zeros"
        read = f"{100 * row['ffn_read_share']:.1f} %"
        lines.append(_line([label, *ppl, *kl, active, read, f"{row['seconds']:.0f}"]))
    return lines


def _ppl(value: float, spread: float | None) -> str:
    digits = 2 if value < 1000 else 0
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
