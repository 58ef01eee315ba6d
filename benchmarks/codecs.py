"""GB/s of encoding and decoding on the CPU against a plain copy of the same bytes, one thread, alternating, medians.

OMP_NUM_THREADS=1 python benchmarks/codecs.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from thinwire.comm.codecs import make_codec

NAMES = ("bf16", "int8", "int4", "int4-hadamard", "e3m0")


def seconds(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--numbers", type=int, default=1 << 20)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    n = options.numbers
    x, y = torch.randn(n), torch.empty(n)
    table = Table("codec", "rounding", "encode GB/s", "decode GB/s", "encode / copy", "decode / copy")
    for name in NAMES:
        for rounding in ("nearest", "stochastic") if name != "bf16" else ("nearest",):
            codec = make_codec(name, rounding=rounding)  # type: ignore[arg-type]
            coded = codec.encode(x)
            codec.decode(coded, n, torch.float32)
            rows = [
                (
                    seconds(lambda: y.copy_(x)),
                    seconds(lambda codec=codec: codec.encode(x)),
                    seconds(lambda codec=codec, coded=coded: codec.decode(coded, n, torch.float32)),
                )
                for _ in range(options.rounds)
            ]
            copy, there, back = (statistics.median(row[i] for row in rows) for i in range(3))
            gb = 4 * n / 1e9
            table.add_row(
                name, rounding, f"{gb / there:.2f}", f"{gb / back:.2f}", f"{copy / there:.3f}", f"{copy / back:.3f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
