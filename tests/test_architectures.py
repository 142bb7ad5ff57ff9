"""Every architecture that the library is verified on: equal to PEFT, files both ways."""

from __future__ import annotations

import copy

import peft
import pytest
from _architectures import ARCHITECTURES, build, outputs_and_gradients
from _tiny import difference, stir
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import perl_kernels as pk

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out|.*tie_word_embeddings|.*save_emb")

# Linear modules whose class has a forward of its own: they run, unfused.
OWN_FORWARD = {"Falcon"}


def assert_equal(ours: nn.Module, peers: nn.Module, name: str) -> None:
    """Outputs and gradients to 1e-5; every gradient is there and not zero."""
    wanted, got = outputs_and_gradients(peers, name), outputs_and_gradients(ours, name)
    assert got.keys() == wanted.keys()
    noise = 1e-6 * max(value.abs().max() for value in wanted.values())
    for key, value in got.items():
        assert wanted[key].abs().max() > 0, key
        if wanted[key].abs().max() > noise:
            assert difference(value, wanted[key]) < 1e-5, key
        else:  # moves all scores of a softmax alike
            assert value.abs().max() < noise and ".k" in key and key.endswith("bias"), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_apply_lora_is_pefts_model(name, tmp_path):
    ours = pk.apply_lora(build(name), pk.LoRAConfig(r=3, alpha=5))
    stir(ours)
    pk.save_adapter(ours, tmp_path, task_type=None)
    peers = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).eval()
    assert_equal(ours, peers, name)
    wanted = {"plain LoRA"} if name in OWN_FORWARD else {"lora_linear"}
    assert {row.route for row in pk.explain(ours)} - {"lora_mlp"} == wanted


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accelerate_peft_is_pefts_model(name):
    peers = get_peft_model(build(name), LoraConfig(r=3, target_modules="all-linear")).eval()
    stir(peers)
    ours = pk.accelerate_peft(copy.deepcopy(peers))
    assert_equal(ours, peers, name)
    for row in pk.explain(ours):
        fused = row.base in ("Linear", "Conv1D")
        assert row.route in ({"lora_linear", "lora_mlp"} if fused else {"PEFT"}), row
    assert len(pk.explain(ours)) == sum(
        isinstance(module, peft.tuners.lora.LoraLayer) for module in peers.modules()
    )


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the linear modules' names, of those in numbered layers."""
    adapted = pk.apply_lora(model, pk.LoRAConfig())
    names = [row.module for row in pk.explain(adapted) if ".0." in row.module]
    return sorted({name.rpartition(".")[2] for name in names})


def with_patterns(model: nn.Module, name: str) -> dict[str, object]:
    """Ranks, alphas and layers of their own, rsLoRA, trained biases of the adapted modules."""
    first, *_, last = linear_names(model)
    return dict(
        target_modules=[first, last],
        rank_pattern={first: 5},
        alpha_pattern={rf"0\..*{last}": 7},
        use_rslora=True,
        layers_to_transform=[0],
        bias="lora_only",
    )


def with_everything_else(model: nn.Module, name: str) -> dict[str, object]:
    """A regular expression, an embedding, a norm and all biases trained, expert parameters."""
    embedding = name_of(model, model.get_input_embeddings())
    if name == "T5":  # the shared table is looked up in the stacks
        embedding = "encoder.embed_tokens"
    norm = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()][-1]
    first, *_ = linear_names(model)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    return dict(
        target_modules=rf".*\.1\..*{first}|{embedding}",
        modules_to_save=[norm],
        bias="all",
        target_parameters=experts if name in ("Mixtral", "Qwen3-MoE") else None,
    )


@pytest.mark.parametrize("options", [with_patterns, with_everything_else])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_go_both_ways(name, options, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, **options(build(name), name))
    peers = get_peft_model(build(name), config).eval()
    stir(peers)
    for key, parameter in peers.named_parameters():
        if parameter.requires_grad and ".lora_" not in key:
            nn.init.normal_(parameter, std=0.3)
    peers.save_pretrained(tmp_path / "peers")
    ours = build(name)
    beside = pk.load_adapter(ours, tmp_path / "peers")
    assert {f"{module}.weight" for module in config.modules_to_save or ()} <= beside.keys()
    assert_equal(ours, peers, name)

    pk.save_adapter(ours, tmp_path / "ours", task_type=None)
    again = PeftModel.from_pretrained(build(name), tmp_path / "ours", is_trainable=True).eval()
    assert_equal(again, peers, name)
    pk.accelerate_peft(again)
    assert_equal(again, peers, name)
