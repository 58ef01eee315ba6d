"""What a model is given to continue: a person's words, as they are or as a message, or the beginning of its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thinwire.data.chat import Talk, encoded, shielded
from thinwire.data.corpus import Corpus
from thinwire.data.template import one_line, template_of
from thinwire.data.tokenizer import CONFIG, FileTokenizer, Tokenizer
from thinwire.errors import DataError

_OPENING = 16
_LOOK = 1 << 16


@dataclass(frozen=True)
class Prompt:
    """Ids to continue, and those that end what follows."""

    ids: list[int]
    stop_ids: frozenset[int]

    def fitting(self, tokens: int) -> "Prompt":
        """The last `tokens` of it."""
        return Prompt(self.ids[-max(1, tokens) :], self.stop_ids)


def text_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """`text` as it is; a person who spells out a special token in a prompt means it."""
    return Prompt(tokenizer.encode(text, special=True), frozenset([tokenizer.eot]))


def chat_prompt(tokenizer: Tokenizer, folders: Sequence[Path], message: str) -> Prompt:
    """A user's `message` under the chat template in the first of `folders` that has one, up to where the answer begins.

    Raises DataError if none has a template, or it refuses the message.
    """
    folder = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    if folder is None or not isinstance(tokenizer, FileTokenizer):
        raise DataError(
            f"there is no chat template in {' or '.join(map(str, folders))}; make the corpus with `thinwire data chat`, or "
            f"leave --chat out"
        )
    template, found = template_of(folder), dict[str, str]()
    messages = shielded([{"role": "user", "content": message}], tokenizer, found)
    try:
        text = template.render({})(messages, True)
    except Exception as error:  # a template raises whatever its author chose
        raise DataError(f"the chat template in {folder} refuses the message: {one_line(error)}") from None
    ids, turn = encoded(Talk(text, [], found), tokenizer)[0], tokenizer.encode(template.after_answer(), special=True)
    return Prompt(
        ids, _ends(tokenizer, turn[:1]) | _ends(tokenizer, tokenizer.encode(template.end or "", special=True))
    )


def opening(corpus: Corpus) -> Prompt:
    """How the first validation document begins, or where there is none the first of all; of conversations the first that
    has an answer, up to that. Empty without a tokenizer.
    """
    if (tokenizer := corpus.tokenizer) is None:
        return Prompt([], frozenset())
    split = corpus.heldout if corpus.heldout is not None and corpus.heldout.tokens else corpus.train
    if split.answers is None or not split.answers.any():
        end = int(split.starts[1]) - 1 if split.documents > 1 else split.tokens
        return Prompt(split.stream[: min(_OPENING, end)].tolist(), frozenset([tokenizer.eot]))
    answer = int(np.argmax(split.answers))
    begin = int(split.starts[np.searchsorted(split.starts, answer, side="right") - 1])
    marks = np.append(split.answers[answer : answer + _LOOK], 0)
    learned = split.stream[answer : answer + int(np.argmin(marks))].tolist()
    return Prompt(split.stream[begin:answer].tolist(), _ends(tokenizer, learned))


def _ends(tokenizer: Tokenizer, turn: Sequence[int]) -> frozenset[int]:
    """What ends an answer: the end of text, and the last special token of a turn."""
    special = tokenizer.special_ids if isinstance(tokenizer, FileTokenizer) else frozenset[int]()
    return frozenset([tokenizer.eot, *[i for i in turn if i in special][-1:]])
