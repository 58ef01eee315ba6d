"""The checkpoints of a run: saved in the background while training goes on, found and verified again.

A checkpoint is written in a hidden folder, its manifest last, and renamed into place: what carries its name is whole.
A save that fails (disk full, no permission) is told to all ranks alike and costs nothing but itself.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.checkpoint.manifest import FileInfo, Manifest, TensorInfo, describe_files
from thinwire.checkpoint.pieces_io import read_pieces, write_pieces
from thinwire.comm.world import World
from thinwire.errors import CheckpointError
from thinwire.partition.pieces import Piece

_PATIENCE = timedelta(minutes=30)
"""For the slowest rank's files."""
_PREFIX, _DIGITS, _TORN = "step-", 8, ".torn"


@dataclass(frozen=True)
class Saved:
    """A checkpoint in place."""

    step: int
    path: Path
    bytes: int
    save_s: float


@dataclass(frozen=True)
class SaveFailed:
    """Why there is no checkpoint of `step`; the earlier ones stand."""

    step: int
    reason: str


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    step: int
    path: Path
    manifest: Manifest


class Saving:
    """A save in flight. `stall_s` is how long it kept training waiting: copying, and waiting for the save before."""

    def __init__(self, work: Callable[[], Saved | SaveFailed], stall_s: float) -> None:
        self.stall_s = stall_s
        self._outcome: Saved | SaveFailed | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Saved | SaveFailed]) -> None:
        self._outcome = work()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Saved | SaveFailed:
        """Wait for the end of it."""
        self._thread.join()
        assert self._outcome is not None
        return self._outcome


