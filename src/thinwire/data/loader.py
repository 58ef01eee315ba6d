"""From a stream of documents to micro-batches, as pure functions of the seed and the step.

The stream is cut into sequences of T tokens (each with the token that follows). The order of an epoch is a permutation
computed one index at a time (a Feistel network with cycle walking), so that nothing is shuffled, stored or replayed:
the global batch of step n is the same set of sequences for every world size and micro-batch size.

Shapes: B sequences of a micro-batch, T tokens of a sequence
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.indexed import IndexedTokens
from thinwire.errors import DataError

IGNORED = -100
_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """One micro-batch; int64 arrays of shape (B, T). A target of -100 is not scored."""

    tokens_BT: NDArray[np.int64]
    targets_BT: NDArray[np.int64]
    positions_BT: NDArray[np.int64]
    """Position within the document, or within the sequence for a document that began before it."""
    documents_BT: NDArray[np.int64]
    """Number of the document in the corpus."""


class Packing:
    """Documents back to back, cut every `tokens` tokens. Sequence i predicts the stream's tokens i T + 1 .. i T + T.

    Of conversations only the answers are scored.
    """

    def __init__(
        self, split: IndexedTokens, tokens: int, *, cross_documents: bool = True, vocab_size: int | None = None
    ) -> None:
        self._split, self._tokens, self._cross, self._vocab = split, tokens, cross_documents, vocab_size

    @property
    def sequences(self) -> int:
        """Whole sequences; what is left over at the end is not trained on in this epoch length."""
        return max(0, (self._split.tokens - 1) // self._tokens)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The sequences `indices`; one past the last whole one may be partial, and is padded with ignored targets.

        Raises DataError if an id does not fit the vocabulary.
        """
        offsets_BT = indices[:, None] * self._tokens + np.arange(self._tokens)
        last = self._split.tokens - 1
        tokens_BT = self._split.stream[np.minimum(offsets_BT, last)].astype(np.int64)
        targets_BT = self._split.stream[np.minimum(offsets_BT + 1, last)].astype(np.int64)
        self._check_ids(tokens_BT, targets_BT)
        documents_BT = np.searchsorted(self._split.starts, offsets_BT, side="right") - 1
        begins_BT = np.maximum(self._split.starts[documents_BT], offsets_BT[:, :1])
        ignored_BT = offsets_BT + 1 > last
        if not self._cross:
            following_BT = np.searchsorted(self._split.starts, offsets_BT + 1, side="right") - 1
            ignored_BT |= following_BT != documents_BT
        if self._split.answers is not None:
            ignored_BT |= self._split.answers[np.minimum(offsets_BT + 1, last)] == 0
        targets_BT[ignored_BT] = IGNORED
        return Batch(tokens_BT, targets_BT, offsets_BT - begins_BT, documents_BT)

    def _check_ids(self, tokens_BT: NDArray[np.int64], targets_BT: NDArray[np.int64]) -> None:
        largest = max(int(tokens_BT.max()), int(targets_BT.max()))
        if self._vocab is not None and largest >= self._vocab:
            raise DataError(
                f"the corpus has token id {largest}, the model a vocabulary of {self._vocab}; it was made with another "
                f"tokenizer, or model.vocab_size must be larger"
            )


class Loader:
    """Batches of a packing by step. `state` of any iterator over it is the step alone."""

    def __init__(self, packing: Packing, *, batch_sequences: int, seed: int) -> None:
        if packing.sequences == 0:
            raise DataError("the corpus is shorter than one sequence; prepare more text or lower batch.tokens")
        self._packing, self._batch, self._seed = packing, batch_sequences, seed

    def indices(self, step: int) -> NDArray[np.int64]:
        """Which sequences step `step` (0 is the first) trains on, in the order in which ranks share them."""
        count = self._packing.sequences
        drawn = np.arange(step * self._batch, (step + 1) * self._batch)
        epochs, within = drawn // count, drawn % count
        out = np.empty_like(drawn)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = permute(within[chosen], count, key=(self._seed, int(epoch)))
        return out

    def micro_batches(self, step: int, *, rank: int, ranks: int, micro_batch: int) -> list[Batch]:
        """This rank's micro-batches of a step. The ranks' shares are disjoint and together the whole batch."""
        share = self._batch // ranks
        mine = self.indices(step)[rank * share : (rank + 1) * share]
        return [self._packing.batch(mine[i : i + micro_batch]) for i in range(0, share, micro_batch)]


def permute(values: NDArray[np.int64], count: int, *, key: tuple[int, int]) -> NDArray[np.int64]:
    """A bijection of 0..count-1 chosen by `key`, at the places `values`.

    A balanced Feistel network over the next power of four, walked until it lands inside (Black & Rogaway 2002).
    """
    half_bits = max(1, (max(1, count - 1).bit_length() + 1) // 2)
    out = values.astype(np.uint64)
    inside = np.zeros(out.shape, dtype=bool)
    while not inside.all():
        out[~inside] = _feistel(out[~inside], half_bits, key)
        inside = out < count
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half_bits: int, key: tuple[int, int]) -> NDArray[np.uint64]:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = x >> np.uint64(half_bits), x & mask
    for number in range(_ROUNDS):
        salt = np.uint64((key[0] * 0x9E3779B97F4A7C15 + key[1] * 0xD1B54A32D192ED03 + number) & (2**64 - 1))
        left, right = right, left ^ (_mix(right + salt) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Prefetcher:
    """Prepares the next steps' micro-batches in a thread."""

    def __init__(self, loader: Loader, *, rank: int, ranks: int, micro_batch: int, depth: int = 2) -> None:
        self._loader, self._place, self._depth = (
            loader,
            {"rank": rank, "ranks": ranks, "micro_batch": micro_batch},
            depth,
        )
        self._thread: threading.Thread | None = None

    def start(self, step: int) -> None:
        """Begin with `step`: the whole state of the iterator."""
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(self._depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(step,), name="data", daemon=True)
        self._thread.start()

    def next(self) -> list[Batch]:
        """The next step's micro-batches. Raises what preparing them raised."""
        made = self._ready.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None

    def _work(self, step: int) -> None:
        while not self._stopping.is_set():
            try:
                made: list[Batch] | BaseException = self._loader.micro_batches(step, **self._place)
            except BaseException as error:
                made = error
            step += 1
            while not self._stopping.is_set():
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue


def evaluation_batches(
    split: IndexedTokens,
    tokens: int,
    sequences: int,
    *,
    limit: int | None = None,
    cross_documents: bool = True,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """The stream in order, every token after the first scored exactly once; `limit` stops after so many sequences."""
    packing = Packing(split, tokens, cross_documents=cross_documents, vocab_size=vocab_size)
    whole = -(-(split.tokens - 1) // tokens)
    count = whole if limit is None else min(whole, limit)
    for first in range(0, count, sequences):
        yield packing.batch(np.arange(first, min(first + sequences, count)))


def ignored_like(batch: Batch) -> Batch:
    """The same shapes with nothing to score: for a rank that has no share of the last round."""
    nothing: NDArray[Any] = np.full_like(batch.targets_BT, IGNORED)
    return Batch(batch.tokens_BT, nothing, batch.positions_BT, batch.documents_BT)
