"""Small random models of several families, with a tokenizer, made in milliseconds."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from perl.cafe import build_tokenizer

TEXTS = ["one latte please", "a large tea and two scones", "Anything else? That is 7 euros."]
VOCABULARY = 320  # more rows than the tokenizer's 300 tokens, as real models have
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {
    "llama": lambda **changes: transformers.LlamaConfig(**SHAPE | changes),
    "qwen2": lambda **changes: transformers.Qwen2Config(**SHAPE | changes),
    "gemma2": lambda **changes: transformers.Gemma2Config(
        **SHAPE | dict(head_dim=8, final_logit_softcapping=2.0, sliding_window=8) | changes
    ),
    "gpt2": lambda **changes: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    ),  # fmt: skip
}


def tiny_tokenizer():
    return build_tokenizer(TEXTS, vocab_size=300)


def tiny_model(family: str = "llama", seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**changes))
    with torch.no_grad():  # N(0, 0.02) makes all answers alike: wider weights tell tokens apart,
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
        if not model.config.tie_word_embeddings:  # and a wide frozen head lets a policy be sure
            model.get_output_embeddings().weight.mul_(4.0)
    return model.eval()


def save_tiny(folder, family: str = "llama", seed: int = 0, **changes):
    """A transformers folder with model and tokenizer."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def perturb(parameters, seed: int = 1, scale: float = 0.1) -> None:
    """Random values in place: stands for training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
