"""Timing a device that is given work ahead of time, by a clock that tests turn; and timings that are refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from thinwire.cluster.cluster import Cluster, Device, Level
from thinwire.cluster.hardware import DEVICES
from thinwire.comm.world import World
from thinwire.errors import ProbeError
from thinwire.probe.effort import CODECS, FULL, GPU_FULL, GPU_QUICK, QUICK, Effort
from thinwire.probe.fit import Timings, measured_cluster
from thinwire.probe.links import Stopwatch, timed
from thinwire.probe.measure import check

ONE = (Level(name="node", fanout=1),)
H200 = Cluster(device=DEVICES["h200"], levels=ONE)
ALONE = World(0, 1, 0, Cluster(levels=ONE), torch.device("cpu"))


class Queue:
    """An accelerator: launching takes `launch_s`, work is done later, and at first at a fifth of its speed."""

    def __init__(self, work_s: float, *, launch_s: float = 4e-6, slow_until_s: float = 0.0) -> None:
        self.now_s, self._free_s = 0.0, 0.0
        self._work_s, self._launch_s, self._slow_until_s = work_s, launch_s, slow_until_s

    def launch(self) -> None:
        self.now_s += self._launch_s
        begin_s = max(self.now_s, self._free_s)
        self._free_s = begin_s + self._work_s * (5 if begin_s < self._slow_until_s else 1)

    def settle(self) -> None:
        self.now_s = max(self.now_s, self._free_s)

    @property
    def watch(self) -> Stopwatch:
        return Stopwatch(lambda: self.now_s, self.settle)


@pytest.mark.parametrize("work_s", [1e-3, 40e-6, 2.0])
def test_work_that_is_queued_is_timed_until_it_is_done(work_s: float) -> None:
    queue = Queue(work_s)
    seconds = timed(ALONE, 5, queue.launch, watch=queue.watch)
    assert seconds == pytest.approx([work_s] * len(seconds), rel=1e-3, abs=5e-6)
    assert len(seconds) == (5 if work_s < 1 else 3)


def test_what_is_smaller_than_a_launch_takes_a_launch() -> None:
    queue = Queue(1e-7)
    assert timed(ALONE, 5, queue.launch, watch=queue.watch) == pytest.approx([4e-6] * 5, rel=0.01)


def test_a_device_is_warm_when_a_window_begins() -> None:
    queue = Queue(1e-3, slow_until_s=0.06)
    assert timed(ALONE, 5, queue.launch, watch=queue.watch) == pytest.approx([1e-3] * 5, rel=1e-2)


def _timings(products: dict[tuple[int, int, int], float], *, copy_s: float = 2**31 / 4e12, **more: Any) -> Timings:
    """Of an accelerator: seconds of products; a copy of 2 GiB; launches of 4 us."""
    found = Timings(
        matmuls={shape: [1.02 * second, second, 1.05 * second] for shape, second in products.items()},
        copies={2**31: [copy_s] * 3}, launches=[4e-6] * 3, gathers={}, reduces={}, slowdowns=[],
        memory_bytes=140 * 2**30, runtime_bytes=2**30,
    )  # fmt: skip
    return replace(found, **more)


GOOD = {(256, 1024, 1024): 5e-6, (8192, 8192, 8192): 2 * 8192**3 / 790e12}
TINY = {(32, 64, 64): 8e-6, (256, 256, 256): 12e-6}


def test_no_product_is_faster_than_the_peak_that_is_written() -> None:
    timings = _timings(GOOD)
    check(H200, timings)
    found = measured_cluster(H200, timings)
    assert found.device.peak_flops_per_s == pytest.approx(790e12)
    assert found.calibration is not None
    median = 790e12 / 1.02
    assert found.device.peak_flops_per_s * found.calibration.matmul_efficiency <= 790e12
    assert found.device.peak_flops_per_s * found.calibration.matmul_efficiency == pytest.approx(median, rel=0.1)


@pytest.mark.parametrize(
    ("timings", "says"),
    [
        (lambda: _timings(TINY), r"256 x 256 x 256, took .* operation on nothing .*: launching was timed"),
        (lambda: _timings({(8192, 8192, 8192): 0.39}), r"2.76 TFLOP/s, 0.279 % of what h200 .*something else uses it"),
        (lambda: _timings({(8192, 8192, 8192): 2e-4}), r"% of what h200 is stated to do .*it is not that device"),
        (lambda: _timings(GOOD, copy_s=1e-5), r"a copy of 2147483648 bytes ran at 215 TB/s"),
        (lambda: _timings(GOOD, launches=[0.0]), "the clock cannot be trusted"),
        (lambda: _timings({**GOOD, (64, 64, 64): float("nan")}), "64 x 64 x 64 took nan s"),
    ],
)  # fmt: skip
def test_timings_that_cannot_be_are_refused(timings: Callable[[], Timings], says: str) -> None:
    with pytest.raises(ProbeError, match=says):
        check(H200, timings())


def test_a_device_of_unknown_figures_is_believed() -> None:
    unknown = Cluster(device=Device(name="mine", kind="cuda"), levels=ONE)
    check(unknown, _timings({(8192, 8192, 8192): 0.39}))
    assert measured_cluster(unknown, _timings({(8192, 8192, 8192): 0.39})).device.peak_flops_per_s == pytest.approx(
        2 * 8192**3 / 0.39
    )


def test_an_accelerators_products_are_large_enough_to_fill_it() -> None:
    assert [Effort.of(kind, quick=quick) for kind in ("cpu", "cuda") for quick in (True, False)] == [
        QUICK, FULL, GPU_QUICK, GPU_FULL
    ]  # fmt: skip
    for effort in (GPU_QUICK, GPU_FULL):
        fastest_s = max(2.0 * m * k * n for m, k, n in effort.shapes) / 2.25e15  # on a B200
        assert fastest_s > 20 * 5e-6
        assert effort.codecs == CODECS
        assert all(shape.spec.parameters > 0 for shape in effort.blocks)
