"""Checkpoints: bit-exact across worlds and cuts, whole or not there, never in the way of training."""

import contextlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from thinwire.checkpoint.manifest import list_checkpoints
from thinwire.checkpoint.pieces import newest_whole, read_tensors
from thinwire.checkpoint.store import Checkpoints, Found, Saved, SaveFailed, complete
from thinwire.comm.world import World
from thinwire.errors import CheckpointError
from thinwire.parallel.shard.layout import Piece
from worlds import run_world

SHAPES = {"params/a": (7, 5), "params/b": (3,), "params/tiny": (1,), "optimizer.exp_avg/a": (7, 5)}


def values(name: str, step: int) -> torch.Tensor:
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size, dtype=torch.float32) * (1 + len(name)) + step


def pieces(world: World, step: int | None, *, cut: int | None = None) -> list[Piece]:
    """Every tensor cut evenly over `cut` ranks (default all); filled for `step`, or with NaN to be filled."""
    parts = cut or world.size
    made = []
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        edges = [size * i // parts for i in range(parts + 1)]
        if world.rank < parts:
            a, b = edges[world.rank], edges[world.rank + 1]
            tensor = torch.full((b - a,), torch.nan) if step is None else values(name, step)[a:b].clone()
            made.append(Piece(name, shape, a, tensor))
    return made


def store(world: World, folder: Path, **options: Any) -> Checkpoints:
    return Checkpoints(folder, **{"keep_last": 2, "keep_every": 0, **options}, world=world)


def _save(world: World, folder: Path, steps: list[int], cut: int | None = None, **options: Any) -> list[str]:
    checkpoints = store(world, folder, **options)
    outcomes = [checkpoints.save(step, pieces(world, step, cut=cut), {"step": step}).result() for step in steps]
    return [type(outcome).__name__ for outcome in outcomes]


def _load(world: World, folder: Path) -> tuple[int, list[str]]:
    checkpoints = store(world, folder)
    found = checkpoints.newest()
    assert found is not None
    wanted = pieces(world, None)
    assert checkpoints.load(found, wanted)["step"] == found.step
    for piece in wanted:
        expected = values(piece.name, found.step)[piece.offset : piece.offset + piece.tensor.numel()]
        assert torch.equal(piece.tensor, expected), piece
    return found.step, checkpoints.warnings


@pytest.mark.parametrize(
    ("saving", "cut", "loading"), [(1, None, 1), (2, None, 2), (2, None, 1), (1, None, 4), (4, 3, 2), (4, 1, 4)]
)
def test_what_one_world_saved_any_other_loads_bit_for_bit(
    tmp_path: Path, saving: int, cut: int | None, loading: int
) -> None:
    assert all(result == ["Saved"] for result in run_world(saving, _save, tmp_path, [3], cut))
    assert all(result == (3, []) for result in run_world(loading, _load, tmp_path))


def test_the_last_k_and_every_nth_are_kept(tmp_path: Path) -> None:
    run_world(2, _save, tmp_path, [1, 2, 3, 4, 5, 6], None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]


def _keep_every(world: World, folder: Path) -> None:
    checkpoints = store(world, folder, keep_last=1, keep_every=2)
    for step in range(1, 8):
        checkpoints.save(step, pieces(world, step), {})
    checkpoints.save(8, pieces(world, 8), {}).result()


def test_every_nth_is_kept_beside_the_last(tmp_path: Path) -> None:
    run_world(1, _keep_every, tmp_path)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [2, 4, 6, 8]


def _flip(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "rank-00000.safetensors").write_bytes(b"short"), "has 5 bytes, the manifest says"),
        (_flip, "has changed since it was written"),
        (lambda f: (f / "manifest.json").unlink(), "its writing was cut short"),
        (lambda f: (f / "manifest.json").write_text('{"st'), "is no JSON"),
        (lambda f: (f / "rank-00001.safetensors").unlink(), "is missing"),
    ],
)
def test_a_torn_checkpoint_is_put_aside_and_the_one_before_is_used(tmp_path: Path, damage: Any, says: str) -> None:
    run_world(2, _save, tmp_path, [1, 2])
    damage(tmp_path / "step-00000002")
    for step, warnings in run_world(2, _load, tmp_path):
        assert step == 1
        assert len(warnings) == 1
        assert says in warnings[0]
    assert (tmp_path / "step-00000002.torn").is_dir()


