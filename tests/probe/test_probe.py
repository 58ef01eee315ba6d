"""The probe: fits invert the cost formulas, real ranks are timed, and what is written is what planning reads."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import thinwire
from thinwire.cluster.cluster import Calibration, Cluster, Device, Level, read_cluster
from thinwire.comm.world import World
from thinwire.predict.block import block_passes, gather_hops
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.placement import Axes, Hop
from thinwire.probe.effort import BlockShape, Effort
from thinwire.probe.fit import (
    Timings,
    blocks_show,
    line,
    matmul_curve,
    measured_cluster,
    non_negative,
    summary,
    sustained,
)
from thinwire.probe.measure import measure, parts
from worlds import cluster_of, run_world

BLOCK = BlockShape(32, 2, 64, 1, 16)
TINY = Effort(
    ((16, 32, 32), (64, 64, 64)), (2**16, 2**18), (2**10, 2**16), repeats=3, blocks=(BLOCK,), codecs=("int8",)
)


def test_a_link_is_found_again_from_times_that_the_cost_formula_gives() -> None:
    hop = Hop(level=0, fanout=4, bytes_per_s=2e8, latency_s=3e-4, alone=1.0)
    sent = [3 * 2**power for power in range(10, 25, 3)]
    start_s, rate = line({each: gather_hops(each * 4 / 3, [hop])[0] for each in sent})
    assert start_s == pytest.approx(3 * 3e-4) and rate == pytest.approx(2e8)


def test_the_rate_of_a_busy_link_is_not_that_of_what_its_buffers_swallow() -> None:
    burst, rate = 50_000, 12.5e6
    seconds = {size: 1e-3 + max(0, size - burst) / rate for size in (2**10, 2**16, 2**20, 2**22)}
    assert line(seconds)[1] > 1.1 * rate and sustained(seconds) == pytest.approx(rate)
    assert sustained({1000: 2e-3}) == pytest.approx(5e5) and sustained({1000: 2e-3, 2000: 1e-3}) == pytest.approx(2e6)


def test_times_that_do_not_grow_with_size_still_give_a_rate() -> None:
    start_s, rate = line({1000: 2e-3, 100_000: 1e-3})
    assert start_s >= 0 and rate > 0


def test_a_matmul_curve_is_found_again() -> None:
    half, shapes = 24.0, [(m, d, d) for m in (32, 256, 4096) for d in (64, 1024, 8192)]
    rates = {s: 1e12 * (s[0] / (s[0] + half)) * (s[1] / (s[1] + half)) * (s[2] / (s[2] + half)) for s in shapes}
    peak, efficiency, found = matmul_curve(rates)
    assert found == pytest.approx(half, rel=0.05)
    assert peak * efficiency == pytest.approx(1e12, rel=0.02)


BLOCKS = [BlockShape(h, 4, 3 * h, b, t) for h in (128, 256, 512) for b, t in ((1, 64), (4, 128))]
CPU = Cluster(
    device=Device(kind="cpu", peak_flops_per_s=1e11, memory_bytes=2**30, memory_bytes_per_s=1e10),
    levels=(Level(name="node", fanout=1),),
)
FLAT = Calibration(
    matmul_efficiency=0.8, matmul_half=8, memory_efficiency=0.5, memory_backward=1.5, launch_s=2e-5, weight_s=3e-10
)


def _blocks_take(flat: Calibration) -> dict[BlockShape, tuple[float, float]]:
    """(seconds of a forward, of a forward and a backward) by the cost formulas."""
    shown = {}
    for shape in BLOCKS:
        given = Setting(shape.spec, CPU, shape.sequences, shape.tokens, calibration=flat, compute_dtype="fp32")
        passes = block_passes(given, Candidate(micro_batch=shape.sequences), Axes((), (), (), (), ()))
        shown[shape] = passes.forward.total, passes.forward.total + passes.backward.total
    return shown


def test_what_blocks_take_beyond_their_matmuls_is_found_again() -> None:
    found = blocks_show(_blocks_take(FLAT), (1e11, 0.8, 8.0), most_bytes_per_s=1e12)
    assert found.matmuls == pytest.approx(1.0) and found.bytes_per_s == pytest.approx(5e9)
    assert found.backward == pytest.approx(1.5) and found.operation_s == pytest.approx(2e-5)
    assert found.weight_s == pytest.approx(3e-10)


def test_matmuls_that_are_faster_in_a_block_than_alone_raise_the_peak() -> None:
    alone, half = 0.5e11, 8.0
    shapes = [(m, d, n) for m in (64, 1024) for d, n in ((64, 64), (512, 2048))]
    rates = {s: alone * math.prod(d / (d + half) for d in s) for s in shapes}
    timings = Timings(
        matmuls={s: [2.0 * math.prod(s) / rate] for s, rate in rates.items()}, copies={2**20: [1e-4]}, launches=[1e-5],
        gathers={}, reduces={}, slowdowns=[], memory_bytes=2**30, runtime_bytes=2**20,
        blocks={shape: ([forward], [both]) for shape, (forward, both) in _blocks_take(FLAT).items()},
    )  # fmt: skip
    found = measured_cluster(CPU, timings)
    assert found.calibration is not None and found.calibration.matmul_efficiency <= 1
    reached = found.device.peak_flops_per_s * found.calibration.matmul_efficiency
    assert reached == pytest.approx(0.8e11, rel=0.05) and found.device.peak_flops_per_s > alone
    assert found.calibration.weight_s == pytest.approx(3e-10, rel=0.1)


def test_least_squares_without_negative_unknowns() -> None:
    system = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative(system, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    falling = non_negative(system, np.array([3.0, 2.0, 1.0]))  # a slope below 0 is not offered
    assert falling == pytest.approx([2.0, 0.0])


def test_spread_is_half_of_the_quartiles_range() -> None:
    told = summary("x", "s", [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (told.value, told.samples, told.origin) == (3.0, 5, "measured") and told.spread == pytest.approx(0.5)


def _measure(world: World) -> tuple[Timings, int, int]:
    called: list[str] = []
    timings = measure(world, TINY, called.append)
    return timings, len(called), parts(world, TINY)


@pytest.mark.slow
def test_every_level_of_a_real_world_is_timed_and_all_ranks_agree() -> None:
    results: list[Any] = run_world([2, 2], _measure)
    timings, called, foreseen = results[0]
    assert called == foreseen and all(other[0] == timings for other in results)
    assert set(timings.gathers) == {(level, size) for level in (0, 1) for size in TINY.chunks} == set(timings.reduces)
    assert set(timings.exchanges) == {(1, 0, 1)} and set(timings.blocks) == {BLOCK} and set(timings.coding) == {"int8"}
    assert len(timings.sync_points) == 2 * TINY.repeats  # a difference: noise may make one negative
    assert timings.behind == {0: [0.0], 1: [0.0]}  # ranks of one host copy in the thread that waits
    assert all(
        second > 0 for of in (timings.gathers, timings.matmuls, timings.copies) for t in of.values() for second in t
    )
    cluster = measured_cluster(cluster_of([2, 2]), timings)
    assert {cluster.device.origin, *(level.origin for level in cluster.levels)} == {"measured"}
    assert cluster.calibration is not None and cluster.calibration.origin == "measured"
    assert all(level.bytes_per_s and level.latency_s is not None and level.behind == 0 for level in cluster.levels)
    assert cluster.calibration.logit_s and cluster.calibration.optimizer_s and "int8" in cluster.calibration.coding_s


@pytest.mark.slow
def test_a_link_between_hosts_goes_on_behind_compute() -> None:
    timings = run_world([2], _measure, sockets=[0])[0][0]
    assert timings.sync_points == []  # nobody copies from another's memory
    assert len(timings.behind[0]) == TINY.repeats and all(0 <= share <= 1 for share in timings.behind[0])


def test_a_probed_cluster_is_what_a_plan_rests_on(tmp_path: Path) -> None:
    done = thinwire("probe", "--quick", "-o", tmp_path / "cluster.toml")
    assert done.returncode == 0, done.stderr
    cluster = read_cluster(tmp_path / "cluster.toml")
    assert len(cluster.measured) > 12 and all(each.spread >= 0 and each.samples for each in cluster.measured)
    (tmp_path / "run.toml").write_text(
        '[model]\npreset = "llama-1m"\n[batch]\nsequences = 4\ntokens = 64\n[cluster]\nfile = "cluster.toml"\n'
    )
    plan = thinwire("plan", tmp_path / "run.toml", "--runnable")
    assert plan.returncode == 0, plan.stderr
    assert "links node measured; device cpu measured; efficiencies measured (thinwire probe)" in plan.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--levels", "2"], "is no level"),
        (["--levels", "node=0"], "greater than or equal to 1"),
        (["--levels", "node=2,node=2"], "must differ"),
        (["--device", "h1000"], "did you mean"),
        (["-o", "nowhere/cluster.toml"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(tmp_path: Path, arguments: list[str], word: str) -> None:
    done = thinwire("probe", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
