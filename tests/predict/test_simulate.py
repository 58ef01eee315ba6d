"""The simulator equals its lower bound where nothing contends, conserves bytes, and slow things make steps slower."""

import json
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thinwire.cli import app, main
from thinwire.cli.simulate import timeline, write_trace
from thinwire.cluster.cluster import Cluster, Level
from thinwire.cluster.hardware import device_preset
from thinwire.cluster.hardware import preset as cluster_preset
from thinwire.files.trace import Span, read_trace
from thinwire.model.presets import preset
from thinwire.plan.passes import before, passes
from thinwire.predict.bound import least_s
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.perturbation import Failures, Perturbation, goodput, run_with_failures
from thinwire.predict.placement import place
from thinwire.predict.planned import planned
from thinwire.predict.queue import Clock, Message, SendStream, Signal, Worker, chain
from thinwire.predict.simulate import Simulated, simulate_step
from thinwire.predict.step import core_of

SPEC = preset("llama-2-7b")


def states_bytes(given: Setting, candidate: Candidate) -> dict[int, dict[str, int]]:
    """level -> purpose -> bytes a step, small sums left out."""
    sent = planned(given, candidate, place(candidate, given.cluster, given.calibration)).sent_bytes()
    return {level: {name: n for name, n in sent[level].items() if name != "control"} for level in sent}


def setting(*fanouts: int, sequences: int = 64, rate: float = 2e11, latency: float = 1e-5) -> Setting:
    names = ("node", "cluster", "site")
    levels = [Level(name=names[i], fanout=n, bytes_per_s=rate, latency_s=latency) for i, n in enumerate(fanouts)]
    return Setting(SPEC, Cluster(device=device_preset("a100-80g"), levels=tuple(levels)), sequences, 2048)


def simulate(given: Setting, candidate: Candidate, perturbation: Perturbation | None = None) -> Simulated:
    return simulate_step(given, candidate, place(candidate, given.cluster, given.calibration), perturbation)


def least(given: Setting, candidate: Candidate) -> float:
    axes = place(candidate, given.cluster, given.calibration)
    return least_s(given, candidate, axes, core_of(given, candidate, axes))


UNCONTENDED = [
    ((8,), Candidate()),
    ((8,), Candidate(depths=(-1, -1, 0), micro_batch=2)),
    ((8,), Candidate(depths=(0, 0, 0))),
    ((8,), Candidate(depths=(0, 0, 0), recompute="full", keep_gathered=True)),
    ((8, 4), Candidate(depths=(-1, -1, 1), micro_batch=2)),
    ((8, 4), Candidate(tensor=8, depths=(-1, -1, 1))),
    ((8,), Candidate(pipeline=8)),
    ((8, 4), Candidate(tensor=2, pipeline=4, depths=(-1, -1, 1), recompute="full")),
    ((4, 8), Candidate(pipeline=8, depths=(-1, -1, 0))),
]


@pytest.mark.parametrize(("fanouts", "candidate"), UNCONTENDED)
@pytest.mark.parametrize("sequences", [64, 256])
def test_without_contention_the_simulator_is_its_bound(
    fanouts: tuple[int, ...], candidate: Candidate, sequences: int
) -> None:
    """Up to the slowing down of compute beside the first weights and the last gradients."""
    given = setting(*fanouts, sequences=sequences)
    seconds = simulate(given, candidate).step_s
    assert 0.975 * seconds < least(given, candidate) <= seconds * (1 + 1e-9)


def test_interleaving_equals_its_bound_without_sends_to_wait_for() -> None:
    given = setting(8, latency=0.0, rate=1e15)
    for chunks in (2, 4):
        candidate = Candidate(pipeline=8, chunks=chunks)
        assert simulate(given, candidate).step_s == pytest.approx(least(given, candidate), rel=5e-3)


def slower_outside(times: float, sequences: int) -> Setting:
    """Four nodes of 8, the level between them slower than the one inside."""
    given = setting(8, 4, sequences=sequences)
    fast, slow = given.cluster.levels
    slow = slow.model_copy(update={"bytes_per_s": slow.bytes_per_s / times})
    return replace(given, cluster=given.cluster.model_copy(update={"levels": (fast, slow)}))


def test_the_bound_is_near_where_partitions_contend_for_streams() -> None:
    """Every cut over two levels, with 1, 2 and 8 micro-batches: ZeRO-3's gathers and reductions share streams."""
    cuts = [
        Candidate(depths=depths, keep_gathered=keep)
        for depths in combinations_with_replacement((-1, 0, 1), 3)
        for keep in ([False, True] if depths[0] >= 0 else [False])
    ]
    settings = [slower_outside(times, sequences) for times in (1, 2, 5, 20) for sequences in (32, 64, 256)]
    apart = [1 - least(given, cut) / simulate(given, cut).step_s for given in settings for cut in cuts]
    assert min(apart) > -1e-9 and max(apart) < 0.12
    assert sum(apart) / len(apart) < 0.025


