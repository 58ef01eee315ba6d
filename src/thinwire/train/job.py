"""From a run file to everything a run needs to know before it starts. No torch: wrong input is answered at once."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire import __version__
from thinwire.cluster.cluster import Cluster
from thinwire.config import load
from thinwire.data.corpus import Corpus, DataConfig, exists, make_once
from thinwire.data.inputs import check_files
from thinwire.data.notes import prepare_shown
from thinwire.data.prepare import Options
from thinwire.data.tokenizer import ByteTokenizer, load_file, parse_choice
from thinwire.errors import ConfigError, DataError
from thinwire.hub.init import Init, read_init
from thinwire.hub.native_spec import AnySpec, NativeSpec
from thinwire.model.config import check_vocabulary
from thinwire.model.spec import ModelSpec
from thinwire.plan.plan import Plan
from thinwire.plan.rounds import assign_units, fragment_count
from thinwire.plan.sync import Sync
from thinwire.train.config import ComputeConfig, RunConfig
from thinwire.units import show_seconds


@dataclass(frozen=True)
class Outline:
    """What a run file says before its corpus is there: on what will be trained, where, how."""

    config: RunConfig
    folder: Path
    cluster: Cluster
    plan: Plan

    @property
    def emulated(self) -> bool:
        """Whether ranks sleep in place of computing."""
        return self.config.compute is not None


@dataclass(frozen=True)
class Job(Outline):
    """A resolved run file: also what will be trained."""

    spec: AnySpec
    corpus: Corpus
    init: Init | None = None
    """Where the first weights come from; None: they are drawn."""


def read_config(run_file: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The run file with its overrides. Raises ConfigError."""
    return load(RunConfig, run_file, settings)


def default_folder(run_file: Path) -> Path:
    """The run folder of a run file that names none."""
    return Path("runs") / run_file.stem


def expected_vocabulary(data: DataConfig) -> int | None:
    """Ids of the corpus' tokenizer; of a corpus that is still to be made, those that its tokenizer will have at most.

    None if that is not known. Raises DataError if the corpus is damaged, or the tokenizer cannot be read.
    """
    if exists(data):
        return Corpus.open(data).vocab_size
    if not data.sources:
        return None
    choice = parse_choice(data.tokenizer)
    if isinstance(choice, Path):
        return load_file(choice).vocab_size
    return ByteTokenizer().vocab_size if choice is None else choice


def _never() -> bool:
    return False


def _silent(sentence: str) -> None:
    """Nobody wants to hear it."""


def outlined(run_file: Path, config: RunConfig) -> Outline:
    """Check all that needs neither model nor corpus. Raises ConfigError or PlanError with one sentence."""
    cluster = config.cluster.resolve(run_file.parent)
    try:
        micro_batch, accumulate = config.batch.split(cluster.ranks)
    except ValueError as error:
        raise ConfigError(f"{run_file}: {error}") from None
    plan = config.plan.resolve(cluster, micro_batch=micro_batch, accumulate=accumulate)
    return Outline(config, config.run.folder or default_folder(run_file), cluster, plan)


def foreseen(run_file: Path, config: RunConfig) -> Outline:
    """Check all that can be before a corpus is made on first use; everything, if it is there or is not to be made.

    Raises ConfigError, DataError or PlanError with one sentence.
    """
    data, outline = config.data, outlined(run_file, config)
    if exists(data) or not data.sources:
        return resolve(run_file, config)
    check_files(data.sources, include=data.include, exclude=data.exclude)
    spec, _ = _model(outline, expected_vocabulary(data))
    _check_model(run_file, outline, spec)
    return outline


