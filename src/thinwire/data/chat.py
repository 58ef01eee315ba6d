"""Conversations to token files: each rendered by the tokenizer's own chat template, with a mark on every answer token.

The mark is found in the rendered text: what the template adds for an assistant's message, beyond the prompt for it, is
the answer, its end-of-turn included. Training and validation score answers only (Packing leaves the rest out).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.corpus import FORMAT, MANIFEST, PREFIXES
from thinwire.data.indexed import IndexedWriter, answers_path
from thinwire.data.inputs import Input, identities, rows_of
from thinwire.data.prepare import digests, held_out
from thinwire.data.tokenizer import FileTokenizer, load_file
from thinwire.errors import DataError
from thinwire.folders import whole_folder

_TOKENIZER = "tokenizer.json"
Message = dict[str, Any]
Rows = Input[tuple[Any, str]]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the prompt for an answer follows) -> text."""


@dataclass(frozen=True)
class ChatOptions:
    """What to read. `tokenizer` is a folder with tokenizer.json and a chat template."""

    sources: tuple[str, ...]
    tokenizer: Path
    field: str = "messages"
    last_answer_only: bool = False
    heldout_fraction: float = 0.02


def prepare_chat(options: ChatOptions, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Write the corpus folder `out` and return its manifest.

    Raises DataError: no such source, a row without messages, no chat template, a conversation that the template cannot
    render or whose answers cannot be told apart, a target that exists (unless `force`) or cannot be written.
    """
    inputs = rows_of(options.sources, field=options.field)
    tokenizer = load_file(options.tokenizer / _TOKENIZER)
    render = template_of(options.tokenizer)
    with whole_folder(out, force=force, error=DataError) as folder:
        return _fill(folder, options, inputs, tokenizer, render)


def template_of(folder: Path) -> Render:
    """The chat template of the tokenizer in `folder`. Raises DataError if it has none, or transformers is missing."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise DataError("chat templates need the transformers library; pip install 'thinwire[hf]'") from None
    try:
        library: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{folder} holds no tokenizer that transformers reads: {_line(error)}") from None
    if not library.chat_template:
        raise DataError(
            f"the tokenizer in {folder} has no chat template; take that of an instruction-tuned model, or put a "
            f"chat_template.jinja into the folder"
        )

    def render(messages: Sequence[Message], prompt: bool) -> str:
        return str(library.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))

    return render


def answer_spans(messages: Sequence[Message], render: Render, *, last_only: bool = False) -> tuple[str, list[range]]:
    """The conversation as text, and where in it the answers are.

    Raises ValueError if the template writes an answer differently once the conversation goes on, or there is none.
    """
    text = render(messages, False)
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise ValueError("it has no message of the role 'assistant', so nothing to learn")
    spans = []
    for i in answers[-1:] if last_only else answers:
        before = render(messages[:i], True) if i else ""
        upto = text if i == len(messages) - 1 else render(messages[: i + 1], False)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise ValueError(
                f"its template writes message {i + 1} differently when the conversation goes on, so answers cannot be told "
                f"apart; --last-answer-only trains on the last one"
            )
        spans.append(range(len(before), len(upto)))
    return text, spans


def marked(text: str, spans: Sequence[range], tokenizer: FileTokenizer) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Ids of `text` and the end of text, and 1 for every id of which some is inside a span."""
    ids, offsets = tokenizer.encode_with_offsets(text, special=True)
    starts_N, ends_N = np.array(offsets, np.int64).reshape(-1, 2).T
    marks = np.zeros(len(ids) + 1, np.uint8)
    for span in spans:
        marks[:-1][(np.maximum(ends_N, starts_N + 1) > span.start) & (starts_N < span.stop)] = 1
    return np.array([*ids, tokenizer.eot], np.int64), marks


def _fill(
    folder: Path, options: ChatOptions, inputs: Sequence[Rows], tokenizer: FileTokenizer, render: Render
) -> dict[str, Any]:
    """Tokenizer, token files, marks and manifest into `folder`."""
    tokenizer.save(folder)
    counts = {name: {"documents": 0, "tokens": 0, "bytes": 0, "answer_tokens": 0} for name in PREFIXES}
    with ExitStack() as stack:
        writers = {n: stack.enter_context(IndexedWriter(folder / n, tokenizer.vocab_size)) for n in PREFIXES}
        masks = {n: stack.enter_context(answers_path(folder / n).open("wb")) for n in PREFIXES}
        for text, spans in _conversations(inputs, options, render):
            raw = text.encode("utf-8")
            name = "heldout" if held_out(raw, options.heldout_fraction) else "train"
            ids, marks = marked(text, spans, tokenizer)
            writers[name].add(ids, np.array([ids.size], np.int32))
            masks[name].write(marks.tobytes())
            for key, count in (
                ("documents", 1),
                ("tokens", ids.size),
                ("bytes", len(raw)),
                ("answer_tokens", marks.sum()),
            ):
                counts[name][key] += int(count)
        for writer in writers.values():
            writer.close()
    if counts["train"]["answer_tokens"] == 0:
        raise DataError(
            f"{', '.join(options.sources)}: no answers in {len(inputs)} files or data sets; nothing to train on"
        )
    manifest = {
        "format": FORMAT,
        "tokenizer": {"file": _TOKENIZER, "vocab_size": tokenizer.vocab_size},
        "sources": list(options.sources),
        **identities(inputs),
        "heldout_fraction": options.heldout_fraction,
        "splits": {
            name: {**counts[name], **digests(folder / name), **_mask_digest(folder / name)} for name in PREFIXES
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _conversations(inputs: Sequence[Rows], options: ChatOptions, render: Render) -> Iterator[tuple[str, list[range]]]:
    for one in inputs:
        for row, where in one.read():
            messages = _messages(row, options.field, where)
            try:
                yield answer_spans(messages, render, last_only=options.last_answer_only)
            except Exception as error:  # a template raises whatever its author chose
                raise DataError(f"{where}: {_line(error)}") from None


def _messages(row: Any, field: str, where: str) -> list[Message]:
    found = row.get(field) if isinstance(row, dict) else None
    if not isinstance(found, list) or not found:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no list of messages {field!r} (it has: {keys}); name the field with --field")
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where}: a message is not of the form {{role, content}}: {str(message)[:80]}")
    return found


def _mask_digest(prefix: Path) -> dict[str, str]:
    with answers_path(prefix).open("rb") as file:
        return {"answers_sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
