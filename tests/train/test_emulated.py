"""Emulated compute: a run sends what the real one sends, sleeps for what was asked for, and leaves no model."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from jump import Jump
from runs import make_corpus, run_tree, thinwire, write_run
from thinwire.cli.emulated import factors, setting_of
from thinwire.comm.world import World
from thinwire.config import build
from thinwire.errors import ConfigError
from thinwire.files.events import read_events, steps
from thinwire.hub.native_spec import NativeSpec
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer
from thinwire.parallel.apply import apply_recompute
from thinwire.report.figures import loss_figures
from thinwire.report.page import page
from thinwire.report.read import read_run
from thinwire.train.assemble import assemble
from thinwire.train.clock import StepClock
from thinwire.train.config import ComputeConfig, RunConfig
from thinwire.train.emulate import Emulated, Pace, SleepingUpdate
from thinwire.train.job import read_config, refuse_emulating, resolve
from thinwire.train.loop import synchronise, train_step
from thinwire.train.stop import StopRequest
from worlds import run_world

INSTANT = {"embedding": [0, 0], "block": [0, 0], "head": [0, 0]}
SECONDS = ComputeConfig(embedding=(1, 2), block=(10, 20), head=(100, 200), update=0.5)
DEVICE = {"name": "any", "kind": "cpu", "peak_flops_per_s": "1 TFLOP/s"}

CODED = {"weights": {"cluster": "int8"}, "grads": {"cluster": "int4"}, "error_feedback": True}
GPT2 = {"family": "gpt2", "kv_heads": 2, "bias": True, "tied": True}
PLANS: dict[str, dict[str, Any]] = {
    "ddp": {"plan": {"partition": "ddp"}},
    "zero1, recompute": {"plan": {"partition": "zero1", "recompute": "full"}},
    "zero3, a tied gpt2": {"plan": {"partition": "zero3"}, "model": GPT2},
    "auto, bf16, codecs": {"plan": {"partition": "auto", "compute_dtype": "bf16", "compression": CODED}},
}
MORE: dict[str, dict[str, Any]] = {
    "zero1": {"plan": {"partition": "zero1"}},
    "zero2": {"plan": {"partition": "zero2"}},
    "hsdp": {"plan": {"partition": "hsdp"}},
    "auto": {"plan": {"partition": "auto"}},
    "zero3, kept": {"plan": {"partition": "zero3", "keep_gathered": True}},
    "zero3, recompute": {"plan": {"partition": "zero3", "recompute": "full"}},
    "zero3, one micro-batch": {"plan": {"partition": "zero3"}, "batch": {"micro_batch": 4}},
    "rounds": {"plan": {"partition": "zero3", "sync": {"kind": "diloco", "level": "cluster", "inner_steps": 1}}},
}


def _course(world: World, tree: dict[str, Any]) -> tuple[list[list[str]], list[Counter[tuple[str, ...]]]]:
    """What the engine issued in each of two steps, in order; every collective of each step."""
    job = resolve(Path("run.toml"), build(RunConfig, tree, "run.toml"))
    parts = assemble(job, world)
    parts.feed.start(0)
    world.ledger.drain()
    clock, issued, sent = StepClock(world.device), [], []
    try:
        for step in range(2):
            clock.start()
            record, _ = train_step(job, parts, step, clock, StopRequest())
            synchronise(parts, step + 1, tokens=record["tokens"], last=step == 1)
            parts.sharded.drain()
            issued.append(list(parts.sharded.timeline))
            found = world.ledger.drain().entries
            sent.append(
                Counter((e.level, e.kind, e.purpose, str(e.payload_bytes), str(e.sent_bytes), e.codec) for e in found)
            )
    finally:
        parts.feed.close()
    return issued, sent


def _courses(world: World, trees: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[bool]:
    return [_course(world, real) == _course(world, emulated) for real, emulated in trees]


@pytest.mark.parametrize("plans", [PLANS, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_every_collective_and_the_order_in_which_the_engine_issues_are_those_of_the_real_run(
    tmp_path: Path, plans: dict[str, dict[str, Any]]
) -> None:
    corpus = make_corpus(tmp_path)
    cluster = {"levels": [2, 2], "device": DEVICE}
    real = [run_tree(tmp_path / "run", corpus, cluster=cluster, **sections) for sections in plans.values()]
    trees = [(tree, {**tree, "compute": INSTANT}) for tree in real]
    for same in run_world([2, 2], _courses, trees, sockets=[1]):
        assert dict(zip(plans, same, strict=True)) == dict.fromkeys(plans, True)


# -- seconds --------------------------------------------------------------------------------------------------------------


def _model(**changes: Any) -> Transformer:
    fields = {"family": "llama", "vocab_size": 11, "hidden": 8, "layers": 3, "heads": 2, "kv_heads": 1, "head_size": 4}
    return Transformer(ModelSpec(**{**fields, "ffn": 16, "max_tokens": 8, "tied": False, **changes}))


def _slept(model: Transformer, clock: Jump) -> dict[str, tuple[float, float]]:
    """Seconds of forward and backward of each unit, by the clock, in one micro-batch."""
    units = {"embedding": model.embedding, "norm": model.norm, "head": model.head}
    units |= {f"blocks.{index}": block for index, block in enumerate(model.blocks)}
    moments: dict[str, list[float]] = {name: [] for name in units}
    for name, unit in units.items():
        unit.register_forward_pre_hook(lambda *_, name=name: moments[name].append(clock.now()))

        def after(module: Any, args: Any, out: torch.Tensor, name: str = name) -> None:
            moments[name].append(clock.now())
            out.register_hook(lambda _: moments[name].append(clock.now()))

        unit.register_forward_hook(after)
    ids = torch.zeros(2, 4, dtype=torch.long)
    model(ids, ids).backward()
    begins = [*sorted(each[2] for each in moments.values()), clock.now()]
    ends = dict(pairwise(begins))
    return {name: (after_s - before_s, ends[back_s] - back_s) for name, (before_s, after_s, back_s) in moments.items()}


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"family": "gpt2", "bias": True, "kv_heads": 2}])
def test_every_unit_sleeps_for_the_seconds_that_were_asked_for(changes: dict[str, Any]) -> None:
    model, clock = _model(**changes), Jump()
    Emulated(model, SECONDS, Pace(clock=clock))
    slept = _slept(model, clock)
    for index in range(3):
        assert slept[f"blocks.{index}"] == pytest.approx((10, 20))
    assert slept["embedding"] == (1, 2)
    assert slept["head"] == (100, 200)
    assert clock.slept_s == pytest.approx(1 + 2 + 3 * (10 + 20) + 100 + 200)


def test_a_slow_rank_takes_longer_for_everything_and_a_recomputed_block_takes_its_forward_again() -> None:
    model, clock = _model(), Jump()
    pace = Pace(factor=1.5, clock=clock)
    Emulated(model, SECONDS, pace)
    apply_recompute(model.blocks)
    ids = torch.zeros(2, 4, dtype=torch.long)
    model(ids, ids).backward()
    assert clock.slept_s == pytest.approx(1.5 * (1 + 2 + 3 * (10 + 20 + 10) + 100 + 200))
    begun_s, numbers = clock.now(), [torch.zeros(5, requires_grad=True), torch.zeros(7, requires_grad=True)]
    numbers[0].grad = torch.zeros(5)
    SleepingUpdate([{"params": numbers}], pace=pace, update_s=SECONDS.update).step()
    assert clock.now() - begun_s == pytest.approx(1.5 * 0.5 * 5), "of the numbers that have a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_zeros_of_its_own_shape_which_nobody_writes(dtype: torch.dtype) -> None:
    model = _model(tied=True).to(dtype)
    Emulated(model, SECONDS, Pace(clock=Jump()))
    ids = torch.zeros(2, 4, dtype=torch.long)
    model(ids, ids).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = grads[name]
        assert grad is not None and (grad.shape, grad.dtype) == (parameter.shape, dtype), name
        assert not grad.any()
    assert len({grad.untyped_storage().data_ptr() for grad in grads.values() if grad is not None}) == 1


class _Late(Jump):
    """Every sleep lasts 0.25 s too long."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds + 0.25)


