"""`thinwire report RUN...`: one self-contained page about runs, predictions beside measurements."""

from pathlib import Path
from typing import Annotated

import typer

from thinwire.cluster.cluster import read_cluster
from thinwire.report.page import write_report
from thinwire.units import show_bytes


def run(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page to write.")] = Path("report.html"),
    cluster: Annotated[
        Path | None, typer.Option(help="Predict with this cluster file, as `thinwire probe` writes it.")
    ] = None,
) -> None:
    """Loss, step time, bytes and memory of runs, and what was predicted, as one HTML file that opens offline.

    Example: thinwire report runs/stdlib -o report.html
    """
    size = write_report(folders, out, cluster=read_cluster(cluster) if cluster is not None else None)
    typer.echo(f"wrote {out} ({show_bytes(size)}): {len(folders)} run{'s' if len(folders) > 1 else ''}")
