"""The text that engines are compared on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moedge import MoEdgeError
from moedge.runtime.text.windows import token_windows


@dataclass(frozen=True)
class Sample:
    """Which text, how much of it, and how it is read.

    Raises:
        MoEdgeError: a window of which nothing would be read at once or decoded.
    """

    text: str = "asset:wiki"
    """``asset:NAME`` or a file."""
    tokens: int = 2048
    """To compare on, in whole windows."""
    window: int = 256
    """Tokens that are read together."""
    prefill: int = 224
    """Tokens of a window that are read at once; the rest is decoded one by one."""

    def __post_init__(self) -> None:
        """Refuse what decodes nothing."""
        for name, least in (("tokens", 0), ("window", 2), ("prefill", 1)):
            if getattr(self, name) < least:
                raise MoEdgeError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.prefill >= self.window:
            raise MoEdgeError(
                f"A prefill of {self.prefill} leaves nothing to decode in a window of {self.window} tokens."
            )

    def windows(self, folder: Path) -> tuple[str, np.ndarray]:
        """Return the text's name and its windows int64 [N, L], by the tokenizer of ``folder``.

        Raises:
            MoEdgeError: no such text, or too little of it.
        """
        return token_windows(folder, self.text, self.window, -(-self.tokens // self.window))

    def longer(self, folder: Path, length: int) -> np.ndarray:
        """Return one window int64 [1, length] of the same text."""
        return token_windows(folder, self.text, length, 1)[1]
