"""A pickle planted in any file that is read, of a run, its checkpoints, its first weights or its corpus, is not executed.

Every verb that reads a run is called once for every file, and ends well or with a sentence.
"""

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from dcp_writer import write_format_1
from hub_models import save_model
from planted import Bomb, bomb_went_off
from runs import make_corpus, run_tree
from thinwire.checkpoint.manifest import Manifest, describe_files, list_checkpoints
from thinwire.checkpoint.pieces import PiecesReader
from thinwire.cli import main
from thinwire.comm.world import World
from thinwire.errors import ThinwireError
from thinwire.hub.import_folder import import_folder
from thinwire.parallel.shard.layout import Piece
from thinwire.train.folder import open_folder
from thinwire.train.job import read_config, resolve
from thinwire.train.stop import StopRequest
from thinwire.train.worker import train_job
from worlds import cluster_of

KINDS: dict[str, Callable[[Bomb], bytes]] = {
    "pickle": pickle.dumps,
    "pickle of protocol 0": lambda bomb: pickle.dumps(bomb, 0),
    "torch.save": lambda bomb: _saved(torch.save, bomb),
    "numpy": lambda bomb: _saved(lambda it, file: np.save(file, np.array([it], object), allow_pickle=True), bomb),
}


def _saved(save: Callable[..., Any], bomb: Bomb) -> bytes:
    file = io.BytesIO()
    save(bomb, file)
    return file.getvalue()


def alone() -> World:
    return World.join(cluster_of([1]), rank=0, size=1, local_rank=0, host="", port=0)


def train_on(run_file: Path) -> None:
    job = resolve(run_file, read_config(run_file))
    with open_folder(job, fresh=False):
        world = alone()
        train_job(job, world, StopRequest())
        world.leave()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that began with imported weights, its INIT folder and its corpus."""
    folder = tmp_path_factory.mktemp("clean")
    save_model("llama-2", folder / "hf")
    import_folder(folder / "hf", folder / "init")
    corpus = make_corpus(folder / "data") / "."
    shutil.move(corpus, folder / "corpus")
    write_run_file(folder, 2)
    train_on(folder / "run.toml")
    return folder


def write_run_file(folder: Path, count: int) -> None:
    tree = run_tree(folder / "run", folder / "corpus", run={"steps": count, "sample_tokens": 4, "eval_sequences": 2})
    tree["model"] = {"init": str(folder / "init")}
    tree["batch"] = {"sequences": 4, "tokens": 32, "micro_batch": 4}
    tree["schedule"] = {"warmup_steps": 0}
    tree["tracking"] = {"to": []}
    (folder / "run.toml").write_text(tomli_w.dumps(tree))


def files_of(clean: Path) -> list[Path]:
    """All that any verb reads, relative to `clean`."""
    roots = [clean / name for name in ("run", "init", "corpus")]
    return [path.relative_to(clean) for root in roots for path in sorted(root.rglob("*")) if path.is_file()]


def copied(clean: Path, folder: Path) -> Path:
    for name in ("run", "init", "corpus"):
        shutil.copytree(clean / name, folder / name)
    write_run_file(folder, 3)
    kept = folder / "run" / "run.toml"
    kept.write_text(kept.read_text().replace(str(clean), str(folder)))
    return folder


def verbs(folder: Path) -> dict[str, Callable[[], Any]]:
    run = str(folder / "run")
    return {
        "eval": lambda: main(["eval", run]),
        "generate": lambda: main(["generate", run, "--tokens", "2"]),
        "export": lambda: main(["export", run, "-o", str(folder / "out"), "--force"]),
        "report": lambda: main(["report", run, "-o", str(folder / "report.html")]),
        "train": lambda: train_on(folder / "run.toml"),
    }


def ends_well_or_with_a_sentence(call: Callable[[], Any]) -> None:
    try:
        call()
    except (SystemExit, ThinwireError) as left:
        assert not isinstance(left, SystemExit) or left.code in (0, 2, None), left.code


def test_untouched_every_verb_does_its_work(clean: Path, tmp_path: Path) -> None:
    folder = copied(clean, tmp_path)
    for name, call in verbs(folder).items():
        try:
            call()
        except SystemExit as left:
            assert left.code in (0, None), name
    assert (folder / "out" / "model.safetensors").is_file() and (folder / "report.html").is_file()
    assert [path.name for path in list_checkpoints(folder / "run" / "checkpoints")][-1] == "step-00000003"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_pickle_in_any_file_is_not_executed(clean: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "went off"
    planted = KINDS[kind](Bomb(mark))
    files = files_of(clean)
    assert {"manifest.json", "rank-00000.safetensors", "events.jsonl", "init.json", "train.idx"} <= {
        f.name for f in files
    }
    for number, file in enumerate(files):
        folder = copied(clean, tmp_path / str(number))
        (folder / file).write_bytes(planted)
        for name, call in verbs(folder).items():
            ends_well_or_with_a_sentence(call)
            assert not bomb_went_off(mark), f"{name} executed {file}"
        shutil.rmtree(folder)
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert bomb_went_off(mark), "what was planted does nothing, so it proves nothing"


def in_format_1(run: Path) -> None:
    """Rewrites the run's newest checkpoint as this project wrote them before."""
    path = list_checkpoints(run / "checkpoints")[-1]
    manifest = Manifest.read(path)
    pieces = [
        Piece(name, info.shape, 0, torch.zeros(torch.Size(info.shape).numel(), dtype=getattr(torch, info.dtype[6:])))
        for name, info in manifest.tensors.items()
    ]
    PiecesReader(path, manifest).fill(pieces)
    shutil.rmtree(path)
    write_format_1(alone(), path.parent, manifest.step, pieces, manifest.meta)


def test_a_run_from_before_goes_on_and_a_pickle_in_its_metadata_is_not_executed(clean: Path, tmp_path: Path) -> None:
    untouched = copied(clean, tmp_path / "untouched")
    in_format_1(untouched / "run")
    main_rc = [_status(call) for call in verbs(untouched).values()]
    assert main_rc == [0] * 5
    assert [path.name for path in list_checkpoints(untouched / "run" / "checkpoints")][-1] == "step-00000003"
    mark = tmp_path / "went off"
    for name in (".metadata", "__0_0.distcp"):
        folder = copied(clean, tmp_path / name)
        in_format_1(folder / "run")
        checkpoint = list_checkpoints(folder / "run" / "checkpoints")[-1]
        (checkpoint / name).write_bytes(pickle.dumps(Bomb(mark)))
        manifest = Manifest.read(checkpoint)
        fitting = describe_files(checkpoint, manifest.files)  # as somebody would who means it
        text = (checkpoint / "manifest.json").read_text()
        for file, info in manifest.files.items():
            text = text.replace(info.sha256, fitting[file].sha256).replace(
                f'"size": {info.size}', f'"size": {fitting[file].size}'
            )
        (checkpoint / "manifest.json").write_text(text)
        assert [_status(call) for call in verbs(folder).values()] == [2, 2, 2, 0, 2], "only the report reads no weights"
        assert not bomb_went_off(mark)


def _status(call: Callable[[], Any]) -> Any:
    try:
        call()
    except ThinwireError as error:
        return error.exit_status
    except SystemExit as left:
        return left.code or 0
    return 0
