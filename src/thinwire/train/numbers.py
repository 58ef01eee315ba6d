"""Small numbers about the machine and the model that the progress line needs."""

import time
from typing import Protocol

import torch

from thinwire.cluster.cluster import Device

_PROBE_SIZE, _PROBE_S = {"cpu": 256, "cuda": 4096}, 0.15
"""Rows of a square matrix: on a CPU it stays in the cache, and a product ends before another process has its turn."""


def peak_flops_per_s(device: Device, dtype: torch.dtype) -> tuple[float, str]:
    """`(FLOP per second, "default" | "given" | "measured")` of one rank, the denominator of MFU.

    A CPU has no published figure that fits one thread of it, so a square matrix product is timed instead.
    """
    if device.peak_flops_per_s is not None:
        return device.peak_flops_per_s, device.origin
    where = "cuda" if device.kind == "cuda" else "cpu"
    size = _PROBE_SIZE[where]
    a = torch.rand(size, size, dtype=dtype, device=where)
    a @ a  # the first product loads libraries and starts threads, which may take longer than all the others
    best_s, end_s = float("inf"), time.perf_counter() + _PROBE_S
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        a @ a
        if where == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s, "measured"


class CountsFlops(Protocol):
    """A spec that knows the FLOPs of forward and backward per token in a sequence of `tokens`, or that it does not."""

    def model_flops_per_token(self, tokens: int) -> float | None: ...


def mfu(spec: CountsFlops, *, tokens_per_sequence: int, tokens_per_s: float, ranks: int, peak: float) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): recomputed activations do not count.

    None if the model's FLOPs are not known.
    """
    flops = spec.model_flops_per_token(tokens_per_sequence)
    return None if flops is None else round(flops * tokens_per_s / (ranks * peak), 5)
