"""Weights in and out: the same logits as `transformers` to 1e-5 in fp32, for every family and variant."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_models import CONFIGS, logits, save_model, tokens
from runs import make_corpus, run_tree, train_in
from thinwire.config import build
from thinwire.data.corpus import Corpus, DataConfig
from thinwire.evaluate.load import load_run
from thinwire.files.events import steps
from thinwire.hub.export_run import export_run
from thinwire.hub.import_folder import import_folder
from thinwire.hub.init import read_init
from thinwire.hub.shards import ShardReader
from thinwire.model.transformer import Transformer
from thinwire.train.config import RunConfig
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.job import resolve
from worlds import run_world


def load_corpus(path: Path) -> Corpus:
    return Corpus.open(DataConfig(path=path))


def own_logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(tokens())
    return out


def loaded(init: Path) -> Transformer:
    """The model of an INIT folder, without any run."""
    spec, reader = read_init(init).spec, ShardReader(init)
    model = Transformer(spec)
    state = {name: reader.read(name) for name in spec.parameter_shapes()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["head.weight"] if spec.tied else [], [])
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), tokenizer="bpe:300")


@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_model_has_the_same_logits(name: str, tmp_path: Path) -> None:
    theirs = save_model(name, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "init")
    torch.testing.assert_close(own_logits(loaded(tmp_path / "init")), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama-3", "mistral", "qwen2", "qwen3-biases", "gpt2-untied"])
def test_a_run_from_it_exports_the_same_model(name: str, corpus: Path, tmp_path: Path) -> None:
    """Import, one step with a learning rate of next to nothing on two ranks, export: transformers gives its logits."""
    theirs = save_model(name, tmp_path / "hf", max_shard_size="20KB")
    import_folder(tmp_path / "hf", tmp_path / "init", shard_bytes=10_000)
    tree = run_tree(
        tmp_path / "run", corpus, cluster={"levels": [2]}, plan={"partition": "zero3"},
        optimizer={"lr": 1e-30, "weight_decay": 0.0}, schedule={"warmup_steps": 0}, run={"steps": 1},
    )  # fmt: skip
    tree["model"] = {"init": str(tmp_path / "init")}
    run_world([2], train_in, tree)
    done = export_run(tmp_path / "run", tmp_path / "out", shard_bytes=15_000)
    assert done.model_type == CONFIGS[name].model_type
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(back) is type(theirs)
    assert back.dtype == torch.float32
    torch.testing.assert_close(logits(back), logits(theirs), atol=1e-5, rtol=1e-5)
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert back.config.bos_token_id == theirs.config.bos_token_id
    ends = {back.config.eos_token_id, back.generation_config.eos_token_id, load_corpus(corpus).tokenizer.eot}
    assert ends == {AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id}


@pytest.mark.parametrize("levels", [[1], [2, 2]])
def test_training_from_it_starts_at_its_loss_under_any_partition(
    levels: list[int], corpus: Path, tmp_path: Path
) -> None:
    theirs = save_model("qwen2", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "init")
    tree = run_tree(
        tmp_path / "run", corpus, cluster={"levels": levels}, run={"steps": 2}, schedule={"warmup_steps": 0}
    )
    tree["model"] = {"init": str(tmp_path / "init")}
    run_world(levels, train_in, tree)
    job = resolve(Path("run.toml"), build(RunConfig, tree, "run.toml"))
    from thinwire.data.loader import Loader, Packing

    batch = Loader(Packing(job.corpus.train, 32), batch_sequences=16, seed=1234).micro_batches(
        0, rank=0, ranks=1, micro_batch=16
    )[0]
    with torch.no_grad():
        out = theirs(input_ids=torch.from_numpy(batch.tokens_BT), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.from_numpy(batch.targets_BT).flatten())
    first = steps(tmp_path / "run" / EVENTS_FILE)[1]["loss"]
    assert first == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_run_of_ones_own_exports_with_its_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, tokenizer=tokenizer)
    tree = run_tree(tmp_path / "run", corpus, run={"steps": 1}, schedule={"warmup_steps": 0})
    run_world(1, train_in, tree)
    export_run(tmp_path / "run", tmp_path / "out")
    own = load_run(tmp_path / "run")
    ids = torch.randint(0, own.spec.vocab_size, (2, 40))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, own.model(ids), atol=1e-5, rtol=1e-5)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), own.corpus().tokenizer
    assert ours is not None
    text = "def f(self): return 'naïve € 漢字'\n\tpass  "
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eot == back.generation_config.eos_token_id
    made = back.generate(torch.tensor([ours.encode("def")]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape[1] <= len(ours.encode("def")) + 5


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_an_export_in_half_precision_is_the_rounded_weights(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tree = run_tree(tmp_path / "run", make_corpus(tmp_path), run={"steps": 1}, schedule={"warmup_steps": 0})
    run_world(1, train_in, tree)
    export_run(tmp_path / "run", tmp_path / "fp32")
    export_run(tmp_path / "run", tmp_path / "half", precision=precision)  # type: ignore[arg-type]
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "half"))
    assert all(torch.equal(half[name], full[name].to(dtype)) for name in full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == dtype


def test_weights_in_half_precision_stay_so_on_disk_and_are_exact_in_the_run(corpus: Path, tmp_path: Path) -> None:
    model = save_model("llama-2", tmp_path / "hf32").bfloat16()
    model.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "init")
    assert ShardReader(tmp_path / "init").dtype("blocks.0.ffn.up.weight") == torch.bfloat16
    tree = run_tree(tmp_path / "run", corpus, optimizer={"lr": 1e-30, "weight_decay": 0.0}, schedule={"warmup_steps": 0},
                    run={"steps": 1})  # fmt: skip
    tree["model"] = {"init": str(tmp_path / "init")}
    run_world(1, train_in, tree)
    export_run(tmp_path / "run", tmp_path / "out")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert all(torch.equal(ours[name], theirs[name].float()) for name in theirs)


def test_files_of_the_bare_model_and_old_buffers_are_understood(tmp_path: Path) -> None:
    theirs = save_model("gpt2", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    from safetensors.torch import save_file

    save_file(bare, tmp_path / "hf" / "model.safetensors")
    import_folder(tmp_path / "hf", tmp_path / "init")
    torch.testing.assert_close(own_logits(loaded(tmp_path / "init")), logits(theirs), atol=1e-5, rtol=1e-5)


def test_old_rope_keys_mean_the_same(tmp_path: Path) -> None:
    theirs = save_model("llama-3", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    stated = config.pop("rope_parameters")
    config["rope_theta"] = stated.pop("rope_theta")
    config["rope_scaling"] = {**stated, "type": stated["rope_type"]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    import_folder(tmp_path / "hf", tmp_path / "init")
    torch.testing.assert_close(own_logits(loaded(tmp_path / "init")), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_shorter_context_keeps_the_logits(tmp_path: Path) -> None:
    theirs = save_model("gpt2", tmp_path / "hf")
    init = import_folder(tmp_path / "hf", tmp_path / "init", max_tokens=48)
    assert init.spec.max_tokens == 48
    torch.testing.assert_close(own_logits(loaded(tmp_path / "init")), logits(theirs), atol=1e-5, rtol=1e-5)
