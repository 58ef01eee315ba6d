"""The check for GPUs, every part of it end to end on the CPU; and what it says where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"


def check(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_and_has_its_rows_on_the_page(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = check("--dry", "--minutes", "14", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")][2:]
    parts = {row[0] for row in rows}
    assert parts == {
        "codec bits", "codec speed", "references", "steps", "resume", "generate", "two ranks on one host", "probe",
    }  # fmt: skip
    assert {row[4] for row in rows} == {"yes", "not judged"}
    assert sum(row[0] == "steps" for row in rows) == 4
    assert any(row[2] == "losses equal, 0 of 78 tensors differ" for row in rows)


@pytest.mark.slow
def test_a_part_that_fails_is_a_row_and_the_status_says_so(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    done = check("--dry", "--minutes", "0", "--parts", "probe", "references", "--out", out)
    assert done.returncode == 1
    assert "| probe | failed | no time was left |  | NO |" in out.read_text()
    assert out.read_text().count("| references |") == 2


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = check()
    assert done.returncode == 2
    assert done.stderr == "torch sees no GPU here; --dry runs every part on the CPU\n"
    assert not done.stdout


def test_a_python_without_torch_and_wheels_that_are_not_there_are_told(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    assert check(PYTHON=str(fake)).stderr == f"{fake} has no torch; set PYTHON to one that has\n"
    missing = check(WHEELS=str(tmp_path / "none"))
    assert (missing.returncode, missing.stderr) == (2, f"WHEELS={tmp_path / 'none'} is no folder\n")
