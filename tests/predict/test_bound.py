"""The bound is never above the simulated step, and is that step where nothing contends."""

from dataclasses import asdict, replace

import pytest
from random_settings import random_candidates, random_setting

from thinwire.planner.sensitivity import with_rate
from thinwire.predict.bound import least_s, roughly_s
from thinwire.predict.candidate import Candidate
from thinwire.predict.causes import causes
from thinwire.predict.course import end_s
from thinwire.predict.placement import place
from thinwire.predict.simulate import simulate_step
from thinwire.predict.step import core_of, silent, silent_kinds

SEEDS = range(48)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_step_is_shorter_than_its_bound(seed: int) -> None:
    """Models, clusters, runtimes and plans by chance; the causes add up, and none of them is negative."""
    given = random_setting(seed)
    for candidate, axes in random_candidates(given, seed, 6):
        core = core_of(given, candidate, axes)
        stages, least = silent(core, candidate.chunks), least_s(given, candidate, axes, core)
        alone = end_s(stages, micro_batches=core.micro_batches, send_s=core.send_s)
        played = simulate_step(given, candidate, axes, keep_spans=False)
        assert 0 < roughly_s(core, silent_kinds(core, candidate.chunks)) <= alone * (1 + 1e-9), candidate
        assert alone <= least * (1 + 1e-9) <= played.step_s * (1 + 2e-9), candidate
        parts = asdict(causes(played, given, candidate, axes, core))
        assert parts.pop("hidden_s") >= 0 and min(parts.values()) >= 0, (candidate, parts)
        assert sum(parts.values()) == pytest.approx(played.step_s, rel=1e-9), (candidate, parts)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize(("pipeline", "chunks", "layers"), [(2, 1, 2), (3, 1, 7), (4, 1, 13), (2, 3, 6), (4, 2, 8)])
@pytest.mark.parametrize("rate", [1e7, 1e9, 1e11])
def test_a_pipeline_that_moves_no_states_takes_its_bound(
    pipeline: int, chunks: int, layers: int, outside: bool, rate: float
) -> None:
    """Unequal stages, sends that take longer than passes, many micro-batches: without replicas nothing else moves."""
    given = random_setting(3)
    level = given.cluster.levels[0].model_copy(update={"fanout": pipeline, "bytes_per_s": rate, "behind": 1.0})
    cluster = given.cluster.model_copy(update={"levels": (level,)})
    for micro_batches in (pipeline, 3 * pipeline, 40 * pipeline):
        each = replace(
            given, cluster=cluster, sequences=micro_batches, spec=given.spec.model_copy(update={"layers": layers})
        )
        candidate = Candidate(pipeline=pipeline, chunks=chunks, pipeline_outside=outside)
        axes = place(candidate, each.cluster, each.calibration)
        least = least_s(each, candidate, axes, core_of(each, candidate, axes))
        assert least == pytest.approx(simulate_step(each, candidate, axes, keep_spans=False).step_s, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_a_faster_level_makes_no_step_longer(seed: int) -> None:
    """Of the same plan, whatever contends: no case is known in which messages that come sooner hold others up."""
    given = random_setting(seed)
    for candidate, axes in random_candidates(given, seed, 2):
        before = simulate_step(given, candidate, axes, keep_spans=False).step_s
        for index, level in enumerate(given.cluster.levels):
            assert level.bytes_per_s
            faster = with_rate(given, index, 1.3 * level.bytes_per_s)
            placed = place(candidate, faster.cluster, faster.calibration)
            after = simulate_step(faster, candidate, placed, keep_spans=False).step_s
            assert after <= before * (1 + 1e-9), (candidate, index)
