"""Round trips with the real peft package, both ways, and accelerate_peft."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from _tiny import FAMILIES, HIDDEN, VOCABULARY, difference, logits_of, stir, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import perl_kernels as pk
from perl_kernels import peft as pk_peft

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out|.*tie_word_embeddings|.*save_emb")

FEW = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["k_proj", "up_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gemma2": ["v_proj", "gate_proj"],
}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the adapter's weights, by the keys of a PEFT file."""
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".weight", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_same(ours: nn.Module, peers: nn.Module) -> None:
    """Against PEFT's model in float64: in float32 its own logits may be that far off."""
    assert difference(logits_of(ours), logits_of(copy.deepcopy(peers).double())) < 2e-6


def assert_same_gradients(ours: nn.Module, peers: nn.Module) -> None:
    wanted = gradients(peers)
    got = gradients(ours)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert difference(gradient, wanted[name]) < 1e-5, name


# ------------------------------------------------------------------------------------------------
# Ours to PEFT
# ------------------------------------------------------------------------------------------------

OURS = {
    "all-linear": lambda few: pk.LoRAConfig(r=3, alpha=5),
    "few, rsLoRA": lambda few: pk.LoRAConfig(r=3, target_modules=few, use_rslora=True),
    "one layer and the head": lambda few: pk.LoRAConfig(
        r=3, target_modules=rf".*\.1\..*({few[0]}|{few[1]})|lm_head"
    ),
    "patterns": lambda few: pk.LoRAConfig(
        r=3,
        target_modules=few,
        rank_pattern={rf"1\..*{few[0]}": 5},
        alpha_pattern={few[1]: 7.5},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", OURS)
def test_our_folder_loads_in_peft(family, config, tmp_path):
    ours = pk.apply_lora(tiny_model(family), OURS[config](FEW[family]))
    stir(ours)
    pk.save_adapter(ours, tmp_path)
    peers = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True).eval()
    assert difference(logits_of(ours), logits_of(tiny_model(family))) > 0.01
    assert_same(ours, peers)
    assert_same_gradients(ours, peers)

    again = tiny_model(family)
    assert pk.load_adapter(again, tmp_path, "other") == {}
    assert torch.equal(logits_of(again), logits_of(ours))


def test_pretrained_model_both_ways(stories260k, tmp_path):
    def pretrained() -> PreTrainedModel:
        # float64: its first layer's attention is saturated, the gradients there cancel to 1e-8.
        return AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float64)

    ours = pk.apply_lora(pretrained(), pk.LoRAConfig(r=4, alpha=8))
    stir(ours)
    pk.save_adapter(ours, tmp_path / "ours")
    peers = PeftModel.from_pretrained(pretrained(), tmp_path / "ours", is_trainable=True).eval()
    assert difference(logits_of(ours), logits_of(pretrained())) > 0.01
    assert_same(ours, peers)
    assert_same_gradients(ours, peers)
    peers.save_pretrained(tmp_path / "peers")
    again = pretrained()
    pk.load_adapter(again, tmp_path / "peers")
    assert torch.equal(logits_of(again), logits_of(ours))


