"""A step of which no token is scored is no step: nothing is learned from it, nothing logged as if it were."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runs import make_corpus, run_tree, thinwire, train_in, write_run
from thinwire.comm.world import World
from thinwire.data.indexed import answers_path
from thinwire.files.events import read_events, steps
from thinwire.report.read import read_run
from thinwire.train import loop
from thinwire.train.folder import EVENTS_FILE
from thinwire.train.parts import Parts
from worlds import run_world

UNSCORED = (2, 3, 4)


def mark_all_but(corpus: Path, tree: dict[str, Any], unscored: tuple[int, ...]) -> None:
    """Of `corpus` every token is to be learned, but none in the sequences of the steps `unscored` (1 is the first)."""
    from thinwire.data.corpus import Corpus, DataConfig
    from thinwire.data.loader import Loader, Packing

    split, tokens = Corpus.open(DataConfig(path=corpus)).train, tree["batch"]["tokens"]
    marks = np.ones(split.tokens, np.uint8)
    loader = Loader(Packing(split, tokens), batch_sequences=tree["batch"]["sequences"], seed=1234)
    for step in unscored:
        for sequence in loader.indices(step - 1):
            marks[sequence * tokens + 1 : (sequence + 1) * tokens + 1] = 0
    answers_path(corpus / "train").write_bytes(marks.tobytes())


def _masters(world: World, tree: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Weights and optimizer states after each step."""
    seen: list[list[torch.Tensor]] = []
    plain = loop.close_record

    def close_record(job: Any, parts: Parts, record: Any, clock: Any) -> None:
        pieces = [part.master for part in parts.sharded.owned()] + [p.tensor for p in parts.optimizer.for_save()]
        seen.append([tensor.clone() for tensor in pieces])
        plain(job, parts, record, clock)

    loop.close_record = close_record
    try:
        train_in(world, tree)
    finally:
        loop.close_record = plain
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_without_a_scored_token_changes_nothing(tmp_path: Path, ranks: int) -> None:
    corpus = make_corpus(tmp_path / "data")
    tree = run_tree(
        tmp_path / "run", corpus, batch={"sequences": 4, "micro_batch": 2}, cluster={"levels": [ranks]},
        run={"steps": 6, "max_bad_steps": 2},
    )  # fmt: skip
    mark_all_but(corpus, tree, UNSCORED)
    (seen, *_) = run_world([ranks], _masters, tree)
    for step in range(2, 7):
        same = all(torch.equal(a, b) for a, b in zip(seen[step - 2], seen[step - 1], strict=True))
        assert same == (step in UNSCORED)
    records = steps(tmp_path / "run" / EVENTS_FILE)
    assert [step for step, record in records.items() if record["skipped"]] == list(UNSCORED)
    for step, record in records.items():
        assert (record["loss"] is None) == (record["tokens"] == 0) == (step in UNSCORED)
        assert record["processed_tokens"] == 4 * 32
        assert record["tokens_per_s"] == pytest.approx(4 * 32 / record["step_s"], rel=1e-2)


def test_the_log_says_that_no_step_was_taken(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "data")
    sections: dict[str, Any] = {"batch": {"sequences": 4, "micro_batch": 2}, "run": {"steps": 4, "log_every": 1}}
    run = write_run(tmp_path, corpus, **sections)
    mark_all_but(corpus, run_tree(tmp_path / "run", corpus, **sections), UNSCORED)
    done = thinwire("train", str(run))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert ["no scored token, no step" in line for line in lines] == [False, True, True, True]
    assert "3, of which no token was scored" in done.stdout
    assert f"{4 * 4 * 32:,}, 128 of them scored" in done.stdout
    assert read_run(tmp_path / "run", "run").steps[-1]["loss"] is None
    assert thinwire("report", str(tmp_path / "run"), "-o", str(tmp_path / "report.html")).returncode == 0
    first = next(read_events(tmp_path / "run" / EVENTS_FILE, "step"))["loss"]
    exported = thinwire("export", str(tmp_path / "run"), "-o", str(tmp_path / "out"))
    assert exported.returncode == 0, exported.stderr
    assert f"| training loss of the last step | {first:.4f} |" in (tmp_path / "out" / "README.md").read_text()


def test_a_small_or_unscored_validation_is_told(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "data")
    sections: dict[str, Any] = {"run": {"steps": 3, "eval_sequences": 2}}
    done = thinwire("train", str(write_run(tmp_path, corpus, **sections)))
    assert "(64 tokens, too few to compare losses by" in done.stdout
    held = json.loads((corpus / "corpus.json").read_text())["splits"]["heldout"]["tokens"]
    answers_path(corpus / "heldout").write_bytes(bytes(held))
    done = thinwire("train", str(write_run(tmp_path, corpus, "second", **sections)))
    assert "validation at step 3: no token of the validation split is scored" in done.stdout
    assert {event["loss"] for event in read_events(tmp_path / "second" / EVENTS_FILE, "eval")} == {None}
    exported = thinwire("export", str(tmp_path / "second"), "-o", str(tmp_path / "out"))
    assert exported.returncode == 0, exported.stderr
    assert "validation" not in (tmp_path / "out" / "README.md").read_text()
    scored = thinwire("eval", str(tmp_path / "second"))
    assert scored.returncode == 2 and "no token of the validation sequences of" in scored.stderr
