"""A sweep as a page: totals, modules by plan, models by plan, and every reason why a cell is not equal."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version

from zoo.cells import NO_REFERENCE, Cell
from zoo.modules import modules
from zoo.training import PEERS

VERDICTS = ("equal", "refused", "wrong")


def page(cells: Sequence[Cell], before: Sequence[Cell], command: str) -> str:
    """Markdown. A cell that was otherwise in `before` reads `wrong → equal`."""
    known = {(cell.case, cell.world, cell.plan): cell.verdict for cell in before}
    parts = [
        "# Model zoo",
        f"`{command}`, {date.today():%Y-%m-%d}, torch {version('torch')}, transformers {version('transformers')}, "
        f"peft {version('peft')}, CPU. What the words mean and how to run it: [benchmarks](README.md#other-peoples-models).",
        *totals(cells, known),
        "## Modules with one difficulty each",
        *grid([cell for cell in cells if not cell.case.startswith("hf/")], known, everything=True),
        "## Causal language models of transformers",
        *grid([cell for cell in cells if cell.case.startswith("hf/")], known, everything=False),
        "## Why",
        *reasons(cell for cell in cells if cell.plan not in PEERS),
        "## Why torch's own trainers",
        *reasons(cell for cell in cells if cell.plan in PEERS),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def totals(cells: Iterable[Cell], known: dict[tuple[str, str, str], str]) -> list[str]:
    """Cells of each verdict, for each kind of case, world and plan."""
    counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    earlier: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for cell in cells:
        if cell.verdict != NO_REFERENCE:
            key = ("models" if cell.case.startswith("hf/") else "modules", cell.world, cell.plan)
            counts[key][cell.verdict] += 1
            if (cell.case, cell.world, cell.plan) in known:
                earlier[key][known[cell.case, cell.world, cell.plan]] += 1
    rows = [
        [
            *key,
            *(_changed(str(earlier[key][word]) if earlier[key] else "", str(count[word]), known) for word in VERDICTS),
        ]
        for key, count in counts.items()
    ]
    return ["\n".join(_table(["cases", "ranks", "plan", *VERDICTS], rows))] if rows else []


def grid(cells: Sequence[Cell], known: dict[tuple[str, str, str], str], *, everything: bool) -> list[str]:
    """A row for each case and a column for each plan; cases that are equal everywhere in one line, unless `everything`."""
    about = {name: case.about for name, case in modules().items()}
    plans = list(dict.fromkeys(cell.plan for cell in cells if cell.verdict != NO_REFERENCE))
    found: dict[str, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell.verdict != NO_REFERENCE:
            found[cell.case][cell.plan].append(cell)
    words = {case: [_words(of[plan], known) for plan in plans] for case, of in found.items()}
    plain = [case for case, row in words.items() if set(row) == {"equal"} and not everything]
    rows = [[f"`{case}` {about.get(case, '')}".strip(), *row] for case, row in words.items() if case not in plain]
    none = {cell.case: cell.detail for cell in cells if cell.verdict == NO_REFERENCE}
    return [
        "\n".join(_table(["case", *plans], rows)) if rows else "",
        f"Equal under every plan ({len(plain)}): " + ", ".join(_short(case) for case in plain) + "." if plain else "",
        f"Without a reference, because they do not train here in one process ({len(none)}):\n\n"
        + "\n".join(f"- {_short(case)}: {_told(detail)}" for case, detail in none.items())
        if none
        else "",
    ]


def reasons(cells: Iterable[Cell]) -> list[str]:
    """Each reason once, with the cells that have it; numbers may differ."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.verdict in ("refused", "wrong"):
            groups[cell.verdict, re.sub(r"[-+]?\d[\d.e+-]*|'[^']*'", "N", cell.detail)].append(cell)
    lines = []
    for (word, _), alike in groups.items():
        where: dict[str, list[str]] = defaultdict(list)
        for cell in alike:
            where[cell.case].append(f"{cell.plan} ({cell.world})")
        places = "; ".join(f"{_short(case)} under {', '.join(of)}" for case, of in where.items())
        lines.append(f"- {word}: {_told(alike[0].detail)} — {places}")
    return ["\n".join(lines)] if lines else []


def _words(cells: Sequence[Cell], known: dict[tuple[str, str, str], str]) -> str:
    told = {
        cell.world: _changed(known.get((cell.case, cell.world, cell.plan), ""), cell.verdict, known) for cell in cells
    }
    if len({cell.verdict for cell in cells}) == 1:  # with what it was before, where that is known of one of them
        return max(told.values(), key=len)
    return ", ".join(f"{world}: {word}" for world, word in told.items())


def _changed(before: str, now: str, known: dict[tuple[str, str, str], str]) -> str:
    return f"{before} → {now}" if known and before and before != now else now


def _short(case: str) -> str:
    return f"`{case.removeprefix('hf/')}`"


def _told(detail: str) -> str:
    """A reason as one line that Markdown leaves alone."""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", detail[:400])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
