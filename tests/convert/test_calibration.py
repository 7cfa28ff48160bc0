from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moedge import MoEdgeError
from moedge.convert import adapters, calibration, scoring, streaming
from moedge.convert.train import finetune, training
from moedge.convert.train.settings import TrainSettings
from moedge.runtime.text.tokenizer import open_tokenizer
from moedge.runtime.text.windows import as_transformers

WIKI = '<doc id="{0}" url="u" title="t">\nTitle {0}\n\nBody {0}.\n\n</doc>\n'


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.utf8"
    path.write_text("".join(WIKI.format(i) for i in (7, 10, 13, 20, 21)), encoding="utf-8")
    return path


def test_doc_files_split_at_their_tags(wiki: Path) -> None:
    text = calibration.read_text(str(wiki))
    assert [document.id for document in text.documents] == ["7", "10", "13", "20", "21"]
    assert text.documents[0].text == "Title 7\n\nBody 7."
    assert text.sha256 == hashlib.sha256(wiki.read_bytes()).hexdigest()


def test_lines_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "id": "q"}\n{"text": "y"}\n', encoding="utf-8")
    lines = calibration.read_text(str(tmp_path / "a.txt")).documents
    assert lines == [calibration.Document("0", "one"), calibration.Document("2", "two")]
    entries = calibration.read_text(str(tmp_path / "b.jsonl")).documents
    assert entries == [calibration.Document("q", "x"), calibration.Document("1", "y")]


@pytest.fixture
def tokenizer_with_bos(tiny_tokenizer: Any, tmp_path: Path) -> Any:
    """The tiny tokenizer, but it starts every text with ``<s>`` = 256, as those of Llama and Gemma do."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tiny_tokenizer.save_pretrained(tmp_path / "with-bos")
    found = AutoTokenizer.from_pretrained(tmp_path / "with-bos")
    template = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 256)])
    found.backend_tokenizer.post_processor = template
    found.save_pretrained(tmp_path / "with-bos")
    return AutoTokenizer.from_pretrained(tmp_path / "with-bos")


@pytest.mark.parametrize("runtime", [False, True], ids=["transformers", "runtime"])
@pytest.mark.parametrize(
    ("asked", "adds", "expected"), [(None, False, False), (None, True, True), (True, False, True), (False, True, False)]
)
def test_windows_start_with_bos_where_the_tokenizer_does(
    asked: bool | None, adds: bool, expected: bool, runtime: bool, tiny_tokenizer: Any, tokenizer_with_bos: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A tokenizer that names BOS and never adds it (Qwen in GGUF) belongs to a model that was trained without."""
    tokenizer = tokenizer_with_bos if adds else tiny_tokenizer
    if runtime:
        tokenizer.save_pretrained(tmp_path / "files")
        tokenizer = as_transformers(open_tokenizer(tmp_path / "files"))
    assert tokenizer.bos_token_id == 256
    text = calibration.TextSet("t", [calibration.Document("0", "abcdefgh")], "")
    first = tiny_tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]
    assert len(first) == 8
    windows = calibration.windows(tokenizer, text, 4, 2, bos=asked, name="test")
    wanted = [[256, *first[:3]], [256, *first[3:6]]] if expected else [first[:4], first[4:]]
    assert windows.tolist() == wanted
    if asked is None and not runtime:
        trained = finetune.all_windows(tokenizer, text, 4)  # 8 characters and the newline
        assert trained[:2].tolist() == wanted
        assert len(trained) == (3 if expected else 2)


def test_without_a_bos_token_no_window_starts_with_it(tiny_tokenizer: Any) -> None:
    class Without:
        bos_token_id = None

        def __call__(self, text: str, **options: Any) -> Any:
            return tiny_tokenizer(text, **options)

    text = calibration.TextSet("t", [calibration.Document("0", "abcdefgh")], "")
    assert calibration.windows(Without(), text, 4, 2, bos=None, name="test").shape == (2, 4)  # type: ignore[arg-type]
    with pytest.raises(MoEdgeError, match="no BOS token; take bos: true away for the test text"):
        calibration.windows(Without(), text, 4, 2, bos=True, name="test")  # type: ignore[arg-type]


