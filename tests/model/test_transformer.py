"""The model against plain formulas, and what must hold of any causal model."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from thinwire.model.generate import generate, pick, stream_text
from thinwire.model.presets import preset
from thinwire.model.spec import ModelSpec, RopeScaling
from thinwire.model.transformer import KVCache, Transformer, scale_frequencies

LLAMA = ModelSpec(vocab_size=50, hidden=32, layers=2, heads=4, kv_heads=2, head_size=8, ffn=48, max_tokens=40)
QWEN = LLAMA.model_copy(update={"qkv_bias": True, "qk_norm": True, "tied": True})
GPT2 = LLAMA.model_copy(update={"family": "gpt2", "kv_heads": 4, "bias": True, "tied": True})
SPECS = pytest.mark.parametrize("spec", [LLAMA, QWEN, GPT2], ids=["llama", "qwen", "gpt2"])


def build(spec: ModelSpec) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(spec).double()
    for name, parameter in model.named_parameters():  # norms and biases that are not 1 and 0
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model.eval()


def reference(model: Transformer, tokens_T: Tensor) -> Tensor:
    """The same model written out with loops over heads and positions."""
    spec, w = model.spec, dict(model.named_parameters())
    if spec.tied:
        w["head.weight"] = w["embedding.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        if spec.family == "gpt2":
            centred = x - x.mean(-1, keepdim=True)
            return (
                centred / (centred.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * w[name + ".weight"]
                + w[name + ".bias"]
            )
        return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * w[name + ".weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.zeros(()))

    def rope(x_TK: Tensor) -> Tensor:
        out, half = x_TK.clone(), spec.head_size // 2
        for t in range(x_TK.shape[0]):
            for i in range(half):
                angle = t * spec.rope_theta ** (-2 * i / spec.head_size)
                a, b = x_TK[t, i], x_TK[t, i + half]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    T, K = tokens_T.shape[0], spec.head_size
    x = w["embedding.weight"][tokens_T]
    if spec.family == "gpt2":
        x = x + w["positions.weight"][:T]
    for layer in range(spec.layers):
        block = f"blocks.{layer}."
        heads = linear(norm(x, block + "attention_norm"), block + "attention.qkv").view(T, -1, K)
        outs = []
        for h in range(spec.heads):
            g = spec.heads + h // (spec.heads // spec.kv_heads)
            q, k, v = heads[:, h], heads[:, g], heads[:, g + spec.kv_heads]
            if spec.qk_norm:
                q, k = norm(q, block + "attention.query_norm"), norm(k, block + "attention.key_norm")
            if spec.family == "llama":
                q, k = rope(q), rope(k)
            scores = (q @ k.T / math.sqrt(K)).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            outs.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(outs, -1), block + "attention.out")
        inner = linear(norm(x, block + "ffn_norm"), block + "ffn.up")
        if spec.family == "llama":
            inner = F.silu(inner[:, : spec.ffn]) * inner[:, spec.ffn :]
        else:
            inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(inner, block + "ffn.down")
    return norm(x, "norm") @ w["head.weight"].T


@SPECS
def test_logits_are_those_of_the_plain_formulas(spec: ModelSpec) -> None:
    model, tokens = build(spec), torch.randint(0, 50, (2, 12))
    logits = model(tokens)
    for row in range(2):
        assert torch.allclose(logits[row], reference(model, tokens[row]), atol=1e-10)


@SPECS
def test_the_future_does_not_matter(spec: ModelSpec) -> None:
    model, tokens = build(spec), torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 50
    assert torch.allclose(model(tokens)[0, :8], model(changed)[0, :8], atol=1e-12)
    assert not torch.allclose(model(tokens)[0, 8], model(changed)[0, 8])


@SPECS
def test_documents_packed_together_give_what_they_give_alone(spec: ModelSpec) -> None:
    model = build(spec)
    first, second = torch.randint(0, 50, (1, 7)), torch.randint(0, 50, (1, 5))
    packed = model(
        torch.cat([first, second], 1),
        positions_BT=torch.tensor([[*range(7), *range(5)]]),
        documents_BT=torch.tensor([[4] * 7 + [9] * 5]),
    )
    assert torch.allclose(packed[:, :7], model(first), atol=1e-12)
    assert torch.allclose(packed[:, 7:], model(second), atol=1e-12)


@SPECS
def test_cached_logits_are_the_uncached_ones(spec: ModelSpec) -> None:
    model, tokens = build(spec), torch.randint(0, 50, (1, 12))
    cache = KVCache()
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-12)


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens do not fit the model's 40"):
        build(LLAMA)(torch.zeros(1, 41, dtype=torch.long))


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> list[Tensor]:
        return [p.detach().clone() for p in Transformer(preset("llama-1m"), seed=seed).parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not torch.equal(weights(1)[0], weights(2)[0])


def test_stretched_rotary_positions() -> None:
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    linear = scale_frequencies(frequencies, RopeScaling(kind="linear", factor=4))
    assert torch.allclose(linear, frequencies / 4)
    llama3 = scale_frequencies(frequencies, RopeScaling(kind="llama3", factor=8, original_max_tokens=64))
    assert torch.allclose(llama3[0], frequencies[0])  # wavelength 6: far below 64 / 4, kept
    assert torch.allclose(llama3[-1], frequencies[-1] / 8)  # wavelength 6283: above 64, stretched


@SPECS
def test_with_targets_the_model_gives_the_loss_of_its_logits(spec: ModelSpec) -> None:
    model, tokens, targets = build(spec), torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9))
    targets[0, 3] = targets[1, :4] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    made, parameters = model(tokens, targets), list(model.parameters())
    assert torch.allclose(made, expected)
    of_both = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (made, expected))
    for one, other in zip(*of_both, strict=True):
        assert one is not None
        assert torch.allclose(one, other, atol=1e-12)


def test_generation_is_greedy_at_zero_and_repeats_with_its_seed() -> None:
    model = build(LLAMA)
    prompt = [1, 2, 3]
    greedy = list(generate(model, prompt, max_new_tokens=6, max_tokens=40, temperature=0))
    sequence = list(prompt)
    for token in greedy:
        assert token == int(model(torch.tensor([sequence]))[0, -1].argmax())
        sequence.append(token)
    drawn = [list(generate(model, prompt, max_new_tokens=8, max_tokens=40, top_p=0.9, seed=7)) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_top_p_draws_from_the_fewest_likeliest_only() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    drawn = {pick(logits, temperature=1.0, top_p=0.75, generator=generator) for _ in range(200)}
    assert drawn == {0, 1}


def test_streamed_text_waits_for_whole_characters() -> None:
    raw = list("aé€".encode())
    parts = list(stream_text(iter(raw), lambda ids: bytes(ids).decode(errors="replace")))
    assert "".join(parts) == "aé€"
    assert all("\ufffd" not in part for part in parts)
