"""One tokenizer: a model's folder, its Mixture-of-Experts and all bundles give the ids and texts of AutoTokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from moedge import MoEdgeError
from moedge.convert import modeling, sources  # noqa: F401  modeling registers moedge_llama
from moedge.convert.sources import tokenizer_files
from moedge.export import bundle
from moedge.runtime.text import tokenizer as runtime

SPECIAL = ("<s>", "</s>", "<|im_start|>")
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def model_folder(folder: Path, model_type: str, **tokenizer_config: Any) -> Path:
    folder.mkdir()
    write(folder / "config.json", {"model_type": model_type})
    write(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def byte_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's alphabet and a few merges, one of them over a space."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("i", "n"), ("1", "2")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate(tokens)}, merges


def byte_level() -> Tokenizer:
    vocabulary, merges = byte_vocabulary()
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def specials(first: int) -> dict[str, Any]:
    """``added_tokens_decoder`` of tokenizer_config.json: a special token that takes the space before it, and others."""
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    return {
        str(first + number): {"content": token, "lstrip": token.startswith("<|"), **flags}
        for number, token in enumerate(SPECIAL)
    }


def whole(folder: Path) -> Path:
    made = byte_level()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.enable_truncation(5)  # as training left it
    made.enable_padding(length=3, pad_token="</s>")
    model_folder(folder, "llama", tokenizer_class="PreTrainedTokenizerFast", **NAMED)
    made.save(str(folder / "tokenizer.json"))
    return folder


def split_specials(folder: Path) -> Path:
    whole(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    write(folder / "tokenizer_config.json", config)
    return folder


def config_only(folder: Path) -> Path:
    made = byte_level()
    made.save(str(model_folder(folder, "llama") / "tokenizer.json"))
    first = made.get_vocab_size()
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": specials(first), **NAMED},
    )
    return folder


def two_files(folder: Path, model_type: str, kind: str) -> Path:
    vocabulary, merges = byte_vocabulary()
    model_folder(
        folder, model_type, tokenizer_class=kind, added_tokens_decoder=specials(len(vocabulary)), eos_token="</s>"
    )
    write(folder / "vocab.json", vocabulary)
    write(folder / "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return folder


def older_files(folder: Path) -> Path:
    """As transformers 4.30 and before wrote them: added tokens and their roles in files of their own."""
    two_files(folder, "llama", "GPT2Tokenizer")
    count = len(byte_vocabulary()[0])
    write(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    write(folder / "added_tokens.json", {token: count + number for number, token in enumerate((*SPECIAL, "<tool>"))})
    write(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}})
    return folder


def llama_2(folder: Path, kind: str, model_type: str = "llama", **config: Any) -> Path:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abdeghilnrstw", "▁▁"]
    tokens += ["▁a", "▁h", "he", "▁he", "▁▁▁"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("▁", "▁"), ("▁▁", "▁"), ("▁", "a"), ("h", "e"), ("▁", "he"), ("▁", "h")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    model_folder(folder, model_type, tokenizer_class=kind, **NAMED, **config)
    made.save(str(folder / "tokenizer.json"))
    return folder


def unigram(folder: Path) -> Path:
    """A kind whose decoded text transformers tidies up."""
    pieces = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.,!?'", "▁the", "n't", "▁'s"]
    made = Tokenizer(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    model_folder(folder, "llama", tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=True, **NAMED)
    made.save(str(folder / "tokenizer.json"))
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json": whole,
    "split_special_tokens": split_specials,
    "specials in tokenizer_config.json": config_only,
    "vocab.json and merges.txt, qwen2": lambda folder: two_files(folder, "qwen2", "Qwen2Tokenizer"),
    "vocab.json and merges.txt, gpt2": lambda folder: two_files(folder, "llama", "GPT2Tokenizer"),
    "added_tokens.json": older_files,
    "llama 2, LlamaTokenizerFast": lambda folder: llama_2(folder, "LlamaTokenizerFast", legacy=True),
    "llama 2, LlamaTokenizer": lambda folder: llama_2(folder, "LlamaTokenizer", legacy=False, add_eos_token=True),
    "llama 2, PreTrainedTokenizerFast": lambda folder: llama_2(folder, "PreTrainedTokenizerFast"),
    "llama 2 without prefix": lambda folder: llama_2(folder, "LlamaTokenizer", add_prefix_space=False, legacy=False),
    "mistral": lambda folder: llama_2(folder, "LlamaTokenizerFast", "mistral"),
    "gemma 2": lambda folder: llama_2(folder, "GemmaTokenizer", "gemma2"),
    "phi 3": lambda folder: llama_2(folder, "LlamaTokenizer", "phi3"),
    "unigram": unigram,
}

PARTS = (
    *(*SPECIAL, "<unk>", "<tool>", " ", "  ", "   ", "\n", "\r\n", "\t", "the", " the", "he", "he ", " a", "12", " ."),
    *(" n't", " ' ", "e\u0301", "\u0e44\u0e17", "\U0001f642\u200d\u2642\ufe0f", "\u2028", "\u0085", "\ufffd"),
)
CHARACTERS = st.one_of(st.sampled_from(PARTS), st.characters(exclude_categories=("Cs",)))
TEXTS = st.lists(CHARACTERS, max_size=12).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def tokenizers_of_one_parent(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """AutoTokenizer on the parent, and what the product opens in every folder that comes of it."""
    root = tmp_path_factory.mktemp("one")
    parent = KINDS[request.param](root / "parent")
    checkpoint = root / "checkpoint"
    checkpoint.mkdir()
    family = json.loads((parent / "config.json").read_text())["model_type"]
    write(checkpoint / "config.json", {"model_type": f"moedge_{family}"})
    tokenizer_files.save(sources.load_tokenizer(parent), checkpoint)
    folders = {"parent": parent, "checkpoint": checkpoint}
    for kind, source in list(folders.items()):
        portable, lowered = root / f"{kind}-portable", root / f"{kind}-lowered"
        portable.mkdir()
        lowered.mkdir()
        bundle.write_companions(source, portable)
        bundle.copy_companions(portable, lowered)
        folders |= {f"{kind}'s bundle": lowered}
    found: dict[str, Any] = {name: runtime.open_tokenizer(folder) for name, folder in folders.items()}
    found |= {f"{name}, by AutoTokenizer": AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    return AutoTokenizer.from_pretrained(parent), found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example(text="")
@example(text="  he</s>he <s>a</s>  <|im_start|>the")
def test_every_folder_of_a_model_gives_the_ids_and_text_of_autotokenizer_on_the_parent(
    text: str, tokenizers_of_one_parent: tuple[Any, dict[str, Any]]
) -> None:
    stock, found = tokenizers_of_one_parent
    ids, bare = stock(text)["input_ids"], stock(text, add_special_tokens=False)["input_ids"]
    shown, everything = stock.decode(ids, skip_special_tokens=True), stock.decode(ids)
    for name, tokenizer in found.items():
        if isinstance(tokenizer, runtime.Tokenizer):
            assert tokenizer.encode(text) == ids, name
            assert tokenizer.encode(text, add_special_tokens=False) == bare, name
            stream = tokenizer.stream()
            pieces = [*(stream.push(token) for token in ids), stream.finish()]
            assert "".join(pieces) == shown, name
        else:
            assert tokenizer(text)["input_ids"] == ids, name
        assert tokenizer.decode(ids, skip_special_tokens=True) == shown, name
        assert tokenizer.decode(ids, skip_special_tokens=False) == everything, name


def test_every_folder_names_the_special_tokens_of_the_parent(
    tokenizers_of_one_parent: tuple[Any, dict[str, Any]],
) -> None:
    stock, found = tokenizers_of_one_parent
    for name, tokenizer in found.items():
        assert tokenizer.eos_token_id == stock.eos_token_id, name
        if not isinstance(tokenizer, runtime.Tokenizer):
            for fact in ("special_tokens_map", "padding_side", "truncation_side", "model_max_length"):
                assert getattr(tokenizer, fact) == getattr(stock, fact), (name, fact)


def test_what_is_written_says_nothing_that_a_reader_would_apply_again(tmp_path: Path) -> None:
    """Neither what training left (truncation, padding) nor what asks a class to build the tokenizer anew."""
    tokenizer_files.save(sources.load_tokenizer(KINDS["tokenizer.json"](tmp_path / "a")), tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (written["truncation"], written["padding"]) == (None, None)
    assert [token["content"] for token in written["added_tokens"]] == [*SPECIAL, "<unk>"]
    tokenizer_files.save(sources.load_tokenizer(KINDS["llama 2, LlamaTokenizer"](tmp_path / "b")), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not {"legacy", "add_eos_token", "add_bos_token", "add_prefix_space", "name_or_path"} & set(config)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast", "transformers 4 knows this name, too"


def test_a_sentencepiece_model_becomes_tokenizer_json(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(piece, 1) for piece in ("▁the", "▁t", "he", "▁", "t", "h", "e", "a")]
    for rank, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, type=kind, score=-float(rank))
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", True
    model.normalizer_spec.remove_extra_whitespaces = False
    folder = model_folder(tmp_path / "model", "llama", tokenizer_class="LlamaTokenizer", add_bos_token=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    stock, ours = AutoTokenizer.from_pretrained(folder), runtime.open_tokenizer(folder)
    for text in ("the heat", "  the\n\u00e9", "</s>the"):
        assert ours.encode(text) == stock(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == stock.decode(stock(text)["input_ids"], skip_special_tokens=True)


def test_a_sentencepiece_model_without_its_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "model", "llama", tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.model").write_bytes(b"\n\x05")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    with pytest.raises(MoEdgeError, match=r"tokenizer\.model takes the package sentencepiece; install moedge"):
        sources.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer; copy"),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}, "merges.txt": ""}, "has no tokenizer; copy"),
        # LlamaTokenizer reads no vocab.json: transformers would give a tokenizer of <unk>, <s> and </s>.
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}, "vocab.json": {"a": 0}}, r"vocab\.json"),
        ({"tokenizer.json": '{"model": {"type": "BPE2"}}'}, r"Cannot load the tokenizer in .* from tokenizer\.json"),
        ({"tokenizer.json": '{"model": '}, r"tokenizer\.json is damaged"),
        ({"tokenizer.json": "[]"}, r"tokenizer\.json is damaged \(it holds no JSON object\)"),
        ({"vocab.json": {"a": 0}, "added_tokens.json": "nonsense"}, r"added_tokens\.json is damaged"),
        ({"tokenizer.model": "version https://git-lfs.github.com/spec/v1\n"}, r"tokenizer\.model is a Git LFS pointer"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, value in {"config.json": {"model_type": "llama"}, **files}.items():
        write(folder / name, value)
    with pytest.raises(MoEdgeError, match=message) as caught:
        sources.load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(MoEdgeError, match=message):  # never a bundle without one
        bundle.write_companions(folder, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_tokenizer_that_reads_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sources.load_tokenizer(KINDS["tokenizer.json"](tmp_path / "model"))
    saved = type(tokenizer).save_pretrained

    def lossy(self: Any, folder: Path) -> Any:
        made = saved(self, folder)
        value = json.loads((folder / "tokenizer.json").read_text())
        write(
            folder / "tokenizer.json", {**value, "pre_tokenizer": {**value["pre_tokenizer"], "add_prefix_space": True}}
        )
        return made

    monkeypatch.setattr(type(tokenizer), "save_pretrained", lossy)
    with pytest.raises(MoEdgeError, match=r"cannot be written as tokenizer\.json: read back, it gives"):
        tokenizer_files.save(tokenizer, tmp_path)


def hub_snapshot(plain: Path, root: Path) -> Path:
    """A folder of links into ``blobs``, as the hub's cache keeps a model."""
    snapshot = root / "snapshots" / "1"
    (root / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        blob, link = root / "blobs" / str(number), snapshot / file.relative_to(plain)
        blob.write_bytes(file.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def test_a_snapshot_of_the_hub_is_the_model_that_it_links_to(tmp_path: Path) -> None:
    plain = KINDS["tokenizer.json"](tmp_path / "plain")
    write(plain / "chat_template.jinja", "{{ messages[0].content }}")
    (plain / "additional_chat_templates").mkdir()
    write(plain / "additional_chat_templates" / "rag.jinja", "rag")
    write(plain / "generation_config.json", {"eos_token_id": 257})
    snapshot = hub_snapshot(plain, tmp_path / "cache")
    (tmp_path / "link").symlink_to(snapshot)
    made = []
    for number, folder in enumerate((plain, snapshot, tmp_path / "link")):
        assert sources.identity(folder) == sources.identity(plain)
        out = tmp_path / f"bundle{number}"
        out.mkdir()
        bundle.write_companions(folder, out)
        made.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
        assert not any(path.is_symlink() for path in out.rglob("*"))
    assert made[0] == made[1] == made[2]
    assert {"config.json", "generation_config.json", "chat_template.jinja"} <= {path.name for path in made[0]}
    assert Path("additional_chat_templates/rag.jinja") in made[0]
    lowered = tmp_path / "lowered"
    lowered.mkdir()
    bundle.copy_companions(tmp_path / "bundle0", lowered)
    assert {path.relative_to(lowered) for path in lowered.rglob("*") if path.is_file()} == set(made[0])


def test_a_link_whose_file_is_gone_is_named(tmp_path: Path) -> None:
    snapshot = hub_snapshot(KINDS["tokenizer.json"](tmp_path / "plain"), tmp_path / "cache")
    for blob in (tmp_path / "cache" / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(MoEdgeError, match=r"is a link to .*blobs.*, which is not there"):
        sources.resolve(str(snapshot))
    with pytest.raises(MoEdgeError, match=r"is a link to .*blobs.*, which is not there"):
        bundle.write_companions(snapshot, tmp_path)


def test_a_link_in_a_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "elsewhere.json", {})
    (tmp_path / "bundle" / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(MoEdgeError, match="is a symbolic link"):
        bundle.copy_companions(tmp_path / "bundle", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model", "tekken.json"),
        *("chat_template.jinja", "additional_chat_templates/rag.jinja"),
    ],
)
def test_another_tokenizer_is_another_source(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = sources.identity(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    after = sources.identity(tmp_path)
    (tmp_path / name).write_text("{ }")
    assert len({before, after, sources.identity(tmp_path)}) == 3
