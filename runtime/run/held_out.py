"""Which documents a stage sees: calibration text, and the held-out text that quality and parity are measured on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moedge.convert.calibration import TextSet
    from moedge.convert.plan import MoEPlan


def calibration_text(entry: dict[str, Any]) -> tuple[TextSet, int]:
    """Documents of ``{"spec", "every"}`` that are not held out, and the step: every so manyth document is held out.

    A text of one document, which is never split, is taken whole where ``{"alone": True}`` says that nothing else is
    measured on it; the step is then 0.

    Raises:
        MoEdgeError: no document is left.
    """
    from moedge.convert import calibration

    read = calibration.read_text(entry["spec"])
    if entry.get("alone") and len(read.documents) == 1:
        return read, 0
    text = calibration.split(read, entry["every"])[0]
    if not text.documents:
        raise MoEdgeError(
            f"The text {entry['spec']} has no document left to calibrate on: every {entry['every']}th, the first "
            "included, is held out for measuring. Give several documents, e.g. one a line, or measure on another text."
        )
    return text, entry["every"]


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, entries: dict[str, Any], length: int, count: int, *, bos: bool | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Windows int64 [count, length] of ``{"texts": [{"spec", "alone"}, ...], "every"}``, and where they are from.

    Several texts get equally many, the first ones one more where it does not come out even, and take turns.

    Raises:
        MoEdgeError: no document is left of a text, or too little text.
    """
    from moedge.convert import calibration

    parts, used = [], []
    number = len(entries["texts"])
    for position, entry in enumerate(entries["texts"]):
        text, every = calibration_text({**entry, "every": entries["every"]})
        share = count // number + (position < count % number)
        parts.append(calibration.windows(tokenizer, text, length, share, bos=bos, name="calibration"))
        facts = {"text": entry["spec"], "text_sha256": text.sha256, "held_out_every": every}
        used.append({**facts, "documents": len(text.documents)})
    if number == 1:
        return parts[0], used[0]
    names = ", ".join(entry["text"] for entry in used)
    documents = sum(entry["documents"] for entry in used)
    return interleaved(parts), {"text": names, "calibration_texts": used, "documents": documents}


def interleaved(parts: list[np.ndarray]) -> np.ndarray:
    """Return the windows of several texts so that they take turns, evenly where one has more than another.

    Those that some methods hold out (:func:`moedge.convert.streaming.held_out`) are then drawn from all of them.
    """
    import numpy as np

    from moedge.convert.streaming import HELD_EVERY

    number = len(parts)
    when = np.concatenate([np.arange(len(ids)) / len(ids) for ids in parts])
    turn = np.concatenate([np.full(len(ids), place) for place, ids in enumerate(parts)])
    if number % HELD_EVERY == 0:  # the held-out place of every round would be the same text's: each round starts later
        turn = (turn - np.concatenate([np.arange(len(ids)) for ids in parts])) % number
    mixed: np.ndarray = np.concatenate(parts)[np.lexsort((turn, when))]
    return mixed


def texts(entries: dict[str, Any]) -> list[TextSet]:
    """Held-out documents of each text: those the split keeps back, or all of a text that calibration never saw.

    Args:
        entries: ``{"calibration": {"texts": [{"is", ...}, ...], "every"}, "held_out": [{"spec", "is"}, ...]}`` and,
            where a method calibrates on more texts, ``"domains": [{"is", ...}, ...]``; ``is`` tells whether two specs
            mean the same file.
    """
    from moedge.convert import calibration

    found: list[TextSet] = []
    seen = {entry["is"] for entry in (*entries["calibration"]["texts"], *entries.get("domains", ()))}
    for entry in entries["held_out"]:
        text = calibration.read_text(entry["spec"])
        if entry["is"] in seen:
            text = calibration.split(text, entries["calibration"]["every"])[1]
        found.append(replace(text, name=own_name(text.name, [other.name for other in found])))
    return found


