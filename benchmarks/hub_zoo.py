"""Imports models of 52 public config shapes: each has the logits that transformers has, or is refused with its key named.

    OMP_NUM_THREADS=1 python benchmarks/hub_zoo.py --md docs/benchmarks/hub_zoo.md

transformers builds each model from the public keys with small sizes and random weights; the folder gets the public file's
keys. `equal`: the largest difference of any logit is at most 3e-5. Exits with 1 if any is neither equal nor refused.
"""

import argparse
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hub_shapes import SHAPES, Config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from thinwire.errors import ThinwireError
from thinwire.hub.import_folder import import_folder
from thinwire.hub.shards import ShardReader
from thinwire.model.transformer import Transformer

TOLERANCE, VOCABULARY, TOKENS = 3e-5, 320, 96
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
_SMALL_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}
_NOT_BUILT = ("quantization_config", "auto_map")
"""Keys without which transformers builds the model: they need kernels, or code of their own."""


@dataclass(frozen=True)
class Row:
    """One shape: what became of it, the largest difference of a logit, and what was said."""

    name: str
    model_type: str
    outcome: str
    difference: float | None
    said: str


def small(config: Config) -> Config:
    """The public keys with small sizes, and token ids that fit them."""
    sizes = dict(_SMALL_GPT2 if config["model_type"] == "gpt2" else _SMALL)
    if config.get("head_dim"):
        sizes["head_dim"] = 32
    ids = {
        key: value % VOCABULARY for key, value in config.items() if key.endswith("token_id") and isinstance(value, int)
    }
    return {**config, **ids, **sizes, **({"eos_token_id": 2} if isinstance(config.get("eos_token_id"), list) else {})}


def build(config: Config, folder: Path) -> PreTrainedModel:
    """The model by transformers, every parameter random, saved in `folder` beside the public keys."""
    keys = {key: value for key, value in config.items() if key not in (*_NOT_BUILT, "model_type")}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **keys), attn_implementation="eager"
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.3) if parameter.dim() == 1 else parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def own_logits(folder: Path, init: Path, tokens_BT: torch.Tensor, max_tokens: int | None = None) -> torch.Tensor:
    """(B, T, V), by this project's model with the imported weights. Raises ThinwireError if the import is refused."""
    made = import_folder(folder, init, max_tokens=max_tokens, force=True)
    reader = ShardReader(init)
    model = Transformer(made.spec)
    model.load_state_dict({name: reader.read(name) for name in made.spec.parameter_shapes()}, strict=False)
    with torch.no_grad():
        return model.eval()(tokens_BT)  # type: ignore[no-any-return]


def judge(name: str, config: Config, folder: Path) -> Row:
    """Import the shape; where a shorter context is named as the way out, take it and compare too."""
    tree, tokens_BT = (
        small(config),
        torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1)),
    )
    model = build(tree, folder / "hf")
    with torch.no_grad():
        theirs = model(input_ids=tokens_BT, use_cache=False).logits
    kind = str(config["model_type"])
    try:
        difference = float((own_logits(folder / "hf", folder / "init", tokens_BT) - theirs).abs().max())
    except ThinwireError as error:
        return _refused(
            name, kind, tree, str(error).removeprefix(f"{folder / 'hf' / 'config.json'}"), folder, tokens_BT, theirs
        )
    except Exception as error:
        return Row(name, kind, "wrong", None, f"{type(error).__name__}: {error}")
    return Row(name, kind, "equal" if difference <= TOLERANCE else "wrong", difference, "")


def _refused(
    name: str, kind: str, tree: Config, said: str, folder: Path, tokens_BT: torch.Tensor, theirs: torch.Tensor
) -> Row:
    keys = [key for key in (*tree, "sliding_window") if re.search(rf"\b{re.escape(key)}\b", said)]
    said = said.strip(": ")
    if not keys:
        return Row(name, kind, "wrong", None, f"no key is named: {said}")
    shorter = re.search(r"--max-tokens (\d+)", said)
    if shorter is None:
        return Row(name, kind, f"refused: `{keys[0]}`", None, said)
    ours = own_logits(folder / "hf", folder / "init", tokens_BT, int(shorter[1]))
    difference = float((ours - theirs).abs().max())
    outcome = f"refused: `{keys[0]}`" if difference <= TOLERANCE else "wrong"
    return Row(name, kind, outcome, difference, f"with --max-tokens {shorter[1]}: equal")


def table(rows: Sequence[Row]) -> str:
    """The page, as Markdown."""
    equal = sum(row.outcome == "equal" for row in rows)
    refused = sum(row.outcome.startswith("refused") for row in rows)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    lines = [
        "# Public config shapes, imported", "",
        f"`python benchmarks/hub_zoo.py`, {datetime.date.today()}, {versions}, CPU. Of {len(rows)} shapes {equal} are",
        f"equal (no logit of 2 x {TOKENS} tokens differs from transformers' by more than {TOLERANCE:g}), {refused} are",
        f"refused with the key named, {len(rows) - equal - refused} are wrong. Keys are the hub's; sizes are small, and",
        "weights are random, made by transformers.", "",
        "| shape | model_type | outcome | largest difference | said |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        said = row.said.replace("|", "/")
        lines.append(f"| {row.name} | {row.model_type} | {row.outcome} | {difference} | {said} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a pattern that names have to match")
    parser.add_argument("--md", type=Path, help="write the table there")
    options: Any = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for name, config in SHAPES.items():
        if re.search(options.only, name):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(judge(name, config, Path(folder)))
            print(f"{rows[-1].outcome:28} {rows[-1].difference or 0:9.1e}  {name}  {rows[-1].said}", flush=True)
    if options.md is not None:
        options.md.write_text(table(rows), encoding="utf-8")
    return int(any(row.outcome == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
