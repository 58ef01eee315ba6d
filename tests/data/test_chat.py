"""Conversations: rendered by the tokenizer's own template; exactly the answers are learned."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from runs import run_tree, train_in
from talks import talk
from thinwire.cli import main
from thinwire.data.chat import ChatOptions, prepare_chat
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.data.indexed import answers_path
from thinwire.data.loader import IGNORED, Packing
from thinwire.data.template import Message, answer_spans
from thinwire.errors import DataError
from thinwire.files.events import steps
from thinwire.train.folder import EVENTS_FILE
from worlds import run_world

REWRITING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALKS = [
    [("user", "def?"), ("assistant", "class import é€"), ("user", "and yield?"), ("assistant", "no\nreturn")],
    [("system", "be brief"), ("user", "self value"), ("assistant", "for in if")],
    [("user", "while"), ("assistant", "else")],
]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(folder: Path, tokenizer: Path, talks: Sequence[Any] = TALKS, **options: Any) -> Corpus:
    file = write(folder / "talks.jsonl", [{"messages": talk(turns)} for turns in talks])
    prepare_chat(ChatOptions((str(file),), tokenizer, heldout_fraction=0.0, **options), folder / "corpus")
    return Corpus.open(DataConfig(path=folder / "corpus"))


def test_the_marked_tokens_are_the_answers_and_their_ends(tokenizer: Path, tmp_path: Path) -> None:
    corpus = make(tmp_path, tokenizer)
    assert corpus.train.answers is not None and corpus.tokenizer is not None
    library = AutoTokenizer.from_pretrained(tokenizer)
    ends = [*corpus.train.starts[1:], corpus.train.tokens]
    for turns, start, end in zip(TALKS, corpus.train.starts, ends, strict=True):
        ids = corpus.train.stream[start:end].tolist()
        marks = np.asarray(corpus.train.answers[start:end])
        assert ids == [
            *library.apply_chat_template(talk(turns), tokenize=True, return_dict=False),
            corpus.tokenizer.eot,
        ]
        learned = library.decode([i for i, mark in zip(ids, marks, strict=True) if mark])
        assert learned == "".join(f"{content}<|endoftext|>\n" for role, content in turns if role == "assistant")


def test_only_answers_are_targets(tokenizer: Path, tmp_path: Path) -> None:
    corpus = make(tmp_path, tokenizer)
    packing = Packing(corpus.train, 16)
    batch = packing.batch(np.arange(packing.sequences))
    scored = batch.targets_BT != IGNORED
    flat = np.asarray(corpus.train.answers)[1 : scored.size + 1].reshape(scored.shape)
    assert np.array_equal(scored, flat == 1)
    assert 0 < scored.sum() < scored.size


def test_the_last_answer_alone(tokenizer: Path, tmp_path: Path) -> None:
    whole = make(tmp_path, tokenizer, TALKS[:1])
    (tmp_path / "last").mkdir()
    last = make(tmp_path / "last", tokenizer, TALKS[:1], last_answer_only=True)
    assert last.train.answers is not None and whole.train.answers is not None
    assert 0 < last.train.answers.sum() < whole.train.answers.sum()
    assert last.digest != whole.digest


def test_training_counts_answers_only_however_it_is_split(tokenizer: Path, tmp_path: Path) -> None:
    corpus = make(tmp_path, tokenizer, TALKS * 40)
    seen = []
    for levels in ([1], [4]):
        tree = run_tree(tmp_path / f"run{levels[0]}", tmp_path / "corpus", cluster={"levels": levels}, run={"steps": 4})
        run_world(levels, train_in, tree)
        seen.append(list(steps(tmp_path / f"run{levels[0]}" / EVENTS_FILE).values()))
    one, four = seen
    assert [record["loss"] for record in four] == pytest.approx([record["loss"] for record in one], rel=1e-5)
    assert [record["tokens"] for record in four] == [record["tokens"] for record in one]
    assert all(record["tokens"] < 16 * 32 for record in one)
    assert corpus.train.answers is not None


def test_of_a_template_that_rewrites_earlier_answers_what_stands_in_the_conversation_is_learned() -> None:
    from jinja2 import Environment

    template = Environment().from_string(REWRITING)

    def render(messages: Sequence[Message], prompt: bool) -> str:
        return template.render(messages=messages, add_generation_prompt=prompt)

    text, spans = answer_spans(talk(TALKS[0]), render)
    assert [text[span.start : span.stop] for span in spans] == ["class import é€\n", "<think></think>no\nreturn\n"]
    assert answer_spans(talk(TALKS[0]), render, last_only=True) == (text, spans[-1:])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "x"}], "has no list of messages 'messages' (it has: text); name the field with --field"),
        ([{"messages": []}], "has no list of messages"),
        ([{"messages": ["hello"]}], "a message is not of the form {role, content}: hello"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "line 1: it has no message of the role 'assistant'"),
        ([{"messages": talk([("tool", "x"), ("assistant", "y")])}], "line 1: no role tool"),
        (["{"], "line 1 has no list of messages"),
    ],
)
def test_wrong_conversations_are_named_and_nothing_is_written(
    rows: list[Any], says: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "talks.jsonl", rows)
    with pytest.raises(SystemExit) as left:
        main(["data", "chat", str(file), "-o", str(tmp_path / "corpus"), "--tokenizer", str(tokenizer)])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert says in said
    assert len(said.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["talks.jsonl"]


def test_tokenizers_without_a_template_and_other_files_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    file = write(tmp_path / "talks.jsonl", [{"messages": talk(TALKS[0])}])
    with pytest.raises(DataError, match="has no chat template"):
        prepare_chat(ChatOptions((str(file),), bare), tmp_path / "corpus")
    with pytest.raises(DataError, match=r"there is no tokenizer file .*nowhere/tokenizer.json"):
        prepare_chat(ChatOptions((str(file),), tmp_path / "nowhere"), tmp_path / "corpus")
    (tmp_path / "talks.txt").write_text("hello")
    with pytest.raises(DataError, match="conversations are read from those"):
        prepare_chat(ChatOptions((str(tmp_path / "talks.txt"),), tokenizer), tmp_path / "corpus")
    make(tmp_path, tokenizer)
    answers_path(tmp_path / "corpus" / "train").write_bytes(b"\1")
    with pytest.raises(DataError, match="marks 1 tokens, there are"):
        Corpus.open(DataConfig(path=tmp_path / "corpus"))
