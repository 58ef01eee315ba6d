"""Public `config.json` files of language models, every key as on the Hugging Face hub at the time of writing but the sizes.

Written down by hand, not downloaded; `hub_zoo.py` makes the sizes small. What is left out is what the hub's files have in
common and no code reads (`architectures`, `torch_dtype`, `transformers_version`).
"""

from typing import Any

Config = dict[str, Any]


def _llama(**keys: Any) -> Config:
    shared = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
              "initializer_range": 0.02, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None,
              "tie_word_embeddings": False, "use_cache": True}  # fmt: skip
    return {"model_type": "llama", **shared, **keys}


def _llama31(factor: float, **keys: Any) -> Config:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
    return _llama(bos_token_id=128000, eos_token_id=[128001, 128008, 128009], max_position_embeddings=131072, mlp_bias=False,
                  rope_scaling=scaling, rope_theta=500000.0, num_key_value_heads=2, **keys)  # fmt: skip


def _mistral(**keys: Any) -> Config:
    shared = {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
              "initializer_range": 0.02, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False, "use_cache": True}  # fmt: skip
    return {"model_type": "mistral", **shared, **keys}


def _qwen(model_type: str, **keys: Any) -> Config:
    shared = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
              "initializer_range": 0.02, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "use_cache": True,
              "use_sliding_window": False}  # fmt: skip
    return {"model_type": model_type, **shared, **keys}


