import itertools

import pytest
import torch
from _compare import check_law, doubled
from torch.utils.checkpoint import checkpoint

import perl_kernels as pk
from perl_kernels import _dropout
from perl_kernels.lora_linear import reference

# (N, D, O, R). 507, 123, 45: multiples of no tile or vector width. R = 5 and 17: below and above
# one vector. N = 1: decode. D = 3: smaller than one Philox group. O = 1: a scalar head.
SIZES = [(507, 123, 45, 5), (64, 64, 192, 16), (1, 123, 77, 17), (33, 3, 1, 1), (130, 257, 96, 64)]


def make(n, d, o, r, dtype, adapter_dtype=None, bias=True):
    tensors = {
        "x": torch.randn(n, d).to(dtype).requires_grad_(),
        "weight": (torch.randn(o, d) / d**0.5).to(dtype),
        "a": (torch.randn(r, d) / d**0.5).to(adapter_dtype or dtype).requires_grad_(),
        "b": torch.randn(o, r).to(adapter_dtype or dtype).requires_grad_(),
        "bias": torch.randn(o).to(dtype).requires_grad_() if bias else None,
    }
    return tensors


def outputs_and_gradients(function, tensors, dy, **options):
    y = function(**tensors, **options)
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def plain(x, weight, a, b, bias, scale):
    """What people write today, in the dtype given."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    return reference.lora_linear(x, weight, a, b, bias=bias, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_error_is_no_worse_than_plain_torch(backend, sizes, dtype):
    tensors = make(*sizes, dtype, bias=sizes[3] % 2 == 1)
    dy = torch.randn(sizes[0], sizes[2]).to(dtype)
    exact = outputs_and_gradients(plain, doubled(tensors), dy, scale=0.7)
    theirs = outputs_and_gradients(plain, tensors, dy, scale=0.7)
    ours = outputs_and_gradients(pk.lora_linear, tensors, dy, scale=0.7)
    assert ours.keys() == exact.keys()
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float32_adapters_on_a_narrow_base_get_float32_gradients(backend, dtype):
    tensors = make(65, 48, 33, 5, dtype, adapter_dtype=torch.float32)
    dy = torch.randn(65, 33).to(dtype)
    exact = outputs_and_gradients(plain, doubled(tensors), dy, scale=2.0)
    theirs = outputs_and_gradients(plain, tensors, dy, scale=2.0)
    ours = outputs_and_gradients(pk.lora_linear, tensors, dy, scale=2.0)
    assert ours["da"].dtype == ours["db"].dtype == torch.float32
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_the_mask_of_the_counter(backend, p):
    """With the seed known, output and gradients equal the reference's with the same seed."""
    tensors = make(37, 123, 21, 5, torch.float32)
    dy = torch.randn(37, 21)
    torch.manual_seed(11)
    seed = _dropout.new_seed(torch.device("cpu"))
    torch.manual_seed(11)
    ours = outputs_and_gradients(pk.lora_linear, tensors, dy, scale=0.5, dropout_p=p)
    exact = outputs_and_gradients(
        reference.lora_linear, doubled(tensors), dy, scale=0.5, dropout_p=p, seed=seed
    )
    theirs = outputs_and_gradients(
        reference.lora_linear, tensors, dy, scale=0.5, dropout_p=p, seed=seed
    )
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], torch.float32)


def test_dropout_mask_statistics():
    """Philox-4x32-7 known answer (key and counter zero), the rate, and independence of seeds."""
    words = _dropout.philox_words(torch.tensor(0), 1, 1)[0, 0].tolist()
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    masks = [_dropout.keep_mask(torch.tensor(s), 500, 401, 0.3).float() for s in (1, 2)]
    for mask in masks:
        assert abs(mask.mean().item() - 0.7) < 5 * (0.21 / mask.numel()) ** 0.5
    agreement = (masks[0] == masks[1]).float().mean().item()
    assert abs(agreement - (0.49 + 0.09)) < 0.01


