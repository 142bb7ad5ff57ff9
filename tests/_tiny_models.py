"""Tiny random transformers models, built from configurations in milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 61
_COMMON = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DECODER = _COMMON | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.1,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    # Biases in q, k and v; tied embeddings.
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER, tie_word_embeddings=True)),
    # Conv1D, whose weight is (D, O); tied embeddings.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_COMMON, n_embd=24, n_layer=2, n_head=4, initializer_range=0.1)
    ),
    # Softcapped attention and logits; tied embeddings.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_DECODER, final_logit_softcapping=3.0, attn_logit_softcapping=2.0)
    ),
    "llama_reward": lambda: LlamaForSequenceClassification(LlamaConfig(**_DECODER, num_labels=1)),
}


def tiny(family: str, seed: int = 1) -> PreTrainedModel:
    """The same weights for the same seed; in eval mode, biases not zero."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def tokens(rows: int = 2, length: int = 7) -> Tensor:  # (B, T)
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def stir(model: nn.Module, seed: int = 2) -> None:
    """Give every LoRA weight, ours or PEFT's, a random value, so that no adapter is a no-op."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)


def logits_of(model: nn.Module) -> Tensor:  # (B, T, V)
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def difference(value: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    assert value.shape == wanted.shape
    return ((value - wanted).abs().max() / wanted.abs().max()).item()
