"""The prompt of a chat is the one that transformers makes, for templates that ask for all that it binds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moedge import MoEdgeError
from moedge.convert import sources
from moedge.convert.sources import tokenizer_files
from moedge.runtime.text import chat_template
from moedge.runtime.text.tokenizer import Tokenizer, open_tokenizer

# Written in the manner of the families that their names tell; what they ask for is what those ask for.
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe useful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + "
    "message['content'] %}{% else %}{% set text = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}",
    "llama 3.1": "{{- bos_token }}\n{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}\n"
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}\n{%- if not tools is defined %}{%- set tools = none %}{%- endif %}\n"
    "{{- '<|start|>system\n\nToday Date: ' + date_string + '\n\n' }}{%- if tools is not none %}{%- for t in tools %}"
    "{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}{%- for message in messages %}"
    "{%- if not (message.role == 'ipython' or 'tool_calls' in message) %}"
    "{{- '<|start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\n\n' }}{%- endif %}",
    "mistral": "{%- set loop_messages = messages %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- set user_messages = loop_messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}"
    "{%- set ns = namespace() %}{%- set ns.index = 0 %}{%- for message in loop_messages %}"
    "{%- if not (message.role == 'tool' or (message.tool_calls is defined and message.tool_calls is not none)) %}"
    "{%- set ns.index = ns.index + 1 %}{%- endif %}{%- if message['role'] == 'user' %}"
    "{%- if tools is not none and (message == user_messages[-1]) %}{{- '[TOOLS]' + tools|tojson }}{%- endif %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- else %}{{- ' ' + message['content'] + eos_token }}"
    "{%- endif %}"
    "{%- endfor %}{{ ns.index }}",
    "qwen 2.5": "{%- if tools %}{{- '# Tools' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
    "{%- elif messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{%- endif %}"
    + CHATML,
    "qwen 3": "{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step_tool and message.role == 'user' and "
    "not (message.content.startswith('<r>') and message.content.endswith('</r>')) %}"
    "{%- set ns.multi_step_tool = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set reasoning_content = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}"
    "{%- elif '</think>' in message.content %}"
    "{%- set reasoning_content = message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- endif %}{{- '<think>' + reasoning_content.strip('\n') + '</think>' }}{%- endif %}"
    "{{- message.role + message.content }}{%- endfor %}{{- ns.last }}{%- if add_generation_prompt %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}"
    "{%- endif %}",
    "gemma 2": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "phi 3": "{% for message in messages %}{% if message['role'] in ['system', 'user'] and message['content'] %}"
    "{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "everything": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ cls_token is defined }}|"
    "{{ tools is none }}|{{ documents is none }}|{{ tools | tojson }}|{{ messages | tojson }}|"
    "{{ messages[0] | tojson(true, 2) }}|{{ dict(b=1, a='é<') | tojson(sort_keys=true, separators=(',', ':')) }}|"
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% continue %}no{% endfor %}|"
    "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}|{{ x is defined }}|"
    "{{ tool_calls is defined }}|{{ messages[-1].thinking }}|{{ dict.fromkeys('ab') }}",
    "blocks": "a\n  {% if true %}\n  b\n  {% endif %}\r\nc\n{# no #}\n{%+ if true %}d{% endif +%}\n\n",
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello"}],
    "html": [{"role": "user", "content": " <b> & 'you' \"é\" \n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "tool_calls": None, "reasoning": "so it is"},
        {"role": "user", "content": "Sure?"},
    ],
}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<unk>"}


def parent(folder: Path, tiny_tokenizer: Any, template: Any = None, **files: str) -> Path:
    """A model's folder, as a hub repository has it."""
    folder.mkdir()
    tiny_tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, text in files.items():
        path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def prompts(folder: Path, chat: list[dict[str, Any]], generation: bool) -> tuple[str, str]:
    """(transformers' prompt from the parent, ours from what a checkpoint holds), each or what refuses it."""
    try:
        wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=generation
        )
    except Exception as error:  # whatever a template raises
        wanted = f"refused: {error}"
    written = folder.with_name("written")
    written.mkdir(exist_ok=True)
    tokenizer_files.save(tokenizer_files.load(folder), written)
    found = []
    for one in (folder, written):
        try:
            found.append(Tokenizer(one).apply_chat_template(chat, add_generation_prompt=generation))
        except MoEdgeError as error:
            found.append("refused: " + str(error).partition("refuses these messages: ")[2])
    assert found[0] == found[1], "writing changes nothing"
    return wanted, found[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_that_of_transformers(name: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = parent(tmp_path / "model", tiny_tokenizer, TEMPLATES[name])
    refused = 0
    for chat in CHATS.values():
        for generation in (True, False):
            wanted, ours = prompts(folder, chat, generation)
            assert ours == wanted
            refused += ours.startswith("refused")
    assert refused < 2 * len(CHATS), "some prompts were compared"
    assert refused == (2 if name == "gemma 2" else 0)


@pytest.mark.parametrize(
    ("template", "files", "wanted"),
    [
        ("config", {"default": "file"}, "file"),
        ([{"name": "default", "template": "config"}, {"name": "tool_use", "template": "no"}], {}, "config"),
        ("config", {"default": "file", "tool_use": "no"}, "file"),
        ([{"name": "default", "template": "config"}], {"default": "file", "rag": "no"}, "file"),
    ],
)
def test_of_several_templates_the_default_is_taken(
    template: Any, files: dict[str, str], wanted: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    folder = parent(tmp_path / "model", tiny_tokenizer, template, **files)
    assert prompts(folder, CHATS["one"], True) == (wanted, wanted)


def test_several_templates_without_a_default_are_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = parent(tmp_path / "model", tiny_tokenizer, None, rag="a", tool_use="b")
    with pytest.raises(MoEdgeError, match="has the chat templates rag, tool_use and no default one"):
        Tokenizer(folder).apply_chat_template(CHATS["one"])
    assert isinstance(chat_template.find(folder, {}), dict)


def test_a_chat_without_messages_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(MoEdgeError, match="at least one message"):
        Tokenizer(parent(tmp_path / "model", tiny_tokenizer, CHATML)).apply_chat_template([])


@pytest.mark.slow
@pytest.mark.network
def test_the_packaged_model_has_transformers_prompt() -> None:
    folder = sources.locate("asset:smollm2-135m-instruct")[1]
    stock, ours = AutoTokenizer.from_pretrained(folder), open_tokenizer(folder)
    for chat in CHATS.values():
        prompt = stock.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(chat) == prompt
        assert ours.encode(prompt, add_special_tokens=False) == stock(prompt, add_special_tokens=False)["input_ids"]