def test_saved_names_are_short_where_they_are_exact(tmp_path):
    def saved(targets) -> list[str]:
        model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(target_modules=targets))
        pk.save_adapter(model, tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert saved(r".*(q_proj|up_proj)") == ["q_proj", "up_proj"]
    assert saved(["layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]


def test_rank_of_a_module_whose_name_ends_anothers(tmp_path):
    def build() -> nn.Module:
        return nn.ModuleDict(
            {"block": nn.ModuleDict({"fc": nn.Linear(3, 4)}), "fc": nn.Linear(3, 4)}
        )

    model = pk.apply_lora(build(), pk.LoRAConfig(r=2, rank_pattern={"^fc": 5}))
    pk.save_adapter(model, tmp_path)
    again = build()
    pk.load_adapter(again, tmp_path)
    assert [module.adapters["default"].r for module in (again["block"]["fc"], again["fc"])] == [
        2,
        5,
    ]


def test_reward_adapter_loads_in_peft_with_its_head(tmp_path):
    ours = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3), "reward")
    stir(ours)
    head = torch.randn(1, HIDDEN)
    pk.save_adapter(
        ours, tmp_path, "reward", task_type="SEQ_CLS", modules_to_save={"score.weight": head}
    )
    hidden = ours.model(input_ids=tokens()).last_hidden_state[:, -1]
    wanted = (hidden @ head.T).detach()
    peers = PeftModel.from_pretrained(tiny_model("llama", scalar=True), tmp_path).eval()
    assert difference(logits_of(peers), wanted) < 2e-6

    loaded = pk.load_adapter(tiny_model("llama"), tmp_path)
    assert torch.equal(loaded["score.weight"], head)
    reward_model = tiny_model("llama", scalar=True)
    pk.load_adapter(reward_model, tmp_path)
    assert difference(logits_of(reward_model), wanted) < 2e-6


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(target_modules=["lm_head"]))
    for given, message in (
        ({"adapter_name": "other"}, "no adapter 'other'; the model has: default"),
        ({"task_type": "REWARD"}, "task_type is 'REWARD'; wanted one of"),
        ({"modules_to_save": {"value.weight": torch.ones(1)}}, "modules_to_save has 'value'"),
        ({"task_type": "SEQ_CLS"}, "lm_head has adapter 'default', and a SEQ_CLS model has no"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.save_adapter(model, tmp_path / "folder", **given)
    assert not (tmp_path / "folder").exists()


def test_interrupted_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3))
    pk.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["adapter_config.json", "adapter_model.safetensors"]
    stir(model)

    def fails_halfway(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pk_peft, "save_file", fails_halfway)
    with pytest.raises(OSError, match="no space"):
        pk.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------------
# PEFT to ours
# ------------------------------------------------------------------------------------------------

PEERS = {
    "all-linear": lambda few: LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"),
    "few, rsLoRA, dropout": lambda few: LoraConfig(
        r=3, target_modules=few, use_rslora=True, lora_dropout=0.2, init_lora_weights="gaussian"
    ),
    "regular expression": lambda few: LoraConfig(r=3, target_modules=rf".*\.1\..*{few[0]}"),
    "patterns": lambda few: LoraConfig(
        r=3,
        target_modules=few,
        rank_pattern={rf"1\..*{few[0]}": 5},
        alpha_pattern={few[1]: 7},
    ),
    # PEFT writes the base weight of the head into the file as well.
    "head": lambda few: LoraConfig(r=3, target_modules=[*few, "lm_head"]),
}


