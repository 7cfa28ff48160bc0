"""``generation_config.json``: what a model asks of the loop that generates, and which of it MoEdge does.

:data:`SETTINGS` is the whole list; ``docs/generation.md`` shows it. Which file counts, and what a missing key means, is
as in transformers' ``generate()``: the file alone where there is one, else those keys of ``config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from moedge import MoEdgeError
from moedge._files import read_json

FILE = "generation_config.json"
PAGE = "docs/generation.md"


class Use(Enum):
    """What becomes of a setting."""

    ALWAYS = "obeyed"
    SAMPLING = "obeyed when sampling"
    CALLER = "yours to say"
    NOTHING = "changes no token"
    LEFT_OUT = "left out, and named"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_token, value))


def _token_or_tokens(value: Any) -> bool:
    return _token(value) or _tokens(value)


def _sequences(value: Any) -> bool:
    return isinstance(value, list) and all(_tokens(item) and item for item in value)


def _biases(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and _tokens(item[0]) and item[0] and _number(item[1])
        for item in value
    )


def _decay(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _count(value[0]) and _positive(value[1])


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


@dataclass(frozen=True)
class Setting:
    """One key of ``generation_config.json``.

    ``neutral`` are the values that ask for nothing, besides null; ``valid`` says whether the key can have a value, and
    ``wanted`` in words which. Settings that are not obeyed are not checked.
    """

    use: Use
    says: str
    neutral: tuple[Any, ...] = ()
    valid: Callable[[Any], bool] | None = None
    wanted: str = ""


def _obeyed(says: str, valid: Callable[[Any], bool], wanted: str, *neutral: Any, sampling: bool = False) -> Setting:
    return Setting(Use.SAMPLING if sampling else Use.ALWAYS, says, neutral, valid, wanted)


def _nothing(says: str) -> Setting:
    return Setting(Use.NOTHING, says)


def _left_out(says: str, *neutral: Any) -> Setting:
    return Setting(Use.LEFT_OUT, says, neutral)


_IDS, _ONE_OR_MORE = "a list of token ids", "a token id or a list of them"
_BEAMS = _nothing("of beam search, which `num_beams` asks for")
_SPEED = _nothing("how the memory of earlier tokens is kept")
_SPECULATION = _nothing("of speculative decoding, which makes the same tokens faster")
_OUTPUT = _nothing("what transformers' `generate()` returns besides the tokens")
_ABOUT = _nothing("about the file")

SETTINGS: dict[str, Setting] = {
    "eos_token_id": _obeyed("ids that end the text", _token_or_tokens, _ONE_OR_MORE),
    "repetition_penalty": _obeyed("over prompt and answer, once a token", _positive, "a number above 0", 1),
    "encoder_repetition_penalty": _obeyed("its inverse, over the prompt", _positive, "a number above 0", 1),
    "no_repeat_ngram_size": _obeyed("over prompt and answer", _count, "a whole number", 0),
    "encoder_no_repeat_ngram_size": _obeyed("no run of tokens of the prompt", _count, "a whole number", 0),
    "sequence_bias": _obeyed("added to a sequence's last token", _biases, "a list of [token ids, number]", []),
    "bad_words_ids": _obeyed("sequences that never come", _sequences, "a list of lists of token ids", []),
    "min_length": _obeyed("prompt and answer; no end of text before", _count, "a whole number", 0),
    "min_new_tokens": _obeyed("of the answer, in place of `min_length`", _count, "a whole number"),
    "forced_bos_token_id": _obeyed("first token of the answer to a prompt of one token", _token, "a token id"),
    "forced_eos_token_id": _obeyed("last token that fits the length", _token_or_tokens, _ONE_OR_MORE),
    "exponential_decay_length_penalty": _obeyed(
        "ends of text become likelier", _decay, "[number of tokens, factor above 0]"
    ),
    "suppress_tokens": _obeyed("tokens that never come", _tokens, _IDS, []),
    "begin_suppress_tokens": _obeyed("tokens that do not come first", _tokens, _IDS, []),
    "stop_strings": _obeyed("end the text and are not shown", _strings, "a text or a list of texts", []),
    "temperature": _obeyed("in transformers' order", _positive, "a number above 0", 1, sampling=True),
    "top_h": _obeyed("in transformers' order", _share, "a number of 0 to 1", sampling=True),
    "top_k": _obeyed("the same; 50 where the file says nothing, 0 for all", _count, "a whole number", sampling=True),
    "top_p": _obeyed("in transformers' order", _share, "a number of 0 to 1", 1, sampling=True),
    "min_p": _obeyed("in transformers' order", _share, "a number of 0 to 1", 0, sampling=True),
    "typical_p": _obeyed("in transformers' order", _share, "a number of 0 to 1", 1, sampling=True),
    "epsilon_cutoff": _obeyed("in transformers' order", _share, "a number of 0 to 1", 0, 1, sampling=True),
    "eta_cutoff": _obeyed("in transformers' order", _share, "a number of 0 to 1", 0, 1, sampling=True),
    "do_sample": Setting(Use.CALLER, "greedy unless you ask for sampling; where the file asks for it, a note says so"),
    "max_new_tokens": Setting(Use.CALLER, "`--max-new-tokens`, and what the model can hold"),
    "max_length": Setting(Use.CALLER, "`--max-new-tokens`, and what the model can hold"),
    "bos_token_id": Setting(Use.CALLER, "the tokenizer says which tokens a prompt starts with"),
    "pad_token_id": Setting(Use.CALLER, "one text at a time is not padded; `genai_config.json` names it"),
    "num_beams": _left_out("beam search", 1),
    "penalty_alpha": _left_out("contrastive search", 0),
    "dola_layers": _left_out("contrasting of layers"),
    "constraints": _left_out("constrained beam search", []),
    "force_words_ids": _left_out("constrained beam search", []),
    "guidance_scale": _left_out("a second run without the prompt", 1),
    "watermarking_config": _left_out("watermarks"),
    "token_healing": _left_out("another end of the prompt", False),
    "num_return_sequences": _left_out("several answers", 1),
    "max_time": _left_out("an end by the clock"),
    "remove_invalid_values": _left_out("logits that are no numbers are refused: the engine is broken", False),
    "cache_implementation": _left_out(
        "only `quantized` changes tokens", "dynamic", "dynamic_full", "static", "offloaded", "offloaded_static",
        "hybrid", "sliding_window", "hybrid_chunked", "paged",
    ),
    "renormalize_logits": _nothing("the order of the tokens and their probabilities stay"),
    **dict.fromkeys(("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty"), _BEAMS),
    **dict.fromkeys(("use_cache", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"), _SPEED),
    **dict.fromkeys(("compile_config", "disable_compile", "continuous_batching_config"), _nothing("how torch runs it")),
    **dict.fromkeys(
        (
            "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
            "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
            "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp",
        ),
        _SPECULATION,
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        _OUTPUT,
    ),
    "decoder_start_token_id": _nothing("of models with an encoder"),
    **dict.fromkeys(("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash"), _ABOUT),
}  # fmt: skip
"""Every key that transformers' ``GenerationConfig`` knows, and what becomes of it here."""

