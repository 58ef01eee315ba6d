"""A Hugging Face `transformers` Llama, built from a config, cut by thinwire in your own loop: four ranks here.

pip install thinwire[hf]
torchrun --nproc-per-node 4 examples/huggingface_llama.py
"""

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from thinwire import Cluster, Partition, Plan, ShardedOptimizer, World, shard
from thinwire.cluster.cluster import Level

STEPS = 30


def make_model() -> LlamaForCausalLM:
    """A Llama of some 100 thousand parameters; use `from_pretrained` for a real one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    cluster = Cluster(levels=(Level(name="node", fanout=2), Level(name="cluster", fanout=2)))
    world = World.from_environment(cluster, os.environ)
    plan = Plan(
        levels=(("node", 2), ("cluster", 2)),
        partition=Partition(params="node", grads="node", optimizer="cluster"),
    )
    model = make_model()
    sharded = shard(model, plan, world)  # units: every decoder layer, the embedding, the norm, the head
    optimizer = ShardedOptimizer(sharded, lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    text = torch.tensor(list(Path(__file__).read_bytes()))
    draw = torch.Generator().manual_seed(1 + world.rank)
    for step in range(STEPS):
        starts = torch.randint(0, len(text) - 64, (8,), generator=draw)
        tokens = torch.stack([text[start : start + 64] for start in starts])
        with sharded.micro_batch(last=True):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        sharded.finish_reduce()
        norm = sharded.grad_norm() / world.size
        optimizer.step(grad_scale=min(1.0, 1.0 / norm) / world.size)
        if world.rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, gradient norm {norm:.3f}")
    sharded.drain()
    world.leave()


if __name__ == "__main__":
    main()
