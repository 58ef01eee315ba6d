"""The figures of README.md are those of the formulas, of docs/benchmarks and of docs/log.md, to the digits shown."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from thinwire.config import build
from thinwire.model.presets import preset
from thinwire.plan.hops import Buffer, Link, gather_hops, reduce_hops, refresh_hops
from thinwire.train.config import RunConfig

DOCS = Path(__file__).parents[2] / "docs"
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())


def shown(figure: float, like: str) -> str:
    """`figure` with as many decimals as `like` has."""
    return f"{figure:.{len(like.partition('.')[2])}f}"


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its header."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in found if not set(row[0]) <= {"-"}][1:]


# -- bytes a step ------------------------------------------------------------------------------------------------------

CODECS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8 both ways": {"weights": {"cluster": "int8"}, "grads": {"cluster": "int8"}},
    "int4 gradients and int4 weight deltas": {"weights": {"cluster": "delta-int4"}, "grads": {"cluster": "int4"}},
}
SPEC = preset("llama-3m").model_copy(update={"vocab_size": 2048})
"""The model of `make demo` with its tokenizer's vocabulary."""


def between_nodes(compression: dict[str, Any]) -> int:
    """Bytes that a rank sends between two nodes of two ranks, per step, under `auto`."""
    tree = {"data": {"path": "x"}, "cluster": {"levels": [2, 2], "device": "cpu"}, "plan": {"compression": compression}}
    config = build(RunConfig, tree, "the table")
    plan = config.plan.resolve(config.cluster.resolve(), micro_batch=2, accumulate=1)
    lp, lg, lo = plan.depths
    multiple = 4 * (plan.compression.block if plan.compression.coded else 1)
    links = [Link(level, 2) for level in range(2)]
    sides = [
        tuple(side.get(level) for level in plan.level_names)
        for side in (plan.compression.weights, plan.compression.grads)
    ]
    sent = 0
    for unit in SPEC.units():
        numel = sum(math.prod(SPEC.parameter_shapes()[name]) for name in unit.parameters)
        buffer = Buffer(-(-numel // multiple) * multiple, lp, lg, lo, *sides, block=plan.compression.block)
        hops = [*gather_hops(buffer, links)] * 2
        hops += [*reduce_hops(buffer, links, last=True), *refresh_hops(buffer, links)]
        sent += sum(hop.sent_bytes for hop in hops if hop.level == 1)
    return sent


def test_the_table_of_bytes_between_nodes_is_the_formulas() -> None:
    table = README[README.index("| bytes between two nodes") :].partition("\n\n")[0]
    assert f"2 nodes x 2 ranks, {SPEC.parameters / 1e6:.2f} M parameters" in table
    exact, found = between_nodes({}), rows(table)
    assert len(found) == len(CODECS)
    for (words, mb, share), (name, compression) in zip(found, CODECS.items(), strict=True):
        assert words.startswith("`auto`") and words.endswith(name)
        sent = between_nodes(compression)
        assert (mb, share) == (shown(sent / 1e6, mb), shown(sent / exact, share))


# -- against others ----------------------------------------------------------------------------------------------------

THIN = json.loads((DOCS / "benchmarks" / "thin_network.json").read_text(encoding="utf-8"))
SIDES = {row["side"]: row for row in THIN["rows"]}
EXACT = ("thinwire ddp", "thinwire hsdp", "thinwire auto")
LOSS = json.loads((DOCS / "benchmarks" / "time_to_loss.json").read_text(encoding="utf-8"))


def of_least(*sides: str) -> float:
    return max(SIDES[side]["sent_mb"] for side in sides) / THIN["limits"]["least_exact_mb"]


def faster(side: str, other: str, rate: int) -> float:
    ours, theirs = (SIDES[name]["rates"][f"{rate} Mbit/s"]["tokens_per_s"] for name in (side, other))
    return float(ours / theirs)


def of_ddp(side: str) -> float:
    """Seconds to the loss of torch DDP over those that it took itself, the median of the seeds."""
    ends = {(run["side"], run["seed"]): run["looks"][-1]["seconds"] for run in LOSS["runs"]}
    return statistics.median(s / ends["torch DDP", seed] for (name, seed), s in ends.items() if name == side)


def said(sentence: str) -> list[str]:
    """The figures that README.md has where `sentence` has an N."""
    found = re.findall(re.escape(sentence).replace("N", r"(\d+(?:\.\d+)?)"), PROSE)
    assert len(found) == 1, f"README.md says {sentence!r} {len(found)} times"
    return [found[0]] if isinstance(found[0], str) else list(found[0])


CLAIMS = {
    "two ranks, N M parameters": THIN["limits"]["least_exact_mb"] / 4,
    "exact plans send N of the least possible bytes": of_least(*EXACT),
    "least possible bytes; torch DDP N": of_least("torch DDP"),
    "DeepSpeed's ZeRO N": of_least("DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"),
    "FSDP2 N. At": of_least("FSDP2"),
    "`auto` trains at N of torch DDP's tokens/s": faster("thinwire auto", "torch DDP", 100),
    "and at N with int4": faster("thinwire auto+int4", "torch DDP", 100),
    "low-rank gradients at N of the PowerSGD": faster("thinwire hsdp+lowrank4", "DDP + PowerSGD 4", 20),
    "4-bit messages sends N MB a step": SIDES["thinwire streaming e3m0"]["sent_mb"],
    "trains at N of the tokens/s of torchft": faster("thinwire streaming e3m0", "torchft DiLoCo", 20),
    "DiLoCo, which sends N MB": SIDES["torchft DiLoCo"]["sent_mb"],
    "every 10 steps takes N of DDP's time": of_ddp("thinwire streaming e3m0"),
    "`auto` with int4 N, low": of_ddp("thinwire auto+int4"),
    "low rank N;": of_ddp("thinwire hsdp+lowrank5"),
    "the PowerSGD hook N,": of_ddp("DDP + PowerSGD 4"),
    "the fp16 hook N,": of_ddp("DDP + fp16 hook"),
    "exact `auto` N,": of_ddp("thinwire auto"),
    "FSDP2-HSDP N.": of_ddp("FSDP2-HSDP"),
}


@pytest.mark.parametrize("sentence", CLAIMS)
def test_a_figure_beside_a_peers_is_the_benchmarks(sentence: str) -> None:
    (figure,) = said(sentence)
    assert figure == shown(CLAIMS[sentence], figure)


PAIRS = {
    "it keeps N and N of the speed": ("summed e3m0, `lead` 2", 1, 4),
    "longest step takes N and N times": ("summed e3m0, `lead` 2", 2, 5),
    "torchft's DiLoCo keeps N and N and stalls": ("torchft DiLoCo", 1, 4),
    "stalls for N and N steps' time": ("torchft DiLoCo", 2, 5),
    "its streaming form keeps N and N and stalls": ("torchft streaming", 1, 4),
    "and stalls for N and N (": ("torchft streaming", 2, 5),
}


@pytest.mark.parametrize("sentence", PAIRS)
def test_a_figure_of_groups_that_add_up_first_is_the_logs(sentence: str) -> None:
    log = (DOCS / "log.md").read_text(encoding="utf-8")
    entry = log.split("\n## 2026-11-23: groups that add up first, five and three rounds with the peers\n")[1]
    side, *columns = PAIRS[sentence]
    (row,) = [row for row in rows(entry.partition("\n## ")[0]) if row[0] == side]
    figures = said(sentence)
    assert figures == [shown(float(row[column]), figure) for column, figure in zip(columns, figures, strict=True)]
