"""pk.lean_blocks: gated MLPs found by structure, equal results, less kept for backward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _architectures import ARCHITECTURES, build, inputs, outputs_and_gradients
from _tiny import difference, stir
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import perl_kernels as pk
from perl_kernels.blocks import (
    GatedMLP,
    LeanGatedMLP,
    LeanRMSNorm,
    RMSNorm,
    gated_mlp_of,
    rms_norm_of,
)

GATED = {  # the activation of the architectures whose blocks have the structure
    "Llama": "silu", "Mistral": "silu", "Qwen2": "silu", "Qwen3": "silu", "LLaVA": "silu",
    "Gemma 2": "gelu_tanh", "Gemma 3": "gelu_tanh",
}  # fmt: skip
# LLaVA: of its language model; T5's norm is that of Llama, too
NORMED = {*GATED, "Phi-3", "Mixtral", "Qwen3-MoE", "T5"}


@pytest.mark.parametrize("save", ["gate_up", "input"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_results(name, save):
    model = pk.apply_lora(build(name), pk.LoRAConfig(r=3, alpha=5), lean=False)
    stir(model)
    keys, plain = list(model.state_dict()), outputs_and_gradients(model, name)
    names = pk.lean_blocks(model, save=save)
    found = [n for n in names if isinstance(model.get_submodule(n), LeanGatedMLP)]
    assert (len(names) > len(found)) == (name in NORMED)
    assert (len(found) == 2) == (name in GATED), found
    activations = {model.get_submodule(path).lean_structure.activation for path in found}
    assert activations == ({GATED[name]} if name in GATED else set())
    routes = {row.module.rpartition(".")[0]: row.route for row in pk.explain(model)}
    assert all(routes[path] == "lora_mlp" for path in found)
    lean = outputs_and_gradients(model, name)
    assert list(model.state_dict()) == keys and lean.keys() == plain.keys()
    for key, value in lean.items():
        assert difference(value, plain[key]) < 1e-5, key
    twin = copy.deepcopy(model)
    assert torch.equal(outputs_and_gradients(twin, name)["logits"], lean["logits"])
    assert pk.lean_blocks(model) == names


def test_on_pefts_layers():
    plain = get_peft_model(build("Llama"), LoraConfig(r=3, target_modules="all-linear"))
    stir(plain)
    lean = pk.accelerate_peft(copy.deepcopy(plain))
    assert [block.route for block in pk.explain(lean).blocks].count("lora_mlp") == 2
    wanted, got = (outputs_and_gradients(model, "Llama") for model in (plain, lean))
    assert max(difference(got[key], wanted[key]) for key in wanted) < 1e-5
    with lean.disable_adapter():
        base = lean(**inputs("Llama")).logits
    assert difference(base.detach(), build("Llama")(**inputs("Llama")).logits.detach()) < 1e-5


def kept_bytes(model: nn.Module, **arguments: object) -> int:
    """Of what autograd keeps beside parameters, each memory counted once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**arguments)
    return sum(size for size, _ in kept.values())


def test_less_is_kept():
    model = pk.apply_lora(build("Llama"), pk.LoRAConfig(r=2), lean=False)
    plain, lean = kept_bytes(model, **inputs("Llama")), {}
    for save in ("gate_up", "input"):
        pk.lean_blocks(model, save=save)
        lean[save] = kept_bytes(model, **inputs("Llama"))
    tokens = inputs("Llama")["input_ids"].numel()
    features = model.model.layers[0].mlp.gate_proj.out_features
    per_block = 4 * tokens * features  # bytes of one (tokens, F)
    assert plain - lean["gate_up"] == pytest.approx(2 * 2 * per_block, rel=0.05)
    half = model.to(torch.bfloat16)
    norms = [module for module in half.modules() if isinstance(module, LeanRMSNorm)]
    lean_norms = kept_bytes(half, **inputs("Llama"))
    for norm in norms:
        norm.__class__ = norm.lean_of
    width = 4 * tokens * half.config.hidden_size  # a float32 copy; the first norm's x is frozen
    plain_norms = kept_bytes(half, **inputs("Llama"))
    assert plain_norms - lean_norms == pytest.approx(len(norms[1:]) * width / 2, rel=0.3)
    assert lean["gate_up"] - lean["input"] == 2 * 2 * per_block


