"""Units that return more than fresh tensors: views of weights, generators, closures, objects."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.cases import WIDTH, Block, Net, case


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4096, WIDTH))

    def forward(self, length: int) -> Tensor:
        return self.table[:, :length]


@case("a unit returns a view of its parameter, to be added to something")
class ViewReturned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.block = Positions(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None] + self.positions(len(x)))


@case("a unit returns a view of its parameter, of which the root takes another view")
class ViewOfViewReturned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.block = Positions(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.positions(2 * len(x))[0, len(x) :])


class Itself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self) -> Tensor:
        return self.weight


@case("a unit returns its parameter itself, and another its transpose")
class ParameterReturned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.block = Itself(), Itself(), Block()

    def forward(self, x: Tensor) -> Tensor:
        right = self.right().t()
        return self.block(x @ self.left()) @ right


class Yields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        return (self.o(part) for part in x.chunk(2))


@case("a unit returns a generator that uses its weights when it is read")
class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.block = nn.Linear(WIDTH, WIDTH), Yields()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.block(self.enter(x))))


class Makes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        scale = x.mean()
        return lambda y: self.o(y) * scale


@case("a unit returns a closure that uses its weights later")
class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.block = nn.Linear(WIDTH, WIDTH), Makes()

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.block(h)(h)


@dataclass
class Output:
    hidden: Tensor
    more: dict[str, Any]


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, hidden: Tensor, scale: float) -> Output:
        return Output(self.o(hidden) * scale, {"seen": [hidden.detach()], "pair": (hidden, None)})


@case("units with keyword arguments only that return dataclasses with dicts in them")
class Dataclasses(Net):
    def __init__(self) -> None:
        super().__init__(block=Packs)

    def forward(self, x: Tensor) -> Tensor:
        out = Output(self.enter(x), {})
        for block in self.blocks:
            out = block(hidden=out.hidden + (out.more["pair"][0] if out.more else 0), scale=0.5)
        return self.leave(out.hidden)


@case("activations are changed in place right behind a unit", lr=0.001)
class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu_()
        for block in self.blocks:
            x = block(x)
            x += 1
        return self.leave(x).mul_(2)
