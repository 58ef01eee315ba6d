"""The probe: fits invert the cost formulas, real ranks are timed, and what is written is what planning reads."""

from pathlib import Path
from typing import Any

import pytest

from runs import thinwire
from thinwire.cluster.cluster import read_cluster
from thinwire.comm.world import World
from thinwire.cost.collectives import gather_hops
from thinwire.cost.placement import Hop
from thinwire.probe.effort import Effort
from thinwire.probe.fit import Timings, line, matmul_curve, measured_cluster, summary
from thinwire.probe.measure import measure, parts
from worlds import cluster_of, run_world

TINY = Effort(((16, 32, 32), (64, 64, 64)), (2**16, 2**18), (2**10, 2**16), repeats=3)


def test_a_link_is_found_again_from_times_that_the_cost_formula_gives() -> None:
    hop = Hop(level=0, fanout=4, bytes_per_s=2e8, latency_s=3e-4, alone=1.0)
    sent = [3 * 2**power for power in range(10, 25, 3)]
    start_s, rate = line({each: gather_hops(each * 4 / 3, [hop])[0] for each in sent})
    assert start_s == pytest.approx(3 * 3e-4) and rate == pytest.approx(2e8)


def test_times_that_do_not_grow_with_size_still_give_a_rate() -> None:
    start_s, rate = line({1000: 2e-3, 100_000: 1e-3})
    assert start_s >= 0 and rate > 0


def test_a_matmul_curve_is_found_again() -> None:
    half, shapes = 24.0, [(m, d, d) for m in (32, 256, 4096) for d in (64, 1024, 8192)]
    rates = {s: 1e12 * (s[0] / (s[0] + half)) * (s[1] / (s[1] + half)) * (s[2] / (s[2] + half)) for s in shapes}
    peak, efficiency, found = matmul_curve(rates)
    assert found == pytest.approx(half, rel=0.05)
    assert peak * efficiency == pytest.approx(1e12, rel=0.02)


def test_spread_is_half_of_the_quartiles_range() -> None:
    told = summary("x", "s", [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (told.value, told.samples, told.origin) == (3.0, 5, "measured") and told.spread == pytest.approx(0.5)


def _measure(world: World) -> tuple[Timings, int, int]:
    called: list[str] = []
    timings = measure(world, TINY, called.append)
    return timings, len(called), parts(world, TINY)


def test_every_level_of_a_real_world_is_timed_and_all_ranks_agree() -> None:
    results: list[Any] = run_world([2, 2], _measure)
    timings, called, foreseen = results[0]
    assert called == foreseen and all(other[0] == timings for other in results)
    assert set(timings.gathers) == {(level, size) for level in (0, 1) for size in TINY.chunks} == set(timings.reduces)
    assert all(
        second > 0 for of in (timings.gathers, timings.matmuls, timings.copies) for t in of.values() for second in t
    )
    cluster = measured_cluster(cluster_of([2, 2]), timings)
    assert {cluster.device.origin, *(level.origin for level in cluster.levels)} == {"measured"}
    assert cluster.calibration is not None and cluster.calibration.origin == "measured"
    assert all(level.bytes_per_s and level.latency_s is not None for level in cluster.levels)


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