def test_dropout_repeats_with_the_seed_and_differs_without(backend):
    tensors = make(9, 40, 8, 3, torch.float32)
    torch.manual_seed(5)
    first = pk.lora_linear(**tensors, dropout_p=0.4)
    second = pk.lora_linear(**tensors, dropout_p=0.4)
    torch.manual_seed(5)
    again = pk.lora_linear(**tensors, dropout_p=0.4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(backend, use_reentrant):
    tensors = make(17, 24, 10, 4, torch.float32)

    def run(wrap):
        torch.manual_seed(3)
        y = wrap(lambda x: pk.lora_linear(x, **rest, dropout_p=0.3), tensors["x"])
        return torch.autograd.grad(y.square().sum(), (tensors["x"], rest["a"], rest["b"]))

    rest = {k: v for k, v in tensors.items() if k != "x"}
    rest["bias"] = rest["bias"].detach()
    if use_reentrant:  # reentrant checkpointing only supports backward()
        torch.manual_seed(3)
        leaves = (tensors["x"], rest["a"], rest["b"])
        y = checkpoint(
            lambda x: pk.lora_linear(x, **rest, dropout_p=0.3), tensors["x"], use_reentrant=True
        )
        y.square().sum().backward()
        recomputed = [t.grad for t in leaves]
    else:
        recomputed = run(lambda f, x: checkpoint(f, x, use_reentrant=False))
    stored = run(lambda f, x: f(x))
    for one, other in zip(stored, recomputed, strict=True):
        assert torch.equal(one, other)


def test_projections_that_share_x_equal_one_call_each(backend):
    x = torch.randn(31, 40, requires_grad=True)
    shapes = [(24, 5), (8, 2), (8, 7)]
    weight = [torch.randn(o, 40) for o, _ in shapes]
    a = [torch.randn(r, 40, requires_grad=True) for _, r in shapes]
    b = [torch.randn(o, r, requires_grad=True) for o, r in shapes]
    bias = [torch.randn(24), None, torch.randn(8)]
    scale = [0.5, 1.0, 2.0]
    dy = [torch.randn(31, o) for o, _ in shapes]
    together = pk.lora_linear(x, weight, a, b, bias=bias, scale=scale)
    singly = [
        pk.lora_linear(x, weight[i], a[i], b[i], bias=bias[i], scale=scale[i]) for i in range(3)
    ]
    for one, other in zip(together, singly, strict=True):
        torch.testing.assert_close(one, other)
    leaves = [x, *a, *b]
    grads = torch.autograd.grad(together, leaves, dy)
    expected = torch.autograd.grad(singly, leaves, dy)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_unused_projection_gets_zero_gradients(backend):
    x = torch.randn(4, 6, requires_grad=True)
    weight = [torch.randn(5, 6), torch.randn(3, 6)]
    a = [torch.randn(2, 6, requires_grad=True) for _ in weight]
    b = [torch.randn(w.shape[0], 2, requires_grad=True) for w in weight]
    used, _ = pk.lora_linear(x, weight, a, b)
    used.sum().backward()
    assert a[1].grad is None or not a[1].grad.any()
    expected = torch.autograd.grad(plain(x, weight[0], a[0], b[0], None, 1.0).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("case", ["transposed weight", "strided x", "3-D x", "expanded dy", "N=0"])
def test_layouts(backend, case):
    x, weight = torch.randn(6, 4, 10), torch.randn(7, 10)
    a, b = torch.randn(3, 10, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    if case == "transposed weight":
        weight = torch.randn(10, 7).t()
    elif case == "strided x":
        x = torch.randn(6, 4, 20)[..., ::2]
    elif case == "N=0":
        x = x[:0]
    x = x.detach().requires_grad_()
    y = pk.lora_linear(x, weight, a, b, scale=3.0)
    expected = plain(x, weight, a, b, None, 3.0)
    assert y.shape == (*x.shape[:-1], 7)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(()).expand(y.shape) if case == "expanded dy" else torch.randn(y.shape)
    ours = torch.autograd.grad(y, (x, a, b), dy)
    theirs = torch.autograd.grad(expected, (x, a, b), dy)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_gradients_that_nobody_asked_for_are_not_computed(backend):
    tensors = make(5, 8, 6, 2, torch.float32, bias=False)
    frozen = {k: v.detach() if v is not None else None for k, v in tensors.items()}
    only_x = pk.lora_linear(**{**frozen, "x": tensors["x"]})
    only_x.sum().backward()
    assert tensors["x"].grad is not None
    only_adapter = pk.lora_linear(**{**tensors, "x": frozen["x"]})
    only_adapter.sum().backward()
    assert tensors["a"].grad is not None and tensors["b"].grad is not None


def test_reference_gradcheck():
    tensors = make(4, 5, 3, 2, torch.float64)
    seed = torch.tensor(9)
    torch.autograd.gradcheck(
        lambda x, a, b, bias: reference.lora_linear(
            x, tensors["weight"], a, b, bias=bias, scale=0.5, dropout_p=0.25, seed=seed
        ),
        (tensors["x"], tensors["a"], tensors["b"], tensors["bias"]),
    )


def test_float64_runs_and_gradchecks():
    t = make(4, 5, 3, 2, torch.float64)
    torch.autograd.gradcheck(
        lambda x, a, b, bias: pk.lora_linear(x, t["weight"], a, b, bias=bias, scale=0.5),
        (t["x"], t["a"], t["b"], t["bias"]),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(backend, dropout_p, with_bias):
    x = torch.randn(5, 7, requires_grad=True)
    weight = [torch.randn(3, 7), torch.randn(4, 7)]
    bias = [torch.randn(3, requires_grad=True), torch.randn(4)] if with_bias else []
    a = [torch.randn(2, 7, requires_grad=True), torch.randn(1, 7, requires_grad=True)]
    b = [torch.randn(3, 2, requires_grad=True), torch.randn(4, 1, requires_grad=True)]
    seed = torch.tensor(5) if dropout_p else None
    torch.library.opcheck(
        torch.ops.perl_kernels.lora_linear.default,
        (x, weight, bias, a, b, [1.0, 2.0], dropout_p, seed),
    )


def test_compiles_without_a_graph_break(backend):
    t = make(6, 8, 5, 2, torch.float32)
    function = torch.compile(
        lambda x: pk.lora_linear(x, t["weight"], t["a"], t["b"], bias=t["bias"]).relu(),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = plain(t["x"], t["weight"], t["a"], t["b"], t["bias"], 1.0).relu()
    torch.testing.assert_close(function(t["x"]), expected)
    ours = torch.autograd.grad(function(t["x"]).sum(), (t["x"], t["a"], t["b"]))
    theirs = torch.autograd.grad(expected.sum(), (t["x"], t["a"], t["b"]))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_runs_in_its_dtype(backend):
    t = make(6, 8, 5, 2, torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.lora_linear(**t)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert t["a"].grad.dtype == torch.float32 and t["x"].grad.dtype == torch.float32


def bad_calls():
    x, w, a, b = torch.randn(4, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    yield "features", dict(x=x[:, :5], weight=w, a=a, b=b), ValueError, "x has 5 features"
    yield "a", dict(x=x, weight=w, a=a[:, :5], b=b), ValueError, r"a has shape \(2, 5\)"
    yield "b", dict(x=x, weight=w, a=a, b=b[:4]), ValueError, r"wanted \(O, R\) = \(5, 2\)"
    yield "rank 0", dict(x=x, weight=w, a=a[:0], b=b[:, :0]), ValueError, "rank 0"
    yield "dtype", dict(x=x, weight=w.half(), a=a, b=b), TypeError, "weight is torch.float16"
    yield "int", dict(x=x.long(), weight=w, a=a, b=b), TypeError, "x is torch.int64"
    yield "p", dict(x=x, weight=w, a=a, b=b, dropout_p=1.0), ValueError, "dropout_p is 1.0"
    yield "nan p", dict(x=x, weight=w, a=a, b=b, dropout_p=float("nan")), ValueError, "dropout_p"
    trained = w.clone().requires_grad_()
    yield "frozen", dict(x=x, weight=trained, a=a, b=b), ValueError, "frozen"
    yield "bias", dict(x=x, weight=w, a=a, b=b, bias=w[0]), ValueError, "bias has shape"
    yield "lists", dict(x=x, weight=[w, w], a=[a], b=[b, b]), ValueError, "a has 1 entries"
    yield "meta", dict(x=x, weight=w.to("meta"), a=a, b=b), ValueError, "weight is on meta"


@pytest.mark.parametrize("call", bad_calls(), ids=lambda c: c[0])
def test_bad_arguments_are_named(call):
    _, arguments, kind, message = call
    with pytest.raises(kind, match=message):
        pk.lora_linear(**arguments)


def test_results_repeat_bit_for_bit(backend):
    t = make(203, 64, 48, 8, torch.float32)
    runs = [
        outputs_and_gradients(pk.lora_linear, t, torch.ones(203, 48), scale=1.0) for _ in range(3)
    ]
    for run, name in itertools.product(runs[1:], runs[0]):
        assert torch.equal(run[name], runs[0][name]), name


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_dropout_of_no_rows(backend):
    x, weight = torch.zeros(0, 9, requires_grad=True), torch.zeros(4, 9)
    a, b = torch.zeros(2, 9, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    with pk.use_backend(backend):
        y = pk.lora_linear(x, weight, a, b, dropout_p=0.5)
        y.sum().backward()
    assert y.shape == (0, 4) and x.grad.shape == (0, 9) and not a.grad.any() and not b.grad.any()
