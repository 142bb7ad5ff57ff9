import pytest
import torch
from _compare import check_law, doubled
from torch.utils.checkpoint import checkpoint

import perl_kernels as pk
from perl_kernels import _dropout
from perl_kernels.lora_linear import reference as lora
from perl_kernels.multi_lora_linear import reference

# (N, D, O, ranks). 507, 123, 45: multiples of no tile or vector width; about 170 rows an adapter,
# past a block of 120. N = 1: decode, and adapters without rows. D = 3: smaller than one Philox
# group. O = 1: a scalar head. 193: one past a tile of columns. Ranks: equal, odd, more than D.
SIZES = [
    (507, 123, 45, (5, 17)),
    (64, 64, 193, (16, 16, 16)),
    (1, 123, 77, (17, 3)),
    (33, 3, 1, (1, 5)),
    (300, 257, 96, (64, 8, 33, 1)),
]


def make(n, d, o, ranks, dtype=torch.float32, adapter_dtype=None, bias=True):
    """Rows in no order, a third of them with no adapter; the last adapter has no row."""
    tensors = {
        "x": torch.randn(n, d).to(dtype).requires_grad_(),
        "weight": (torch.randn(o, d) / d**0.5).to(dtype),
        "bias": torch.randn(o).to(dtype).requires_grad_() if bias else None,
    }
    for g, r in enumerate(ranks):
        a, b = torch.randn(r, d) / d**0.5, torch.randn(o, r)
        tensors[f"a{g}"] = a.to(adapter_dtype or dtype).requires_grad_()
        tensors[f"b{g}"] = b.to(adapter_dtype or dtype).requires_grad_()
    count = max(1, len(ranks) - 1)
    adapter = torch.randint(0, count, (n,))
    return tensors, adapter.masked_fill(torch.rand(n) < 1 / 3, -1)


def given(tensors):
    """The tensors as arguments: a and b as lists."""
    count = sum(name[0] == "a" for name in tensors)
    lists = {letter: [tensors[f"{letter}{g}"] for g in range(count)] for letter in "ab"}
    single = {name: tensors[name] for name in ("x", "weight", "bias")}
    return {**single, **lists, "scale": [0.7, 2.0, -1.0, 0.5][:count]}


def ours(tensors, adapter, **options):
    return pk.multi_lora_linear(**given(tensors), adapter=adapter, **options)


def plain(tensors, adapter, **options):
    """What people write today, in the dtype of x."""
    arguments = given(tensors)
    for letter in "ab":
        arguments[letter] = [t.to(arguments["x"].dtype) for t in arguments[letter]]
    return reference.multi_lora_linear(**arguments, adapter=adapter, **options)


def outputs_and_gradients(function, tensors, adapter, dy, **options):
    y = function(tensors, adapter, **options)
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def three_ways(tensors, adapter, dy, dropout_p=0.0):
    """Ours, plain torch and float64, all with the mask of one seed."""
    torch.manual_seed(11)
    seed = _dropout.new_seed(tensors["x"].device)
    torch.manual_seed(11)
    found = outputs_and_gradients(ours, tensors, adapter, dy, dropout_p=dropout_p)
    options = {"dropout_p": dropout_p, "seed": seed}
    return (
        found,
        outputs_and_gradients(plain, tensors, adapter, dy, **options),
        outputs_and_gradients(plain, doubled(tensors), adapter, dy, **options),
    )


