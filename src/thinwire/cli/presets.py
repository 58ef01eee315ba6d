"""`thinwire presets`: the devices, clusters and models that run files name, with their figures. No torch."""

import json
from typing import Annotated

import typer

from thinwire.cluster.hardware import CLUSTERS, DEVICES
from thinwire.model.presets import preset, preset_names
from thinwire.units import show_bytes, show_count, show_rate

Rows = list[list[str]]


def run(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """List what `cluster.device`, `cluster.preset` and `model.preset` may name.

    Example: thinwire presets
    """
    if as_json:
        listed = {
            "devices": {name: device.model_dump(mode="json") for name, device in DEVICES.items()},
            "clusters": {name: cluster.model_dump(mode="json") for name, cluster in CLUSTERS.items()},
            "models": {name: preset(name).model_dump(mode="json") for name in preset_names()},
        }
        typer.echo(json.dumps(listed, indent=1))
        return
    _show("device", ["bf16 peak", "memory", "memory rate"], _devices(), 'cluster.device = "h100"')
    _show("cluster", ["device", "ranks", "levels, inner first"], _clusters(), 'cluster.preset = "three-sites"')
    _show("model", ["parameters", "layers", "hidden", "vocabulary", "tokens"], _models(), 'model.preset = "llama-3-8b"')


def _devices() -> Rows:
    rows = []
    for name, device in DEVICES.items():
        peak, memory, rate = device.peak_flops_per_s, device.memory_bytes, device.memory_bytes_per_s
        known = (
            [f"{show_count(peak)}FLOP/s", show_bytes(memory), f"{show_count(rate)}B/s"]
            if peak and memory and rate
            else []
        )
        rows.append([name, *(known or ["measured at the start", "-", "-"])])
    return rows


def _clusters() -> Rows:
    rows = []
    for name, cluster in CLUSTERS.items():
        levels = [
            f"{level.name}={level.fanout}" + (f" at {show_rate(level.bytes_per_s)}" if level.bytes_per_s else "")
            for level in cluster.levels
        ]
        rows.append([name, cluster.device.name, f"{cluster.ranks:,}", ", ".join(levels)])
    return rows


def _models() -> Rows:
    specs = [(name, preset(name)) for name in preset_names()]
    return [
        [
            name,
            show_count(spec.parameters),
            *(f"{n:,}" for n in (spec.layers, spec.hidden, spec.vocab_size, spec.max_tokens)),
        ]
        for name, spec in specs
    ]


def _show(what: str, columns: list[str], rows: Rows, example: str) -> None:
    """A table of left-aligned columns as wide as what is in them."""
    table = [[what, *columns], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    typer.echo(f"{what}s: {example}")
    for row in table:
        typer.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    typer.echo()
