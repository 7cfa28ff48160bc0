"""The tries of a tuning, by the stages of ``moedge frontier``: what is made once is kept, and a stopped one resumes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._files import atomic_dir, link_or_copy, write_json
from moedge.configs.recipe import Recipe, recipe_from
from moedge.convert import costs
from moedge.runtime.bench import profiling
from moedge.runtime.frontier import page
from moedge.runtime.frontier import stages as frontier
from moedge.runtime.frontier.join import Quality, mean_kl, mean_ratio
from moedge.runtime.frontier.schema import Frontier
from moedge.runtime.frontier.variants import Variant, variants
from moedge.runtime.progress import Reporter
from moedge.runtime.run import held_out, run_folder, stages
from moedge.runtime.run.engine import Context, Stage, execute, lock
from moedge.runtime.run.stages import BENCH_CODE, RUNS, Facts
from moedge.runtime.tune.search import Decode, Goal, Try, best, first_speed_share, search

SCHEMA = "moedge.tune/1"
FIRST_SHARE = 0.75
"""Where a search for a loss begins: nothing is known of the model then."""
TRIES = 5


@dataclass
class Tuning:
    """One target, one goal, in one run folder.

    Args:
        recipe: its text, calibration, quality, verify and bench sections are used.
        times_products: weigh KL against milliseconds of the model's products, timed here, not against weights.
    """

    recipe: Recipe
    target: str
    goal: Goal
    root: Path
    machine: dict[str, Any]
    reporter: Reporter
    times_products: bool = field(default=False, kw_only=True)

    @property
    def bundle(self) -> str:
        """Target of the bundle that is written."""
        return self.target

    def run(self) -> dict[str, Any]:
        """Search, then convert, export, verify and time what was found; nobody else works in the run folder meanwhile.

        Returns:
            JSON of schema ``moedge.tune/1``, which is also in ``tune.json``; the checkpoint is in ``tuned/checkpoint``
            and its bundle in ``tuned/<target>`` of the run folder.

        Raises:
            MoEdgeError: the goal is out of reach, another run holds the folder, or what a stage refuses.
        """
        with lock(self.root):
            return self._run()

    def _run(self) -> dict[str, Any]:
        if self.times_products and not self._gather().get("costs"):
            self.recipe = self._with_costs()
        ffn = self._profiled() if self.goal.of_speed else None
        decode = Decode(ffn["ms"], ffn["part"]) if ffn else None
        first = first_speed_share(self.goal, decode) if decode else (FIRST_SHARE, None)
        done = search(self.goal, first, self._measured, decode, TRIES)
        chosen = best(self.goal, done)
        recipe = self._at(chosen.share)
        self._do(recipe, [*frontier.build(recipe, self.machine), self._verify(recipe)])
        found = page.read(self.root / frontier.TABLE / "frontier.json")
        (variant,) = variants(recipe)
        verification = run_folder.read_json(self.root / folder_of(variant) / "verify" / "verify.json")
        result = self._result(chosen, done, ffn, found, verification)
        self._keep(variant)
        write_json(self.root / "tune.json", result)
        return result

    def _gather(self) -> dict[str, Any]:
        """The recipe's gather, or the default one."""
        convert = self.recipe.convert.model_dump(mode="json")
        return convert if convert["method"] == "gather" else {"method": "gather"}

    def _with_costs(self) -> Recipe:
        """The recipe with what the products of its model take on this machine."""
        gather = self._gather()
        params = {
            **{"target": self.target, "linears": gather.get("linears", "all")},
            **{"threads": self.recipe.bench.threads, "machine": self.machine},
        }
        stage = Stage(
            "tune/costs",
            "time the model's products",
            time_products,
            params,
            reads=("source",),
            sources=(*BENCH_CODE, "convert/costs.py", "export/ort_ops", "runtime/tune"),
            libraries=("torch", "transformers", *RUNS),
        )
        recipe = self._at(FIRST_SHARE)
        self._do(recipe, [*self._only(recipe, "source"), stage])
        found = costs.read(self.root / stage.name / "costs.json")
        value = self.recipe.model_dump(mode="json")
        value["convert"] = {**gather, "costs": found}
        return recipe_from(value, where="moedge tune")

    def _at(self, share: float) -> Recipe:
        """The recipe of one try; its own conversion reads everything and is never made."""
        value = self.recipe.model_dump(mode="json")
        gather = self._gather()
        one = {"label": f"gather {share:.3f}", "convert": {**gather, "share": share}}
        value["convert"] = {**gather, "share": 1.0}
        value["export"] |= {"targets": [self.bundle], "build": []}
        value["evaluate"]["controls"] = []  # nobody reads what they would have calibration measure
        level = self.goal.limit if self.goal.kind == "speedup" else 1.0
        value["frontier"] |= {"targets": [self.bundle], "variants": [one], "speedup": level, "batches": [1]}
        return recipe_from(value, where="moedge tune")

    def _only(self, recipe: Recipe, *names: str) -> list[Stage]:
        """Some of the stages of a recipe's frontier."""
        return [stage for stage in frontier.build(recipe, self.machine) if stage.name in names]

    def _do(self, recipe: Recipe, todo: Sequence[Stage]) -> None:
        record = {"schema": run_folder.RUN_SCHEMA, "recipe": recipe.model_dump()}
        execute(list(todo), self.root, self.reporter, record=record)

    def _profiled(self) -> dict[str, float]:
        """Milliseconds of a decode step of the dense parent, and of the FFNs in it."""
        recipe = self._at(FIRST_SHARE)
        needed = self._only(recipe, "source", "export-dense")
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
            libraries=("torch", "transformers", *RUNS),
        )
        self._do(recipe, [*needed, stage])
        return dict(run_folder.read_json(self.root / stage.name / "profile.json")["ffn"])

    def _measured(self, share: float) -> tuple[float, float | None]:
        """Convert at a share and measure the goal: quality alone where only that is asked for.

        Returns:
            The value, and milliseconds of the dense parent timed beside it.
        """
        recipe = self._at(share)
        todo = frontier.build(recipe, self.machine)
        if self.goal.of_speed:
            self._do(recipe, todo)
            row, parent = page.read(self.root / frontier.TABLE / "frontier.json")["measured"][0]["rows"]
            value = row["decode_speedup"] if self.goal.kind == "speedup" else row["tpot_ms"]
            return value["value"], parent["tpot_ms"]["value"]
        (variant,) = variants(recipe)
        last = [stage.name for stage in todo].index(f"{folder_of(variant)}/quality")
        self._do(recipe, todo[: last + 1])
        one, _ = quality_of(self.root, variant)
        return (mean_kl(one) if self.goal.kind == "kl" else mean_ratio(one))["value"], None

    def _verify(self, recipe: Recipe) -> Stage:
        (variant,) = variants(recipe)
        folder = folder_of(variant)
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
        of_speed = {"speedup": row["decode_speedup"], "ms": row["tpot_ms"]}
        value = {**of_speed, "kl": variant["kl"], "ratio": variant["ppl_ratio"]}[self.goal.kind]
        return {
            **what_was_done(found["model"], self.target, self.goal, value["value"], done, verification["outcome"]),
            **chosen_facts(chosen.share, chosen.predicted, variant),
            "weighed": "milliseconds" if self._gather().get("costs") else "weights",
            "dense_decode": ffn,
            **{name: row[name] for name in ("decode_speedup", "prompt_speedup", "tpot_ms", "ttft_ms", "bytes")},
            "dense": {name: parent[name] for name in ("tpot_ms", "ttft_ms", "bytes")},
            "machine": found["machine"],
        }

    def _keep(self, variant: Variant) -> None:
        """Put checkpoint and bundle where people look for them.

        The checkpoint's files are hard links; the bundle's are not, for onnx opens no external data with two names.
        """
        folder = self.root / folder_of(variant)
        with atomic_dir(self.root / "tuned", force=True) as out:
            shutil.copytree(folder / "convert/checkpoint", out / "checkpoint", copy_function=link_or_copy)
            shutil.copytree(folder / "export" / self.bundle, out / self.bundle)


