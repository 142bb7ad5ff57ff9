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
    for key, value in got.items():
        assert wanted[key].abs().max() > 0, key
        assert difference(value, wanted[key]) < 1e-5, key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_apply_lora_is_pefts_model(name, tmp_path):
    ours = pk.apply_lora(build(name), pk.LoRAConfig(r=3, alpha=5))
    stir(ours)
    pk.save_adapter(ours, tmp_path, task_type=None)
    peers = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).eval()
    assert_equal(ours, peers, name)
    wanted = {"plain LoRA"} if name in OWN_FORWARD else {"lora_linear"}
    assert {row.route for row in pk.explain(ours)} == wanted


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accelerate_peft_is_pefts_model(name):
    peers = get_peft_model(build(name), LoraConfig(r=3, target_modules="all-linear")).eval()
    stir(peers)
    ours = pk.accelerate_peft(copy.deepcopy(peers))
    assert_equal(ours, peers, name)
    for row in pk.explain(ours):
        fused = row.base in ("Linear", "Conv1D")
        assert row.route == ("lora_linear" if fused else "PEFT"), row
    assert len(pk.explain(ours)) == sum(
        isinstance(module, peft.tuners.lora.LoraLayer) for module in peers.modules()
    )
