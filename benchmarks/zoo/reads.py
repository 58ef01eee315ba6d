"""Programs that use parameters and inner activations beside the forward: penalties, averages, copies, inner losses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cases import WIDTH, Block, Net, bare, case, vectors, whole


def with_l2(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    return model(x).pow(2).mean() + 1e-2 * sum(p.pow(2).sum() for p in model.parameters())


@case("an L2 term over all parameters in the loss", loss=with_l2)
def l2_term() -> nn.Module:
    return Net()


def total(model: nn.Module, step: int) -> float:
    return float(sum(whole(p.detach()).sum() for p in model.parameters()))


@case("model.parameters() are read after the step, as for a moving average", after=total)
def parameters_after_step() -> nn.Module:
    return Net()


def child_state(model: nn.Module, step: int) -> float:
    return float(sum(whole(value).sum() for value in bare(model).blocks[1].state_dict().values()))


@case("the state_dict() of a child after the step", after=child_state)
def child_state_dict() -> nn.Module:
    return Net()


def copied(model: nn.Module, step: int) -> float:
    import copy

    twin = copy.deepcopy(bare(model))
    return float(sum(whole(p.detach()).sum() for p in twin.parameters()))


@case("deepcopy after the step", after=copied)
def deepcopy_after_step() -> nn.Module:
    return Net()


@case("clip_grad_norm_(model.parameters())", clip=0.01)
def clip_grad_norm() -> nn.Module:
    return Net()


def evaluated(model: nn.Module, step: int) -> float:
    with torch.inference_mode():
        return float(bare(model)(vectors(999, 0)).sum())


@case("a forward under inference_mode after the step", after=evaluated)
def inference_between() -> nn.Module:
    return Net()


def penalty(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.pow(2).mean() + slope.pow(2).mean()


@case("double backward: a penalty on the gradient of the input", loss=penalty)
def gradient_penalty() -> nn.Module:
    return Net(block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))


def inner_loss(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    out = model(x)
    return out.pow(2).mean() + sum(block.inner.pow(2).mean() for block in bare(model).blocks)


class Leaves(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.inner = self.a(x)
        return x + self.b(F.gelu(self.inner))


@case("losses on activations that blocks leave in an attribute", loss=inner_loss)
def inner_losses() -> nn.Module:
    return Net(block=Leaves)


def last_inner_loss(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    model(x)
    return bare(model).blocks[1].inner.pow(2).mean()


@case("the loss is on an inner activation alone; what comes after it has no gradient", loss=last_inner_loss)
def inner_loss_alone() -> nn.Module:
    return Net(block=Leaves)


@case("the gradient of a loss with respect to an inner activation, by torch.autograd.grad, scales the loss")
class AdaptiveWeight(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if not out.requires_grad:
            return out
        last = self.leave.weight
        (slope,) = torch.autograd.grad(out.pow(2).mean(), last, retain_graph=True)
        return out * slope.norm().detach().clamp(0.1, 2.0)


class Fails(Exception):
    """Stands for running out of memory."""


def failing(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    out = model(x)
    if number == 2:
        raise Fails
    return out.pow(2).mean()


@case("a micro-batch that fails after its forward is left out", loss=failing, accumulate=2, skips=(Fails,))
def failed_forward() -> nn.Module:
    return Net()


class Broken(torch.autograd.Function):
    """The identity, whose backward fails in the micro-batch numbered 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.number = number
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.number == 2:
            raise Fails
        return grads[0], None


def broken(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    return model(x, number, rank).pow(2).mean()


@case("a micro-batch that fails in the middle of its backward is left out", loss=broken, accumulate=2, skips=(Fails,))
class FailedBackward(Net):
    def forward(self, x: Tensor, number: int, rank: int) -> Tensor:
        x = self.blocks[0](self.enter(x))
        return self.leave(self.blocks[2](self.blocks[1](Broken.apply(x, number))))
