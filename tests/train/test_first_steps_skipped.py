"""A checkpoint from before the first update has no optimizer states, and a run goes on from it all the same."""

from pathlib import Path
from typing import Any

from runs import make_corpus, run_tree, train_in
from thinwire.comm.world import World
from thinwire.files.events import steps
from thinwire.train import loop
from thinwire.train.folder import EVENTS_FILE
from worlds import run_world


def _train(world: World, trees: list[dict[str, Any]], bad_calls: list[int]) -> None:
    """One run after the other; the loss of these forwards (counted over all runs) is infinite."""
    plain, calls = loop.forward, [0]

    def forward(parts: Any, batch: Any) -> Any:
        loss, valid = plain(parts, batch)
        calls[0] += 1
        return (loss * float("inf") if calls[0] in bad_calls else loss), valid

    loop.forward = forward
    try:
        for tree in trees:
            train_in(world, tree)
    finally:
        loop.forward = plain


def _tree(folder: Path, corpus: Path, count: int) -> dict[str, Any]:
    return run_tree(
        folder, corpus, batch={"micro_batch": 16}, run={"steps": count, "max_bad_steps": 4}, cluster={"levels": [1]}
    )


def test_a_run_goes_on_from_a_checkpoint_of_which_every_step_was_skipped(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "data")
    run_world(1, _train, [_tree(tmp_path / "whole", corpus, 6)], [1, 2, 3])
    run_world(1, _train, [_tree(tmp_path / "two", corpus, count) for count in (3, 6)], [1, 2, 3])
    whole, two = (steps(tmp_path / name / EVENTS_FILE) for name in ("whole", "two"))
    assert [step for step, record in two.items() if record["skipped"]] == [1, 2, 3]
    assert [two[step]["loss"] for step in (4, 5, 6)] == [whole[step]["loss"] for step in (4, 5, 6)]
