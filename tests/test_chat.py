"""Prompts are what well-known chat templates make of messages; a hostile template gets one clear error.

The templates are written here after what those of the models do; expected prompts are written out by hand.
"""

import datetime
import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from xlathe.card import Card
from xlathe.chat import encode_chat, end_of_turn, render_chat
from xlathe.errors import RequestError

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string and not message.content.startswith('<tool') %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set content = said if loop.index0 < ns.last else message.content %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
ALTERNATES = "raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')"
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    f"{{{{ {ALTERNATES} }}}}{{% endif %}}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    f"{{{{ {ALTERNATES} }}}}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, system_prompt='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"  # noqa: RUF001
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}{%- endfor -%}"  # noqa: RUF001
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"  # noqa: RUF001
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def card(template: str | None) -> Card:
    return Card({}, chat_template=template, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def render(template: str, messages: Any = TURNS, **options: Any) -> str:
    return render_chat(card(template), None, messages, **options)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (
            CHATML,
            [SYSTEM, *TURNS],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nHello."
            "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            CHATML,
            [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}, TURNS[2]],
            "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (MISTRAL, TURNS, "<s>[INST]  Hi  [/INST]Hello.</s>[INST] Bye [/INST]"),
        (
            GEMMA,
            TURNS,
            "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            PHI3,
            [SYSTEM, *TURNS],
            "<|system|>\nBe brief.<|end|>\n<|user|>\n Hi <|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nBye<|end|>\n"
            "<|assistant|>\n",
        ),
        (DEEPSEEK, [SYSTEM, *TURNS], "<s>Be brief.<｜User｜> Hi <｜Assistant｜>Hello.</s><｜User｜>Bye<｜Assistant｜>"),  # noqa: RUF001
        (
            ZEPHYR,
            [SYSTEM, *TURNS],
            "<|system|>\nBe brief.</s>\n<|user|>\n Hi </s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n"
            "<|assistant|>\n",
        ),
    ],
)
def test_well_known_templates(template: str, messages: Any, expected: str) -> None:
    assert render(template, messages) == expected


def test_llama3_writes_the_date() -> None:
    before = datetime.date.today()
    found = render(LLAMA3, [SYSTEM, *TURNS])
    dates = [day.strftime("%d %b %Y") for day in (before, datetime.date.today())]
    expected = [
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date + "\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello."
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        for date in dates
    ]
    assert found in expected


def test_tools_and_no_generation_prompt() -> None:
    tool = {"type": "function", "function": {"name": "größe", "parameters": {"a": "<b>'"}}}
    found = render(CHATML, [SYSTEM, TURNS[2]], tools=[tool], add_generation_prompt=False)
    assert found == (
        f"<|im_start|>system\nBe brief.\n\n<tools>\n{json.dumps(tool, ensure_ascii=False)}\n</tools><|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (GEMMA, [SYSTEM, *TURNS], "refuses the messages: System role not supported$"),
        (MISTRAL, TURNS[1:], "refuses the messages: Conversation roles must alternate"),
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", TURNS, "more than 5000000"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TURNS, "recursion limit"),
        ("{{ 'a' * 10 ** 12 }}", TURNS, "more than 5000000 steps"),
        ("{{ messages.__class__.__mro__ }}", TURNS, "undefined value"),
        ("{{ raise_exception.__globals__.os }}", TURNS, "undefined value"),
        ("{{ strftime_now.__self__.x }}", TURNS, "undefined value"),
        ("{% include '/etc/passwd' %}", TURNS, "template not found"),
        ("{% if %}", TURNS, "syntax error"),
        ("{{ strftime_now(3) }}", TURNS, "cannot be used"),
        ("\ud800", TURNS, "cannot be used"),
        ("{{ messages }}", [], r"messages: expected a list of mappings with role and content, found \[\]"),
        ("{{ messages }}", "hello", "messages: expected a list of mappings"),
        ("{{ messages }}", [{"content": "a"}], "message 0: expected a mapping with a `role`"),
        ("{{ messages }}", [{"role": "user", "content": object()}], "messages: expected plain JSON types"),
        ("{{ messages }}", [{"role": "user", "content": float("nan")}], "messages: expected plain JSON types"),
    ],
)
def test_what_cannot_be_rendered(template: str, messages: Any, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        render(template, messages)


@pytest.mark.parametrize("without", [None, Card({}), card("")])
def test_a_model_without_a_template_says_so(without: Card | None) -> None:
    with pytest.raises(RequestError, match=r"no chat template .* `generate` continues plain text"):
        render_chat(without, None, TURNS)


def test_generation_blocks_do_nothing() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{%- endgeneration %}|{% endfor %}"
    assert render(template) == " Hi |Hello.|Bye|"


def test_named_templates_are_one(tmp_path: Any) -> None:
    from xlathe.models.formats.tokenizer import read_chat_template

    named = [{"name": "default", "template": "\n a\n"}, {"name": "tool_use", "template": "\n{{ tools[0] }}\n "}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = read_chat_template(tmp_path)
    assert template is not None
    assert (render(template), render(template, tools=["t"])) == ("\n a\n", "\nt\n ")


def test_special_tokens_are_known_by_text_or_by_id() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "<end>": 2, "x": 3}, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<end>")])
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    by_id = Card({"bos_token_id": 0, "eos_token_id": 1}, {"eos_token_id": [2, 1]}, template)
    by_text = Card({"eos_token_id": 1}, {}, template, {"bos_token": "<s>", "eos_token": "<end>"})
    for each in (by_id, by_text):
        assert render_chat(each, tokenizer, [{"role": "user", "content": " a "}]) == "<s> a <end>"
        assert encode_chat(each, tokenizer, [{"role": "user", "content": " a "}]) == [0, 1, 2]
        assert end_of_turn(each, tokenizer) == (2,)
    assert end_of_turn(None, tokenizer) == end_of_turn(Card({}), tokenizer) == ()
