"""A score is the sum over tokens that count, whatever lies beside them, and a run's checkpoint is scored as it was left."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from runs import make_corpus, thinwire, write_run
from thinwire.data.loader import Batch
from thinwire.errors import ConfigError
from thinwire.evaluate.load import device_for, load_run
from thinwire.evaluate.scoring import Score, score

VOCABULARY = 11
# B sequences, T tokens


class Table(nn.Module):
    """A language model whose loss of a target depends on the token before it alone: a table of log-probabilities."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logp_VV = torch.log_softmax(torch.randn(VOCABULARY, VOCABULARY, generator=generator), dim=-1)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        picked_BT = self.logp_VV[tokens_BT, targets_BT.clamp(min=0)]
        return -(picked_BT * (targets_BT >= 0)).sum()


def batch(seed: int) -> Batch:
    draw = np.random.default_rng(seed)
    text_BT = draw.integers(0, VOCABULARY, (3, 9))
    targets_BT = np.where(draw.random((3, 8)) < 0.3, -100, text_BT[:, 1:])
    zeros_BT = np.zeros_like(targets_BT)
    return Batch(text_BT[:, :-1].copy(), targets_BT, zeros_BT, zeros_BT)


def test_the_sums_are_those_of_a_loop_over_tokens() -> None:
    model, batches = Table().train(), [batch(1), batch(2)]
    lengths = np.arange(VOCABULARY)
    found = score(model, batches, token_bytes=Lengths(lengths), cross_documents=True)
    loss = tokens = size = 0.0
    for one in batches:
        for before, target in zip(one.tokens_BT.ravel(), one.targets_BT.ravel(), strict=True):
            if target >= 0:
                loss, tokens, size = loss - float(model.logp_VV[before, target]), tokens + 1, size + lengths[target]
    assert (found.tokens, found.text_bytes) == (tokens, size)
    assert found.loss_sum == pytest.approx(loss, rel=1e-5)
    assert model.training, "a model that trained goes on training"


class Lengths:
    """Bytes of tokens that stand for as many whatever comes before."""

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = lengths

    def __getitem__(self, tokens_BT: np.ndarray) -> np.ndarray:
        return self._lengths[tokens_BT]


def test_the_figures_are_ratios_of_the_sums() -> None:
    found = Score(loss_sum=20 * math.log(2), tokens=10, text_bytes=40)
    assert found.loss == pytest.approx(2 * math.log(2))
    assert found.perplexity == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(0.5)
    assert Score(1.0, 1, 0).bits_per_byte is None
    assert Score(0.0, 0, 0).loss == 0.0


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device 'tpu' is unknown; there are cpu and cuda"):
        device_for("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU on this machine"):
            device_for("cuda")


def test_a_checkpoint_is_loaded_as_it_was_saved_and_the_newest_by_default(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    run = write_run(tmp_path, corpus, run={"steps": 10})
    assert thinwire("train", run).returncode == 0
    newest, earlier = load_run(tmp_path / "run"), load_run(tmp_path / "run", step=5)
    assert (newest.step, earlier.step) == (10, 5)
    assert newest.tokens == 32
    names = [name for name, _ in newest.model.named_parameters()]
    assert any(not torch.equal(newest.model.get_parameter(name), earlier.model.get_parameter(name)) for name in names)
    again = load_run(tmp_path / "run", step=10)
    assert all(torch.equal(newest.model.get_parameter(name), again.model.get_parameter(name)) for name in names)
