"""Losses and bytes of every kind of plan, number by number: is a checkout bit-identical to another?

    python benchmarks/golden.py OUT.json [--source CHECKOUT/src] [--only EXPRESSION]   # run, write
    python benchmarks/golden.py OUT.json --against BEFORE.json                   # run, write, compare

Each plan trains a small model for STEPS steps on 2, 2x2 and 2x2x2 ranks, started as a user starts it, and leaves what
each step's record says: its loss, its gradient norm and the bytes each level sent. Exit status 1 if any number differs.
Numbers of two machines may differ; those of two checkouts on one machine may not.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w

ROOT = Path(__file__).parents[1]
STEPS = 12
LEVELS = ({"node": 2}, {"node": 2, "cluster": 2}, {"node": 2, "cluster": 2, "site": 2})
ROUNDS = {"inner_steps": 4}


def plans(levels: list[str]) -> dict[str, dict[str, Any]]:
    """`[plan]` by name, for these levels, inner to outer."""
    inner, outer = levels[0], levels[-1]
    inside = f"amsp(replica;replica;{outer})"
    found: dict[str, dict[str, Any]] = {
        "ddp": {"partition": "ddp"},
        "zero1": {"partition": "zero1"},
        "zero3 recomputed": {"partition": "zero3", "recompute": "full"},
        "mixed kept": {"partition": f"amsp({inner};{outer};{outer})", "keep_gathered": True},
        "coded": {"partition": "zero3", "compression": {"weights": {outer: "int8"}, "grads": {outer: "int4"}}},
        "bf16": {
            "partition": "zero1",
            "compression": {"weights": {outer: "bf16"}, "grads": {outer: "e3m0"}},
            "compute_dtype": "bf16",
        },
        "error feedback": {
            "partition": inside,
            "compression": {"grads": {outer: "int4-hadamard"}, "error_feedback": True, "rounding": "stochastic"},
        },
        "low rank": {"partition": inside, "compression": {"grads": {outer: "lowrank"}, "rank": 2, "rank_from": 3}},
        "delta": {"partition": inside, "compression": {"weights": {outer: "delta-int8"}, "rounding": "stochastic"}},
    }
    inner_only = "ddp" if len(levels) == 1 else "zero1"
    for kind in ("local_sgd", "diloco", "streaming_diloco", "eager", "co2", "sparse"):
        found[kind] = {"partition": inner_only, "sync": {"kind": kind, **ROUNDS}}
    if len(levels) == 3:
        sync = {
            "kind": "diloco",
            "level": "cluster",
            "sum_inside": "cluster",
            "codec": "int4",
            "fragments": 2,
            **ROUNDS,
        }
        found["summed"] = {"partition": "zero1", "sync": sync}
    return found


def corpus(folder: Path, environment: dict[str, str]) -> Path:
    text = folder / "text"
    text.mkdir()
    for number in range(60):
        words = [f"word{(number * 37 + k * k * 11) % 97}" for k in range(40 + number)]
        (text / f"{number:03d}.txt").write_text(" ".join(words) + "\n")
    out = folder / "corpus"
    thinwire("data", "prepare", str(text), "-o", str(out), "--tokenizer", "bytes", environment=environment)
    return out


def thinwire(*arguments: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from thinwire.cli import main; main()", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"thinwire {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def trained(folder: Path, text: Path, plan: dict[str, Any], levels: dict[str, int], environment: dict[str, str]) -> Any:
    """A record of every step: [loss, gradient norm, bytes]."""
    tree = {
        "model": {
            "preset": "llama-1m",
            "hidden": 32,
            "layers": 3,
            "heads": 2,
            "kv_heads": 1,
            "ffn": 64,
            "max_tokens": 64,
        },
        "data": {"path": str(text)},
        "batch": {"sequences": 16, "tokens": 32, "micro_batch": 1},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "cluster": {"levels": [{"name": name, "fanout": fanout} for name, fanout in levels.items()], "device": "cpu"},
        "checkpoint": {"every_steps": 0},
        "run": {"folder": str(folder), "steps": STEPS, "eval_every": 0, "sample_tokens": 0},
        "plan": plan,
    }
    file = folder.with_suffix(".toml")
    file.write_text(tomli_w.dumps(tree))
    thinwire("train", str(file), environment=environment)
    records = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    return [{key: step.get(key) for key in ("step", "loss", "grad_norm", "wire") if key in step} for step in steps]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, default=ROOT / "src", help="the src folder that runs")
    parser.add_argument("--against", type=Path, help="what an earlier run wrote")
    parser.add_argument("--only", default="", help="a regular expression: plans on worlds whose name it finds")
    asked = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(asked.source.resolve()), "OMP_NUM_THREADS": "1"}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        text = corpus(Path(scratch), environment)
        for levels in LEVELS:
            world = "x".join(map(str, levels.values()))
            for name, plan in plans(list(levels)).items():
                title = f"{world} {name}"
                if re.search(asked.only, title):
                    folder = Path(scratch) / title.replace(" ", "-")
                    results[title] = trained(folder, text, plan, levels, environment)
                    print(f"{title:28s} {results[title][-1]['loss']!r}", flush=True)
    asked.out.write_text(json.dumps(results, indent=1))
    if asked.against is None:
        return 0
    before = json.loads(asked.against.read_text())
    differ = [title for title, steps in results.items() if before.get(title) != steps]
    print(
        f"{len(results) - len(differ)} of {len(results)} equal, number by number" + "".join(f"\n  {t}" for t in differ)
    )
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
