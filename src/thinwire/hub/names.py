"""Which Hugging Face tensors make up each parameter of `model/transformer.py`. No torch.

Here queries, keys and values are one matrix, as are gate and up; there each stands alone. GPT-2's linear layers are
stored there as (in, out), here as (out, in).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from thinwire.model.spec import ModelSpec

_LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.down": "mlp.down_proj",
}
_GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}
_OUTSIDE = {
    "llama": {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    "gpt2": {
        "embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head",
    },
}  # fmt: skip
_BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
EMBEDDING, HEAD = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}, "lm_head.weight"
BASE_PREFIX = {"llama": "model.", "gpt2": "transformer."}
"""What stands before the names of everything but the head; files of the bare model leave it out."""


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor: `rows` of a parameter's first dimension, transposed if `transposed`."""

    name: str
    rows: int
    transposed: bool = False


@dataclass(frozen=True)
class Recipe:
    """A parameter and the parts that it is, one below the other."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of a part as it is stored there."""
        shape = (part.rows, *self.shape[1:])
        return shape[::-1] if part.transposed else shape


def recipes(spec: ModelSpec) -> Iterator[Recipe]:
    """Every parameter in the model's order; a tied head is not one."""
    for name, shape in spec.parameter_shapes().items():
        yield Recipe(name, shape, tuple(_parts(spec, name, shape)))


def _parts(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> Iterator[Part]:
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        yield Part(f"{_OUTSIDE[spec.family][module]}.{kind}", shape[0])
        return
    _, layer, inside = module.split(".", 2)
    block = f"{_BLOCKS[spec.family]}.{layer}"
    if spec.family == "gpt2":
        yield Part(f"{block}.{_GPT2_BLOCK[inside]}.{kind}", shape[0], transposed=len(shape) == 2)
    elif inside == "attention.qkv":
        for letter, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
            yield Part(f"{block}.self_attn.{letter}_proj.{kind}", heads * spec.head_size)
    elif inside == "ffn.up":
        yield Part(f"{block}.mlp.gate_proj.{kind}", spec.ffn)
        yield Part(f"{block}.mlp.up_proj.{kind}", spec.ffn)
    else:
        yield Part(f"{block}.{_LLAMA_BLOCK[inside]}.{kind}", shape[0])
