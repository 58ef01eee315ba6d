"""Which parameters move together when nobody says so."""

from collections import OrderedDict

from torch import nn

from thinwire.parallel.shard.find_units import find_units


def names(root: nn.Module) -> dict[str, list[str]]:
    return {unit.name: sorted(unit.parameters) for unit in find_units(root)}


def test_entries_of_lists_and_sequences_are_units_and_so_is_every_other_child() -> None:
    root = nn.Module()
    root.embedding = nn.Embedding(5, 4)
    root.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(2))
    root.tail = nn.Sequential(OrderedDict(first=nn.Linear(4, 4, bias=False), between=nn.GELU(), last=nn.Linear(4, 2)))
    root.scale = nn.Parameter(root.embedding.weight.new_ones(1))
    assert names(root) == {
        "": ["scale"],
        "embedding": ["embedding.weight"],
        "blocks.0": [f"blocks.0.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")],
        "blocks.1": [f"blocks.1.{part}" for part in ("0.bias", "0.weight", "2.bias", "2.weight")],
        "tail.first": ["tail.first.weight"],
        "tail.last": ["tail.last.bias", "tail.last.weight"],
    }


def test_a_sequence_as_the_root_gives_a_unit_for_each_stage_in_it() -> None:
    root = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1))
    assert list(names(root)) == ["0", "1.0", "1.1", "2"]


def test_tied_weights_belong_to_the_first_unit_that_meets_them() -> None:
    root = nn.Module()
    root.embedding, root.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    root.head.weight = root.embedding.weight
    (unit,) = find_units(root)
    assert (unit.name, unit.resident, len(unit.entries)) == ("embedding", True, 2)
