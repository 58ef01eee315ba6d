"""Emulated compute: units sleep in place of computing, so that ranks that share a machine's cores do not share its seconds.

What sleeps is forward and backward of every unit, and the optimizer's update. All else is a run's own: which units there
are, what of them is gathered and reduced when, every byte that is sent. Gradients are zeros of the right shapes, which
nobody has to write; between units a single number goes along the graph. Of a block, backward's seconds are spread over its
layers by their weights, since gradients come layer by layer and the engine goes on with what is under way as they do.

The engine's own work (its hooks, copies between ranks of a host, codecs, the norm) is done by this machine's cores, and
comes on top.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from thinwire.comm.world import World
from thinwire.model.transformer import Transformer
from thinwire.train.config import ComputeConfig
from thinwire.units import SYSTEM_CLOCK, SystemClock


def emulate(model: nn.Module, seconds: ComputeConfig, world: World) -> "Pace":
    """Let the units of `model`, not yet sharded, sleep in place of computing; the pace of this rank, for its optimizer."""
    assert isinstance(model, Transformer)
    wake_on_time()
    factor = seconds.slow[world.rank] if seconds.slow else 1.0
    pace = Pace(factor=factor, waited=waited_on_links(world))
    Emulated(model, seconds, pace)
    return pace


_SET_TIMER_SLACK = 29


def wake_on_time() -> None:
    """Tell Linux to end this thread's sleeps when they are over, not up to 50 us later."""
    try:
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0)
    except (AttributeError, OSError, TypeError):  # no Linux
        return


class Pace:
    """Spends seconds of compute by sleeping. What one sleep lasts too long is taken off the next: errors do not add up.

    Unless this rank has waited for others in between, which it would have done all the same: `waited(since)` says for how
    many seconds after a moment of the clock. `factor`: by how much longer this rank takes for everything.
    """

    def __init__(
        self,
        *,
        factor: float = 1.0,
        waited: Callable[[float], float] = lambda since: 0.0,
        clock: SystemClock = SYSTEM_CLOCK,
    ) -> None:
        self._factor, self._waited, self._clock = factor, waited, clock
        self._ended, self._late_s = clock.now(), 0.0

    def spend(self, seconds: float) -> None:
        """Be busy for `seconds`, of which what was late before is already over."""
        if seconds == 0:
            return
        begun = self._clock.now()
        late_s = max(0.0, self._late_s - self._waited(self._ended)) if self._late_s else 0.0
        due = begun + seconds * self._factor - late_s
        if (left_s := due - self._clock.now()) > 0:
            self._clock.sleep(left_s)
        self._ended = self._clock.now()
        self._late_s = max(0.0, self._ended - due)


def waited_on_links(world: World) -> Callable[[float], float]:
    """For how many seconds a rank has stood still for its links since a moment; copies inside a host are its own work."""
    copied = {level.name for index, level in enumerate(world.cluster.levels) if world.reads_memory(index)}
    return lambda since: sum(
        entry.exposed_s for entry in world.ledger if entry.finished_s > since and entry.level not in copied
    )


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, its seconds, and which of its parameters get their gradient from it.

    Of a parameter that several layers use the first one gives the gradient: backward comes to it last, and nothing is added.
    """

    module: nn.Module
    gives: frozenset[str]
    forward_s: float
    backward_s: float

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(recurse=False)


class Emulated:
    """The layers of a model, which sleep; `zeros` is what their gradients are made of."""

    def __init__(self, model: Transformer, seconds: ComputeConfig, pace: Pace) -> None:
        self.pace = pace
        self._zeros: dict[torch.dtype, Tensor] = {}
        self._most = max(parameter.numel() for parameter in model.parameters())
        given: set[nn.Parameter] = set()
        for unit, (forward_s, backward_s) in _units(model, seconds):
            layers = list(_layers(unit, forward_s, backward_s, given))
            unit.forward = self._forward_of(layers, last=unit is model.head)
        model.forward = _through(model)  # type: ignore[method-assign]

    def _forward_of(self, layers: Sequence[Layer], *, last: bool) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any) -> Tensor:
            for layer in layers:
                x = _Sleep.apply(self, layer, x, *(p for _, p in layer.parameters()))  # type: ignore[no-untyped-call]
            return x.sum() if last else x

        return forward

    def zeros(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Zeros on the CPU that share their memory with all others: whoever adds to them adds zeros."""
        if dtype not in self._zeros:
            self._zeros[dtype] = torch.zeros(self._most, dtype=dtype)
        return self._zeros[dtype][: shape.numel()].view(shape)


def _units(model: Transformer, seconds: ComputeConfig) -> Iterator[tuple[nn.Module, tuple[float, float]]]:
    """Every unit, in the order in which the real forward calls them, with its seconds."""
    yield model.embedding, seconds.embedding
    if model.spec.family == "gpt2":
        yield model.positions, (0.0, 0.0)  # a part of the embedding's
    for block in model.blocks:
        yield block, seconds.block
    yield model.norm, (0.0, 0.0)  # a part of the head's
    yield model.head, seconds.head


def _layers(unit: nn.Module, forward_s: float, backward_s: float, given: set[nn.Parameter]) -> Iterator[Layer]:
    """The layers of a unit in the order of forward; nothing happens between those of one forward, so its first sleeps."""
    modules = [module for module in unit.modules() if module._parameters]
    of_unit = sum(parameter.numel() for parameter in unit.parameters())
    for module in modules:
        own = dict(module.named_parameters(recurse=False))
        share = sum(parameter.numel() for parameter in own.values()) / of_unit
        new = frozenset(name for name, parameter in own.items() if parameter not in given)
        given.update(own.values())
        yield Layer(module, new, forward_s if module is modules[0] else 0.0, backward_s * share)


def _through(model: Transformer) -> Callable[..., Tensor]:
    """The model's forward as far as units go: one number in the place of the hidden states."""
    start = torch.zeros(1)

    def forward(tokens_BT: Tensor, targets_BT: Tensor, **_: Any) -> Tensor:
        x = model.embedding(start)
        if model.spec.family == "gpt2":
            x = x + model.positions(start)
        for block in model.blocks:
            x = block(x, None)
        return model.head(model.norm(x), targets_BT)  # type: ignore[no-any-return]

    return forward


class _Sleep(torch.autograd.Function):
    """One layer: sleep, a number out; sleep, its parameters' gradients out."""

    @staticmethod
    def forward(ctx: Any, emulated: Emulated, layer: Layer, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # what is saved makes recomputation run the forward again
        ctx.emulated, ctx.layer = emulated, layer
        names = [name for name, _ in layer.parameters()]
        ctx.shapes = [(n in layer.gives, p.shape, p.dtype) for n, p in zip(names, parameters, strict=True)]
        emulated.pace.spend(layer.forward_s)
        return torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.emulated.pace.spend(ctx.layer.backward_s)
        made = (ctx.emulated.zeros(shape, dtype) if gives else None for gives, shape, dtype in ctx.shapes)
        return None, None, torch.zeros_like(x), *made


class SleepingUpdate(torch.optim.Optimizer):
    """In the place of an optimizer: sleeps `update_s` for every number that has a gradient, and leaves it as it is."""

    def __init__(self, groups: list[dict[str, Any]], *, pace: Pace, update_s: float) -> None:
        super().__init__(groups, {})
        self._pace, self._update_s = pace, update_s

    def step(self, closure: Any = None) -> Any:
        numbers = (p.numel() for group in self.param_groups for p in group["params"] if p.grad is not None)
        self._pace.spend(self._update_s * sum(numbers))
