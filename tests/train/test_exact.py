"""Exactness: any split of the batch gives the same losses; a resumed run the same bits; the maths is the plain loop's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from runs import make_corpus, run_tree, thinwire, train_in, write_run
from thinwire.comm.world import World
from thinwire.config import build
from thinwire.data.loader import Loader, Packing
from thinwire.files.events import read_events, steps
from thinwire.model.transformer import Transformer
from thinwire.train.config import RunConfig
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.job import Job, resolve
from thinwire.train.schedule import lr_at
from worlds import run_world


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


def job_of(tree: dict[str, Any]) -> Job:
    return resolve(Path("run.toml"), build(RunConfig, tree, "run.toml"))


def losses(levels: list[int], folder: Path, corpus: Path, **sections: dict[str, Any]) -> list[float]:
    """The loss of every step of a run on a real world."""
    tree = run_tree(folder, corpus, **{**sections, "cluster": {"levels": levels}})
    run_world(levels, train_in, tree)
    recorded = steps(folder / EVENTS_FILE)
    return [recorded[step]["loss"] for step in sorted(recorded)]


def reference_losses(corpus: Path, tmp_path: Path, dtype: torch.dtype) -> list[float]:
    """The same training as a bare PyTorch loop: whole batches, mean loss, torch's own AdamW and clipping."""
    job = job_of(run_tree(tmp_path, corpus))
    model = Transformer(job.spec, seed=job.config.run.seed).to(dtype)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    loader = Loader(Packing(job.corpus.train, 32), batch_sequences=16, seed=job.config.run.seed)
    out = []
    for step in range(20):
        batch = loader.micro_batches(step, rank=0, ranks=1, micro_batch=16)[0]
        logits = model(torch.from_numpy(batch.tokens_BT))
        loss = F.cross_entropy(logits.view(-1, job.spec.vocab_size), torch.from_numpy(batch.targets_BT).view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, peak=3e-3, total_steps=20, schedule=job.config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


SPLITS = [([1], 16), ([1], 4), ([2], 8), ([2], 2), ([4], 4), ([4], 1), ([2, 2], 1)]


@pytest.mark.parametrize(("dtype", "tolerance"), [pytest.param("fp32", 1e-5, marks=pytest.mark.slow), ("fp64", 1e-10)])
def test_every_split_of_the_batch_gives_the_plain_loops_losses(
    corpus: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    torch_dtype = {"fp32": torch.float32, "fp64": torch.float64}[dtype]
    expected = reference_losses(corpus, tmp_path / "reference", torch_dtype)
    assert expected[-1] < expected[0] - 1
    for number, (levels, micro_batch) in enumerate(SPLITS):
        got = losses(
            levels, tmp_path / str(number), corpus, batch={"micro_batch": micro_batch}, plan={"compute_dtype": dtype}
        )
        assert got == pytest.approx(expected, rel=tolerance), (levels, micro_batch)


def test_recompute_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    plain = losses([2], tmp_path / "plain", corpus)
    assert losses([2], tmp_path / "recomputed", corpus, plan={"recompute": "full"}) == plain


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    run = {"steps": 5, "compile": True}
    plain = losses([2], tmp_path / "plain", corpus, run={"steps": 5})
    assert losses([2], tmp_path / "compiled", corpus, run=run) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("partition", ["zero3", "hsdp", pytest.param("auto", marks=pytest.mark.slow), "zero1"])
def test_any_partition_trains_and_resumes_under_any_other(corpus: Path, tmp_path: Path, partition: str) -> None:
    plain = losses([2, 2], tmp_path / "plain", corpus, plan={"partition": "ddp"}, schedule={"kind": "constant"})
    run = {"steps": 10}
    losses([2, 2], tmp_path / "cut", corpus, plan={"partition": partition}, run=run, schedule={"kind": "constant"})
    both = losses([4], tmp_path / "cut", corpus, plan={"partition": "ddp"}, schedule={"kind": "constant"})
    assert both == pytest.approx(plain, rel=1e-5)


def test_documents_kept_apart_train_to_the_same_losses_on_any_world(corpus: Path, tmp_path: Path) -> None:
    one = losses([1], tmp_path / "1", corpus, data={"cross_documents": False})
    two = losses([2], tmp_path / "2", corpus, data={"cross_documents": False}, batch={"micro_batch": 1})
    assert two == pytest.approx(one, rel=1e-5)


def test_bf16_compute_with_fp32_masters_learns_alike(corpus: Path, tmp_path: Path) -> None:
    exact = losses([1], tmp_path / "fp32", corpus)
    rough = losses([1], tmp_path / "bf16", corpus, plan={"compute_dtype": "bf16"})
    assert rough == pytest.approx(exact, rel=0.03)
    assert rough != exact


def test_a_run_resumed_on_another_world_goes_on_with_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    whole = losses([1], tmp_path / "whole", corpus)
    schedule = {"kind": "constant"}
    whole = losses([1], tmp_path / "constant", corpus, schedule=schedule)
    first = losses([1], tmp_path / "parts", corpus, schedule=schedule, run={"steps": 10})
    both = losses([4], tmp_path / "parts", corpus, schedule=schedule, batch={"micro_batch": 2})
    assert first == whole[:10]
    assert both == pytest.approx(whole, rel=1e-5)


WIRES: dict[str, dict[str, Any]] = {
    "int8": {"weights": {"node": "int8"}},
    "differences, feedback by chance": {
        "weights": {"node": "delta-int4"},
        "grads": {"node": "int4-hadamard"},
        "error_feedback": True,
        "rounding": "stochastic",
    },
}


@pytest.mark.parametrize("compression", WIRES.values(), ids=WIRES)
def test_a_run_with_compressed_weights_resumes_bit_for_bit(
    corpus: Path, tmp_path: Path, compression: dict[str, Any]
) -> None:
    plan: dict[str, Any] = {
        "plan": {"partition": "zero1", "compression": compression},
        "schedule": {"kind": "constant", "warmup_steps": 1},
    }
    whole = losses([2], tmp_path / "whole", corpus, run={"steps": 8}, **plan)
    for saved in (2, 5):
        first = losses([2], tmp_path / str(saved), corpus, run={"steps": saved}, **plan)
        both = losses([2], tmp_path / str(saved), corpus, run={"steps": 8}, **plan)
        assert first == whole[:saved]
        assert both == whole


def test_weights_that_begin_uncompressed_after_a_change_of_plan_are_told(corpus: Path, tmp_path: Path) -> None:
    run, schedule = {"steps": 3}, {"kind": "constant"}
    plan = {"partition": "zero1", "compression": {"weights": {"node": "int8"}}}
    path = write_run(tmp_path, corpus, cluster={"levels": [2]}, run=run, schedule=schedule, plan=plan)
    told = "weights begin uncompressed"
    for steps_in_all, codec, expected in [(3, "int8", False), (4, "int8", False), (5, "bf16", True)]:
        changed = ["--set", f"run.steps={steps_in_all}", "--set", f"plan.compression.weights.node={codec}"]
        done = thinwire("train", path, *changed)
        assert done.returncode == 0, done.stderr
        assert (told in " ".join((done.stdout + done.stderr).split())) == expected, done.stdout


def _poisoned(world: World, tree: dict[str, Any], bad_steps: list[int]) -> str:
    """Train with a loader whose batches make the loss infinite at some steps, on one rank only."""
    from thinwire.errors import DivergenceError
    from thinwire.train import loop

    plain = loop.forward
    calls = {"count": 0}

    def forward(parts: Any, batch: Any) -> Any:
        loss, valid = plain(parts, batch)
        calls["count"] += 1
        return (loss * float("inf") if world.rank == 1 and calls["count"] in bad_steps else loss), valid

    loop.forward = forward
    try:
        train_in(world, tree)
    except DivergenceError as error:
        return str(error)
    finally:
        loop.forward = plain
    return "finished"


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(corpus: Path, tmp_path: Path) -> None:
    tree = run_tree(tmp_path / "run", corpus, batch={"micro_batch": 8}, run={"max_bad_steps": 3})
    tree["cluster"] = {"levels": [2]}
    assert run_world(2, _poisoned, tree, [4, 5]) == ["finished"] * 2
    recorded = steps(tmp_path / "run" / EVENTS_FILE)
    assert [step for step, record in recorded.items() if record["skipped"]] == [4, 5]
    assert float(recorded[20]["loss"]) < float(recorded[1]["loss"])


def test_too_many_bad_steps_stop_the_run_and_name_the_last_good_checkpoint(corpus: Path, tmp_path: Path) -> None:
    tree = run_tree(tmp_path / "run", corpus, batch={"micro_batch": 8}, run={"max_bad_steps": 3})
    tree["cluster"] = {"levels": [2]}
    for said in run_world(2, _poisoned, tree, [7, 8, 9]):
        assert "3 steps in a row, up to step 9" in said
        assert "step-00000005" in said


def test_wire_bytes_of_a_step_are_the_all_reduces(corpus: Path, tmp_path: Path) -> None:
    losses([2], tmp_path / "run", corpus, run={"steps": 3}, schedule={"warmup_steps": 1})
    job = job_of(run_tree(tmp_path / "run", corpus))
    for record in steps(tmp_path / "run" / EVENTS_FILE).values():
        sent = record["wire"]["node"]
        gradient = sum(bytes_sent for purpose, bytes_sent in sent.items() if purpose != "control")
        assert gradient == pytest.approx(4 * job.spec.parameters, rel=2e-3)
        assert sent["control"] < 200
        assert sum(record["seconds"].values()) == pytest.approx(record["step_s"], abs=1e-4)


INT4 = {"grads": {"cluster": "int4"}, "weights": {"cluster": "delta-int4"}}


@pytest.mark.parametrize(
    "plan", [{"partition": "zero1"}, {"partition": "auto", "compression": INT4}], ids=["zero1", "auto-int4"]
)
def test_wire_bytes_over_two_levels_add_up_to_the_formula_exactly(
    plan: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    more = {"plan": plan, "checkpoint": {"every_steps": 3}}
    run = {"steps": 5, "eval_every": 2}
    losses([2, 2], tmp_path / "run", corpus, run=run, schedule={"warmup_steps": 1}, **more)
    log = tmp_path / "run" / EVENTS_FILE
    predicted = next(read_events(log, "run_start"))["wire_predicted"]
    assert len(predicted) == 2
    records = list(steps(log).values())
    for level, purposes in predicted.items():
        for purpose, count in purposes.items():
            assert sum(record["wire"][level].get(purpose, 0) for record in records) == len(records) * count


def test_the_resumed_run_refuses_another_configuration(corpus: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, run={"steps": 3}, schedule={"warmup_steps": 1})
    assert thinwire("train", path).returncode == 0
    refused = thinwire("train", path, "--set", "optimizer.beta2=0.5")
    assert refused.returncode == 2
    assert "optimizer.beta2 was 0.95, now 0.5" in refused.stderr
    longer = thinwire("train", path, "--set", "run.steps=5", "--set", "optimizer.lr=0.002")
    assert longer.returncode == 0, longer.stderr
    assert "going on with" in longer.stdout
    assert "optimizer.lr was 0.003, it is 0.002 from step 4 on" in longer.stdout
    assert (
        "which moves the schedule: step 3 had a learning rate that a run of 5 steps would not have given it"
        in longer.stdout
    )
    assert sorted(steps(tmp_path / "run" / EVENTS_FILE)) == [1, 2, 3, 4, 5]
    fresh = thinwire("train", path, "--fresh", "--set", "optimizer.lr=0.5")
    assert fresh.returncode == 0
    assert (tmp_path / "run.1" / "run.toml").exists()


def test_a_corpus_whose_ids_exceed_the_models_vocabulary_gets_one_sentence(corpus: Path, tmp_path: Path) -> None:
    """A Megatron file pair comes without its tokenizer, so only reading it tells."""
    (index,) = corpus.glob("train*.idx")
    path = write_run(tmp_path, index.with_suffix(""), model={"vocab_size": 60})
    done = thinwire("train", path)
    assert done.returncode == 2
    assert "the model a vocabulary of 60" in done.stderr
    assert "Traceback" not in done.stderr
