"""Wrong folders, keys, shards and targets: one sentence that names them, status 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hub_models import save_model
from runs import make_corpus, thinwire, write_run
from thinwire.cli import main
from thinwire.errors import CheckpointError, ConfigError, ThinwireError
from thinwire.hub.families import read_spec, write_config
from thinwire.hub.import_folder import import_folder
from thinwire.hub.init import read_init, verify_init
from thinwire.hub.names import recipes
from thinwire.hub.shards import plan_shards, write_shards
from thinwire.model.presets import preset, preset_names
from thinwire.model.spec import ModelSpec

LLAMA = {
    "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 10, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (LLAMA, {"model_type": "mamba"}, "of model_type 'mamba', which is not supported; there are llama, mistral"),
        (LLAMA, {"model_type": None}, "names no model_type"),
        (LLAMA, {"vocab_size": 0}, "vocab_size = 0 is not a whole number above 0"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers = True is not a whole number above 0"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' is not a number above 0"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not true or false"),
        (LLAMA, {"is_causal": False}, "is_causal = False is not supported, only True is"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "the key 'partial_rotary_factor' (= 0.5) is not supported"),
        (LLAMA, {"rope_interleaved": True}, "the key 'rope_interleaved' (= True) is not supported"),
        (GPT2, {"is_causal": False}, "is_causal = False"),
        (LLAMA, {"hidden_size": "8"}, "hidden_size = '8' is not a whole number above 0"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads = 0 is not a whole number"),
        (LLAMA, {"num_key_value_heads": 3}, "heads = 2 is not divisible by kv_heads = 3"),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only 'silu' and 'swish' are"),
        (LLAMA, {"logit_scale": 0.5}, "the key 'logit_scale' (= 0.5) is not supported"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "the key 'quantization_config'"),
        (LLAMA, {"auto_map": {"AutoModel": "x.Y"}}, "the key 'auto_map'"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type = 'yarn' is not supported",
        ),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling has no key 'factor'"),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "rope_scaling: factor = '2' is not a number above 0",
        ),
        (LLAMA, {"rope_scaling": [1]}, "rope_scaling = [1] is not a JSON object"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is of one kind of layer"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
        (
            LLAMA,
            {"model_type": "mistral", "sliding_window": 8},
            "sliding_window = 8 leaves out tokens farther than 8 back, which is not supported for 16 positions",
        ),
        (
            LLAMA,
            {"model_type": "mistral", "max_position_embeddings": 8192},
            "sliding_window is missing, which means 4096 for mistral, leaves out",
        ),
        (
            LLAMA,
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "sliding_window = 8 leaves out tokens farther than 8 back",
        ),
        (LLAMA, {"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "use_sliding_window is not true"),
        (LLAMA, {"model_type": "qwen3", "layer_types": ["chunked_attention"]}, "layer_types has 'chunked_attention'"),
        (GPT2, {"activation_function": "relu"}, "activation_function = 'relu'"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_key(
    base: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    tree = {key: value for key, value in {**base, **change}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        read_spec(tree, "config.json")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_switched_off_ignored_or_outside_the_context_is_no_trouble() -> None:
    read_spec({**LLAMA, "use_mrope": False, "quantization_config": None}, "config.json")
    read_spec({**LLAMA, "logit_scale": 0.5}, "config.json", ignored=["logit_scale"])
    with pytest.raises(ConfigError, match="has no key 'logit_scal', so --ignore logit_scal has nothing to leave out"):
        read_spec({**LLAMA, "logit_scale": 0.5}, "config.json", ignored=["logit_scal"])
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 8}
    assert read_spec(mistral, "config.json", max_tokens=8).max_tokens == 8
    assert read_spec({**LLAMA, "model_type": "qwen2", "sliding_window": 8}, "config.json").max_tokens == 16
    with pytest.raises(ConfigError, match="16 learned positions; --max-tokens 17 is more"):
        read_spec(GPT2, "config.json", max_tokens=17)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_its_config(name: str) -> None:
    """Config of a spec, spec of that config: equal, and every tensor has a name of its own."""
    spec = preset(name)
    assert read_spec(write_config(spec), "config.json") == spec
    parts = [part for recipe in recipes(spec) for part in recipe.parts]
    assert len({part.name for part in parts}) == len(parts)
    for recipe in recipes(spec):
        assert sum(part.rows for part in recipe.parts) == recipe.shape[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "not qwen3: biases in q, k and v"),
        (
            {"hidden": 30, "heads": 4, "kv_heads": 4, "head_size": 8, "qk_norm": False, "out_bias": True},
            "not divisible",
        ),
        ({"family": "gpt2", "kv_heads": 2, "bias": True}, "kv_heads must be heads"),
    ],
)
def test_a_model_that_no_family_holds_is_not_exported_as_another(change: dict[str, Any], says: str) -> None:
    fields = {"vocab_size": 9, "hidden": 32, "layers": 1, "heads": 4, "kv_heads": 4, "head_size": 8, "ffn": 8,
              "max_tokens": 8}  # fmt: skip
    with pytest.raises(ConfigError, match="no Hugging Face family can hold this model") as caught:
        write_config(ModelSpec(**{**fields, **change}))
    assert says in str(caught.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "hf"
    save_model("qwen2", folder, max_shard_size="20KB")
    return folder


def _tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of the shard that holds the final norm."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != path.name}
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])


def _add(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.sinks"] = tensors["model.norm.weight"].clone()


def _quantise(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].char()


def _narrow(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def _rename(tensors: dict[str, Any]) -> None:
    tensors["model.final.weight"] = tensors.pop("model.norm.weight")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: max(f.glob("*.safetensors")).unlink(), "is missing; its index names it"),
        (_cut, "is cut short or no safetensors file"),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "is no index of shards"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "holds neither model.safetensors nor"),
        (lambda f: _tensors(f, _add), "a tensor 'model.layers.0.self_attn.sinks' that this architecture has no place"),
        (lambda f: _tensors(f, _quantise), "is stored as I8; quantised weights are not supported"),
        (lambda f: _tensors(f, _narrow), "'model.norm.weight' is (31,) in the weights, by its config (32,)"),
        (lambda f: _tensors(f, _rename), "'model.norm.weight' is missing in the weights"),
    ],
)
def test_a_damaged_folder_is_refused_and_nothing_is_written(good: Path, tmp_path: Path, damage: Any, says: str) -> None:
    shutil.copytree(good, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ThinwireError) as caught:
        import_folder(tmp_path / "hf", tmp_path / "init")
    assert says in str(caught.value)
    assert caught.value.exit_status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_that_changed_after_the_import_are_found(good: Path, tmp_path: Path) -> None:
    init = import_folder(good, tmp_path / "init")
    verify_init(read_init(init.folder), digests=True)
    path = init.folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    verify_init(init, digests=False)
    with pytest.raises(CheckpointError, match="has changed since it was imported"):
        verify_init(init, digests=True)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing; import the model again"):
        verify_init(init, digests=False)


def test_the_command_line_from_import_to_export(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb's words, and the ways to get them wrong."""
    corpus = make_corpus(tmp_path, tokenizer="bpe:300")
    done = thinwire("import", good, "-o", tmp_path / "init")
    assert done.returncode == 0, done.stderr
    assert f'init = "{tmp_path / "init"}"' in done.stdout
    again = thinwire("import", good, "-o", tmp_path / "init")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    run = write_run(tmp_path, corpus, run={"steps": 2}, schedule={"warmup_steps": 0})
    _set_model(run, f'init = "{tmp_path / "init"}"')
    trained = thinwire("train", run)
    assert trained.returncode == 0, trained.stderr
    shutil.rmtree(tmp_path / "init")
    longer = thinwire("train", run, "--set", "run.steps=3")
    assert longer.returncode == 0, longer.stderr
    wrong: list[tuple[list[Any], str]] = [
        (["export", tmp_path / "run", "-o", corpus], "exists already"),
        (["export", tmp_path / "run", "-o", "/proc/nothing/out"], "cannot be written"),
        (["export", tmp_path / "run", "-o", tmp_path / "x", "--family", "gpt2"], "the model is of the llama family"),
        (["export", tmp_path / "run", "-o", tmp_path / "x", "--family", "gpt9"], "there is no family 'gpt9'"),
        (["export", tmp_path / "run", "-o", tmp_path / "x", "--precision", "int8"], "--precision int8 is unknown"),
        (["export", tmp_path / "run", "-o", tmp_path / "x", "--shard-size", "much"], "--shard-size: 'much'"),
        (["export", tmp_path / "run", "-o", tmp_path / "x", "--step", "9"], "no checkpoint of step 9"),
        (["export", corpus, "-o", tmp_path / "x"], "is no run folder"),
        (["import", tmp_path, "-o", tmp_path / "x"], "config.json does not exist"),
        (["train", run, "--fresh"], "is missing; import the model again"),
    ]
    for arguments, says in wrong:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr().err
        assert left.value.code == 2, said
        assert says in said
        assert len(said.strip().splitlines()) == 1
        assert not (tmp_path / "x").exists()
    out = thinwire("export", tmp_path / "run", "-o", tmp_path / "out", "--shard-size", "20 KB")
    assert out.returncode == 0, out.stderr
    assert "step 3" in out.stdout and "as qwen2" in out.stdout


