"""Rows, verdicts and mean curves of `outer_study.py`, from its records."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
COLUMNS = (
    "groups", "H", "kind", "seeds", "validation loss", "against data-parallel", "against own fp32",
    "kB a step out of a group", "of data-parallel's",
)  # fmt: skip
OWN_FP32 = {"streaming e3m0": "streaming fp32", "streaming int4": "streaming fp32"}
TARGET_KIND, TARGET_GROUPS, TARGET_INNER_STEPS = "streaming e3m0", 2, 30
TARGET_BASE, TARGET_FP32 = 0.01, 0.002


def summary(records: Sequence[Record], base: str) -> list[Record]:
    """A row per groups, H and kind: mean and spread over the seeds; ratios are between runs of the same seed."""
    keys = sorted({(r["groups"], r["inner_steps"]) for r in records})
    rows = []
    for groups, inner_steps in keys:
        here = [r for r in records if (r["groups"], r["inner_steps"]) == (groups, inner_steps)]
        exact = [r for r in records if (r["groups"], r["kind"]) == (groups, base)]
        for kind in dict.fromkeys(r["kind"] for r in here):
            mine = [r for r in here if r["kind"] == kind]
            fp32 = [r for r in here if r["kind"] == OWN_FP32.get(kind)]
            rows.append(_row(mine, exact, fp32))
    return rows


def _row(mine: Sequence[Record], exact: Sequence[Record], fp32: Sequence[Record]) -> Record:
    one = mine[0]
    sent = one["curve"][-1]["sent_bytes"] / _steps(one)
    exact_sent = exact[0]["curve"][-1]["sent_bytes"] / _steps(exact[0]) if exact else None
    return {
        "groups": one["groups"], "inner_steps": one["inner_steps"], "kind": one["kind"],
        "losses": {str(r["seed"]): final(r) for r in mine},
        "against_base": {} if one["kind"] == exact_kind(exact) else ratios(mine, exact), "against_fp32": ratios(mine, fp32),
        "bytes_a_step": sent, "bytes_of_base": sent / exact_sent if exact_sent else None,
    }  # fmt: skip


def exact_kind(exact: Sequence[Record]) -> str | None:
    return exact[0]["kind"] if exact else None


def _steps(record: Record) -> int:
    return int(record["steps"])


def final(record: Record) -> float:
    return float(record["curve"][-1]["loss"])


def ratios(mine: Iterable[Record], others: Sequence[Record]) -> dict[str, float]:
    """By seed: own loss over the other's with the same seed, less one."""
    by_seed = {other["seed"]: final(other) for other in others}
    return {str(r["seed"]): final(r) / by_seed[r["seed"]] - 1 for r in mine if r["seed"] in by_seed}


def spread(values: Iterable[float], form: str) -> str:
    """`mean ± standard deviation`; of one value the value."""
    seen = list(values)
    if not seen:
        return ""
    mean = format(statistics.mean(seen), form)
    return mean if len(seen) == 1 else f"{mean} ± {format(statistics.stdev(seen), form.replace('+', ''))}"


def cells(row: Record) -> list[str]:
    share = row["bytes_of_base"]
    return [
        str(row["groups"]), "" if row["inner_steps"] == 1 else str(row["inner_steps"]), row["kind"],
        str(len(row["losses"])), spread(row["losses"].values(), ".4f"),
        spread(row["against_base"].values(), "+.2%"),
        spread(row["against_fp32"].values(), "+.2%"),
        f"{row['bytes_a_step'] / 1e3:.2f}", "" if share is None else f"{share:.5f}",
    ]  # fmt: skip


def verdicts(rows: Sequence[Record]) -> list[str]:
    """A sentence for each target: what was asked, what was measured. Its own fp32 also over all groups and H together."""
    found = [row for row in rows if row["kind"] == TARGET_KIND]
    lines = []
    for row in found:
        place = f"{TARGET_KIND}, {row['groups']} groups, H = {row['inner_steps']}"
        if (row["groups"], row["inner_steps"]) == (TARGET_GROUPS, TARGET_INNER_STEPS):
            lines.append(_verdict(place, "data-parallel", row["against_base"].values(), TARGET_BASE))
        lines.append(_verdict(place, "its own fp32", row["against_fp32"].values(), TARGET_FP32))
    if len(found) > 1:
        pooled = [ratio for row in found for ratio in row["against_fp32"].values()]
        lines.append(_verdict(f"{TARGET_KIND}, all of them", "its own fp32", pooled, TARGET_FP32))
    return [line for line in lines if line]


def _verdict(place: str, other: str, ratios_seen: Iterable[float], target: float) -> str:
    """Met or missed by the mean; a mean that is nearer to the target than twice its standard error is called noisy."""
    seen = list(ratios_seen)
    if not seen:
        return ""
    mean, runs = statistics.mean(seen), len(seen)
    word = "met" if mean <= target else "missed"
    error = statistics.stdev(seen) / runs**0.5 if runs > 1 else None
    if error is None or abs(mean - target) < 2 * error:
        word += ", but within the noise of so few runs"
    noise = "" if error is None else f" with a standard error of {error:.2%}"
    return f"Target: {place}, at most {target:.1%} above {other}: {mean:+.2%}{noise} over {runs} runs, {word}."


def curves(records: Sequence[Record]) -> dict[tuple[int, int, str], list[Record]]:
    """By (groups, H, kind): at each validation tokens, bytes, and mean, least and largest loss over the seeds."""
    keys = dict.fromkeys((r["groups"], r["inner_steps"], r["kind"]) for r in records)
    found = {}
    for key in keys:
        mine = [r["curve"] for r in records if (r["groups"], r["inner_steps"], r["kind"]) == key]
        found[key] = [_point(points) for points in zip(*mine, strict=True)]
    return found


def _point(points: Sequence[Record]) -> Record:
    losses = [point["loss"] for point in points]
    return {
        "tokens": points[0]["tokens"], "sent_bytes": points[0]["sent_bytes"],
        "loss": statistics.mean(losses), "least": min(losses), "largest": max(losses),
    }  # fmt: skip


def least_exact_mb(records: Sequence[Record], groups: int) -> float:
    """MB that an exact fp32 all-reduce must send out of each group in a whole run: 2 (M - 1) / M * 4 bytes a number."""
    one = records[0]
    return 2 * (groups - 1) / groups * 4 * one["parameters"] * _steps(one) / 1e6
