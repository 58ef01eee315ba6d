"""Times of what a rank computes in a step: matmuls, copies, blocks of a model, the loss, the optimizer, codecs.

All ranks do the same at once, so that cores which they share are shared here too.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from thinwire.comm.codecs.codec import make_codec
from thinwire.comm.world import World
from thinwire.model.loss import softmax_gradient_
from thinwire.model.transformer import Block, Context, rope_tables
from thinwire.parallel.shard.dtypes import sum_of_squares
from thinwire.probe.effort import BlockShape, Effort, Shape
from thinwire.probe.links import timed

# B sequences, T tokens, D hidden, N tokens of a loss, V vocabulary
Progress = Callable[[str], None]
Samples = list[float]
_TENSORS = 8
"""Tensors over which the numbers of an optimizer are spread."""


def matmuls(world: World, effort: Effort, dtype: torch.dtype, progress: Progress) -> dict[Shape, Samples]:
    """Seconds of one matmul by its shape."""
    found = {}
    for m, k, n in effort.shapes:
        progress(f"matmul {m} x {k} x {n}")
        a, b = (torch.rand(shape, device=world.device).to(dtype) for shape in ((m, k), (k, n)))
        found[m, k, n] = timed(world, effort.repeats, partial(torch.matmul, a, b))
    return found


def copies(world: World, effort: Effort, progress: Progress) -> dict[int, Samples]:
    """Seconds of one copy by bytes read and written."""
    found = {}
    for size in effort.copies:
        progress(f"copy of {size} bytes")
        source = torch.ones(size // 8, device=world.device)
        out = torch.empty_like(source)
        found[2 * source.nbytes] = timed(world, effort.repeats, partial(out.copy_, source))
    return found


def launches(world: World, effort: Effort) -> Samples:
    """Seconds of one operation on a few numbers."""
    one = torch.ones(8, device=world.device)
    return timed(world, effort.repeats, lambda: one.add_(0.0))


def blocks(
    world: World, effort: Effort, dtype: torch.dtype, progress: Progress
) -> dict[BlockShape, tuple[Samples, Samples]]:
    """(seconds of a forward, of a forward and a backward) of a block as the trainer has it."""
    found = {}
    for shape in effort.blocks:
        progress(str(shape))
        forward = _block(shape, world.device, dtype)
        grad_BTD = torch.ones(shape.sequences, shape.tokens, shape.hidden, device=world.device, dtype=dtype)
        once = timed(world, effort.repeats, forward)
        found[shape] = (once, timed(world, effort.repeats, lambda: forward().backward(grad_BTD)))  # type: ignore[no-untyped-call] # noqa: B023
    return found


def _block(shape: BlockShape, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A forward; gradients of the one before are forgotten, as between the micro-batches of a step."""
    spec = shape.spec
    block = Block(spec, 0).to(device=device, dtype=dtype)
    x_BTD = torch.randn(shape.sequences, shape.tokens, shape.hidden, device=device).to(dtype).requires_grad_()
    positions_BT = torch.arange(shape.tokens, device=device)[None]
    context = Context(*rope_tables(spec, positions_BT, dtype), None, None)

    def forward() -> Tensor:
        block.zero_grad(set_to_none=True)
        x_BTD.grad = None
        out: Tensor = block(x_BTD, context)
        return out

    return forward


def loss(world: World, effort: Effort, dtype: torch.dtype) -> Samples:
    """Seconds of the loss of one logit and of its gradient, beside the head's matmuls."""
    tokens, vocabulary = effort.logits
    logits_NV = torch.randn(tokens, vocabulary, device=world.device).to(dtype)
    targets_N = torch.arange(tokens, device=world.device) % vocabulary
    both = partial(softmax_gradient_, logits_NV, targets_N)
    return [second / (tokens * vocabulary) for second in timed(world, effort.repeats, both)]


def optimizer(world: World, effort: Effort) -> Samples:
    """Seconds of updating one number: the norm, scaling the gradient, fused AdamW."""
    n = effort.numbers // _TENSORS
    masters = [torch.zeros(n, device=world.device) for _ in range(_TENSORS)]
    grads = [torch.full((n,), 1e-3, device=world.device) for _ in range(_TENSORS)]
    adamw = torch.optim.AdamW(masters, lr=1e-3, fused=True)

    def step() -> None:
        for master, grad in zip(masters, grads, strict=True):
            sum_of_squares(grad)
            master.grad = grad.mul_(1.0)
        adamw.step()

    return [second / (n * _TENSORS) for second in timed(world, effort.repeats, step)]


def collect(world: World, effort: Effort) -> Samples:
    """Seconds of taking one number of a gradient over into flat sums."""
    grad, sums = (torch.zeros(effort.numbers, device=world.device) for _ in range(2))
    return [second / effort.numbers for second in timed(world, effort.repeats, partial(sums.copy_, grad))]


def coding(world: World, effort: Effort, progress: Progress) -> dict[str, tuple[Samples, Samples]]:
    """Codec -> (seconds of coding one number, of decoding one)."""
    found = {}
    n = min(effort.numbers, effort.coded)
    x_n = torch.randn(n, device=world.device)
    out_n = torch.empty_like(x_n)
    for name in effort.codecs:
        progress(f"codec {name}")
        codec = make_codec(name)
        coded = codec.encode(x_n)[None].clone()
        kinds: tuple[Callable[[], object], ...] = (partial(codec.encode, x_n), partial(codec.sum_into, coded, out_n))
        one_way = [[second / n for second in timed(world, effort.repeats, work)] for work in kinds]
        found[name] = (one_way[0], one_way[1])
    return found
