"""A rank's heap keeps what it has.

glibc gives the top of the heap back to the kernel as soon as a few MB of it are free. A step frees its activations and
gradients at every micro-batch and takes them again at once, page by page, each page cleared by the kernel: on small
micro-batches a sixth of a CPU's backward.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h; setting one ends glibc's own choice of the other."""
_NEVER, _LARGEST = 2**31 - 1, 32 * 2**20
"""The second is the most that glibc takes; larger pieces get a mapping of their own whatever is set."""
_OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_heap() -> bool:
    """Tell the C library that freed memory stays with this process; True if it took it.

    Nothing changes where the user has set the allocator through the environment, and without glibc.
    """
    if any(name in os.environ for name in _OWN_CHOICE):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _NEVER))