def hold_to_law(found, theirs, exact, dtype):
    assert found.keys() == theirs.keys() == exact.keys()
    for name in exact:
        check_law(name, found[name], theirs[name], exact[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_error_is_no_worse_than_plain_torch(backend, sizes, dtype, p):
    tensors, adapter = make(*sizes, dtype, bias=sizes[1] != 257)
    dy = torch.randn(sizes[0], sizes[2]).to(dtype)
    found, theirs, exact = three_ways(tensors, adapter, dy, p)
    hold_to_law(found, theirs, exact, dtype)
    last = len(sizes[3]) - 1
    assert not found[f"da{last}"].any() and not found[f"db{last}"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float32_adapters_on_a_narrow_base_get_float32_gradients(backend, dtype):
    tensors, adapter = make(65, 48, 33, (5, 4, 16), dtype, adapter_dtype=torch.float32)
    found, theirs, exact = three_ways(tensors, adapter, torch.randn(65, 33).to(dtype))
    assert {found[name].dtype for name in ("da0", "db0", "da1", "db1")} == {torch.float32}
    hold_to_law(found, theirs, exact, dtype)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_equal_to_lora_linear_on_each_group_of_rows(backend, p):
    """The mask too: with dropout a row's is the one that it has in the whole batch."""
    tensors, adapter = make(90, 40, 24, (5, 2, 7, 3))
    torch.manual_seed(1)
    seed = _dropout.new_seed(tensors["x"].device)
    torch.manual_seed(1)
    y = ours(tensors, adapter, dropout_p=p)
    arguments = given(tensors)
    base = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    torch.testing.assert_close(y[adapter == -1], base[adapter == -1])
    for g in range(4):
        alone = lora.lora_linear(
            tensors["x"], tensors["weight"], arguments["a"][g], arguments["b"][g],
            bias=tensors["bias"], scale=arguments["scale"][g], dropout_p=p, seed=seed,
        )  # fmt: skip
        rows = adapter == g
        torch.testing.assert_close(y[rows], alone[rows], rtol=1e-5, atol=1e-5)


def test_a_rows_mask_does_not_depend_on_its_adapter(backend):
    tensors, _ = make(30, 50, 20, (4, 4), bias=False)
    with torch.no_grad():
        tensors["a1"].copy_(tensors["a0"])
        tensors["b1"].copy_(tensors["b0"])
    arguments = given(tensors) | {"scale": 2.0}

    def run(adapter):
        torch.manual_seed(2)
        return pk.multi_lora_linear(**arguments, adapter=adapter, dropout_p=0.5)

    torch.testing.assert_close(run(torch.zeros(30).long()), run(torch.arange(30) % 2))


def test_one_number_for_each_sequence(backend):
    tensors, _ = make(24, 16, 10, (3, 2, 4))
    adapter = torch.tensor([1, -1, 0, 1])
    sequences = {**tensors, "x": tensors["x"].detach().view(4, 6, 16)}
    found = ours(sequences, adapter)
    assert found.shape == (4, 6, 10)
    for_each_row = adapter[:, None].expand(4, 6)
    assert torch.equal(found, ours(sequences, for_each_row))
    assert torch.equal(found.view(24, 10), ours(tensors, for_each_row.reshape(-1)))


@pytest.mark.parametrize(
    "case", ["transposed weight", "strided x", "expanded dy", "N=0", "all base", "one adapter"]
)
def test_layouts(backend, case):
    tensors, adapter = make(24, 10, 7, (3, 2, 4))
    if case == "transposed weight":
        tensors["weight"] = torch.randn(10, 7).t()
    elif case == "strided x":
        tensors["x"] = torch.randn(24, 20)[:, ::2].detach().requires_grad_()
    elif case == "N=0":
        tensors["x"], adapter = torch.randn(0, 10).requires_grad_(), adapter[:0]
    elif case == "all base":
        adapter = torch.full_like(adapter, -1)
    elif case == "one adapter":
        adapter = torch.full_like(adapter, 1)
    dy = torch.randn(tensors["x"].shape[0], 7)
    if case == "expanded dy":
        dy = torch.randn(()).expand(24, 7)
    hold_to_law(*three_ways(tensors, adapter, dy), torch.float32)


def test_gradients_that_nobody_asked_for_are_not_computed(backend):
    tensors, adapter = make(9, 8, 6, (2, 3, 2), bias=False)
    dy = torch.randn(9, 6)
    expected = outputs_and_gradients(plain, tensors, adapter, dy)
    for frozen in ("x", "ab"):
        some = {
            k: t.detach() if t is not None and k[0] in frozen else t for k, t in tensors.items()
        }
        found = outputs_and_gradients(ours, some, adapter, dy)
        assert found.keys() == {n for n in expected if n == "y" or n[1] not in frozen}
        torch.testing.assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(backend, use_reentrant):
    tensors, adapter = make(17, 24, 10, (4, 3, 2), bias=False)
    leaves = [tensors[name] for name in ("x", "a0", "b0", "a1", "b1")]

    def gradients(wrap):
        torch.manual_seed(3)
        for t in leaves:
            t.grad = None
        y = wrap(lambda x: ours({**tensors, "x": x}, adapter, dropout_p=0.3), tensors["x"])
        y.square().sum().backward()  # reentrant checkpointing only supports backward()
        return [t.grad for t in leaves]

    stored = gradients(lambda f, x: f(x))
    recomputed = gradients(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    for one, other in zip(stored, recomputed, strict=True):
        assert torch.equal(one, other)


def test_reference_gradcheck():
    tensors, adapter = make(6, 5, 3, (2, 1, 2), torch.float64)
    learn = [name for name in tensors if name != "weight"]
    torch.autograd.gradcheck(
        lambda *values: plain(
            {**tensors, **dict(zip(learn, values, strict=True))}, adapter,
            dropout_p=0.25, seed=torch.tensor(9),
        ),
        [tensors[name] for name in learn],
    )  # fmt: skip


def test_float64_runs_and_gradchecks():
    tensors, adapter = make(6, 5, 3, (2, 1, 2), torch.float64)
    learn = [name for name in tensors if name != "weight"]
    torch.autograd.gradcheck(
        lambda *values: ours({**tensors, **dict(zip(learn, values, strict=True))}, adapter),
        [tensors[name] for name in learn],
    )


@pytest.mark.parametrize(("dropout_p", "with_bias"), [(0.0, True), (0.2, False)])
def test_opcheck(backend, dropout_p, with_bias):
    tensors, adapter = make(5, 7, 4, (2, 1, 3), bias=with_bias)
    t = given(tensors)
    torch.library.opcheck(
        torch.ops.perl_kernels.multi_lora_linear.default,
        (
            t["x"], t["weight"], t["bias"], t["a"], t["b"], t["scale"], adapter, dropout_p,
            torch.tensor(5) if dropout_p else None,
        ),
    )  # fmt: skip


def test_compiles_without_a_graph_break(backend):
    tensors, _ = make(12, 8, 5, (2, 3, 1))
    tensors["x"] = tensors["x"].detach().view(3, 4, 8).requires_grad_()
    adapter = torch.tensor([1, -1, 0])

    def run(function):
        y = function(adapter).relu()
        learned = [tensors[name] for name in ("x", "a0", "b0", "a1", "b1", "bias")]
        return [y, *torch.autograd.grad(y.square().sum(), learned)]

    compiled = torch.compile(
        lambda adapter: ours(tensors, adapter), fullgraph=True, backend="aot_eager"
    )
    for one, other in zip(run(compiled), run(lambda t: ours(tensors, t)), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_runs_in_its_dtype(backend):
    tensors, adapter = make(6, 8, 5, (2, 2), bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(tensors, adapter)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert tensors["a0"].grad.dtype == torch.float32 and tensors["x"].grad.dtype == torch.float32


def bad_calls():
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    a, b = [torch.randn(2, 6), torch.randn(3, 6)], [torch.randn(5, 2), torch.randn(5, 3)]
    good = dict(x=x, weight=w, a=a, b=b, adapter=torch.tensor([0, 1, -1, 0]))
    yield "a", good | dict(a=[a[0], a[1][:, :5]]), ValueError, r"a\[1\] has shape \(3, 5\)"
    yield "b", good | dict(b=[b[0], b[0]]), ValueError, r"b\[1\] has shape \(5, 2\)"
    yield "one b", good | dict(b=b[:1]), ValueError, "b has 1 entries; wanted 2, as a has"
    yield "scale", good | dict(scale=[1.0]), ValueError, "scale has 1 entries; wanted 2"
    yield "no list", good | dict(a=a[0]), TypeError, "a is one tensor; wanted a sequence"
    yield "none", good | dict(a=[], b=[]), ValueError, "a is empty; wanted at least one adapter"
    yield "p", good | dict(dropout_p=1.0), ValueError, "dropout_p is 1.0"
    yield "int x", good | dict(x=x.long()), TypeError, "x is torch.int64"
    yield "frozen", good | dict(weight=w.clone().requires_grad_()), ValueError, "frozen"
    yield "bias", good | dict(bias=w[0]), ValueError, "bias.* has shape"
    yield "list", good | dict(adapter=[0, 1, -1, 0]), TypeError, "adapter is a list; wanted an in"
    yield "int32", good | dict(adapter=good["adapter"].int()), TypeError, "adapter is torch.int32"
    yield "rows", good | dict(adapter=torch.zeros(3).long()), ValueError, r"wanted \(4,\), one"
    deep = x.view(2, 2, 6)
    yield "3-D", good | dict(x=deep), ValueError, r"\(4,\); wanted \(2, 2\) or \(2,\), one for each"
    yield "meta", good | dict(adapter=good["adapter"].to("meta")), ValueError, "adapter is on meta"
    for wrong in (2, -2):
        numbers = torch.tensor([0, 1, wrong, 0])
        yield (
            f"{wrong}",
            good | dict(adapter=numbers),
            ValueError,
            f"adapter has {wrong}; wanted -1",
        )


@pytest.mark.parametrize("call", bad_calls(), ids=lambda c: c[0])
def test_bad_arguments_are_named(backend, call):
    _, arguments, kind, message = call
    with pytest.raises(kind, match=message):
        pk.multi_lora_linear(**arguments)


def test_results_repeat_bit_for_bit(backend):
    tensors, adapter = make(203, 64, 48, (8, 5, 3))
    runs = [
        outputs_and_gradients(ours, tensors, adapter, torch.ones(203, 48), dropout_p=0.0)
        for _ in range(3)
    ]
    for run in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(run[name], value), name
