"""Modules with one difficulty each, of the benchmarks' zoo, under a plan that shards parameters and one that does not.

Losses, what a program reads between steps, and all parameters equal those of one process with a replica for each rank.
"""

import sys
from pathlib import Path

import pytest

from thinwire.comm.world import World
from thinwire.errors import ThinwireError
from worlds import run_world

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

KINDS = {
    "used outside their unit's forward": [
        "method_of_root", "root_parameter_before_forward", "method_of_child", "head_is_embedding", "forward_by_name",
        "sequential_taken_apart", "weight_of_silent_child", "functional_block", "fused_weights", "l2_term",
    ],
    "read after the step": ["parameters_after_step", "child_state_dict", "deepcopy_after_step", "inference_between"],
    "held in containers": ["list_of_lists", "list_of_dicts", "dict_of_modules", "list_of_parameters", "namespace",
                           "in_two_containers"],
    "given away": ["view_returned", "view_of_view_returned", "parameter_returned", "generator", "closure", "dataclasses"],
    "without a gradient": [
        "idle_expert", "routed_experts", "no_gradient_on_one_rank", "left_out_everywhere", "failed_forward",
        "failed_backward",
    ],
    "differentiated twice, or inside": [
        "gradient_penalty", "inner_losses", "inner_loss_alone", "adaptive_weight", "recomputed", "recomputed_in_pieces",
        "hf_checkpointing", "hf_checkpointing_reentrant", "own_function",
    ],
    "of other kinds": [
        "frozen_uint8", "frozen_integers", "frozen_complex", "trained_complex", "sparse_embedding", "empty", "scalars",
        "doubles", "mixed_types", "strided", "lazy_made",
    ],
    "written by their forward": ["writes_own_weight", "max_norm", "batch_norm", "spectral_norm", "weight_norm"],
    "in libraries": ["tied", "shared_blocks", "torch_transformer", "recurrent", "hooks", "peft_lora", "autocast", "vmapped"],
}  # fmt: skip
REFUSED = {
    "clip_grad_norm": ("zero1", "zero3"),
    "lazy_unmade": ("zero1", "zero3"),
    "left_out_on_one_rank": ("zero3",),
    "routed_at_root": ("zero3",),
    "other_order": ("zero3",),
}


def _differences(world: World, names: list[str], plans: tuple[str, ...]) -> dict[str, str]:
    from zoo.compare import Seen, difference
    from zoo.modules import modules
    from zoo.training import reference, thinwire

    found = {}
    for name in names:
        case = modules()[name]
        known = reference(case, world.size)
        for plan in plans:
            seen = Seen()
            found[f"{name} under {plan}"] = difference(seen, thinwire(case, plan, world, seen), known, world.rank)
    return found


@pytest.mark.parametrize("sockets", [(), pytest.param((0,), marks=pytest.mark.slow)], ids=["one host", "sockets"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_train_as_in_one_process(kind: str, sockets: tuple[int, ...]) -> None:
    for found in run_world(2, _differences, KINDS[kind], ("zero1", "zero3"), sockets=sockets, timeout_s=250):
        assert len(found) == 2 * len(KINDS[kind])
        assert not any(found.values()), {what: how for what, how in found.items() if how}


def _told(world: World, name: str, plan: str) -> str:
    """The sentence; what was seen until then is right."""
    from zoo.compare import Seen, difference
    from zoo.modules import modules
    from zoo.training import reference, thinwire

    case, seen = modules()[name], Seen()
    known = reference(case, world.size)
    try:
        thinwire(case, plan, world, seen)
    except ThinwireError as error:
        assert difference(seen, None, known, world.rank) == ""
        return f"{type(error).__name__}: {error}"
    raise AssertionError("not refused")


@pytest.mark.parametrize("sockets", [(), (0,)], ids=["one host", "sockets"])
@pytest.mark.parametrize(("name", "plan"), [(name, plan) for name, plans in REFUSED.items() for plan in plans])
def test_what_cannot_be_right_is_refused_on_every_rank_before_it_is_used(
    name: str, plan: str, sockets: tuple[int, ...]
) -> None:
    for told in run_world(2, _told, name, plan, sockets=sockets):
        assert told.startswith("UseError: "), told
