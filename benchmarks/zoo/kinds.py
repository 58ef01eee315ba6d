"""Parameters that are not just fp32 numbers to be trained."""

import torch
from torch import Tensor, nn

from zoo.cases import IDS, ROWS, WIDTH, Block, Net, case, ids, vectors


class Quantised(nn.Module):
    """A frozen integer base with trained layers around it."""

    def __init__(self, *bases: Tensor) -> None:
        super().__init__()
        self.first, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for index, base in enumerate(bases):
            self.register_parameter(f"base{index}", nn.Parameter(base, requires_grad=False))
        self.count = len(bases)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index in range(self.count):
            x = x * getattr(self, f"base{index}")
        return self.o(x)


@case("a frozen uint8 parameter")
def frozen_uint8() -> nn.Module:
    return Quantised(torch.arange(240, 240 + WIDTH).to(torch.uint8) // 100)


@case("frozen int8, int64 and bool parameters")
def frozen_integers() -> nn.Module:
    numbers = torch.arange(WIDTH) - 8
    return Quantised(numbers.to(torch.int8) // 4, numbers // 8, numbers > -3)


@case("frozen bf16 and fp16 parameters beside trained fp32")
def frozen_floats() -> nn.Module:
    ones = torch.linspace(0.5, 1, WIDTH)
    return Quantised(ones.bfloat16(), ones.half())


class Spectral(nn.Module):
    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((WIDTH // 2 + 1,), 1 + 2j), requires_grad=trained)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=WIDTH))


@case("a frozen complex parameter")
def frozen_complex() -> nn.Module:
    return Spectral(trained=False)


@case("a trained complex parameter")
def trained_complex() -> nn.Module:
    return Spectral(trained=True)


@case("an embedding with sparse gradients", batch=ids)
def sparse_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(IDS, WIDTH, sparse=True), Block())


@case("parameters without elements, alone in a unit and beside others", batch=vectors)
class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.none, self.o = nn.Linear(0, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.o.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(x) + self.none(x[:, :0]) + self.o.nothing.sum()


@case("scalars without dimensions, and parameters smaller than the world")
class Scalars(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.shift


@case("fp64 throughout", batch=lambda number, rank: vectors(number, rank).double())
def doubles() -> nn.Module:
    return Net().double()


@case("fp64 blocks between fp32 layers")
class MixedTypes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).double()
        for block in self.blocks:
            x = block(x)
        return self.leave(x.float())


@case("non-contiguous parameters: transposed, and convolutions in channels_last")
class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter((torch.randn(8, 4) / 4).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.view(ROWS, 2, 2, 4)).mean((2, 3)) @ self.turned


@case("lazy layers that a first forward has made")
def lazy_made() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU(), nn.LazyLinear(4))
    model(torch.zeros(1, WIDTH))
    return model


class LazyDiagonal(nn.LazyLinear):
    """Drawn by nobody, so that it is the same on all ranks."""

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.in_features != 0:
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)


@case("a lazy layer that nobody has called yet")
class LazyUnmade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), LazyDiagonal(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))
