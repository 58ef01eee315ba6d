"""Conversations through the tokenizer's own chat template: to token files with a loss mask, and to prompts.

Training and validation score answers only (Packing leaves the rest out), and conversations never attend to one another.
A special token that a message merely spells out is ordinary text, unless it is asked for: only the template opens and
closes turns. A model is given a person's words to continue, as they are or as a message, or the beginning of its data.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.corpus import FORMAT, MANIFEST, PREFIXES, Corpus
from thinwire.data.indexed import IndexedWriter, answers_path
from thinwire.data.inputs import Input, identities, rows_of
from thinwire.data.prepare import digests, held_out, mended, nothing_to_train_on
from thinwire.data.template import Ends, Message, Template, answer_spans, complete_template, one_line, template_of
from thinwire.data.tokenizer import CONFIG, FileTokenizer, Tokenizer, load_file
from thinwire.errors import DataError
from thinwire.files.folders import atomic_folder

_TOKENIZER = "tokenizer.json"
_COUNTED = ("documents", "tokens", "bytes", "answer_tokens", "unknown_tokens", "spelling_special_tokens")
_SHIELDS = range(0xF0000, 0xFFFFD)  # private use: one for each special token
Rows = Input[tuple[Any, str]]


@dataclass(frozen=True)
class ChatOptions:
    """What to read. `tokenizer` is a folder with tokenizer.json and a chat template."""

    sources: tuple[str, ...]
    tokenizer: Path
    field: str = "messages"
    last_answer_only: bool = False
    heldout_fraction: float = 0.02
    special_tokens: bool = False
    """Special tokens that a message spells out become those; else they are ordinary text."""


@dataclass(frozen=True)
class Talk:
    """A conversation as text. Special tokens that its messages spell out are `shielded`: one character for each."""

    text: str
    spans: list[range]
    """Where the answers are."""
    shielded: dict[str, str] = field(default_factory=dict)


@dataclass
class _Told:
    """What a person should hear of the conversations read."""

    mended: int = 0
    first_mended: str | None = None
    nothing_to_learn: int = 0
    inputs_unread: int = 0

    def in_manifest(self) -> dict[str, Any]:
        mended = {"mended": {"documents": self.mended, "first": self.first_mended}} if self.mended else {}
        return {**mended, "nothing_to_learn": self.nothing_to_learn, "inputs_unread": self.inputs_unread}


def prepare_chat(options: ChatOptions, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the corpus folder `out` and return its manifest.

    Raises DataError: no such source, a row without messages, no chat template, a conversation that the template cannot
    render or whose answers cannot be told apart, a target that exists (unless `force`) or cannot be written.
    """
    tokenizer = load_file(options.tokenizer / _TOKENIZER, otherwise="the folder of a chat model's tokenizer")
    template = template_of(options.tokenizer)
    inputs = rows_of(options.sources, field=options.field, also=template.fields)
    with atomic_folder(out, force=force, error=DataError) as folder:
        return _fill(folder, options, inputs, tokenizer, template)


