"""Writes a benchmark's report to a folder: JSON, a Markdown table, a figure as PNG, and all of it as one HTML file."""

import base64
import html
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """What a report is called: its files, its heading, its picture."""

    name: str
    title: str
    picture: str


def write(
    page: Report,
    told: dict[str, Any],
    folder: Path,
    figure: "Figure",
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    lines: Sequence[str],
) -> None:
    """`NAME`.json of all that is `told`, .md, .png and `NAME`_page.html in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{page.name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    figure.savefig(folder / f"{page.name}.png", dpi=110)
    below = [*lines, *origin(told)]
    (folder / f"{page.name}.md").write_text(markdown(page, columns, rows, below), encoding="utf-8")
    whole = as_html(page, columns, rows, below, folder / f"{page.name}.png")
    (folder / f"{page.name}_page.html").write_text(whole, encoding="utf-8")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, the kernel, torch and `packages`."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in ("torch", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def origin(told: dict[str, Any]) -> list[str]:
    used = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return [f"Command: `{told['command']}`", f"{told['date']}; {used}."]


def markdown(page: Report, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]) -> str:
    table = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    below = "\n\n".join(lines)
    return f"# {page.title}\n\n![{page.picture}]({page.name}.png)\n\n{body}\n\n{below}\n"


def as_html(
    page: Report, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str], picture: Path
) -> str:
    """One file that needs no other."""
    inline = base64.b64encode(picture.read_bytes()).decode("ascii")
    title, alt = html.escape(page.title), html.escape(page.picture, quote=True)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    below = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    style = (
        "body{font:15px sans-serif;margin:5vw}img{max-width:100%}.wide{overflow-x:auto}p{overflow-wrap:anywhere}"
        "td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style><h1>{title}</h1>'
        f'<img alt="{alt}" src="data:image/png;base64,{inline}">'
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>{below}\n'
    )
