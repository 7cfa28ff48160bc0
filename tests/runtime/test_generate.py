"""Generation: what is streamed is what is returned, whole characters only, and every way to stop stops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moedge import MoEdgeError
from moedge.configs.generation_config import GenerationConfig
from moedge.runtime.cli import app
from moedge.runtime.engines import Step, open_engine
from moedge.runtime.engines.info import EngineInfo, EngineModel
from moedge.runtime.text.generate import draw, generate
from moedge.runtime.text.logits import warped
from moedge.runtime.text.tokenizer import StopStrings, Tokenizer

END = 257  # <|end|> of the toy tokenizer: 256 bytes, <|start|>, <|end|>


@pytest.fixture(scope="module")
def tokenizer(toy_bundles: dict[str, Path]) -> Tokenizer:
    return Tokenizer(toy_bundles["concat"])


class Script:
    """An engine that says the given ids, whatever it is asked."""

    def __init__(self, ids: list[int], eos: list[int] | None = None, max_length: int = 64, **generation: Any) -> None:
        self.ids, self.prompts, self.fed = ids, [], []
        ends = [END] if eos is None else eos
        asked = GenerationConfig(generation)
        model = EngineModel(vocab_size=300, eos_token_ids=ends, max_length=max_length, generation=asked)
        self.info = EngineInfo("script", "script", "CPU", "float32", 1, model)

    def _say(self, position: int) -> Step:
        logits = np.zeros((1, 1, 300), dtype=np.float32)
        logits[0, 0, self.ids[position % len(self.ids)]] = 9
        return Step(logits, position + 1)

    def prefill(self, ids: np.ndarray, attention_mask: np.ndarray | None = None) -> Step:
        self.prompts.append(ids[0].tolist())
        return self._say(0)

    def decode(self, ids: np.ndarray, cache: Any) -> Step:
        self.fed.append(int(ids[0, 0]))
        return self._say(cache)

    def close(self) -> None:
        pass


def test_text_is_streamed_in_whole_characters(tokenizer: Tokenizer) -> None:
    text = "naïve 日本 🙂👩‍👧 end"
    engine = Script([*tokenizer.encode(text), END])
    pieces: list[str] = []
    result = generate(engine, tokenizer, "Say", on_text=pieces.append)
    assert result.text == text
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(text), "every character is shown as soon as it is whole"
    assert result.finish_reason == "eos"
    assert result.ids[-1] == END
    assert engine.prompts == [tokenizer.encode("Say")]
    assert engine.fed == result.ids[:-1]


@hypothesis_settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=24))
def test_a_stream_of_any_bytes_adds_up_to_the_whole_decoding(data: bytes, tokenizer: Tokenizer) -> None:
    """Invalid UTF-8 included: nothing is lost, repeated or taken back."""
    alphabet = {token: i for i, token in enumerate(sorted(_byte_characters()))}
    ids = [alphabet[_byte_characters()[byte]] for byte in data]
    stream = tokenizer.stream()
    shown = ""
    whole = tokenizer.decode(ids)
    for token in ids:
        shown += stream.push(token)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole == data.decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """What SentencePiece models become (Llama 2, Mistral, Gemma): a character without a token is its bytes."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁a": 257, "b": 258}
    toy = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    toy.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    folder = tmp_path_factory.mktemp("fallback")
    toy.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@hypothesis_settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from([*"日本語é🙂\n", "b", " a"]), max_size=12))
def test_characters_of_byte_tokens_are_shown_when_they_are_whole(parts: list[str], fallback: Tokenizer) -> None:
    named = {" a": [257], "b": [258]}
    stream, shown, wanted = fallback.stream(), "", fallback.decode([])
    ids: list[int] = []
    for part in parts:
        of_part = named.get(part) or [1 + byte for byte in part.encode()]
        for token in of_part[:-1]:
            assert stream.push(token) == "", "half a character is not shown"
        ids += of_part
        wanted = fallback.decode(ids)
        shown += "".join(stream.push(token) for token in of_part[-1:])
        assert shown == wanted
    assert shown + stream.finish() == wanted == "".join(parts).removeprefix(" ")


