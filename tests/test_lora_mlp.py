import pytest
import torch
import torch.nn.functional as F
from _compare import check_law, doubled, gathered
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import perl_kernels as pk
from perl_kernels import LoRAProjection, _dropout
from perl_kernels.lora_mlp import reference

NAMES = ("gate", "up", "down")
ACTIVATIONS = ["silu", "gelu_tanh"]
SAVE = ["gate_up", "input"]
# (N, D, F, O, ranks of gate, up and down). 507, 123, 45: multiples of no tile or vector width.
# 40, 64, 96: pairs of bfloat16. N = 1 and 16: decode. F = 1 and O = 1: as narrow as can be. Rank
# 64 is more than D = 33 has.
SIZES = [
    (507, 123, 45, 123, (5, 3, 17)),
    (130, 64, 200, 96, (16, 16, 16)),
    (1, 40, 77, 40, (4, 1, 9)),
    (16, 123, 200, 45, (5, 3, 17)),
    (65, 33, 1, 1, (64, 2, 1)),
]


def make(n, d, f, o, ranks, dtype=torch.float32, adapter_dtype=None, bias=True):
    """Tensors by name: x, and of each projection NAME.weight, NAME.a, NAME.b, NAME.bias."""
    tensors = {"x": torch.randn(n, d).to(dtype).requires_grad_()}
    for name, (outs, ins), r in zip(NAMES, ((f, d), (f, d), (o, f)), ranks, strict=True):
        tensors |= {
            f"{name}.weight": (torch.randn(outs, ins) / ins**0.5).to(dtype),
            f"{name}.a": (torch.randn(r, ins) / ins**0.5).to(adapter_dtype or dtype),
            f"{name}.b": (torch.randn(outs, r) / r**0.5).to(adapter_dtype or dtype),
            f"{name}.bias": torch.randn(outs).to(dtype) if bias else None,
        }
        for letter in ("a", "b", *(("bias",) if bias else ())):
            tensors[f"{name}.{letter}"].requires_grad_()
    return tensors


def small(dtype=torch.float32, **options):
    return make(6, 10, 7, 9, (3, 2, 4), dtype, **options)


def projections(tensors, scale=0.7):
    of = ("weight", "a", "b", "bias")
    return [LoRAProjection(*(tensors[f"{n}.{letter}"] for letter in of), scale) for n in NAMES]


def ours(tensors, **options):
    return pk.lora_mlp(tensors["x"], *projections(tensors), **options)


def plain(tensors, **options):
    """What people write today, in x's dtype."""
    dtype = tensors["x"].dtype
    cast = {n: t.to(dtype) if t is not None else None for n, t in tensors.items()}
    return reference.lora_mlp(tensors["x"], *projections(cast), **options)


def leaves_of(tensors):
    return {name: t for name, t in tensors.items() if t is not None and t.requires_grad}


def outputs_and_gradients(function, tensors, dy, **options):
    y = function(tensors, **options)
    leaves = leaves_of(tensors)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def three_ways(tensors, save="gate_up", **options):
    """Ours, plain torch, and float64, with the same dropout masks."""
    x = tensors["x"]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        seeds = {f"seed_{of}": _dropout.new_seed(x.device) for of in "xh"}
    assert seeds["seed_x"] != seeds["seed_h"]
    dy = torch.randn(x.shape[0], tensors["down.weight"].shape[0]).to(x.dtype)
    exact = outputs_and_gradients(plain, doubled(tensors), dy, **options, **seeds)
    theirs = outputs_and_gradients(plain, tensors, dy, **options, **seeds)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        found = outputs_and_gradients(ours, tensors, dy, save=save, **options)
    return found, theirs, exact


def hold_to_law(found, theirs, exact, dtype):
    assert found.keys() == exact.keys()
    for name in exact:
        check_law(name, found[name], theirs[name], exact[name], dtype)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_error_is_no_worse_than_plain_torch(backend, sizes, dtype, activation, save):
    tensors = make(*sizes, dtype, bias=activation == "silu")
    hold_to_law(*three_ways(tensors, save, activation=activation), dtype)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("sizes", SIZES[2:], ids=str)
