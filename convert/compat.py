"""What differs between the versions of transformers that pyproject.toml allows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which ``model.forward`` takes the cache: ``cache``, before 5.24 ``past_key_values``.

    transformers takes the older name with a warning until 5.40.
    """
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"