def resolve(
    run_file: Path,
    config: RunConfig,
    *,
    prepare: bool = False,
    stopped: Callable[[], bool] = _never,
    say: Callable[[str], None] = _silent,
) -> Job:
    """Check every section against every other. Raises ConfigError, DataError or PlanError with one sentence.

    `prepare`: make the corpus first if it is not there, once everything has been checked that does not need it, or `say`
    for whom this process waits; raises StopAsked if `stopped()` meanwhile.
    """
    outline = foreseen(run_file, config) if prepare and not exists(config.data) else outlined(run_file, config)
    if prepare:
        corpus_for(config, stopped=stopped, say=say)
    corpus = Corpus.open(config.data)
    spec, init = _model(outline, corpus.vocab_size)
    _check_model(run_file, outline, spec)
    if corpus.train.tokens <= config.batch.tokens:
        raise DataError(
            f"the corpus at {config.data.path} has {corpus.train.tokens:,} training tokens, fewer than one sequence of "
            f"{config.batch.tokens}; prepare more text or lower batch.tokens"
        )
    return Job(config, outline.folder, outline.cluster, outline.plan, spec, corpus, init)


def _model(outline: Outline, vocabulary: int | None) -> tuple[AnySpec, Init | None]:
    """The spec, and the folder of the first weights. Raises ConfigError or CheckpointError."""
    model, folder = outline.config.model, outline.folder
    init = None if model.init is None else read_init(model.init, kept=folder)
    spec = init.spec if init is not None else _spec(outline.config, vocabulary, folder)
    if init is not None or model.hf is not None:
        check_vocabulary(spec.vocab_size, vocabulary, "prepare the corpus with the tokenizer.json of that model")
    return spec, init


def _check_model(run_file: Path, outline: Outline, spec: AnySpec) -> None:
    """Raises ConfigError or PlanError if sequences are longer than the model's, or rounds do not fit it."""
    batch, sync = outline.config.batch, outline.plan.sync
    if batch.tokens > spec.max_tokens:
        raise ConfigError(
            f"{run_file}: batch.tokens = {batch.tokens} is longer than the model's {spec.max_tokens} positions; "
            f"lower batch.tokens or set model.max_tokens = {batch.tokens}"
        )
    if sync is not None and isinstance(spec, ModelSpec):
        _check_rounds(sync, spec)
    if outline.config.compute is not None:
        _check_emulated(outline, outline.config.compute, spec)


def refuse_emulating(spec: AnySpec) -> ModelSpec:
    """The spec of a model whose units may sleep. Raises ConfigError for one whose modules are another library's."""
    if isinstance(spec, NativeSpec):
        raise ConfigError(
            "compute is emulated for thinwire's own models, whose units are known, and [model] hf is a model of "
            "transformers; take model.preset, or model.init with what `thinwire import` made of it"
        )
    return spec


def _check_emulated(outline: Outline, compute: ComputeConfig, spec: AnySpec) -> None:
    """Raises ConfigError where ranks cannot sleep in place of computing."""
    refuse_emulating(spec)
    device, ranks = outline.cluster.device, outline.cluster.ranks
    if outline.config.run.compile:
        raise ConfigError(
            "run.compile compiles blocks, which only sleep where compute is emulated; leave run.compile out"
        )
    if compute.slow and len(compute.slow) != ranks:
        raise ConfigError(f"compute.slow has {len(compute.slow)} factors for {ranks} ranks; give one each, or none")
    if device.peak_flops_per_s is None:
        raise ConfigError(
            f"compute is emulated, and of device {device.name!r} no peak_flops_per_s is known, over which a step's MFU "
            f"would be; give it in [cluster.device], or name a device that `thinwire presets` lists"
        )


def emulation(job: Outline) -> str | None:
    """What a run whose compute is emulated says first; None if ranks compute."""
    compute = job.config.compute
    if compute is None:
        return None
    parts = {"embedding": compute.embedding, "a block": compute.block, "the head": compute.head}
    took = ", ".join(f"{name} {show_seconds(f)} and {show_seconds(b)}" for name, (f, b) in parts.items())
    slow = [f"rank {rank} takes {factor:g} times as long" for rank, factor in enumerate(compute.slow) if factor != 1]
    return (
        f"compute is emulated: ranks sleep as long as {job.cluster.device.name} would compute ({compute.source}) and train "
        f"nothing, so there is no loss, validation, checkpoint or sample\n"
        f"forward and backward of {took}; the update of a million numbers {show_seconds(1e6 * compute.update)}"
        + "".join(f"; {each}" for each in slow)
    )


