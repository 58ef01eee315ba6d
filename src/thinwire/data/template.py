"""A tokenizer's own chat template: messages to text, and where in it the answers are, which make the loss mask.

What a template adds for an assistant's message, beyond the prompt for it, is the answer, its end of turn included. It is
found by rendering the conversation up to the message, without and with it. Where a template writes a turn differently as
the last one (an end of text after it, its thinking dropped later), the rendered beginning is no beginning of the full
text; then marks around the message's own text say where that is, and only the end of the turn is compared.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
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


_MARKS = range(0xE000, 0xF8FF)  # private use: no text means anything by them
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls")
_NAMES = ("type", "id", "role")


@dataclass(frozen=True)
class Ends:
    """How turns end. `own` is the tokenizer's end of text, `special` are all its special tokens."""

    own: str | None = None
    special: Collection[str] = ()


NO_ENDS = Ends()


def weights(messages: Sequence[Message]) -> list[bool]:
    """Which messages are to be learned: of the role assistant, unless their `weight` is 0.

    Raises ValueError for a weight other than 0 or 1, or one of 1 at a message that is no answer.
    """
    learned = []
    for number, message in enumerate(messages, 1):
        weight, answer = message.get("weight"), message.get("role") == "assistant"
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise ValueError(f"message {number} has weight {weight!r}; a weight is 0 or 1, or left out")
        if weight == 1 and not answer:
            raise ValueError(
                f"message {number} has weight 1 and the role {message.get('role')!r}; only answers of the role 'assistant' "
                f"are learned"
            )
        learned.append(answer and weight != 0)
    return learned


def answer_spans(
    messages: Sequence[Message], render: Render, *, last_only: bool = False, ends: Ends = NO_ENDS
) -> tuple[str, list[range]]:
    """The conversation as text, and where in it the answers to be learned are: none if every weight is 0.

    Raises ValueError if a weight is wrong, there is no answer at all, or one cannot be told from what is around it.
    """
    learned = weights(messages)
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise ValueError("it has no message of the role 'assistant', so nothing to learn")
    messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    text = render(messages, False)
    chosen = [i for i in (answers[-1:] if last_only else answers) if learned[i]]
    return text, [range(_begin(messages, i, text, render, ends), _end(messages, i, text, render, ends)) for i in chosen]


def _begin(messages: Sequence[Message], i: int, text: str, render: Render, ends: Ends) -> int:
    """Behind the prompt for answer `i`; or where the template writes that otherwise, at the answer's own text."""
    before, plain = _tried(messages[:i], render, prompt=True), _tried(messages[:i], render)
    if before is not None and text.startswith(before):
        return len(before)
    try:
        return _own_text(messages, i, text, render, 0)
    except (
        ValueError
    ):  # of some answers a template drops the beginning; then what the prompt has in common with the text
        shared = 0 if before is None else _common(before, text, ends)
        if plain is None or not text.startswith(plain) or shared <= len(plain):
            raise
        return shared


def _end(messages: Sequence[Message], i: int, text: str, render: Render, ends: Ends) -> int:
    """Behind the end of turn of answer `i`."""
    if i == len(messages) - 1:
        return len(text)
    upto = _tried(messages[: i + 1], render)
    if upto is not None and text.startswith(upto):
        return len(upto) + _own_end(upto, text[len(upto) :], ends)
    own = _own_text(messages, i, text, render, -1)
    if upto is None:
        return own + _closing(text[own:], ends)
    return own + _shared(upto[_own_text(messages[: i + 1], i, upto, render, -1) :], text[own:], ends)


def _own_end(upto: str, rest: str, ends: Ends) -> int:
    """Length of an end of text that a template writes after a turn only once another turn follows."""
    if not ends.own or upto.rstrip().endswith(ends.own) or not rest.startswith(ends.own):
        return 0
    return len(ends.own)


def _closing(rest: str, ends: Ends) -> int:
    """Length of the special token that `rest` begins with, if it does."""
    return max((len(one) for one in ends.special if rest.startswith(one)), default=0)


def _shared(tail: str, rest: str, ends: Ends) -> int:
    """How much of `tail`, what follows a last answer, also follows it in `rest`, where other turns do.

    Without the special tokens at its end if those are not there; else up to the last special token or end of line in
    common: what the next turn's header happens to have in common with `tail` is not the answer's.
    """
    whole = tail
    while whole and not rest.startswith(whole):
        last = max((one for one in ends.special if one and whole.endswith(one)), key=len, default=None)
        if last is None:
            break
        whole = whole[: -len(last)]
    return len(whole) if rest.startswith(whole) else _common(tail, rest, ends)


def _common(one: str, other: str, ends: Ends) -> int:
    """How much two texts have in common, up to the last special token or end of line in it."""
    same = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    stops = [one.rfind(end, 0, same) + len(end) for end in ("\n", *ends.special) if one.rfind(end, 0, same) >= 0]
    return max(stops, default=0)


def _own_text(messages: Sequence[Message], i: int, text: str, render: Render, edge: int) -> int:
    """Where message `i`'s own text begins (`edge` 0) or ends (-1) in `text`, the rendered messages.

    Raises ValueError if that cannot be found.
    """
    marks = [chr(code) for code in _MARKS if chr(code) not in text][:2]
    changed = {key: _between(messages[i][key], *marks) for key in _TEXTS if key in messages[i]}
    shown = _tried([*messages[:i], {**messages[i], **changed}, *messages[i + 1 :]], render)
    found = -1
    if shown is not None and shown.replace(marks[0], "").replace(marks[1], "") == text:
        found = shown.rfind(marks[1]) if edge else shown.find(marks[0])
    if shown is None or found < 0:
        raise ValueError(
            f"its template writes message {i + 1} differently when the conversation goes on, and its text is not found in "
            f"what it writes, so the answer cannot be told apart; give it weight 0, or take --last-answer-only"
        )
    return found - sum(shown.count(mark, 0, found) for mark in marks)


def _between(value: Any, left: str, right: str) -> Any:
    """A text, or every text of parts and calls, with marks around it; inside of white space, which templates trim."""
    if isinstance(value, str) and (core := value.strip()):
        return value.replace(core, f"{left}{core}{right}", 1)
    if isinstance(value, list):
        return [_between(item, left, right) for item in value]
    if isinstance(value, dict):
        return {key: item if key in _NAMES else _between(item, left, right) for key, item in value.items()}
    return value


def _tried(messages: Sequence[Message], render: Render, *, prompt: bool = False) -> str | None:
    """None if the template refuses these messages, as many do of none, or of some order, though not of the whole."""
    try:
        return render(messages, prompt)
    except Exception:  # a template raises whatever its author chose
        return None
