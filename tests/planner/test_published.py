"""Published measurements stay predicted as well as they are: what needs no long fit is checked here."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from calibration_fit import predict

from thinwire.cluster.cluster import Calibration

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def validate() -> ModuleType:
    sys.path.insert(0, BENCHMARKS)
    try:
        import validate_planner

        return validate_planner
    finally:
        sys.path.remove(BENCHMARKS)


def test_every_file_is_read_whole(validate: ModuleType) -> None:
    published = validate.published
    assert [len(rows) for rows in (published.vtrain(), published.table1(), published.table2())] == [109, 10, 12]
    assert [len(rows) for rows in (published.internevo(), published.internevo_memory())] == [39, 16]
    assert len(published.torchtitan("peak_memory")) == 13


@pytest.mark.parametrize("most_gpus", [256, pytest.param(10**6, marks=pytest.mark.slow)])
def test_runs_on_the_calibrated_cluster_are_within_five_percent_of_default_constants(
    most_gpus: int, validate: ModuleType
) -> None:
    piped = [row for row in validate.published.table2() if row["shard"] != "zero3"]
    for rows in (validate.published.table1(), piped):  # of the second none has as few as the fast case takes
        some = [row for row in rows if int(row["gpus"]) <= most_gpus]
        if some:
            assert validate.score(some, lambda row: predict(row.measured, Calibration())).mean < 0.05


@pytest.mark.parametrize("dataset", ["diloco", "memory"])
def test_published_bandwidths_and_memory_are_met(dataset: str, validate: ModuleType) -> None:
    report = validate.Report()
    validate.DATASETS[dataset](report)
    assert report.missed == []


def test_a_wrong_data_set_is_one_sentence(validate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["vtrian"]) == 2
    assert "there is no data set 'vtrian'" in capsys.readouterr().err
