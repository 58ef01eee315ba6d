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
    """Of one plan by one probe: seconds in all and by cause, bytes, memory by state, and of all tensors at the peak."""

    step_s: float
    causes: Mapping[str, float]
    sent: Sent
    states: Mapping[str, float]
    peak: float


@dataclass(frozen=True)
class Measured:
    """Of one run of a plan: every step that counts, mean seconds by cause, bytes of a step by the ledger, states held."""

    steps_s: tuple[float, ...]
    causes: Mapping[str, float]
    sent: Sent
    held: Mapping[str, float]

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)


@dataclass(frozen=True)
class Row:
    """One plan of one world: what each probe said of it, and what the run after that probe did."""

    plan: str
    predicted: tuple[Predicted, ...]
    measured: tuple[Measured, ...]
    peak: float | None = None
    """Bytes of all tensors of rank 0 at their most, in a run of its own."""

    @property
    def predicted_s(self) -> float:
        return statistics.median(each.step_s for each in self.predicted)

    @property
    def measured_s(self) -> float:
        return statistics.median(each.step_s for each in self.measured)

    @property
    def error(self) -> float:
        """The median over the repeats, each with its own probe's prediction."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return statistics.median(told.step_s / seen.step_s for told, seen in pairs) - 1

    @property
    def spread(self) -> float:
        """Half of what lies between the slowest and the fastest repeat, as a share of the median."""
        medians_s = [each.step_s for each in self.measured]
        return (max(medians_s) - min(medians_s)) / 2 / self.measured_s

    @property
    def bytes_equal(self) -> bool:
        sent = [clean(each.sent) for each in (*self.predicted, *self.measured)]
        return all(each == sent[0] for each in sent)

    @property
    def states_error(self) -> float:
        """Of parameters, gradients and optimizer states together."""
        told, seen = self.predicted[-1].states, self.measured[-1].held
        return sum(told[s] for s in STATES) / sum(seen[s] for s in STATES) - 1

    @property
    def peak_error(self) -> float | None:
        return None if self.peak is None else self.predicted[-1].peak / self.peak - 1


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
    """(predicted, measured) of the pairs of plans that the repeats order: one is the faster in every repeat."""
    return [
        ((a.predicted_s, a.measured_s), (b.predicted_s, b.measured_s))
        for a, b in combinations(rows, 2)
        if len({one.step_s < other.step_s for one, other in zip(a.measured, b.measured, strict=True)}) == 1
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
    """The largest, of states and where it was measured of the peak."""

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
    return Summary(
        median_error=statistics.median(abs(error) for error in errors),
        worst_error=max(errors, key=abs),
        tau=kendall_tau([row.predicted_s for row in rows], [row.measured_s for row in rows]),
        tau_apart=tau_of(apart),
        pairs_apart=len(apart),
        repeats=min(len(row.measured) for row in rows),
        pairs=len(rows) * (len(rows) - 1) // 2,
        bytes_equal=all(row.bytes_equal for row in rows),
        memory_error=max(abs(error) for row in rows for error in (row.states_error, row.peak_error or 0.0)),
    )


COLUMNS = (
    "plan", "step predicted", "step measured", "error", "repeats ±", "MB sent", "bytes", "states, MiB", "error",
    "peak, MiB", "error",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """The row of a table, as text."""
    spread = f"{row.spread:.1%}" if len(row.measured) > 1 else "one"
    last = row.measured[-1]
    sent = sum(count for purposes in clean(last.sent).values() for count in purposes.values()) / 1e6
    return [
        row.plan, f"{row.predicted_s * 1e3:.1f} ms", f"{row.measured_s * 1e3:.1f} ms", f"{row.error:+.1%}", spread,
        f"{sent:.3f}", "equal" if row.bytes_equal else "DIFFER",
        f"{sum(last.held[s] for s in STATES) / 2**20:.2f}", f"{row.states_error:+.1%}",
        "-" if row.peak is None else f"{row.peak / 2**20:.1f}",
        "-" if row.peak_error is None else f"{row.peak_error:+.1%}",
    ]  # fmt: skip


def lines(found: Summary) -> list[str]:
    """What the table adds up to, misses as misses."""
    verdict = ", ".join(f"{target}: {'met' if met else 'MISSED'}" for target, met in found.met.items())
    apart = f", {found.tau_apart:.2f} over the {found.pairs_apart} that the repeats order" if found.repeats > 1 else ""
    return [
        f"Error of step times: median {found.median_error:.1%}, worst {found.worst_error:+.1%}. Kendall's tau "
        f"{found.tau:.2f} over all {found.pairs} pairs of plans{apart}. Largest error of memory "
        f"{found.memory_error:.1%}.",
        verdict + ".",
    ]


def as_json(row: Row) -> dict[str, Any]:
    """For programs."""
    errors = {"error": row.error, "states_error": row.states_error, "peak_error": row.peak_error}
    return asdict(row) | errors | {"bytes_equal": row.bytes_equal}
