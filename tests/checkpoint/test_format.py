"""What a checkpoint is on disk: files that any safetensors reader opens, a manifest that notices an edit, and the format
from before, all read without executing anything."""

import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dcp_writer import write_format_1
from planted import Bomb, bomb_went_off
from thinwire.checkpoint.manifest import Manifest, describe_files, list_checkpoints, open_checkpoint
from thinwire.checkpoint.pieces import OldParts, newest_whole, read_tensors
from thinwire.checkpoint.store import Checkpoints, Saved
from thinwire.comm.world import World
from thinwire.errors import CheckpointError, UnreadableError
from thinwire.parallel.shard.layout import Piece
from worlds import cluster_of, run_world

DTYPES = {
    "a": torch.float32, "b": torch.bfloat16, "c": torch.int8, "d": torch.bool, "e": torch.float64, "f": torch.int64,
    "g": torch.uint8, "h": torch.float16, "i": torch.float8_e4m3fn, "j": torch.complex64,
}  # fmt: skip
SHAPE = (5, 7)


def alone() -> World:
    """A world of this process."""
    return World.join(cluster_of([1]), rank=0, size=1, local_rank=0, host="", port=0)


def whole(name: str, step: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(step * 100 + ord(name))
    return (torch.randn(35, generator=drawn) * 3).to(DTYPES[name])


def pieces(world: World, step: int | None, names: str = "".join(DTYPES)) -> list[Piece]:
    """Each tensor unevenly cut over the ranks; `None`: to be filled."""
    made = []
    for name in names:
        edges = [0, *(35 * (i + 1) * (i + 2) // (world.size * (world.size + 1)) for i in range(world.size))]
        a, b = edges[world.rank], edges[world.rank + 1]
        tensor = torch.zeros(b - a, dtype=DTYPES[name]) if step is None else whole(name, step)[a:b].clone()
        made.append(Piece(name, SHAPE, a, tensor))
    return made


def _save(world: World, folder: Path, steps: list[int], old: bool = False) -> None:
    checkpoints = Checkpoints(folder, keep_last=9, keep_every=0, world=world)
    for step in steps:
        meta = {"step": step, "updates": step, "note": "é", "lr": 0.1}
        if old:
            write_format_1(world, folder, step, pieces(world, step, "abcefgh"), meta)
        else:
            assert isinstance(checkpoints.save(step, pieces(world, step), meta).result(), Saved)


def _load(world: World, folder: Path, names: str) -> tuple[int, list[str]]:
    checkpoints = Checkpoints(folder, keep_last=9, keep_every=0, world=world)
    found = checkpoints.newest()
    assert found is not None
    wanted = pieces(world, None, names)
    assert checkpoints.load(found, wanted) == {"step": found.step, "updates": found.step, "note": "é", "lr": 0.1}
    for piece in wanted:
        expected = whole(piece.name, found.step)[piece.offset : piece.offset + piece.tensor.numel()]
        assert torch.equal(piece.tensor.view(torch.uint8), expected.view(torch.uint8)), piece.name
    return found.step, checkpoints.warnings


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (3, 2)])
@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
def test_every_type_comes_back_bit_for_bit_in_any_world(tmp_path: Path, saving: int, loading: int, old: bool) -> None:
    run_world(saving, _save, tmp_path, [3], old)
    assert json.loads((tmp_path / "step-00000003" / "manifest.json").read_text())["format"] == (1 if old else 2)
    assert run_world(loading, _load, tmp_path, "abcefgh" if old else "".join(DTYPES)) == [(3, [])] * loading


def test_the_library_reads_a_ranks_file_as_what_was_written(tmp_path: Path) -> None:
    run_world(2, _save, tmp_path, [1])
    joined: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted((tmp_path / "step-00000001").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the library's own object
                name, _, offset = key.rpartition("@")
                joined.setdefault(name, []).append((int(offset), file.get_tensor(key)))
    assert set(joined) == set(DTYPES)
    for name, parts in joined.items():
        got = torch.cat([part.view(torch.uint8) for _, part in sorted(parts, key=lambda part: part[0])])
        assert torch.equal(got, whole(name, 1).view(torch.uint8)), name


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return edit


EDITS = {
    "meta.updates": _edit(lambda t: t["meta"].update(updates=t["meta"]["updates"] - 1)),
    "meta.updates beyond its step": _edit(lambda t: t["meta"].update(updates=99)),
    "no files": _edit(lambda t: t.update(files={})),
    "step": _edit(lambda t: t.update(step=7)),
    "a shape": _edit(lambda t: t["tensors"]["a"].update(shape=[7, 5])),
    "a key lost": _edit(lambda t: t.pop("tensors")),
    "a file outside": _edit(lambda t: t["files"].update({"../x": {"size": 0, "sha256": ""}})),
    "no digest": _edit(lambda t: t.pop("sha256", None) if t["format"] == 2 else t.pop("meta")),
    "a list": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "not text": lambda folder: (folder / "manifest.json").write_bytes(b"\x80\x04\xff"),
    "format 1 without its metadata": _edit(lambda t: (t.update(format=1), t["files"].pop(".metadata", None))),
}
"""What is done to a manifest. Of format 1 only what contradicts itself can be seen."""
UNSEEN_IN_FORMAT_1 = ("meta.updates", "a shape")


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edited_manifest_is_never_used(tmp_path: Path, edit: str, old: bool) -> None:
    if old and edit in UNSEEN_IN_FORMAT_1:
        pytest.skip("format 1 has no digest")
    _save(alone(), tmp_path, [1, 2], old)
    EDITS[edit](tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="step-00000002"):
        newest_whole(tmp_path, step=2)
    step, warnings = _load(alone(), tmp_path, "ab")
    assert step == 1 and len(warnings) == 1 and "step-00000002 is not whole" in warnings[0]


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
def test_a_checkpoint_under_the_name_of_another_step_is_never_used(tmp_path: Path, old: bool) -> None:
    _save(alone(), tmp_path, [1, 2], old)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000005")
    with pytest.raises(CheckpointError, match="step-00000005 holds the checkpoint of step 1: it was renamed"):
        newest_whole(tmp_path, step=5)
    step, warnings = _load(alone(), tmp_path, "ab")
    assert step == 2 and "holds the checkpoint of step 1" in warnings[0]


def _newest(world: World, folder: Path, prepare: Callable[[], None] | None = None) -> str:
    if prepare is not None and world.rank == 0:
        prepare()
    try:
        found = Checkpoints(folder, keep_last=9, keep_every=0, world=world).newest()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "none" if found is None else found.path.name


def test_where_none_can_be_used_all_ranks_refuse_and_nothing_is_moved(tmp_path: Path) -> None:
    _save(alone(), tmp_path, [1, 2])
    for path in list_checkpoints(tmp_path):
        (path / "manifest.json").unlink()
    for said in run_world(2, _newest, tmp_path):
        assert said.startswith("CheckpointError: none of the 2 checkpoints"), said
        assert "--fresh" in said and "step-00000002 has no manifest.json" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    for path in list_checkpoints(tmp_path):
        path.rename(path.with_name(path.name + ".torn"))
    assert all("none of the 2 checkpoints" in said for said in run_world(2, _newest, tmp_path))
    assert run_world(2, _newest, tmp_path / "nothing") == ["none", "none"]


def _as_nobody() -> None:
    os.seteuid(65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("closed", ["", "step-00000002", "step-00000002/rank-00000.safetensors"])
def test_what_may_not_be_read_stops_the_start(tmp_path: Path, closed: str) -> None:
    folder = Path("/tmp") / f"{tmp_path.name}-{os.getpid()}"  # pytest's own folder is closed to others
    _save(alone(), folder, [1, 2])
    try:
        (folder / closed).chmod(0)
        for said in run_world(2 if closed else 1, _newest, folder, _as_nobody):
            assert said.startswith("UnreadableError:"), said
            assert "cannot be read: Permission denied" in said and str(folder / closed) in said
        (folder / closed).chmod(0o755)
        assert run_world(1, _newest, folder, _as_nobody) == ["step-00000002"]
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE], ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize(
    ("call", "ending"),
    [("open", "manifest.json"), ("open", ".safetensors"), ("stat", ".safetensors"), ("scandir", "kept")],
)
def test_what_cannot_be_read_stops_the_start_and_moves_nothing(
    tmp_path: Path, number: int, call: str, ending: str
) -> None:
    _save(alone(), tmp_path / "kept", [1, 2])
    room: Any = io if call == "open" else os
    plain = getattr(room, call)

    def fails(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str | Path) and str(path).endswith(ending):
            raise OSError(number, os.strerror(number))
        return plain(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, call, fails)
        said = _newest(alone(), tmp_path / "kept")
        assert said.startswith("UnreadableError:") and f"cannot be read: {os.strerror(number)}" in said, said
        with pytest.raises(UnreadableError, match=os.strerror(number)):
            newest_whole(tmp_path / "kept")
    assert len(list_checkpoints(tmp_path / "kept")) == 2


def test_a_disk_that_fails_under_a_load_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(alone(), tmp_path, [1])
    path, manifest = newest_whole(tmp_path)

    def fails(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "readv", fails)
    with pytest.raises(UnreadableError, match=r"rank-00000\.safetensors cannot be read: Input/output error"):
        list(read_tensors(path, manifest, "a"))


def _resign(folder: Path) -> None:
    """Makes the manifest of format 1 fit what is there now."""
    _edit(lambda tree: tree.update(files={n: vars(i) for n, i in describe_files(folder, tree["files"]).items()}))(
        folder
    )


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_planted_metadata_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    _save(alone(), tmp_path / "run", [1], True)
    folder = tmp_path / "run" / "step-00000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "went off"), protocol))
    _resign(folder)
    manifest = open_checkpoint(folder, digests=True)
    with pytest.raises(CheckpointError, match=r"\.metadata names .*, which no checkpoint does"):
        list(read_tensors(folder, manifest, ""))
    assert not bomb_went_off(tmp_path / "went off")
    pickle.loads((folder / ".metadata").read_bytes())
    assert bomb_went_off(tmp_path / "went off"), "what was planted does nothing, so it proves nothing"


@pytest.mark.parametrize("module", ["torch", "torch.serialization", "torch.distributed.checkpoint.metadata", "pathlib"])
def test_names_that_checkpoints_have_stand_for_nothing_either(tmp_path: Path, module: str) -> None:
    """`torch.load` and `os.system` by way of a module that is allowed: `pathlib.os.system`."""
    for name in ("load", "os.system", "Path"):
        call = f"c{module}\n{name}\n(S'touch {tmp_path}/ran'\ntR.".encode()
        (tmp_path / ".metadata").write_bytes(call)
        with pytest.raises(CheckpointError, match="is damaged"):
            OldParts(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "raw", [b"", b"\x80\x04", b"garbage", b"\x80\x04N.", b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f"]
)
def test_metadata_that_is_no_pickle_is_a_sentence(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        OldParts(tmp_path)


def test_a_damaged_archive_of_format_1_is_a_sentence(tmp_path: Path) -> None:
    _save(alone(), tmp_path, [1], True)
    folder = tmp_path / "step-00000001"
    file = folder / "__0_0.distcp"
    file.write_bytes(b"x" * file.stat().st_size)
    _resign(folder)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        list(read_tensors(folder, Manifest.read(folder), ""))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" x"),
    "a bit flipped": _flip,
    "removed": Path.unlink,
    "a folder": _make_folder,
    "a dangling link": _dangle,
}


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_after_any_damage_to_any_file_the_one_before_is_used(tmp_path: Path, damage: str, old: bool) -> None:
    _save(alone(), tmp_path, [1, 2], old)
    for number, file in enumerate(sorted(path.name for path in (tmp_path / "step-00000002").iterdir())):
        folder = tmp_path / str(number)
        for name in ("step-00000001", "step-00000002"):
            shutil.copytree(tmp_path / name, folder / name)
        if old and file == "manifest.json" and damage == "a bit flipped":
            continue  # format 1 has no digest
        DAMAGES[damage](folder / "step-00000002" / file)
        step, warnings = _load(alone(), folder, "abcefgh")
        assert step == 1 and "step-00000002 is not whole" in warnings[0], file
        assert (folder / "step-00000002.torn").is_dir()
        path, _ = newest_whole(folder)
        assert path.name == "step-00000001"


def test_sizes_alone_are_compared_where_that_is_asked_for(tmp_path: Path) -> None:
    _save(alone(), tmp_path, [1, 2])
    _flip(tmp_path / "step-00000002" / "rank-00000.safetensors")
    assert newest_whole(tmp_path, verify=False)[0].name == "step-00000002"
    assert newest_whole(tmp_path, verify=True)[0].name == "step-00000001"
    quick = Checkpoints(tmp_path, keep_last=9, keep_every=0, world=alone(), verify=False).newest()
    assert quick is not None and quick.step == 2
    os.truncate(tmp_path / "step-00000002" / "rank-00000.safetensors", 100)
    assert newest_whole(tmp_path, verify=False)[0].name == "step-00000001"
