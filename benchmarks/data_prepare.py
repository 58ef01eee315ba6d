"""Speed of preparation: the bytes tokenizer in MB/s per core, BPE against the tokenizer library called bare.

One worker, one core; alternating in one run; medians. The bare side encodes the same documents with the library and
keeps the ids in memory; ours also hashes, splits, converts and writes them.

    OMP_NUM_THREADS=1 python benchmarks/data_prepare.py
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers
from rich.console import Console
from rich.table import Table

from thinwire.data.prepare import Options, prepare
from thinwire.data.sources import documents, files_of


def ours_s(tokenizer: str, folder: Path) -> float:
    start_s = time.perf_counter()
    prepare(Options(("stdlib",), tokenizer), folder, workers=1, force=True)
    return time.perf_counter() - start_s


def bare_s(library: tokenizers.Tokenizer) -> float:
    start_s = time.perf_counter()
    texts = [text for path in files_of("stdlib") for text, _ in documents(path)]
    kept = [coded.ids for coded in library.encode_batch_fast(texts, add_special_tokens=False)]
    assert len(kept) == len(texts)
    return time.perf_counter() - start_s


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size = sum(path.stat().st_size for path in files_of("stdlib"))
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained"
        prepare(Options(("stdlib",), "bpe:4096"), trained, workers=1)
        spec = str(trained / "tokenizer.json")
        library = tokenizers.Tokenizer.from_file(spec)
        rows = []
        for _ in range(options.rounds):
            raw = ours_s("bytes", Path(folder) / "bytes")
            rows.append((raw, ours_s(spec, Path(folder) / "bpe"), bare_s(library)))
    table = Table("round", "bytes MB/s", "bpe:4096 MB/s", "library bare MB/s", "bpe / bare")
    for number, (raw, bpe, bare) in enumerate(rows, 1):
        mb = size / 1e6
        table.add_row(str(number), f"{mb / raw:.0f}", f"{mb / bpe:.2f}", f"{mb / bare:.2f}", f"{bare / bpe:.3f}")
    speed = statistics.median(size / 1e6 / raw for raw, _, _ in rows)
    ratio = statistics.median(bare / bpe for _, bpe, bare in rows)
    table.add_row("median", f"{speed:.0f}", "", "", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
