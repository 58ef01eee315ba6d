"""A decoder-only transformer, built as a `ModelSpec` says. It does not know that it is distributed.

Pre-norm residual blocks on `scaled_dot_product_attention`. Llama family: RMSNorm (arXiv 1910.07467), rotary positions
(2104.09864, half-split form), SwiGLU (2002.05202), grouped queries (2305.13245). GPT-2 family: LayerNorm, learned
positions, GELU (tanh form), biases.

Shapes: B batch, T tokens, S keys, D hidden, H query heads, G key/value heads, K head size, F ffn, V vocabulary

A parameter's first values are a function of seed and name alone, so that any rank can make any of them:
normal(0, init_std), the projections into the residual stream scaled by 1/sqrt(2 x layers) (GPT-2); biases 0, norms 1.
"""

import hashlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.model.loss import linear_loss
from thinwire.model.packed import Packed, attend_packed, dense_mask, pack
from thinwire.model.spec import ModelSpec, RopeScaling

_INTO_RESIDUAL = ("attention.out.weight", "ffn.down.weight")


def initial_weight(spec: ModelSpec, name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """The first value of parameter `name` of this shape, in fp32 on the CPU."""
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    std = spec.init_std / math.sqrt(2 * spec.layers) if name.endswith(_INTO_RESIDUAL) else spec.init_std
    drawn_from = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    return torch.empty(shape).normal_(0, std, generator=torch.Generator().manual_seed(drawn_from))


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, one pair of tensors (B, G, S, K) per block."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append to block `layer` and return everything it holds now."""
        if layer == len(self.keys):
            self.keys.append(k_BGTK)
            self.values.append(v_BGTK)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], k_BGTK], dim=2)
            self.values[layer] = torch.cat([self.values[layer], v_BGTK], dim=2)
        return self.keys[layer], self.values[layer]


