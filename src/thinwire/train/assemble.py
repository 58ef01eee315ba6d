"""From a job and a world to the parts of a run: model, engine, optimizer, data feed, checkpoints, telemetry."""

from functools import partial
from typing import Any

import torch

from thinwire.checkpoint.store import Checkpoints
from thinwire.comm.world import World
from thinwire.data.loader import Loader, Packing, Prefetcher
from thinwire.hub.native_spec import NativeSpec
from thinwire.hub.pretrained import build_native
from thinwire.model.generate import LanguageModel
from thinwire.model.spec import ModelSpec
from thinwire.model.transformer import Transformer, initial_weight
from thinwire.parallel.apply import apply_plan
from thinwire.parallel.shard.deferred import Initial
from thinwire.parallel.shard.dtypes import COMPUTE_DTYPES
from thinwire.parallel.shard.engine import Sharded
from thinwire.parallel.shard.optimizer import ShardedOptimizer
from thinwire.plan.optimizers import OptimizerConfig
from thinwire.sync.outer_sync import OuterSync
from thinwire.train.emulate import SleepingUpdate, emulate
from thinwire.train.folder import CHECKPOINTS
from thinwire.train.job import Job
from thinwire.train.parts import Parts
from thinwire.train.progress import Reporter, peak_flops_per_s


def assemble(job: Job, world: World) -> Parts:
    """Build every part. All ranks draw the same initial weights from `run.seed`, whatever the world's size."""
    config = job.config
    model, module, initial = build_model(job, world)
    pace = None if config.compute is None else emulate(module, config.compute, world)
    group = world if job.plan.sync is None else world.inside(job.plan.levels_in_group)
    sharded = apply_plan(module, job.plan.of_group(), group, compile_blocks=config.run.compile, initial=initial)
    if pace is not None and config.compute is not None:
        optimizer = ShardedOptimizer(sharded, partial(SleepingUpdate, pace=pace, update_s=config.compute.update))
    else:
        optimizer = build_optimizer(sharded, config.optimizer)
    loader = Loader(
        Packing(
            job.corpus.train,
            config.batch.tokens,
            cross_documents=job.corpus.cross_documents,
            vocab_size=job.spec.vocab_size,
        ),
        batch_sequences=config.batch.sequences,
        seed=config.run.seed,
    )
    feed = Prefetcher(loader, rank=world.rank, ranks=world.size, micro_batch=job.plan.micro_batch)
    kept = config.checkpoint
    checkpoints = Checkpoints(
        job.folder / CHECKPOINTS, keep_last=kept.keep_last, keep_every=kept.keep_every, world=world, verify=kept.verify
    )
    peak, origin = peak_flops_per_s(job.cluster.device, COMPUTE_DTYPES[job.plan.compute_dtype])
    return Parts(
        job=job,
        world=world,
        group=group,
        sync=None if job.plan.sync is None else OuterSync(sharded, job.plan.sync, world),
        model=model,
        sharded=sharded,
        optimizer=optimizer,
        feed=feed,
        checkpoints=checkpoints,
        nominal_tokens=config.batch.sequences * config.batch.tokens * group.size // world.size,
        cross_documents=job.corpus.cross_documents,
        peak_flops_per_s=peak,
        peak_origin=origin,
        reporter=Reporter(),
    )


def build_model(job: Job, world: World) -> tuple[LanguageModel, torch.nn.Module, Initial]:
    """(what the loop calls, the module to shard, its first values): fp32 masters, or fp64 for an fp64 run.

    This project's own model is on the meta device, so that no rank ever holds it unsharded.
    """
    model: LanguageModel
    module: torch.nn.Module
    if isinstance(job.spec, NativeSpec):
        model = build_native(job.spec, job.config.model.hf, seed=job.config.run.seed)
        module = model.module.to(world.device)
    else:
        with torch.device("meta"):
            model = module = Transformer(job.spec)
    if job.plan.compute_dtype == "fp64":
        module.double()
    return model, module, _first_values(job, module)


def _first_values(job: Job, module: torch.nn.Module) -> Initial:
    """Drawn from `run.seed`; not a number where imported weights, or a checkpoint of them, come afterwards; zeros where
    nothing computes with them."""
    spec, shapes = job.spec, {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}

    def initial(name: str) -> torch.Tensor:
        assert isinstance(spec, ModelSpec)
        if job.emulated:
            return torch.zeros(()).expand(shapes[name])
        if job.init is not None:
            return torch.tensor(torch.nan).expand(shapes[name])
        return initial_weight(spec, name, shapes[name], seed=job.config.run.seed)

    return initial


def build_optimizer(sharded: Sharded, options: OptimizerConfig) -> ShardedOptimizer:
    """The named optimizer over the owned shards, fused where the device has it; vectors are not decayed."""

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        betas = (options.beta1, options.beta2)
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True)

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        momentum, nesterov = options.momentum, options.nesterov
        return torch.optim.SGD(groups, lr=options.lr, momentum=momentum, nesterov=nesterov, fused=True)

    def group_of(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"weight_decay": options.weight_decay if len(shape) >= 2 else 0.0}

    return ShardedOptimizer(sharded, {"adamw": adamw, "sgd": sgd}[options.name], group_of=group_of)
