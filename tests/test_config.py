"""One TOML file in: precedence, nearest keys, round trip."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from thinwire.config import Frozen, build, differences, dump_toml, load, override
from thinwire.errors import ConfigError
from thinwire.train.config import RunConfig


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[data]\npath = "corpus"\n[optimizer]\nlr = 1e-3\n')
    return path


def test_the_file_is_overridden_by_set_in_order(run_file: Path) -> None:
    config = load(
        RunConfig, run_file, ["optimizer.lr=2e-3", "optimizer.lr=3e-3", "schedule.kind=wsd", "cluster.levels=[2,2]"]
    )
    assert config.optimizer.lr == 3e-3
    assert config.schedule.kind == "wsd"
    assert config.cluster.resolve().ranks == 4


def test_the_resolved_file_reads_back_equal(run_file: Path, tmp_path: Path) -> None:
    config = load(RunConfig, run_file, ["cluster.levels=[2,3]", "run.timeout=90 s", "data.sources=['stdlib']"])
    (tmp_path / "dump.toml").write_text(dump_toml(config))
    assert load(RunConfig, tmp_path / "dump.toml") == config


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optimzer.lr=1", "did you mean 'optimizer'"),
        ("optimizer.learning_rate=1", "the keys here are"),
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.lr=-1", "greater than 0"),
        ("batch.sequences=0", "greater than or equal to 1"),
        ("batch.sequences=many", "batch.sequences"),
        ("schedule.kind=cosin", "'cosine', 'wsd'"),
        ("schedule.warmup_steps=300", "leaves nothing"),
        ("cluster.levels=[0]", "greater than or equal to 1"),
        ("cluster.levels=[{name='all', fanout=2}]", "cannot be called 'all'"),
        ("nonsense", "is not of the form"),
        ("optimizer.lr.x=1", "is a value, not a section"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(run_file: Path, setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, run_file, [setting])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_not_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(RunConfig, tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(RunConfig, tmp_path / "bad.toml")


def test_override_leaves_its_input_alone_and_differences_lists_leaves() -> None:
    tree = {"a": {"b": 1}}
    changed = override(tree, ["a.b=2", "a.c=x"])
    assert tree == {"a": {"b": 1}}
    assert differences(tree, changed) == [("a.b", 1, 2), ("a.c", None, "x")]


class Inner(Frozen):
    renamed: ClassVar[Mapping[str, str]] = {"lead": "staleness_bound"}
    staleness_bound: int = 1


class Outer(Frozen):
    inner: Inner = Inner()


def test_a_key_under_its_old_name_works_and_the_new_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text("[inner]\nlead = 3\n")
    with pytest.warns(
        FutureWarning, match=r"old.toml: inner.lead is inner.staleness_bound now; the old name works for"
    ):
        assert load(Outer, path).inner.staleness_bound == 3
    with pytest.warns(FutureWarning, match=r"^lead is staleness_bound now"):
        assert Inner.model_validate({"lead": 4}).staleness_bound == 4
    assert build(Outer, {"inner": {"lead": 5}}, "a document of ours").inner.staleness_bound == 5  # warnings are errors
    with pytest.raises(ConfigError, match=r"lead is staleness_bound now, and both are given; leave lead out"):
        build(Outer, {"inner": {"lead": 5, "staleness_bound": 5}}, "file")
    path.write_text("[inner]\nlead = 3\nstaleness_bound = 3\n")
    with pytest.raises(ConfigError, match=r"inner.lead is inner.staleness_bound now, and both are given"):
        load(Outer, path)


@pytest.mark.parametrize(
    ("in_file", "set_as"), [("lead", "staleness_bound"), ("staleness_bound", "lead"), ("lead", "lead")]
)
def test_a_setting_overrides_a_key_whichever_name_either_has(tmp_path: Path, in_file: str, set_as: str) -> None:
    path = tmp_path / "old.toml"
    path.write_text(f"[inner]\n{in_file} = 3\n")
    with pytest.warns(FutureWarning) as said:
        assert load(Outer, path, [f"inner.{set_as}=7"]).inner.staleness_bound == 7
    assert len(said) == [in_file, set_as].count("lead")
    assert any("--set inner.lead is inner.staleness_bound now" in str(each.message) for each in said) == (
        set_as == "lead"
    )


def test_a_copy_is_changed_under_the_old_name_too() -> None:
    with pytest.warns(FutureWarning, match=r"^lead is staleness_bound now"):
        assert Inner().model_copy(update={"lead": 9}).staleness_bound == 9
    with pytest.warns(FutureWarning, match=r"^lead is staleness_bound now"):
        assert Inner(staleness_bound=2).lead == 2
