"""What an export says of itself: the tokenizer's end of text everywhere, files that can be read, a card with figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from hub_models import save_model
from runs import make_corpus, run_tree, train_in
from thinwire.data.chat import ChatOptions, prepare_chat
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.data.prepare import Options, prepare
from thinwire.files.events import read_events
from thinwire.hub.export_run import export_run
from thinwire.hub.import_folder import import_folder
from thinwire.train.folder import EVENTS_FILE
from worlds import run_world

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog. You are a helpful assistant. Hello there, I am fine.\n" * 30
SPECIALS = ["<bos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<stop>"]


def write_tokenizer(folder: Path, **config: Any) -> Tokenizer:
    """A byte-level BPE of 300 ids with `SPECIALS` first, and a tokenizer_config.json that says `config`."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return library


def ids_in(folder: Path) -> tuple[str, Any, Any]:
    """The end of text of an exported folder: the tokenizer's, config.json's and generation_config.json's."""
    config, generation = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    return AutoTokenizer.from_pretrained(folder).eos_token, config["eos_token_id"], generation["eos_token_id"]


def run_on(folder: Path, corpus: Path, model: dict[str, str], **sections: Any) -> Path:
    tree = run_tree(folder, corpus, run={"steps": 2}, schedule={"warmup_steps": 0}, **sections)
    tree["model"] = model
    run_world(1, train_in, tree)
    return folder


def talks(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"I am {i} fine."}]}
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["init", "hf"])
def test_after_a_chat_fine_tune_every_file_ends_texts_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    """The weights' config says 2 (<|im_start|> here); the tokenizer's own is <stop>, and answers end with <|im_end|>."""
    save_model("llama-2", tmp_path / "hf")
    tokens = write_tokenizer(
        tmp_path / "hf",
        eos_token={"__type": "AddedToken", "content": "<stop>", "special": True},
        chat_template=TEMPLATE,
    )
    stop, turn = tokens.token_to_id("<stop>"), tokens.token_to_id("<|im_end|>")
    prepare_chat(ChatOptions((str(talks(tmp_path / "talks.jsonl")),), tmp_path / "hf"), tmp_path / "corpus")
    if kind == "init":
        import_folder(tmp_path / "hf", tmp_path / "init")
    run_on(tmp_path / "run", tmp_path / "corpus", {kind: str(tmp_path / kind)}, data={"path": str(tmp_path / "corpus")})
    export_run(tmp_path / "run", tmp_path / "out")
    assert ids_in(tmp_path / "out") == ("<stop>", stop, [stop, 2, turn])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).startswith(
        "<|im_start|>user\nx"
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [stop, 2, turn]


def test_a_model_of_ones_own_keeps_the_tokenizers_files_and_their_end(tmp_path: Path) -> None:
    tokens = write_tokenizer(tmp_path / "tok", eos_token="<stop>", bos_token="<bos>", chat_template=TEMPLATE)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    prepare(Options((str(tmp_path / "text.txt"),), str(tmp_path / "tok" / "tokenizer.json")), tmp_path / "corpus")
    assert Corpus.open(DataConfig(path=tmp_path / "corpus")).tokenizer.eot == tokens.token_to_id("<stop>")  # type: ignore[union-attr]
    run = run_on(tmp_path / "run", tmp_path / "corpus", {"preset": "llama-1m"})
    export_run(run, tmp_path / "out")
    assert ids_in(tmp_path / "out") == ("<stop>", tokens.token_to_id("<stop>"), tokens.token_to_id("<stop>"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<bos>"


def test_sampling_settings_and_a_list_of_ends_stay_as_they_came(tmp_path: Path) -> None:
    save_model("llama-2", tmp_path / "hf")
    tokens = write_tokenizer(tmp_path / "hf", eos_token="<|endoftext|>")
    end = tokens.token_to_id("<|endoftext|>")
    (tmp_path / "hf" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, end], "temperature": 0.6, "do_sample": True})
    )
    import_folder(tmp_path / "hf", tmp_path / "init")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    prepare(
        Options((str(tmp_path / "text.txt"),), str(tmp_path / "init" / "hub" / "tokenizer.json")), tmp_path / "corpus"
    )
    export_run(run_on(tmp_path / "run", tmp_path / "corpus", {"init": str(tmp_path / "init")}), tmp_path / "out")
    assert ids_in(tmp_path / "out") == ("<|endoftext|>", end, [3, end])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize("window", [64, None, ...], ids=["a number", "null", "missing"])
def test_a_sliding_window_is_stated_as_it_was_imported(window: Any, tmp_path: Path) -> None:
    save_model("mistral", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    tree = {**json.loads(path.read_text()), "sliding_window": window}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))
    import_folder(tmp_path / "hf", tmp_path / "init")
    run = run_on(tmp_path / "run", make_corpus(tmp_path, tokenizer="bpe:300"), {"init": str(tmp_path / "init")})
    export_run(run, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.get("sliding_window", ...) == window
    assert MistralConfig.from_pretrained(tmp_path / "out").sliding_window == (4096 if window is ... else window)
    export_run(run, tmp_path / "llama", model_type="llama")
    assert "sliding_window" not in json.loads((tmp_path / "llama" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["init", "hf"])
def test_files_can_be_read_by_others_and_the_card_has_the_runs_figures(kind: str, tmp_path: Path) -> None:
    save_model("qwen2", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "init")
    run = run_on(tmp_path / "run", make_corpus(tmp_path, tokenizer="bpe:300"), {kind: str(tmp_path / kind)})
    export_run(run, tmp_path / "out", precision="bf16")
    for folder in (tmp_path / "out", tmp_path / "init"):
        assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()} == {
            path.name: "0o644" for path in folder.rglob("*") if path.is_file()
        }
    card = (tmp_path / "out" / "README.md").read_text()
    last = list(read_events(run / EVENTS_FILE, "eval"))[-1]
    assert f"| validation loss at step 2 | {last['loss']:.4f} |" in card
    assert f"| validation perplexity | {last['perplexity']:.2f} |" in card
    assert "| steps | 2 of 2 |" in card
    assert "A qwen2 model of" in card
    assert "in bf16" in card
    assert f'base_model: "{tmp_path / kind}"' in card
    assert re.match(r"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- thinwire\n", card)
