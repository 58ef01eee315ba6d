"""Runs in, one file out: written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from thinwire.cluster.cluster import Cluster
from thinwire.errors import ConfigError
from thinwire.report.page import page
from thinwire.report.predict import predict
from thinwire.report.read import read_runs


def write_report(folders: Sequence[Path], out: Path, *, cluster: Cluster | None = None) -> int:
    """Write the page to `out`; returns its bytes. Raises ConfigError for a folder that is no run, or an `out` that
    cannot be written. Predictions rest on `cluster` if given, else on each run's own."""
    runs = read_runs(folders)
    text = page(runs, [predict(run, cluster) for run in runs])
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}; choose another with -o PATH") from None
    return out.stat().st_size
