"""Writes chat_cases.json: small templates of our own and what transformers makes of them.

Each uses what the templates of a published family use; together they cover the dialect that src/tokenizer/chat.rs stands for.
Run with transformers and jinja2 installed: python3 tests/chat_templates/chat_cases.py
"""

import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ASK = [{"role": "user", "content": "Hi <b>& 'you'</b>"}]
TALK = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
    {"role": "user", "content": "three\n"},
]
CALLS = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"function": {"name": "add", "arguments": {"b": 2, "a": [1, 2.5, None, True], "t": "é<\"\n"}}}]},
    {"role": "tool", "content": "3", "tool_call_id": "x"},
    {"role": "tool", "content": "4"},
]

CASES = {
    "marks around each message, a default system message": ([ASK, TALK], {}, """
{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|start|>system\\nBe kind.<|end|>\\n' }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}
"""),
    "blocks on lines of their own are trimmed": ([TALK], {}, """{{ bos_token }}
{% for message in messages %}
  {% if message.role == 'user' %}
[{{ message.content | trim }}]
  {% elif message.role == 'assistant' %}
  ({{ message.content.split('</think>')[-1].lstrip('\\n') }}){{ eos_token }}
  {% else %}
{# a comment #}
  {{ message['content'] }}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
> {% endif %}
"""),
    "the last question is found from the end": ([TALK, ASK, CALLS], {}, """
{%- set ns = namespace(open=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == "user" and message.content is string and not (message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.open = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- set thought = '' %}
    {%- if message.reasoning_content is string %}
        {%- set thought = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- loop.index0 ~ ':' ~ message.role ~ '/' ~ thought.strip('\\n') ~ '/' ~ content }}
    {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}{{- '!' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
"""),
    "an argument of the request": ([ASK], {"enable_thinking": False, "level": "high"}, """
{%- if enable_thinking is defined and enable_thinking is false %}{{- 'quick ' }}{%- endif %}
{{- level | default('low') }} {{ missing | default('none') }} {{ missing is none }} {{ tools is none }} {{ not tools }}
"""),
    "tool calls as JSON": ([CALLS], {}, """
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function else call %}
            {{- '<call>{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</call>\\n' + (call | tojson(indent=2)) + '\\n' }}
            {{- call.arguments | tojson(ensure_ascii=True, separators=(',', ':')) }}
            {%- for name, value in call.arguments.items() %}{{ ' ' + name + '=' }}{{ value if value is string else value | tojson }}{%- endfor %}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '\\n<results>' }}{%- endif %}
        {{- '(' + message.content + ')' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '</results>' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{{- [] | tojson }}{{ {} | tojson(indent=2) }}{{ "<&'>" | tojson }}
"""),
    "an offset, a slice and a macro": ([TALK, ASK], {}, """
{%- macro turn(role, text) -%}
<|h|>{{ role }}<|/h|>

{{ text | trim }}<|e|>
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- bos_token }}{{- turn('system', system_message) }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- turn(message.role, message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|h|>assistant<|/h|>\\n\\n' }}{%- endif %}
"""),
    "break, continue and generation marks": ([TALK], {}, """
{%- for message in messages -%}
    {%- if message.role == 'system' %}{% continue %}{% endif -%}
    {%- generation -%} {{ message.content | upper }} {%- endgeneration -%}
    {% generation %}
<{{ message.content.title() }}>
    {% endgeneration %}
    {%- if message.role == 'assistant' %}{% break %}{% endif -%}
{%- endfor %}
"""),
    "constants and tests": ([ASK], {}, """{{ true }} {{ none }} {{ false }} {{ 1.0 }} {{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 3 }}
{{ messages is iterable }} {{ messages[0] is mapping }} {{ messages[0].content is string }} {{ 'x' in messages[0] }}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ 'a,b'.replace(',', ';') }} {{ ' x '.strip() }}| {{ 'abc'[1:] }} {{ 'abc'[::-1] }} {{ 'abc'[-1] }} {{ ('a', 'b')[1] }}
{{ {'a': 1}.get('b', 'none') }} {{ {'a': 1}['a'] }} {{ 'yes' if messages[0].get('name') else 'no' }} {{ messages[0].name is defined }}
"""),
}


def main():
    cases = []
    for name, (conversations, arguments, template) in CASES.items():
        for messages in conversations:
            (text,), _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=True, **SPECIAL, **arguments)
            cases.append({"name": name, "template": template, "messages": messages, "arguments": arguments,
                          "expected": text})
    path = pathlib.Path(__file__).with_name("chat_cases.json")
    path.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


main()
