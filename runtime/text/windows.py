"""Text -> token windows where transformers may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moedge.runtime.text.tokenizer import open_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


class _Adapter:
    """The two things of a transformers tokenizer that ``calibration.windows`` uses."""

    bos_token_id: int | None = None

    def __init__(self, folder: Path) -> None:
        self._tokenizer = open_tokenizer(folder)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=False)}


def token_windows(folder: Path, spec: str, length: int, count: int) -> tuple[str, np.ndarray]:
    """Return the text's name and int64 [count, length] from its beginning, by the tokenizer in ``folder``.

    Raises:
        MoEdgeError: no tokenizer, no such text, or too little of it.
    """
    from moedge.convert import calibration

    text = calibration.read_text(spec)
    tokenizer = cast("PreTrainedTokenizerBase", _Adapter(folder))
    return text.name, calibration.windows(tokenizer, text, length, count, bos=False, name="given")
