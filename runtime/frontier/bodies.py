"""The work of the stages that only the frontier has: quality of each variant, times of each target, the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.runtime.run import held_out, run_folder
from moedge.runtime.run.engine import Context

if TYPE_CHECKING:
    import numpy as np

QUALITY_SCHEMA = "moedge.frontier-quality/1"


def dense_quality(context: Context) -> None:
    """Keep the held-out windows, and the dense parent's last hidden states and log-likelihoods on them."""
    import torch
    from safetensors.torch import save_file

    from moedge.convert import calibration, scoring
    from moedge.convert.sources import load_model, load_tokenizer

    params, folder = context.params, run_folder.dense(context.root)
    tokenizer, model = load_tokenizer(folder), load_model(folder, device=params["device"])
    count = params["tokens"] // params["window"]
    bos = calibration.starts_with_bos(tokenizer, params["bos"])
    windows: dict[str, np.ndarray] = {}
    for text in held_out.texts(params["texts"]):
        windows[text.name] = held_out.windows(tokenizer, text, params["window"], count, bos=bos, name="frontier")
    states = scoring.last_hidden_states(model, windows, batch_size=params["batch_size"], progress=context.progress)
    tensors = {f"states.{name}": value.contiguous() for name, value in states.items()}
    tensors |= {f"ids.{name}": torch.from_numpy(ids) for name, ids in windows.items()}
    save_file(tensors, context.out / "dense.safetensors")
    texts = {}
    for name, ids in windows.items():
        known = states[name]
        scores = [scoring.score_all(model, ids[i : i + 1, 1:], known[i : i + 1], []) for i in range(count)]
        texts[name] = {"nll": [nll[0] for nll, _ in scores]}
    dtype = str(model.dtype).removeprefix("torch.")
    about = {"schema": QUALITY_SCHEMA, "label": "dense", "dtype": dtype, "bos": bos}
    write_json(context.out / "quality.json", {**about, "texts": texts})


def quality(context: Context) -> None:
    """Measure, window by window, how a variant differs from its parent, and how many FFN weights it reads a token."""
    from safetensors.torch import load_file

    from moedge.convert import adapters, reads, scoring
    from moedge.convert.plan import MoEPlan
    from moedge.convert.sources import load_model

    params = context.params
    kept = load_file(context.root / "dense" / "dense.safetensors")
    names = run_folder.read_json(context.root / "dense" / "quality.json")["texts"]
    windows = {name: kept[f"ids.{name}"].numpy() for name in names}
    model = load_model(run_folder.dense(context.root), device=params["device"])
    plan = MoEPlan.load(run_folder.checkpoint(context.root))
    width = len(adapters.ffns(model)[0].gate)
    texts = {}
    for name, ids in windows.items():
        dense = kept[f"states.{name}"].to(model.device)
        with scoring.swapped(model, plan), reads.counted(model) as counts:
            states = scoring.last_hidden_states(
                model, {name: ids}, batch_size=params["batch_size"], progress=context.progress
            )[name]
            share = counts.share(width)
        pairs = [
            scoring.score_all(model, ids[i : i + 1, 1:], dense[i : i + 1], [states[i : i + 1]]) for i in range(len(ids))
        ]
        texts[name] = {
            "nll": [nll[1] for nll, _ in pairs],
            "kl": [kl[0] for _, kl in pairs],
            "ffn_read_share": share,
        }
    about = {"schema": QUALITY_SCHEMA, "label": params["label"], "plan_sha256": plan.sha256}
    write_json(context.out / "quality.json", {**about, "texts": texts})


def bench(context: Context) -> None:
    """Time every variant on one target beside the dense parent in every precision, once for each batch size."""
    from functools import partial

    from moedge.convert.sources import load_tokenizer
    from moedge.runtime.bench import latency
    from moedge.runtime.bench.points import grid
    from moedge.runtime.engines import open_engine

    params = context.params
    (text,) = held_out.texts(params["texts"])
    ids = held_out.windows(
        load_tokenizer(run_folder.dense(context.root)),
        text,
        params["prompt"],
        max(params["batches"]),
        bos=None,
        name="benchmark",
    )
    engines = {
        label: partial(open_engine, context.root / place, threads=params["threads"], last_logits=True)
        for label, place in params["engines"].items()
    }
    options = {name: params[name] for name in ("repeats", "warmup")}
    sizes = {label: bundle_bytes(context.root / place) for label, place in params["engines"].items()}
    parents = [label for label in engines if label.startswith("dense ")]
    together = groups(sizes, parents, int(params["machine"].get("memory_gib", 16) * 2**30))
    points = grid([params["prompt"]], [params["decode"]], batch=params["batches"])
    runs = []
    for number, labels in enumerate(together, 1):
        if len(together) > 1:
            context.note(f"group {number} of {len(together)}")
        some = {label: engines[label] for label in labels}
        runs.append(latency.bench(some, ids, points, **options, memory=False, progress=context.progress))
    write_json(context.out / "bench.json", {"text": text.name, "sizes": sizes, "runs": runs})


def groups(sizes: dict[str, int], parents: list[str], memory: int) -> list[list[str]]:
    """Split the variants so that engines that are open together fit into memory; the parents are in each group.

    An engine takes up to one and a half times its bundle (weights, and those that the runtime packs anew), and less
    than three quarters of the memory are given to them.

    Args:
        sizes: bytes of each bundle; memory: of this machine.

    Returns:
        Labels of each group, variants first, in the order given.
    """
    room = int(memory * 0.75 / 1.5) - sum(sizes[label] for label in parents)
    found: list[list[str]] = []
    free = 0
    for label in sizes:
        if label in parents:
            continue
        if not found or sizes[label] > free:
            found.append([])
            free = room
        found[-1].append(label)
        free -= sizes[label]
    return [[*labels, *parents] for labels in found]


def bundle_bytes(folder: Path) -> int:
    """Return the bytes of a bundle's files.

    Raises:
        MoEdgeError: it is none.
    """
    from moedge.export import manifest as manifests

    manifest = manifests.read(folder)
    if not isinstance(manifest, manifests.Manifest):
        raise MoEdgeError(f"{folder} is not a bundle; run `moedge frontier` on its recipe again.")
    return sum(entry.size for entry in manifest.files.values())


def table(context: Context) -> None:
    """Write frontier.json, frontier.md and frontier.html."""
    from moedge.runtime.frontier import join, page

    params: dict[str, Any] = context.params
    page.write(join.join(context.root, params), context.out)
