"""Modules that hold others and are never called."""

import torch
from torch import Tensor, nn

from zoo.cases import IDS, WIDTH, Block, case, ids


@case("a ModuleList of ModuleLists")
class ListOfLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pair = lambda: nn.ModuleList([nn.Linear(WIDTH, WIDTH), Block()])  # noqa: E731
        self.layers = nn.ModuleList(pair() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:
            x = second(x + first(x))
        return x


@case("a ModuleList of ModuleDicts")
class ListOfDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "mix": nn.Linear(WIDTH, WIDTH)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["mix"](layer["norm"](x))
        return x


@case("a ModuleDict whose entries are called by key")
class DictOfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"enter": nn.Linear(WIDTH, WIDTH), "middle": Block(), "leave": nn.Linear(WIDTH, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for key in ("enter", "middle", "leave"):
            x = self.parts[key](x)
        return x


@case("a ParameterList and a ParameterDict, on the root and in blocks")
class ListOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(3))
        self.biases = nn.ParameterDict(
            {"in": nn.Parameter(torch.zeros(WIDTH)), "out": nn.Parameter(torch.zeros(WIDTH))}
        )
        self.blocks = nn.ModuleList(HasParameterList() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.biases["in"]
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        for block in self.blocks:
            x = block(x)
        return x + self.biases["out"]


class HasParameterList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0] @ self.weights[1]


@case("a module that lies in two containers, the second time under another name")
class InTwoContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared, activation = nn.Linear(WIDTH, WIDTH), nn.GELU()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), activation, shared)
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), activation, shared, nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Holder(nn.Module):
    """A module without a forward that holds modules, as a namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.h = nn.Embedding(IDS, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)


@case("layers held in a module without a forward", batch=ids)
class Namespace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = Holder()

    def forward(self, x: Tensor) -> Tensor:
        h = self.transformer.wte(x)
        for block in self.transformer.h:
            h = block(h)
        return self.transformer.ln_f(h)
