"""pk.rms_norm: the law, Llama's and Gemma's own rounding, any layout, what it refuses."""

from __future__ import annotations

import pytest
import torch
from _compare import check_law

import perl_kernels as pk
from perl_kernels import _library
from perl_kernels.rms_norm import CASTING_MODES, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference"] if _library.missing["cpu"] else ["reference", "cpu"]
SIZES = [(1, 1), (3, 7), (65, 130), (33, 768), (5, 2049)]


def results(function, x, weight, dy, **options):
    x = x.detach().requires_grad_()
    y = function(x, weight, **options)
    return y.detach(), *torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("mode", CASTING_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_law(backend, dtype, mode):
    torch.manual_seed(0)
    for n, d in SIZES:
        x, dy = (3 * torch.randn(n, d)).to(dtype), torch.randn(n, d).to(dtype)
        weight = (1 + 0.3 * torch.randn(d)).to(dtype)
        options = {"eps": 1e-3, "offset": 1.0 if mode == "gemma" else 0.0, "casting_mode": mode}
        with pk.use_backend(backend):
            ours = results(pk.rms_norm, x, weight, dy, **options)
        plain = results(reference.rms_norm, x, weight, dy, **options)
        exact = results(reference.rms_norm, x.double(), weight.double(), dy.double(), **options)
        # one element is its own norm: its gradient is what rounding leaves of dn - dn
        scale = float((dy * weight).double().abs().mean()) if d == 1 else None
        check_law("y", ours[0], plain[0], exact[0], dtype)
        check_law("dx", ours[1], plain[1], exact[1], dtype, scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_as_the_models_do(backend):
    """16 bits: what their modules give, bit for bit but where the last bit of a sum shows."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    wide = x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    with pk.use_backend(backend):
        llama = pk.rms_norm(x, weight)
        gemma = pk.rms_norm(x, weight, offset=1.0, casting_mode="gemma")
    assert (llama == weight * n.bfloat16()).float().mean() > 0.999
    assert (gemma == (n * (1.0 + weight.float())).bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_gradient_and_layouts(backend):
    torch.manual_seed(0)
    weight = torch.randn(9, dtype=torch.float64)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    with pk.use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: pk.rms_norm(x, weight, offset=0.5), x)
        whole = torch.randn(2, 3, 18)
        for x in (
            whole[..., ::2],
            whole.transpose(0, 1)[..., :9],
            whole[0, :, 9:],
            whole[0, 0, :9],
        ):
            y = pk.rms_norm(x, weight.float()[: x.shape[-1]])
            torch.testing.assert_close(y, reference.rms_norm(x, weight.float()))
        assert pk.rms_norm(torch.zeros(0, 9), weight.float()).shape == (0, 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8)
    with pk.use_backend(backend):
        torch.library.opcheck(torch.ops.perl_kernels.rms_norm.default, (x, weight, 1e-6, 1.0, True))
        compiled = torch.compile(pk.rms_norm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weight), pk.rms_norm(x, weight))


def test_keeps_its_input_alone():
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    weight, kept = torch.ones(32).bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pk.rms_norm(x, weight)
    assert sorted(t.data_ptr() for t in kept) == sorted([x.data_ptr(), weight.data_ptr()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "x"}, "x is a str"),
        ({"x": torch.zeros(())}, "no elements to normalise"),
        ({"x": torch.zeros(3, 0), "weight": torch.zeros(0)}, "no elements to normalise"),
        ({"weight": torch.zeros(5)}, "weight has shape"),
        ({"weight": torch.zeros(4).bfloat16()}, "weight is torch.bfloat16"),
        ({"weight": torch.zeros(4, requires_grad=True)}, "frozen"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"casting_mode": "none"}, "casting_mode is 'none'; wanted one of llama, gemma"),
    ],
)
def test_refusals(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pk.rms_norm(**{"x": torch.zeros(3, 4), "weight": torch.zeros(4), **change})