def test_own_code_where_the_op_is_another():
    """Disabled, merged, per row: never lora_mlp; then it is, again."""
    model = pk.apply_lora(build("Llama"), pk.LoRAConfig(r=3))
    stir(model)
    base = build("Llama")(**inputs("Llama")).logits.detach()
    calls = []

    def counted(*given, **options):
        calls.append(1)
        return pk.lora_mlp(*given, **options)

    adapted = model(**inputs("Llama")).logits.detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perl_kernels.blocks.lora_mlp", counted)
        with pk.disable_adapters(model):
            assert difference(model(**inputs("Llama")).logits.detach(), base) < 1e-6
        with pk.adapters_per_row(model, [None, None]):
            assert difference(model(**inputs("Llama")).logits.detach(), base) < 1e-6
        pk.merge_lora(model)
        assert difference(model(**inputs("Llama")).logits.detach(), adapted) < 1e-5
        pk.unmerge_lora(model)
        assert not calls
        with torch.no_grad():
            assert difference(model(**inputs("Llama")).logits, adapted) < 1e-5
        assert len(calls) == 2
        calls.clear()
        seen = []
        for child in ("gate_proj", "act_fn"):
            child = model.model.layers[0].mlp.get_submodule(child)
            handle = child.register_forward_hook(lambda module, args, y: seen.append(y))
            model(**inputs("Llama"))
            handle.remove()
        assert len(seen) == 2 and len(calls) == 2  # of the other block
        model.model.layers[0].mlp.up_proj = checkpoint_wrapper(model.model.layers[0].mlp.up_proj)
        model(**inputs("Llama"))
        assert len(calls) == 3


def test_gradients_through_the_weight_of_a_norm():
    model = pk.apply_lora(build("Llama"), pk.LoRAConfig(r=3, modules_to_save=["model.norm"]))
    stir(model)
    assert isinstance(model.model.norm, LeanRMSNorm)
    wanted = pk.apply_lora(build("Llama"), pk.LoRAConfig(r=3, modules_to_save=["norm"]), lean=False)
    stir(wanted)
    got, plain = (outputs_and_gradients(m, "Llama") for m in (model, wanted))
    assert difference(got["model.norm.weight"], plain["model.norm.weight"]) < 1e-5


def test_lean_models_are_pickled_and_unload_is_plain():
    model = pk.apply_lora(build("Llama"), pk.LoRAConfig(r=3))
    stir(model)
    twin = pickle.loads(pickle.dumps(model))
    assert pk.explain(twin).blocks == pk.explain(model).blocks
    wanted, got = (outputs_and_gradients(m, "Llama") for m in (model, twin))
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    plain = build("Llama")
    both = list(zip(pk.unload_lora(model).modules(), plain.modules(), strict=True))
    assert all(type(m) is type(p) for m, p in both)
    assert torch.equal(model(**inputs("Llama")).logits, plain(**inputs("Llama")).logits)
    assert all(vars(m).keys() == vars(p).keys() for m, p in both)


class Block(nn.Module):
    """A gated MLP in other words; each option is something that the formula does not have."""

    def __init__(self, act=F.silu, limit=None, dropout=0.0, scale=1.0, called=False):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.act, self.limit, self.scale, self.p = act, limit, scale, dropout
        self.dropout = nn.Dropout(dropout if called else 0.0)

    def forward(self, x):
        h = self.act(self.w1(x)) * self.w3(x)
        if self.limit is not None:
            h = h.clamp(max=self.limit)
        return self.scale * self.w2(F.dropout(self.dropout(h), self.p, self.training))


def test_structure_is_proven():
    assert gated_mlp_of(Block()) == GatedMLP("w1", "w3", "w2", "silu")
    tanh = Block(act=nn.GELU(approximate="tanh"))
    assert gated_mlp_of(tanh) == GatedMLP("w1", "w3", "w2", "gelu_tanh")
    others = [
        Block(act=F.gelu), Block(act=F.relu), Block(limit=1000.0), Block(scale=2.0),
        Block(dropout=0.1), Block(dropout=0.1, called=True), nn.Sequential(nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)),
    ]  # fmt: skip
    assert [gated_mlp_of(module) for module in others] == [None] * len(others)
    replaced = Block()
    replaced.forward = lambda x: x
    assert gated_mlp_of(replaced) is None


class Norm(nn.Module):
    def __init__(self, power=2.0, centred=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))
        self.epsilon, self.power, self.centred = 1e-4, power, centred

    def forward(self, x):
        wide = x.float() - x.float().mean(-1, keepdim=True) * self.centred
        inverse = (wide.abs().pow(self.power).mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return (wide * inverse * self.weight.float()).to(x.dtype)


def test_norms_are_proven():
    assert rms_norm_of(Norm()) == RMSNorm(1e-4, 0.0, "gemma")
    assert rms_norm_of(nn.RMSNorm(12, eps=1e-3)) == RMSNorm(1e-3, 0.0, "gemma")
    assert rms_norm_of(build("Llama").model.norm) == RMSNorm(1e-6, 0.0, "llama")
    assert rms_norm_of(build("Gemma 2").model.norm) == RMSNorm(1e-6, 1.0, "gemma")
    for other in (Norm(power=1.9), Norm(centred=True), nn.LayerNorm(12), nn.RMSNorm(12)):
        assert rms_norm_of(other) is None  # the last one's eps is that of x's type


def test_refusals():
    with pytest.raises(ValueError, match="save is 'all'; wanted one of gate_up, input"):
        pk.lean_blocks(nn.Linear(2, 2), save="all")
    assert pk.lean_blocks(nn.Linear(2, 2)) == []
