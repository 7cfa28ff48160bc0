"""Folders with damaged companions: 300 seeded inputs, each ends in a model or in one sentence."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moedge import MoEdgeError
from moedge.convert import modeling, sources
from moedge.runtime.text.tokenizer import Tokenizer

INPUTS = 300
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456\n"
ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**12, "", "text", "99.0", [], [1, "a"], {}, {"a": None}, [[]], [None])
"""Values of every JSON type, to be put in place of others."""
COMPANIONS = {
    "dense": (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "model.safetensors.index.json",
    ),
    "moe": ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "plan.json"),
}


@pytest.fixture(scope="module")
def folders(
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    make_plan: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A dense model in two shards and a Mixture-of-Experts, both with every companion that a folder can have."""
    root = tmp_path_factory.mktemp("companions")
    model = tiny_llama(layers=1, hidden=16, width=32)
    model.save_pretrained(root / "dense", max_shard_size="10KB")
    tiny_tokenizer.save_pretrained(root / "dense")
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "single_word": False}}
    (root / "dense" / "special_tokens_map.json").write_text(json.dumps(special))
    (root / "dense" / "added_tokens.json").write_text(json.dumps({"<s>": 256, "</s>": 257}))
    plan, _ = make_plan(model)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    for kind, names in COMPANIONS.items():
        assert all((root / kind / name).is_file() for name in names)
    return root


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value inside a JSON value; of long lists and objects the first ten."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, item in list(items)[:30]:
        found += places(item, (*path, key))
    return found


def changed(value: Any, rng: random.Random) -> Any:
    """Replace, remove or add one entry somewhere in a JSON value."""
    at = rng.choice(places(value))
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    act = rng.random()
    if act < 0.7:
        parent[at[-1]] = rng.choice(ODD)
    elif act < 0.85:
        del parent[at[-1]]
    elif isinstance(parent, dict):
        parent[rng.choice(["is_causal", "quantization_config", "version", "x_of_a_newer_version"])] = rng.choice(ODD)
    return value


def damage(path: Path, rng: random.Random) -> str:
    """Damage a JSON file in one of the ways that users' files are; return which."""
    text = path.read_text(encoding="utf-8")
    way = rng.choice(["truncated", "pointer", "odd", "bytes", "empty", *["changed"] * 7])
    if way == "truncated":
        path.write_text(text[: rng.randrange(len(text))], encoding="utf-8")
    elif way == "pointer":
        path.write_text(POINTER)
    elif way == "odd":
        path.write_text(json.dumps(rng.choice(ODD)))
    elif way == "bytes":
        path.write_bytes(b"\xff\xfe" + text.encode()[:100])
    elif way == "empty":
        path.write_text("")
    else:
        path.write_text(json.dumps(changed(json.loads(text), rng)), encoding="utf-8")
    return way


def open_all(folder: Path, kind: str) -> str:
    """Open a folder by every way there is; return what was refused, a sentence a line."""
    ways: list[Callable[[], Any]] = [lambda: Tokenizer(folder), lambda: sources.load_tokenizer(folder)]
    if kind == "dense":
        ways += [lambda: sources.load_model(sources.resolve(str(folder)).folder)]
    else:
        ways += [lambda: modeling.load(folder)]
    said = []
    for way in ways:
        try:
            way()
        except MoEdgeError as error:
            said.append(str(error))
    return "\n".join(said)


def test_no_damaged_companion_ends_in_a_traceback(folders: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    refused, failures = 0, []
    for number in range(INPUTS):
        kind = rng.choice(["dense", "dense", "moe"])
        name = rng.choice(COMPANIONS[kind])
        folder = tmp_path / f"{number}"
        shutil.copytree(folders / kind, folder)
        way = damage(folder / name, rng)
        try:
            said = open_all(folder, kind)
        except BaseException as error:
            failures.append(f"{kind} {name} {way}: {type(error).__name__}: {error}")
            continue
        refused += bool(said)
        for sentence in said.splitlines():
            if str(folder) not in sentence or ".partial" in sentence:
                failures.append(f"{kind} {name} {way} does not name the folder: {sentence}")
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
    assert refused > INPUTS / 4  # it does damage


@pytest.mark.parametrize("name", COMPANIONS["dense"])
def test_a_git_lfs_pointer_is_named_with_the_command_that_gets_the_file(
    name: str, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "dense", tmp_path / "model")
    (tmp_path / "model" / name).write_text(POINTER)
    with pytest.raises(MoEdgeError, match=rf"model/{name} is a Git LFS pointer.*run `git lfs pull`"):
        sources.resolve(str(tmp_path / "model"))
