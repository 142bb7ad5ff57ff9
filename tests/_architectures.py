"""A tiny random transformers model of each kind that the library is verified on; its inputs."""

from __future__ import annotations

import torch
import transformers
from _tiny import HIDDEN, SHAPE, VOCABULARY, tokens
from torch import Tensor, nn

_COMMON = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_PLAIN = _COMMON | dict(
    hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
_WINDOW = SHAPE | dict(sliding_window=4)
_VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=4, projection_dim=16,
)  # fmt: skip
IMAGE_TOKEN = VOCABULARY - 1

# name: (what AutoModelFor... makes of it, its configuration)
ARCHITECTURES = {
    "Llama": ("CausalLM", lambda: transformers.LlamaConfig(**SHAPE)),
    "Mistral": ("CausalLM", lambda: transformers.MistralConfig(**_WINDOW)),
    "Qwen2": ("CausalLM", lambda: transformers.Qwen2Config(**SHAPE)),
    "Qwen3": ("CausalLM", lambda: transformers.Qwen3Config(**SHAPE)),
    "Gemma 2": ("CausalLM", lambda: transformers.Gemma2Config(**_WINDOW)),
    "Gemma 3": ("CausalLM", lambda: transformers.Gemma3TextConfig(**_WINDOW)),
    # q, k and v in one module, gate and up in another
    "Phi-3": ("CausalLM", lambda: transformers.Phi3Config(**_PLAIN, num_key_value_heads=2)),
    # Conv1D, whose weight is (D, O)
    "GPT-2": (
        "CausalLM",
        lambda: transformers.GPT2Config(**_COMMON, n_embd=HIDDEN, n_layer=2, n_head=4),
    ),
    "GPT-NeoX": ("CausalLM", lambda: transformers.GPTNeoXConfig(**_PLAIN)),
    # projections around the decoder; ReLU
    "OPT": (
        "CausalLM",
        lambda: transformers.OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=24),
    ),
    # a subclass of nn.Linear with a forward of its own
    "Falcon": ("CausalLM", lambda: transformers.FalconConfig(**_PLAIN, bias=True)),
    # experts in 3-D parameters, routers in 2-D ones
    "Mixtral": ("CausalLM", lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4)),
    "Qwen3-MoE": (
        "CausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        ),
    ),
    "T5": (
        "Seq2SeqLM",
        lambda: transformers.T5Config(
            **_COMMON,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),  # fmt: skip
    ),
    "BERT": ("SequenceClassification", lambda: transformers.BertConfig(**_PLAIN)),
    "LLaVA": (
        "ImageTextToText",
        lambda: transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_VISION),
            text_config=transformers.LlamaConfig(**SHAPE),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
        ),
    ),
}


def build(name: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """The same weights for the same seed: all of them random, biases and norms too; no dropout."""
    kind, config = ARCHITECTURES[name]
    config = config()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:  # N(0, 0.02) makes all answers alike
                parameter.normal_(std=0.15)
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward, labels included."""
    ids = tokens()
    if name == "BERT":
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}
    if name == "LLaVA":
        ids[:, :4] = IMAGE_TOKEN  # an image of 8 x 8 is 4 patches
        return {"input_ids": ids, "labels": ids, "pixel_values": torch.ones(len(ids), 3, 8, 8)}
    return {"input_ids": ids, "labels": ids}


def outputs_and_gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every trained parameter, by the keys of a PEFT file."""
    model.zero_grad()
    result = model(**inputs(name))
    result.loss.backward()
    found = {"logits": result.logits.detach(), "loss": result.loss.detach()}
    for key, parameter in model.named_parameters():
        used = parameter.grad is not None or ".lora_" in key  # a trained bias may not be
        if parameter.requires_grad and used and ".original_module." not in key:
            key = key.removeprefix("base_model.model.").replace(".default", "")
            key = key.replace(".modules_to_save.", ".").replace("lora_embedding_", "lora_")
            found[key.removesuffix(".weight") if ".lora_" in key else key] = parameter.grad
    return found