class Checkpoints:
    """The folder of a run's checkpoints. Every method is called by all ranks together."""

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int, world: World, verify: bool = True) -> None:
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._world, self._rank, self._verify = world, world.rank, verify
        ranks = range(world.size)
        self._group = (
            world.communicator(ranks, members_only=False, small=True, timeout=_PATIENCE) if world.size > 1 else None
        )
        self._saving: Saving | None = None
        self.warnings: list[str] = []
        """What `newest` found wrong with checkpoints that it passed over."""
        if self._rank == 0 and folder.is_dir():
            for leftover in folder.glob(f".{_PREFIX}*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, pieces: Sequence[Piece], meta: dict[str, Any]) -> Saving:
        """Copy `pieces` (this rank's own; over all ranks every element once) and write them in the background."""
        start_s = time.perf_counter()
        if self._saving is not None:
            self._saving.result()
        copies = [Piece(p.name, p.shape, p.offset, p.tensor.detach().to("cpu", copy=True)) for p in pieces]
        stall_s = time.perf_counter() - start_s
        self._saving = Saving(lambda: self._write(step, copies, meta), stall_s)
        return self._saving

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole. Torn ones are put aside as NAME.torn, with a warning that says why."""
        decided: tuple[Found | None, list[str]] = self._agree(self._search if self._rank == 0 else None)
        found, self.warnings = decided
        return found

    def load(self, found: Found, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Fill `pieces` (all that this rank holds, whoever saved them) and return the saved meta.

        Raises CheckpointError if a tensor is missing or of another shape or type.
        """
        for piece in pieces:
            stored = found.manifest.tensors.get(piece.name)
            if stored is not None and stored.shape != piece.shape:
                raise CheckpointError(f"{found.path}: {piece.name!r} is {stored.shape}, this model's is {piece.shape}")
        read_pieces(found.path, pieces)
        return found.manifest.meta

    def _search(self) -> tuple[Found | None, list[str]]:
        warnings: list[str] = []
        for path in reversed(list_checkpoints(self._folder)):
            try:
                return Found(step_of(path), path, open_checkpoint(path, digests=self._verify)), warnings
            except CheckpointError as error:
                aside = _free_name(path.with_name(path.name + _TORN))
                path.rename(aside)
                warnings.append(f"the checkpoint {path.name} is not whole ({error}); put aside as {aside.name}")
        return None, warnings

    def _agree(self, decide: Callable[[], Any] | None) -> Any:
        """Rank 0's decision, on all ranks."""
        box = [decide() if decide is not None else None]
        if self._group is not None:
            with self._world.outstanding.waiting("the agreement on a checkpoint"):
                dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _write(self, step: int, pieces: list[Piece], meta: dict[str, Any]) -> Saved | SaveFailed:
        """In the background thread of every rank: the stages of a save, agreed on one by one."""
        start_s = time.perf_counter()
        final = self._folder / f"{_PREFIX}{step:0{_DIGITS}d}"
        partial = self._folder / f".{final.name}.partial"
        try:
            self._stage(lambda: _make_empty(partial) if self._rank == 0 else None)
            self._stage(lambda: write_pieces(partial, pieces, self._group))
            described = self._stage(lambda: _describe(partial, f"__{self._rank}_*", pieces))
            if self._rank == 0:
                size = self._stage(lambda: self._commit(step, partial, final, described, meta))[0]
            else:
                size = self._stage(lambda: 0)[0]
        except Exception as error:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            return SaveFailed(step, _reason(error))
        return Saved(step, final, size, time.perf_counter() - start_s)

    def _stage(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` here, hear how it went everywhere: all results by rank, or the first failure raised on all."""
        try:
            mine: tuple[Any, str | None] = (work(), None)
        except Exception as error:
            mine = (None, _reason(error))
        results = [mine]
        if self._group is not None:
            results = [(None, None)] * dist.get_world_size(self._group)
            try:
                dist.all_gather_object(results, mine, group=self._group)
            except RuntimeError as error:
                raise self._world.outstanding.explain(error) from None
        failed = [
            why if why.startswith("rank ") else f"rank {rank}: {why}"
            for rank, (_, why) in enumerate(results)
            if why is not None
        ]
        if failed:
            raise CheckpointError(failed[0])
        return [value for value, _ in results]

    def _commit(self, step: int, partial: Path, final: Path, described: list[Any], meta: dict[str, Any]) -> int:
        """Rank 0: check that every element is there once, write the manifest, rename, prune. The size in bytes."""
        files: dict[str, FileInfo] = describe_files(partial, [".metadata"])
        for of_rank, _ in described:
            files |= of_rank
        tensors = complete([spans for _, spans in described])
        Manifest(step, meta, tensors, files).write(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(self._folder)
        self._prune()
        return sum(info.size for info in files.values())

    def _prune(self) -> None:
        """Delete what neither `keep_last` nor `keep_every` keeps."""
        there = list_checkpoints(self._folder)
        for path in there[: -self._keep_last]:
            if not (self._keep_every and step_of(path) % self._keep_every == 0):
                shutil.rmtree(path, ignore_errors=True)


Spans = dict[str, tuple[tuple[int, ...], str, list[tuple[int, int]]]]
"""Tensor name -> shape, dtype, and (offset, length) of the parts a rank wrote."""


def complete(spans_by_rank: Sequence[Spans]) -> dict[str, TensorInfo]:
    """All logical tensors. Raises CheckpointError if an element was written by nobody or by two."""
    parts: dict[str, list[tuple[int, int]]] = {}
    infos: dict[str, TensorInfo] = {}
    for spans in spans_by_rank:
        for name, (shape, dtype, ranges) in spans.items():
            infos[name] = TensorInfo(shape, dtype)
            parts.setdefault(name, []).extend(ranges)
    for name, info in infos.items():
        end = 0
        for offset, length in sorted(parts[name]):
            if offset != end:
                raise CheckpointError(
                    f"{name!r}: elements {min(end, offset):,} to {max(end, offset):,} are not written once"
                )
            end += length
        if end != torch.Size(info.shape).numel():
            raise CheckpointError(f"{name!r}: {end:,} of {torch.Size(info.shape).numel():,} elements were written")
    return infos


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first, whole or not."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def open_checkpoint(path: Path, *, digests: bool) -> Manifest:
    """The manifest of a verified checkpoint. Raises CheckpointError saying what is wrong."""
    manifest = Manifest.read(path)
    manifest.verify(path, digests=digests)
    return manifest


def _describe(folder: Path, pattern: str, pieces: Sequence[Piece]) -> tuple[dict[str, FileInfo], Spans]:
    spans: Spans = {}
    for piece in pieces:
        entry = spans.setdefault(piece.name, (piece.shape, str(piece.tensor.dtype), []))
        if piece.tensor.numel():
            entry[2].append((piece.offset, piece.tensor.numel()))
    return describe_files(folder, [path.name for path in folder.glob(pattern)]), spans


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}{number}")
    return free


def _reason(error: BaseException) -> str:
    """The sentence in an exception."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
