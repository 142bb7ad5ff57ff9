"""Small random transformers models of several families, with a tokenizer, made in milliseconds."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from perl.cafe import build_tokenizer

TEXTS = ["one latte please", "a large tea and two scones", "Anything else? That is 7 euros."]
VOCABULARY = 320  # more rows than the tokenizer's 300 tokens, as real models have
HIDDEN = 32
_COMMON = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPE = _COMMON | dict(
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
_GPT2 = _COMMON | dict(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)
_GEMMA2 = SHAPE | dict(
    sliding_window=8, final_logit_softcapping=2.0, attn_logit_softcapping=2.0
)  # fmt: skip
FAMILIES = {
    "llama": lambda **changes: transformers.LlamaConfig(**SHAPE | changes),
    # biases in q, k and v
    "qwen2": lambda **changes: transformers.Qwen2Config(**SHAPE | changes),
    # Conv1D, whose weight is (D, O); tied embeddings
    "gpt2": lambda **changes: transformers.GPT2Config(**_GPT2 | changes),
    # softcapped attention and logits; tied embeddings
    "gemma2": lambda **changes: transformers.Gemma2Config(**_GEMMA2 | changes),
}


def tiny_tokenizer():
    return build_tokenizer(TEXTS, vocab_size=300)


def tiny_model(family: str = "llama", seed: int = 0, *, scalar: bool = False, **changes):
    """The same weights for the same seed, biases not zero; `scalar`: a reward model, one label."""
    torch.manual_seed(seed)
    config = FAMILIES[family](**changes)
    if scalar:
        config.num_labels = 1
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # N(0, 0.02) makes all answers alike: wider weights tell tokens apart,
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
        if not (scalar or config.tie_word_embeddings):  # and a wide head lets a policy be sure
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


def stir(model: nn.Module, seed: int = 2) -> None:
    """Give every LoRA weight, ours or PEFT's, a random value, so that no adapter is a no-op."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)


def tokens(rows: int = 2, length: int = 7) -> Tensor:  # (B, T)
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def logits_of(model: nn.Module) -> Tensor:  # (B, T, V)
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def difference(value: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    assert value.shape == wanted.shape
    return ((value - wanted).abs().max() / wanted.abs().max()).item()
