"""LoRALinear alone: the formula, its states, its types, what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import perl_kernels as pk

D, O, R = 13, 9, 5  # noqa: E741 - odd sizes, all different


def make_base(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    if kind == "conv1d":
        base = Conv1D(O, D)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(D, O, bias=kind == "linear")
    return base.to(dtype)


def make_layer(
    kind: str = "linear", dtype: torch.dtype = torch.float64, **adapter
) -> pk.LoRALinear:
    layer = pk.LoRALinear(make_base(kind, dtype))
    layer.add_adapter("default", R, 10.0, **adapter)
    nn.init.normal_(layer.lora_B["default"])
    return layer


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_and_gradients_are_the_formula(kind, use_rslora):
    layer = make_layer(kind, use_rslora=use_rslora)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, O, dtype=torch.float64)
    scale = 10.0 / math.sqrt(R) if use_rslora else 10.0 / R
    wanted = layer.base_layer(x) + scale * (x @ a.T @ b.T)
    y = layer(x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(y, (x, a, b), dy),
        torch.autograd.grad(wanted, (x, a, b), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_fresh_adapter_changes_nothing_and_a_is_kaiming_uniform():
    layer = pk.LoRALinear(nn.Linear(200, O))
    layer.add_adapter("default", 64)
    x = torch.randn(4, 200)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert layer.lora_B["default"].eq(0).all()
    a, bound = layer.lora_A["default"], 1 / math.sqrt(200)
    assert 0.98 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_dropout_only_in_training_and_repeats_with_the_seed():
    layer = make_layer(dtype=torch.float32, dropout=0.5)
    x = torch.randn(50, D)
    evaluated = layer.eval()(x)
    without = make_layer(dtype=torch.float32)
    without.load_state_dict(layer.state_dict())
    assert torch.equal(evaluated, without(x))

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer.train()(x)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(3), evaluated)
    rows = layer.train()(x[:1].expand(5000, D))
    deviation = rows.std(0) / math.sqrt(5000)
    assert ((rows.mean(0) - evaluated[0]).abs() < 5 * deviation).all()  # the kept are scaled up


def test_states_without_the_adapter_are_the_base_layer():
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(4, D)
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), base)
    layer.disabled = True
    assert torch.equal(layer(x), base)
    layer.disabled = False
    layer.set_adapter("elsewhere")
    assert torch.equal(layer(x), base)
    layer.set_adapter("default")
    layer.merge("default")
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_keeps_the_output_and_unmerge_brings_the_weight_back(kind, dtype):
    layer = make_layer(kind, dtype)
    with torch.no_grad():
        layer.lora_B["default"].mul_(0.1)
    eps = torch.finfo(dtype).eps
    x = torch.randn(40, D, dtype=dtype)
    before, weight = layer(x).double(), layer.weight.clone()
    layer.merge("default")
    assert not torch.equal(layer.weight, weight)
    merged = layer(x).double()
    # Rounding of D products of about unit size, in the weight's type.
    assert (merged - before).abs().max() < 4 * eps * math.sqrt(D) * before.abs().max()
    largest = torch.maximum(layer.weight.abs(), weight.abs()).double()
    layer.unmerge()
    assert ((layer.weight.double() - weight.double()).abs() <= 2 * eps * largest).all()


def test_only_the_active_adapter_requires_grad():
    layer = make_layer()
    layer.add_adapter("value", 3)
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A.default", "lora_B.default"}
    layer.set_adapter("value")
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A.value", "lora_B.value"}
    layer.set_adapter("default", freeze_others=False)
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert len(trainable) == 4


def test_base_attributes_and_state_dict():
    for kind in ("linear", "conv1d"):
        layer = make_layer(kind)
        assert (layer.in_features, layer.out_features) == (D, O)
        assert layer.weight is layer.base_layer.weight
        assert layer.bias is layer.base_layer.bias
        keys = ["base_layer.weight", "base_layer.bias", "lora_A.default", "lora_B.default"]
        assert sorted(layer.state_dict()) == sorted(keys)
    assert make_layer("linear without bias").bias is None


def test_deepcopy_is_independent():
    layer = make_layer()
    other = copy.deepcopy(layer)
    x = torch.randn(3, D, dtype=torch.float64)
    assert torch.equal(layer(x), other(x))
    nn.init.zeros_(other.lora_B["default"])
    other.disabled = True
    assert torch.equal(other(x), layer.base_layer(x))
    assert not torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_is_float32_over_a_16_bit_base_unless_told(dtype):
    layer = make_layer(dtype=dtype)
    x = torch.randn(6, D, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert layer.lora_A["default"].grad.dtype == torch.float32
    exact = layer.double()(x.double())
    assert (y.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()

    narrow = make_layer(dtype=dtype)
    narrow.add_adapter("narrow", R, dtype=dtype)
    narrow.set_adapter("narrow")
    assert narrow.lora_A["narrow"].dtype == dtype
    assert narrow(x).dtype == dtype
    with pytest.raises(ValueError, match="adapter dtype is torch.float64; wanted torch.float32 or"):
        narrow.add_adapter("wide", R, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(kind, dropout):
    layer = make_layer(kind, torch.float32, dropout=dropout)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, D)

    def run(function):
        torch.manual_seed(0)
        layer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        return y, layer.lora_A["default"].grad, layer.lora_B["default"].grad

    for got, want in zip(run(compiled), run(layer), strict=True):
        torch.testing.assert_close(got, want)
    layer.disabled = True
    assert torch.equal(compiled(x), layer.base_layer(x))


def test_compiles_to_one_graph_with_an_adapter_for_each_row():
    layer = make_layer(dtype=torch.float32)
    layer.add_adapter("other", 3)
    nn.init.normal_(layer.lora_B["other"])
    layer.set_adapter("other", freeze_others=False)
    model = nn.Sequential(layer)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, D)

    def run(function, names):
        layer.zero_grad()
        with pk.adapters_per_row(model, names):
            y = function(x)
        y.square().sum().backward()
        return [y, *(p.grad for p in layer.parameters() if p.requires_grad)]

    for names in (["default", None, "other"], ["other", "default", "default"]):
        wanted = run(model, names)
        assert len(wanted) == 5
        for got, want in zip(run(compiled, names), wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_autocast_runs_in_its_dtype():
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(4, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 0}, "r is 0; wanted a rank of at least 1"),
        ({"alpha": -1.0}, "alpha is -1.0; wanted a positive number"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"dropout": 1.0}, r"dropout is 1.0; wanted a probability in \[0, 1\)"),
        ({"name": "default"}, "adapter 'default' is already here"),
        ({"name": "a.b"}, "adapter name is 'a.b'; wanted a plain name"),
        ({"name": "values"}, "adapter name is 'values'"),
    ],
)
def test_bad_adapters_are_refused_by_name(given, message):
    layer = make_layer()
    with pytest.raises(ValueError, match=message):
        layer.add_adapter(**({"name": "new"} | given))
    assert list(layer.adapters) == ["default"]


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


def own_forward(base: nn.Linear) -> nn.Linear:
    base.__class__ = OwnForward
    return base


def hooked(base: nn.Linear) -> nn.Linear:
    base.register_forward_hook(lambda module, args, y: y.tanh())
    return base


def replaced_forward(base: nn.Linear) -> nn.Linear:  # as accelerate does to move weights about
    base.forward = lambda x: nn.Linear.forward(base, x).tanh()
    return base


@pytest.mark.parametrize("change", [own_forward, hooked, replaced_forward])
def test_bases_that_have_to_be_called_are_called(change):
    layer = make_layer(dtype=torch.float32, dropout=0.5)
    change(layer.base_layer)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    x = torch.randn(6, D)

    def formula(x):
        return torch.tanh(x @ layer.weight.T + layer.bias) + 10.0 / R * (x @ a.T @ b.T)

    layer.eval()
    assert (row := pk.explain(layer)[0]).route == "plain LoRA" and row.why
    torch.testing.assert_close(layer(x), formula(x))
    gradients = torch.autograd.grad(layer(x).sum(), (a, b))
    for got, want in zip(gradients, torch.autograd.grad(formula(x).sum(), (a, b)), strict=True):
        torch.testing.assert_close(got, want)
    layer.train()
    assert not torch.equal(layer(x), layer(x))  # dropout
    layer.bfloat16()
    layer.lora_A["default"].data = a.data.float()  # as over a 16-bit base by default
    layer.lora_B["default"].data = b.data.float()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_bad_bases_are_refused_by_name():
    quantised = nn.Linear(D, O).requires_grad_(False)
    quantised.weight = nn.Parameter(torch.zeros(O, D, dtype=torch.int8), requires_grad=False)
    for base, message in (
        (nn.Embedding(4, 5), "Embedding; LoRALinear adapts nn.Linear and Conv1D"),
        (nn.MultiheadAttention(4, 2).out_proj, "NonDynamicallyQuantizableLinear"),
        (quantised, "quantised bases are not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.LoRALinear(base)
