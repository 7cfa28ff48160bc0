"""Which documents a stage sees: calibration text, and the held-out text that quality and parity are measured on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from moedge.convert.calibration import TextSet
    from moedge.convert.plan import MoEPlan


def calibration_text(entry: dict[str, Any]) -> TextSet:
    """Documents of ``{"spec", "every"}`` that are not held out.

    Raises:
        MoEdgeError: none is left: a text of one document is all held out, for a document is never split.
    """
    from moedge.convert import calibration

    text = calibration.split(calibration.read_text(entry["spec"]), entry["every"])[0]
    if not text.documents:
        raise MoEdgeError(
            f"The text {entry['spec']} has no document left to calibrate on: every {entry['every']}th, the first "
            "included, is held out for measuring. Give several documents, e.g. one a line."
        )
    return text


def texts(entries: dict[str, Any]) -> list[TextSet]:
    """Held-out documents of each text: those the split keeps back, or all of a text that calibration never saw.

    Args:
        entries: ``{"calibration": {"spec", "is", "every"}, "held_out": [{"spec", "is"}, ...]}`` and, where a method
            calibrates on more texts, ``"domains": [{"is", ...}, ...]``; ``is`` tells whether two specs
            mean the same file.
    """
    from moedge.convert import calibration

    found: list[TextSet] = []
    seen = {entry["is"] for entry in (entries["calibration"], *entries.get("domains", ()))}
    for entry in entries["held_out"]:
        text = calibration.read_text(entry["spec"])
        if entry["is"] in seen:
            text = calibration.split(text, entries["calibration"]["every"])[1]
        same = sum(other.name.split(" ")[0] == text.name for other in found)
        found.append(replace(text, name=f"{text.name} ({same + 1})") if same else text)
    return found


def whole(spec: str) -> tuple[TextSet, str]:
    """All documents of a text, and what they are in words."""
    from moedge.convert import calibration

    text = calibration.read_text(spec)
    return text, f"{len(text.documents)} documents"


def beside(plan: MoEPlan, spec: str, every: int) -> tuple[TextSet, str]:
    """Documents of a text that a plan was not calibrated on, and what they are in words.

    Args:
        every: of the calibration text, the documents with id (else position) 0 modulo this were held out.
    """
    from moedge.convert import calibration

    text, words = whole(spec)
    if text.sha256 != plan.provenance.get("text_sha256"):
        return text, words
    text = calibration.split(text, every)[1]
    return text, f"{len(text.documents)} documents of the calibration text that were held out, id % {every} = 0"


def windows(
    tokenizer: PreTrainedTokenizerBase, text: TextSet, length: int, count: int, *, bos: bool, name: str
) -> np.ndarray:
    """Token windows int64 [count, length]; see :func:`moedge.convert.calibration.windows`."""
    from moedge.convert import calibration

    return calibration.windows(tokenizer, text, length, count, bos=bos, name=name)