def test_what_a_sleep_lasts_too_long_is_taken_off_the_next() -> None:
    clock = _Late()
    pace = Pace(clock=clock)
    for _ in range(40):
        pace.spend(0.125)
        pace.spend(2)
    assert clock.slept_s == pytest.approx(40 * 2.125 + 0.25)


def test_a_late_rank_that_waits_for_others_has_lost_nothing_by_it() -> None:
    clock = _Late()
    waited = {"s": 0.0}
    pace = Pace(clock=clock, waited=lambda since: waited["s"])
    for seconds, late in ((0.0, 0.0), (0.125, 0.125), (3.0, 0.25)):
        before_s = clock.slept_s
        waited["s"] = seconds
        pace.spend(1)
        assert clock.slept_s - before_s == pytest.approx(1 + 0.25 - (0.25 - late if before_s else 0.0))


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_says_first_that_it_is_emulated_has_no_losses_and_leaves_no_model(tmp_path: Path) -> None:
    cluster = {"levels": [2], "device": DEVICE}
    path = write_run(tmp_path, make_corpus(tmp_path), cluster=cluster, run={"steps": 4, "eval_every": 1, "sample_tokens": 9},
                     compute={**INSTANT, "slow": [1, 2], "source": "a guess"}, checkpoint={"every_steps": 1})  # fmt: skip
    folder = tmp_path / "run"
    done = thinwire("train", path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(
        "compute is emulated: ranks sleep as long as any would compute (a guess) and train nothing"
    )
    assert "rank 1 takes 2 times as long" in lines[1]
    assert "emulated compute, no loss" in done.stdout
    assert not any(word in done.stdout for word in ("validation at", "saved", "checkpoints/", "of which no token"))
    recorded = steps(folder / "events.jsonl")
    assert sorted(recorded) == [1, 2, 3, 4]
    assert all(r["loss"] is None and r["grad_norm"] is None and not r["skipped"] for r in recorded.values())
    assert {record["event"] for record in read_events(folder / "events.jsonl")} == {"run_start", "step", "run_end"}
    assert next(iter(read_events(folder / "events.jsonl", "run_start")))["emulated"]["slow"] == [1, 2]
    seen = read_run(folder, "run")
    assert seen.emulated
    assert loss_figures([seen]) == []
    assert "run: compute was emulated, so there is no loss." in page([seen], ["not asked for"])
    assert not (folder / "checkpoints").exists() or not list((folder / "checkpoints").iterdir())
    for words in (["eval", folder], ["generate", folder, "--prompt", "x"], ["export", folder, "-o", tmp_path / "out"]):
        refused = thinwire(*words)
        assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
        assert "whose compute was emulated" in refused.stderr
    assert not (tmp_path / "out").exists()
    again = thinwire("train", path)
    assert again.returncode == 2
    assert "keeps nothing to go on from; start anew with --fresh" in again.stderr
    real = json.loads(json.dumps(run_tree(folder, tmp_path / "corpus", cluster=cluster)))
    other = write_run(tmp_path, tmp_path / "corpus", "other", cluster=cluster, run={**real["run"], "steps": 4})
    assert "holds a run with another configuration (compute was" in thinwire("train", other).stderr


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"compute": {"block": [1, 1]}}, "compute.embedding: is required"),
        ({"compute": {**INSTANT, "block": [1, -1]}}, "non-negative"),
        ({"compute": {**INSTANT, "slow": [1]}}, "1 factors for 2 ranks"),
        ({"compute": {**INSTANT, "slow": [0, 1]}}, "greater than 0"),
        ({"compute": INSTANT, "run": {"compile": True}}, "leave run.compile out"),
        ({"compute": INSTANT, "cluster": {"device": "cpu"}}, "no peak_flops_per_s is known"),
    ],
)
def test_wrong_input_gets_one_sentence(tmp_path: Path, sections: dict[str, Any], says: str) -> None:
    corpus = make_corpus(tmp_path)
    cluster = {"levels": [2], "device": DEVICE, **sections.get("cluster", {})}
    with pytest.raises(ConfigError, match=says):
        tree = run_tree(tmp_path / "run", corpus, **{**sections, "cluster": cluster})
        resolve(Path("run.toml"), build(RunConfig, tree, "run.toml"))


def test_a_model_of_another_library_is_refused() -> None:
    with pytest.raises(ConfigError, match="a model of transformers"):
        refuse_emulating(NativeSpec.model_construct())


def test_slow_ranks_are_named_with_a_factor_each() -> None:
    assert factors([], 4) == ()
    assert factors(["3=1.5", "0=2"], 4) == (2, 1, 1, 1.5)
    for wrong in (["4=2"], ["1"], ["1=0"], ["1=nan"], ["-1=2"], ["x=2"], ["1=2", "1=3"], ["1=inf"]):
        with pytest.raises(ConfigError, match="--slow"):
            factors(wrong, 4)


def test_the_table_is_handed_over_as_it_is(tmp_path: Path) -> None:
    table = SECONDS.model_copy(update={"source": 'a "b" \\ c, ü', "slow": (1.0, 1.5)})
    path = write_run(tmp_path, tmp_path, cluster={"levels": [2]})
    assert read_config(path, [setting_of(table)]).compute == table