def marked(talk: Talk, tokenizer: FileTokenizer) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Ids of a conversation and the end of text, and 1 for every id of which some is inside a span."""
    ids, starts_N, ends_N = encoded(talk, tokenizer)
    own_N = ~np.isin(ids, list(tokenizer.special_ids))  # a special token before an answer may take its first space
    marks = np.zeros(len(ids) + 1, np.uint8)
    for span in talk.spans:
        begun_N = (starts_N >= span.start) | ((ends_N > span.start) & own_N)
        marks[:-1][begun_N & (starts_N < span.stop)] = 1
    return np.array([*ids, tokenizer.eot], np.int64), marks


def encoded(talk: Talk, tokenizer: FileTokenizer) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64]]:
    """Ids, and where in the text each begins and ends. What is shielded is encoded as ordinary text around it is."""
    if not talk.shielded:
        ids, offsets = tokenizer.encode_with_offsets(talk.text, special=True)
        return ids, *np.array(offsets, np.int64).reshape(-1, 2).T
    ids, offsets, at = [], [], 0
    for part in re.split(f"({tokenizer.spelling.pattern})", talk.text):
        if part in tokenizer.special:
            ids.append(tokenizer.special[part])
            offsets.append((at, at + len(part)))
        else:
            # Character k of the restored part is character origins[k] of the part.
            pieces = [talk.shielded.get(letter, letter) for letter in part]
            origins = np.array([*np.repeat(np.arange(len(part)), [len(piece) for piece in pieces]), len(part)])
            own, places = tokenizer.encode_with_offsets("".join(pieces))
            ids += own
            offsets += [(at + origins[a], at + origins[b - 1] + 1 if b else at) for a, b in places]
        at += len(part)
    return ids, *np.array(offsets, np.int64).reshape(-1, 2).T


def shielded(value: Any, tokenizer: FileTokenizer, found: dict[str, str]) -> Any:
    """`value` with one character in place of every special token that a text in it spells out; which, in `found`."""
    if isinstance(value, str):
        return tokenizer.spelling.sub(lambda match: _shield(match[0], tokenizer, found), value)
    if isinstance(value, list):
        return [shielded(item, tokenizer, found) for item in value]
    if isinstance(value, Mapping):
        return {key: shielded(item, tokenizer, found) for key, item in value.items()}
    return value


def _shield(spelled: str, tokenizer: FileTokenizer, found: dict[str, str]) -> str:
    letter = chr(_SHIELDS[tokenizer.special[spelled] % len(_SHIELDS)])
    found[letter] = spelled
    return letter


def _fill(
    folder: Path, options: ChatOptions, inputs: Sequence[Rows], tokenizer: FileTokenizer, template: Template
) -> dict[str, Any]:
    """Tokenizer, token files, marks and manifest into `folder`."""
    tokenizer.save(folder)
    complete_template(options.tokenizer, folder, template)
    counts, told = {name: dict.fromkeys(_COUNTED, 0) for name in PREFIXES}, _Told()
    with ExitStack() as stack:
        writers = {n: stack.enter_context(IndexedWriter(folder / n, tokenizer.vocab_size)) for n in PREFIXES}
        masks = {n: stack.enter_context(answers_path(folder / n).open("wb")) for n in PREFIXES}
        for talk in _conversations(inputs, options, tokenizer, template, told):
            raw = "".join(talk.shielded.get(letter, letter) for letter in talk.text).encode("utf-8")
            name = "heldout" if held_out(raw, options.heldout_fraction) else "train"
            ids, marks = marked(talk, tokenizer)
            writers[name].add(ids, np.array([ids.size], np.int32))
            masks[name].write(marks.tobytes())
            unknown = 0 if tokenizer.unknown is None else int((ids == tokenizer.unknown).sum())
            seen = (1, ids.size, len(raw), int(marks.sum()), unknown, bool(talk.shielded))
            counts[name] = {key: counts[name][key] + count for key, count in zip(_COUNTED, seen, strict=True)}
        for writer in writers.values():
            writer.close()
    if counts["train"]["answer_tokens"] == 0:
        raise nothing_to_train_on(options.sources, len(inputs), counts["heldout"]["documents"], "answers")
    manifest = {
        "format": FORMAT,
        "tokenizer": {"file": _TOKENIZER, "vocab_size": tokenizer.vocab_size},
        "sources": list(options.sources),
        **identities(inputs),
        "heldout_fraction": options.heldout_fraction,
        "special_tokens": options.special_tokens,
        **told.in_manifest(),
        "splits": {
            name: {**counts[name], **digests(folder / name), **_mask_digest(folder / name)} for name in PREFIXES
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _conversations(
    inputs: Sequence[Rows], options: ChatOptions, tokenizer: FileTokenizer, template: Template, told: _Told
) -> Iterator[Talk]:
    """Every conversation that has something to learn."""
    ends = Ends(template.end, frozenset(tokenizer.special))
    for one in inputs:
        for row, where in one.read():
            messages = _messages(row, options.field, where)
            try:
                talk = _talk(messages, row, options, tokenizer, template, ends)
            except Exception as error:  # a template raises whatever its author chose
                raise DataError(f"{where}: {one_line(error)}") from None
            told.inputs_unread += template.unread(row)
            told.nothing_to_learn += not talk.spans
            if (whole := mended(talk.text)) != talk.text:
                told.mended, told.first_mended = told.mended + 1, told.first_mended or where
            if talk.spans:
                yield replace(talk, text=whole)


def _talk(
    messages: list[Message], row: Any, options: ChatOptions, tokenizer: FileTokenizer, template: Template, ends: Ends
) -> Talk:
    found: dict[str, str] = {}
    given: Any = (messages, template.inputs(row))
    if not options.special_tokens:
        given = shielded(list(given), tokenizer, found)
    text, spans = answer_spans(given[0], template.render(given[1]), last_only=options.last_answer_only, ends=ends)
    return Talk(text, spans, found)


def _messages(row: Any, field: str, where: str) -> list[Message]:
    found = row.get(field) if isinstance(row, dict) else None
    if not isinstance(found, list) or not found:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no list of messages {field!r} (it has: {keys}); name the field with --field")
    for message in found:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not {"content", "tool_calls"} & set(message)
        ):
            raise DataError(f"{where}: a message is not of the form {{role, content}}: {str(message)[:80]}")
    return found


def _mask_digest(prefix: Path) -> dict[str, str]:
    with answers_path(prefix).open("rb") as file:
        return {"answers_sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
