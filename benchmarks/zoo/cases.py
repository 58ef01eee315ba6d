"""What a case of the model zoo is (a module, its batches and its loss, and how it is trained), and what most cases share."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One module and how it is trained for a few steps: the same everywhere, whoever shards it."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the module from the default generator's state; the same on every rank."""
    batch: Callable[[int, int], Any]
    """(number, rank): what that rank computes on in its micro-batch of that number."""
    loss: Callable[[nn.Module, Any, int, int], Tensor]
    """(module, batch, number, rank): a scalar. `bare` gives what a wrapper wraps."""
    lr: float = 0.1
    accumulate: int = 1
    """Micro-batches of a step."""
    after: Callable[[nn.Module, int], float] | None = None
    """(module, step): something read between steps, as a program that knows nothing of sharding would."""
    clip: float | None = None
    """`clip_grad_norm_(model.parameters(), clip)` before each step; the norm it returns is compared."""
    skips: tuple[type[Exception], ...] = ()
    """A micro-batch that ends with it is left out, as programs do that catch running out of memory."""
    about: str = ""


def bare(model: nn.Module) -> Any:
    """The module itself: DistributedDataParallel hides its attributes."""
    return model.module if type(model).__name__ == "DistributedDataParallel" else model


WIDTH, ROWS, IDS = 16, 6, 40


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 shards, as its users write it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def vectors(number: int, rank: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1000 * number + rank))


def ids(number: int, rank: int) -> Tensor:
    return torch.randint(0, IDS, (ROWS,), generator=torch.Generator().manual_seed(1000 * number + rank))


def squares(model: nn.Module, batch: Any, number: int, rank: int) -> Tensor:
    return model(batch).pow(2).mean()


def case(about: str, **options: Any) -> Callable[[Callable[[], nn.Module]], Case]:
    """Makes a case of a builder, a function or a class; the batch is `vectors` and the loss `squares` unless given."""

    def made(build: Callable[[], nn.Module]) -> Case:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", build.__name__).lower()
        return Case(name, build, **{"batch": vectors, "loss": squares, **options}, about=about)

    return made


class Block(nn.Module):
    """x + b(gelu(a(x)))"""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(x)))


class Net(nn.Module):
    """Blocks between two layers; most modules below change one thing of it."""

    def __init__(self, blocks: int = 3, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.leave = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)
