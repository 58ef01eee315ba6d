"""The examples run as they are printed, and learn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs import environment

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("mlp_loop.py", 4),
        pytest.param("huggingface_llama.py", 4, marks=pytest.mark.slow),
        pytest.param("mlp_rounds.py", 2, marks=pytest.mark.slow),
    ],
)
def test_the_example_runs_and_learns(name: str, ranks: int) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(EXAMPLES / name),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    losses = [float(text) for text in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert losses[-1] < 0.8 * losses[0]
    assert "FutureWarning" not in done.stderr
