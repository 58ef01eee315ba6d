"""Tensors of a Hugging Face folder by name: what makes up each parameter of our model, and what they say of it. No torch.

Here queries, keys and values are one matrix, as are gate and up; there each stands alone. GPT-2's linear layers are
stored there as (in, out), here as (out, in).

Where a folder's config says otherwise, its tensors count. Sizes, the number of layers, biases and a head of its own are
seen in names and shapes. Into how many heads a projection is divided is not, unless the heads have norms: of heads and head
size the config has to say one.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
class TensorPart:
    """One Hugging Face tensor: `rows` of a parameter's first dimension, transposed if `transposed`."""

    name: str
    rows: int
    transposed: bool = False


@dataclass(frozen=True)
class Recipe:
    """A parameter and the parts that it is, one below the other."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]

    def part_shape(self, part: TensorPart) -> tuple[int, ...]:
        """Shape of a part as it is stored there."""
        shape = (part.rows, *self.shape[1:])
        return shape[::-1] if part.transposed else shape


def recipes(spec: ModelSpec) -> Iterator[Recipe]:
    """Every parameter in the model's order; a tied head is not one."""
    for name, shape in spec.parameter_shapes().items():
        yield Recipe(name, shape, tuple(_parts(spec, name, shape)))


def _parts(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> Iterator[TensorPart]:
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        yield TensorPart(f"{_OUTSIDE[spec.family][module]}.{kind}", shape[0])
        return
    _, layer, inside = module.split(".", 2)
    block = f"{_BLOCKS[spec.family]}.{layer}"
    if spec.family == "gpt2":
        yield TensorPart(f"{block}.{_GPT2_BLOCK[inside]}.{kind}", shape[0], transposed=len(shape) == 2)
    elif inside == "attention.qkv":
        for letter, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
            yield TensorPart(f"{block}.self_attn.{letter}_proj.{kind}", heads * spec.head_size)
    elif inside == "ffn.up":
        yield TensorPart(f"{block}.mlp.gate_proj.{kind}", spec.ffn)
        yield TensorPart(f"{block}.mlp.up_proj.{kind}", spec.ffn)
    else:
        yield TensorPart(f"{block}.{_LLAMA_BLOCK[inside]}.{kind}", shape[0])


Shape = dict[str, Any]
"""Fields of a `ModelSpec`, before they are checked against each other."""


@dataclass(frozen=True)
class Held:
    """The tensors of a folder: name -> shape, and whether two of them hold the same numbers."""

    shapes: Mapping[str, tuple[int, ...]]
    same: Callable[[str, str], bool]


def full_names(names: Collection[str], family: str) -> dict[str, str]:
    """Names as the model with a head has them -> as they are stored: files of the bare model leave the prefix out."""
    prefix = BASE_PREFIX[family]
    missing = "" if any(name.startswith(prefix) for name in names) else prefix
    return {name if name == HEAD else missing + name: name for name in names}


def corrected(shape: Shape, held: Held, stated: Callable[[str], bool]) -> Shape:
    """`shape` with what the tensors say in its place; `stated` tells of a field whether the config gives it.

    Raises ValueError, naming keys, where the tensors leave open which of them is wrong.
    """
    names = full_names(held.shapes, shape["family"])
    shapes = {full: held.shapes[name] for full, name in names.items()}
    read = _read_llama if shape["family"] == "llama" else _read_gpt2
    found = {**shape, **dict(read(shape, shapes, stated)), "tied": _tied(shape, held, names)}
    _refuse_odd_heads(found, shapes)
    return found


def _refuse_odd_heads(shape: Shape, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where the heads do not make up the projections."""
    size = shape["head_size"]
    if shape["family"] == "gpt2" and size * shape["heads"] != shape["hidden"]:
        raise ValueError(f"n_head = {shape['heads']} does not divide the {shape['hidden']} numbers of a token")
    for part, key, heads in (("q", "num_attention_heads", "heads"), ("k", "num_key_value_heads", "kv_heads")):
        rows = shapes.get(f"model.layers.0.self_attn.{part}_proj.weight", (size * shape[heads],))[0]
        if rows != size * shape[heads]:
            raise ValueError(
                f"{key} = {shape[heads]} heads of head_dim = {size} are {size * shape[heads]} rows, and the weights hold "
                f"{rows} of them: one of the two keys is wrong"
            )


def _tied(shape: Shape, held: Held, names: Mapping[str, str]) -> bool:
    """A head that differs from the embedding is one of its own, whatever the config says (as transformers loads it)."""
    embedding = names.get(EMBEDDING[shape["family"]])
    if HEAD not in names or embedding is None or not shape["tied"]:
        return bool(shape["tied"])
    return held.shapes[HEAD] == held.shapes[embedding] and held.same(HEAD, embedding)


def _read_llama(
    shape: Shape, shapes: Mapping[str, tuple[int, ...]], stated: Callable[[str], bool]
) -> Iterator[tuple[str, Any]]:
    layer = "model.layers.0."
    yield from _outside(shapes, shape, "model.layers")
    yield from _rows(shapes, "ffn", f"{layer}mlp.gate_proj.weight")
    yield from _attention(shape, shapes, stated, f"{layer}self_attn.")
    if f"{layer}self_attn.q_proj.weight" in shapes:
        yield "qkv_bias", f"{layer}self_attn.q_proj.bias" in shapes
        yield "out_bias", f"{layer}self_attn.o_proj.bias" in shapes
        yield "ffn_bias", f"{layer}mlp.up_proj.bias" in shapes


def _attention(
    shape: Shape, shapes: Mapping[str, tuple[int, ...]], stated: Callable[[str], bool], block: str
) -> Iterator[tuple[str, Any]]:
    queries, keys, norm = (shapes.get(f"{block}{part}.weight", (0,))[0] for part in ("q_proj", "k_proj", "q_norm"))
    heads, size = shape["heads"], shape["head_size"]
    if norm:
        size = norm
    elif not stated("head_size") and queries and queries % heads == 0:
        size = queries // heads
    if queries % size == 0 and queries and (norm or not stated("heads")):
        heads = queries // size
    yield from (("heads", heads), ("head_size", size))
    if keys and keys % size == 0:
        yield "kv_heads", keys // size


def _read_gpt2(
    shape: Shape, shapes: Mapping[str, tuple[int, ...]], stated: Callable[[str], bool]
) -> Iterator[tuple[str, Any]]:
    outside = dict(_outside(shapes, shape, "transformer.h"))
    yield from outside.items()
    yield from _rows(shapes, "max_tokens", "transformer.wpe.weight")
    inner = shapes.get("transformer.h.0.mlp.c_fc.weight", ())
    if len(inner) == 2:
        yield "ffn", inner[1]
    if "hidden" in outside:
        yield "head_size", outside["hidden"] // shape["heads"]


def _outside(shapes: Mapping[str, tuple[int, ...]], shape: Shape, blocks: str) -> Iterator[tuple[str, Any]]:
    """What the embedding and the names of the layers say."""
    name = EMBEDDING[shape["family"]]
    embedding = shapes.get(name) or (shapes.get(HEAD, ()) if shape["tied"] else ())
    if len(embedding) == 2:
        yield from (("vocab_size", embedding[0]), ("hidden", embedding[1]))
    numbered = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    layers = {match[1] for one in shapes if (match := numbered.match(one))}
    if layers:
        yield "layers", len(layers)


def _rows(shapes: Mapping[str, tuple[int, ...]], field: str, name: str) -> Iterator[tuple[str, Any]]:
    if shapes.get(name):
        yield field, shapes[name][0]
