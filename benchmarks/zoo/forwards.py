"""Modules whose forwards are called otherwise than once each, in order, by the root."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cases import IDS, WIDTH, Block, Net, bare, case, ids, vectors


@case("an ordinary module: blocks between two layers")
def ordinary() -> nn.Module:
    return Net()


@case("two micro-batches a step", accumulate=2)
def accumulated() -> nn.Module:
    return Net()


@case("130 blocks of width 32", batch=lambda number, rank: vectors(number, rank).repeat(1, 2))
def deep_130() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(130)))


@case("300 layers of width 32", batch=lambda number, rank: vectors(number, rank).repeat(1, 2))
def deep_300() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(300)))


def encode_loss(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    return bare(model).encode(x * bare(model).scale).pow(2).mean()


@case("a method of the root is called instead of its forward, a root parameter read before", loss=encode_loss)
class MethodOfRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def encode(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x * self.scale)


@case(
    "the loop scales the input by a parameter of the root, then calls the root",
    loss=lambda model, x, number, rank: model(x * bare(model).scale).pow(2).mean(),
)
class RootParameterBeforeForward(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))


class Tokens(nn.Module):
    """An embedding with a method to project back on it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(IDS, WIDTH)

    def project(self, x: Tensor) -> Tensor:
        return x @ self.table.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


@case("a child's method is called instead of its forward", batch=ids, lr=0.002)
class MethodOfChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = Tokens(), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h)
        return self.tokens.project(h)


@case("F.linear with the embedding's weight as the head", batch=ids, lr=0.002)
class HeadIsEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(IDS, WIDTH), nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for block in self.blocks:
            h = block(h)
        return F.linear(h, self.table.weight)


@case("blocks are entered by block.forward(x), past the module's hooks")
class ForwardByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block.forward(x)
        return self.leave(x)


@case("the layers of a Sequential are called one by one, the Sequential never")
class SequentialTakenApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Block() for _ in range(3)))
        self.pair = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.pair[0][1](self.pair[0][0](x))


@case("a convolution's weight is used by F.conv1d, never by the convolution's forward")
class WeightOfSilentChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(x[:, None], self.conv.weight, self.conv.bias, padding=1)
        return self.out(h.transpose(1, 2))


@case("attention of torch, whose out_proj is never called")
class TorchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x[None])
        return self.attention(h, h, h)[0]


@case("one block is used twice, another is the same object under two names")
class SharedBlocks(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.blocks[1](x))


@case("head and embedding are tied", batch=ids, lr=0.002)
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.block, self.head = nn.Embedding(IDS, WIDTH), Block(), nn.Linear(WIDTH, IDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.table(x)))


def functional_loss(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    own = dict(model.named_parameters())
    return torch.func.functional_call(model, own, (x,)).pow(2).mean()


@case("torch.func.functional_call with the module's own parameters", loss=functional_loss)
def functional_call() -> nn.Module:
    return Net()


@case("functional_call of a block inside the root's forward, with weights that are computed")
class FunctionalBlock(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = torch.func.functional_call(block, {n: p * 0.9 for n, p in block.named_parameters()}, (x,))
        return self.leave(x)
