"""Adapters on whole models: targets, named adapters, disable, merge, generate, checkpointing."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from _architectures import build
from _tiny import FAMILIES, VOCABULARY, difference, logits_of, stir, tiny_model, tokens
from peft import PeftModel
from torch import nn

import perl_kernels as pk
from perl_kernels.layers import LoRALayer


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, pk.LoRALinear)}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------
# Targets
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_changes_no_output_and_freezes_the_base(family):
    model = tiny_model(family)
    before = logits_of(model)
    assert pk.apply_lora(model, pk.LoRAConfig(r=3)) is model
    assert difference(logits_of(model), before) < 1e-6
    assert trainable(model) == {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert "lm_head" not in adapted(model)
    stir(model)
    assert difference(logits_of(model), before) > 0.01


def test_all_linear_leaves_heads_alone():
    layer = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for scalar in (False, True):
        names = adapted(pk.apply_lora(tiny_model(scalar=scalar), pk.LoRAConfig()))
        assert {name.rpartition(".")[2] for name in names} == layer
        assert len(names) == 2 * len(layer)


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q_proj"], {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}),
        (["layers.1.mlp.up_proj", "lm_head"], {"model.layers.1.mlp.up_proj", "lm_head"}),
        (r".*\.0\..*_proj", None),
    ],
)
def test_targets_by_name_and_by_regular_expression(targets, wanted):
    model = tiny_model("llama")
    if wanted is None:
        wanted = {n for n, m in model.named_modules() if ".0." in n and isinstance(m, nn.Linear)}
        assert len(wanted) == 7
    assert adapted(pk.apply_lora(model, pk.LoRAConfig(target_modules=targets))) == wanted


def test_rank_and_alpha_patterns():
    config = pk.LoRAConfig(
        r=4,
        alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"mlp.up_proj": 3},
    )
    layers = pk.apply_lora(tiny_model("llama"), config).model.layers
    assert [layer.self_attn.q_proj.lora_A["default"].shape[0] for layer in layers] == [2, 2]
    assert [layer.mlp.up_proj.lora_A["default"].shape[0] for layer in layers] == [4, 6]
    assert [layer.mlp.up_proj.adapters["default"].scale for layer in layers] == [3 / 4, 3 / 6]
    assert layers[0].self_attn.q_proj.adapters["default"].scale == 8 / 2


def test_shared_module_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "third": nn.Linear(4, 4)})
    assert adapted(pk.apply_lora(model, pk.LoRAConfig())) == {"first", "third"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_modules": ["qproj"]}, "has 'qproj', .* LlamaForCausalLM; .*: down_proj, gate_pr"),
        ({"target_modules": ["q_proj", "fc"]}, "has 'fc', which matches no module"),
        ({"target_modules": "nothing.*"}, r"has 'nothing\.\*', which matches no module"),
        ({"target_modules": ["norm"]}, "model.norm is a LlamaRMSNorm; LoRA here adapts nn.Lin"),
        ({"exclude_modules": r".*proj"}, "exclude_modules, .* leave nothing to adapt"),
        ({"target_parameters": ["q_proj.weight"]}, "name model.layers.0.self_attn.q_proj in targ"),
        ({"target_parameters": ["norm.weight"]}, "norm.weight has 1 dimensions; wanted 2 or 3"),
        ({"target_parameters": ["w"]}, "target_parameters has 'w', which matches no parameter"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save has 'nothing', which matches no mod"),
        ({"target_modules": ["self_attn"]}, "layers.0.self_attn is a LlamaAttention"),
        ({"rank_pattern": {"qproj": 2}}, "pattern 'qproj' matches none of the target modules"),
        ({"dtype": torch.bfloat16}, "adapter dtype is torch.bfloat16; wanted torch.float32"),
    ],
)
def test_targets_that_do_not_fit_are_refused_and_nothing_is_changed(given, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        pk.apply_lora(model, pk.LoRAConfig(**given))
    assert not adapted(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 0}, "r is 0; wanted a rank of at least 1"),
        ({"r": 2.5}, "r is 2.5"),
        ({"alpha": -16}, "alpha is -16; wanted a positive number"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": 1.0}, r"dropout is 1.0; wanted a probability in \[0, 1\)"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"target_modules": []}, r"target_modules is \[\]; wanted 'all-linear'"),
        ({"target_parameters": "w"}, "target_parameters is 'w'; wanted a list of names"),
        ({"modules_to_save": "norm"}, "modules_to_save is 'norm'; wanted a list of names"),
        ({"bias": "both"}, "bias is 'both'; wanted 'none', 'lora_only' or 'all'"),
        ({"layers_to_transform": 0}, "layers_to_transform is 0 and target_modules is 'all-linear'"),
        ({"layers_pattern": "h", "target_modules": ["fc"]}, "layers_pattern is 'h' without layers"),
        ({"exclude_modules": "a("}, r"'a\(' is not a regular expression"),
        ({"target_modules": "layers.(0"}, r"'layers.\(0' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "r is 0"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha is 0"),
    ],
)
def test_bad_configurations_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        pk.LoRAConfig(**given)


def test_model_without_linear_modules_is_refused():
    with pytest.raises(ValueError, match="'all-linear', which matches no module of Embedding"):
        pk.apply_lora(nn.Embedding(3, 4), pk.LoRAConfig())


def test_parameters_of_one_module_are_wrapped_one_inside_the_other():
    model = build("Mixtral")
    names, before = list(model.state_dict()), logits_of(model)
    both = pk.LoRAConfig(target_modules=None, target_parameters=["gate_up_proj", "down_proj"])
    pk.apply_lora(model, both, lean=False)
    assert [row.module for row in pk.explain(model)[:2]] == [
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.experts.base_layer",
    ]
    assert {row.route for row in pk.explain(model)} == {"plain LoRA"}
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert torch.equal(logits_of(model), before)
    stir(model)
    with_adapter = logits_of(model)
    assert difference(with_adapter, before) > 0.01
    pk.apply_lora(model, both, "second", lean=False)
    assert torch.equal(logits_of(model), with_adapter)
    with pytest.raises(ValueError, match="dropout is 0.1; adapters on parameters have none"):
        pk.apply_lora(build("Mixtral"), dataclasses.replace(both, dropout=0.1))
    pk.merge_lora(model)
    assert difference(logits_of(model), with_adapter) < 1e-5
    pk.unload_lora(model)
    assert list(model.state_dict()) == names
    assert difference(logits_of(model), with_adapter) < 1e-5

    pk.apply_lora(model, pk.LoRAConfig(target_modules=None, target_parameters=["down_proj"]))
    with pytest.raises(ValueError, match="experts.gate_up_proj has no adapter and down_proj besi"):
        pk.apply_lora(model, both, "second")


@pytest.mark.parametrize("given", [{"modules_to_save": ["norm"]}, {"bias": "all"}])
def test_adapter_that_trains_the_models_own_parameters_is_alone(given):
    model = pk.apply_lora(tiny_model("qwen2"), pk.LoRAConfig(r=3, **given))
    ending = ".bias" if "bias" in given else "norm.weight"
    own = {name for name, _ in model.named_parameters() if ".lora_" not in name}
    assert trainable(model) & own == {name for name in own if name.endswith(ending)}
    with pytest.raises(ValueError, match="trained the model's own parameters .* load it beside"):
        pk.disable_adapters(model).__enter__()
    with pytest.raises(ValueError, match="has to be the model's only adapter"):
        pk.apply_lora(model, pk.LoRAConfig(), "second")
    model = pk.apply_lora(tiny_model("qwen2"), pk.LoRAConfig())
    with pytest.raises(ValueError, match="has to be the model's only adapter"):
        pk.apply_lora(model, pk.LoRAConfig(**given), "second")


def test_tied_module_is_not_trained_in_full():
    for names in (["lm_head"], ["lm_head", "wte"]):  # PEFT would give each a copy of its own
        with pytest.raises(ValueError, match="is tied to .*; untie them first"):
            pk.apply_lora(tiny_model("gpt2"), pk.LoRAConfig(modules_to_save=names))


# ------------------------------------------------------------------------------------------------
# Named adapters
# ------------------------------------------------------------------------------------------------


def two_adapters(lean: bool = True) -> nn.Module:
    model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3), lean=lean)
    value = pk.LoRAConfig(r=2, target_modules=["q_proj", "lm_head"])
    pk.apply_lora(model, value, "value", lean=lean)
    stir(model)
    return model


def test_named_adapters_are_separate():
    model = two_adapters()
    assert pk.adapter_names(model) == ["default", "value"]
    default = logits_of(model)  # the first adapter stays active
    assert not any(p.requires_grad for p in pk.adapter_parameters(model, "value").values())

    alone = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3))
    for name, parameter in pk.adapter_parameters(alone).items():
        parameter.data = pk.adapter_parameters(model)[name].data
    assert torch.equal(logits_of(alone), default)

    pk.set_adapter(model, "value")
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith(".value")}
    value = logits_of(model)
    assert difference(value, default) > 0.01
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model).values():
            parameter.fill_(math.nan)
    assert torch.equal(logits_of(model), value)


def test_adapter_parameters_are_the_models_own():
    model = two_adapters()
    parameters = pk.adapter_parameters(model, "value")
    assert set(parameters) == {
        f"{name}.{factor}"
        for name in (
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "lm_head",
        )
        for factor in ("lora_A", "lora_B")
    }
    assert parameters["lm_head.lora_A"] is model.lm_head.lora_A["value"]


def test_second_all_linear_adapter_finds_the_same_modules():
    model = pk.apply_lora(tiny_model("gpt2"), pk.LoRAConfig(r=3))
    modules = adapted(model)
    pk.apply_lora(model, pk.LoRAConfig(r=2), "second")
    assert adapted(model) == modules
    assert len(pk.adapter_parameters(model, "second")) == 2 * len(modules)


def test_same_name_is_refused_and_nothing_is_changed():
    model = two_adapters()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="already has an adapter 'value'"):
        pk.apply_lora(model, pk.LoRAConfig(), "value")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_adapter_is_refused_by_name():
    model = two_adapters()
    with pytest.raises(ValueError, match="no adapter 'policy'; the model has: default, value"):
        pk.set_adapter(model, "policy")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA layers"):
        pk.set_adapter(tiny_model("llama"), "default")


def test_several_adapters_learn_from_one_backward():
    def gradients(together: bool) -> dict[str, torch.Tensor]:
        model, collected = two_adapters(), {}
        losses = []
        for name in ("default", "value"):
            pk.set_adapter(model, name, freeze_others=not together)
            losses.append(model(input_ids=tokens(), labels=tokens()).loss)
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        for name in ("default", "value"):
            for key, parameter in pk.adapter_parameters(model, name).items():
                collected[f"{name} {key}"] = parameter.grad
        return collected

    wanted = gradients(together=False)
    for key, gradient in gradients(together=True).items():
        assert gradient is not None, key
        assert difference(gradient, wanted[key]) < 1e-5, key


def test_checkpoints_run_again_with_the_adapter_of_their_forward_pass():
    names = ("default", "value")

    def gradients(**options) -> dict[str, torch.Tensor]:
        model = two_adapters().train()
        if options.get("context_fn"):
            options["context_fn"] = pk.checkpoint_contexts(model)
        model.gradient_checkpointing_enable({"use_reentrant": False, **options})
        loss = 0
        for name in names:
            pk.set_adapter(model, name, freeze_others=False)
            loss = loss + model(input_ids=tokens(), labels=tokens()).loss
        with pk.disable_adapters(model):
            loss.backward(retain_graph=True)
            loss.backward()
        assert {m.active_adapter for m in model.modules() if isinstance(m, LoRALayer)} == {"value"}
        return {f"{n} {k}": p.grad for n in names for k, p in parameters(model, n)}

    def parameters(model: nn.Module, name: str):
        return pk.adapter_parameters(model, name).items()

    with pytest.raises(torch.utils.checkpoint.CheckpointError):  # the base saves fewer tensors
        gradients()
    model, wanted = two_adapters(), {}
    for name in names:
        pk.set_adapter(model, name)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        wanted |= {f"{name} {key}": 2 * p.grad for key, p in parameters(model, name)}
    got = gradients(context_fn=True)
    assert got.keys() == wanted.keys()
    for key, gradient in got.items():
        assert difference(gradient, wanted[key]) < 1e-5, key


def test_disable_nests_and_survives_an_exception():
    model, base = two_adapters(lean=False), logits_of(tiny_model("llama"))
    with_adapter = logits_of(model)
    with pk.disable_adapters(model):
        assert torch.equal(logits_of(model), base)
        with pk.disable_adapters(model):
            assert torch.equal(logits_of(model), base)
        assert torch.equal(logits_of(model), base)
    assert torch.equal(logits_of(model), with_adapter)
    with pytest.raises(KeyError), pk.disable_adapters(model):
        raise KeyError
    assert torch.equal(logits_of(model), with_adapter)


def test_deepcopy_and_state_dict_carry_the_adapters():
    model = two_adapters()
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other), logits_of(model))
    fresh = pk.apply_lora(tiny_model("llama", seed=9), pk.LoRAConfig(r=3))
    pk.apply_lora(fresh, pk.LoRAConfig(r=2, target_modules=["q_proj", "lm_head"]), "value")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(fresh), logits_of(model))


# ------------------------------------------------------------------------------------------------
# An adapter for each row
# ------------------------------------------------------------------------------------------------

NAMES = ["value", None, "default", "value", "__base__", "default"]


def losses_of_rows(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch).logits
    return torch.stack([logits[i].square().mean() * (i + 1) for i in range(len(batch))])


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": parameter.grad
        for name in pk.adapter_names(model)
        for key, parameter in pk.adapter_parameters(model, name).items()
    }


@pytest.mark.parametrize(
    ("family", "checkpointing"), [*((family, False) for family in FAMILIES), ("llama", True)]
)
def test_rows_with_their_own_adapters_equal_each_group_alone(family, checkpointing):
    def build() -> nn.Module:
        """ "value" has fewer modules, and another rank and scale."""
        few = [{"gpt2": "c_attn"}.get(family, "q_proj"), "lm_head"]
        model = pk.apply_lora(tiny_model(family), pk.LoRAConfig(r=3))
        pk.apply_lora(model, pk.LoRAConfig(r=2, alpha=6, target_modules=few), "value")
        stir(model)
        for name in ("value", "default"):
            pk.set_adapter(model, name, freeze_others=False)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    batch = tokens(len(NAMES))
    model, groups = build(), build()
    with pk.adapters_per_row(model, NAMES):
        losses = losses_of_rows(model, batch)
        losses.sum().backward()
    for name in ("default", "value", None):
        places = [i for i, n in enumerate(NAMES) if (None if n == "__base__" else n) == name]
        if name is not None:
            pk.set_adapter(groups, name, freeze_others=False)
        for layer in groups.modules():
            if isinstance(layer, pk.LoRALinear):
                layer.disabled = name is None
        alone = losses_of_rows(groups, batch[places]) / torch.arange(1.0, len(places) + 1)
        alone = alone * (torch.tensor(places) + 1)
        assert difference(losses[places], alone) < 1e-5
        if name is not None:
            alone.sum().backward()
    wanted = learned(groups)
    for key, gradient in learned(model).items():
        assert difference(gradient, wanted[key]) < 1e-5, key


def test_a_frozen_adapter_among_the_rows_does_not_learn():
    model = two_adapters()
    with pk.adapters_per_row(model, ["default", "value"]):
        losses_of_rows(model, tokens()).sum().backward()
    for key, gradient in learned(model).items():
        assert (gradient is not None and gradient.any()) == key.startswith("default"), key


def test_rows_draw_one_mask_in_training_and_none_in_evaluation():
    model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3, dropout=0.5))
    pk.apply_lora(model, pk.LoRAConfig(r=3, dropout=0.5), "twin")
    stir(model)
    for key, parameter in pk.adapter_parameters(model, "twin").items():
        parameter.data = pk.adapter_parameters(model)[key].data

    def run(names, seed: int):
        torch.manual_seed(seed)
        with pk.adapters_per_row(model, names):
            return logits_of(model)

    evaluated = logits_of(model)
    assert difference(run(["default", "twin"], 0), evaluated) < 1e-5
    model.train()
    trained = run(["default", "default"], 0)
    assert difference(run(["twin", "default"], 0), trained) < 1e-5
    assert difference(run(["default", "default"], 1), trained) > 0.01

    pk.apply_lora(model, pk.LoRAConfig(r=3, dropout=0.1), "other")
    with pytest.raises(ValueError, match="adapters default, other differ in dropout"):
        run(["default", "other"], 0)
    run(["other", "other"], 0)
    model.eval()
    run(["default", "other"], 0)


def test_a_lean_model_with_its_adapters_off_is_the_base_to_rounding():
    model = two_adapters()
    with pk.disable_adapters(model):
        assert difference(logits_of(model), logits_of(tiny_model("llama"))) < 1e-6


def test_adapters_per_row_goes_before_the_active_adapter_and_after_disable():
    model = two_adapters(lean=False)
    value, base = logits_of(model), logits_of(tiny_model("llama"))
    pk.set_adapter(model, "value")
    with pk.adapters_per_row(model, ["default", "default"]):
        assert difference(logits_of(model), value) < 1e-5
        with pk.disable_adapters(model):
            assert torch.equal(logits_of(model), base)
    with pk.adapters_per_row(model, [None, "__base__"]):
        assert torch.equal(logits_of(model), base)
    with pytest.raises(KeyError), pk.adapters_per_row(model, ["value", None]):
        raise KeyError
    assert all(m.rows is None for m in model.modules() if isinstance(m, pk.LoRALinear))


def test_generate_with_an_adapter_for_each_row():
    model = two_adapters()

    def generate(batch: torch.Tensor) -> torch.Tensor:
        return model.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=6, do_sample=False,
            eos_token_id=VOCABULARY + 1,
        )  # fmt: skip

    with pk.adapters_per_row(model, ["value", "default", None]):
        together = generate(tokens(3))
    with pk.disable_adapters(model):
        assert torch.equal(together[2:], generate(tokens(3)[2:]))
    assert torch.equal(together[1:2], generate(tokens(3)[1:2]))
    pk.set_adapter(model, "value")
    assert torch.equal(together[:1], generate(tokens(3)[:1]))


def test_rows_that_cannot_have_their_own_adapters_are_refused():
    model = two_adapters()
    wanted = logits_of(model)
    for names, message in (
        (["policy", None], "no adapter 'policy'; the model has: default, value"),
        ([], "names is empty; wanted one for each row"),
    ):
        with pytest.raises(ValueError, match=message), pk.adapters_per_row(model, names):
            pass
    with pytest.raises(TypeError, match="names is 'value'"), pk.adapters_per_row(model, "value"):
        pass
    with pk.adapters_per_row(model, ["value", None, None]):
        with pytest.raises(ValueError, match=r"shape \(2, 7, 32\) and adapters_per_row 3 names"):
            logits_of(model)
        with pytest.raises(ValueError, match="which does not nest"):
            pk.adapters_per_row(model, ["value"]).__enter__()
        with pytest.raises(ValueError, match="merge outside of adapters_per_row"):
            pk.merge_lora(model)
    assert torch.equal(logits_of(model), wanted)
    pk.merge_lora(model)
    with pytest.raises(ValueError, match="adapter 'default' is merged; call unmerge_lora"):
        pk.adapters_per_row(model, ["value", None]).__enter__()


# ------------------------------------------------------------------------------------------------
# Merge
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_unmerge_and_unload(family, dtype):
    eps = torch.finfo(dtype).eps
    model = tiny_model(family).to(dtype)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    pk.apply_lora(model, pk.LoRAConfig(r=3, alpha=1), lean=False)
    stir(model)
    with_adapter = logits_of(model).float()
    pk.merge_lora(model)
    # Two layers of roundings; 20 eps is ten times less than the adapter's own effect in bfloat16.
    assert difference(logits_of(model).float(), with_adapter) < 20 * eps
    pk.unmerge_lora(model)
    for name, parameter in model.named_parameters():
        if ".base_layer.weight" in name:
            wanted = weights[name.replace(".base_layer", "")].float()
            largest = wanted.abs().max()
            assert (parameter.float() - wanted).abs().max() <= 2 * eps * largest
    assert difference(logits_of(model).float(), with_adapter) < 20 * eps

    pk.merge_lora(model)
    merged = logits_of(model)
    pk.unload_lora(model)
    assert torch.equal(logits_of(model), merged)
    assert list(dict(model.named_parameters())) == list(weights)


def test_merge_makes_the_named_adapter_active_everywhere():
    model = two_adapters()
    pk.set_adapter(model, "value")
    wanted = logits_of(model)
    pk.set_adapter(model, "default")
    pk.merge_lora(model, "value")
    assert difference(logits_of(model), wanted) < 1e-5


def test_calls_that_do_not_go_with_a_merge_are_refused():
    model = two_adapters()
    with pytest.raises(ValueError, match="no adapter is merged"):
        pk.unmerge_lora(model)
    with pk.disable_adapters(model), pytest.raises(ValueError, match="adapters are disabled"):
        pk.merge_lora(model)
    pk.merge_lora(model)
    wanted = logits_of(model)
    for call in (
        lambda: pk.merge_lora(model, "value"),
        lambda: pk.set_adapter(model, "value"),
        lambda: pk.disable_adapters(model).__enter__(),
    ):
        with pytest.raises(ValueError, match="adapter 'default' is merged; call unmerge_lora"):
            call()
    assert torch.equal(logits_of(model), wanted)


def test_broken_adapter_is_not_merged():
    model = two_adapters()
    model.model.layers[1].mlp.up_proj.lora_B["default"].data[0, 0] = math.nan
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinity in model.layers.1.mlp.up_proj"):
        pk.merge_lora(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_tied_head_leaves_the_embedding_alone_and_merges_only_untied(family):
    model = tiny_model(family)
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before = embedding.detach().clone()
    pk.apply_lora(model, pk.LoRAConfig(r=3, target_modules=["lm_head"]))
    stir(model)
    with_adapter = logits_of(model)
    assert difference(with_adapter, logits_of(tiny_model(family))) > 0.01
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert embedding.grad is None
    assert torch.equal(embedding, before)

    with pytest.raises(ValueError, match="lm_head.weight is tied to .*; untie it first") as refusal:
        pk.merge_lora(model)
    assert torch.equal(logits_of(model), with_adapter)
    remedy = str(refusal.value).partition("untie it first: ")[2]
    for statement in remedy.split(" and "):
        exec(statement, {"torch": torch, "model": model})
    pk.merge_lora(model)
    assert difference(logits_of(model), with_adapter) < 1e-5
    assert torch.equal(embedding, before)


# ------------------------------------------------------------------------------------------------
# Combine
# ------------------------------------------------------------------------------------------------


def three_adapters() -> nn.Module:
    """Other ranks, scales and targets: linear, embedding and expert weights."""
    model = build("Mixtral")
    experts = ["gate_up_proj", "down_proj"]
    for name, config in {
        "one": pk.LoRAConfig(r=3, alpha=5, target_parameters=experts),
        "two": pk.LoRAConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_rslora=True),
        "three": pk.LoRAConfig(r=1, target_parameters=experts, rank_pattern={"v_proj": 4}),
    }.items():
        pk.apply_lora(model, config, name)
    stir(model)
    return model.double()


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer)}
    return {n: m.delta(name, torch.float64) for n, m in layers.items() if name in m.adapters}


def test_average_is_the_weighted_sum_of_the_changes():
    model, weights = three_adapters(), {"one": 0.5, "two": 1.5, "three": -0.25}
    pk.average_adapters(model, list(weights), list(weights.values()), "mean")
    got = deltas(model, "mean")
    assert len(got) == 2 * (4 + 2) + 1
    for key, delta in got.items():
        of = {n: deltas(model, n).get(key) for n in weights}
        wanted = sum(w * of[n] for n, w in weights.items() if of[n] is not None)
        assert difference(delta, wanted) < 1e-14, key
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.adapters["mean"].r == 3 + 2 + 1
    assert layer.v_proj.adapters["mean"].r == 3 + 4
    assert not any(p.requires_grad for p in pk.adapter_parameters(model, "mean").values())
    pk.average_adapters(model, ["one", "three"])
    assert difference(
        deltas(model, "average")["model.layers.0.self_attn.k_proj"],
        sum(deltas(model, n)["model.layers.0.self_attn.k_proj"] for n in ("one", "three")) / 2,
    ) < 1e-14  # fmt: skip


def test_average_cut_to_a_rank_is_the_best_of_that_rank():
    model = three_adapters()
    pk.average_adapters(model, ["one", "two", "three"], new_name="whole")
    pk.average_adapters(model, ["one", "two", "three"], new_name="cut", r=2)
    for key, whole in deltas(model, "whole").items():
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        wanted = u[..., :2] * s[..., None, :2] @ v[..., :2, :]
        cut = deltas(model, "cut")[key]
        assert (cut - wanted).abs().max() < 1e-12 * whole.abs().max(), key
    assert model.model.layers[0].self_attn.q_proj.adapters["cut"].r == 2


def test_average_is_pefts_cat(tmp_path):
    model = two_adapters()
    for name in ("default", "value"):
        pk.save_adapter(model, tmp_path / name, name)
    peers = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "default")
    peers.load_adapter(tmp_path / "value", "value")
    peers.add_weighted_adapter(["default", "value"], [0.25, 0.75], "mean", "cat")
    peers.set_adapter("mean")
    pk.average_adapters(model, ["default", "value"], [0.25, 0.75], "mean")
    pk.set_adapter(model, "mean")
    assert difference(logits_of(model), logits_of(peers)) < 1e-5
    pk.save_adapter(model, tmp_path / "mean", "mean")
    again = tiny_model("llama")
    pk.load_adapter(again, tmp_path / "mean")
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter_names": ["default"]}, r"adapter_names is \['default'\]; wanted two different"),
        ({"adapter_names": ["value", "value"]}, "wanted two different ones or more"),
        ({"adapter_names": ["default", "other"]}, "no adapter 'other'; the model has"),
        ({"weights": [1.0]}, r"weights is \[1.0\]; wanted a finite number for each"),
        ({"weights": [1.0, math.nan]}, "wanted a finite number"),
        ({"new_name": "value"}, "already has an adapter 'value'; choose another new_name"),
        ({"r": 0}, "r is 0; wanted a rank"),
    ],
)
def test_averages_that_cannot_be_are_refused(given, message):
    model = two_adapters()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pk.average_adapters(model, **{"adapter_names": ["default", "value"], **given})
    assert list(model.state_dict()) == before


# ------------------------------------------------------------------------------------------------
# Inside transformers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_the_cache_is_the_greedy_loop_without(family):
    model = pk.apply_lora(tiny_model(family), pk.LoRAConfig(r=3))
    stir(model)
    generated = model.generate(
        tokens(), attention_mask=torch.ones_like(tokens()), max_new_tokens=6, do_sample=False,
        eos_token_id=VOCABULARY + 1,
    )  # fmt: skip
    wanted = tokens()
    with torch.no_grad():
        for _ in range(6):
            next_token = model(input_ids=wanted).logits[:, -1].argmax(-1, keepdim=True)
            wanted = torch.cat([wanted, next_token], dim=1)
    assert torch.equal(generated, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_same_gradients(use_reentrant):
    def gradients(checkpointing: bool, seed: int = 0) -> list[torch.Tensor]:
        model = pk.apply_lora(tiny_model("llama"), pk.LoRAConfig(r=3, dropout=0.4))
        stir(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(seed)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return [p.grad for p in pk.adapter_parameters(model).values()]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)
    assert any(
        not torch.equal(got, other)
        for got, other in zip(gradients(True), gradients(True, seed=1), strict=True)
    )
