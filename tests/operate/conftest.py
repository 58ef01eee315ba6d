"""What tests of launchers share: a corpus, and `thinwire launch` called in this process."""

from pathlib import Path
from typing import Any

import pytest

from runs import make_corpus
from thinwire.cli import main


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """(status, output, errors) of `thinwire launch ...`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def launch(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["launch", *map(str, arguments)])
        said = capsys.readouterr()
        assert left.value.code is None or isinstance(left.value.code, int)
        return left.value.code or 0, said.out, said.err

    return launch
