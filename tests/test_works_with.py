"""Models with our layers under what training scripts do to models: each is equal to without it."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _architectures import build
from _tiny import VOCABULARY, difference, stir, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch import nn

import perl_kernels as pk

EXPERTS = ["gate_up_proj", "down_proj", "gate.weight"]


def applied(dropout: float = 0.0, **changes) -> nn.Module:
    return pk.apply_lora(tiny_model(**changes), pk.LoRAConfig(r=3, dropout=dropout))


def accelerated(dropout: float = 0.0, **changes) -> nn.Module:
    config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=dropout)
    return pk.accelerate_peft(get_peft_model(tiny_model(**changes), config))


def unfused(dropout: float = 0.0, **changes) -> nn.Module:
    """Layers that call their base, an embedding; without dropout expert weights."""
    if dropout:
        model, experts, targets = build("Falcon", **changes), (), ["dense", "word_embeddings"]
    else:
        model, experts, targets = build("Mixtral", **changes), EXPERTS, ["q_proj", "embed_tokens"]
    return pk.apply_lora(
        model,
        pk.LoRAConfig(r=3, dropout=dropout, target_modules=targets, target_parameters=experts),
    )


@pytest.fixture(params=[applied, accelerated, unfused], ids=lambda make: make.__name__)
def make(request):
    def build(*args, **kwargs) -> nn.Module:
        model = request.param(*args, **kwargs)
        stir(model)
        return model.eval()

    build.of = request.param
    return build


def run(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients of one step with the seed 0."""
    torch.manual_seed(0)
    model.zero_grad()
    result = model(input_ids=tokens(), labels=tokens())
    result.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": result.logits.detach(), "loss": result.loss.detach(), **gradients}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], to: float) -> None:
    """Equal to that relative difference; 0: the same bits."""
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert wanted[key].abs().max() > 0, key
        assert difference(value.float(), wanted[key].float()) <= to, key


# ------------------------------------------------------------------------------------------------
# torch.compile
# ------------------------------------------------------------------------------------------------


def assert_compiles(model: nn.Module, part: nn.Module) -> None:
    wanted = run(model)
    torch._dynamo.reset()
    part.compile(fullgraph=True, backend="aot_eager")
    assert_same(run(model), wanted, 1e-5)


def test_compiled_block():
    """`torch.compile(block, fullgraph=True)`"""
    model = applied(0.3, num_hidden_layers=1).train()
    stir(model)
    assert_compiles(model, model.model.layers[0])


def test_compiled_model(make):
    """`torch.compile(model, fullgraph=True)`"""
    dropout = 0.0 if make.of is unfused else 0.3  # so that expert weights are compiled
    model = make(dropout, num_hidden_layers=1).train()
    assert_compiles(model, model)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_changes_no_bit(make, use_reentrant):
    """activation checkpointing with dropout, reentrant and not: the same bits"""
    wanted = run(make(dropout=0.4).train())
    model = make(dropout=0.4).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(run(model), wanted, 0.0)


def test_autocast(make):
    """`torch.autocast`"""
    wanted = run(make())
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model)
    assert got["logits"].dtype == torch.bfloat16
    assert_same(got, wanted, 0.1)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_gradients_accumulate(make):
    """gradient accumulation"""
    model = make()
    wanted = run(model)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert difference(parameter.grad, 3 * wanted[name]) < 1e-5, name


def test_gradient_of_the_inputs(make):
    """`inputs_embeds` that require a gradient; merging gives the same one"""
    model = make()
    embeddings = model.get_input_embeddings()(tokens()).detach()

    def gradient() -> torch.Tensor:
        x = embeddings.clone().requires_grad_(True)
        model(inputs_embeds=x, labels=tokens()).loss.backward()
        return x.grad

    got = gradient()
    model.merge_adapter() if hasattr(model, "merge_adapter") else pk.merge_lora(model)
    assert {row.route for row in pk.explain(model)} <= {"base", "PEFT"}
    assert difference(got, gradient()) < 1e-5


def test_hooks_see_what_a_linear_module_would_show_them(make):
    """forward and backward hooks on adapted modules"""
    model = make()
    wanted = run(model)
    layer = model.get_submodule(pk.explain(model)[0].module)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, y: seen.append(y))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0]))
    assert_same(run(model), wanted, 0.0)
    assert [seen[0], len(seen), seen[1].shape] == ["before", 3, seen[2].shape]


# ------------------------------------------------------------------------------------------------
# State
# ------------------------------------------------------------------------------------------------


def test_deepcopy_trains_apart(make):
    """`copy.deepcopy`"""
    model = make()
    wanted = run(model)
    other = copy.deepcopy(model)
    assert_same(run(other), wanted, 0.0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(run(model), wanted, 0.0)


def test_state_dict_through_a_file(make):
    """`torch.save` of a state_dict, `torch.load(weights_only=True)`"""
    model = make()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = make()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(0.5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(run(fresh), run(model), 0.0)


def test_to_another_type_and_back(make):
    """`.to(dtype)`, `.to(device)`"""
    model = make()
    wanted = run(model)
    narrow = run(model.to(torch.bfloat16))
    assert narrow["logits"].dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
    assert_same(narrow, wanted, 0.3)
    assert_same(run(make().double().to("cpu", torch.float32)), wanted, 0.0)


def test_built_on_the_meta_device():
    """construction on the meta device, `to_empty`, `load_state_dict`"""
    with torch.device("meta"):
        model = pk.apply_lora(tiny_model(), pk.LoRAConfig(r=3))
    assert all(p.is_meta for p in model.parameters())
    with_values = applied()
    stir(with_values)
    model.to_empty(device="cpu")
    model.load_state_dict(with_values.state_dict())
    buffers = dict(with_values.named_buffers())  # not in the state: transformers fills them
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    assert_same(run(model), run(with_values), 0.0)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generates_with_every_cache(make, cache):
    """`generate()` with the dynamic cache, the static one, none"""
    model = make()
    options = dict(cache_implementation=cache) if cache else dict(use_cache=False)
    generated = model.generate(
        input_ids=tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=5,
        do_sample=False, eos_token_id=VOCABULARY + 1, **options,
    )  # fmt: skip
    wanted = tokens()
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=wanted, use_cache=False).logits
            wanted = torch.cat([wanted, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, wanted)


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------


def test_two_processes_are_one():
    """DDP and FSDP2 (`fully_shard`), activation checkpointing or not: as one process"""
    script = Path(__file__).with_name("two_processes.py")
    subprocess.run([sys.executable, script], check=True, timeout=300)
