"""`plan` and `simulate` read run files as `train` does: every section, imported and Hugging Face models, no corpus yet."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from runs import make_corpus, make_text, run_tree, thinwire
from thinwire.cli import main
from thinwire.cli.plan import task
from thinwire.config import dump_toml, load
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.data.tokenizer import ByteTokenizer
from thinwire.train.config import RunConfig

ROOT = Path(__file__).parents[2]
CLUSTER = {"preset": "dgx-a100-4"}
TINY = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EVERY_SECTION: dict[str, Any] = {
    "data": {"path": "nowhere", "sources": ["stdlib"], "tokenizer": "bpe:512", "validation_fraction": 0.1},
    "optimizer": {"lr": 1e-3, "clip_norm": 0.5},
    "schedule": {"kind": "wsd", "warmup_steps": 3},
    "checkpoint": {"every_steps": 7},
    "tracking": {"to": ["mlflow"]},
    "run": {"steps": 30, "seed": 5},
}


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "run.toml"
    batch = {"sequences": 64, "tokens": 32}
    path.write_text(tomli_w.dumps({"batch": batch, "cluster": CLUSTER, **sections}))
    return path


def test_a_cluster_is_planned_for_where_there_is_no_torch() -> None:
    words = ["plan", str(ROOT / "examples" / "llama-70b-on-10g.toml"), "--json", "--outer", "never"]
    code = f"import sys; sys.modules['torch'] = None\nfrom thinwire.cli import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_every_key_that_train_takes_is_taken(tmp_path: Path) -> None:
    """The resolved file of a run has them all; one whose compute is emulated has another section."""
    full = load(RunConfig, write(tmp_path, **EVERY_SECTION))
    assert {*type(full).model_fields} == {"model", *EVERY_SECTION, "batch", "cluster", "plan", "compute"}
    (tmp_path / "full.toml").write_text(dump_toml(full))
    assert task(tmp_path / "full.toml", []).setting.spec.vocab_size == 512


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_a_wrong_key_gets_the_same_sentence_as_from_train(verb: str, tmp_path: Path) -> None:
    run = write(tmp_path, **{**EVERY_SECTION, "tracking": {"too": ["mlflow"]}})
    planned, trained = thinwire(verb, run), thinwire("train", run)
    assert (planned.returncode, trained.returncode) == (2, 2)
    assert planned.stderr == trained.stderr
    assert "did you mean 'to'" in planned.stderr


def test_the_vocabulary_is_that_of_the_corpus_or_of_the_one_to_be_made(tmp_path: Path) -> None:
    def planned(**data: Any) -> int:
        return task(write(tmp_path, data={"path": str(tmp_path / "corpus"), **data}), []).setting.spec.vocab_size

    sources = [str(make_text(tmp_path / "text", 3))]
    assert planned(sources=sources, tokenizer="bpe:700") == 700
    assert planned(sources=sources) == ByteTokenizer().vocab_size
    corpus = make_corpus(tmp_path, tokenizer="bpe:300")
    assert planned() == planned(sources=sources, tokenizer="bpe:700") == Corpus.open(DataConfig(path=corpus)).vocab_size


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """An INIT folder."""
    save(LlamaConfig(**TINY, intermediate_size=96, num_key_value_heads=2, max_position_embeddings=128), tmp_path / "hf")
    assert thinwire("import", tmp_path / "hf", "-o", tmp_path / "init").returncode == 0
    return tmp_path / "init"


def save(config: PreTrainedConfig, folder: Path) -> int:
    """Build and save a model; how many parameters it has."""
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return int(model.num_parameters())


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_an_imported_model_is_planned_by_its_own_shapes(verb: str, imported: Path, tmp_path: Path) -> None:
    run = write(tmp_path, model={"init": str(imported)}, tracking={"to": ["mlflow"]})
    assert (found := task(run, [])).setting.spec.model_dump() == json.loads((imported / "init.json").read_text())[
        "spec"
    ]
    assert found.notes == ()
    done = thinwire(verb, run)
    assert (done.returncode, done.stderr) == (0, "")
    as_json = thinwire(verb, run, "--json")
    assert json.loads(as_json.stdout)


def test_an_import_that_is_gone_is_told(tmp_path: Path) -> None:
    done = thinwire("plan", write(tmp_path, model={"init": str(tmp_path / "gone")}))
    assert done.returncode == 2
    assert "holds no init.json; make it with `thinwire import" in done.stderr


def test_an_imported_models_vocabulary_must_hold_the_corpus(imported: Path, tmp_path: Path) -> None:
    data = {"path": "nowhere", "sources": ["stdlib"], "tokenizer": "bpe:4096"}
    done = thinwire("plan", write(tmp_path, model={"init": str(imported)}, data=data))
    assert done.returncode == 2
    assert "model.vocab_size = 300 is smaller than the tokenizer's 4096" in done.stderr


def test_a_family_that_the_formulas_know_is_planned_by_its_own_shapes(tmp_path: Path) -> None:
    shape = {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
    count = save(Qwen2Config(**TINY, **shape, tie_word_embeddings=True), tmp_path / "hf")
    found = task(write(tmp_path, model={"hf": str(tmp_path / "hf")}), [])
    assert found.setting.spec.parameters == count
    assert found.notes == ()


OTHERS = {
    "gpt-neox": GPTNeoXConfig(**TINY, intermediate_size=256, max_position_embeddings=128),
    "opt": OPTConfig(**TINY, ffn_dim=256, max_position_embeddings=128, word_embed_proj_dim=64),
    "bloom": BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4),
    "falcon": FalconConfig(**TINY, max_position_embeddings=128, multi_query=True),
    "mamba": MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2),
    "mixtral": MixtralConfig(
        **TINY, intermediate_size=96, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_model_is_planned_as_a_llama_of_its_size_and_that_is_said(name: str, tmp_path: Path) -> None:
    count = save(OTHERS[name], tmp_path / "hf")
    run = write(tmp_path, model={"hf": str(tmp_path / "hf")})
    (note,), spec = task(run, []).notes, task(run, []).setting.spec
    assert abs(spec.parameters - count) <= 3 * 2 * 64  # one column of the feed-forward layers, of 2 blocks
    assert (spec.hidden, spec.layers, spec.vocab_size) == (64, 2, 300)
    assert note.startswith(f"model.hf is a {OTHERS[name].model_type}, which the formulas do not know")
    assert ("multiplied every token" in note) == (name in ("mixtral", "mamba"))
    done = thinwire("simulate", run)
    assert (done.returncode, done.stderr) == (0, f"thinwire: {note}\n")


def test_adapters_are_planned_as_the_whole_model_and_that_is_said(tmp_path: Path) -> None:
    save(LlamaConfig(**TINY, intermediate_size=96, max_position_embeddings=128), tmp_path / "hf")
    run = write(tmp_path, model={"hf": str(tmp_path / "hf"), "lora": {"rank": 4}})
    (note,) = task(run, []).notes
    assert note.startswith("model.lora is not in the formulas: planned as if all weights were trained")


def test_what_train_refuses_of_a_hugging_face_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    done = thinwire("plan", write(tmp_path, model={"hf": str(tmp_path / "hf")}))
    assert done.returncode == 2
    assert "config.json does not exist" in done.stderr
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "nonesuch"}')
    done = thinwire("simulate", write(tmp_path, model={"hf": str(tmp_path / "hf")}))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_run_file_of_a_run_can_be_planned(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(tomli_w.dumps(run_tree(tmp_path / "run", make_corpus(tmp_path))))
    done = thinwire(
        "plan", tmp_path / "run.toml", "--set", "cluster={preset='dgx-a100-4'}", "--set", "batch.sequences=64"
    )
    assert done.returncode == 0, done.stderr


def test_the_program_of_the_best_plan_is_listed_and_sends_what_the_plan_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(ROOT / "examples" / "frontier-20b.toml")
    listed, said = (_printed(capsys, "plan", file, "--runnable", "--program", *more) for more in ((), ("--json",)))
    answer = json.loads(said)
    classes = answer["program"]["classes"]
    assert f"digest {answer['program']['digest']}:" in listed
    assert listed.count("sent by a rank") == len(classes)
    for text in ("gather the new weights of", "update with the optimizer", "times, each time the next unit"):
        assert text in listed

    def sent(body: list[dict[str, Any]]) -> int:
        return sum(
            item["times"] * sent(item["body"]) if "body" in item else sum(hop["sent_bytes"] for hop in item["hops"])
            for item in body
            if item.get("every", 1) == 1
        )

    by_level = answer["plans"][0]["sent_bytes"].values()
    every_step = sum(n for of in by_level for name, n in of.items() if not name.startswith("outer-"))
    assert sent(classes[0]["body"]) == every_step > 0


def _printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code == 0
    return capsys.readouterr().out
