"""A model's configuration made small: its class's own defaults, with whatever is a size small.

Each integer whose name belongs to a family of sizes (`SIZES`) becomes that family's small number; of the layers one of
each kind stays, where a list says what each layer is; configurations inside configurations are treated the same way.
`OVERRIDES` has what a class asks for besides.
"""

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY, TOKENS, LAYERS, WIDTH, HEADS, HEAD_WIDTH = 128, 12, 2, 32, 4, 8
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_size_per_layer_input|pronunciation_vocab_size|shape_vocab_size", VOCABULARY),
    (r"(num_)?(encoder_|decoder_|hidden_)?layers|n_layers?|num_blocks", LAYERS),
    (r"num_layers_per_stack|n_layers_per_attn_res_block|num_kv_shared_layers", 1),
    (r"num_(key_value_heads|kv_heads|query_groups)|swa_num_key_value_heads", 2),
    (r"(swa_)?(num_)?(encoder_|decoder_)?(attention_)?heads|n_heads?|index_n_heads|n_mamba_heads", HEADS),
    (r"linear_num_(key|value)_heads|linear_num_heads", 2),
    (r"(swa_|index_|qk_nope_|v_|linear_(key_|value_)?)?head_dim|d_kv|d_head", HEAD_WIDTH),
    (r"attention_head_dim|attention_head_size|kv_channels|dim_head|rotary_dim|qk_rope_head_dim", HEAD_WIDTH),
    (r"qk_head_dim", 2 * HEAD_WIDTH),
    (r"(backbone_)?hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_(size|dim)|word_embed_proj_dim", WIDTH),
    (r"attention_hidden_size|lru_width|(input|output)_embedding_size|ple_embed_dim|router_hidden_size", WIDTH),
    (r"pronunciation_embed_dim|shape_embed_dim|hidden_size_per_layer_input", 8),
    (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size|n_inner", 2 * WIDTH),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k|moe_top_k", 2),
    (r"n_group|n_groups|num_expert_group|topk_group|mamba_n_groups", 1),
    (r"(q|kv|o)_lora_rank|.*_rank|hc_lowrank|time_step_rank", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 64),
    (r"max_(source|target)_positions", 64),
    (r"sliding_window(_size)?|window_size|attention_window_size|local_attention|.*chunk_(size|length)|mamba_chunk_size", 8),
    (r"block_size|keep_window_size|local_attention_window_len|index_topk|index_block_size|rel_extent", 8),
    (r"mamba_d_state|state_size|ssm_state_size|d_rel", 8),
    (r"image_size", 16),
    (r"patch_size", 8),
)  # fmt: skip
PER_LAYER = re.compile(
    r"layer_types|mlp_layer_types|layers_block_type|.*_types|attention_layers|layer_rope_theta|.*_per_layer"
)
OVERRIDES: dict[str, dict[str, Any]] = {
    **{key: {"mamba_n_heads": 8, "mamba_d_head": 8} for key in ("bamba", "granitemoehybrid")},
    **{key: {"head_dim": HEAD_WIDTH} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx.attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{key: {"head_dim": 2 * HEAD_WIDTH} for key in ("dots3_note_text", "dots3_note.text_config")},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 2 * WIDTH, "activation_sparsity_pattern": None},
    "gemma4_assistant": {"default": {"text_config": {"hidden_size_per_layer_input": 0}}},
    "gemma4_unified_assistant.text_config": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    **{key: {"num_codebooks": 1} for key in ("musicgen.decoder", "musicgen_melody.decoder")},
    "nemotron": {"num_key_value_heads": 2},
    **{
        key: {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_WIDTH,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
        for key in ("qwen4_exp_text", "qwen4_exp.text_config")
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [3, TOKENS // 3],
        "axial_pos_embds_dim": [WIDTH // 2, WIDTH // 2],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
        "mamba_headdim": 2 * WIDTH // HEADS,
    },
}
"""By model type, or `type.name` for a configuration inside another."""


def small(config_class: Any, kind: str) -> Any:
    """The class's configuration with its defaults, but small."""
    given = dict(OVERRIDES.get(kind, {}))
    default = config_class(**given.pop("default", {}))
    return config_class(**{**sizes_of(default), **given})


def sizes_of(default: Any) -> dict[str, Any]:
    """What to give the class of `default` for a small one."""
    values = default.to_dict()
    layers = next(
        (values[name] for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if name in values), 0
    )
    kept = layers_kept(values, layers)
    made: dict[str, Any] = {}
    for name, value in values.items():
        inner = vars(default).get(name)
        if hasattr(inner, "to_dict"):
            made[name] = small(type(inner), f"{default.model_type}.{name}")
        elif isinstance(value, (list, tuple)) and len(value) == layers and PER_LAYER.fullmatch(name):
            made[name] = [value[index] for index in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            whole_heads = value == values.get("num_attention_heads") and name == "num_key_value_heads"
            made[name] = min(value, HEADS) if whole_heads else small_number(name, value, len(kept))
        elif name == "per_layer_config":
            made[name] = None
    return {name: value for name, value in made.items() if value != values[name]}


def layers_kept(values: Mapping[str, Any], layers: int) -> list[int]:
    """The first layer of each kind that the configuration's lists tell apart, at most four and at least two."""
    lists = [
        value
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == layers and PER_LAYER.fullmatch(name)
    ]
    kinds: dict[str, int] = {}
    for index in range(layers if lists else 0):
        kinds.setdefault(repr([value[index] for value in lists]), index)
    kept = list(kinds.values())[:4]
    rest = [index for index in range(max(layers, LAYERS)) if index not in kept]
    return sorted(kept + rest[: max(0, LAYERS - len(kept))])


def small_number(name: str, value: int, layers: int) -> int:
    if re.fullmatch(r".*_token_(id|index)|.*_idx", name):
        return value if value < VOCABULARY else value % 90 + 7
    for family, size in SIZES:
        if re.fullmatch(family, name):
            return layers if (size == LAYERS and "layers" in name) or name == "n_layer" else min(value, size)
    return value
