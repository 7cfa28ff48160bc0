"""Text -> token windows where transformers may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moedge.runtime.text.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


class _Adapter:
    """The two things of a transformers tokenizer that ``calibration.windows`` uses."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens)}


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Return ``tokenizer`` as the functions take it that cut text into windows."""
    return cast("PreTrainedTokenizerBase", _Adapter(tokenizer))


def token_windows(folder: Path, spec: str, length: int, count: int) -> tuple[str, np.ndarray]:
    """Return the text's name and int64 [count, length] from its beginning, by the tokenizer in ``folder``.

    Raises:
        MoEdgeError: no tokenizer, no such text, or too little of it.
    """
    from moedge.convert import calibration

    text = calibration.read_text(spec)
    tokenizer = as_transformers(open_tokenizer(folder))
    return text.name, calibration.windows(tokenizer, text, length, count, bos=None, name="given")