DEFAULT_TOP_K = 50
"""transformers' ``top_k`` where a file says nothing."""


@dataclass(frozen=True)
class GenerationConfig:
    """What one model's files ask for.

    ``settings`` holds keys whose value asks for something (unknown keys too); those that are always obeyed are checked.
    ``ends`` are the ids that end the text, ``source`` the file that says so, ``notes`` sentences about what it leaves
    open.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    source: str = FILE
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> GenerationConfig:
        """Read a checkpoint, bundle or engine folder.

        Raises:
            MoEdgeError: a file that is no JSON object, or a value that its key cannot have.
        """
        model = _model_config(folder / "config.json")
        path = folder / FILE
        if not path.is_file():
            return cls._of(model, folder / "config.json", ())
        found = read_json(path, _MEND)
        notes = []
        if found.get("eos_token_id") is None and (dropped := model.get("eos_token_id")) not in (None, []):
            notes.append(
                f"{FILE} names no end of text, so nothing but the length ends one, as in transformers' generate(); "
                f'add "eos_token_id": {json.dumps(dropped)}, which config.json names, to {FILE} to end there.'
            )
        return cls._of(found, path, tuple(notes))

    @classmethod
    def _of(cls, found: Mapping[str, Any], path: Path, notes: tuple[str, ...]) -> GenerationConfig:
        settings = {}
        for key, value in found.items():
            known = SETTINGS.get(key)
            if value is None or (known and known.use is Use.NOTHING):
                continue
            if known and known.use is Use.ALWAYS:
                _check(key, value, str(path))
            if known is None or value not in known.neutral:
                settings[key] = value
        ends = settings.pop("eos_token_id", ())
        return cls(settings, tuple([ends] if isinstance(ends, int) else ends), path.name, notes)

    def of(self, *uses: Use) -> dict[str, Any]:
        """Settings of these kinds."""
        return {key: value for key, value in self.settings.items() if key in SETTINGS and SETTINGS[key].use in uses}

    def left_out(self) -> dict[str, Any]:
        """Settings that change what is generated, or may, and are not obeyed."""
        unknown = {key: value for key, value in self.settings.items() if key not in SETTINGS}
        return self.of(Use.LEFT_OUT) | unknown

    def sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings for sampling: ``given`` over the model's own over transformers' defaults; neutral values are gone.

        Raises:
            MoEdgeError: a value that its key cannot have. Greedy text does not need these and is not refused for them.
        """
        own = self.of(Use.SAMPLING)
        asked = {key: value for key, value in given.items() if value is not None}
        chosen = {"top_k": DEFAULT_TOP_K} | own | asked
        for key, value in chosen.items():
            _check(key, value, f"{self.source}, to sample," if key not in asked else "Sampling")
        kept = {key: value for key, value in chosen.items() if value not in SETTINGS[key].neutral}
        return {key: value for key, value in kept.items() if (key, value) != ("top_k", 0)}

    def said(self, *, sampled: bool) -> list[str]:
        """Sentences about what is not done of what the files ask for."""
        said = list(self.notes)
        if self.settings.get("do_sample") is True and not sampled:
            settings = self.of(Use.SAMPLING) or {"top_k": DEFAULT_TOP_K}
            said.append(
                f"{self.source} asks for sampling ({shown(settings)}); this text is greedy, --sample follows the file."
            )
        if missing := self.left_out():
            said.append(f"{self.source} asks for {shown(missing)}: left out, see {PAGE}.")
        return said


