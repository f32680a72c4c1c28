"""Chat templates: against HF transformers' renderer, on the shapes that real models have, and hostile ones."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.chat import ChatTemplate, MessagesRefusedError
from pipeline.config import ApplyConfig
from pipeline.corpus.documents import Document, ReadReport
from pipeline.corpus.windows import windows
from pipeline.llama.model import Model
from pipeline.stages.apply import tokens_of
from sae.errors import ConfigError
from tests.tiny_llama import BOS, BOS_ID, CHAT_TEMPLATE, write_tiny_llama

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set date = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date + "\\n\\n<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "system" %}
        {%- continue %}
    {%- elif message["role"] == "user" %}
        {%- set ns.index = ns.index + 1 %}
        {{- "[INST] " + message["content"] + "[/INST]" + ns.index|string }}
    {%- else %}
        {% generation %}
        {{- " " + message["content"] + eos_token + ({"said": "<a>"}|tojson) }}
        {% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "gemma": GEMMA, "llama-3": LLAMA_3, "mistral": MISTRAL}
USER, ASSISTANT = {"role": "user", "content": " größe & <b> "}, {"role": "assistant", "content": "it's 'fine'\n"}
SYSTEM = {"role": "system", "content": "Be brief."}


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, name="m.gguf", bos="<s>", eos="</s>")


@pytest.mark.parametrize("add_assistant", [True, False])
@pytest.mark.parametrize("messages", [[USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT]], ids=len)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_what_hf_transformers_renders(name, messages, add_assistant):
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"chat_template": TEMPLATES[name], "bos_token": "<s>", "eos_token": "</s>"}
    if name == "gemma" and SYSTEM in messages:
        with pytest.raises(MessagesRefusedError, match=r"m\.gguf refuses the messages \(System role not supported\)"):
            template(GEMMA).render(messages)
        return
    (expected,), _ = render_jinja_template([messages], add_generation_prompt=add_assistant, **options)
    assert template(TEMPLATES[name]).render(messages, add_assistant=add_assistant) == expected


def test_a_default_system_prompt_is_written():
    assert template(CHATML).render([USER]).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}", r"end of template.* \(line 1\)"),
        ("{{ bos_tokne + messages[0].content }}", "'bos_tokne' is undefined"),
        ("{{ messages[0]['content'].absent.x }}", "has no attribute 'absent'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ strftime_now(3) }}", "str"),
        ("{{ messages | tojson(sort_keys=1, indent='x', separators=3) }}", "cannot unpack"),
        ("{{ 'x' * 10 ** 12 }}", r"`\*` makes more than"),
        ("{{ 7 ** 1000000000 }}", r"`\*\*` makes more than"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "more than 1048576 steps"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_line(text, reason):
    with pytest.raises(ConfigError, match=rf"the chat template of m\.gguf cannot be used: .*(?:{reason})") as caught:
        template(text).render([USER])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokenizer adds a BOS, with a template that writes one itself and wants the roles to alternate."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder / "plain.gguf", blocks=1, chat_markers=True)
    old = CHAT_TEMPLATE.encode()
    new = b"{{bos_token}}{%if messages[0].role=='bot'%}{{raise_exception('no bots')}}{%endif%}{{messages[0].content}}"
    data = (folder / "plain.gguf").read_bytes()
    (folder / "chat.gguf").write_bytes(data.replace(old, new + b"{#" + b" " * (len(old) - len(new) - 4) + b"#}"))
    with Model(folder / "chat.gguf") as opened:
        yield opened


def test_a_bos_of_the_template_does_not_come_twice(model):
    assert model.chat([{"role": "user", "content": "hi"}]) == f"{BOS}hi"
    tokens = tokens_of(model, ApplyConfig(prompt="hi", chat=True))
    assert (tokens == BOS_ID).sum() == 1
    assert tokens[0] == BOS_ID
    (document,) = [Document(name="c", messages=({"role": "user", "content": "hi"},))]
    table = windows(model, [document], 16)
    np.testing.assert_array_equal(table.token_N, tokens)


def test_messages_that_the_template_refuses_are_left_out_and_counted(model):
    found = [Document(name=role, messages=({"role": role, "content": "hi"},)) for role in ("user", "bot")]
    report = ReadReport()
    table = windows(model, found, 16, report=report)
    assert [document.name for document in table.documents] == ["user"]
    assert report.skipped == [("bot", "the chat template of chat.gguf refuses the messages (no bots)")]
