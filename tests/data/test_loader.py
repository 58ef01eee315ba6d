"""The loader: order by seed and step alone, nothing lost, documents kept apart."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.data.indexed import IndexedTokens, IndexedWriter
from thinwire.data.loader import IGNORED, Loader, Packing, Prefetcher, evaluation_batches, permute
from thinwire.errors import DataError


def dataset(folder: Path, lengths: list[int], vocab: int = 1000) -> IndexedTokens:
    """Documents of `lengths` tokens; the stream is 0, 1, 2, ... modulo the vocabulary."""
    writer = IndexedWriter(folder / "d", vocab)
    sizes = np.array(lengths, np.int32)
    writer.add(np.arange(sizes.sum()) % vocab, sizes)
    writer.close()
    return IndexedTokens(folder / "d")


@pytest.fixture
def split(tmp_path: Path) -> IndexedTokens:
    return dataset(tmp_path, [7, 50, 1, 30, 200, 13])


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 50))
@settings(max_examples=60)
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(count), count, key=(seed, epoch))
    assert np.array_equal(np.sort(order), np.arange(count))


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [permute(np.arange(500), 500, key=key).tolist() for key in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    displaced = np.abs(np.array(orders[0]) - np.arange(500)).mean()
    assert 120 < displaced < 210  # a uniform permutation displaces by 500 / 3 in the mean


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 12), (1, 1), (2, 3), (3, 4), (4, 1), (6, 2)])
def test_the_global_batch_is_the_same_for_every_world_and_micro_batch(
    split: IndexedTokens, ranks: int, micro_batch: int
) -> None:
    loader = Loader(Packing(split, 8), batch_sequences=12, seed=5)
    for step in (0, 1, 7, 1000):
        whole = loader.micro_batches(step, rank=0, ranks=1, micro_batch=12)[0].tokens_BT
        shared = [
            batch.tokens_BT
            for rank in range(ranks)
            for batch in loader.micro_batches(step, rank=rank, ranks=ranks, micro_batch=micro_batch)
        ]
        assert np.array_equal(np.concatenate(shared), whole)


def test_one_epoch_trains_on_every_sequence_once(split: IndexedTokens) -> None:
    packing = Packing(split, 8)
    loader = Loader(packing, batch_sequences=1, seed=3)
    drawn = [int(loader.indices(step)[0]) for step in range(packing.sequences)]
    assert sorted(drawn) == list(range(packing.sequences))


def test_targets_follow_tokens_and_positions_restart_at_documents(split: IndexedTokens) -> None:
    batch = Packing(split, 300, cross_documents=True).batch(np.array([0]))
    assert np.array_equal(batch.targets_BT, batch.tokens_BT + 1)
    assert batch.documents_BT[0, [0, 6, 7, 56, 57, 58]].tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.positions_BT[0, [0, 6, 7, 56, 57, 58, 59]].tolist() == [0, 6, 0, 49, 0, 0, 1]


def test_apart_documents_do_not_predict_each_other(split: IndexedTokens) -> None:
    batch = Packing(split, 300, cross_documents=False).batch(np.array([0]))
    ignored = np.flatnonzero(batch.targets_BT[0] == IGNORED)
    assert ignored.tolist() == [6, 56, 57, 87, 287]


def test_a_document_that_began_earlier_counts_from_the_sequence(split: IndexedTokens) -> None:
    batch = Packing(split, 10).batch(np.array([2]))
    assert batch.positions_BT[0].tolist() == list(range(10))


@pytest.mark.parametrize(("tokens", "sequences"), [(7, 3), (300, 2), (301, 5), (1, 64)])
def test_evaluation_scores_every_token_after_the_first_once(split: IndexedTokens, tokens: int, sequences: int) -> None:
    scored = np.concatenate([
        batch.targets_BT[batch.targets_BT != IGNORED] for batch in evaluation_batches(split, tokens, sequences)
    ])  # fmt: skip
    assert np.array_equal(scored, split.stream[1:])


def test_the_prefetcher_gives_the_loaders_batches_from_any_step_on(split: IndexedTokens) -> None:
    loader = Loader(Packing(split, 8), batch_sequences=4, seed=1)
    feed = Prefetcher(loader, rank=1, ranks=2, micro_batch=1)
    feed.start(17)
    for step in range(17, 30):
        expected = loader.micro_batches(step, rank=1, ranks=2, micro_batch=1)
        for got, want in zip(feed.next(), expected, strict=True):
            assert np.array_equal(got.tokens_BT, want.tokens_BT)
    feed.close()


def test_ids_beyond_the_vocabulary_reach_the_caller_as_a_sentence(split: IndexedTokens) -> None:
    loader = Loader(Packing(split, 8, vocab_size=100), batch_sequences=30, seed=1)
    feed = Prefetcher(loader, rank=0, ranks=1, micro_batch=30)
    feed.start(0)
    with pytest.raises(DataError, match="a vocabulary of 100"):
        feed.next()
    feed.close()


def test_a_corpus_shorter_than_a_sequence_is_refused(split: IndexedTokens) -> None:
    with pytest.raises(DataError, match="shorter than one sequence"):
        Loader(Packing(split, 400), batch_sequences=1, seed=0)
