"""Exactly the answers are learned: of templates of every manner, conversations in every order, with tools and weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from talks import CHATML, EOT, SPECIAL, make_tokenizer, talk
from thinwire.cli import main
from thinwire.data.chat import ChatOptions, prepare_chat
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.data.notes import notes
from thinwire.data.template import Ends, Message, answer_spans, template_of

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
TEMPLATES = {
    "chatml": CHATML,
    "default system": (
        "{% if not messages or messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
    ),
    "end after the last turn": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "end between turns": (
        "{% for m in messages %}{% if not loop.first %}{{ eos_token }}{% endif %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ eos_token }}<|assistant|>\n{% endif %}"
    ),
    "thinks last": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "plain headers": (
        "{% for m in messages %}### {{ m['role'] | title }}:\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:\n{% else %}### End{% endif %}"
    ),
    "refuses beginnings": (
        "{% if messages[-1]['role'] == 'system' or not messages %}{{ raise_exception('ends with system') }}{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
    ),
    "llama 2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }} </s>{% else %}<<{{ m['content'] }}>>{% endif %}{% endfor %}"
    ),
}
ENDS = {
    "chatml": "<|im_end|>\n", "default system": "<|im_end|>\n", "end after the last turn": "<|im_end|>\n",
    "end between turns": EOT, "thinks last": "<|im_end|>\n", "plain headers": "\n\n", "refuses beginnings": "<|im_end|>\n",
    "llama 2": " </s>",
}  # fmt: skip
LAST = {"end after the last turn": EOT, "plain headers": "### End", "end between turns": ""}
ORDERS = {
    "as usual": [("user", "fox?"), ("assistant", "the dog"), ("user", "the?"), ("assistant", "lazy")],
    "ends with a question": [("user", "fox?"), ("assistant", "the dog"), ("user", "over?")],
    "two answers": [("user", "fox?"), ("assistant", "the dog"), ("assistant", "the fox"), ("user", "quick?")],
    "answer first": [("assistant", "hello there"), ("user", "fox?"), ("assistant", "jumps over")],
    "system in the middle": [
        ("user", "a"),
        ("assistant", "b c"),
        ("system", "brief"),
        ("user", "d"),
        ("assistant", "e"),
    ],
    "system last": [("user", "a"), ("assistant", "b c"), ("user", "d"), ("system", "stop")],
    "answers like headers": [("user", "a"), ("assistant", "### User:\nx"), ("user", "b"), ("assistant", "<|user|>")],
}


def chat(folder: Path, tokenizer: Path, rows: Sequence[Any], **options: Any) -> dict[str, Any]:
    file = folder / "talks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_chat(
        ChatOptions((str(file),), tokenizer, heldout_fraction=0.0, **options), folder / "corpus", force=True
    )


def corpus(folder: Path) -> tuple[str, list[str]]:
    """The whole text of a corpus, and each run of tokens that are learned."""
    split = Corpus.open(DataConfig(path=folder / "corpus")).train
    library = Tokenizer.from_file(str(folder / "corpus" / "tokenizer.json"))
    ids, marks = split.stream.tolist(), np.asarray(split.answers)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marks, [0]])))
    learned = [library.decode(ids[a:b], skip_special_tokens=False) for a, b in edges.reshape(-1, 2)]
    return library.decode(ids, skip_special_tokens=False), learned


def expected(kind: str, turns: list[tuple[str, str]]) -> list[str]:
    """What each answer is, its end of turn included."""
    answers = []
    for i, (role, content) in enumerate(turns):
        if role == "assistant":
            last = i == len(turns) - 1
            lead = "<think>\n\n</think>\n\n" if kind == "thinks last" and last else ""
            end = LAST.get(kind, "") if last else ""
            turn = "" if kind == "end between turns" and last else ENDS[kind]
            space = " " if kind == "llama 2" and i else ""  # the template's own; nothing says so before a first message
            answers.append(space + lead + content + turn + end)
    return answers


@pytest.mark.parametrize("kind", TEMPLATES)
def test_exactly_the_answers_are_learned_whatever_the_template_and_the_order(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", TEMPLATES[kind])
    template = template_of(tokenizer)
    ends = Ends(template.end, [*SPECIAL, EOT])
    for order, turns in ORDERS.items():
        if kind == "refuses beginnings" and order == "system last":
            continue
        text, spans = answer_spans(talk(turns), template.render({}), ends=ends)
        assert text == template.render({})(talk(turns), False)
        assert [text[span.start : span.stop] for span in spans] == expected(kind, turns), order
        (last,) = answer_spans(talk(turns), template.render({}), ends=ends, last_only=True)[1]
        assert last == spans[-1]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_marked_tokens_are_those_answers(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", TEMPLATES[kind])
    turns = ORDERS["as usual"]
    chat(tmp_path, tokenizer, [{"messages": talk(turns)}])
    text, learned = corpus(tmp_path)
    assert text == template_of(tokenizer).render({})(talk(turns), False) + EOT
    assert learned == expected(kind, turns)


def test_thinking_that_a_template_drops_from_earlier_answers_is_not_looked_for(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set content = m['content'] %}"
        "{% if m['role'] == 'assistant' and not loop.last and '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    ) + PROMPT
    render = template_of(make_tokenizer(tmp_path, template)).render({})
    thinking = "<think>\nhm\n</think>\n\n"
    turns = [("user", "a"), ("assistant", thinking + "b"), ("user", "c"), ("assistant", thinking + "d"), ("user", "e")]
    for count, last in ((4, thinking + "d"), (5, "d")):
        text, spans = answer_spans(talk(turns[:count]), render, ends=Ends(EOT, SPECIAL))
        assert [text[span.start : span.stop] for span in spans] == [f"{one}<|im_end|>\n" for one in ("b", last)]


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
QWEN = (
    "{% set ns = namespace(last=messages | length - 1, looking=true) %}{% for m in messages[::-1] %}"
    "{% if ns.looking and m.role == 'user' %}{% set ns.looking = false %}"
    "{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content, thought = m.content, '' %}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' + content }}"
    "{% else %}{{ content }}{% endif %}{% else %}{{ '<|im_start|>' + m.role + '\n' + content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}"
    "{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<s>' + content + '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<s><think>\n{% endif %}"
)
THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "inputs", "thought", "learned"),
    [
        (GEMMA, {}, "", ["the dog<|im_end|>\n", "lazy<|im_end|>\n"]),
        (QWEN, {}, "", ["the dog<|im_end|>\n", "<think>\n\n</think>\n\nlazy<|im_end|>\n"]),
        (QWEN, {}, THOUGHT, ["the dog<|im_end|>\n", THOUGHT + "lazy<|im_end|>\n"]),
        (QWEN, {"enable_thinking": False}, "", ["the dog<|im_end|>\n", "lazy<|im_end|>\n"]),
        (DEEPSEEK, {}, "", ["the dog<|im_end|>", "lazy<|im_end|>"]),
        (DEEPSEEK, {}, THOUGHT, ["\n\nthe dog<|im_end|>", "\n\nlazy<|im_end|>"]),
    ],
)
def test_answers_under_templates_as_models_have_them(
    template: str, inputs: dict[str, Any], thought: str, learned: list[str], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template)
    turns = [(role, (thought if role == "assistant" else "") + content) for role, content in ORDERS["as usual"]]
    chat(tmp_path, tokenizer, [{"messages": talk(turns), **inputs}])
    assert corpus(tmp_path)[1] == learned


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}<call>"
    "{{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }}</call>{% endfor %}{% else %}{{ m['content'] }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("prefix", ["", "{{ messages | length }}"])
def test_calls_of_tools_are_answers_too(prefix: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", prefix + CALLS)
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "é \n"}}}
    messages = [
        {"role": "user", "content": "fox?"}, {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "content": "dog"}, {"role": "assistant", "content": "lazy"},
    ]  # fmt: skip
    chat(tmp_path, tokenizer, [{"messages": messages}])
    begin = "look " if prefix else "<call>look "  # what is before an answer's own text is not known there
    made = f'{begin}{{"at": "é \\n"}}</call><call>look {{"at": "é \\n"}}</call><|im_end|>\n'
    assert corpus(tmp_path)[1] == [made, f"lazy<|im_end|>\n{EOT}"]


def test_a_special_token_that_takes_the_space_after_it_is_not_learned(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}<s>\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant<s>\n{% endif %}"
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template + prompt)
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["rstrip"] = token["content"] in ("<s>", "<|im_end|>")
    (tokenizer / "tokenizer.json").write_text(json.dumps(settings))
    chat(tmp_path, tokenizer, [{"messages": talk([("user", "fox?"), ("assistant", "  dog"), ("user", "the")])}])
    assert corpus(tmp_path)[1] == ["dog<|im_end|>"]


def test_an_answer_that_cannot_be_found_is_refused_with_a_way_out(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] | length }}{% endfor %}"
    render = template_of(make_tokenizer(tmp_path, template)).render({})
    with pytest.raises(
        ValueError, match=r"writes message 2 differently .* give it weight 0, or take --last-answer-only"
    ):
        answer_spans(talk([("user", "a"), ("assistant", "b"), ("user", "c")]), render)


def test_tools_and_whatever_else_a_template_reads_are_passed_on(tmp_path: Path) -> None:
    template = (
        "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t['function']['name'] }}{% endfor %}<|im_end|>\n"
        "{% endif %}{% for d in documents or [] %}({{ d['title'] }}){% endfor %}"
        "{% if mood is defined %}[{{ mood }}]{% endif %}"
    ) + TEMPLATES["chatml"]
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template)
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    turns = talk([("user", "fox"), ("assistant", "dog")])
    rows = [
        {"messages": turns, "tools": [tool], "documents": [{"title": "one", "text": "x"}], "mood": "glad", "id": 7},
        {"messages": turns, "tools": json.dumps([tool]), "chat_template_kwargs": {"mood": "sad"}, "documents": None},
        {"messages": turns, "tools": []},
    ]
    assert notes(chat(tmp_path, tokenizer, rows)) == []
    plain = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\ndog<|im_end|>\n<|endoftext|>"
    said = "<|im_start|>system\nTools: get_weather<|im_end|>\n"
    text, learned = corpus(tmp_path)
    assert text == f"{said}(one)[glad]{plain}{said}[sad]{plain}{plain}"
    assert learned == ["dog<|im_end|>\n"] * 3
    bare = make_tokenizer(tmp_path / "bare", TEMPLATES["chatml"])
    (told,) = notes(chat(tmp_path, bare, rows))
    assert told.startswith("2 conversations have tools or documents, which the chat template does not read")


def test_weights_choose_the_answers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", TEMPLATES["chatml"])
    turns = talk(ORDERS["as usual"])

    def weighted(*weights: Any) -> dict[str, Any]:
        return {"messages": [{**m, "weight": w} for m, w in zip(turns, weights, strict=True)]}

    rows = [weighted(None, 0, 0, 1), weighted(0, 1.0, None, 0), weighted(None, 0, None, 0)]
    (told,) = notes(chat(tmp_path, tokenizer, rows))
    assert told.startswith("1 conversations have no answer to learn, every weight being 0, and are left out")
    text, learned = corpus(tmp_path)
    assert learned == ["lazy<|im_end|>\n", "the dog<|im_end|>\n"]
    assert text.count(EOT) == 2 and "weight" not in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": 2}, "message 2 has weight 2; a weight is 0 or 1"),
        ({"weight": 0.5}, "message 2 has weight 0.5; a weight is 0 or 1"),
        ({"weight": -1}, "message 2 has weight -1"),
        ({"weight": True}, "message 2 has weight True"),
        ({"weight": "1"}, "message 2 has weight '1'"),
        ({"weight": float("nan")}, "message 2 has weight nan"),
        ({"weight": 1, "role": "user"}, "message 2 has weight 1 and the role 'user'; only answers"),
        ({"role": "model"}, "it has no message of the role 'assistant'"),
    ],
)
def test_wrong_weights_are_refused(change: Message, says: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", TEMPLATES["chatml"])
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **change}]
    with pytest.raises(Exception, match=f"line 1: {says}"):
        chat(tmp_path, tokenizer, [{"messages": messages}])
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tools": "get_weather"}, "'tools' is text that is not JSON: get_weather"),
        ({"tools": {"name": "x"}}, "'tools' is not a list of objects"),
        ({"tools": ["get_weather"]}, "'tools' is not a list of objects"),
        ({"documents": ["text"]}, "'documents' is not a list of objects"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is list, not an object"),
    ],
)
def test_wrong_inputs_of_a_template_get_a_sentence(
    row: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", "{{ tools }}{{ documents }}" + TEMPLATES["chatml"])
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"messages": talk(ORDERS["as usual"]), **row}))
    with pytest.raises(SystemExit) as left:
        main(["data", "chat", str(file), "-o", str(tmp_path / "corpus"), "--tokenizer", str(tokenizer)])
    assert left.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()


def test_only_the_template_opens_and_closes_turns(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", TEMPLATES["chatml"])
    rows = [
        {"messages": talk([("user", "say <|im_end|>\n<|im_start|>assistant\n"), ("assistant", "é <|im_end|> it is")])}
    ]
    ends = {}
    for special in (False, True):
        manifest = chat(tmp_path, tokenizer, rows, special_tokens=special)
        library = Tokenizer.from_file(str(tmp_path / "corpus" / "tokenizer.json"))
        ids = Corpus.open(DataConfig(path=tmp_path / "corpus")).train.stream.tolist()
        ends[special] = ids.count(library.token_to_id("<|im_end|>"))
        text, learned = corpus(tmp_path)
        assert text == template_of(tokenizer).render({})(rows[0]["messages"], False) + EOT
        assert learned == ["é <|im_end|> it is<|im_end|>\n"]
        assert manifest["splits"]["train"]["spelling_special_tokens"] == (not special)
    assert ends == {False: 2, True: 4}


def test_halves_of_surrogate_pairs_in_messages_are_replaced_and_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", TEMPLATES["chatml"])
    rows = [
        {"messages": talk(ORDERS["as usual"])},
        {"messages": talk([("user", "cut \ud83d"), ("assistant", "\ude00!")])},
    ]
    manifest = chat(tmp_path, tokenizer, rows)
    assert manifest["mended"] == {"documents": 1, "first": f"{tmp_path / 'talks.jsonl'} line 2"}
    assert corpus(tmp_path)[1][-1] == "\ufffd!<|im_end|>\n"


def test_the_corpus_keeps_the_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", TEMPLATES["chatml"])
    chat(tmp_path, tokenizer, [{"messages": talk(ORDERS["as usual"])}])
    kept = template_of(tmp_path / "corpus")
    assert kept.render({})(talk(ORDERS["as usual"]), True) == template_of(tokenizer).render({})(
        talk(ORDERS["as usual"]), True
    )
    assert kept.after_answer() == "<|im_end|>\n"
