"""What was predicted of our own runs beside what they did: pure functions over numbers, no runs, no torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

Sent = Mapping[str, Mapping[str, float]]
"""level -> purpose -> bytes of rank 0 in one step."""
STATES = ("params", "grads", "optimizer")
TARGETS = {"error": 0.10, "tau": 0.8, "memory": 0.08}
"""Median error of step times, least rank correlation, largest error of memory."""


@dataclass(frozen=True)
class Predicted:
    """Of one plan, made before it ran: seconds in all and by cause, bytes, and memory by state and of activations."""

    step_s: float
    causes: Mapping[str, float]
    sent: Sent
    states: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """Of one plan: each repeat's median step, mean seconds by cause, bytes of a step by the ledger, states held."""

    medians_s: tuple[float, ...]
    causes: Mapping[str, float]
    sent: Sent
    held: Mapping[str, float]
    steps_s: tuple[float, ...] = ()
    """Every step that counts."""

    @property
    def step_s(self) -> float:
        return statistics.median(self.medians_s)

    @property
    def fastest_s(self) -> float:
        """The median of the fastest quarter of all steps: nearest to what they take when nothing else runs."""
        fastest = sorted(self.steps_s or self.medians_s)
        return statistics.median(fastest[: max(1, len(fastest) // 4)])

    @property
    def spread(self) -> float:
        """Half of what lies between the slowest and the fastest repeat, as a share of the median."""
        return (max(self.medians_s) - min(self.medians_s)) / 2 / self.step_s


@dataclass(frozen=True)
class Row:
    """One plan of one world."""

    plan: str
    predicted: Predicted
    measured: Measured

    @property
    def error(self) -> float:
        return self.predicted.step_s / self.measured.step_s - 1

    @property
    def bytes_equal(self) -> bool:
        return clean(self.predicted.sent) == clean(self.measured.sent)

    @property
    def memory_error(self) -> float:
        """Of parameters, gradients and optimizer states together."""
        return sum(self.predicted.states[s] for s in STATES) / sum(self.measured.held[s] for s in STATES) - 1


def clean(sent: Sent) -> dict[str, dict[str, int]]:
    """Whole bytes, without what is nought and without the few control messages of a step, which no plan changes."""
    found = {
        level: {purpose: round(count) for purpose, count in purposes.items() if purpose != "control" and round(count)}
        for level, purposes in sent.items()
    }
    return {level: purposes for level, purposes in found.items() if purposes}


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's rank correlation, form a (Biometrika 30, 1938): concordant pairs less discordant ones over all pairs."""
    return tau_of(list(combinations(zip(first, second, strict=True), 2)))


def tau_of(pairs: Sequence[tuple[tuple[float, float], tuple[float, float]]]) -> float:
    """The same over chosen pairs of (first, second); 1.0 where there is none."""
    score = sum(_sign(a[0] - b[0]) * _sign(a[1] - b[1]) for a, b in pairs)
    return score / len(pairs) if pairs else 1.0


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def told_apart(rows: Sequence[Row]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """(predicted, measured) of the pairs of plans that the repeats order: every one of a plan's before the other's."""
    return [
        ((a.predicted.step_s, a.measured.step_s), (b.predicted.step_s, b.measured.step_s))
        for a, b in combinations(rows, 2)
        if max(a.measured.medians_s) < min(b.measured.medians_s)
        or max(b.measured.medians_s) < min(a.measured.medians_s)
    ]


@dataclass(frozen=True)
class Summary:
    """Of one world."""

    median_error: float
    worst_error: float
    tau: float
    """Over all pairs of plans."""
    tau_apart: float
    """Over the pairs that the repeats order."""
    pairs_apart: int
    pairs: int
    repeats: int
    bytes_equal: bool
    memory_error: float
    """The largest."""
    fastest_error: float
    """The median of the errors against the fastest quarter of each plan's steps."""
    fastest_tau: float
    """Kendall's tau against them."""

    @property
    def met(self) -> dict[str, bool]:
        """Target by target."""
        return {
            "median error within 10%": self.median_error <= TARGETS["error"],
            "tau at least 0.8": self.tau >= TARGETS["tau"],
            "bytes equal": self.bytes_equal,
            "memory within 8%": self.memory_error <= TARGETS["memory"],
        }


def summary(rows: Sequence[Row]) -> Summary:
    """Of the rows of one world; at least one."""
    errors = [row.error for row in rows]
    apart = told_apart(rows)
    predicted, fastest = [row.predicted.step_s for row in rows], [row.measured.fastest_s for row in rows]
    return Summary(
        median_error=statistics.median(abs(error) for error in errors),
        worst_error=max(errors, key=abs),
        tau=kendall_tau(predicted, [row.measured.step_s for row in rows]),
        tau_apart=tau_of(apart),
        pairs_apart=len(apart),
        repeats=min(len(row.measured.medians_s) for row in rows),
        pairs=len(rows) * (len(rows) - 1) // 2,
        bytes_equal=all(row.bytes_equal for row in rows),
        memory_error=max(abs(row.memory_error) for row in rows),
        fastest_error=statistics.median(abs(p / f - 1) for p, f in zip(predicted, fastest, strict=True)),
        fastest_tau=kendall_tau(predicted, fastest),
    )


COLUMNS = (
    "plan", "step predicted", "step measured", "error", "fastest quarter", "repeats ±", "MB sent", "bytes",
    "states, MiB", "error",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """The row of a table, as text."""
    spread = f"{row.measured.spread:.1%}" if len(row.measured.medians_s) > 1 else "one"
    sent = sum(count for purposes in clean(row.measured.sent).values() for count in purposes.values()) / 1e6
    return [
        row.plan, f"{row.predicted.step_s * 1e3:.1f} ms", f"{row.measured.step_s * 1e3:.1f} ms",
        f"{row.error:+.1%}", f"{row.measured.fastest_s * 1e3:.1f} ms", spread,
        f"{sent:.3f}", "equal" if row.bytes_equal else "DIFFER",
        f"{sum(row.measured.held[s] for s in STATES) / 2**20:.2f}", f"{row.memory_error:+.1%}",
    ]  # fmt: skip


def lines(found: Summary) -> list[str]:
    """What the table adds up to, misses as misses."""
    verdict = ", ".join(f"{target}: {'met' if met else 'MISSED'}" for target, met in found.met.items())
    apart = f", {found.tau_apart:.2f} over the {found.pairs_apart} that the repeats order" if found.repeats > 1 else ""
    return [
        f"Error of step times: median {found.median_error:.1%}, worst {found.worst_error:+.1%}. Kendall's tau "
        f"{found.tau:.2f} over all {found.pairs} pairs of plans{apart}. Largest error of states "
        f"{found.memory_error:.1%}.",
        verdict + ".",
        f"Against the fastest quarter of each plan's steps, when other work disturbs least: median error "
        f"{found.fastest_error:.1%}, tau {found.fastest_tau:.2f}.",
    ]


def as_json(row: Row) -> dict[str, Any]:
    """For programs."""
    return asdict(row) | {"error": row.error, "bytes_equal": row.bytes_equal, "memory_error": row.memory_error}