def _gpt2(**keys: Any) -> Config:
    shared = {"activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1,
              "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "n_ctx": 1024,
              "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
              "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
              "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}  # fmt: skip
    return {"model_type": "gpt2", **shared, **keys}


SHAPES: dict[str, Config] = {
    "huggyllama/llama-7b": _llama(max_position_embeddings=2048, max_sequence_length=2048, pad_token_id=0, rms_norm_eps=1e-6),
    "meta-llama/Llama-2-7b-hf": _llama(max_position_embeddings=4096, num_key_value_heads=4),
    "meta-llama/Llama-2-70b-hf": _llama(max_position_embeddings=4096, num_key_value_heads=2),
    "lmsys/vicuna-7b-v1.5-16k": _llama(max_position_embeddings=4096, pad_token_id=0, max_sequence_length=16384,
                                       rope_scaling={"factor": 4.0, "type": "linear"}),
    "codellama/CodeLlama-7b-hf": _llama(max_position_embeddings=16384, rope_theta=1000000),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(max_position_embeddings=2048, num_key_value_heads=2, rope_theta=10000.0),
    "meta-llama/Meta-Llama-3-8B": _llama(bos_token_id=128000, eos_token_id=128001, max_position_embeddings=8192,
                                         num_key_value_heads=2, rope_theta=500000.0),
    "meta-llama/Llama-3.1-8B-Instruct": _llama31(8.0),
    "meta-llama/Llama-3.2-1B": {**_llama31(32.0, head_dim=64), "tie_word_embeddings": True},
    "meta-llama/Llama-3.3-70B-Instruct": _llama31(8.0, head_dim=128),
    "unsloth/Llama-3.2-1B-Instruct": {**_llama31(32.0, head_dim=64, pad_token_id=128004, unsloth_fixed=True),
                                      "tie_word_embeddings": True},
    "gradientai/Llama-3-8B-Instruct-262k": _llama(max_position_embeddings=262144, num_key_value_heads=2,
                                                  rope_theta=207112184.0),
    "HuggingFaceTB/SmolLM-135M": _llama(max_position_embeddings=2048, num_key_value_heads=2, rope_theta=10000.0,
                                        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(
        is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, pad_token_id=2, rope_interleaved=False,
        rope_theta=130000, tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}),
    "01-ai/Yi-6B": _llama(max_position_embeddings=4096, num_key_value_heads=2, pad_token_id=0, rope_theta=5000000.0),
    "01-ai/Yi-34B-200K": _llama(max_position_embeddings=200000, num_key_value_heads=2, pad_token_id=0,
                                rope_theta=10000000.0),
    "deepseek-ai/deepseek-llm-7b-base": _llama(bos_token_id=100000, eos_token_id=100001, max_position_embeddings=4096,
                                               num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000.0),
    "deepseek-ai/deepseek-coder-6.7b-base": _llama(max_position_embeddings=16384, rms_norm_eps=1e-6, rope_theta=100000,
                                                   rope_scaling={"factor": 4.0, "type": "linear"}),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama31(8.0, head_dim=128),
    "tiiuae/Falcon3-1B-Base": _llama(activation="swiglu", head_dim=256, max_position_embeddings=8192, num_key_value_heads=2,
                                     mlp_bias=False, rms_norm_eps=1e-6, rope_theta=1000042),
    "upstage/SOLAR-10.7B-v1.0": _llama(max_position_embeddings=4096, num_key_value_heads=2, pad_token_id=2),
    "openlm-research/open_llama_3b_v2": _llama(max_position_embeddings=2048, rms_norm_eps=1e-6),
    "togethercomputer/LLaMA-2-7B-32K": _llama(
        max_position_embeddings=32768, pad_token_id=0, rope_scaling={"factor": 8.0, "type": "linear"},
        auto_map={"AutoModelForCausalLM": "togethercomputer/LLaMA-2-7B-32K--modeling_flash_llama.LlamaForCausalLM"}),
    "NousResearch/Yarn-Llama-2-7b-64k": _llama(
        max_position_embeddings=4096, rope_scaling={"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn",
                                                    "finetuned": True}),
    "TheBloke/Llama-2-7B-GPTQ": _llama(max_position_embeddings=4096, quantization_config={
        "bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": False}),
    "NousResearch/Hermes-2-Pro-Llama-3-8B": _llama(bos_token_id=128000, eos_token_id=128003, max_position_embeddings=8192,
                                           num_key_value_heads=2, rope_theta=500000.0, neftune_noise_alpha=5),
    "mistralai/Mistral-7B-v0.1": _mistral(max_position_embeddings=32768, rope_theta=10000.0, sliding_window=4096),
    "mistralai/Mistral-7B-v0.2": _mistral(max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=None),
    "mistralai/Mistral-7B-v0.3": _mistral(max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=None),
    "mistralai/Mistral-Nemo-Base-2407": _mistral(head_dim=128, max_position_embeddings=131072, rope_theta=1000000.0,
                                                 sliding_window=None),
    "mistralai/Mistral-Small-24B-Base-2501": _mistral(head_dim=128, max_position_embeddings=32768, rope_theta=100000000.0,
                                                      sliding_window=None),
    "HuggingFaceH4/zephyr-7b-beta": _mistral(max_position_embeddings=32768, pad_token_id=2, rope_theta=10000.0,
                                             sliding_window=4096),
    "a Mistral fine-tune without the window's key": _mistral(max_position_embeddings=32768, rope_theta=10000.0),
    "Qwen/Qwen1.5-0.5B": _qwen("qwen2", max_position_embeddings=32768, max_window_layers=21, rope_theta=1000000.0,
                               sliding_window=32768, tie_word_embeddings=True),
    "Qwen/Qwen2-7B": _qwen("qwen2", max_position_embeddings=131072, max_window_layers=28, rope_theta=1000000.0,
                           sliding_window=131072, tie_word_embeddings=False),
    "Qwen/Qwen2.5-0.5B": _qwen("qwen2", max_position_embeddings=32768, max_window_layers=24, rope_theta=1000000.0,
                               sliding_window=32768, tie_word_embeddings=True, use_mrope=False),
    "Qwen/Qwen2.5-7B-Instruct": _qwen("qwen2", max_position_embeddings=32768, max_window_layers=28, rope_theta=1000000.0,
                                      sliding_window=131072, tie_word_embeddings=False),
    "Qwen/QwQ-32B": _qwen("qwen2", max_position_embeddings=40960, max_window_layers=64, rms_norm_eps=1e-5,
                          rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen("qwen2", max_position_embeddings=131072, max_window_layers=21,
                                                       rope_theta=10000, sliding_window=4096, tie_word_embeddings=False,
                                                       use_mrope=False),
    "Qwen/Qwen2.5-7B-Instruct with its card's YaRN": _qwen(
        "qwen2", max_position_embeddings=32768, max_window_layers=28, rope_theta=1000000.0, sliding_window=131072,
        tie_word_embeddings=False, rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}),
    "Qwen/Qwen3-0.6B": _qwen("qwen3", attention_bias=False, head_dim=128, max_position_embeddings=40960,
                             max_window_layers=28, rope_scaling=None, rope_theta=1000000, sliding_window=None,
                             tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _qwen("qwen3", attention_bias=False, head_dim=128, max_position_embeddings=40960,
                           max_window_layers=36, rope_scaling=None, rope_theta=1000000, sliding_window=None,
                           tie_word_embeddings=False),
    "openai-community/gpt2": _gpt2(),
    "distilbert/distilgpt2": _gpt2(_num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}),
    "stanford-crfm/alias-gpt2-small-x21": _gpt2(n_inner=None, reorder_and_upcast_attn=True,
                                                scale_attn_by_inverse_layer_idx=True, scale_attn_weights=True),
    "cerebras/Cerebras-GPT-111M": _gpt2(activation_function="gelu", n_positions=2048, scale_attn_weights=True),
    "google/gemma-2b": {"model_type": "gemma", "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None,
                        "max_position_embeddings": 8192, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
                        "rope_theta": 10000.0},
    "google/gemma-2-2b": {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                          "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
                          "num_key_value_heads": 2, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "microsoft/Phi-3-mini-4k-instruct": {"model_type": "phi3", "max_position_embeddings": 4096, "pad_token_id": 1,
                                         "original_max_position_embeddings": 4096, "sliding_window": 2047,
                                         "rope_theta": 10000.0},
    "EleutherAI/pythia-70m": {"model_type": "gpt_neox", "hidden_act": "gelu", "max_position_embeddings": 2048,
                              "rotary_pct": 0.25, "use_parallel_residual": True},
    "bigcode/starcoder2-3b": {"model_type": "starcoder2", "max_position_embeddings": 16384, "sliding_window": 4096,
                              "use_bias": True, "num_key_value_heads": 2},
    "ibm-granite/granite-3.0-2b-base": {"model_type": "granite", "attention_multiplier": 0.015625,
                                        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                                        "max_position_embeddings": 4096, "num_key_value_heads": 2, "pad_token_id": 0},
}  # fmt: skip
"""Name on the hub -> its config without sizes."""