def _set_model(run: Path, text: str) -> None:
    lines = run.read_text().split("[data]")
    run.write_text(f"[model]\n{text}\n\n[data]" + lines[1])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ('init = "nowhere"', "nowhere holds no init.json; make it with"),
        ('init = "INIT"\nlayers = 3', "gives the whole model; leave layers out"),
        ('hf = "nowhere"', "nowhere/config.json does not exist"),
        ('hf = "INIT"\ninit = "INIT"', "gives the whole model; leave hf out"),
        ('init = "INIT"', "is smaller than the tokenizer's 310; prepare the corpus with the tokenizer.json of that"),
    ],
)
def test_a_wrong_init_is_answered_before_anything_starts(good: Path, tmp_path: Path, model: str, says: str) -> None:
    import_folder(good, tmp_path / "init")
    run = write_run(tmp_path, make_corpus(tmp_path, tokenizer="bpe:310"))
    _set_model(run, model.replace("INIT", str(tmp_path / "init")))
    done = thinwire("train", run)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert not (tmp_path / "run").exists()


_PEAK = """
import sys
from pathlib import Path
from thinwire.hub.import_folder import import_folder
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
import_folder(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=8_000_000)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_an_import_holds_one_shard_not_the_model(tmp_path: Path) -> None:
    import torch

    spec = read_spec({**LLAMA, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8,
                      "intermediate_size": 1024,
                      "num_hidden_layers": 40, "vocab_size": 1000}, "config.json")  # fmt: skip
    parts = [(part.name, recipe.part_shape(part)) for recipe in recipes(spec) for part in recipe.parts]
    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in parts}
    folder = tmp_path / "hf"
    folder.mkdir()
    write_shards(folder, ((name, torch.zeros(shape)) for name, shape in parts), sizes, limit=8_000_000)
    (folder / "config.json").write_text(json.dumps(write_config(spec)))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, folder, tmp_path / "init"], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    grown_kb = int(done.stdout)
    assert sum(sizes.values()) > 400e6
    assert grown_kb * 1024 < 100e6, f"{grown_kb} kB"


def test_shards_keep_order_and_size() -> None:
    sizes = {"a": 4, "b": 4, "c": 20, "d": 1, "e": 7}
    shards = plan_shards(sizes, 8)
    assert shards == [["a", "b"], ["c"], ["d", "e"]]
    assert [name for shard in shards for name in shard] == list(sizes)