def what_was_done(model: Any, target: str, goal: Goal, value: float, done: list[Try], verified: str) -> dict[str, Any]:
    """Return what ``tune.json`` says of the search, wherever its times come from; ``value`` is what came out."""
    return {
        "schema": SCHEMA,
        "model": model,
        "target": target,
        "goal": {"kind": goal.kind, "limit": goal.limit},
        "reached": goal.reached(value),
        "tries": [vars(one) for one in done],
        "verified": verified,
    }


def chosen_facts(share: float, predicted: float | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what it says of the share that was chosen, and of the quality of that variant."""
    kept = ("ffn_read_share", "kl", "ppl_ratio", "texts", "plan_sha256")
    return {"share": share, "predicted": predicted, **{name: facts[name] for name in kept}}


def folder_of(variant: Variant) -> str:
    """Folder of a variant's stages in the run folder."""
    return f"{frontier.ROOM}/{variant.folder}"


def quality_of(root: Path, variant: Variant) -> tuple[Quality, dict[str, Any]]:
    """Return a variant's quality on the held-out windows beside its parent's, and what its stage wrote."""
    found = run_folder.read_json(root / folder_of(variant) / "quality" / "quality.json")
    return Quality.of(found, run_folder.read_json(root / frontier.ROOM / "dense" / "quality" / "quality.json")), found


def time_products(context: Context) -> None:
    """Time the products of the dense parent by how many of their inputs are kept."""
    from moedge.convert.sources import open_model
    from moedge.runtime.bench import products

    target, threads, linears = (context.params[name] for name in ("target", "threads", "linears"))
    model = open_model(run_folder.dense(context.root))
    found = products.of_model(model, target, threads, linears=linears, progress=context.progress)
    write_json(context.out / "costs.json", found)


def profile(context: Context) -> None:
    """Find out how much of a decode step of the dense parent its FFNs take."""
    from moedge.convert.sources import load_tokenizer

    params = context.params
    (text,) = held_out.texts(params["texts"])
    tokenizer = load_tokenizer(run_folder.dense(context.root))
    ids = held_out.windows(tokenizer, text, params["prompt"], 1, bos=None, name="benchmark")[0]
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