def _check_rounds(sync: Sync, spec: ModelSpec) -> None:
    """Raises PlanError if the model has fewer units, or a round fewer steps, than fragments are asked for."""
    shapes = spec.parameter_shapes()
    units = [(unit.name, sum(math.prod(shapes[name]) for name in unit.parameters)) for unit in spec.units()]
    fragments = fragment_count(sync.fragments, spec.layers)
    assign_units(units, fragments, sync.order)
    sync.schedule(fragments)


def _spec(config: RunConfig, vocabulary: int | None, folder: Path) -> AnySpec:
    if config.model.hf is None:
        return config.model.resolve(vocabulary)
    from thinwire.hub.pretrained import describe

    return describe(config.model.hf, kept=folder, lora=config.model.lora)


_OF_A_HOST: Any = {
    "cluster": True,
    "data": {*DataConfig.model_fields} - {"cross_documents"},
    "model": True,
    "plan": True,
    "tracking": True,
}
"""Sections and keys that say where something is and how it is made; what it is then is stated instead."""


def statement(job: Job) -> dict[str, Any]:
    """What every rank of a run must have in common besides levels, as JSON: the run file, and what it means by now.

    Where the corpus, imported weights and a plan's file lie is each host's own business.
    """
    return {
        **job.config.model_dump(mode="json", exclude=_OF_A_HOST),
        "thinwire": __version__,
        "plan": job.plan.model_dump(mode="json", exclude={"levels"}),
        "cluster": {"share_device": job.cluster.share_device},
        "model": job.spec.model_dump(mode="json"),
        "weights": {} if job.init is None else {name: info.sha256 for name, info in job.init.files.items()},
        "corpus and tokenizer": job.corpus.digest,
    }


def refuse_crossing(job: Job) -> None:
    """Raise ConfigError if documents are to be kept apart and the model of `[model] hf` lets them see each other.

    It is tried once, at the start, with the weights that training starts from; the model is in memory meanwhile.
    """
    if not isinstance(job.spec, NativeSpec) or job.corpus.cross_documents:
        return
    from thinwire.hub.native import refuse_if_crossing
    from thinwire.hub.pretrained import build_native

    model = build_native(job.spec, job.config.model.hf, seed=job.config.run.seed)
    refuse_if_crossing(model, job.spec.vocab_size, source=str(job.config.model.hf), talks=job.corpus.conversations)


RANKS_A_CORE = 64


def crowding(ranks: int) -> str | None:
    """A warning if `ranks` local ranks have to share this machine's cores, else None. Raises ConfigError for a crowd."""
    cores = os.cpu_count() or 1
    if ranks > RANKS_A_CORE * cores:
        raise ConfigError(
            f"{ranks:,} ranks are too many for the {cores} cores of this machine, which would hang (at most {RANKS_A_CORE} "
            f"a core are started); make cluster.levels smaller, or start the run on more machines with torchrun or srun"
        )
    if ranks <= cores:
        return None
    return f"{ranks} ranks share {cores} cores of this machine: they will take turns, and timings mean little"


def corpus_for(
    config: RunConfig, *, stopped: Callable[[], bool] = _never, say: Callable[[str], None] = _silent
) -> None:
    """Prepare `data.path` from `data.sources` if nothing is there yet, once however many ask. Raises as `make_once` does."""
    data = config.data
    if not data.sources:
        return
    globs = (data.include, data.exclude)
    options = Options(data.sources, data.tokenizer, *globs, data.field, data.validation_fraction, data.special_tokens)
    make_once(
        data.path,
        lambda: prepare_shown(options, data.path, stopped=stopped),
        there=lambda: exists(data),
        stopped=stopped,
        say=say,
    )
