"""Plans: names are points of one space, what is illegal is answered with the rule and the nearest legal choice."""

import itertools

import pytest

from thinwire.cluster.cluster import Cluster, Level
from thinwire.config import build
from thinwire.errors import ConfigError, PlanError
from thinwire.plan.partition import Partition, resolve_partition
from thinwire.plan.plan import Plan, PlanConfig

LEVELS = ("pair", "node", "cluster")
CLUSTER = Cluster(levels=tuple(Level(name=name, fanout=2) for name in LEVELS))


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("ddp", "(replica; replica; replica)"),
        ("zero1", "(replica; replica; cluster)"),
        ("zero2", "(replica; cluster; cluster)"),
        ("zero3", "(cluster; cluster; cluster)"),
        ("hsdp", "(node; node; node)"),
        ("mics", "(node; node; node)"),
        ("zero++", "(node; cluster; cluster)"),
        ("frontier", "(pair; node; cluster)"),
        ("auto", "(node; node; cluster)"),
        ("amsp(pair; pair; all)", "(pair; pair; cluster)"),
        ("amsp(replica;node;node)", "(replica; node; node)"),
    ],
)
def test_names_resolve_to_points_and_print_themselves(name: str, point: str) -> None:
    assert str(resolve_partition(name, LEVELS)[0]) == point


def test_auto_on_one_level_does_not_cut_what_is_gathered_each_micro_batch() -> None:
    assert str(resolve_partition("auto", ("ethernet",))[0]) == "(replica; replica; ethernet)"
    assert str(resolve_partition("auto", ("fast", "slow"))[0]) == "(fast; fast; slow)"


def test_zero_plus_plus_brings_its_codecs() -> None:
    compression = resolve_partition("zero++", LEVELS)[1]
    assert dict(compression.weights) == {"cluster": "int8"}
    assert dict(compression.grads) == {"cluster": "int4"}


def test_exactly_the_ordered_cuts_are_legal() -> None:
    names = ("replica", *LEVELS)
    for params, grads, optimizer in itertools.product(names, repeat=3):
        partition = Partition(params=params, grads=grads, optimizer=optimizer)
        depths = tuple(names.index(name) - 1 for name in (params, grads, optimizer))
        if depths[0] <= depths[1] <= depths[2]:
            assert partition.depths(LEVELS) == depths
        else:
            with pytest.raises(PlanError, match="the nearest legal one is"):
                partition.depths(LEVELS)


def test_frozen_weights_may_be_cut_further_than_gradients() -> None:
    partition = Partition(params="node", grads="replica", optimizer="cluster", frozen_weights=True)
    assert partition.depths(LEVELS) == (1, -1, 2)


@pytest.mark.parametrize(
    ("asked", "frozen", "nearest"),
    [
        (("node", "pair", "cluster"), False, "(node; node; cluster)"),
        (("cluster", "replica", "replica"), False, "(replica; replica; replica)"),
        (("pair", "cluster", "node"), False, "(pair; cluster; cluster)"),
        (("pair", "replica", "pair"), False, "(pair; pair; pair)"),
        (("node", "node", "replica"), False, "(node; node; node)"),
        (("cluster", "node", "pair"), False, "(node; node; node)"),
        (("node", "replica", "pair"), True, "(node; replica; node)"),
        (("replica", "cluster", "node"), True, "(replica; cluster; cluster)"),
    ],
)
def test_the_nearest_legal_choice_is_named(asked: tuple[str, str, str], frozen: bool, nearest: str) -> None:
    params, grads, optimizer = asked
    with pytest.raises(PlanError) as caught:
        Partition(params=params, grads=grads, optimizer=optimizer, frozen_weights=frozen).depths(LEVELS)
    assert str(caught.value).endswith(f"the nearest legal one is {nearest}")
    assert ("even with frozen weights neither" in str(caught.value)) == frozen


@pytest.mark.parametrize("frozen", [False, True])
def test_no_legal_choice_is_nearer_than_the_one_named(frozen: bool) -> None:
    names = ("replica", *LEVELS)
    points = list(itertools.product(range(-1, 3), repeat=3))

    def told(point: tuple[int, ...]) -> str:
        """What is wrong with a point; nothing if it is legal."""
        params, grads, optimizer = (names[depth + 1] for depth in point)
        try:
            Partition(params=params, grads=grads, optimizer=optimizer, frozen_weights=frozen).depths(LEVELS)
        except PlanError as error:
            return str(error)
        return ""

    def distance(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int]:
        moved = [abs(x - y) for x, y in zip(a, b, strict=True)]
        return sum(by > 0 for by in moved), sum(moved)

    legal = [point for point in points if not told(point)]
    for point in points:
        if message := told(point):
            named = message.rpartition("(")[2].removesuffix(")").split("; ")
            answer = tuple(names.index(name) - 1 for name in named)
            assert answer in legal
            assert distance(answer, point) == min(distance(other, point) for other in legal)


@pytest.mark.parametrize("levels", [("node",), ("ethernet",), ("pair", "node")])
def test_zero_plus_plus_without_a_level_between_nodes_is_refused(levels: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match=r"here nothing does \(levels: .*: take zero3"):
        resolve_partition("zero++", levels)


def test_codecs_given_beside_zero_plus_plus_count_level_by_level() -> None:
    given = {"grads": {"cluster": "bf16", "node": "int8"}, "block": 64, "rounding": "stochastic"}
    tree = {"partition": "zero++", "compression": given}
    compression = build(PlanConfig, tree, "run.toml").resolve(CLUSTER, micro_batch=1, accumulate=1).compression
    assert dict(compression.weights) == {"cluster": "int8"}
    assert dict(compression.grads) == {"cluster": "bf16", "node": "int8"}
    assert (compression.block, compression.rounding) == (64, "stochastic")


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"partition": "zero4"}, "partition 'zero4' is unknown"),
        ({"partition": {"params": "rack"}}, "is no level"),
        ({"partition": {"parms": "node"}}, "did you mean 'params'"),
        ({"partition": "amsp(all;replica;replica)"}, "is illegal"),
        ({"recompute": "some"}, "recompute"),
        ({"compression": {"block": 100}}, "block"),
    ],
)
def test_wrong_plans_get_a_sentence(tree: dict[str, object], says: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=says):
        build(PlanConfig, tree, "run.toml").resolve(CLUSTER, micro_batch=1, accumulate=1)


@pytest.mark.parametrize(
    ("grads", "says"),
    [
        ({"cluster": "fp32"}, "compressed gradient levels are none"),
        ({"cluster": "lowrank"}, "leave error_feedback out"),
        ({"node": "int8", "cluster": "lowrank"}, "leave error_feedback out"),
    ],
)
def test_error_feedback_that_could_not_be_is_refused(grads: dict[str, str], says: str) -> None:
    tree = {"partition": "ddp", "compression": {"grads": grads, "error_feedback": True}}
    with pytest.raises(PlanError, match=says):
        build(PlanConfig, tree, "run.toml").resolve(CLUSTER, micro_batch=1, accumulate=1)


def test_equal_plans_have_equal_digests_and_survive_json() -> None:
    plan = PlanConfig(partition="frontier").resolve(CLUSTER, micro_batch=2, accumulate=3)
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.digest == plan.digest
    assert plan.digest != plan.model_copy(update={"micro_batch": 4}).digest
