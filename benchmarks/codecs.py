"""GB/s of encoding, decoding and summing against a plain copy of the same numbers, alternating, medians.

OMP_NUM_THREADS=1 python benchmarks/codecs.py
python benchmarks/codecs.py --device cuda --numbers 268435456

Bytes are those of the numbers (4 each), whatever the codec makes of them. A copy moves each byte twice: a codec with a
ratio of 1 treats as many numbers a second as a copy does. `sum` adds up what four ranks sent, per rank. On a GPU the
kernels are compiled first, and what they encode is compared with what plain torch on the CPU makes of the same numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from thinwire.comm.codecs.codec import Codec, make_codec

NAMES = ("bf16", "int8", "int4", "int4-hadamard", "e3m0")
RANKS = 4


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def measured(codec: Codec, x: Tensor, y: Tensor, rounds: int) -> list[float]:
    """Median seconds of: a copy, encoding, decoding, summing what RANKS ranks sent (per rank)."""
    coded = codec.encode(x)
    received = coded.expand(RANKS, -1).contiguous()
    codec.decode(coded, len(x), x.dtype)
    codec.sum_into(received, y)
    works: list[Callable[[], object]] = [
        lambda: y.copy_(x),
        lambda: codec.encode(x),
        lambda: codec.decode(coded, len(x), x.dtype),
        lambda: codec.sum_into(received, y),
    ]
    rows = [[seconds(work, x.device) for work in works] for _ in range(rounds)]
    copy_s, encode_s, decode_s, sum_s = (statistics.median(row[i] for row in rows) for i in range(len(works)))
    return [copy_s, encode_s, decode_s, sum_s / RANKS]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--numbers", type=int, default=1 << 20)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = arguments.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        arguments.error("torch sees no GPU here; leave --device out to measure the CPU")
    if options.device == "cpu":
        torch.set_num_threads(1)
    n = options.numbers
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(options.device)
    y = torch.empty_like(x)
    table = Table("codec", "rounding", "encode GB/s", "decode GB/s", "encode/copy", "decode/copy", "sum/copy")
    for name in NAMES:
        for rounding in ("nearest", "stochastic") if name != "bf16" else ("nearest",):
            codec = make_codec(name, rounding=rounding)  # type: ignore[arg-type]
            if options.device == "cuda" and not torch.equal(codec.encode(x).cpu(), codec.encode(x.cpu())):
                raise SystemExit(f"{name}, {rounding}: the GPU's bytes are not the CPU's")
            copy_s, *works_s = measured(codec, x, y, options.rounds)
            rates = [f"{4 * n / work_s / 1e9:.2f}" for work_s in works_s[:2]]
            table.add_row(name, rounding, *rates, *(f"{copy_s / work_s:.3f}" for work_s in works_s))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