@pytest.mark.parametrize("sequences", [64, 96, 128, 512])
@pytest.mark.parametrize("times", [10, 50, 160])
def test_a_level_that_every_micro_batch_fills_sets_the_step(times: int, sequences: int) -> None:
    """Gradients cut over a slow level are sent after each of 2 to 16 micro-batches, and pile up there."""
    given = slower_outside(times, sequences)
    for parameters_at in (-1, 0):
        candidate = Candidate(depths=(parameters_at, 1, 1))
        assert simulate(given, candidate).step_s == pytest.approx(least(given, candidate), rel=0.003)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(4, 8, 1), (4, 3, 1), (4, 8, 2), (4, 4, 3), (2, 8, 4)])
def test_every_stage_passes_every_micro_batch_forward_then_backward(
    stages: int, micro_batches: int, chunks: int
) -> None:
    for stage in range(stages):
        found = passes(stage, stages, micro_batches, chunks)
        assert len(found) == len(set(found)) == 2 * micro_batches * chunks
        for each in found:
            if not each.forward:
                assert found.index(each) > found.index(each._replace(forward=True))
            needed = before(each, stage, stages, chunks)
            assert needed is None or (0 <= needed[0] < stages and 0 <= needed[1].chunk < chunks)


def test_streams_carry_one_message_at_a_time_and_collectives_wait_for_all() -> None:
    clock, spans = Clock(), list[Span]()
    streams = [SendStream(clock, rank, "node", None, spans.append) for rank in range(2)]
    both, alone = Message("both", 2.0, [], 2), Message("alone", 1.0, [], 1)
    done = Signal()
    chain([alone], [streams[0]], Signal())
    chain([both], [streams[0]], done)
    clock.at(5.0, lambda: chain([both], [streams[1]], Signal()))
    assert clock.run() == 7.0
    assert done.done
    assert [(s.rank, s.name, s.start_s, s.end_s) for s in spans] == [
        (0, "alone", 0.0, 1.0), (0, "both", 5.0, 7.0), (1, "both", 5.0, 7.0),
    ]  # fmt: skip


def test_compute_is_slower_only_while_messages_are_under_way() -> None:
    clock, spans = Clock(), list[Span]()
    worker = Worker(clock, 0, 1.0, spans.append)
    stream = SendStream(clock, 0, "node", worker, spans.append)
    worker.compute("work", 3.0, lambda: None)
    clock.at(1.0, lambda: stream.join(Message("m", 2.0, [], 1)))
    clock.run()
    work = next(span for span in spans if span.name == "work")
    assert work.end_s == pytest.approx(4.0)  # 1 alone, 2 at half speed, 1 alone


