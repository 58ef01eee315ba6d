"""Handing a script to sbatch: tried first (`--test-only`), so that a refusal leaves nothing behind. No torch."""

import shutil
import subprocess
from pathlib import Path

from thinwire.errors import ConfigError


def submit(text: str, logs: Path) -> str:
    """Submit the script `text` after making the folder `logs`: the job's number.

    Raises ConfigError if there is no sbatch, or with what sbatch says if it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on this machine's PATH, so nothing was submitted; do it on a login node of the cluster, or leave "
            "--submit out to have the script printed"
        )
    _sbatch(text, "--test-only")
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{logs} cannot be made: {error.strerror}; choose another with --set run.folder=PATH"
        ) from None
    return _sbatch(text, "--parsable").strip().partition(";")[0]


def _sbatch(text: str, option: str) -> str:
    done = subprocess.run(["sbatch", option], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
        raise ConfigError(f"sbatch refuses the job: {said or 'it does not say why'}")
    return done.stdout
