"""Units that some ranks or some steps leave out, or whose gradient stays away."""

import torch
from torch import Tensor, nn

from zoo.cases import WIDTH, Block, Net, case


def told_rank(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    return model(x, number, rank).pow(2).mean()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.routed = Block(), Block()

    def forward(self, x: Tensor, idle: bool) -> Tensor:
        return self.shared(x) + (0 if idle else self.routed(x))


@case("an expert inside a block is idle on one rank", loss=told_rank)
class IdleExpert(Net):
    def __init__(self) -> None:
        super().__init__(block=Experts)

    def forward(self, x: Tensor, number: int, rank: int) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, number == 1 and rank == 1)
        return self.leave(x)


class Routed(nn.Module):
    """Top-1 of four experts, which are a list of modules; most of them get few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return x + out


@case("a mixture of experts whose experts are reached by some ranks only")
def routed_experts() -> nn.Module:
    return Net(block=Routed)


@case("a mixture of experts at the root: experts are the entries of the list themselves")
def routed_at_root() -> nn.Module:
    return Routed()


@case("a block runs on every rank and gets no gradient on one", loss=told_rank)
class NoGradientOnOneRank(Net):
    def forward(self, x: Tensor, number: int, rank: int) -> Tensor:
        x = self.enter(x)
        for index, block in enumerate(self.blocks):
            y = block(x)
            x = x + (y.detach() if rank == 1 and index == 1 else y)
        return self.leave(x)


@case("a block is left out on one rank", loss=told_rank)
class LeftOutOnOneRank(Net):
    def forward(self, x: Tensor, number: int, rank: int) -> Tensor:
        x = self.enter(x)
        for index, block in enumerate(self.blocks):
            if not (index == 1 and rank == 1 and number == 1):
                x = block(x)
        return self.leave(x)


@case("a block is left out on all ranks in one step", loss=told_rank)
class LeftOutEverywhere(Net):
    def forward(self, x: Tensor, number: int, rank: int) -> Tensor:
        x = self.enter(x)
        for index, block in enumerate(self.blocks):
            if not (index == 1 and number == 1):
                x = block(x)
        return self.leave(x)


@case("blocks run in another order on one rank", loss=told_rank)
class OtherOrder(Net):
    def forward(self, x: Tensor, number: int, rank: int) -> Tensor:
        x = self.enter(x)
        order = reversed(list(self.blocks)) if rank == 1 and number == 1 else list(self.blocks)
        for block in order:
            x = block(x)
        return self.leave(x)
