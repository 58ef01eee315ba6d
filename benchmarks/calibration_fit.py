"""Fit the calibration's constants to measured steps: one set for a whole cluster, never one for a row.

The loss is the mean absolute logarithm of predicted over measured (a run that went wrong counts once, not squared), plus
a weak pull towards the defaults, so that a constant which the runs do not show stays where it was. The minimum is found
with scipy's simplex method (Nelder and Mead 1965): the cost functions have kinks, and there are few constants.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from thinwire.cluster.cluster import Calibration
from thinwire.predict.bound import least_s
from thinwire.predict.candidate import Candidate, Setting
from thinwire.predict.placement import place
from thinwire.predict.simulate import simulate_step
from thinwire.predict.step import core_of

FITTED = (
    "matmul_efficiency", "matmul_half", "memory_efficiency", "launch_s", "inner_link_efficiency", "outer_link_efficiency",
)  # fmt: skip
PULL = 0.01
"""Weight of the squared distance, in powers of e, from the defaults."""
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A published or recorded step."""

    setting: Setting
    candidate: Candidate
    seconds: float


def predict(row: Measured, calibration: Calibration) -> float:
    """Seconds of the row's step under `calibration`, simulated."""
    setting = _under(row.setting, calibration)
    axes = place(row.candidate, setting.cluster, calibration)
    return simulate_step(setting, row.candidate, axes, keep_spans=False).step_s


def least(row: Measured, calibration: Calibration) -> float:
    """Its lower bound, which costs a twentieth of that: on the published rows within 2%, on those of vTrain the same."""
    setting = _under(row.setting, calibration)
    axes = place(row.candidate, setting.cluster, calibration)
    return least_s(setting, row.candidate, axes, core_of(setting, row.candidate, axes))


def _under(given: Setting, calibration: Calibration) -> Setting:
    return Setting(
        given.spec, given.cluster, given.sequences, given.tokens, given.framework, calibration, given.compute_dtype
    )


def fit(
    rows: Sequence[Measured],
    start: Calibration,
    names: Sequence[str] = FITTED,
    *,
    weights: Sequence[float] | None = None,
    iterations: int = 250,
) -> Calibration:
    """The calibration with `names` fitted to `rows`: their lower bounds, as a fit asks thousands of times. Deterministic."""
    default = np.array([math.log(getattr(start, name)) for name in names])
    share = np.asarray(weights if weights is not None else [1.0] * len(rows))
    share = share / share.sum()

    def loss(point: Vector) -> float:
        calibration, outside = _at(start, names, point)
        ratios = np.array([abs(math.log(least(row, calibration) / row.seconds)) for row in rows])
        return float(share @ ratios + PULL * np.sum((point - default) ** 2) + 10.0 * outside)

    corners = np.vstack([default, default + 0.25 * np.eye(len(default))])
    stop = {"initial_simplex": corners, "maxiter": iterations, "fatol": 1e-6, "xatol": math.inf}
    best = minimize(loss, default, method="Nelder-Mead", options=stop).x
    return _at(start, names, best)[0].model_copy(update={"origin": "measured"})


def _at(start: Calibration, names: Sequence[str], point: Vector) -> tuple[Calibration, float]:
    """The calibration at `point`, and by how much (in powers of e) shares had to be held at 1."""
    values, outside = {}, 0.0
    for name, logarithm in zip(names, point, strict=True):
        high = 0.0 if name.endswith("efficiency") else math.inf
        outside += max(0.0, float(logarithm) - high)
        values[name] = math.exp(min(float(logarithm), high))
    return start.model_copy(update=values), outside
