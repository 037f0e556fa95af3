#!/usr/bin/env python3
"""Makes a directory of the demo model whose chat template tells the model of tools, as Qwen's and Hermes' do.

    tests/serve_model.py FROM TO

The weights are linked. Without tools the template writes what the demo model's own writes.
"""

import json
import sys
from pathlib import Path

TEMPLATE = """\
{% for message in messages %}\
{% if loop.first and (tools or message['role'] != 'system') %}\
{{ '<|im_start|>system\\n' }}\
{% if message['role'] == 'system' %}{{ message['content'] }}\
{% else %}{{ 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' }}{% endif %}\
{% if tools %}\
{{ '\\n\\nTools:' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}\
{{ '\\nCall one so: <tool_call>\\n{"name": NAME, "arguments": ARGUMENTS}\\n</tool_call>' }}\
{% endif %}\
{{ '<|im_end|>\\n' }}\
{% endif %}\
{% if not (loop.first and tools and message['role'] == 'system') %}\
{{ '<|im_start|>' + message['role'] + '\\n' }}{{ message['content'] or '' }}\
{% for call in message['tool_calls'] or [] %}\
{{ '<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' }}\
{% if call['function']['arguments'] is string %}{{ call['function']['arguments'] }}\
{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}\
{{ '}\\n</tool_call>' }}\
{% endfor %}\
{{ '<|im_end|>\\n' }}\
{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    model, made = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    made.mkdir()
    for file in model.iterdir():
        if file.name != "tokenizer_config.json":
            (made / file.name).symlink_to(file)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))


if __name__ == "__main__":
    main()