INSIDE = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
"""Where str.splitlines splits, and neither JSON Lines nor a text file does."""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_newlines_only(end: str, mark: bytes, tmp_path: Path) -> None:
    texts = ["one", f"a{INSIDE}b", "last"]
    (tmp_path / "a.txt").write_bytes(mark + (end.join(texts) + end).encode())
    documents = [calibration.Document(str(number), text) for number, text in enumerate(texts)]
    assert calibration.read_text(str(tmp_path / "a.txt")).documents == documents
    if end == "\r":
        return  # no end of a line in JSON Lines
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes(mark + (end.join(lines) + end).encode())
    assert calibration.read_text(str(tmp_path / "a.jsonl")).documents == documents


def test_split_holds_out_whole_documents_by_id(wiki: Path) -> None:
    kept, held = calibration.split(calibration.read_text(str(wiki)))
    assert [document.id for document in held.documents] == ["10", "20"]
    assert [document.id for document in kept.documents] == ["7", "13", "21"]


def test_split_counts_positions_when_ids_are_words(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(f'{{"text": "t{i}", "id": "w{i}"}}\n' for i in range(12)), encoding="utf-8")
    assert [document.id for document in calibration.split(calibration.read_text(str(path)), 5)[1].documents] == [
        "w0",
        "w5",
        "w10",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "Cannot read the text file"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), r"not UTF-8 \(byte 3\)"),
        ("bad.jsonl", b'{"text": "x"}\nnope\n', "line 2 is not a JSON object"),
        ("list.jsonl", b'["x"]\n', "line 1 is not a JSON object"),
        ("empty.txt", b"\n\n", "holds no text"),
        ("null.jsonl", b'{"text": "x"}\n{"text": null}\n', 'line 2: "text" is null, not a string'),
        ("parts.jsonl", b'{"text": ["a", "b"]}\n', r'line 1: "text" is \["a", "b"\], not a string'),
        ("half.jsonl", b'{"text": "a \\ud83d b"}\n', "line 1: .* half of a character"),
        ("utf16.txt", "text".encode("utf-16"), "not UTF-8"),
    ],
)
def test_bad_text_is_one_sentence(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MoEdgeError, match=message):
        calibration.read_text(str(tmp_path / name))


def test_windows_concatenate_documents_behind_a_bos(tiny_tokenizer: Any, wiki: Path) -> None:
    text = calibration.read_text(str(wiki))
    ids = calibration.windows(tiny_tokenizer, text, 11, 3, bos=True, name="calibration")
    assert ids.dtype == np.int64
    assert ids[:, 0].tolist() == [tiny_tokenizer.bos_token_id] * 3
    plain = "".join(document.text + "\n" for document in text.documents)
    assert tiny_tokenizer.decode(ids[:, 1:].reshape(-1)) == plain[:30]
    assert (
        tiny_tokenizer.decode(calibration.windows(tiny_tokenizer, text, 10, 3, bos=False, name="x").reshape(-1))
        == plain[:30]
    )


def test_too_little_text_names_both_counts(tiny_tokenizer: Any, wiki: Path) -> None:
    text = calibration.read_text(str(wiki))
    found = sum(len(document.text) + 1 for document in text.documents)
    with pytest.raises(MoEdgeError, match=rf"calibration text 'wiki' has {found} tokens; 8 windows of 64 need 512"):
        calibration.windows(tiny_tokenizer, text, 64, 8, bos=False, name="calibration")


