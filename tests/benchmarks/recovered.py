"""What the same training gives back to a gather, CMoE and FLAP with our refit, and what to the dense parent.

    python tests/benchmarks/recovered.py --out build/recovered      # 13 trainings: some two hours of two cores
    python tests/benchmarks/recovered.py --out build/recovered --only .5 --how distill --jobs 2

All rows train LoRA, router and scales on the same tokens of wiki and c4, one thread each; perplexity is on held-out
documents, code and technical text among them, which nothing was calibrated or trained on. The dense parent (a gather
that leaves nothing out) is the control: a part of any gain is the text. The table has perplexity before -> after by
text, and minutes of processor with both evaluations. What is there already is not made again: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_TEXTS = ("asset:wiki", "asset:c4")
_HELD_OUT = (*_TEXTS, "asset:code", "asset:technical")
_REFIT = {"refit": "true", "token_weight": "residual", "sequential": "true"}
_ROWS = {
    ".75": {
        "gather": {"share": ".75"},
        "cmoe": {"shared": "6", "active": "6", "experts": "16"},
        "flap": {"keep": ".75", **_REFIT},
    },
    ".5": {
        "gather": {"share": ".5"},
        "cmoe": {"shared": "4", "active": "4", "experts": "16"},
        "flap": {"keep": ".5", **_REFIT},
    },
}


@dataclass(frozen=True)
class Row:
    """One conversion, and how it is trained."""

    share: str
    method: str
    settings: dict[str, str]
    how: str

    @property
    def checkpoint(self) -> str:
        return f"{self.method}{self.share}"

    @property
    def name(self) -> str:
        return f"{self.checkpoint}-{self.how}"


def rows(only: list[str], hows: list[str]) -> list[Row]:
    """The rows that were asked for; the dense parent is always there, and its own answers teach it nothing."""
    found = [Row("1", "gather", {"share": "1"}, "plain")]
    return found + [
        Row(share, method, settings, how) for share in only for how in hows for method, settings in _ROWS[share].items()
    ]


def moedge(*arguments: str, log: Path) -> float:
    """Run the command; seconds of processor that it took (on the clock, they would tell what ran beside it)."""
    command = [sys.executable, "-m", "moedge", *arguments]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: see {log}")
    return used.ru_utime + used.ru_stime


def repeated(option: str, values: tuple[str, ...]) -> list[str]:
    """``--option value`` for each value."""
    return [word for value in values for word in (option, value)]


def convert(model: str, row: Row, out: Path) -> None:
    """Convert once for all ways of training."""
    if (out / row.checkpoint).exists():
        return
    settings = repeated("--set", tuple(f"{key}={value}" for key, value in row.settings.items()))
    calibrated = [*repeated("--text", _TEXTS), "--windows", "16", "--length", "512"]
    target = str(out / row.checkpoint)
    moedge("convert", model, target, "--method", row.method, *settings, *calibrated, log=out / f"{row.checkpoint}.log")


def train(model: str, row: Row, tokens: int, out: Path) -> None:
    """Train; ``OUT/NAME.out`` has the result."""
    if (out / f"{row.name}.out").exists():
        return
    texts = [*repeated("--text", _TEXTS), *repeated("--held-out", _HELD_OUT)]
    sizes = ["--tokens", str(tokens), "--length", "256", "--batch-size", "2", "--eval-windows", "6", "--threads", "1"]
    rates = ["--lr", "5e-4", *repeated("--set", ("eval_every=1000000", "router_lr=2e-3"))]
    distill = ["--distill", "logits", "--dense", model] if row.how == "distill" else []
    target = [str(out / row.checkpoint), str(out / f"{row.name}.out")]
    seconds = moedge("finetune", *target, *texts, *sizes, *rates, *distill, log=out / f"{row.name}.log")
    (out / f"{row.name}.seconds").write_text(f"{seconds}\n", encoding="utf-8")


def line(row: Row, out: Path) -> str:
    """Markdown of one row."""
    record = json.loads((out / f"{row.name}.out" / "finetune.json").read_text(encoding="utf-8"))
    first, last = record["curve"][0], record["curve"][-1]
    cells = [f"{before:.2f} -> {last['ppl'][text]:.2f}" for text, before in first["ppl"].items()]
    minutes = float((out / f"{row.name}.seconds").read_text(encoding="utf-8")) / 60
    return f"| {row.share} | {row.method} | {row.how} | {' | '.join(cells)} | {minutes:.1f} |"


def main() -> None:
    """Convert, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--only", action="append", choices=list(_ROWS), help="shares; both by default")
    parser.add_argument("--how", action="append", choices=["distill", "plain"], help="both by default")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, one thread each")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = rows(given.only or list(_ROWS), given.how or ["distill", "plain"])
    for row in wanted:
        convert(given.model, row, given.out)
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda row: train(given.model, row, given.tokens, given.out), wanted))
    print("| share | method | training | wiki | c4 | code | technical | CPU minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for row in wanted:
        print(line(row, given.out))


if __name__ == "__main__":
    main()
