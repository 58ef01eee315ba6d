"""The checkpoints of a run: saved in the background while training goes on, found and verified again.

A checkpoint is written in a hidden folder, its manifest last, and renamed into place: what carries its name is whole.
A save that fails (disk full, no permission) is told to all ranks alike and costs nothing but itself. One that cannot be
read just now is no torn one: it stops the start.
"""

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.checkpoint.manifest import (
    FileInfo,
    Manifest,
    StoredPart,
    TensorInfo,
    list_checkpoints,
    list_torn,
    new_partial,
    open_checkpoint,
    path_of,
    put_aside,
    step_of,
)
from thinwire.checkpoint.pieces import PiecesReader, write_pieces
from thinwire.comm.world import World
from thinwire.errors import CheckpointError, ThinwireError, UnreadableError
from thinwire.parallel.shard.layout import Piece
from thinwire.units import SYSTEM_CLOCK, SystemClock

_PATIENCE = timedelta(minutes=30)
"""For the slowest rank's files."""


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

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int,
        world: World,
        verify: bool = True,
        clock: SystemClock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._world, self._rank, self._verify = world, world.rank, verify
        ranks = range(world.size)
        self._group = (
            world.communicator(ranks, members_only=False, small=True, timeout=_PATIENCE) if world.size > 1 else None
        )
        self._saving: Saving | None = None
        self.warnings: list[str] = []
        """What `newest` found wrong with checkpoints that it passed over."""

    def save(self, step: int, pieces: Sequence[Piece], meta: dict[str, Any]) -> Saving:
        """Copy `pieces` (this rank's own; over all ranks every element once) and write them in the background."""
        start_s = self._clock.now()
        if self._saving is not None:
            self._saving.result()
        copies = [Piece(p.name, p.shape, p.offset, p.tensor.detach().to("cpu", copy=True)) for p in pieces]
        stall_s = self._clock.now() - start_s
        self._saving = Saving(lambda: self._write(step, copies, meta), stall_s)
        return self._saving

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole; None if there never was any.

        Torn ones are put aside as NAME.torn, with a warning that says why. Raises CheckpointError, on all ranks, if there
        are some and none can be used, or if one cannot be read.
        """
        decided: tuple[Found | None, list[str]] = self._agree(self._search)
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
        PiecesReader(found.path, found.manifest).fill(pieces)
        return found.manifest.meta

    def _search(self) -> tuple[Found | None, list[str]]:
        torn: dict[Path, CheckpointError] = {}
        for path in reversed(list_checkpoints(self._folder)):
            try:
                found = Found(step_of(path), path, open_checkpoint(path, digests=self._verify))
            except UnreadableError:
                raise
            except CheckpointError as error:
                torn[path] = error
            else:
                said = "the checkpoint {} is not whole ({}); put aside as {}"
                return found, [said.format(path.name, error, put_aside(path).name) for path, error in torn.items()]
        aside = list_torn(self._folder)
        if torn or aside:
            why = f"{next(iter(torn.values()))}" if torn else f"{aside[-1].name} was put aside as not whole"
            raise CheckpointError(
                f"none of the {len(torn) + len(aside)} checkpoints in {self._folder} can be used: {why}; put a good copy "
                f"back, or start anew with --fresh, which puts this run aside"
            )
        return None, []

    def _agree(self, decide: Callable[[], Any]) -> Any:
        """Rank 0's decision, on all ranks; so is its error."""
        box: list[Any] = [None]
        if self._rank == 0:
            try:
                box = [decide()]
            except ThinwireError as error:
                box = [error]
        if self._group is not None:
            with self._world.outstanding.waiting("the agreement on a checkpoint"):
                dist.broadcast_object_list(box, src=0, group=self._group)
        if isinstance(box[0], ThinwireError):
            raise box[0]
        return box[0]

    def _write(self, step: int, pieces: list[Piece], meta: dict[str, Any]) -> Saved | SaveFailed:
        """In the background thread of every rank: the stages of a save, agreed on one by one."""
        start_s = self._clock.now()
        final, partial = path_of(self._folder, step), None
        try:
            partial = self._stage(lambda: _make(new_partial(final)) if self._rank == 0 else None)[0]
            written = self._stage(lambda: _write_own(partial / f"rank-{self._rank:05d}.safetensors", pieces))
            size = self._stage(lambda: self._commit(step, partial, final, written, meta) if self._rank == 0 else 0)[0]
        except Exception as error:
            if self._rank == 0 and partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            return SaveFailed(step, _reason(error))
        return Saved(step, final, size, self._clock.now() - start_s)

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

    def _commit(self, step: int, partial: Path, final: Path, written: "list[Written]", meta: dict[str, Any]) -> int:
        """Rank 0: check that every element is there once, write the manifest, rename, prune. The size in bytes."""
        files = {partial_file.name: info for partial_file, info, _ in written}
        Manifest(step, meta, complete([spans for _, _, spans in written]), files).write(partial)
        _sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(self._folder)
        self._prune()
        return sum(info.size for info in files.values())

    def _prune(self) -> None:
        """Delete what neither `keep_last` nor `keep_every` keeps. What cannot be deleted now is at the next save."""
        there: list[Path] = []
        with suppress(UnreadableError):
            there = list_checkpoints(self._folder)
        for path in there[: -self._keep_last]:
            if not (self._keep_every and step_of(path) % self._keep_every == 0):
                shutil.rmtree(path, ignore_errors=True)


Spans = dict[str, tuple[tuple[int, ...], str, list[StoredPart]]]
"""Tensor name -> shape, dtype, and the parts that a rank wrote."""
Written = tuple[Path, FileInfo, Spans]
"""A rank's file, and what is in it."""


def complete(spans_by_rank: Sequence[Spans]) -> dict[str, TensorInfo]:
    """All logical tensors. Raises CheckpointError if an element was written by nobody or by two."""
    parts: dict[str, list[StoredPart]] = {}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    for spans in spans_by_rank:
        for name, (shape, dtype, own) in spans.items():
            kinds[name] = (shape, dtype)
            parts.setdefault(name, []).extend(own)
    for name, (shape, _) in kinds.items():
        end = 0
        parts[name].sort()
        for offset, length, *_ in parts[name]:
            if offset != end:
                raise CheckpointError(
                    f"{name!r}: elements {min(end, offset):,} to {max(end, offset):,} are not written once"
                )
            end += length
        if end != torch.Size(shape).numel():
            raise CheckpointError(f"{name!r}: {end:,} of {torch.Size(shape).numel():,} elements were written")
    return {name: TensorInfo(shape, dtype, tuple(parts[name])) for name, (shape, dtype) in kinds.items()}


def _write_own(path: Path, pieces: Sequence[Piece]) -> Written:
    """This rank's file."""
    info, parts = write_pieces(path, pieces)
    spans: Spans = {}
    for piece, part in zip(pieces, parts, strict=True):
        entry = spans.setdefault(piece.name, (piece.shape, str(piece.tensor.dtype), []))
        if part.length:
            entry[2].append(part)
    return path, info, spans


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The sentence in an exception."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