def peft_model(family: str, config: LoraConfig) -> PeftModel:
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_model(family), config).eval()
    stir(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", PEERS)
def test_peft_folder_loads_here(family, config, tmp_path):
    peers = peft_model(family, PEERS[config](FEW[family]))
    peers.save_pretrained(tmp_path)
    ours = tiny_model(family)
    assert pk.load_adapter(ours, tmp_path) == {}
    adapted = {n for n, m in ours.named_modules() if isinstance(m, pk.LoRALinear)}
    assert adapted == {
        n.removeprefix("base_model.model.")
        for n, m in peers.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert_same(ours, peers)
    assert_same_gradients(ours, peers)
    assert next(iter(pk_peft.lora_layers(ours).values())).adapters["default"].dropout == (
        peers.peft_config["default"].lora_dropout
    )


def test_peft_reward_model_loads_here(tmp_path):
    config = LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS")
    peers = get_peft_model(tiny_model("llama", scalar=True), config).eval()
    stir(peers)
    peers.save_pretrained(tmp_path)
    ours = tiny_model("llama", scalar=True)
    ours.score.weight.data.zero_()
    heads = pk.load_adapter(ours, tmp_path)
    assert_same(ours, peers)
    assert torch.equal(heads["score.weight"], ours.score.weight)
    assert heads.keys() == {"score.weight"}


def saved_folder(tmp_path, family: str = "llama", targets=("q_proj",)):
    model = pk.apply_lora(tiny_model(family), pk.LoRAConfig(r=3, target_modules=list(targets)))
    stir(model)
    pk.save_adapter(model, tmp_path)
    return tmp_path


def assert_refused(model: PreTrainedModel, folder, message: str, error=ValueError) -> None:
    """load_adapter raises, in one line, and changes nothing."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message) as refusal:
        pk.load_adapter(model, folder)
    assert "\n" not in str(refusal.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; wanted 'LORA'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "some"}, "bias is 'some'; wanted 'none', 'lora_only' or 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layers_to_transform": [7]}, "layers_to_transform and modules_to_save leave noth"),
        ({"layers_pattern": "h"}, "layers_pattern is 'h' without layers_to_transform"),
        ({"target_parameters": ["experts.w"]}, "has 'experts.w', which matches no parameter"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication is \[\[0, 2\]\], which is not supp"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"something_new": 4}, "something_new is 4"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes the base"),
        ({"modules_to_save": ["embed"]}, "modules_to_save has 'embed', which matches no module"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight is missing; the adapter is"),
        ({"r": 0}, "r is 0; wanted a rank of at least 1"),
        ({"r": None}, "r is None"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["c_attn"]}, "has 'c_attn', which matches no module"),
        ({"target_modules": ["q_proj", "v_proj"]}, "layers.0.self_attn.v_proj.lora_A is missing"),
        ({"r": 4}, r"q_proj.lora_A has shape \(3, 32\), this LlamaForCausalLM wants \(4, 32\)"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(changed, message, tmp_path):
    path = saved_folder(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert_refused(tiny_model("llama"), tmp_path, message)


@pytest.mark.filterwarnings("ignore:.*eva")
@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal"])
def test_starts_that_keep_the_base_are_plain_lora(init, tmp_path):
    """files of adapters with an initialisation that keeps the base: EVA, gaussian, orthogonal"""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init)
    peers = peft_model("llama", config)
    peers.save_pretrained(tmp_path)
    ours = tiny_model("llama")
    pk.load_adapter(ours, tmp_path)
    assert_same(ours, peers)


def test_real_dora_folder_is_refused(tmp_path):
    peft_model("llama", LoraConfig(target_modules=["q_proj"], use_dora=True)).save_pretrained(
        tmp_path
    )
    assert_refused(tiny_model("llama"), tmp_path, "use_dora is True")


def test_files_that_are_missing_or_broken_are_refused(tmp_path):
    assert_refused(
        tiny_model("llama"), tmp_path / "no", "no adapter_config.json", FileNotFoundError
    )
    saved_folder(tmp_path)
    tensors, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors.write_bytes(tensors.read_bytes()[:100])
    assert_refused(tiny_model("llama"), tmp_path, "is not a safetensors file")
    tensors.rename(tmp_path / "adapter_model.bin")
    assert_refused(tiny_model("llama"), tmp_path, "pickles are not read", FileNotFoundError)
    config.write_text("{")
    assert_refused(tiny_model("llama"), tmp_path, "adapter_config.json is not JSON")


def test_tensors_of_another_model_are_refused(tmp_path):
    path = saved_folder(tmp_path) / "adapter_model.safetensors"
    good = load_file(path)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    head = "base_model.model.lm_head.weight"
    for changed, message in (
        ({first: torch.ones(8, 3)}, r"layers.0.*q_proj.lora_B has shape \(8, 3\), this .* \(32, 3"),
        ({"base_model.model.fc.lora_A.weight": torch.ones(1)}, "fc.lora_A.weight is unexpected"),
        ({head: torch.ones(9, HIDDEN)}, r"lm_head.weight has shape \(9,"),
        ({head: torch.ones(VOCABULARY, HIDDEN)}, "lm_head.weight differs from"),
    ):
        save_file(good | changed, path)
        assert_refused(tiny_model("llama"), tmp_path, message)
    save_file({key: tensor for key, tensor in good.items() if key != first}, path)
    assert_refused(tiny_model("llama"), tmp_path, r"layers.0.self_attn.q_proj.lora_B is missing")


def test_head_of_another_size_is_refused(tmp_path):
    model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3))
    heads = {"score.weight": torch.ones(2, HIDDEN)}
    pk.save_adapter(model, tmp_path, task_type="SEQ_CLS", modules_to_save=heads)
    assert_refused(
        tiny_model("llama", scalar=True), tmp_path, r"score.weight has shape \(2, 32\), this .*\(1,"
    )


def test_loading_into_an_adapter_that_is_there(tmp_path):
    saved_folder(tmp_path)
    wanted = tiny_model("llama")
    pk.load_adapter(wanted, tmp_path)

    model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3, target_modules=["q_proj"]))
    parameters = pk.adapter_parameters(model)
    pk.load_adapter(model, tmp_path)
    assert torch.equal(logits_of(model), logits_of(wanted))
    assert all(parameters[name] is p for name, p in pk.adapter_parameters(model).items())

    for config, message in (
        (pk.LoRAConfig(r=3, target_modules=["q_proj", "k_proj"]), "k_proj .* only in the model"),
        (pk.LoRAConfig(r=3, target_modules=["k_proj"]), "only in the model|only in the folder"),
        (pk.LoRAConfig(r=3, alpha=9, target_modules=["q_proj"]), "r=3 and scale=3.0, the folder"),
        (pk.LoRAConfig(r=2, target_modules=["q_proj"]), "with r=2 and scale=16.0, the folder r=3"),
    ):
        assert_refused(pk.apply_lora(tiny_model("llama"), config), tmp_path, message)
    pk.merge_lora(model)
    assert_refused(model, tmp_path, "adapter 'default' is merged; call unmerge_lora")


class Experts(nn.Module):
    """Three stacked weights, (E, D, O) where they are said to be transposed, else (E, O, D)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.w = nn.Parameter(torch.randn(3, 4, 5) if is_transposed else torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (E, N, 4) -> (E, N, 5)
        return x @ (self.w if self.is_transposed else self.w.mT)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_parameters_either_way_round(is_transposed, tmp_path):
    base = nn.ModuleDict({"experts": Experts(is_transposed)})
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.w"])
    peers = get_peft_model(copy.deepcopy(base), config)
    stir(peers)
    peers.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    pk.load_adapter(ours, tmp_path)
    x = torch.randn(3, 6, 4)
    wanted = peers.base_model.model["experts"](x)
    assert difference(wanted, base["experts"](x)) > 0.01
    assert difference(ours["experts"](x), wanted) < 1e-6
    pk.merge_lora(ours)
    assert difference(ours["experts"](x), wanted) < 1e-6
    pk.unload_lora(ours)
    assert list(ours.state_dict()) == ["experts.w"]
    assert difference(ours["experts"](x), wanted) < 1e-6


def test_second_adapter_from_a_folder_waits(tmp_path):
    saved_folder(tmp_path)
    model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=2))
    stir(model)
    before = logits_of(model)
    pk.load_adapter(model, tmp_path, "second")
    assert torch.equal(logits_of(model), before)
    pk.set_adapter(model, "second")
    wanted = tiny_model("llama")
    pk.load_adapter(wanted, tmp_path)
    assert torch.equal(logits_of(model), logits_of(wanted))


# ------------------------------------------------------------------------------------------------
# accelerate_peft
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Counts the LoRA layers that are computed by the fused op."""
    counted = []

    def counting(*args, **kwargs):
        counted.append(1)
        return pk.lora_linear(*args, **kwargs)

    monkeypatch.setattr(pk_peft, "lora_linear", counting)
    return counted


@pytest.mark.parametrize("family", FAMILIES)
def test_accelerated_model_is_the_same_model(family, calls):
    config = LoraConfig(r=3, target_modules=[*FEW[family], "lm_head"], lora_dropout=0.3)
    peers = peft_model(family, config)
    ours = copy.deepcopy(peers)
    assert pk.accelerate_peft(ours) is ours
    assert_same(ours, peers)
    layers = sum(isinstance(m, peft.tuners.lora.Linear) for m in peers.modules())
    assert len(calls) == layers
    assert_same_gradients(ours, peers)
    assert list(ours.state_dict()) == list(peers.state_dict())

    copied = copy.deepcopy(ours)
    calls.clear()
    assert torch.equal(logits_of(copied), logits_of(ours))
    assert len(calls) == 2 * layers


def two_peft_adapters() -> PeftModel:
    model = peft_model("llama", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    stir(model)
    return model


def test_rows_with_their_own_adapters_are_those_of_pefts_adapter_names(tmp_path):
    peers, ours = two_peft_adapters(), tiny_model("llama")
    peers.save_pretrained(tmp_path)
    pk.load_adapter(ours, tmp_path)
    pk.load_adapter(ours, tmp_path / "second", "second")
    exact, names, batch = peers.double(), ["second", "__base__", "default", "second"], tokens(4)
    for model in (ours, exact):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    with pk.adapters_per_row(ours, names):
        got = ours(input_ids=batch).logits
    wanted = exact(input_ids=batch, adapter_names=names).logits
    assert difference(got, wanted) < 2e-6
    for logits in (got, wanted):
        logits.square().mean().backward()
    of_exact = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): p.grad
        for name, p in exact.named_parameters()
        if p.requires_grad
    }
    of_ours = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert of_ours.keys() == of_exact.keys() and len(of_ours) == 12
    for name, gradient in of_ours.items():
        assert difference(gradient, of_exact[name]) < 1e-5, name


def learned(model: nn.Module, **arguments: object) -> dict[str, torch.Tensor]:
    model(**arguments).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_accelerated_rows_with_their_own_adapters(family, monkeypatch):
    """`adapter_names`, one for each row of a batch, in forward, backward and `generate()`"""
    peers = peft_model(family, LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.2))
    few = LoraConfig(r=2, lora_alpha=5, target_modules=FEW[family], lora_dropout=0.2)
    peers.add_adapter("second", few)
    stir(peers.eval())
    for name, parameter in peers.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ours, exact = pk.accelerate_peft(copy.deepcopy(peers)), copy.deepcopy(peers).double()
    used = []

    def counting(*args, **kwargs):
        used.append(1)
        return pk.multi_lora_linear(*args, **kwargs)

    monkeypatch.setattr(pk_peft, "multi_lora_linear", counting)
    names, batch = ["second", "__base__", "default", "second"], tokens(4)
    got, wanted = (learned(m, input_ids=batch, adapter_names=names) for m in (ours, exact))
    assert len(used) == sum(isinstance(m, peft.tuners.lora.Linear) for m in peers.modules())
    assert got.keys() == wanted.keys() == {n for n, _ in peers.named_parameters() if ".lora_" in n}
    for name, gradient in got.items():
        assert difference(gradient, wanted[name]) < 1e-5, name

    options = dict(max_new_tokens=5, do_sample=False, adapter_names=names)
    options["attention_mask"] = torch.ones_like(batch)
    got, wanted = (model.generate(input_ids=batch, **options) for model in (ours, peers))
    assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(input_ids=batch, adapter_names=names[:2])
    with pytest.raises(ValueError, match="training mode"):
        ours.train()(input_ids=batch, adapter_names=names)


def test_accelerated_adapters_that_act_together():
    """several active adapters, trained together in one pass"""
    peers = peft_model("llama", LoraConfig(r=3, target_modules="all-linear"))
    peers.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    stir(peers)
    peers.base_model.set_adapter(["default", "second"])
    ours, exact = pk.accelerate_peft(copy.deepcopy(peers)), copy.deepcopy(peers).double()
    assert {row.route for row in pk.explain(ours)} == {"lora_linear", "lora_mlp"}
    got, wanted = (learned(model, input_ids=tokens()) for model in (ours, exact))
    assert got.keys() == wanted.keys() and len(got) == 2 * (14 + 4)
    for name, gradient in got.items():
        assert difference(gradient, wanted[name]) < 1e-5, name


def test_accelerated_model_keeps_pefts_controls(calls, tmp_path):
    peers, ours = two_peft_adapters(), pk.accelerate_peft(two_peft_adapters())

    def check(fused: int) -> None:
        calls.clear()
        assert_same(ours, peers)
        assert len(calls) == fused

    check(4)
    for model in (peers, ours):
        model.set_adapter("second")
    check(2)
    with peers.disable_adapter(), ours.disable_adapter():
        check(0)
    for model in (peers, ours):
        model.merge_adapter()
    check(0)
    for model in (peers, ours):
        model.unmerge_adapter()
    check(2)
    for model in (peers, ours):
        model.base_model.set_adapter(["default", "second"])  # two at once, in q_proj
    check(4)
    for model in (peers, ours):
        model.set_adapter("default")
    names = ["default", "__base__"]
    with torch.no_grad():
        got, wanted = (m(input_ids=tokens(), adapter_names=names).logits for m in (ours, peers))
    assert difference(got, wanted) < 2e-6

    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert_same(again, peers)
    assert not list(tmp_path.glob("**/*.bin"))


@pytest.mark.filterwarnings("ignore:.*eva")
@pytest.mark.parametrize(
    ("config", "fused"),
    [
        ({"use_dora": True}, 0),
        ({"lora_bias": True}, 0),
        ({"use_rslora": True}, 2),
        ({"bias": "lora_only"}, 2),
        ({"init_lora_weights": "pissa"}, 2),
        ({"init_lora_weights": "olora"}, 2),
        ({"init_lora_weights": "eva"}, 2),
    ],
)
def test_accelerated_variants_are_equal(config, fused, calls):
    """`accelerate_peft` with DoRA, rsLoRA, trained biases; PiSSA's, OLoRA's and EVA's start"""

    def build():
        # Qwen2: q_proj has a bias to train.
        return peft_model("qwen2", LoraConfig(r=3, target_modules=["q_proj"], **config))

    peers, ours = build(), pk.accelerate_peft(build())
    assert_same(ours, peers)
    assert len(calls) == fused
    assert_same_gradients(ours, peers)


def test_accelerated_lora_fa(calls):
    """LoRA-FA, which freezes A (Zhang et al., arXiv 2308.03303)"""
    peers = peft_model("llama", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    for name, parameter in peers.named_parameters():
        parameter.requires_grad_(".lora_B." in name)
    ours = pk.accelerate_peft(copy.deepcopy(peers))
    assert_same_gradients(ours, peers)
    assert len(calls) == 4
    assert all(p.grad is None for n, p in ours.named_parameters() if ".lora_A." in n)


def test_accelerated_model_leaves_other_kinds_of_layers_to_peft():
    """a layer of a kind of its own, as PEFT has for quantised bases, is computed by PEFT"""

    class Linear4bit(peft.tuners.lora.Linear):
        pass

    model = peft_model("llama", LoraConfig(r=3, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = Linear4bit
    wanted = logits_of(model)
    rows = pk.explain(pk.accelerate_peft(model))
    assert type(layer) is Linear4bit and difference(logits_of(model), wanted) < 1e-5
    assert (rows[0].route, rows[0].why) == ("PEFT", "Linear4bit is computed by PEFT alone")
    assert rows[1].route == "lora_linear"


def test_accelerated_layers_leave_trained_bases_and_hooks_to_peft(calls):
    peers = peft_model("llama", LoraConfig(r=3, target_modules=["q_proj"]))
    ours = pk.accelerate_peft(copy.deepcopy(peers))
    seen = []
    for model in (peers, ours):
        attention = model.base_model.model.model.layers
        attention[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
        attention[1].self_attn.q_proj.lora_A["default"].register_forward_hook(
            lambda *_: seen.append(1)
        )
    assert_same_gradients(ours, peers)
    assert len(seen) == 2
    assert not calls


def test_accelerated_dropout_is_for_training_and_repeats_with_the_seed(calls):
    config = LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.5)
    model = pk.accelerate_peft(peft_model("llama", config))
    evaluated = logits_of(model)
    model.train()

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return logits_of(model)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1), evaluated)
    assert len(calls) == 2 * 6


def test_accelerated_16_bit_base():
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    peers = get_peft_model(tiny_model("llama").bfloat16(), config).eval()
    stir(peers)
    exact = logits_of(copy.deepcopy(peers).double())
    ours = pk.accelerate_peft(copy.deepcopy(peers))
    assert logits_of(ours).dtype == logits_of(peers).dtype == torch.bfloat16
    error = difference(logits_of(ours).double(), exact)
    assert error < 1.5 * difference(logits_of(peers).double(), exact)


def test_models_without_peft_layers_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA layer of peft"):
        pk.accelerate_peft(tiny_model("llama"))
    with pytest.raises(ValueError, match="q_proj already carries LoRA weights of PEFT"):
        pk.apply_lora(two_peft_adapters(), pk.LoRAConfig())
