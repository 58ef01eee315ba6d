"""Where in a rendered conversation the answers are, whatever its template does with the turns around them.

What a template adds for an assistant's message, beyond the prompt for it, is the answer, its end of turn included. It is
found by rendering the conversation up to the message, without and with it. Where a template writes a turn differently as
the last one (an end of text after it, its thinking dropped later), the rendered beginning is no beginning of the whole
text; then marks around the message's own text say where that is, and only the end of the turn is compared.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.data.template import Message, Render

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
