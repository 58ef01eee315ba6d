"""Bytes that a rank sends across groups in one exchange, exactly. Pure, no torch.

n elements of this rank, M groups, c(n) bytes of n coded elements, a header of 16 bytes with every message (the weight of
the contribution, the hash of what it was taken from). Two groups swap their coded changes: (M - 1)(c(n) + 16). More
groups reduce in two hops, each with a chunk of ceil(n / M) elements, rounded up to whole blocks, for every other group:
2 (M - 1)(c(chunk) + 16), as what comes back takes as many bytes as what is sent. Sparse changes cannot be summed without
growing dense, so they are always swapped.
"""

from thinwire.wire import returned_as, wire_bytes

HEADER_BYTES = 16


def swaps(groups: int, codec: str) -> bool:
    """Whether every group sends its whole change to every other, instead of reducing chunks."""
    return groups <= 2 or codec == "topk"


def chunk_elements(n: int, groups: int, block: int) -> int:
    """Elements of one group's chunk in the two-hop form."""
    return -(-n // (groups * block)) * block


def exchange_bytes(n: int, *, groups: int, codec: str, block: int, element_bytes: int = 4) -> int:
    """Bytes that this rank sends for `n` elements of a fragment."""
    if groups == 1 or n == 0:
        return 0
    if swaps(groups, codec):
        return (groups - 1) * (wire_bytes(codec, n, block=block, element_bytes=element_bytes) + HEADER_BYTES)
    chunk = chunk_elements(n, groups, block)
    hops = (codec, returned_as(codec))
    coded = [wire_bytes(name, chunk, block=block, element_bytes=element_bytes) for name in hops]
    return (groups - 1) * sum(coded_bytes + HEADER_BYTES for coded_bytes in coded)
