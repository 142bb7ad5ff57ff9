"""What the benchmarks of LoRA layers and of blocks of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

SCALE = 2.0  # alpha 32 at rank 16


def peft_layer(weight: Tensor, a: Tensor, b: Tensor, scale: float, dropout_p: float) -> nn.Module:
    """The layer that PEFT makes of weight (O, D), with copies of a (R, D) and b (O, R)."""
    from peft import LoraConfig, inject_adapter_in_model

    outs, features = weight.shape
    linear = nn.Linear(features, outs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    config = LoraConfig(
        r=a.shape[0], lora_alpha=scale * a.shape[0], lora_dropout=dropout_p, target_modules=["0"]
    )
    layer = inject_adapter_in_model(config, nn.Sequential(linear))[0]
    layer.lora_A["default"].weight = nn.Parameter(a.detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(b.detach().clone())
    return layer.train()


def saved_bytes(forward: Callable[[], object], parameters: Sequence[Tensor]) -> int:
    """What autograd keeps of a call for backward, besides parameters."""
    known = {t.untyped_storage().data_ptr() for t in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # holds what was kept, so that no address comes twice
    del output
    return sum(kept.values())
