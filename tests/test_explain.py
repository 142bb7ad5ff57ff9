"""pk.explain: the route that it names is the one that is taken."""

from __future__ import annotations

import pytest
import torch
from _tiny import logits_of, tiny_model
from peft import LoraConfig, get_peft_model

import perl_kernels as pk
from perl_kernels import layers
from perl_kernels import peft as pk_peft


@pytest.fixture
def fused(monkeypatch):
    """The number of fused calls in one forward pass of a model."""
    counted = []

    def counting(*args, **kwargs):
        counted.append(1)
        return pk.lora_linear(*args, **kwargs)

    monkeypatch.setattr(layers, "lora_linear", counting)
    monkeypatch.setattr(pk_peft, "lora_linear", counting)

    def count(model) -> int:
        counted.clear()
        logits_of(model)
        return len(counted)

    return count


def check(model, fused, route: str, why: str) -> None:
    """The q_proj of layer 0 goes that way, for that reason, and as many fused calls are made."""
    rows = pk.explain(model)
    assert fused(model) == sum(row.route == "lora_linear" for row in rows)
    row = next(row for row in rows if row.module.endswith("layers.0.self_attn.q_proj"))
    assert row.route == route
    assert why in row.why


def test_lean_blocks_are_listed():
    model = pk.apply_lora(tiny_model(num_hidden_layers=1), pk.LoRAConfig(r=3))
    model.model.norm.weight.requires_grad_(True)
    explanation = pk.explain(model)
    norm = ("LlamaRMSNorm", "rms_norm", "keeps its input as it came")
    assert explanation.blocks == (
        ("model.layers.0.mlp", "LlamaMLP", "lora_mlp", "silu, keeps input, gate and up"),
        ("model.layers.0.input_layernorm", *norm),
        ("model.layers.0.post_attention_layernorm", *norm),
        ("model.norm", "LlamaRMSNorm", "own code", "its weight is trained"),
    )
    assert repr(explanation).splitlines()[-5].split() == ["block", "base", "route", "why"]
    pk.lean_blocks(model, save="input")
    pk.apply_lora(model, pk.LoRAConfig(r=2), "other")
    assert pk.explain(model).blocks[0].why == "silu, keeps input"
    with pk.disable_adapters(model):
        assert pk.explain(model).blocks[0].route == "own code"
    assert not pk.explain(pk.apply_lora(tiny_model(), pk.LoRAConfig(r=3), lean=False)).blocks


def two_adapters():
    model = pk.apply_lora(tiny_model(), pk.LoRAConfig(r=3, target_modules=["q_proj"]))
    return pk.apply_lora(model, pk.LoRAConfig(r=2, target_modules=["k_proj"]), "other")


def test_rows_and_table():
    explanation = pk.explain(two_adapters())
    assert len(explanation) == 4
    row = explanation[0]
    assert row.module == "model.layers.0.self_attn.q_proj"
    assert (row.base, row.shape, row.adapters) == ("Linear", (32, 32), {"default": 3})
    assert row.active == ("default",)
    lines = repr(explanation).splitlines()
    assert lines[0].split() == ["module", "base", "shape", "adapters", "route", "why"]
    assert lines[5] == "" and lines[6].split() == ["block", "base", "route", "why"]
    assert "32 x 32  default r=3*  lora_linear" in lines[1]
    assert "other r=2     base         it has no adapter 'default'" in lines[2]
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA layers"):
        pk.explain(tiny_model())


def test_states_of_our_layers(fused):
    model = two_adapters()
    check(model, fused, "lora_linear", "")
    with pk.use_backend("reference"):
        check(model, fused, "lora_linear", "plain torch")
    pk.set_adapter(model, "other")
    check(model, fused, "base", "no adapter 'other'")
    pk.set_adapter(model, "default")
    with pk.disable_adapters(model):
        check(model, fused, "base", "disabled")
    pk.merge_lora(model)
    check(model, fused, "base", "adapter 'default' is merged")
    pk.unmerge_lora(model)
    model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(lambda *_: None)
    check(model, fused, "plain LoRA", "hooks")


def peft_model(**config):
    config = LoraConfig(r=3, **{"target_modules": ["q_proj", "v_proj"], **config})
    return get_peft_model(tiny_model("qwen2"), config).eval()


def test_states_of_pefts_layers(fused):
    model = peft_model()
    check(model, fused, "PEFT", "accelerate_peft")
    pk.accelerate_peft(model)
    check(model, fused, "lora_linear", "")
    with model.disable_adapter():
        check(model, fused, "PEFT", "disabled")
    model.merge_adapter()
    check(model, fused, "PEFT", "merged")
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    check(model, fused, "lora_linear", "")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_dropout["other"] = torch.nn.Dropout(0.1).train()
    check(model, fused, "PEFT", "2 active adapters, each with a dropout mask of its own")
    model.set_adapter("default")
    layer.base_layer.weight.requires_grad_(True)
    check(model, fused, "PEFT", "weight is trained")
    layer.base_layer.weight.requires_grad_(False)
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    check(model, fused, "PEFT", "adapter has hooks")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "DoraLinearVariant is not plain LoRA"),
        ({"lora_bias": True}, "lora_B has a bias"),
        ({"init_lora_weights": "pissa"}, ""),  # plain LoRA over a changed base
        ({"init_lora_weights": "olora"}, ""),
    ],
)
def test_variants(config, why, fused):
    check(pk.accelerate_peft(peft_model(**config)), fused, "PEFT" if why else "lora_linear", why)


def test_16_bit_adapter_over_a_float32_base():
    model = pk.accelerate_peft(peft_model())
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.lora_A["default"].to(torch.bfloat16)
        layer.self_attn.q_proj.lora_B["default"].to(torch.bfloat16)
    why = pk.explain(model)[0].why
    assert why == "its adapter is torch.bfloat16 and x is torch.float32"
    assert pk.explain(model)[1].route == "lora_linear"
