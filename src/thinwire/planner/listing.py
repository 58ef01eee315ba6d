"""A step program in words: every operation in its order, what it sends on which level, and what it waits for."""

from collections.abc import Iterator, Sequence
from typing import Any

from thinwire.plan.hops import Hop
from thinwire.plan.operations import ONCE, Body, Key, Op, Program, RankClass, Repeat
from thinwire.units import show_bytes

_WORDS = {
    "gather": "gather the weights of {unit}",
    "forward": "forward of {unit}",
    "backward": "backward of {unit}",
    "reduce": "reduce the gradients of {unit}",
    "refresh": "gather the new weights of {unit}",
    "release": "free the gathered weights of {unit}",
    "activation": "activations inside {unit}",
    "send": "send to the next stage",
    "flags": "say which gradients came",
    "order": "compare what was gathered",
    "tokens": "sum losses and tokens",
    "norm": "sum the gradient norm",
    "update": "update with the optimizer",
    "agree": "agree on orders, in a run's first step",
    "vote": "vote whether to stop",
    "outer": "outer round",
}


def listing(program: Program, level_names: Sequence[str], ranks: int) -> list[str]:
    """Lines for a person: rank classes that differ, each operation once, with what repeats around it."""
    each, lines = ranks // len(program.classes), list[str]()
    for number, rank_class in enumerate(program.classes):
        sent = sum(count for purposes in program.sent_bytes(number).values() for count in purposes.values())
        operations = sum(1 for _ in rank_class.ops())
        lines.append(
            f"{rank_class.name}, {each} ranks: {len(rank_class.units)} units, {operations} operations in a step, "
            f"{show_bytes(sent)} sent by a rank"
        )
        lines += _Lines(rank_class, level_names).of(rank_class.body, 1)
    return lines


def program_document(program: Program) -> dict[str, Any]:
    """The program for other programs: rank classes, each with its operations, folded as they are."""
    return {
        "digest": program.digest,
        "classes": [
            {"name": each.name, "units": [unit.name for unit in each.units], "body": _plain(each.body)}
            for each in program.classes
        ],
    }


def _plain(body: Body) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for item in body:
        if isinstance(item, Repeat):
            found.append({**item._asdict(), "body": _plain(item.body)})
            continue
        plain = {"kind": item.kind, **item.key._asdict(), "units": item.units, "every": item.when.every}
        hops, after = [hop._asdict() for hop in item.hops], [key._asdict() for key in item.after]
        found.append({**plain, "hops": hops, "after": after})
    return found


class _Lines:
    def __init__(self, rank_class: RankClass, level_names: Sequence[str]) -> None:
        self._units, self._levels = [unit.name or "root" for unit in rank_class.units], level_names

    def of(self, body: Body, depth: int) -> Iterator[str]:
        for item in body:
            if isinstance(item, Repeat):
                yield f"{'  ' * depth}{item.times} times, {self._steps(item)}:"
                yield from self.of(item.body, depth + 1)
            else:
                yield "  " * depth + self._line(item)

    def _steps(self, repeat: Repeat) -> str:
        units = {+1: "each time the next unit", -1: "each time the unit before", 0: ""}[repeat.units]
        ahead = "micro-batch" if repeat.micro_batches == 1 else f"{repeat.micro_batches} micro-batches"
        return ", ".join(filter(None, (units, f"each time the next {ahead}" if repeat.micro_batches else "")))

    def _line(self, op: Op) -> str:
        key = op.key
        unit = self._units[key.unit] if key.unit >= 0 and key.role != "send" else ""
        unit += f" to {self._units[key.unit + op.units - 1]}" if op.units > 1 else ""
        where = "" if key.micro_batch == ONCE else f", micro-batch {key.micro_batch}"
        phase = f" ({key.phase})" if key.role in ("gather", "activation", "send") else ""
        parts = [_WORDS[key.role].format(unit=unit) + phase + where, *self._sent(op.hops)]
        if op.when.every > 1:
            parts.append(f"every {op.when.every} steps")
        if op.after:
            parts.append("after " + ", ".join(dict.fromkeys(map(self._awaited, op.after))))
        return "; ".join(parts)

    def _awaited(self, key: Key) -> str:
        if key.role == "refresh":
            return "new weights of the step before"
        if key.role == "send":
            return f"stage {key.stage} has sent"
        return {"gather": "they are gathered", "reduce": "all reductions", "update": "the update"}.get(
            key.role, key.role
        )

    def _sent(self, hops: Sequence[Hop]) -> Iterator[str]:
        sums: dict[tuple[int, str, str | None], int] = {}
        for hop in hops:
            name = (hop.level, hop.algorithm, hop.codec)
            sums[name] = sums.get(name, 0) + hop.sent_bytes
        for (level, algorithm, codec), count in sums.items():
            compressed = f" ({codec})" if codec else ""
            yield f"{algorithm.replace('_', '-')} on {self._levels[level]} {show_bytes(count)}{compressed}"
