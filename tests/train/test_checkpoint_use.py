"""What a run makes of the checkpoints and the log that it finds in its folder."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runs import make_corpus, run_tree
from thinwire.checkpoint import store
from thinwire.cli import main
from thinwire.comm.world import World
from thinwire.config import build
from thinwire.errors import CheckpointError, ConfigError, ThinwireError
from thinwire.evaluate.load import load_run
from thinwire.files.events import read_events, steps
from thinwire.hub.export_run import export_run
from thinwire.train.config import RunConfig
from thinwire.train.folder import EVENTS_FILE, open_folder
from thinwire.train.job import resolve
from thinwire.train.stop import StopRequest
from thinwire.train.worker import train_job
from worlds import cluster_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


def tree_of(folder: Path, corpus: Path, count: int, **checkpoint: Any) -> dict[str, Any]:
    return run_tree(
        folder, corpus, run={"steps": count, "eval_sequences": 2}, checkpoint={"every_steps": 2, **checkpoint},
        batch={"sequences": 4, "micro_batch": 4}, schedule={"warmup_steps": 0}, tracking={"to": []},
    )  # fmt: skip


def go(tree: dict[str, Any]) -> None:
    job = resolve(Path("run.toml"), build(RunConfig, tree, "run.toml"))
    with open_folder(job, fresh=False):
        world = World.join(cluster_of([1]), rank=0, size=1, local_rank=0, host="", port=0)
        train_job(job, world, StopRequest())
        world.leave()


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("verify", [True, False])
def test_verify_says_whether_a_changed_file_of_the_same_size_is_noticed(
    corpus: Path, tmp_path: Path, verify: bool
) -> None:
    go(tree_of(tmp_path, corpus, 4, verify=verify))
    flip(tmp_path / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    used = 2 if verify else 4
    assert load_run(tmp_path).step == used
    assert export_run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out").step == used
    go(tree_of(tmp_path, corpus, 6, verify=verify))
    assert list(read_events(tmp_path / EVENTS_FILE, "run_start"))[-1]["step"] == used
    assert (tmp_path / "checkpoints" / "step-00000004.torn").exists() == verify


def test_a_torn_line_in_the_log_is_dropped_by_report_and_on_resume(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go(tree_of(folder, corpus, 2))
    with (folder / EVENTS_FILE).open("ab") as log:
        log.write(b'{"event":"step","step":3,"lo')
    main_report(folder, tmp_path / "torn.html")
    go(tree_of(folder, corpus, 4))
    assert all(json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines())
    assert sorted(steps(folder / EVENTS_FILE)) == [1, 2, 3, 4]
    main_report(folder, tmp_path / "whole.html")


def main_report(folder: Path, out: Path) -> None:
    try:
        main(["report", str(folder), "-o", str(out)])
    except SystemExit as left:
        assert left.code in (0, None)
    assert out.is_file()


def break_saves(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ranks cannot write their part of the checkpoint of `step`."""
    plain = store.write_pieces

    def fails(path: Path, *args: Any) -> Any:
        if f"step-{step:08d}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, *args)

    patch.setattr(store, "write_pieces", fails)


def test_a_save_that_fails_at_the_end_is_an_error_with_the_newest_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = r"of step 4, could not be saved: .*No space left on device; the newest is .*step-00000002"
    with monkeypatch.context() as patch:
        break_saves(patch, 4)
        with pytest.raises(ThinwireError, match=said) as told:
            go(tree_of(tmp_path, corpus, 4))
    assert told.value.exit_status == 1
    assert list(read_events(tmp_path / EVENTS_FILE, "run_end"))[-1]["reason"] == "finished, but not saved"
    go(tree_of(tmp_path, corpus, 4))
    assert list(read_events(tmp_path / EVENTS_FILE, "run_start"))[-1]["step"] == 2
    assert list(read_events(tmp_path / EVENTS_FILE, "run_end"))[-1]["reason"] == "finished"


def test_a_save_that_fails_in_between_costs_only_itself(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_saves(monkeypatch, 2)
    go(tree_of(tmp_path, corpus, 4))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.fixture
def open_to_all(corpus: Path, tmp_path: Path) -> Iterator[Path]:
    """A finished run where others may go: pytest's own folders are closed to them."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    folder = Path("/tmp") / f"{tmp_path.name}-{os.getpid()}"
    go(tree_of(folder, corpus, 2))
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 65534, 65534)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("closed", ["", "run.toml", "checkpoints", "checkpoints/step-00000002", EVENTS_FILE])
def test_a_folder_that_may_not_be_read_is_a_sentence_and_stays_as_it_is(
    corpus: Path, open_to_all: Path, closed: str
) -> None:
    job = resolve(Path("run.toml"), build(RunConfig, tree_of(open_to_all, corpus, 4), "run.toml"))
    before = sorted(str(path) for path in open_to_all.rglob("*"))
    (open_to_all / closed).chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises((ConfigError, CheckpointError), match="Permission denied"), open_folder(job, fresh=False):
            train_job(job, World.join(cluster_of([1]), rank=0, size=1, local_rank=0, host="", port=0), StopRequest())
    finally:
        os.seteuid(0)
        (open_to_all / closed).chmod(0o755)
    assert sorted(str(path) for path in open_to_all.rglob("*")) == before


MANIFEST = "checkpoints/step-00000002/manifest.json"


@pytest.mark.parametrize(
    ("verb", "closed"),
    [
        *(("eval", closed) for closed in ("", "run.toml", "checkpoints", MANIFEST)),
        *(("generate", closed) for closed in ("", MANIFEST)),
        *(("export", closed) for closed in ("", "run.toml", MANIFEST)),
        *(("report", closed) for closed in ("", "plan.json", EVENTS_FILE)),
    ],
)
def test_what_only_reads_says_in_a_sentence_what_it_may_not_read(
    open_to_all: Path, verb: str, closed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (open_to_all / closed).chmod(0)
    os.seteuid(65534)
    out = ["-o", str(open_to_all / "out")] if verb in ("export", "report") else []
    try:
        with pytest.raises(SystemExit) as left:
            main([verb, str(open_to_all), *out])
    finally:
        os.seteuid(0)
        (open_to_all / closed).chmod(0o755)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert re.fullmatch(r"thinwire: .*Permission denied.*\n", said), said
