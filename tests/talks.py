"""Conversations for tests, and a chat template that renders them."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken

from thinwire.data.template import Message
from thinwire.data.tokenizer import train_bpe

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]
EOT = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}"
    "{% endif %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def talk(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def make_tokenizer(folder: Path, template: str, *, eos: str = EOT) -> Path:
    """A folder as INIT/hub: byte-level BPE, special tokens of several families, the template."""
    library = train_bpe(300, ["the quick brown fox jumps over the lazy dog. user assistant system\n" * 20])._library
    library.add_special_tokens(SPECIAL)
    library.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
