"""The files of a tokenizer: loaded as transformers does, written as one complete ``tokenizer.json``.

What ``AutoTokenizer`` makes of the parent's folder is what its ids mean: the model was trained, and is calibrated and
evaluated, with it. That may be another tokenizer than the parent's ``tokenizer.json``: the class that
``tokenizer_config.json`` names may put a normalizer, a pre-tokenizer or special tokens of its own in place of the
file's, or make everything of ``vocab.json`` and ``merges.txt`` or a SentencePiece model. So checkpoints and bundles
hold what came out, which every reader takes as it is.
"""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedge import MoEdgeError
from moedge._files import refuse_pointer, write_json
from moedge.convert.errors import first_sentence, quiet, translated
from moedge.convert.sources import folder_check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY = ("tokenizer.json", "*.model", "tokenizer.model*", "vocab.json", "vocab.txt", "tekken.json")
PATTERNS = (
    *_VOCABULARY,
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("*.jinja", "additional_chat_templates/*.jinja"),
)
"""Files of a model folder that make a tokenizer and its chat templates."""

_MADE_BY_CLASS = ("add_bos_token", "add_eos_token", "add_prefix_space", "from_slow", "legacy", "sp_model_kwargs")
_OF_FILES = ("added_tokens_decoder", "auto_map", "files_loaded", "merges", "merges_file", "vocab", "vocab_file")
_OF_LOADING = (
    "backend",
    "is_local",
    "local_files_only",
    "tokenizer_file",
    "tokenizer_object",
    "use_default_system_prompt",
)
_WRITTEN = ("clean_up_tokenization_spaces", "model_input_names", "padding_side", "split_special_tokens")
"""Attributes whose defaults depend on the class."""
_PROBE = (
    "Hello world, 12345.67!\n\n\tdef f(x):\r\n        return  x ** 2\n",
    "  two spaces before and after  ",
    "\u00e9 e\u0301 \u00df \u4e2d\u6587 \u0e44\u0e17\u0e22 \U0001f642\u200d\u2642\ufe0f \u2028\u00a0end",
    "",
)


def load(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder.

    Raises:
        MoEdgeError: the folder has no tokenizer, or one that cannot be loaded or written as tokenizer.json.
    """
    from transformers import AutoTokenizer

    import moedge.convert.model_types  # noqa: F401  which AutoTokenizer must know

    found = {path.name for pattern in _VOCABULARY for path in folder.glob(pattern) if path.is_file()}
    if not found:
        raise MoEdgeError(f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json there.")
    _check_files(folder)
    if all(".model" in name for name in found) and find_spec("sentencepiece") is None:
        raise MoEdgeError(
            f"Reading the tokenizer in {folder / min(found)} takes the package sentencepiece; install moedge[convert]."
        )
    task = f"Cannot load the tokenizer in {folder} from {', '.join(sorted(found))}"
    with quiet(), translated(task, "Copy the model's tokenizer.json and tokenizer_config.json there."):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kind = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MoEdgeError(
            f"{folder}: the tokenizer's class {kind} runs in Python only, so it cannot be written as tokenizer.json; "
            "give a model whose tokenizer is of the tokenizers library."
        )
    # Without files of the kind that it reads, a class makes a vocabulary of its special tokens.
    if set(backend.get_vocab(with_added_tokens=False)) <= set(tokenizer.all_special_tokens):
        raise MoEdgeError(
            f"{folder}: class {kind} finds no vocabulary in {', '.join(sorted(found))}; copy the model's "
            "tokenizer.json and tokenizer_config.json there."
        )
    return tokenizer


def _check_files(folder: Path) -> None:
    """Name the file that is damaged: libraries say what is wrong, but not where."""
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}):
        refuse_pointer(path)
        if path.suffix == ".json":
            folder_check.read_object(path)


def save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer and its chat templates: tokenizer.json is complete, so no reader has to know the class.

    Raises:
        MoEdgeError: what was written gives other tokens than ``tokenizer``.
    """
    backend: Any = tokenizer.backend_tokenizer
    # transformers sets both anew at every call. In the file they would cut texts for other readers.
    backend.no_truncation()
    backend.no_padding()
    try:
        tokenizer.save_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise MoEdgeError(f"The tokenizer cannot be written: {first_sentence(error)}") from error
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in (*_MADE_BY_CLASS, *_OF_FILES, *_OF_LOADING):
        config.pop(name, None)
    config |= {name: getattr(tokenizer, name) for name in _WRITTEN}
    # The name that transformers 4 knows, too; both take tokenizer.json as it is.
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    _check(tokenizer, folder)


def check(folder: Path) -> None:
    """Refuse a model folder whose tokenizer cannot be loaded, or not be written as tokenizer.json.

    Raises:
        MoEdgeError: see :func:`load` and :func:`save`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        save(load(folder), Path(scratch))


def _check(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Read ``folder`` as runtimes and as transformers do, and compare token ids."""
    import tokenizers
    from transformers import AutoTokenizer

    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.encode_special_tokens = tokenizer.split_special_tokens
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    special = " x".join(str(token) for token in tokenizer.all_special_tokens)
    for text in (*_PROBE, f"{special} a {special}"):
        wanted = tokenizer(text, verbose=False)["input_ids"]
        for ids in (file.encode(text).ids, again(text, verbose=False)["input_ids"]):
            if ids != wanted:
                raise MoEdgeError(
                    f"The tokenizer (class {type(tokenizer).__name__}) cannot be written as tokenizer.json: read back, "
                    f"it gives {ids[:8]} for {text[:24]!r} instead of {wanted[:8]}."
                )
