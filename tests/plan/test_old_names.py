"""Names that have moved are found where they were for one release, with a line that says where they are."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import thinwire
import thinwire.plan
from thinwire.plan import compression
from thinwire.plan.plan import read_plan
from thinwire.predict import perturbation
from thinwire.train.saving import sync_of

DDP_INSIDE = {"params": "replica", "grads": "replica", "optimizer": "replica"}


def test_what_was_in_the_plan_file_is_found_and_told() -> None:
    with pytest.warns(FutureWarning, match=r"thinwire\.plan\.Plan is thinwire\.Plan now"):
        assert thinwire.plan.Plan is thinwire.Plan
    with pytest.warns(FutureWarning, match=r"thinwire\.plan\.Wire is thinwire\.plan\.compression\.Compression now"):
        thinwire.plan.Wire  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Plane'"):
        thinwire.plan.Plane  # noqa: B018


def test_the_section_of_outer_synchronisation_is_found_and_told() -> None:
    sys.modules.pop("thinwire.rounds.config", None)
    with pytest.warns(FutureWarning, match=r"thinwire\.rounds\.config is thinwire\.plan\.sync now"):
        assert importlib.import_module("thinwire.rounds.config").SyncConfig is thinwire.SyncConfig


def test_a_plan_and_its_section_take_and_have_the_old_name_of_compression() -> None:
    int8 = {"grads": {"node": "int8"}}
    with pytest.warns(FutureWarning, match="^wire is compression now; the old name works for one more release"):
        plan = thinwire.Plan.model_validate({"levels": [["node", 2]], "wire": int8})
    assert plan == thinwire.Plan.model_validate({"levels": [["node", 2]], "compression": int8})
    with pytest.warns(FutureWarning, match="^wire is compression now"):
        assert plan.wire is plan.compression
    with pytest.warns(FutureWarning, match="^wire is compression now"):
        assert thinwire.PlanConfig(wire=int8).compression == plan.compression
    with pytest.raises(AttributeError, match="wires"):
        plan.wires  # noqa: B018


def test_a_plan_document_of_the_last_release_is_read_without_a_word(tmp_path: Path) -> None:
    plan = thinwire.Plan.model_validate({"levels": [["node", 2]], "compression": {"grads": {"node": "int8"}}})
    tree = plan.model_dump(mode="json")
    tree["wire"] = tree.pop("compression")
    document = tmp_path / "plan.json"
    document.write_text(json.dumps(tree))
    cluster = thinwire.Cluster.model_validate({"levels": [{"name": "node", "fanout": 2}]})
    assert read_plan(document, cluster, sequences=1) == plan


def test_classes_are_found_under_the_names_of_the_last_release() -> None:
    with pytest.warns(FutureWarning, match="^Wire is Compression now"):
        from thinwire.plan.compression import Wire
    with pytest.warns(FutureWarning, match="^Trouble is Perturbation now"):
        from thinwire.predict.perturbation import Trouble
    assert Wire is compression.Compression
    assert Trouble is perturbation.Perturbation
    with pytest.raises(ImportError, match="Wires"):
        from thinwire.plan.compression import Wires  # noqa: F401


def test_a_checkpoint_of_the_last_release_says_what_was_in_flight() -> None:
    sync = {
        "kind": "streaming_diloco",
        "level": "site",
        "groups": 2,
        "inner_steps": 6,
        "delay": 2,
        "outer_lr": 0.4,
        "staleness_bound": 3,
    }
    plan = thinwire.Plan.model_validate({"levels": [["node", 2], ["site", 2]], "partition": DDP_INSIDE, "sync": sync})
    meta = plan.model_dump(mode="json")
    meta["sync"]["lead"] = meta["sync"].pop("staleness_bound")
    meta["wire"] = meta.pop("compression")
    found = SimpleNamespace(manifest=SimpleNamespace(meta={"plan": meta}))
    assert sync_of(found) == plan.sync  # type: ignore[arg-type]
    found.manifest.meta["plan"] = {"levels": []}
    assert sync_of(found) is None  # type: ignore[arg-type]