def _overwrite_after_save(world: World, folder: Path) -> None:
    mine = pieces(world, 1)
    saving = store(world, folder).save(1, mine, {"step": 1})
    for piece in mine:
        piece.tensor.fill_(-1)
    assert isinstance(saving.result(), Saved)
    assert saving.stall_s < 60


def test_training_may_go_on_at_once_after_a_save(tmp_path: Path) -> None:
    run_world(2, _overwrite_after_save, tmp_path)
    assert run_world(1, _load, tmp_path) == [(1, [])]


def _full_disk(world: World, folder: Path) -> list[str]:
    """The second save finds no room on rank 1's disk; the third finds it again."""
    checkpoints = store(world, folder)
    said = []
    for step in (1, 2, 3):
        if step == 2 and world.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        outcome = checkpoints.save(step, pieces(world, step), {"step": step}).result()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.append(outcome.reason if isinstance(outcome, SaveFailed) else "saved")
        there = [path.name for path in list_checkpoints(folder)]
        assert f"step-{1 if step == 2 else step:08d}" in there
    return said


def test_a_save_that_finds_no_room_is_told_on_all_ranks_and_costs_only_itself(tmp_path: Path) -> None:
    for said in run_world(2, _full_disk, tmp_path):
        assert said[0] == said[2] == "saved"
        assert "rank 1" in said[1] or "File too large" in said[1], said[1]
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        run_world(1, _save, disk, [1])
        _fill(disk / "filler")
        outcome = run_world(1, _save_reason, disk, 2)[0]
        assert "No space left on device" in outcome, outcome
        assert run_world(1, _load, disk) == [(1, [])]
        (disk / "filler").unlink()
        assert run_world(1, _save_reason, disk, 2) == ["saved"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def _save_reason(world: World, folder: Path, step: int) -> str:
    outcome = store(world, folder).save(step, pieces(world, step), {"step": step}).result()
    return outcome.reason if isinstance(outcome, SaveFailed) else "saved"


def _mismatch(world: World, folder: Path) -> list[str]:
    checkpoints = store(world, folder)
    found = checkpoints.newest()
    assert isinstance(found, Found)
    said = []
    for piece in (
        Piece("params/nope", (2,), 0, torch.empty(2)),
        Piece("params/b", (4,), 0, torch.empty(4)),
        Piece("params/b", (3,), 0, torch.empty(3, dtype=torch.float64)),
    ):
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load(found, [piece])
        said.append(str(caught.value))
    return said


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    run_world(1, _save, tmp_path, [1])
    missing, shape, dtype = run_world(1, _mismatch, tmp_path)[0]
    assert "has no tensor 'params/nope'" in missing
    assert "'params/b' is (3,), this model's is (4,)" in shape
    assert "torch.float32, here" in dtype


def test_elements_written_by_nobody_or_by_two_are_found() -> None:
    def spans(*ranges: tuple[int, int]) -> Any:
        return {"t": ((10,), "torch.float32", list(ranges))}

    assert complete([spans((0, 4)), spans((4, 6))])["t"].shape == (10,)
    for wrong in ([spans((0, 4)), spans((5, 5))], [spans((0, 6)), spans((4, 6))], [spans((0, 4))]):
        with pytest.raises(CheckpointError, match="'t'"):
            complete(wrong)


def test_one_process_reads_whole_tensors(tmp_path: Path) -> None:
    run_world(4, _save, tmp_path, [7])
    path, manifest = newest_whole(tmp_path)
    read = dict(read_tensors(path, manifest, "params/"))
    assert set(read) == {"a", "b", "tiny"}
    assert torch.equal(read["a"], values("params/a", 7).view(7, 5))
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are: 7"):
        newest_whole(tmp_path, step=3)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest_whole(tmp_path / "nowhere")
