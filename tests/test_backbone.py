"""One backbone, many roles: shared memory, isolation, files that PEFT and transformers read."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from _tiny import FAMILIES, VOCABULARY, perturb, save_tiny, tiny_model, tiny_tokenizer
from peft import PeftModel
from torch import nn

import perl_kernels as pk
from perl.backbone import Backbone
from perl.config import UsageError
from perl.data import pad
from perl.optimizer import Optimizer

SENTENCES = [[1, 7, 9, 30, 55, 3], [1, 200], [1, 8, 17, 260]]


def make(tuning="lora", family="llama", reference=True, **changes) -> Backbone:
    return Backbone.load(
        model=tiny_model(family, **changes),
        tokenizer=tiny_tokenizer(),
        tuning=tuning,
        lora=pk.LoRAConfig(r=3, alpha=6),
        reference=reference,
    )


def storages(module: nn.Module) -> dict[int, int]:
    """Address and bytes of everything a module holds, tied tensors once."""
    return {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()
    }


def batch(left: bool = False):
    return pad(SENTENCES, 0, left=left)


# ------------------------------------------------------------------------------------- memory


def test_four_roles_live_in_the_memory_of_one_model(tmp_path):
    trained = make()
    trained.add_role("reward", scalar=True)
    trained.save_role("reward", tmp_path / "reward")

    backbone = make()
    base = {key: p.data_ptr() for key, p in backbone.model.named_parameters()}
    before = sum(storages(backbone.model).values())
    backbone.add_role("policy")
    backbone.add_role("value", scalar=True)
    backbone.load_role("reward", tmp_path / "reward")
    now = {
        key.replace(".base_layer", ""): p.data_ptr()
        for key, p in backbone.model.named_parameters()
        if "lora_" not in key
    }
    assert now == base  # not one frozen weight was copied
    adapters = sum(p.numel() * 4 for key, p in backbone.model.named_parameters() if "lora_" in key)
    assert adapters > 0
    assert sum(storages(backbone.model).values()) == before + adapters
    assert backbone.head("policy").weight is backbone.head(None).weight
    told = backbone.role_bytes()
    assert told["reference"] == {"weights": before} and told["reward"].keys() == {"weights"}
    heads = 2 * 4 * backbone.config.hidden_size  # of value and reward
    assert sum(role["weights"] for role in told.values()) == before + adapters + heads


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_roles_are_told_by_what_training_makes_of_them(tuning, tmp_path):
    backbone = make(tuning)
    other = tiny_model(seed=1, scalar=True)
    other.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backbone.load_role("reward", tmp_path)
    backbone.add_role("value", scalar=True)
    optimizer = Optimizer(backbone.trainable("value"), lr=1e-3)
    backbone.values("value", *batch()).sum().backward()
    gradients = sum(p.grad.nbytes for _, p in backbone.trainable("value"))
    optimizer.step(1)
    moments = sum(t.nbytes for key, t in optimizer.state().items() if not key.endswith("/step"))
    told = backbone.role_bytes()
    assert told == {
        "reward": {"weights": sum(storages(other).values())},
        "value": {"weights": gradients, "gradients": gradients, "optimizer": moments},
        "reference": {"weights": sum(storages(tiny_model()).values())},
    }


def test_full_tuning_owns_every_weight_and_leaves_the_reference_untouched(tmp_path):
    backbone = make("full")
    original = {key: p.clone() for key, p in backbone.model.named_parameters()}
    backbone.add_role("policy")
    backbone.add_role("value", scalar=True)
    models = [backbone.model, *(backbone._roles[r].model for r in ("policy", "value"))]
    held = [set(storages(model)) for model in models]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    ids, mask = batch()
    optimizer = torch.optim.SGD([p for _, p in backbone.trainable("policy")], lr=1.0)
    backbone.hidden("policy", ids, mask).square().sum().backward()
    optimizer.step()
    assert all(p.equal(original[key]) for key, p in backbone.model.named_parameters())
    assert not backbone.hidden("policy", ids, mask).equal(backbone.hidden(None, ids, mask))


def test_full_tuning_without_a_reference_trains_the_loaded_model_itself():
    model = tiny_model()
    backbone = Backbone.load(model=model, tokenizer=tiny_tokenizer(), tuning="full")
    backbone.add_role("policy")
    assert {id(p) for _, p in backbone.trainable("policy")} == {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="reference=True"):
        backbone.hidden(None, *batch())
    with pytest.raises(ValueError, match="reference=True"):
        backbone.add_role("value", scalar=True)


# ---------------------------------------------------------------------------------- isolation


def test_a_new_role_is_the_reference_and_training_it_moves_nothing_else():
    backbone = make()
    ids, mask = batch()
    reference = backbone.hidden(None, ids, mask)
    backbone.add_role("policy")
    backbone.add_role("value", scalar=True)
    torch.testing.assert_close(backbone.hidden("policy", ids, mask), reference)
    values = backbone.values("value", ids, mask)
    perturb(backbone.trainable("policy"))
    assert not backbone.hidden("policy", ids, mask).allclose(reference, atol=1e-3)
    assert backbone.hidden(None, ids, mask).equal(reference)
    assert backbone.values("value", ids, mask).equal(values)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_gradients_reach_their_own_role_even_when_another_ran_in_between(tuning):
    backbone = make(tuning)
    for role, scalar in (("policy", False), ("value", True)):
        backbone.add_role(role, scalar=scalar)
        perturb(backbone.trainable(role))
    ids, mask = batch()

    def gradients(role):
        return [None if p.grad is None else p.grad.clone() for _, p in backbone.trainable(role)]

    def clear():
        for role in ("policy", "value"):
            for _, parameter in backbone.trainable(role):
                parameter.grad = None

    backbone.hidden("policy", ids, mask).square().sum().backward()
    assert all(g is None for g in gradients("value"))
    alone = gradients("policy")
    clear()
    loss = backbone.hidden("policy", ids, mask).square().sum()
    values = backbone.values("value", ids, mask).square().sum()
    backbone.hidden(None, ids, mask)
    (loss + values).backward()
    counted = 0
    for mine, wanted in zip(gradients("policy"), alone, strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None:
            torch.testing.assert_close(mine, wanted)
            counted += int(mine.abs().sum() > 0)
    assert counted > 0
    assert any(g is not None and g.abs().sum() > 0 for g in gradients("value"))
    assert all(p.grad is None for key, p in backbone.model.named_parameters() if "lora" not in key)


def test_a_loaded_role_is_frozen_unless_it_is_to_be_trained(tmp_path):
    trained = make()
    trained.add_role("reward", scalar=True)
    trained.save_role("reward", tmp_path)
    backbone = make()
    backbone.add_role("policy")
    backbone.load_role("reward", tmp_path)
    backbone.load_role("value", tmp_path, trainable=True)
    assert backbone.trainable("reward") == []
    ids, mask = batch()
    assert not backbone.score("reward", ids, mask).requires_grad
    backbone.score("value", ids, mask).sum().backward()
    assert all(p.grad is not None for _, p in backbone.trainable("value"))


def test_dropout_is_the_adapters_own_and_on_only_with_gradients():
    model = tiny_model(attention_dropout=0.5)
    lora = pk.LoRAConfig(r=3, dropout=0.5)
    backbone = Backbone.load(model=model, tokenizer=tiny_tokenizer(), lora=lora)
    ids, mask = batch()
    assert backbone.hidden(None, ids, mask).equal(backbone.hidden(None, ids, mask))
    backbone.add_role("policy")
    perturb(backbone.trainable("policy"))
    first, second = (backbone.hidden("policy", ids, mask) for _ in range(2))
    assert not first.equal(second)
    with torch.no_grad():
        first, second = (backbone.hidden("policy", ids, mask) for _ in range(2))
    assert first.equal(second)


# ------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family):
    backbone = make(family=family)
    backbone.add_role("reward", scalar=True)
    perturb(backbone.trainable("reward"))
    alone = torch.cat([
        backbone.score("reward", torch.tensor([s]), torch.ones(1, len(s), dtype=torch.long))
        for s in SENTENCES
    ])  # fmt: skip
    for left in (True, False):
        ids, mask = batch(left)
        torch.testing.assert_close(backbone.score("reward", ids, mask), alone)
        hidden = backbone.hidden("reward", ids, mask)
        assert hidden.isfinite().all()
        (hidden * mask.unsqueeze(-1)).square().sum().backward()
        for _, parameter in backbone.trainable("reward"):
            assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_make_the_models_logits(family):
    backbone = make(family=family)
    head = backbone.head()
    assert (head.softcap is not None) == (family == "gemma2") and head.a is None
    ids, mask = batch()
    log_prob = pk.linear_log_prob(
        backbone.hidden(None, ids, mask)[:, :-1], head.weight, ids[:, 1:], **head.options
    )
    logits = backbone.model(ids, attention_mask=mask).logits[:, :-1]
    wanted = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(log_prob * mask[:, 1:], wanted * mask[:, 1:])


def test_scores_are_float32_over_a_bfloat16_base():
    backbone = Backbone.load(model=tiny_model(), tokenizer=tiny_tokenizer(), dtype="bfloat16")
    backbone.add_role("value", scalar=True)
    ids, mask = batch()
    assert backbone.hidden("value", ids, mask).dtype == torch.bfloat16
    assert backbone.values("value", ids, mask).dtype == torch.float32
    assert backbone.score("value", ids, mask).dtype == torch.float32


def test_values_at_the_last_token_are_the_score():
    backbone = make()
    backbone.add_role("value", scalar=True)
    ids, mask = batch()
    values = backbone.values("value", ids, mask)
    last = values[torch.arange(3), mask.sum(1) - 1]
    torch.testing.assert_close(backbone.score("value", ids, mask), last)


# -------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_a_policy_with_equal_logits(tmp_path, family):
    base = save_tiny(tmp_path / "base", family)
    backbone = Backbone.load(base, lora=pk.LoRAConfig(r=3))
    backbone.add_role("policy")
    backbone.add_role("value", scalar=True)
    perturb(backbone.trainable("policy"))
    backbone.save_role("policy", tmp_path / "policy")
    ids, mask = batch()
    ours = backbone.hidden("policy", ids, mask) @ backbone.head().weight.T
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(model, tmp_path / "policy")
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], logits[mask.bool()])
    plain = backbone.hidden(None, ids, mask) @ backbone.head().weight.T
    assert not plain[mask.bool()].allclose(logits[mask.bool()], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_peft_loads_a_reward_model_with_equal_scores(tmp_path, family):
    base = save_tiny(tmp_path / "base", family)
    backbone = Backbone.load(base, lora=pk.LoRAConfig(r=3))
    backbone.add_role("reward", scalar=True)
    perturb(backbone.trainable("reward"))
    backbone.save_role("reward", tmp_path / "reward")
    config = json.loads((tmp_path / "reward/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = PeftModel.from_pretrained(model, tmp_path / "reward")
    ids, mask = batch()
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(backbone.score("reward", ids, mask), wanted)


def test_full_tuning_writes_plain_transformers_folders(tmp_path):
    backbone = make("full")
    backbone.add_role("policy")
    backbone.add_role("reward", scalar=True)
    perturb(backbone.trainable("policy"), scale=0.02)
    perturb(backbone.trainable("reward"), scale=0.02)
    ids, mask = batch()
    for role, kind in (
        ("policy", transformers.AutoModelForCausalLM),
        ("reward", transformers.AutoModelForSequenceClassification),
    ):
        backbone.save_role(role, tmp_path / role)
        with torch.no_grad():
            theirs = kind.from_pretrained(tmp_path / role)(input_ids=ids, attention_mask=mask)
        if role == "reward":
            torch.testing.assert_close(
                backbone.score("reward", ids, mask), theirs.logits.squeeze(-1)
            )
        else:
            ours = backbone.hidden(role, ids, mask) @ backbone.head(role).weight.T
            torch.testing.assert_close(ours[mask.bool()], theirs.logits[mask.bool()])
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / role).eos_token == "<eos>"


@pytest.mark.parametrize("saved", ["lora", "full"])
@pytest.mark.parametrize("loaded", ["lora", "full"])
def test_roles_come_back_bit_for_bit_under_either_tuning(tmp_path, saved, loaded):
    source = make(saved)
    ids, mask = batch()
    for role, scalar in (("policy", False), ("reward", True)):
        source.add_role(role, scalar=scalar)
        perturb(source.trainable(role), scale=0.02)
        source.save_role(role, tmp_path / role)
    backbone = make(loaded)
    reference = backbone.hidden(None, ids, mask)
    backbone.load_role("policy", tmp_path / "policy", trainable=True)
    backbone.load_role("reward", tmp_path / "reward")
    with torch.no_grad():
        for role in ("policy", "reward"):
            assert backbone.hidden(role, ids, mask).equal(source.hidden(role, ids, mask))
        assert backbone.score("reward", ids, mask).equal(source.score("reward", ids, mask))
        assert backbone.hidden(None, ids, mask).equal(reference)
    if saved == loaded:
        names = [key for key, _ in source.trainable("policy")]
        assert [key for key, _ in backbone.trainable("policy")] == names


def test_an_adapter_given_as_model_is_merged_into_its_base(tmp_path):
    base = save_tiny(tmp_path / "base")
    backbone = Backbone.load(base, lora=pk.LoRAConfig(r=3))
    backbone.add_role("policy")
    perturb(backbone.trainable("policy"))
    run = tmp_path / "run"
    backbone.save_role("policy", run / "policy")
    (run / "config.toml").write_text("")
    ids, mask = batch()
    with torch.no_grad():
        wanted = backbone.hidden("policy", ids, mask)
    for path in (run / "policy", run):
        merged = Backbone.load(path)
        torch.testing.assert_close(merged.hidden(None, ids, mask), wanted)
        assert not any(isinstance(m, pk.LoRALinear) for m in merged.model.modules())
    # An adapter trained on the merged model finds its way back through both.
    merged.add_role("policy")
    perturb(merged.trainable("policy"), seed=3)
    merged.save_role("policy", tmp_path / "second")
    with torch.no_grad():
        wanted = merged.hidden("policy", ids, mask)
    torch.testing.assert_close(Backbone.load(tmp_path / "second").hidden(None, ids, mask), wanted)


# ------------------------------------------------------------------------------------ identity


def test_the_same_base_is_recognised_in_another_dtype_and_a_tuned_one_is_not(tmp_path):
    base = save_tiny(tmp_path)
    identity = Backbone.load(base).identity
    assert Backbone.load(base, dtype="bfloat16").identity == identity
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    tuned = Backbone.load(model=model, tokenizer=tiny_tokenizer()).identity
    assert tuned["parameters"] == identity["parameters"]
    assert tuned["weights"] != identity["weights"]


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path):
    save_tiny(tmp_path / "base")
    source = Backbone.load(tmp_path / "base", lora=pk.LoRAConfig(r=3))
    source.add_role("reward", scalar=True)
    source.save_role("reward", tmp_path / "reward")
    with pytest.raises(UsageError, match=f"another base .*weights.*{tmp_path / 'base'}"):
        make(seed=5).load_role("reward", tmp_path / "reward")
    with pytest.raises(UsageError, match="hidden_size 32 not 64"):
        make(hidden_size=64).load_role("reward", tmp_path / "reward")
    (tmp_path / "reward/base.json").unlink()  # as PEFT writes it: only shapes tell
    with pytest.raises(UsageError, match="does not fit"):
        make(hidden_size=64).load_role("reward", tmp_path / "reward")


# ------------------------------------------------------------------------------------ refusals


def test_models_that_are_not_there_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no model folder"):
        Backbone.load(tmp_path / "absent")
    with pytest.raises(UsageError, match="no config.json"):
        Backbone.load(tmp_path)
    with pytest.raises(UsageError, match="neither an adapter nor a model"):
        make().load_role("reward", tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UsageError, match="cannot load model"):
        Backbone.load(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="runs/abzent .no folder here, so taken for a name on the"):
        Backbone.load("runs/abzent")


def test_a_model_without_a_tokenizer_is_refused_in_words(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no tokenizer in .*: .*sentencepiece"):
        Backbone.load(tmp_path)


def test_weights_that_a_folder_lacks_are_refused(tmp_path):
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UsageError, match="lack model.layers.2"):
        Backbone.load(tmp_path)


def test_a_reward_model_is_no_language_model(tmp_path):
    save_tiny(tmp_path / "base")
    backbone = Backbone.load(tmp_path / "base")
    backbone.add_role("reward", scalar=True)
    backbone.save_role("reward", tmp_path / "reward")
    with pytest.raises(UsageError, match="not a language model"):
        Backbone.load(tmp_path / "reward")
    with pytest.raises(ValueError, match="no scalar head"):
        backbone.add_role("policy")
        backbone.score("policy", *batch())


def test_tokenizers_without_an_end_or_too_many_tokens_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        Backbone.load(model=tiny_model(), tokenizer=tokenizer)
    with pytest.raises(UsageError, match="tokens and the model 100 rows"):
        Backbone.load(model=tiny_model(vocab_size=100), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("given", [None, "<eos>"])
def test_a_tokenizer_without_padding_of_its_own_gets_a_filler(given):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = given
    assert Backbone.load(model=tiny_model(), tokenizer=tokenizer).tokenizer.pad_token == "<bos>"
    tokenizer.pad_token, tokenizer.bos_token = given, None
    assert Backbone.load(model=tiny_model(), tokenizer=tokenizer).tokenizer.pad_token == "<eos>"


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path):
    other = make("full")
    other.add_role("reward", scalar=True)
    other.tokenizer.add_tokens(["<extra>"])
    other.save_role("reward", tmp_path)
    with pytest.raises(UsageError, match="another tokenizer"):
        make().load_role("reward", tmp_path)


def test_families_with_more_than_a_head_are_refused():
    config = transformers.GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, logits_scaling=3.0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    nn.init.normal_(model.get_input_embeddings().weight)
    nn.init.normal_(model.get_output_embeddings().weight)
    with pytest.raises(UsageError, match="granite.*not supported"):
        Backbone.load(model=model, tokenizer=tiny_tokenizer())


def make_adapted(targets, family="llama", **config) -> Backbone:
    lora = pk.LoRAConfig(r=3, alpha=6, target_modules=targets, **config)
    return Backbone.load(model=tiny_model(family), tokenizer=tiny_tokenizer(), lora=lora)


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="matches no module"):
        make_adapted(["no_such"]).add_role("policy")
    with pytest.raises(UsageError, match="LM head, and a scalar role has none"):
        make_adapted(["q_proj", "lm_head"]).add_role("reward", scalar=True)
    alone = make_adapted(["lm_head"])
    alone.add_role("policy")
    with pytest.raises(UsageError, match="LM head alone, and a scalar role has none"):
        alone.add_role("value", scalar=True)
    with pytest.raises(UsageError, match="the LM head has dropout 0.1"):
        make_adapted(["q_proj", "lm_head"], dropout=0.1).add_role("policy")


# ------------------------------------------------------------------------------- adapted LM head


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "(.*q_proj)|(lm_head)"], ids=str)
def test_an_adapted_head_is_the_policys_alone(targets):
    backbone, (ids, mask) = make_adapted(targets), batch()
    before = backbone.head()
    backbone.add_role("policy")
    backbone.add_role("value", scalar=True)
    perturb(backbone.trainable("policy"))
    head = backbone.head("policy")
    assert head.a.shape[0] == 3 and head.scale == 2.0 and head.a.requires_grad
    for role in (None, "value"):
        frozen = backbone.head(role)
        assert frozen.a is None and frozen.b is None and frozen.weight is before.weight
    names = {role: [key for key, _ in backbone.trainable(role)] for role in ("policy", "value")}
    assert {"lm_head.lora_A", "lm_head.lora_B"} < set(names["policy"])
    assert not any("lm_head" in name for name in names["value"])
    with torch.no_grad():
        log_prob = pk.linear_log_prob(
            backbone.hidden("policy", ids, mask), head.weight, ids, **head.options
        )
        pk.set_adapter(backbone.model, "policy")
        logits = backbone.model(ids, attention_mask=mask).logits
    wanted = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(log_prob[0], wanted[0])


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: embeddings tied, and a softcap
def test_an_adapted_head_is_saved_and_merged(family, tmp_path):
    base = save_tiny(tmp_path / "base", family)
    lora = pk.LoRAConfig(r=3, target_modules=["v_proj", "lm_head"])
    source = Backbone.load(base, lora=lora)
    source.add_role("policy")
    perturb(source.trainable("policy"))
    source.save_role("policy", tmp_path / "policy")

    def log_prob(backbone, role):
        ids, mask = batch()
        hidden, head = backbone.hidden(role, ids, mask), backbone.head(role)
        return pk.linear_log_prob(hidden, head.weight, ids, **head.options)[mask.bool()]

    with torch.no_grad():
        wanted = log_prob(source, "policy")
        assert not torch.allclose(wanted, log_prob(source, None))
        loaded = Backbone.load(base)
        loaded.load_role("policy", tmp_path / "policy")
        torch.testing.assert_close(log_prob(loaded, "policy"), wanted)
        merged = Backbone.load(tmp_path / "policy")
        torch.testing.assert_close(log_prob(merged, None), wanted, rtol=1e-4, atol=1e-4)
        merged.model.save_pretrained(tmp_path / "merged")
        merged.tokenizer.save_pretrained(tmp_path / "merged")
        again = Backbone.load(tmp_path / "merged")
        assert log_prob(again, None).equal(log_prob(merged, None))


def test_sequences_beyond_the_context_are_refused():
    ids = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(UsageError, match="65 tokens does not fit the 64"):
        make().hidden(None, ids, torch.ones_like(ids))