@dataclass(frozen=True)
class Context:
    """What every block of one forward shares. `mask_BTS` None means plain causal attention."""

    cos_BTK: Tensor | None
    sin_BTK: Tensor | None
    mask_BTS: Tensor | None
    cache: KVCache | None
    packed: Packed | None = None
    """Documents that are attended to one by one, instead of a mask."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; queries, keys and values come from one matrix, in this order."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        self.qkv = nn.Linear(spec.hidden, queries + 2 * keys, bias=spec.qkv_bias or spec.bias)
        if spec.qk_norm:
            self.query_norm = RMSNorm(spec.head_size, spec.norm_eps)
            self.key_norm = RMSNorm(spec.head_size, spec.norm_eps)
        self.out = nn.Linear(queries, spec.hidden, bias=spec.out_bias or spec.bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        spec = self.spec
        B, T, _ = x_BTD.shape
        heads_BTNK = self.qkv(x_BTD).view(B, T, spec.heads + 2 * spec.kv_heads, spec.head_size)
        q_BTHK, k_BTGK, v_BTGK = heads_BTNK.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=2)
        if spec.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if context.cos_BTK is not None and context.sin_BTK is not None:
            q_BTHK = rotate(q_BTHK, context.cos_BTK, context.sin_BTK)
            k_BTGK = rotate(k_BTGK, context.cos_BTK, context.sin_BTK)
        if context.packed is not None:
            y_BTHK = attend_packed(q_BTHK, k_BTGK, v_BTGK, context.packed)
            return self.out(y_BTHK.flatten(2))  # type: ignore[no-any-return]
        q_BHTK, k_BGSK, v_BGSK = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if context.cache is not None:
            k_BGSK, v_BGSK = context.cache.extend(self.layer, k_BGSK, v_BGSK)
        mask = None if context.mask_BTS is None else context.mask_BTS[:, None]
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=mask is None, enable_gqa=spec.heads != spec.kv_heads
        )
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU (gate and up in one matrix, in this order) or GELU."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gated = spec.family == "llama"
        bias = spec.ffn_bias or spec.bias
        self.up = nn.Linear(spec.hidden, (2 if self.gated else 1) * spec.ffn, bias=bias)
        self.down = nn.Linear(spec.ffn, spec.hidden, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gated:
            gate_BTF, up_BTF = self.up(x_BTD).chunk(2, dim=-1)
            return self.down(F.silu(gate_BTF) * up_BTF)  # type: ignore[no-any-return]
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(spec)
        self.attention = Attention(spec, layer)
        self.ffn_norm = make_norm(spec)
        self.ffn = FeedForward(spec)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))  # type: ignore[no-any-return]


class Head(nn.Linear):
    """Hidden states (B, T, D) -> logits (B, T, V); with targets (B, T), -> the sum of token losses, and no logits.

    One module does both, so that whoever brings the weights to a module before its forward need not know of the loss.
    """

    def forward(self, x_BTD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        if targets_BT is None:
            return super().forward(x_BTD)
        return linear_loss(x_BTD, self.weight, targets_BT, self.bias)


class Transformer(nn.Module):
    """tokens (B, T) -> logits (B, T, V), or with targets (B, T) -> the sum of token losses.

    Initial weights depend on `seed` alone; on the meta device there are none.
    """

    def __init__(self, spec: ModelSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.hidden)
        if spec.family == "gpt2":
            self.positions = nn.Embedding(spec.max_tokens, spec.hidden)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.layers))
        self.norm = make_norm(spec)
        self.head = Head(spec.hidden, spec.vocab_size, bias=False)
        if spec.tied:
            self.head.weight = self.embedding.weight
        if not self.embedding.weight.is_meta:
            self._initialise(seed)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token at every position; with `targets_BT` the sum of their losses (`loss.linear_loss`).

        `positions_BT` defaults to 0..T-1 after what `cache` holds. With `documents_BT` attention stays inside a document:
        an id per token, on the host if a GPU is not to be waited for. Raises ValueError if positions run past
        `spec.max_tokens`.
        """
        T = tokens_BT.shape[1]
        past = 0 if cache is None else cache.tokens
        if past + T > self.spec.max_tokens:
            raise ValueError(f"{past + T} tokens do not fit the model's {self.spec.max_tokens} positions")
        if positions_BT is None:
            positions_BT = torch.arange(past, past + T, device=tokens_BT.device)[None]
        x_BTD = self.embedding(tokens_BT)
        cos_BTK = sin_BTK = None
        if self.spec.family == "gpt2":
            x_BTD = x_BTD + self.positions(positions_BT)
        else:
            cos_BTK, sin_BTK = rope_tables(self.spec, positions_BT, x_BTD.dtype)
        assert documents_BT is None or past == 0, "documents and a cache do not go together"
        packed = None if documents_BT is None else pack(documents_BT, like=x_BTD, head_size=self.spec.head_size)
        mask_BTS = attention_mask(documents_BT, past, T, tokens_BT.device) if packed is None else None
        context = Context(cos_BTK, sin_BTK, mask_BTS, cache, packed)
        for block in self.blocks:
            x_BTD = block(x_BTD, context)
        return self.head(self.norm(x_BTD), targets_BT)  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.embedding.weight.device

    def new_cache(self) -> KVCache:
        """An empty cache for generation."""
        return KVCache()

    def _initialise(self, seed: int) -> None:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_weight(self.spec, name, tuple(parameter.shape), seed=seed))


def make_norm(spec: ModelSpec) -> nn.Module:
    """The family's normalisation over the hidden dimension."""
    if spec.family == "llama":
        return RMSNorm(spec.hidden, spec.norm_eps)
    return nn.LayerNorm(spec.hidden, eps=spec.norm_eps)


def attention_mask(documents_BT: Tensor | None, past: int, T: int, device: torch.device) -> Tensor | None:
    """True where a query may look; None where plain causal attention is meant (no documents, nothing cached)."""
    if documents_BT is not None:
        return dense_mask(documents_BT.to(device))
    if past == 0 or T == 1:
        return None if past == 0 else torch.ones(1, T, past + T, dtype=torch.bool, device=device)
    return torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)[None]


def rope_tables(spec: ModelSpec, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, K) of the rotation angles, computed in at least fp32."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, spec.head_size, 2, device=positions_BT.device, dtype=exact) / spec.head_size
    frequencies = scale_frequencies(spec.rope_theta**-exponents, spec.rope_scaling)
    angles_BTK = (positions_BT[..., None].to(exact) * frequencies).repeat(1, 1, 2)
    return angles_BTK.cos().to(dtype), angles_BTK.sin().to(dtype)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Rotary frequencies stretched to longer contexts (linear: arXiv 2306.15595; llama3: Llama 3.1's release)."""
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    ratio = scaling.original_max_tokens / wavelengths
    blend = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotate(x_BTNK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + K/2]) of every head by their position's angles."""
    first, second = x_BTNK.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BTNK * cos_BTK[:, :, None] + turned * sin_BTK[:, :, None]