@pytest.mark.parametrize("depths", [(-1, -1, -1), (-1, -1, 1), (0, 0, 1), (0, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("keep", [False, True])
def test_streams_are_busy_for_as_long_as_the_formulas_bytes_take(depths: tuple[int, int, int], keep: bool) -> None:
    given = setting(4, 2, latency=0.0, sequences=16)
    candidate = Candidate(depths=depths, keep_gathered=keep and depths[0] >= 0)
    axes = place(candidate, given.cluster, given.calibration)
    simulated = simulate(given, candidate)
    for hop in axes.states:
        level = given.cluster.level_names[hop.level]
        sent = sum(states_bytes(given, candidate).get(hop.level, {}).values())
        assert simulated.busy_s.get(f"0:{level}", 0.0) == pytest.approx(sent / hop.bytes_per_s, rel=1e-3)


def test_a_slow_rank_holds_everyone_up_and_a_slow_level_too() -> None:
    given = setting(8, 4)
    for candidate in (Candidate(depths=(0, 0, 1)), Candidate(tensor=2, pipeline=4, depths=(-1, -1, 1))):
        plain = simulate(given, candidate).step_s
        slow = simulate(given, candidate, Perturbation(slow_ranks={(3, 0): 1.5})).step_s
        assert 1.1 * plain < slow < 1.55 * plain
        assert simulate(given, candidate, Perturbation(slow_ranks={(3, 0): 1.0})).step_s == pytest.approx(
            plain, rel=1e-9
        )
        assert simulate(given, candidate, Perturbation(slow_levels={1: 30.0})).step_s > plain


def test_jitter_comes_from_its_seed_and_many_ranks_wait_longer_for_the_slowest() -> None:
    def step(seed: int, nodes: int) -> float:
        given = setting(8, nodes, sequences=8 * nodes * 2)
        return simulate(given, Candidate(depths=(-1, -1, 1)), Perturbation(jitter=0.05, seed=seed)).step_s

    assert step(1, 4) == step(1, 4) != step(2, 4)
    assert step(1, 4) < step(1, 64)


def test_failures_cost_what_the_formula_says() -> None:
    failures = Failures(rank_mtbf_s=1e6, checkpoint_s=20, restart_s=100)
    expected = goodput(failures, 100)
    runs = [run_with_failures(1.0, 300_000, failures, 100, seed=seed) for seed in range(4)]
    mean = sum(run.goodput for run in runs) / len(runs)
    assert mean == pytest.approx(expected.share, abs=0.02)
    rarely = run_with_failures(1.0, 300_000, failures, 100, interval_s=20 * expected.interval_s)
    assert rarely.goodput < mean


def test_sixteen_thousand_ranks_are_folded() -> None:
    cluster = cluster_preset("h100-400g-2048")
    given = Setting(preset("llama-3.1-405b"), cluster, 2048, 8192)
    candidate = Candidate(tensor=8, pipeline=16, depths=(-1, -1, 1), recompute="full")
    simulated = simulate(given, candidate)
    assert simulated.events < 20_000
    assert len(simulated.ranks) == 16


def test_the_trace_is_what_took_place(tmp_path: Path) -> None:
    simulated = simulate(setting(8, 4), Candidate(tensor=2, pipeline=4, depths=(-1, -1, 1)))
    write_trace(simulated, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(span.rank, span.lane, span.name) for span in read_trace(tmp_path / "trace.json")] == [
        (span.rank, span.lane, span.name) for span in simulated.spans
    ]
    complete = [event for event in events if event["ph"] == "X"]
    assert max(event["ts"] + event["dur"] for event in complete) == pytest.approx(simulated.step_s * 1e6)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in complete} == named
    by_stream: dict[tuple[int, int], float] = {}
    for event in sorted(complete, key=lambda event: event["ts"]):
        stream = (event["pid"], event["tid"])
        assert event["ts"] >= by_stream.get(stream, 0.0) - 1e-3  # nothing overlaps in a stream
        by_stream[stream] = event["ts"] + event["dur"]
    lines = timeline(simulated, width=60)
    assert lines[0].startswith("stage 0 compute")
    assert "F" in lines[0]
    assert "B" in lines[0]


def test_the_command_plays_a_step(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        '[model]\npreset = "llama-2-7b"\n[batch]\nsequences = 64\ntokens = 2048\n[cluster]\npreset = "dgx-a100-4"\n'
    )
    trace = tmp_path / "step.json"
    arguments = ["simulate", str(run_file), "--plan", "pipeline=4,tensor=2,partition=zero1", "--trace", str(trace)]
    result = CliRunner().invoke(app, [*arguments, "--slow-rank", "0:1:1.3", "--mtbf-hours", "20000"])
    assert result.exit_code == 0, result.output
    assert "one step simulated" in result.output
    assert "stage 3 compute" in result.output
    assert "replica 0" in result.output
    assert "of the time is progress" in result.output
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slow-rank", "0:9:2"], "there is no stage 9"),
        (["--slow-rank", "fast"], "is not REPLICA:STAGE:FACTOR"),
        (["--slow-level", "moon:2"], "there is no level 'moon'"),
        (["--slow-level", "node:0"], "is not LEVEL:FACTOR"),
        (["--plan", "tensor=7"], "tensor=7 does not divide"),
        (["--codecs", "int2"], "is unknown; there are none, bf16 and all"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        '[model]\npreset = "llama-2-7b"\n[batch]\nsequences = 32\ntokens = 2048\n[cluster]\npreset = "dgx-a100-4"\n'
        '[plan]\npartition = "zero1"\nrecompute = "full"\n'
    )
    with pytest.raises(SystemExit) as caught:
        main(["simulate", str(run_file), "--runnable", *arguments])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("depths", [(-1, -1, -1), (-1, -1, 1), (0, 0, 1), (1, 1, 1)])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_slower_rank_never_shortens_a_step(depths: tuple[int, int, int], stages: int) -> None:
    """It comes to the messages of a level in another order than the others: nobody waits in a circle."""
    given = setting(2, 4, rate=1e9, sequences=64)
    candidate = Candidate(pipeline=stages, depths=depths)
    seconds = [
        simulate(given, candidate, Perturbation(slow_ranks={(1, stages - 1): factor})).step_s
        for factor in (1.0, 1.02, 1.1, 1.5, 2.0, 4.0)
    ]
    # Another order of messages may be a little better: hence not quite sorted.
    assert all(slower >= (1 - 1e-3) * faster for faster, slower in pairwise(seconds))
    assert seconds[-1] > seconds[0]
    assert seconds[0] == pytest.approx(simulate(given, candidate).step_s, rel=1e-9)


def test_units_that_travel_together_cost_a_small_model_fewer_latencies() -> None:
    level = Level(name="node", fanout=2, bytes_per_s=1e8, latency_s=0.03)
    given = Setting(preset("llama-3m"), Cluster(device=device_preset("a100-80g"), levels=(level,)), 8, 128)
    for depths in ((-1, -1, -1), (0, 0, 0)):
        alone, together = (simulate(given, Candidate(depths=depths, bucket_bytes=size)).step_s for size in (0, None))
        assert together < alone
