"""Layers that write their weights, keep buffers, hooks, or functions of their own; adapters and recompute."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from zoo.cases import IDS, WIDTH, Block, Net, case, ids


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))
        return F.linear(x, self.weight)


@case("blocks whose forward normalises their own weight in place")
def writes_own_weight() -> nn.Module:
    return Net(block=Normalised)


@case("an embedding with max_norm, whose forward shortens rows", batch=lambda number, rank: ids(number, 0))
def max_norm() -> nn.Module:
    return nn.Sequential(nn.Embedding(IDS, WIDTH, max_norm=1.0), Block())


@case("batch norm: buffers that every rank keeps for itself")
def batch_norm() -> nn.Module:
    return Net(block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()))


@case("spectral norm")
def spectral_norm() -> nn.Module:
    return Net(block=lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))


@case("weight norm and orthogonal parametrizations")
def weight_norm() -> nn.Module:
    wrap = lambda: nn.Sequential(  # noqa: E731
        parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))
    )
    return Net(block=wrap)


@case("an LSTM and a GRU, whose weights torch keeps flat")
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), nn.GRU(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x[None])[0])[0]


@case("hooks on blocks: before and after forward, on backward, and on a parameter's gradient")
def hooks() -> nn.Module:
    model = Net()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
        block.register_forward_hook(lambda module, args, out: out + module.a.bias.mean())
        block.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
        block.a.weight.register_hook(lambda grad: grad * 0.5)
    return model


@case("low-rank adapters of peft on frozen linear layers")
def peft_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    class Plain(Net):
        config = {"model_type": "custom"}  # noqa: RUF012

    return get_peft_model(Plain(), LoraConfig(target_modules=["a", "b"], r=2))


@case("a checkpoint around each block, without and with re-entering autograd")
class Recomputed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=index == 1)
        return self.leave(x)


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": IDS,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False, **options)).train()


def own_loss(model: nn.Module, x: Tensor, number: int, rank: int) -> Tensor:
    return model(input_ids=x[None], labels=x[None]).loss


@case("gradient_checkpointing_enable() of transformers", batch=ids, loss=own_loss)
def hf_checkpointing() -> nn.Module:
    model: Any = llama()
    model.gradient_checkpointing_enable()
    return model


@case("the same with re-entering autograd", batch=ids, loss=own_loss)
def hf_checkpointing_reentrant() -> nn.Module:
    model: Any = llama(tie_word_embeddings=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    return model


class InPieces(torch.autograd.Function):
    """layer.b(layer.a(x)) that keeps x alone; backward recomputes each part and goes back through it before the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), grad = ctx.saved_tensors, grads[0]
        with torch.no_grad():
            inner = ctx.layer.a(x)
        for part, entered in ((ctx.layer.b, inner), (ctx.layer.a, x)):
            before = entered.detach().requires_grad_()
            with torch.enable_grad():
                part(before).backward(grad)
            assert before.grad is not None
            grad = before.grad
        return grad, None


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@case("blocks that are recomputed piece by piece, as reversible layers are: a backward for each piece")
class RecomputedInPieces(Net):
    def __init__(self) -> None:
        super().__init__(block=Pieces)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = InPieces.apply(x, block)
        return self.leave(x)


class Square(torch.autograd.Function):
    """x @ w with a backward of its own, which reads the saved weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] @ w.t(), x.t() @ grads[0]


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x, self.weight)


@case("blocks with an autograd.Function of their own, which saves the weight")
def own_function() -> nn.Module:
    return Net(block=OwnFunction)


@case("weights saved by views: a backward reads the transpose and slices of fused weights")
class FusedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, weight) for weight in self.qkv.weight.chunk(3))
        return self.o(torch.softmax(q @ k.t(), -1) @ v)


@case("autocast to bf16 around the forward", loss=lambda model, x, number, rank: autocast_loss(model, x))
def autocast() -> nn.Module:
    return Net()


def autocast_loss(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x).float().pow(2).mean()


@case("a unit called under functools.partial and vmap")
class Vmapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = torch.vmap(functools.partial(block))(x)
        return self.leave(x)
