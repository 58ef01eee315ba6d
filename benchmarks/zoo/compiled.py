"""Modules compiled in every way that torch has."""

import torch
from torch import nn

from zoo.cases import Net, case


@case("block.compile() for every block")
def compiled_blocks() -> nn.Module:
    model = Net()
    for block in model.blocks:
        block.compile()
    return model


@case("model.compile()")
def compiled_in_place() -> nn.Module:
    model = Net()
    model.compile()
    return model


@case("torch.compile(model)")
def compiled_model() -> nn.Module:
    return torch.compile(Net())


@case("blocks replaced by torch.compile(block)")
def compiled_entries() -> nn.Module:
    model = Net()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block)
    return model
