"""What a model continues fits what it was trained on: messages are answered, text goes on as its data begins."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runs import make_corpus, thinwire, write_run
from talks import CHATML, EOT, make_tokenizer, talk
from thinwire.data.chat import ChatOptions, chat_prompt, opening, prepare_chat, text_prompt
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.errors import DataError

TURNS = [
    ("system", "brief"),
    ("user", "the quick fox?"),
    ("assistant", "lazy dog"),
    ("user", "and?"),
    ("assistant", "jumps"),
]


def make_chat(folder: Path, talks: int = 30, **options: Any) -> Path:
    tokenizer = make_tokenizer(folder / "tokenizer", CHATML)
    rows = [{"messages": talk([(role, f"{content} {n}") for role, content in TURNS])} for n in range(talks)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_chat(ChatOptions((str(folder / "talks.jsonl"),), tokenizer, **options), folder / "corpus")
    return folder / "corpus"


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_the_opening_of_conversations_is_a_prompt_for_an_answer(tmp_path: Path, fraction: float) -> None:
    corpus = Corpus.open(DataConfig(path=make_chat(tmp_path, heldout_fraction=fraction)))
    library = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    split = corpus.heldout if fraction else corpus.train
    assert split is not None
    end = int(split.starts[1])
    whole = library.decode(split.stream[:end].tolist())
    prompt = opening(corpus)
    assert library.decode(prompt.ids) == whole.partition("lazy dog")[0]
    assert prompt.stop_ids == {library.convert_tokens_to_ids("<|im_end|>"), library.convert_tokens_to_ids(EOT)}
    assert prompt.fitting(5).ids == prompt.ids[-5:]


def test_a_message_is_written_as_the_template_writes_it(tmp_path: Path) -> None:
    folder = make_chat(tmp_path)
    tokenizer = Corpus.open(DataConfig(path=folder)).tokenizer
    library = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer is not None
    message = [{"role": "user", "content": "the fox"}]
    prompt = chat_prompt(tokenizer, [tmp_path / "nowhere", folder], "the fox")
    expected = library.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert prompt.ids == expected
    assert prompt.stop_ids == opening(Corpus.open(DataConfig(path=folder))).stop_ids
    end = library.convert_tokens_to_ids("<|im_end|>")
    assert chat_prompt(tokenizer, [folder], "say <|im_end|>").ids.count(end) == 1
    assert text_prompt(tokenizer, "say <|im_end|>").ids.count(end) == 1


def test_text_begins_as_its_data_does(tmp_path: Path) -> None:
    corpus = Corpus.open(DataConfig(path=make_corpus(tmp_path)))
    assert corpus.heldout is not None
    assert opening(corpus).ids == corpus.heldout.stream[:16].tolist()


def test_a_corpus_without_a_template_answers_no_messages(tmp_path: Path) -> None:
    corpus = Corpus.open(DataConfig(path=make_corpus(tmp_path)))
    assert corpus.tokenizer is not None
    with pytest.raises(DataError, match=r"there is no chat template in .* leave --chat out"):
        chat_prompt(corpus.tokenizer, [tmp_path / "corpus"], "hello")


def test_conversations_never_attend_to_one_another(tmp_path: Path) -> None:
    folder = make_chat(tmp_path)
    assert not Corpus.open(DataConfig(path=folder)).cross_documents
    assert not Corpus.open(DataConfig(path=folder, cross_documents=False)).cross_documents
    with pytest.raises(DataError, match="was made of conversations, which never attend to one another; leave it out"):
        Corpus.open(DataConfig(path=folder, cross_documents=True))
    text = make_corpus(tmp_path / "text")
    assert [Corpus.open(DataConfig(path=text, cross_documents=c)).cross_documents for c in (None, True, False)] == [
        True, True, False,
    ]  # fmt: skip


def test_a_run_on_conversations_shows_an_answer_and_gives_some(tmp_path: Path) -> None:
    corpus = make_chat(tmp_path, heldout_fraction=0.2)
    model = {"preset": "llama-1m", "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 64, "max_tokens": 128}
    sections: dict[str, Any] = {
        "model": model, "batch": {"sequences": 4, "tokens": 64}, "optimizer": {"lr": 1e-2},
        "run": {"steps": 60, "sample_tokens": 24, "eval_sequences": 4},
    }  # fmt: skip
    done = thinwire("train", str(write_run(tmp_path, corpus, **sections)))
    assert done.returncode == 0, done.stderr
    shown = done.stdout.partition("sample ")[2]
    assert "the quick fox?" in shown and "lazy dog" in shown
    refused = thinwire("train", str(write_run(tmp_path, corpus, "crossing", data={"cross_documents": True})))
    assert refused.returncode == 2 and "never attend to one another" in refused.stderr
    answers = [
        thinwire("generate", tmp_path / "run", "--chat", "--prompt", "the quick fox? 3", "--temperature", "0").stdout
        for _ in range(2)
    ]
    assert answers[0] == answers[1] and "lazy dog" in answers[0] and "quick fox" not in answers[0]
    plain = thinwire("generate", tmp_path / "run", "--tokens", "3")
    assert plain.returncode == 0 and "the quick fox?" in plain.stdout
    without = thinwire("generate", tmp_path / "run", "--chat")
    assert without.returncode == 2 and "--chat answers a message; give one with --prompt" in without.stderr


def test_a_template_whose_class_stands_in_a_models_config_is_read_from_the_corpus_alone(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer", CHATML)
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    stated = json.loads(config.read_text())
    del stated["tokenizer_class"]
    config.write_text(json.dumps(stated))
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk(TURNS)}) + "\n")
    options = ChatOptions((str(tmp_path / "talks.jsonl"),), tmp_path / "tokenizer", heldout_fraction=0.0)
    prepare_chat(options, tmp_path / "corpus")
    tokenizer = Corpus.open(DataConfig(path=tmp_path / "corpus")).tokenizer
    assert tokenizer is not None
    prompts = [
        chat_prompt(tokenizer, [folder], "the fox").ids for folder in (tmp_path / "tokenizer", tmp_path / "corpus")
    ]
    assert prompts[0] == prompts[1]
    kept = json.loads((tmp_path / "corpus" / "tokenizer_config.json").read_text())
    assert kept["tokenizer_class"]