def own_name(name: str, taken: Collection[str]) -> str:
    """Name a text that is read beside others: of the same file name the second one is ``name (2)``, and so on."""
    numbered = (name if number == 1 else f"{name} ({number})" for number in itertools.count(1))
    return next(one for one in numbered if one not in taken)


def whole(spec: str) -> tuple[TextSet, str]:
    """All documents of a text, and what they are in words."""
    from moedge.convert import calibration

    text = calibration.read_text(spec)
    return text, f"{len(text.documents)} documents"


def beside(plans: Iterable[MoEPlan], spec: str, every: int, trained: Collection[str] = ()) -> tuple[TextSet, str]:
    """Documents of a text that no plan was calibrated, trained or pruned on, and what they are in words.

    Args:
        plans: of the models that are measured; all of them see the same documents.
        spec: the text.
        every: of a text that a plan has seen, the documents with id (else position) 0 modulo this are taken.
        trained: hashes of texts that are about to be trained on with this ``every``.

    Raises:
        MoEdgeError: a plan held out other documents of the text than ``every`` takes.
    """
    from moedge.convert import calibration

    text, words = whole(spec)
    used_by_all = [*(used for plan in plans for used in _seen(plan)), *({"text_sha256": one} for one in trained)]
    seen = [used for used in used_by_all if text.sha256 == used["text_sha256"]]
    if not seen:
        return text, words
    for used in seen:
        if used.get("every") == 0:
            raise MoEdgeError(f"The model has seen all of the text {spec}; give another text.")
        if every % used.get("every", every):
            raise MoEdgeError(
                f"Of the text {spec} every {used['every']}th document was held out when the model was made; give "
                f"--holdout-every {used['every']} or a multiple of it."
            )
    text = calibration.split(text, every)[1]
    if not text.documents:
        raise MoEdgeError(f"The model has seen all of the text {spec}; give another text.")
    how = (
        "of the calibration text"
        if all(used.get("calibration") for used in seen)
        else "of a text that a model has seen"
    )
    return text, f"{len(text.documents)} documents {how} that were held out, id % {every} = 0"


def _seen(plan: MoEPlan) -> list[dict[str, Any]]:
    """Return ``{"text_sha256", "every"}`` of each text that made a plan; older plans do not say the calibration's."""
    found: list[dict[str, Any]] = []
    for entry in plan.provenance.get("calibration_texts", [plan.provenance]):
        if "text_sha256" in entry:
            every = entry.get("held_out_every")
            used = {"text_sha256": entry["text_sha256"], "calibration": True}
            found.append(used if every is None else {**used, "every": every})
    found += plan.provenance.get("domains", [])
    note = plan.provenance.get("finetune")
    while note:
        found += [{"text_sha256": one, "every": note["held_out_every"]} for one in note.get("text_sha256", [])]
        note = note.get("before")
    return found


def check_window(model: PreTrainedModel, length: int, option: str) -> None:
    """Refuse windows beyond the positions that a model was made for: its perplexity there means nothing.

    Raises:
        MoEdgeError: ``length`` is; ``option`` is what the user may lower.
    """
    check_positions(getattr(model.config, "max_position_embeddings", None), length, option)


def check_positions(longest: object, length: int, option: str) -> None:
    """:func:`check_window` for a model that is not open: ``longest`` is its max_position_embeddings, if it has one."""
    if isinstance(longest, int) and length > longest:
        raise MoEdgeError(f"{option} {length} is beyond the model's {longest} positions; make it smaller.")


def windows(
    tokenizer: PreTrainedTokenizerBase, text: TextSet, length: int, count: int, *, bos: bool | None, name: str
) -> np.ndarray:
    """Token windows int64 [count, length]; see :func:`moedge.convert.calibration.windows`."""
    from moedge.convert import calibration

    return calibration.windows(tokenizer, text, length, count, bos=bos, name=name)
