"""Folders named after their process: what is left of one that was killed goes, what belongs to one that runs stays."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from thinwire.errors import ConfigError
from thinwire.files.folders import atomic_folder, scratch_folder, write_atomic

_MAKES = """
import sys, time
from pathlib import Path
from thinwire.files.folders import scratch_folder, atomic_folder
with atomic_folder(Path(sys.argv[1]), force=True), scratch_folder():
    print("made", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that writes the folder `whole` and uses a temporary one."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [sys.executable, "-c", _MAKES, str(tmp_path / "whole")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        yield process
        process.kill()


def left(folder: Path) -> tuple[int, int]:
    """How many hidden folders there are, and how many temporary ones."""
    return len(list(folder.glob(".whole.partial-*"))), len(list((folder / "tmp").iterdir()))


def test_folders_of_a_process_that_runs_stay_and_of_one_that_was_killed_go(
    tmp_path: Path, maker: "subprocess.Popen[bytes]"
) -> None:
    with atomic_folder(tmp_path / "whole", force=True), scratch_folder():
        assert left(tmp_path) == (2, 2)
    assert left(tmp_path) == (1, 1)
    maker.kill()
    maker.wait()
    with atomic_folder(tmp_path / "whole", force=True), scratch_folder():
        assert left(tmp_path) == (1, 1)
    assert left(tmp_path) == (0, 0)


def test_what_is_not_named_after_a_process_is_nobodys_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("thinwire-lab-1-2-abc", "thinwire-abcd1234", "thinwire-1-1-1-1-1"):
        (tmp_path / name).mkdir()
    with scratch_folder():
        pass
    assert len(list(tmp_path.iterdir())) == 3


def test_without_room_for_temporary_files_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no temporary folder can be made: No such file or directory; set TMPDIR"):
        scratch_folder().__enter__()


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