def test_few_rows_and_narrow_blocks(backend, sizes, save):
    """Sixteen draws together: on a few numbers plain torch may be exact by luck."""
    draws = gathered(lambda: three_ways(make(*sizes), save), n=1)
    hold_to_law(*draws, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float32_adapters_on_a_narrow_base_get_float32_gradients(backend, dtype):
    tensors = make(65, 48, 34, 48, (5, 4, 3), dtype, torch.float32)
    found = three_ways(tensors)
    hold_to_law(*found, dtype)
    assert all(found[0][f"d{n}.{letter}"].dtype == torch.float32 for n in NAMES for letter in "ab")


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_two_masks_of_the_counter(backend, p, save):
    """With the seeds known, output and gradients equal the reference's with the same seeds."""
    tensors = make(37, 123, 45, 40, (5, 3, 17))
    hold_to_law(*three_ways(tensors, save, dropout_p=p), torch.float32)


def test_dropout_repeats_with_the_seed_and_differs_without(backend):
    tensors = small()
    torch.manual_seed(5)
    first = ours(tensors, dropout_p=0.4)
    second = ours(tensors, dropout_p=0.4)
    torch.manual_seed(5)
    again = ours(tensors, dropout_p=0.4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(backend, use_reentrant, save):
    tensors = make(17, 24, 10, 24, (4, 3, 2))

    def step(wrap):
        leaves = leaves_of(tensors)
        for leaf in leaves.values():
            leaf.grad = None
        torch.manual_seed(3)
        function = lambda x: ours({**tensors, "x": x}, dropout_p=0.3, save=save)  # noqa: E731
        wrap(function, tensors["x"]).square().sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    stored = step(lambda f, x: f(x))
    recomputed = step(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    for one, other in zip(stored, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("without", NAMES)
def test_a_projection_may_have_no_adapter(backend, without):
    tensors = small()
    adapted = [
        LoRAProjection(p.weight, bias=p.bias) if name == without else p
        for name, p in zip(NAMES, projections(tensors), strict=True)
    ]
    leaves = [t for p in adapted for t in (p.a, p.b) if t is not None] + [tensors["x"]]
    y, expected = (f(tensors["x"], *adapted) for f in (pk.lora_mlp, reference.lora_mlp))
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(t.sum(), leaves) for t in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_without_adapters_it_is_the_frozen_block(backend):
    x, w = torch.randn(6, 10, requires_grad=True), [torch.randn(7, 10) for _ in range(2)]
    down = torch.randn(9, 7)
    y = pk.lora_mlp(x, (w[0],), (w[1],), (down,))
    expected = F.linear(F.silu(F.linear(x, w[0])) * F.linear(x, w[1]), down)
    torch.testing.assert_close(y, expected)
    one, other = (torch.autograd.grad(t.sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("case", ["transposed weights", "strided x", "3-D x", "expanded dy", "N=0"])
def test_layouts(backend, case, save):
    tensors = make(24, 10, 8, 12, (3, 2, 4), bias=False)
    if case == "transposed weights":
        for name in NAMES:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].t().contiguous().t()
    elif case == "strided x":
        tensors["x"] = torch.randn(24, 20)[:, ::2].detach().requires_grad_()
    elif case == "3-D x":
        tensors["x"] = torch.randn(4, 6, 10, requires_grad=True)
    elif case == "N=0":
        tensors["x"] = torch.randn(0, 10, requires_grad=True)
    shape = (*tensors["x"].shape[:-1], 12)
    dy = torch.randn(()).expand(shape) if case == "expanded dy" else torch.randn(shape)
    flat = {**tensors, "x": tensors["x"].detach().reshape(-1, 10).requires_grad_()}
    found = outputs_and_gradients(ours, tensors, dy, save=save)
    expected = outputs_and_gradients(plain, flat, dy.reshape(-1, 12))
    assert found["y"].shape == shape and found["y"].is_contiguous()
    for name in expected:
        torch.testing.assert_close(
            found[name].reshape(expected[name].shape), expected[name], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_far_from_zero(backend, activation, dtype):
    """Where the sigmoid is 0 or 1 to the last bit and e^-gate overflows; rows enough for tiles."""
    gates = torch.tensor([-3e4, -200.0, -89.0, -20.0, 0.0, 20.0, 89.0, 200.0, 3e4])
    one = torch.ones(1, 1).to(dtype)
    x = torch.stack([gates, torch.ones(len(gates))], dim=1).to(dtype).requires_grad_()
    picks = (one.new_tensor([[1.0, 0.0]]),), (one.new_tensor([[0.0, 1.0]]),), (one,)
    y = pk.lora_mlp(x, *picks, activation=activation)
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact_x = x.detach().double().requires_grad_()
    exact = reference.activate(exact_x[:, 0], activation) * exact_x[:, 1]
    (exact_dx,) = torch.autograd.grad(exact.sum(), exact_x)
    torch.testing.assert_close(y[:, 0].double(), exact, rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-2, atol=1e-6)


def test_gradients_that_nobody_asked_for_are_not_computed(backend):
    tensors = small(bias=False)
    frozen = {k: v.detach() if v is not None else None for k, v in tensors.items()}
    ours({**frozen, "x": tensors["x"]}).sum().backward()
    assert tensors["x"].grad is not None
    ours({**tensors, "x": frozen["x"]}).sum().backward()
    assert all(tensors[f"{n}.{letter}"].grad is not None for n in NAMES for letter in "ab")
    assert not ours(frozen).requires_grad


# ------------------------------------------------------------------------------------------------
# What is kept
# ------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The arguments of every call of the op."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.perl_kernels.lora_mlp.default:
            self.arguments.append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("save", SAVE)
def test_saved_bytes_are_those_of_the_docstring(backend, save, dropout_p, dtype):
    n, d, f, ranks = 50, 40, 96, (5, 3, 7)
    tensors = make(n, d, f, d, ranks, dtype)
    parameters = {t.data_ptr() for name, t in tensors.items() if name != "x"}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(tensors, save=save, dropout_p=dropout_p)
    elements = d + sum(ranks) + (2 * f if save == "gate_up" else 0)
    seeds = 16 if dropout_p else 0
    assert sum(kept.values()) == n * elements * tensors["x"].element_size() + seeds
    del y


def test_gate_and_up_are_not_kept_where_nothing_learns(backend):
    tensors = small()
    with Calls() as calls:
        ours(tensors)
        ours(tensors, save="input")
        with torch.no_grad():
            ours(tensors)
        ours({k: v.detach() for k, v in tensors.items()})
    assert [a[-1] for a in calls.arguments] == [True, False, False, False]


# 8 and 32 rows are the most that weights meet as they lie, on narrow and on wide processors; a tile
# of that has 64 columns.
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradient_it_is_the_same_to_the_bit(backend, rows, dtype):
    for bias, activation in ((True, "silu"), (False, "gelu_tanh")):
        tensors = make(rows, 140, 130, 70, (16, 5, 17), dtype, bias=bias)
        wanted = ours(tensors, activation=activation).detach()
        with torch.no_grad():
            assert torch.equal(ours(tensors, activation=activation), wanted)
            tensors["x"] = tensors["x"].view(rows, 1, 140)
            assert torch.equal(ours(tensors, activation=activation), wanted.view(rows, 1, 70))


def test_both_ways_to_save_agree(backend):
    """In forward to the bit; in backward up to the rounding of what was kept, here none."""
    tensors, dy = make(130, 64, 200, 64, (16, 5, 8)), torch.randn(130, 64)
    kept, again = (outputs_and_gradients(ours, tensors, dy, save=save) for save in SAVE)
    assert torch.equal(kept["y"], again["y"])
    for name in kept:
        torch.testing.assert_close(kept[name], again[name], rtol=1e-4, atol=1e-4)


def test_backward_leaves_what_was_kept_as_it_was(backend):
    tensors, dy = small(), torch.randn(6, 9)
    y = ours(tensors)
    leaves = list(leaves_of(tensors).values())
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------
# Registration
# ------------------------------------------------------------------------------------------------


def test_reference_gradcheck():
    t = small(torch.float64)
    leaves = leaves_of(t)
    seeds = {"seed_x": torch.tensor(9), "seed_h": torch.tensor(10)}
    torch.autograd.gradcheck(
        lambda *values: plain(
            {**t, **dict(zip(leaves, values, strict=True))}, dropout_p=0.25, **seeds
        ),
        tuple(leaves.values()),
    )


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_runs_and_gradchecks(activation, save):
    t = small(torch.float64)
    leaves = leaves_of(t)
    torch.autograd.gradcheck(
        lambda *values: ours(
            {**t, **dict(zip(leaves, values, strict=True))}, activation=activation, save=save
        ),
        tuple(leaves.values()),
    )


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(backend, dropout_p, with_bias, save):
    tensors = small(bias=with_bias)
    of = {letter: [tensors[f"{n}.{letter}"] for n in NAMES] for letter in ("weight", "a", "b")}
    bias = [tensors[f"{n}.bias"] for n in NAMES] if with_bias else []
    seeds = [torch.tensor(5), torch.tensor(6)] if dropout_p else [None, None]
    torch.library.opcheck(
        torch.ops.perl_kernels.lora_mlp.default,
        (
            tensors["x"], of["weight"], bias, of["a"], of["b"], [1.0, 2.0, 0.5], "silu",
            dropout_p, *seeds, save == "gate_up",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("save", SAVE)
def test_compiles_without_a_graph_break(backend, save):
    t = small()

    def step(x):
        return ours({**t, "x": x}, save=save).relu()

    function = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = plain(t).relu()
    torch.testing.assert_close(function(t["x"]), expected)
    leaves = list(leaves_of(t).values())
    found = torch.autograd.grad(function(t["x"]).sum(), leaves)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_autocast_runs_in_its_dtype(backend):
    t = small()
    x, *rest = t["x"], *projections(t)
    rest[1] = LoRAProjection(rest[1].weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.lora_mlp(x, *rest)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t[name].grad.dtype == torch.float32 for name in ("x", "gate.a", "down.b"))


def bad_calls():
    t = small()
    x, (gate, up, down) = t["x"], projections(t)
    good = {"x": x, "gate": gate, "up": up, "down": down}

    def call(name, kind, message, **changes):
        return pytest.param({**good, **changes}, kind, message, id=name)

    yield call("features", ValueError, r"x has 9 features; wanted 10, as gate.weight", x=x[:, :9])
    yield call("scalar", ValueError, "x is a scalar", x=torch.tensor(1.0))
    yield call("int", TypeError, "x is torch.int64", x=x.long())
    short = up._replace(weight=up.weight[:5], b=up.b[:5], bias=None)
    yield call("rows", ValueError, "up.weight has 5 rows and gate.weight 7", up=short)
    narrow = down._replace(weight=down.weight[:, :6], a=down.a[:, :6])
    yield call("down", ValueError, r"act\(gate\) \* up has 7 features; wanted 6", down=narrow)
    yield call("a", ValueError, r"up.a has shape \(2, 9\)", up=up._replace(a=up.a[:, :9]))
    yield call("b", ValueError, r"gate.b has shape \(6, 3\)", gate=gate._replace(b=gate.b[:6]))
    none = gate._replace(a=gate.a[:0], b=gate.b[:, :0])
    yield call("rank 0", ValueError, "gate.a has rank 0", gate=none)
    yield call("half an adapter", ValueError, "down.b is None and", down=down._replace(b=None))
    yield call("bias", ValueError, "up.bias has shape", up=up._replace(bias=up.bias[:3]))
    yield call("dtype", TypeError, "down.weight is torch.float16",
               down=down._replace(weight=down.weight.half()))  # fmt: skip
    trained = gate._replace(weight=gate.weight.clone().requires_grad_())
    yield call("frozen", ValueError, "gate.weight requires grad, and the base", gate=trained)
    yield call("no tensor", TypeError, "up.weight is a list", up=up._replace(weight=[1.0]))
    yield call("1-D", ValueError, "down.weight has 1 dimensions", down=(down.weight[0],))
    yield call("activation", ValueError, "activation is 'relu'; wanted one of silu, gelu_tanh",
               activation="relu")  # fmt: skip
    yield call("save", ValueError, "save is 'all'; wanted one of gate_up, input", save="all")
    yield call("p", ValueError, "dropout_p is 1.0", dropout_p=1.0)
    yield call("nan p", ValueError, "dropout_p is nan", dropout_p=float("nan"))


@pytest.mark.parametrize(("arguments", "kind", "message"), bad_calls())
def test_bad_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        pk.lora_mlp(**arguments)
    if "requires grad" not in message:
        with torch.no_grad(), pytest.raises(kind, match=message):
            pk.lora_mlp(**arguments)


def test_results_repeat_bit_for_bit(backend):
    tensors, dy = make(203, 64, 48, 64, (8, 8, 8)), torch.randn(203, 64)
    runs = [outputs_and_gradients(ours, tensors, dy) for _ in range(3)]
    for run in runs[1:]:
        for name in run:
            assert torch.equal(run[name], runs[0][name]), name
