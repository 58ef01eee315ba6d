"""A run of `thinwire train` in full, as a benchmark starts it: a run file and settings over it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

PROGRAM = [sys.executable, "-c", "from thinwire.cli import main; main()", "train"]
QUIET = {
    "run.sample_tokens": 0, "checkpoint.every_steps": 0, "tracking.to": "[]",
}  # fmt: skip
"""What a benchmark that reads losses needs none of."""


def train(run_file: str, chosen: Mapping[str, Any]) -> None:
    """Train to the last step, one thread a rank. Raises SystemExit with what the run said if it failed or was stopped."""
    words = [text for key, value in {**QUIET, **chosen}.items() for text in ("--set", f"{key}={value}")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*PROGRAM, run_file, *words], capture_output=True, text=True, env=env, check=False)
    if done.returncode or "stopped after step" in done.stdout:
        raise SystemExit(
            f"`thinwire train` ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}"
        )
