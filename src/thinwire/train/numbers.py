"""Small numbers about the machine and the model that the progress line needs."""

import time

import torch

from thinwire.cluster.cluster import Device
from thinwire.model.spec import ModelSpec

_PROBE_SIZE, _PROBE_S = 512, 0.15


def peak_flops_per_s(device: Device, dtype: torch.dtype) -> tuple[float, str]:
    """`(FLOP per second, "default" | "given" | "measured")` of one rank, the denominator of MFU.

    A CPU has no published figure that fits one thread of it, so a square matrix product is timed instead.
    """
    if device.peak_flops_per_s is not None:
        return device.peak_flops_per_s, device.origin
    where = "cuda" if device.kind == "cuda" else "cpu"
    a = torch.rand(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype, device=where)
    best_s, end_s = float("inf"), time.perf_counter() + _PROBE_S
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        a @ a
        if where == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * _PROBE_SIZE**3 / best_s, "measured"


def mfu(spec: ModelSpec, *, tokens_per_sequence: int, tokens_per_s: float, ranks: int, peak: float) -> float:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): recomputed activations do not count."""
    return spec.model_flops_per_token(tokens_per_sequence) * tokens_per_s / (ranks * peak)
