"""Makes `chat/` beside it: what transformers' chat templates make of conversations.

`python tests/golden/make_chat.py`, from the root; run once, and its files are committed. README.md
says with which versions. Every template is given twice: as models ship it, which gives the ids, and
with `{% generation %}` around the answers, which gives transformers' mask of them.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "chat"
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
]
BEGIN, END = "{% generation %}", "{% endgeneration %}"

# The answer stands in «». Llama 3 ends a turn without a newline, Gemma trims and renames the role.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' %}«{{ m.content + '<|im_end|>' }}»"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% else %}«{{ ' ' + m.content.strip() + ' ' + eos_token }}»{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ bos_token if loop.first else '' }}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
        "{% if m.role == 'assistant' %}«{{ m.content | trim + '<|eot_id|>' }}»"
        "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\\n' }}"
        "{% if role == 'model' %}«{{ m.content | trim + '<end_of_turn>' }}»"
        "{% else %}{{ m.content | trim + '<end_of_turn>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
}
CONVERSATIONS = [
    [("user", "What is 6 × 7?"), ("assistant", "6 × 7 = 42.\n#### 42")],
    [
        ("user", "Grüß  mich!"),
        ("assistant", " Guten Tag \n"),
        ("user", "日本"),
        ("assistant", "ok"),
    ],
    [("user", "again"), ("assistant", "again"), ("user", "again"), ("assistant", "again\n\nagain")],
]
# Enough words for some merges; a trained newline may join what stands before or behind it.
TEXT = """system user assistant model
again

again: 6 × 7 = 42.
Guten Tag, what is this?  INST /INST
"""


def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE of 400 ids at most."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken(name, normalized=False, special=True) for name in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([TEXT] * 20, trainer)
    return made


def main() -> None:
    """Writes the tokenizer and the cases."""
    HERE.mkdir(exist_ok=True)
    backend = tokenizer()
    # Ours reads one that takes white space off the offsets, as GPT-2's and Llama 3's do. With such
    # a one, transformers drops the mask of every answer that begins with a space.
    trimming = tokenizers.Tokenizer.from_str(backend.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming.save(str(HERE / "tokenizer.json"), pretty=False)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (HERE / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    cases: list[dict[str, Any]] = []
    for name, template in TEMPLATES.items():
        shipped = template.replace("«", "").replace("»", "")
        marked = template.replace("«", BEGIN).replace("»", END)
        for turns in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in turns]
            ids = theirs.apply_chat_template(messages, chat_template=shipped)["input_ids"]
            masked = theirs.apply_chat_template(
                messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
            )
            assert masked["input_ids"] == ids
            case = {"name": name, "template": shipped, "marked": marked, "messages": messages}
            cases.append(case | {"ids": ids, "mask": masked["assistant_masks"]})
    lines = "".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases)
    (HERE / "cases.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
