"""Domain affinity mining: which named texts are so alike that one pruned expert serves them (DIVE, stage 1).

For D domains (ACL 2025, 2025.acl-long.951; docs/methods.md 4.1; the mining code was never published):

1. prune the FFNs with FLAP once a domain, calibrated on that domain's text;
2. measure each pruned model's perplexity on every domain: p [D, D], rows the domain pruned for, columns measured on;
3. divide the smallest entry of each column by the column: 1 is the best pruned model for a domain;
4. correlate the rows (Pearson): domains whose pruned models are good at the same things are alike;
5. cluster hierarchically on the distance 1 - r and cut into groups.

The result is plain JSON (:meth:`Affinity.to_json`), with all that a plot needs. The linkage is not stated in what could
be read of the paper; the default here is ``average``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moedge import MoEdgeError
from moedge.convert import partition
from moedge.convert.plan import LayerPlan, MoEPlan
from moedge.convert.rounding import six

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moedge._progress import Progress

Linkage = Literal["average", "complete", "single"]

AFFINITY_SCHEMA = "moedge.affinity/1"
_HELD = 8
_SCORED = 4
"""One document in four is for measuring, the others for pruning."""


@dataclass(frozen=True)
class DomainText:
    """Token windows of one domain, int64 [N, L]: to prune with, and, of other documents, to measure on."""

    prune: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Mean and population variance of one FFN's activations h over tokens, float64 [D] each."""

    mean: np.ndarray
    variance: np.ndarray


# --- text -----------------------------------------------------------------------------------------------------------


def read(
    tokenizer: PreTrainedTokenizerBase,
    entries: Sequence[Mapping[str, Any]],
    *,
    length: int,
    samples: int,
    score_samples: int,
    bos: bool | None,
    seed: int,
) -> tuple[dict[str, DomainText], list[dict[str, Any]]]:
    """Read the windows of every domain, and what to say about them (JSON).

    Documents that the run holds out are left out here too; the rest is shuffled and one in four is for measuring only.

    Args:
        entries: ``{"name", "spec", "every"}`` each; see :func:`moedge.convert.calibration.read_text` and ``split``.
        length: ids in a window.
        samples: windows to prune with; ``score_samples``: to measure on.
        bos: put the BOS token in front of every window; None: as the tokenizer does.
        seed: of the order of documents.

    Raises:
        MoEdgeError: a text that cannot be read or is too short; the message names the domain.
    """
    from moedge._files import digest
    from moedge.convert import calibration

    found, facts = {}, []
    for entry in entries:
        text = calibration.read_text(entry["spec"])
        kept = calibration.split(text, entry["every"])[0].documents
        order = np.random.default_rng(seed).permutation(len(kept))
        shuffled = [kept[i] for i in order]
        parts = {"prune": [d for i, d in enumerate(shuffled) if i % _SCORED], "score": shuffled[::_SCORED]}
        counts = {"prune": samples, "score": score_samples}
        windows = {
            part: calibration.windows(
                tokenizer,
                calibration.TextSet(entry["name"], documents, text.sha256),
                length,
                counts[part],
                bos=bos,
                name="domain",
            )
            for part, documents in parts.items()
        }
        found[entry["name"]] = DomainText(**windows)
        facts.append(
            {
                "name": entry["name"],
                "text": entry["spec"],
                "every": entry["every"],
                "text_sha256": text.sha256,
                "tokens": int(windows["prune"].size),
                "score_tokens": int(windows["score"].size),
                "tokens_sha256": digest([windows["prune"].tolist(), windows["score"].tolist()]),
            }
        )
    return found, facts


