"""A small, randomly initialised Llama as `transformers` saves it, with a tokenizer made of the standard library's text.

pip install 'thinwire[hf]'
python examples/tiny_llama.py tiny-llama
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `size` ids, trained on the source of `json`; `END` is id 0."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=letters, show_progress=False)
    files = sorted(str(path) for path in Path(json.__file__).parent.glob("*.py"))
    library.train(files, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=library, bos_token=END, eos_token=END)


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the Hugging Face folder to make")
    folder: Path = parser.parse_args().folder
    tokenizer = make_tokenizer(1024)
    model = make_model(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
