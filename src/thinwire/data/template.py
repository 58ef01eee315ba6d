"""A tokenizer's own chat template: messages, and whatever else it reads, to text."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.data.tokenizer import CONFIG
from thinwire.errors import DataError

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the prompt for an answer follows) -> text."""
LISTS = ("tools", "documents")
"""What a template may read beside messages, each a list of objects."""
_SETTINGS = "chat_template_kwargs"
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_GIVEN = frozenset((
    "messages", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now",
    "range", "dict", "namespace", "lipsum", "cycler", "joiner",
))  # fmt: skip
_MORE = "additional_chat_templates"


@dataclass(frozen=True)
class Template:
    """The template of a tokenizer that transformers has loaded."""

    library: Any
    reads: frozenset[str]
    """Names of what it takes besides messages."""

    @property
    def fields(self) -> frozenset[str]:
        """What of a row `inputs` and `unread` look at."""
        return self.reads | {_SETTINGS, *LISTS}

    def inputs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What of a row the template is given besides messages: fields that it reads, and `chat_template_kwargs`.

        Raises ValueError for tools or documents that are no lists of objects.
        """
        settings = row.get(_SETTINGS) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{_SETTINGS} is {type(settings).__name__}, not an object")
        given = {key: value for key, value in row.items() if key in self.reads and value is not None}
        return {**given, **settings, **{key: listed(row, key) for key in LISTS if row.get(key)}}

    def unread(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has tools or documents that the template takes no notice of."""
        return any(row.get(key) and key not in self.reads for key in LISTS)

    def render(self, inputs: Mapping[str, Any]) -> Render:
        """With what a row gives besides messages. Raises whatever the template's author chose."""

        def render(messages: Sequence[Message], prompt: bool) -> str:
            rendered = self.library.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **inputs
            )
            return str(rendered)

        return render

    def after_answer(self) -> str:
        """What it writes after a last answer; nothing if it cannot be told."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\ue000"}]
        try:
            return self.render({})(talk, False).partition("\ue000")[2]
        except Exception:  # its author wants other messages
            return ""

    @property
    def end(self) -> str | None:
        """The tokenizer's own end of text."""
        return self.library.eos_token  # type: ignore[no-any-return]


def listed(row: Mapping[str, Any], key: str) -> list[Any]:
    """The objects of `row[key]`, which some data sets keep as JSON text. Raises ValueError."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{key!r} is text that is not JSON: {value[:60]}") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{key!r} is not a list of objects: {str(value)[:60]}")
    return value


def template_of(folder: Path) -> Template:
    """The chat template of the tokenizer in `folder`. Raises DataError if it has none, or transformers is missing."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise DataError("chat templates need the transformers library; pip install 'thinwire[hf]'") from None
    try:
        library: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{folder} holds no tokenizer that transformers reads: {one_line(error)}") from None
    if not library.chat_template:
        raise DataError(
            f"the tokenizer in {folder} has no chat template; take that of an instruction-tuned model, or put a "
            f"chat_template.jinja into the folder"
        )
    chosen = library.chat_template
    known = frozenset(library.special_tokens_map) | _GIVEN
    texts = chosen.values() if isinstance(chosen, dict) else [chosen]
    return Template(library, frozenset(name for text in texts for name in _names(text, folder)) - known)


def _names(template: str, folder: Path) -> set[str]:
    """What a template reads and does not set itself."""
    import jinja2
    from jinja2 import meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # it is only parsed
    try:
        return meta.find_undeclared_variables(environment.parse(_GENERATION_TAG.sub("", template)))
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template in {folder} is not one of Jinja: {one_line(error)}") from None


def complete_template(source: Path, target: Path, template: Template) -> None:
    """All that `template_of(target)` needs besides what `FileTokenizer.save` has put there: prompts are written from it."""
    if (source / _MORE).is_dir():
        shutil.copytree(source / _MORE, target / _MORE)
    config = target / CONFIG
    tree = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    tree.setdefault("tokenizer_class", type(template.library).__name__)
    config.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
