"""The tries of a tuning, by the stages of ``moedge frontier``: what is made once is kept, and a stopped one resumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._files import atomic_dir, link_or_copy, write_json
from moedge.configs.recipe import Recipe, recipe_from
from moedge.runtime.bench import profiling
from moedge.runtime.frontier import page
from moedge.runtime.frontier import stages as frontier
from moedge.runtime.frontier.schema import Frontier
from moedge.runtime.frontier.variants import Variant, variants
from moedge.runtime.progress import Reporter
from moedge.runtime.run import held_out, run_folder, stages
from moedge.runtime.run.engine import Context, Stage, execute
from moedge.runtime.run.stages import BENCH_CODE, Facts
from moedge.runtime.tune.search import Goal, Try, best, first_speed_share, search

SCHEMA = "moedge.tune/1"
FIRST_SHARE = 0.75
"""Where a search for a loss begins: nothing is known of the model then."""
TRIES = 5


@dataclass
class Tuning:
    """One target, one goal, in one run folder.

    Args:
        recipe: its text, calibration, quality, verify and bench sections are used.
    """

    recipe: Recipe
    target: str
    goal: Goal
    root: Path
    machine: dict[str, Any]
    reporter: Reporter

    def run(self) -> dict[str, Any]:
        """Search, then convert, export, verify and time what was found.

        Returns:
            JSON of schema ``moedge.tune/1``, which is also in ``tune.json``; the checkpoint is in ``tuned/checkpoint``
            and its bundle in ``tuned/<target>`` of the run folder.

        Raises:
            MoEdgeError: the goal is out of reach, or what a stage refuses.
        """
        ffn = self._profiled() if self.goal.kind == "speedup" else None
        part = ffn["part"] if ffn else 1.0
        first = (first_speed_share(self.goal, part), self.goal.limit) if ffn else (FIRST_SHARE, None)
        done = search(self.goal, first, self._measured, part, TRIES)
        chosen = best(self.goal, done)
        recipe = self._at(chosen.share)
        self._do(recipe, [*frontier.build(recipe, self.machine), self._verify(recipe)])
        found = page.read(self.root / frontier.TABLE / "frontier.json")
        (variant,) = variants(recipe)
        verification = run_folder.read_json(self.root / _folder(variant) / "verify" / "verify.json")
        result = self._result(chosen, done, ffn, found, verification)
        self._keep(variant)
        write_json(self.root / "tune.json", result)
        return result

    def _at(self, share: float) -> Recipe:
        """The recipe of one try; its own conversion reads everything and is never made."""
        value = self.recipe.model_dump(mode="json")
        gather = value["convert"] if value["convert"]["method"] == "gather" else {"method": "gather"}
        one = {"label": f"gather {share:.3f}", "convert": {**gather, "share": share}}
        value["convert"] = {**gather, "share": 1.0}
        value["export"] |= {"targets": [self.target], "build": []}
        level = self.goal.limit if self.goal.kind == "speedup" else 1.0
        value["frontier"] |= {"targets": [self.target], "variants": [one], "speedup": level, "batches": [1]}
        return recipe_from(value, where="moedge tune")

    def _do(self, recipe: Recipe, todo: Sequence[Stage]) -> None:
        record = {"schema": run_folder.RUN_SCHEMA, "recipe": recipe.model_dump()}
        execute(list(todo), self.root, self.reporter, record=record)

    def _profiled(self) -> dict[str, float]:
        """Milliseconds of a decode step of the dense parent, and of the FFNs in it."""
        recipe = self._at(FIRST_SHARE)
        needed = [stage for stage in frontier.build(recipe, self.machine) if stage.name in ("source", "export-dense")]
        facts, bench = Facts(recipe, self.machine), recipe.bench
        params = {
            **{"target": self.target, "prompt": recipe.frontier_lengths()[0], "decode": recipe.frontier_lengths()[1]},
            **{"repeats": bench.repeats, "threads": bench.threads, "machine": self.machine},
            "texts": {**facts.texts, "held_out": facts.held_out[:1]},
        }
        stage = Stage(
            "tune/profile",
            "profile the dense parent",
            profile,
            params,
            reads=("source", "export-dense"),
            sources=(*BENCH_CODE, *frontier.CODE, "runtime/tune"),
            libraries=("torch", "transformers", "onnx", "onnxruntime"),
        )
        self._do(recipe, [*needed, stage])
        return dict(run_folder.read_json(self.root / stage.name / "profile.json")["ffn"])

    def _measured(self, share: float) -> float:
        """Convert at a share and measure the goal: quality alone where only that is asked for."""
        recipe = self._at(share)
        todo = frontier.build(recipe, self.machine)
        if self.goal.kind == "speedup":
            self._do(recipe, todo)
            found = page.read(self.root / frontier.TABLE / "frontier.json")
            return found["measured"][0]["rows"][0]["decode_speedup"]["value"]
        (variant,) = variants(recipe)
        last = [stage.name for stage in todo].index(f"{_folder(variant)}/quality")
        self._do(recipe, todo[: last + 1])
        return loss_of(run_folder.read_json(self.root / todo[last].name / "quality.json"), self.root, self.goal)

    def _verify(self, recipe: Recipe) -> Stage:
        (variant,) = variants(recipe)
        folder = _folder(variant)
        alone = variant.recipe.model_copy(
            update={"export": variant.recipe.export.model_copy(update={"dense_parent": False})}
        )
        stage = stages.verify(alone, Facts(alone, self.machine))
        called = {"source": "source", "convert": f"{folder}/convert", "export": f"{folder}/export"}
        return replace(stage, name=f"{folder}/verify", called=called, reads=tuple(called.values()))

    def _result(
        self, chosen: Try, done: list[Try], ffn: dict[str, float] | None, found: Frontier, verification: dict[str, Any]
    ) -> dict[str, Any]:
        (variant,), (measured,) = found["variants"], found["measured"]
        row, parent = measured["rows"]
        value = {"speedup": row["decode_speedup"], "kl": variant["kl"], "ratio": variant["ppl_ratio"]}[self.goal.kind]
        return {
            "schema": SCHEMA,
            "model": found["model"],
            "target": self.target,
            "goal": {"kind": self.goal.kind, "limit": self.goal.limit},
            "reached": self.goal.reached(value["value"]),
            "share": chosen.share,
            "predicted": chosen.predicted,
            "tries": [vars(one) for one in done],
            "dense_decode": ffn,
            **{name: variant[name] for name in ("ffn_read_share", "kl", "ppl_ratio", "texts", "plan_sha256")},
            **{name: row[name] for name in ("decode_speedup", "prompt_speedup", "tpot_ms", "ttft_ms", "bytes")},
            "dense": {name: parent[name] for name in ("tpot_ms", "ttft_ms", "bytes")},
            "verified": verification["outcome"],
            "machine": found["machine"],
        }

    def _keep(self, variant: Variant) -> None:
        """Put checkpoint and bundle where people look for them; hard links, for they are big."""
        folder = self.root / _folder(variant)
        sources = {"checkpoint": folder / "convert" / "checkpoint", self.target: folder / "export" / self.target}
        with atomic_dir(self.root / "tuned", force=True) as out:
            for name, source in sources.items():
                for path in sorted(source.rglob("*")):
                    if path.is_file():
                        place = out / name / path.relative_to(source)
                        place.parent.mkdir(parents=True, exist_ok=True)
                        link_or_copy(path, place)


def _folder(variant: Variant) -> str:
    return f"{frontier.ROOM}/{variant.folder}"


def loss_of(quality: dict[str, Any], root: Path, goal: Goal) -> float:
    """Return the KL or the perplexity ratio of a variant, the mean of the texts (of the ratio the geometric one)."""
    from moedge.runtime.frontier.join import Quality, mean_kl, mean_ratio

    dense = run_folder.read_json(root / frontier.ROOM / "dense" / "quality" / "quality.json")
    one = Quality.of(quality, dense)
    return (mean_kl(one) if goal.kind == "kl" else mean_ratio(one))["value"]


def profile(context: Context) -> None:
    """Find out how much of a decode step of the dense parent its FFNs take."""
    from moedge.convert.sources import load_tokenizer

    params = context.params
    (text,) = held_out.texts(params["texts"])
    tokenizer = load_tokenizer(run_folder.dense(context.root))
    ids = held_out.windows(tokenizer, text, params["prompt"], 1, bos=False, name="benchmark")[0]
    sizes = {name: params[name] for name in ("prompt", "decode", "repeats", "threads")}
    found = profiling.profile(context.root / "export-dense" / params["target"], ids, **sizes)
    rows = {row["name"]: row["ms"] for row in found["decode"]["groups"]}
    if "dense FFN" not in rows:
        raise MoEdgeError(
            f"The graph of target {params['target']} does not show which nodes are FFNs, so no speed can be predicted; "
            "take a target that is lowered for a runtime, such as ort-cpu."
        )
    total = found["decode"]["ms"]
    ffn = {"ms": total, "ffn_ms": rows["dense FFN"], "part": min(max(rows["dense FFN"] / total, 0.01), 1.0)}
    write_json(context.out / "profile.json", {"ffn": ffn, "profile": found})
