"""I6: the table of rounds is a pure function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.errors import PlanError
from thinwire.plan.rounds import Schedule, assign_units, fragment_count
from thinwire.plan.sync import Sync, SyncConfig


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    inner = draw(st.integers(1, 40))
    return Schedule(inner, draw(st.integers(1, inner)), draw(st.integers(0, inner)))


@given(schedules(), st.integers(0, 50))
def test_i6_each_fragment_is_sent_exactly_once_in_any_h_steps(schedule: Schedule, first: int) -> None:
    first = max(first, schedule.inner_steps)
    sent = [schedule.sent_after(step) for step in range(first + 1, first + 1 + schedule.inner_steps)]
    assert sorted(s.fragment for s in sent if s) == list(range(schedule.fragments))


@given(schedules())
def test_i6_everything_sent_is_applied_once_delay_steps_later(schedule: Schedule) -> None:
    table = list(schedule.table(4 * schedule.inner_steps))
    assert [schedule.applied_after(e.apply) for e in table] == table
    assert all(e.apply - e.send == schedule.delay for e in table)
    for step in range(1, 3 * schedule.inner_steps):
        flying = schedule.in_flight(step)
        assert flying == [e for e in table if e.send <= step < e.apply]
        assert len({e.fragment for e in flying}) == len(flying)
    rounds = [e.round for e in table if e.fragment == 0]
    assert rounds == list(range(len(rounds)))


def test_sends_are_spread_evenly() -> None:
    schedule = Schedule(12, 4, 2)
    assert [(e.send, e.fragment) for e in schedule.table(15)] == [(3, 0), (6, 1), (9, 2), (12, 3), (15, 0)]
    assert [(e.send, e.apply) for e in Schedule(5, 1, 0).table(10)] == [(5, 5), (10, 10)]


def test_blocks_are_dealt_strided_or_in_runs_and_the_rest_to_the_lightest() -> None:
    units = [("embedding", 100), *[(f"blocks.{i}", 10) for i in range(6)], ("norm", 1), ("head", 90)]
    assert assign_units(units, 2, "strided") == [[0, 1, 3, 5], [2, 4, 6, 7, 8]]
    assert [i for f in assign_units(units, 3, "sequential") for i in f if 1 <= i <= 6] == [1, 2, 3, 4, 5, 6]
    assert sorted(i for f in assign_units(units, 4, "strided") for i in f) == list(range(9))
    assert (fragment_count(4, 6), fragment_count("3 blocks", 7), fragment_count("3 blocks each", 6)) == (4, 3, 2)


LINK = (("node", 2), ("site", 4))


def resolve(**given: object) -> Sync:
    return SyncConfig.model_validate(given).resolve(LINK)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"inner_steps": 3, "fragments": 4}, "between 1 and inner_steps = 3"),
        ({"inner_steps": 3, "delay": 3}, "must be below inner_steps = 3; try 2"),
        ({"level": "rack"}, "no level; there are node, site"),
        ({"kind": "co2", "delay": 2}, "one whole round late; leave delay out"),
        ({"kind": "eager", "fragments": 2}, "sends the whole model at once"),
        ({"gap_penalty": True}, "one round late, without Nesterov momentum; kind 'diloco'"),
        ({"kind": "eager", "gap_penalty": True}, "kind 'eager' has none such; use kind = 'co2'"),
        ({"clip": 1.0}, "clip = 1 bounds the outer step only without Nesterov momentum"),
        ({"error_feedback": True}, "codec 'fp32' loses nothing; set a codec such as 'int8'"),
        ({"codec": "bf16", "rounding": "stochastic"}, "rounding = 'stochastic' belongs to the block codecs"),
        ({"codec": "topk", "block": 64}, "block = 64 belongs to the block codecs .* not to 'topk'"),
        ({"kind": "eager", "aggregate": "median"}, "replaces its own part of the mean; leave aggregate out"),
    ],
)
def test_impossible_rounds_get_one_sentence(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        resolve(**given)


def test_groups_are_the_members_of_a_level_and_of_those_outside_it() -> None:
    assert [resolve(**given).groups for given in ({}, {"level": "site"}, {"level": "node"})] == [4, 4, 8]


@pytest.mark.parametrize("aggregate", ["median", "trimmed"])
def test_two_groups_have_no_median_of_their_own(aggregate: str) -> None:
    with pytest.raises(PlanError, match="needs at least 3 groups, there are 2; use 'mean'"):
        SyncConfig.model_validate({"aggregate": aggregate}).resolve([("site", 2)])


def test_the_second_hop_of_three_groups_has_a_step_to_hide_behind() -> None:
    delays = [SyncConfig(kind="streaming_diloco").resolve([("site", groups)]).delay for groups in (2, 3, 8)]
    assert delays == [1, 2, 2]
    assert SyncConfig(kind="streaming_diloco", delay=1).resolve([("site", 4)]).delay == 1


def test_more_fragments_than_units_and_odd_spellings_get_one_sentence() -> None:
    with pytest.raises(PlanError, match="only 1 units"):
        assign_units([("a", 1)], 2, "strided")
    with pytest.raises(PlanError, match="neither a number nor like"):
        fragment_count("some", 3)


def test_kinds_are_points_with_the_papers_settings_and_the_users_win() -> None:
    diloco = SyncConfig(kind="diloco").resolve(LINK)
    assert (diloco.outer_lr, diloco.outer_momentum, diloco.nesterov, diloco.groups, diloco.mix) == (
        0.6,
        0.9,
        True,
        4,
        0,
    )
    streaming = SyncConfig(kind="streaming_diloco").resolve(LINK)
    assert (streaming.codec, streaming.delay, streaming.mix, streaming.fragments) == ("e3m0", 2, 0.5, "3 blocks")
    local = SyncConfig(kind="local_sgd").resolve(LINK)
    assert (local.outer_lr, local.outer_momentum) == (1.0, 0.0)
    co2 = SyncConfig(kind="co2", inner_steps=7).resolve(LINK)
    assert (co2.delay, co2.late, co2.gap_penalty, co2.nesterov) == (7, True, True, False)
    assert SyncConfig(kind="diloco", outer_lr=0.1).resolve(LINK).outer_lr == 0.1
    assert SyncConfig().resolve([("site", 8)]).outer_lr == 0.8
