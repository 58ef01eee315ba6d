"""What a rank frees between micro-batches it takes again without asking the kernel."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from thinwire.comm.device import keep_heap
told = keep_heap() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def rounds(count):
    for _ in range(count):
        taken = [libc.malloc(2**20) for _ in range(32)]
        for piece in taken:
            ctypes.memset(piece, 1, 2**20)
        for piece in reversed(taken):
            libc.free(piece)
rounds(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(8)
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def faults(word: str, **setting: str) -> tuple[str, int]:
    """(what `keep_heap` said, page faults of 8 rounds that take and free 32 MiB)."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word],
        env={**environment, **setting},
        capture_output=True,
        text=True,
        check=True,
    )
    told, count = done.stdout.split()
    return told, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_stays_with_the_process() -> None:
    told, kept = faults("keep")
    _, given_back = faults("leave")
    assert told == "True"
    assert kept < 100, "one page in a hundred at most"
    assert given_back > 8 * 2048, "without it the kernel clears the pages anew in every round: else this shows nothing"


def test_a_users_own_setting_stands() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
