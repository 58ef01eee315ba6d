"""Every causal-LM class of the installed transformers, tiny, on tokens by chance."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cases import Case
from zoo.small import TOKENS, VOCABULARY, small

INNER = {
    "musicgen": ("decoder", "MusicgenForCausalLM"),
    "musicgen_melody": ("decoder", "MusicgenMelodyForCausalLM"),
}
"""Classes that take a configuration inside that of their model type, which AutoModelForCausalLM does not give them."""


def causal_names() -> tuple[list[str], dict[str, str]]:
    """The cases by name, one for each pair of configuration and class; the other names of those, with the first one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    first: dict[tuple[str, str], str] = {}
    same = {}
    for kind, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        known = first.setdefault((CONFIG_MAPPING_NAMES[kind], class_name), kind)
        if known != kind:
            same[kind] = known
    return [f"hf/{kind}" for kind in first.values()], same


def causal_case(kind: str) -> Case:
    return Case(f"hf/{kind}", builder(kind), tokens, next_token_loss)


def builder(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = small(transformers.CONFIG_MAPPING[kind], kind)
        make = transformers.AutoModelForCausalLM.from_config
        if kind in INNER:
            inner, class_name = INNER[kind]
            config, make = getattr(config, inner), getattr(transformers, class_name)
        config.use_cache = False
        if hasattr(config, "hash_seed"):
            config.hash_seed = 0  # what else, with dropout, would be drawn anew in every process, whatever seed is set
            for name in (
                "hidden_dropout_prob",
                "lsh_attention_probs_dropout_prob",
                "local_attention_probs_dropout_prob",
            ):
                setattr(config, name, 0.0)
        model: nn.Module = make(config)
        return model.train()

    return build


def tokens(number: int, rank: int) -> Tensor:
    """(2, TOKENS) ids above those that mean something to a model."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randint(100, VOCABULARY, (2, TOKENS), generator=generator)


def next_token_loss(model: nn.Module, ids: Tensor, number: int, rank: int) -> Tensor:
    """Mean cross-entropy of the next token, in fp32."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))
