"""Fused kernels for LoRA fine-tuning and RLHF: LoRA layers and gated MLP blocks,
log-probabilities, KL, policy loss.

    import perl_kernels as pk
    model = pk.apply_lora(model, pk.LoRAConfig(r=16))       # or pk.accelerate_peft(peft_model)
    loss = pk.policy_loss(hidden, model.lm_head.weight, target, advantage).loss

CPU kernels are C++ (csrc/cpu), GPU kernels are Triton; plain torch runs where neither exists.
`pk.show_config()` prints which.
"""

from ._library import show_config, use_backend
from ._tuned import use_tuned
from .adapters import (
    LoRAConfig,
    adapter_names,
    adapter_parameters,
    adapters_per_row,
    apply_lora,
    average_adapters,
    checkpoint_contexts,
    disable_adapters,
    merge_lora,
    set_adapter,
    unload_lora,
    unmerge_lora,
)
from .blocks import lean_blocks
from .cpu_pool import empty_cpu_pool, use_cpu_pool
from .explain import explain
from .head import LinearKL, PolicyLoss, linear_kl, linear_log_prob, linear_logits, policy_loss
from .layers import LoRALayer, LoRALinear
from .log_prob import kl, log_prob, selective_log_softmax
from .lora_linear import lora_linear
from .lora_mlp import LoRAProjection, lora_mlp
from .multi_lora_linear import multi_lora_linear
from .peft import accelerate_peft, load_adapter, save_adapter
from .rms_norm import rms_norm
from .tune import tune_lora_linear

__all__ = [
    "LinearKL",
    "LoRAConfig",
    "LoRALayer",
    "LoRALinear",
    "LoRAProjection",
    "PolicyLoss",
    "accelerate_peft",
    "adapter_names",
    "adapter_parameters",
    "adapters_per_row",
    "apply_lora",
    "average_adapters",
    "checkpoint_contexts",
    "disable_adapters",
    "empty_cpu_pool",
    "explain",
    "kl",
    "lean_blocks",
    "linear_kl",
    "linear_log_prob",
    "linear_logits",
    "load_adapter",
    "log_prob",
    "lora_linear",
    "lora_mlp",
    "merge_lora",
    "multi_lora_linear",
    "policy_loss",
    "rms_norm",
    "save_adapter",
    "selective_log_softmax",
    "set_adapter",
    "show_config",
    "tune_lora_linear",
    "unload_lora",
    "unmerge_lora",
    "use_backend",
    "use_cpu_pool",
    "use_tuned",
]
