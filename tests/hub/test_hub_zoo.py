"""The benchmark of public config shapes, on a few of different kinds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from hub_shapes import SHAPES
from hub_zoo import Row, judge, table


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("meta-llama/Llama-3.2-1B", "equal"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "equal"),
        ("mistralai/Mistral-Nemo-Base-2407", "equal"),
        ("Qwen/QwQ-32B", "equal"),
        ("Qwen/Qwen3-0.6B", "equal"),
        ("distilbert/distilgpt2", "equal"),
        ("a Mistral fine-tune without the window's key", "refused: `sliding_window`"),
        ("NousResearch/Yarn-Llama-2-7b-64k", "refused: `rope_scaling`"),
        ("cerebras/Cerebras-GPT-111M", "refused: `activation_function`"),
        ("ibm-granite/granite-3.0-2b-base", "refused: `model_type`"),
    ],
)
def test_a_public_shape_has_transformers_logits_or_names_its_key(name: str, outcome: str, tmp_path: Path) -> None:
    row = judge(name, SHAPES[name], tmp_path)
    assert row.outcome == outcome, row
    assert (row.difference is not None) == (outcome == "equal" or "--max-tokens" in row.said)


def test_a_model_that_is_read_as_another_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: with a logit scaled, or a key read by nobody, it says so."""
    import hub_zoo

    honest = hub_zoo.own_logits
    monkeypatch.setattr(hub_zoo, "own_logits", lambda *given: honest(*given) * 1.001)
    assert judge("Qwen/Qwen2-7B", SHAPES["Qwen/Qwen2-7B"], tmp_path).outcome == "wrong"


def test_there_are_52_shapes_and_the_table_counts_them() -> None:
    rows = [Row(name, str(config["model_type"]), "equal", 1e-6, "") for name, config in SHAPES.items()]
    assert len(rows) == 52
    assert "Of 52 shapes 52 are" in table(rows)