def _byte_characters() -> list[str]:
    """Byte -> its character in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in table)})
    return [table[byte] for byte in range(256)]


def test_an_unfinished_character_is_marked_at_the_end(tokenizer: Tokenizer) -> None:
    engine = Script([*tokenizer.encode("ok "), *tokenizer.encode("🙂")[:2], END])
    assert generate(engine, tokenizer, "x").text == "ok \ufffd"


@pytest.mark.parametrize("argument", ["-", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_a_prompt_that_is_not_utf8_is_one_sentence(argument: str, toy_bundles: dict[str, Path]) -> None:
    command = ["generate", str(toy_bundles["concat"]), argument, "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, command, input=b"caf\xe9")
    assert (result.exit_code, "error: The prompt is not UTF-8 text" in result.stderr) == (2, True), result.output


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_prompt_from_stdin(mark: bytes, toy_bundles: dict[str, Path]) -> None:
    command = ["generate", str(toy_bundles["concat"]), "-", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, command, input=mark + "café".encode())
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("café")


@pytest.mark.parametrize("eos", [298, 299])
def test_any_end_of_text_id_of_the_model_stops(eos: int, tokenizer: Tokenizer) -> None:
    result = generate(Script([*tokenizer.encode("Hi"), eos, 65], eos=[298, 299]), tokenizer, "x")
    assert (result.text, result.finish_reason) == ("Hi", "eos")


def test_the_tokenizers_end_of_text_ends_a_chat_and_no_plain_prompt(tokenizer: Tokenizer) -> None:
    """generate() knows only what the model's files name; a template closes turns with the tokenizer's."""
    says = [*tokenizer.encode("Hi"), END, 65]
    plain = generate(Script(says, eos=[]), tokenizer, "x", max_new_tokens=4)
    assert (plain.ids, plain.finish_reason) == (says, "length")
    chat = generate(Script(says, eos=[]), tokenizer, MESSAGES, max_new_tokens=4)
    assert (chat.ids, chat.finish_reason) == (says[:-1], "eos")


def test_stop_strings_of_the_model_and_of_the_caller_end_a_text(tokenizer: Tokenizer) -> None:
    engine = Script([*tokenizer.encode("one two three"), END], stop_strings=["thr"])
    assert generate(engine, tokenizer, "x").text == "one two "
    assert generate(engine, tokenizer, "x", stop=["wo"]).text == "one t"
    engine = Script([*tokenizer.encode("one two three"), END], stop_strings="two")
    assert generate(engine, tokenizer, "x").text == "one "


@pytest.mark.parametrize("stop", ["<|start|>", "a<|start|>b", "b", "<|start|>b<|end|>"])
def test_special_tokens_count_in_stop_strings_as_in_transformers(
    stop: str, tokenizer: Tokenizer, toy_bundles: dict[str, Path]
) -> None:
    from transformers import PreTrainedTokenizerFast
    from transformers.generation.stopping_criteria import StopStringCriteria

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(toy_bundles["concat"] / "tokenizer.json"))
    ids = tokenizer.encode("xa<|start|>b<|end|>c", add_special_tokens=False)
    wanted = StopStringCriteria(theirs, [stop])
    last = next(n for n in range(1, len(ids) + 1) if wanted(torch.tensor([ids[:n]]), None)[0])
    found = generate(Script(ids, eos=[]), tokenizer, "x", max_new_tokens=len(ids), stop=stop)
    assert (found.ids, found.finish_reason) == (ids[:last], "stop")
    assert found.text == "xa<|start|>b<|end|>".partition(stop)[0].replace("<|start|>", "")


def test_a_tiny_temperature_is_nearly_greedy(tokenizer: Tokenizer) -> None:
    assert generate(Script([65]), tokenizer, "x", max_new_tokens=3, temperature=1e-40).ids == [65] * 3


def test_a_setting_that_rules_out_every_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(MoEdgeError, match=r"generation_config\.json rules out every token here \(suppress_tokens\)"):
        generate(Script([65], suppress_tokens=list(range(300))), tokenizer, "x")


def test_sampling_takes_what_is_not_given_from_the_model(tokenizer: Tokenizer) -> None:
    engine = Script([65], do_sample=True, temperature=1.2, top_p=0.3, repetition_penalty=1.5)

    def used(**options: Any) -> dict[str, Any]:
        return generate(engine, tokenizer, "x", max_new_tokens=1, **options).settings

    penalty = {"repetition_penalty": 1.5}
    assert used() == used(temperature=0.0) == penalty
    sampled = {"do_sample": True, "temperature": 1.2, "top_k": 50, "top_p": 0.3, **penalty}
    assert used(sample=True) == sampled
    assert used(temperature=0.5) == {**sampled, "temperature": 0.5}
    assert used(top_k=7, min_p=0.1, top_p=0.9) == {**sampled, "top_k": 7, "min_p": 0.1, "top_p": 0.9}
    assert generate(engine, tokenizer, "x", max_new_tokens=1, sample=True).notes == ()
    assert "--sample" in generate(engine, tokenizer, "x", max_new_tokens=1).notes[0]


def test_the_command_names_what_it_used_and_what_it_left_out(make_toy_bundle: Any, tmp_path: Path) -> None:
    from moedge._files import hash_tree, write_json

    make_toy_bundle(tmp_path / "toy")
    asked = {"repetition_penalty": 1.1, "num_beams": 4, "do_sample": True, "temperature": 0.6}
    write_json(tmp_path / "toy" / "generation_config.json", asked)
    manifest = json.loads((tmp_path / "toy" / "manifest.json").read_text())
    (tmp_path / "toy" / "manifest.json").unlink()
    write_json(tmp_path / "toy" / "manifest.json", {**manifest, "files": hash_tree(tmp_path / "toy")})
    command = ["generate", str(tmp_path / "toy"), "The", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "; greedy (repetition_penalty 1.1)" in result.stderr
    assert "note: generation_config.json asks for sampling (temperature 0.6)" in result.stderr
    assert "note: generation_config.json asks for num_beams 4: left out, see docs/generation.md." in result.stderr
    assert "note" not in result.stdout
    sampled = CliRunner().invoke(app, [*command, "--sample", "--top-k", "3"])
    assert "; sampled (repetition_penalty 1.1, top_k 3, temperature 0.6)" in sampled.stderr, sampled.stderr
    both = CliRunner().invoke(app, [*command, "--sample", "--temperature", "0"])
    assert (both.exit_code, "temperature 0 is greedy" in both.stderr) == (2, True)


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["lo w"], "hel", "stop"),
        (["xyz", "world"], "hello ", "stop"),
        (["o", "hello"], "", "stop"),
        (["world!"], "hello world", "eos"),
        (["", "never"], "hello world", "eos"),
    ],
)
def test_stop_strings_end_the_text_and_are_not_shown(
    stop: list[str], text: str, reason: str, tokenizer: Tokenizer
) -> None:
    pieces: list[str] = []
    engine = Script([*tokenizer.encode("hello world"), END])
    result = generate(engine, tokenizer, "x", stop=stop, on_text=pieces.append)
    assert (result.text, result.finish_reason) == (text, reason)
    assert "".join(pieces) == text


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=12),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown, rest = StopStrings(stops), "", text
    for cut in [*cuts, len(text)]:
        shown += matcher.push(rest[:cut])
        rest = rest[cut:]
    shown += matcher.finish()
    if matcher.hit is None:
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + matcher.hit)
        assert not any(stop in shown for stop in stops)


def test_length_and_context_limit_the_text(tokenizer: Tokenizer) -> None:
    result = generate(Script([65]), tokenizer, "abc", max_new_tokens=5)
    assert (result.text, result.finish_reason) == (tokenizer.decode([65]) * 5, "length")
    engine = Script([65], max_length=8)
    result = generate(engine, tokenizer, "abcdef", max_new_tokens=50)
    assert len(result.ids) == 3, "6 prompt tokens and 2 fed ones fill the context; the third is chosen, not fed"
    assert len(engine.fed) == 2
    with pytest.raises(MoEdgeError, match="9 tokens, 1 more than this model can hold"):
        generate(engine, tokenizer, "abcdefghi")


@pytest.mark.parametrize("kind", ["concat", "shared_buffer"])
def test_a_real_engine_fills_its_context_exactly(kind: str, toy_bundles: dict[str, Path], tokenizer: Tokenizer) -> None:
    engine = open_engine(toy_bundles[kind], threads=1)
    engine.info = replace(engine.info, model=engine.info.model.model_copy(update={"eos_token_ids": []}))
    result = generate(engine, tokenizer, "The", max_new_tokens=1000, temperature=1.0, seed=1)
    assert len(result.ids) == 64 - 3 + 1 or result.finish_reason == "eos"
    again = generate(engine, tokenizer, "The", max_new_tokens=1000, temperature=1.0, seed=1)
    other = generate(engine, tokenizer, "The", max_new_tokens=1000, temperature=1.0, seed=2)
    assert result.ids == again.ids != other.ids


def test_both_cache_kinds_generate_the_same_text(toy_bundles: dict[str, Path], tokenizer: Tokenizer) -> None:
    made = [
        generate(open_engine(toy_bundles[kind]), tokenizer, "The", max_new_tokens=40).ids
        for kind in ("concat", "shared_buffer")
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"temperature": -1}, "must be 0 .greedy. or more"),
        ({"temperature": 0, "sample": True}, "cannot be asked for together"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"top_p": 0}, "top_p <= 1"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "a\ud800"}, "lone surrogate .character 2."),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_one_sentence(options: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(MoEdgeError, match=message):
        generate(Script([65]), tokenizer, **{"prompt": "x", **options})


def test_broken_logits_are_refused_not_spoken(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Script([65])
    monkeypatch.setattr(engine, "_say", lambda _: Step(np.full((1, 1, 300), np.nan, np.float32), 1))
    with pytest.raises(MoEdgeError, match="NaN"):
        generate(engine, tokenizer, "x")


def test_temperature_and_top_p_give_the_distribution_they_promise() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    generator = np.random.default_rng(0)
    draws = 4000

    def frequencies(temperature: float, top_p: float) -> np.ndarray:
        scores = warped(logits, {"temperature": temperature, "top_p": top_p})
        return np.bincount([draw(scores, generator) for _ in range(draws)], minlength=4) / draws

    # Four standard deviations of a frequency over 4,000 draws: 4 * sqrt(0.25 / 4000) = 0.032.
    np.testing.assert_allclose(frequencies(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.032)
    np.testing.assert_allclose(frequencies(1.0, 0.79), [0.625, 0.375, 0, 0], atol=0.032)
    np.testing.assert_allclose(frequencies(1.0, 0.4), [1, 0, 0, 0], atol=0)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(frequencies(0.5, 1.0), squared / squared.sum(), atol=0.032)


MESSAGES = [{"role": "user", "content": "Hi <b> & 'you'"}]


def test_chat_template_is_applied_without_html_escapes(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(MESSAGES)
    assert prompt == "<|start|>user\nHi <b> & 'you'<|end|>\n<|start|>assistant\n"
    engine = Script([END])
    generate(engine, tokenizer, MESSAGES)
    assert engine.prompts == [tokenizer.encode(prompt)]
    assert engine.prompts[0][0] == 256, "<|start|> must be one special token"


def write(folder: Path, source: Path, template: Any) -> Tokenizer:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = {} if template is None else {"chat_template": template, "bos_token": {"content": "<s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0] | tojson }}", '<s>{"role": "user", "content": "Hi <b> & \'you\'"}'),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ([{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        ("{% for m in messages %}{% if true %}{% break %}{% endif %}{% endfor %}done", "done"),
        ("a\n{% if true %}\nb\n{% endif %}\n", "a\nb\n"),
    ],
)
def test_template_dialects_of_transformers(
    template: Any, text: str, tmp_path: Path, toy_bundles: dict[str, Path]
) -> None:
    assert write(tmp_path / "model", toy_bundles["concat"], template).apply_chat_template(MESSAGES) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only system first') }}", "only system first"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ namespace(_x=1) }}", "private name"),
        ("{{ 1 // 0 }}", "refuses these messages"),
        ("{{ none.x.y }}", "refuses these messages"),
        ([{"name": "rag", "template": "a"}, {"name": "tool", "template": "b"}], "templates rag, tool and no default"),
        ([{"template": "a"}], "chat_template is damaged"),
        (None, "no chat template"),
    ],
)
def test_templates_cannot_leave_the_sandbox(
    template: Any, message: str, tmp_path: Path, toy_bundles: dict[str, Path]
) -> None:
    with pytest.raises(MoEdgeError, match=message):
        write(tmp_path / "model", toy_bundles["concat"], template).apply_chat_template(MESSAGES)


def test_broken_tokenizer_files_are_one_sentence(tmp_path: Path, toy_bundles: dict[str, Path]) -> None:
    with pytest.raises(MoEdgeError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    with pytest.raises(MoEdgeError, match="cannot be parsed"):
        write(tmp_path / "model", toy_bundles["concat"], "{% if %}").apply_chat_template(MESSAGES)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MoEdgeError, match="cannot be read"):
        Tokenizer(tmp_path)
