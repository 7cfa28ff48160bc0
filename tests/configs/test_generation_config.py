"""generation_config.json is obeyed or named: the list is whole, files count as for transformers, bad ones fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import moedge
from moedge import MoEdgeError
from moedge.configs import generation_config
from moedge.configs.generation_config import SETTINGS, GenerationConfig, Use

ROOT = Path(moedge.__file__).parent


def write(folder: Path, generation: Any = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (folder / "generation_config.json").write_text(text)
    return folder


def test_every_key_that_transformers_knows_has_a_place_in_the_list() -> None:
    from transformers import GenerationConfig as Theirs

    assert set(Theirs().to_dict()) - set(SETTINGS) == set()
    defaults = Theirs._get_default_generation_params()
    wrong = {key: value for key, value in defaults.items() if not _asks_nothing(key, value)}
    assert wrong == {"max_length": 20, "do_sample": False, "top_k": generation_config.DEFAULT_TOP_K}


def _asks_nothing(key: str, value: Any) -> bool:
    return value is None or SETTINGS[key].use is Use.NOTHING or value in SETTINGS[key].neutral


def test_the_page_shows_the_list() -> None:
    assert generation_config.table() in (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


ENDS = st.sampled_from([None, ..., 3, [4], [5, 6], []])


@hypothesis_settings(max_examples=60, deadline=None)
@given(in_config=ENDS, in_file=ENDS, file=st.booleans(), nested=st.booleans())
def test_the_ends_of_text_are_those_of_transformers(
    in_config: Any, in_file: Any, file: bool, nested: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No file, a file without the key, null, one id, several: the file alone counts where there is one."""
    from transformers import GenerationConfig as Theirs

    folder = tmp_path_factory.mktemp("ends")
    ends = {} if in_config is ... else {"eos_token_id": in_config}
    generation = {"temperature": 0.6, **({} if in_file is ... else {"eos_token_id": in_file})}
    write(folder, generation if file else None, **({"text_config": ends} if nested and ends else ends))
    if file:
        theirs = Theirs.from_pretrained(folder)
    else:
        theirs = Theirs.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    wanted = theirs.eos_token_id
    found = GenerationConfig.read(folder)
    assert list(found.ends) == ([] if wanted is None else [wanted] if isinstance(wanted, int) else wanted)
    assert bool(found.notes) == (file and in_file in (None, ...) and in_config not in (None, ..., []))


def test_settings_of_an_old_config_json_count_where_there_is_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path, repetition_penalty=1.2, hidden_size=8, use_cache=True, eos_token_id=2)
    assert GenerationConfig.read(folder).settings == {"repetition_penalty": 1.2}
    assert GenerationConfig.read(write(tmp_path, {}, repetition_penalty=1.2)).settings == {}
    assert GenerationConfig.read(tmp_path / "nothing").settings == {}


def test_what_is_left_out_is_named_and_what_asks_for_nothing_is_not(tmp_path: Path) -> None:
    quiet = {
        **{"_from_model_config": True, "transformers_version": "4.30", "use_cache": False, "num_beams": 1},
        **{"cache_implementation": "hybrid", "early_stopping": True, "length_penalty": 2.0, "max_length": 20},
        **{"renormalize_logits": True, "bos_token_id": 1, "pad_token_id": 0, "do_sample": False, "temperature": 0.0},
        **{"output_scores": True, "prompt_lookup_num_tokens": 3, "guidance_scale": None, "repetition_penalty": 1.0},
    }
    assert GenerationConfig.read(write(tmp_path, quiet)).said(sampled=False) == []
    loud = {
        **{"num_beams": 4, "guidance_scale": 1.5, "cache_implementation": "quantized", "chat_format": "chatml"},
        **{"watermarking_config": {"bias": 2.0}, "penalty_alpha": 0.6},
    }
    (said,) = GenerationConfig.read(write(tmp_path, quiet | loud)).said(sampled=False)
    assert all(key in said for key in loud), said
    assert "docs/generation.md" in said


def test_sampling_that_is_asked_for_and_not_done_is_named(tmp_path: Path) -> None:
    config = GenerationConfig.read(write(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    (said,) = config.said(sampled=False)
    assert "temperature 0.6, top_p 0.9" in said
    assert "--sample" in said
    assert config.said(sampled=True) == []
    # As generate(do_sample=True) has it: its own default of top_k included, 0 for none.
    assert config.sampling({}) == {"top_k": 50, "temperature": 0.6, "top_p": 0.9}
    assert config.sampling({"temperature": 1.0, "top_k": 0, "top_p": None}) == {"top_p": 0.9}


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "does not hold a JSON object"),
        ("version https://git-lfs.github.com/spec/v1", "is not valid JSON"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number above 0"),
        ({"repetition_penalty": "1.1"}, "repetition_penalty"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"suppress_tokens": 3}, "suppress_tokens"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"sequence_bias": {"3": 1.0}}, "sequence_bias"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"exponential_decay_length_penalty": [3]}, "exponential_decay_length_penalty"),
        ({"stop_strings": [3]}, "stop_strings"),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_path(generation: Any, said: str, tmp_path: Path) -> None:
    write(tmp_path, generation)
    with pytest.raises(MoEdgeError) as error:
        GenerationConfig.read(tmp_path)
    assert said in str(error.value)
    assert str(tmp_path / "generation_config.json") in str(error.value)


@pytest.mark.parametrize("values", [{"temperature": "hot"}, {"top_p": 1.5}, {"top_k": -1}, {"temperature": 0.0}])
def test_bad_sampling_settings_are_refused_when_they_are_used(values: dict[str, Any], tmp_path: Path) -> None:
    config = GenerationConfig.read(write(tmp_path, values))
    with pytest.raises(MoEdgeError, match=rf"generation_config\.json, to sample,: {next(iter(values))} is"):
        config.sampling({})
    assert config.sampling(dict.fromkeys(values, 1))