def _check(key: str, value: Any, where: str) -> None:
    setting = SETTINGS[key]
    if setting.valid and not setting.valid(value):
        raise MoEdgeError(f"{where}: {key} is {json.dumps(value)}; it must be {setting.wanted}.")


def shown(settings: Mapping[str, Any]) -> str:
    """``temperature 0.7, top_k 50``; long values are cut."""
    texts = {key: json.dumps(value) for key, value in settings.items()}
    return ", ".join(f"{key} {text if len(text) <= 40 else text[:37] + '...'}" for key, text in texts.items())


def table() -> str:
    """The list as a Markdown table, for the page."""
    rows = ["| key | here | remark |", "|---|---|---|"]
    groups: dict[tuple[Use, str], list[str]] = {}
    for key, setting in SETTINGS.items():
        groups.setdefault((setting.use, setting.says), []).append(f"`{key}`")
    rows += [f"| {', '.join(keys)} | {use.value} | {says} |" for (use, says), keys in groups.items()]
    return "\n".join(rows)


_MEND = "copy it again from the model's source"


def _model_config(path: Path) -> dict[str, Any]:
    """Keys of ``config.json`` that are settings of generation; those of a nested text model where it has none."""
    if not path.is_file():
        return {}
    found = read_json(path, _MEND)
    nested: Any = next((found[name] for name in ("decoder", "generator", "text_config") if found.get(name)), {})
    both = {**(nested if isinstance(nested, dict) else {}), **{k: v for k, v in found.items() if v is not None}}
    return {key: value for key, value in both.items() if key in SETTINGS}
