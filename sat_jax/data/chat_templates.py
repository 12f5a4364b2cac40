"""Built-in Jinja chat templates, for models that have none.

Each template ends an answer with a special token, so that a model learns to stop: chatml with
`<|im_end|>`, the others with the tokenizer's eos. `bos_token` is empty if the tokenizer adds none.
The text of a template is part of the fingerprint of prepared data.
"""

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Llama 2: the system prompt is part of the first instruction; each one starts with a bos.
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% set turns = messages[1:] %}"
        "{% else %}{% set system, turns = '', messages %}{% endif %}"
        "{% for message in turns %}{% if message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
        "{% elif message['role'] == 'user' %}"
        "{% set content = (system if loop.first else '') + message['content'] %}"
        "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
        "{% else %}{{ raise_exception('no place for the role ' + message['role']) }}{% endif %}"
        "{% endfor %}"
    ),
    "zephyr": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\\n\\n' }}{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    ),
    # Nothing between the texts, as trl joins prompt and completion.
    "verbatim": (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' and not message['content'].endswith(eos_token) %}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
