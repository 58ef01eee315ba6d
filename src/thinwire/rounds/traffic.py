"""Bytes that a rank sends across groups in one exchange, exactly. Pure, no torch.

n elements of this rank, M groups, c(n) bytes of n coded elements, a header of 16 bytes with every message (the weight of
the contribution, the hash of what it was taken from). Two groups swap their coded changes: (M - 1)(c(n) + 16). More
groups reduce in two hops, each with a chunk of ceil(n / M) elements, rounded up to whole blocks, for every other group:
2 (M - 1)(c(chunk) + 16), as what comes back takes as many bytes as what is sent. Sparse changes cannot be summed without
growing dense, so they are always swapped.

Where k groups add up what they changed before one sum travels farther, each rank sends (k - 1)(16 + 4 ceil(n / k)) bytes
of fp32 inside for its part of the sum, and (k - 1) 4 ceil(n / k) for what comes back; across, M / k places exchange
ceil(n / k) elements as above, with 16 k bytes of headers in a message.

Groups that keep pace tell each other after every step that it is over: M - 1 bytes.
"""

from thinwire.wire import returned_as, wire_bytes

HEADER_BYTES, BEAT_BYTES = 16, 1


def swaps(groups: int, codec: str) -> bool:
    """Whether every group sends its whole change to every other, instead of reducing chunks."""
    return groups <= 2 or codec == "topk"


def chunk_elements(n: int, groups: int, block: int) -> int:
    """Elements of one group's chunk in the two-hop form."""
    return -(-n // (groups * block)) * block


def exchange_bytes(n: int, *, groups: int, codec: str, block: int, element_bytes: int = 4, summed: int = 1) -> int:
    """Bytes that this rank sends coded for `n` elements of a fragment; `summed` of the groups add theirs up before."""
    places, mine, head_bytes = groups // summed, inside_elements(n, summed), HEADER_BYTES * summed
    if places == 1 or n == 0:
        return 0
    if swaps(places, codec):
        return (places - 1) * (wire_bytes(codec, mine, block=block, element_bytes=element_bytes) + head_bytes)
    chunk = chunk_elements(mine, places, block)
    hops = (codec, returned_as(codec))
    coded = [wire_bytes(name, chunk, block=block, element_bytes=element_bytes) for name in hops]
    return (places - 1) * sum(coded_bytes + head_bytes for coded_bytes in coded)


def inside_elements(n: int, summed: int) -> int:
    """Elements of which each of the k = `summed` ranks that add up `n` has the sum."""
    return -(-n // summed)


def inside_bytes(n: int, *, summed: int, element_bytes: int = 4) -> tuple[int, int]:
    """Bytes that this rank sends to those it adds up with: (of changes and headers, of what comes back)."""
    chunk_bytes = element_bytes * inside_elements(n, summed)
    return ((summed - 1) * (chunk_bytes + HEADER_BYTES), (summed - 1) * chunk_bytes) if n else (0, 0)
