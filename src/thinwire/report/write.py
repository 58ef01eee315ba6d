"""Runs in, one file out: written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from thinwire.cluster.cluster import Cluster
from thinwire.folders import write_asked
from thinwire.report.page import page
from thinwire.report.predict import predict
from thinwire.report.read import read_runs


def write_report(folders: Sequence[Path], out: Path, *, cluster: Cluster | None = None) -> int:
    """Write the page to `out`; returns its bytes. Raises ConfigError for a folder that is no run, or an `out` that
    cannot be written. Predictions rest on `cluster` if given, else on each run's own."""
    runs = read_runs(folders)
    text = page(runs, [predict(run, cluster) for run in runs])
    write_asked(out, text, option="-o")
    return len(text.encode())
