"""Held-out scores are those of torch's own cross entropy on the checkpoint's weights, however the text is dealt out."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from runs import make_corpus, run_tree, train_in
from thinwire.data.loader import Batch, evaluation_batches
from thinwire.errors import CheckpointError, ConfigError
from thinwire.evaluate.load import LoadedRun, device_for, load_run
from thinwire.evaluate.scoring import Score, score
from thinwire.files.events import read_events
from thinwire.train.folder import EVENTS_FILE
from worlds import run_world


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose run scored all of its held-out text at the end."""
    folder = tmp_path_factory.mktemp("run")
    run = {"steps": 4, "eval_every": 0, "eval_sequences": 0, "sample_tokens": 0}
    run_world([1], train_in, run_tree(folder / "run", make_corpus(folder), run=run, checkpoint={"every_steps": 2}))
    return folder / "run"


def _validation(loaded: LoadedRun, sequences: int) -> list[Batch]:
    validation = loaded.corpus().validation
    assert validation is not None
    return list(evaluation_batches(validation, loaded.tokens, sequences, vocab_size=loaded.spec.vocab_size))


def _scored(loaded: LoadedRun, batches: list[Batch]) -> Score:
    return score(loaded.model, batches, token_bytes=loaded.corpus().token_bytes, cross_documents=True)


def test_the_score_is_torchs_cross_entropy_and_that_of_the_run(trained: Path) -> None:
    loaded = load_run(trained)
    batches = _validation(loaded, 8)
    expected, tokens = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = loaded.model(torch.from_numpy(batch.tokens_BT)).flatten(0, 1)
        targets = torch.from_numpy(batch.targets_BT).flatten()
        expected += float(F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100))
        tokens += int((targets != -100).sum())
    found = _scored(loaded, batches)
    assert found.tokens == tokens > 100
    assert found.loss_sum == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / tokens), rel=1e-5)
    *_, last = read_events(trained / EVENTS_FILE, "eval")
    assert found.loss == pytest.approx(last["loss"], rel=1e-5)


def test_bits_per_byte_are_those_of_the_bytes_scored(trained: Path) -> None:
    """Of the tokenizer of bytes every token but the end of a document is one byte."""
    loaded = load_run(trained)
    batches = _validation(loaded, 8)
    ends = loaded.corpus().token_bytes
    assert ends is not None
    scored = sum(int(((b.targets_BT >= 0) & (b.targets_BT != ends.eot)).sum()) for b in batches)
    found = _scored(loaded, batches)
    assert found.text_bytes == scored < found.tokens
    assert found.bits_per_byte == pytest.approx(found.loss_sum / math.log(2) / scored)
    unknown = score(loaded.model, batches, token_bytes=None, cross_documents=True)
    assert unknown.bits_per_byte is None and unknown.loss_sum == found.loss_sum


def test_shares_add_up_to_the_whole(trained: Path) -> None:
    loaded = load_run(trained)
    whole = _scored(loaded, _validation(loaded, 8))
    single = _validation(loaded, 1)
    shares = [_scored(loaded, single[rank::3]) for rank in range(3)]
    assert sum(share.tokens for share in shares) == whole.tokens
    assert sum(share.text_bytes for share in shares) == whole.text_bytes
    assert sum(share.loss_sum for share in shares) == pytest.approx(whole.loss_sum, rel=1e-5)


def test_scoring_leaves_the_model_in_the_mode_it_had(trained: Path) -> None:
    loaded = load_run(trained)
    for training in (True, False):
        loaded.model.train(training)
        _scored(loaded, _validation(loaded, 8)[:1])
        assert loaded.model.training is training


def test_the_checkpoint_of_a_step_is_loaded_when_it_is_asked_for(trained: Path) -> None:
    first, last = load_run(trained, step=2), load_run(trained)
    assert (first.step, last.step) == (2, 4)
    batches = _validation(last, 8)
    assert _scored(first, batches).loss > _scored(last, batches).loss
    with pytest.raises(CheckpointError, match="step"):
        load_run(trained, step=3)


@pytest.mark.parametrize("tokens", ["", "tokens = 1", "tokens = true", 'tokens = "many"'])
def test_a_folder_or_file_that_is_no_runs_is_a_sentence(tokens: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run folder: it has no run\.toml"):
        load_run(tmp_path)
    (tmp_path / "run.toml").write_text(f'[data]\npath = "corpus"\n[batch]\n{tokens}\n')
    with pytest.raises(ConfigError, match=r"run\.toml does not say batch\.tokens, a whole number above 1"):
        load_run(tmp_path)


def test_a_device_is_one_that_there_is() -> None:
    assert device_for("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="'tpu' is unknown; there are cpu and cuda"):
        device_for("tpu")
    if not torch.cuda.is_available():
        assert device_for(None).type == "cpu"
        with pytest.raises(ConfigError, match="sees no GPU on this machine; leave --device out, or give cpu"):
            device_for("cuda")