def hidden(model: Any, ids: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, h) of every FFN, computed from the block inputs by the formula."""
    inputs: list[torch.Tensor] = []
    handles = [b.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in adapters.ffns(model)]
    with torch.no_grad():
        model(torch.from_numpy(ids))
    for handle in handles:
        handle.remove()
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    blocks = adapters.ffns(model)
    return [(x, torch.nn.functional.silu(x @ b.gate.T) * (x @ b.up.T)) for x, b in zip(flat, blocks, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_statistics_equal_the_whole_matrix(
    tiny_llama: Callable[..., Any], token_windows: np.ndarray, batch_size: int
) -> None:
    model = tiny_llama()
    seen: list[tuple[int, int]] = []
    statistics = calibration.collect(
        model, token_windows, k_a=5, batch_size=batch_size, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]
    for layer, (_, h) in zip(statistics, hidden(model, token_windows), strict=True):
        assert layer.top_neurons.shape == (token_windows.size, 5)
        assert layer.top_neurons.dtype == np.uint16
        expected = np.sort(np.argsort(-np.abs(h.numpy()), axis=1)[:, :5], axis=1)
        np.testing.assert_array_equal(layer.top_neurons, expected)
        # The only difference is the matrix products' rounding for another batch shape: 1e-6 of the largest entry.
        scale = float(h.abs().max())
        np.testing.assert_allclose(layer.mean, h.numpy().mean(axis=0), atol=2e-6 * scale)
        np.testing.assert_allclose(layer.variance, h.numpy().var(axis=0), atol=2e-6 * scale**2)
    assert all(not block.module.down_proj._forward_pre_hooks for block in adapters.ffns(model))


def test_normalised_profile_marks_cosines(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    model = tiny_llama()
    raw = calibration.collect(model, token_windows, k_a=5)
    normalised = calibration.collect(model, token_windows, k_a=5, profile="normalised")
    normalise = torch.nn.functional.normalize
    for layer, plain, (x, _), block in zip(
        normalised, raw, hidden(model, token_windows), adapters.ffns(model), strict=True
    ):
        x, gate, up = (normalise(value, dim=-1) for value in (x, block.gate, block.up))
        h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        marked = np.sort(np.argsort(-np.abs(h.numpy()), axis=1)[:, :5], axis=1)
        np.testing.assert_array_equal(layer.top_neurons, marked)
        assert not np.array_equal(layer.top_neurons, plain.top_neurons)
        np.testing.assert_array_equal(layer.variance, plain.variance)


def test_hooks_go_away_when_interrupted(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    model = tiny_llama()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.collect(model, token_windows, k_a=5, progress=interrupt)
    assert all(not block.module.down_proj._forward_pre_hooks for block in adapters.ffns(model))


@pytest.mark.parametrize(
    "run",
    [
        lambda model, ids: calibration.collect(model, ids, k_a=5),
        lambda model, ids: next(streaming.walk(model, ids)),
        scoring.perplexity,
        lambda model, ids: training.train(model, ids, TrainSettings(tokens=64)),
        lambda model, ids: training.train(model, ids[:, :3], TrainSettings(tokens=64), held_out={"t": ids}),
    ],
)
def test_tokens_without_an_embedding_are_refused(
    run: Callable[..., Any], tiny_llama: Callable[..., Any], token_windows: np.ndarray
) -> None:
    model = tiny_llama()
    size = model.get_input_embeddings().num_embeddings
    ids = token_windows.copy()
    ids[1, 7] = size
    with pytest.raises(MoEdgeError, match=rf"gives token {size}, the model has embeddings for {size} tokens; take the"):
        run(model, ids)


def test_k_a_wider_than_the_ffn_is_refused(tiny_llama: Callable[..., Any], token_windows: np.ndarray) -> None:
    with pytest.raises(MoEdgeError, match="k_a=65 must be between 1 and the FFN width 64"):
        calibration.collect(tiny_llama(), token_windows, k_a=65)


def test_statistics_files_are_equal_byte_for_byte_and_reload(
    tiny_llama: Callable[..., Any], token_windows: np.ndarray, tmp_path: Path
) -> None:
    model = tiny_llama()
    for name in ("a", "b"):
        calibration.save(calibration.collect(model, token_windows, k_a=5), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    original = calibration.collect(model, token_windows, k_a=5)
    for loaded, layer in zip(calibration.load(tmp_path / "a"), original, strict=True):
        for field in ("top_neurons", "mean", "variance"):
            np.testing.assert_array_equal(getattr(loaded, field), getattr(layer, field))
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes()[:-100])
    with pytest.raises(MoEdgeError, match="damaged"):
        calibration.load(tmp_path / "a")
