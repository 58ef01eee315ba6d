"""Names that have moved are found where they were for one release, with a line that says where they are."""

import importlib
import sys

import pytest

import thinwire
import thinwire.plan


def test_what_was_in_the_plan_file_is_found_and_told() -> None:
    with pytest.warns(FutureWarning, match=r"thinwire\.plan\.Plan is thinwire\.Plan now"):
        assert thinwire.plan.Plan is thinwire.Plan
    with pytest.warns(FutureWarning, match=r"thinwire\.plan\.Wire is thinwire\.plan\.compression\.Wire now"):
        thinwire.plan.Wire  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Plane'"):
        thinwire.plan.Plane  # noqa: B018


def test_the_section_of_outer_synchronisation_is_found_and_told() -> None:
    sys.modules.pop("thinwire.rounds.config", None)
    with pytest.warns(FutureWarning, match=r"thinwire\.rounds\.config is thinwire\.plan\.sync now"):
        assert importlib.import_module("thinwire.rounds.config").SyncConfig is thinwire.SyncConfig