def training_windows(
    tokenizer: PreTrainedTokenizerBase, entries: Sequence[Mapping[str, Any]], *, length: int, count: int, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return (windows to train on, held-out windows by domain), int64 [N, length] each.

    Every domain gives ``count / D`` windows of documents that are not held out, or all that it has; 8 windows of its
    held-out documents, or all, are for measuring.

    Args:
        entries: name, spec and every of each domain, and ``text_sha256`` where the text has to be that one.

    Raises:
        MoEdgeError: a text that cannot be read, another one, or one without a whole window on either side.
    """
    from moedge.convert import calibration

    each, train, held = -(-count // len(entries)), [], {}
    for entry in entries:
        text = calibration.read_text(entry["spec"])
        if text.sha256 != entry.get("text_sha256", text.sha256):
            raise MoEdgeError(
                f"{entry['spec']} is not the text that the model was made with, so nobody knows which of its documents "
                "were held out; bring that text back, or convert again."
            )
        parts = calibration.split(text, entry["every"])
        for part, wanted in zip(parts, (each, _HELD), strict=True):
            ids: list[int] = []
            for i in np.random.default_rng(seed).permutation(len(part.documents)):
                if len(ids) >= wanted * length:
                    break
                ids += tokenizer(part.documents[i].text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
            found = min(wanted, len(ids) // length)
            if not found:
                raise MoEdgeError(f"The text of the domain {entry['name']!r} is shorter than one window of {length}.")
            windows = np.asarray(ids[: found * length], dtype=np.int64).reshape(found, length)
            if part is parts[0]:
                train.append(windows)
            else:
                held[entry["name"]] = windows
    return np.concatenate(train), held


def save(texts: Mapping[str, DomainText], path: Path) -> None:
    """Write the windows as one safetensors file; :func:`load` gives them back in the same order."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for number, (name, text) in enumerate(texts.items()):
        tensors |= {f"{number:04d}.prune.{name}": text.prune, f"{number:04d}.score.{name}": text.score}
    save_file(tensors, path)


def load(path: Path) -> dict[str, DomainText]:
    """Read what :func:`save` wrote.

    Raises:
        MoEdgeError: missing or damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        prunes = sorted(key for key in tensors if key[4:11] == ".prune.")
        return {key[11:]: DomainText(tensors[key], tensors[f"{key[:4]}.score.{key[11:]}"]) for key in prunes}
    except (OSError, SafetensorError, KeyError) as error:
        raise MoEdgeError(f"Domain windows {path} are missing or damaged ({error}); calibrate again.") from error


# --- affinity -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Affinity:
    """Domains, how alike they are, and their groups; D domains, float64 arrays.

    ``perplexity[i, j]``: pruned for i, measured on j; ``dense[j]``: of the dense parent. ``linkage`` [D-1, 4] and the
    dendrogram are SciPy's (``scipy.cluster.hierarchy``).
    """

    names: list[str]
    perplexity: np.ndarray
    dense: np.ndarray | None
    normalised: np.ndarray
    correlation: np.ndarray
    linkage: np.ndarray
    method: str
    groups: list[list[str]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON of schema ``moedge.affinity/1``."""
        from scipy.cluster.hierarchy import dendrogram

        drawn = dendrogram(self.linkage, no_plot=True)
        return {
            "schema": AFFINITY_SCHEMA,
            "names": self.names,
            "perplexity": _rounded(self.perplexity),
            "dense": None if self.dense is None else _rounded(self.dense),
            "normalised": _rounded(self.normalised),
            "correlation": _rounded(self.correlation),
            "linkage": _rounded(self.linkage),
            "linkage_method": self.method,
            "groups": self.groups,
            "dendrogram": {
                "order": [int(leaf) for leaf in drawn["leaves"] or ()],
                "across": _rounded(np.asarray(drawn["icoord"])),
                "height": _rounded(np.asarray(drawn["dcoord"])),
            },
        }


def affinity(
    names: Sequence[str],
    perplexity: np.ndarray,
    groups: int,
    *,
    method: Linkage = "average",
    dense: np.ndarray | None = None,
) -> Affinity:
    """Group domains by a cross-pruning perplexity matrix [D, D] (steps 3 to 5 of the module's list).

    Groups, and the domains within one, are in the order of ``names``. A row without variance (a pruned model that is
    the best one everywhere) correlates with nothing: r = 0.

    Raises:
        MoEdgeError: fewer than two domains, more groups than domains, or a perplexity that is not a positive number.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    count = len(names)
    if count < 2 or not 1 <= groups <= count:
        raise MoEdgeError(f"{count} domains cannot be put into {groups} groups; give at least two domains.")
    if perplexity.shape != (count, count) or not (np.isfinite(perplexity) & (perplexity > 0)).all():
        raise MoEdgeError(f"The perplexity matrix of {count} domains must be square, finite and positive.")
    normalised = perplexity.min(axis=0, keepdims=True) / perplexity
    centred = normalised - normalised.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 1e-12)
    correlation = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(correlation, 1.0)
    tree = linkage(squareform(1 - (correlation + correlation.T) / 2, checks=False), method=method)
    labels = cut_tree(tree, n_clusters=[groups])[:, 0]
    found: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        found.setdefault(int(label), []).append(name)
    return Affinity(list(names), perplexity, dense, normalised, correlation, tree, method, list(found.values()))


def regrouped(found: Affinity, groups: int, seed: int) -> Affinity:
    """Return the same affinity with its domains dealt out at random, sizes alike: the control for the mining."""
    dealt = np.array_split(np.random.default_rng(seed).permutation(len(found.names)), groups)
    return replace(found, groups=sorted([found.names[i] for i in sorted(part)] for part in dealt))


def _rounded(values: np.ndarray) -> Any:
    """Nested lists of floats of 6 digits."""
    return np.vectorize(six, otypes=[object])(values).tolist()


# --- mining ---------------------------------------------------------------------------------------------------------


def moments(model: PreTrainedModel, windows: np.ndarray, *, progress: Progress | None = None) -> list[Moments]:
    """Run windows [N, L] through the dense model; return mean and variance of h of each FFN."""
    from moedge.convert import calibration

    layers = calibration.collect(model, windows, k_a=1, progress=progress)
    return [Moments(layer.mean.astype(np.float64), layer.variance.astype(np.float64)) for layer in layers]


def pooled(parts: Sequence[Moments]) -> Moments:
    """Return the moments of several domains' tokens together, every domain with the same weight."""
    mean = np.mean([part.mean for part in parts], axis=0)
    spread = [part.variance + np.square(part.mean - mean) for part in parts]
    return Moments(mean, np.mean(spread, axis=0))


def pruned(model: PreTrainedModel, layers: Sequence[Moments], width: int) -> MoEPlan:
    """Return a static plan: every FFN pruned by FLAP to ``width`` neurons, with its bias."""
    from moedge.convert import adapters

    plans = []
    for block, layer in zip(adapters.ffns(model), layers, strict=True):
        kept, bias = partition.flap(block.down.float().cpu().numpy(), layer.mean, layer.variance, width)
        plans.append(LayerPlan(kept, [], 0, output_bias=bias))
    return MoEPlan("FLAP-MLP", {"width": width}, adapters.describe(model), plans)


def perplexities(
    model: PreTrainedModel,
    plans: Sequence[MoEPlan],
    texts: Mapping[str, DomainText],
    *,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (perplexity of each plan on each domain [len(plans), D], of the dense model [D]), 6 digits each.

    Args:
        progress: called with (windows done, windows in all).
    """
    from moedge.convert import scoring

    total, done = (1 + len(plans)) * sum(len(text.score) for text in texts.values()), 0

    def row() -> list[float]:
        nonlocal done
        values = []
        for text in texts.values():
            values.append(six(scoring.perplexity(model, text.score)["ppl"]))
            done += len(text.score)
            if progress:
                progress(done, total)
        return values

    dense = row()
    rows = []
    for plan in plans:
        with scoring.swapped(model, plan):
            rows.append(row())
    return np.array(rows), np.array(dense)
