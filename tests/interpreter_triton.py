"""Every Triton kernel against float64, on CPU tensors: run by test_triton.py, or by hand with

TRITON_INTERPRET=1 pytest tests/interpreter_triton.py
"""

import json

import pytest
import test_head as clipped
import test_lora_mlp as mlp
import test_multi_lora_linear as multi
import test_rms_norm as norm
import torch
from _compare import check_bound, check_law, doubled, gathered
from triton.tools.tensor_descriptor import TensorDescriptor

import perl_kernels as pk
from perl_kernels import _dropout, _triton, _tuned, tune
from perl_kernels._library import triton_interpreted
from perl_kernels.head import op as head_op
from perl_kernels.head import reference as head
from perl_kernels.head import triton as head_kernels
from perl_kernels.log_prob import reference as logits_room
from perl_kernels.lora_linear import reference as lora
from perl_kernels.lora_linear import triton as lora_kernels
from perl_kernels.lora_mlp import triton as mlp_kernels
from perl_kernels.lora_mlp.reference import activate
from perl_kernels.multi_lora_linear import triton as multi_kernels

assert triton_interpreted(), "set TRITON_INTERPRET=1 before pytest starts"
# masked lanes of a tile hold -inf, whose differences numpy warns about before `where` drops them
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# not bfloat16: the interpreter cuts it where a GPU rounds
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def triton_backend(poisoned_memory):
    with pk.use_backend("triton"):
        yield


def gradients(outputs, incoming, tensors):
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    total = sum((o * i.to(o.dtype)).sum() for o, i in zip(outputs, incoming, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()))
    return {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def compare(ours, theirs, exact, dtype, **scales):
    assert ours.keys() == theirs.keys() == exact.keys()
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype, scales.get(name))


# ------------------------------------------------------------------------------------------------
# lora_linear
# ------------------------------------------------------------------------------------------------

# (N, D, O, R) beside tiles of 16, 32, 32 and 16: 37 = two tiles and five rows, and past one split
# of rows; 123, 45, 70: multiples of none. R = 5, 80: below and above one block. N = 1: decode;
# 7: all in one tile. 70: past the fused kernel's limit. D = 3: less than one Philox group.
LORA_SIZES = [(37, 123, 45, 5), (1, 64, 33, 16), (7, 3, 1, 1), (70, 96, 70, 80)]


def make_lora(n, d, o, r, dtype, adapter_dtype=None):
    return {
        "x": torch.randn(n, d).to(dtype).requires_grad_(),
        "weight": (torch.randn(o, d) / d**0.5).to(dtype),
        "a": (torch.randn(r, d) / d**0.5).to(adapter_dtype or dtype).requires_grad_(),
        "b": torch.randn(o, r).to(adapter_dtype or dtype).requires_grad_(),
        "bias": torch.randn(o).to(dtype).requires_grad_() if r % 2 else None,
    }


def plain_lora(x, weight, a, b, bias, **options):
    return lora.lora_linear(x, weight, a.to(x.dtype), b.to(x.dtype), bias=bias, **options)


def seeded_lora(x, weight, a, b, bias, scale, dropout_p, seed):
    biases = [] if bias is None else [bias]
    y, _ = torch.ops.perl_kernels.lora_linear(
        x, [weight], biases, [a], [b], [scale], dropout_p, seed
    )
    return y[0]


def run_lora(function, tensors, dy, **options):
    y = function(**tensors, **options)
    return {"y": y.detach(), **gradients((y,), (dy,), tensors)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LORA_SIZES, ids=str)
def test_lora_linear(sizes, dtype):
    tensors, dy = make_lora(*sizes, dtype), torch.randn(sizes[0], sizes[2]).to(dtype)
    compare(
        run_lora(pk.lora_linear, tensors, dy, scale=0.7),
        run_lora(plain_lora, tensors, dy, scale=0.7),
        run_lora(plain_lora, doubled(tensors), dy, scale=0.7),
        dtype,
    )


def by_routes(tensors, y, dx):
    """lora_linear takes these routes at the sizes of these tensors."""
    x, sizes = tensors["x"], (*tensors["x"].shape, *tensors["b"].shape)
    wanted = {"y": y, "dx": dx, "dx_dropout": dx}
    return _tuned.using(
        _tuned.gpu_name(x.device),
        {_tuned.key_of(k, x.dtype, *sizes): _tuned.Finding(route) for k, route in wanted.items()},
    )


@pytest.mark.parametrize("routes", [("fused", "fused"), ("decode", "library")], ids=str)
@pytest.mark.parametrize(
    "sizes, p",
    [
        ((37, 123, 45, 5), 0.0),
        ((37, 123, 45, 5), 0.3),
        ((1, 64, 33, 16), 0.3),
        ((70, 40, 70, 80), 0.3),
    ],
    ids=str,
)
def test_every_route(sizes, p, routes):
    """Any size may take any route."""
    tensors, dy = make_lora(*sizes, torch.float32), torch.randn(sizes[0], sizes[2])
    options = {"scale": 0.7, "dropout_p": p, "seed": torch.tensor(2**62 + 12345)}
    with by_routes(tensors, *routes):
        ours = run_lora(seeded_lora, tensors, dy, **options)
    theirs = run_lora(plain_lora, tensors, dy, **options)
    exact = run_lora(plain_lora, doubled(tensors), dy, **options)
    compare(ours, theirs, exact, torch.float32)


# Rows of whole 16 bytes, as the copy engine wants them; 37, 72 and 88: parts of tiles of 16 and 32.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_tensor_descriptors(monkeypatch, transposed, dtype):
    calls = []
    real = TensorDescriptor.from_tensor
    monkeypatch.setattr(TensorDescriptor, "from_tensor", lambda *a: calls.append(a) or real(*a))
    tensors, dy = make_lora(37, 72, 88, 40, dtype), torch.randn(37, 88).to(dtype)
    if transposed:
        tensors["weight"] = tensors["weight"].T.contiguous().T
    with by_routes(tensors, "fused", "fused"):
        ours = run_lora(pk.lora_linear, tensors, dy, scale=0.7)
    assert len(calls) == 6
    theirs = run_lora(plain_lora, tensors, dy, scale=0.7)
    compare(ours, theirs, run_lora(plain_lora, doubled(tensors), dy, scale=0.7), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(37, 123, 45, 5), (7, 3, 1, 1), (19, 64, 33, 80)], ids=str)
def test_dropout(sizes, dtype):
    tensors, dy = make_lora(*sizes, dtype), torch.randn(sizes[0], sizes[2]).to(dtype)
    options = {"scale": 0.7, "dropout_p": 0.3, "seed": torch.tensor(2**62 + 12345)}
    compare(
        run_lora(seeded_lora, tensors, dy, **options),
        run_lora(plain_lora, tensors, dy, **options),
        run_lora(plain_lora, doubled(tensors), dy, **options),
        dtype,
    )


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
def test_the_mask_is_the_references_bit_for_bit(p):
    """Each kernel that draws the mask, made to show it: identity adapters, a zero base."""
    n, d = 37, 123
    seed = torch.tensor(-(2**61) - 7)
    kept = _dropout.keep_mask(seed, n, d, p).float() * torch.tensor(1.0 / (1.0 - p))
    assert p < 0.1 or 0 < kept.count_nonzero() < n * d
    ones, eye, base = torch.ones(n, d), torch.eye(d), torch.zeros(d, d)
    y, s = lora_kernels.forward(ones, [base], [], [eye], [eye], [1.0], p, seed)
    assert torch.equal(s, kept) and torch.equal(y[0], kept)
    dx, _, _ = lora_kernels.backward(
        [ones], ones, [base], [eye], [eye], [1.0], p, seed, s, True, True
    )
    assert torch.equal(dx, kept)
    # rank N, ds = the identity: da = drop(x)
    _, da, _ = lora_kernels.backward(
        [torch.eye(n)], ones, [torch.zeros(n, d)], [torch.zeros(n, d)], [torch.eye(n)], [1.0],
        p, seed, torch.zeros(n, n), False, True,
    )  # fmt: skip
    assert torch.equal(da[0], kept)


def test_projections_that_share_x_and_its_mask():
    x = torch.randn(37, 70).requires_grad_()
    shapes = [(40, 5), (33, 16), (1, 24)]
    weight = [torch.randn(o, 70) / 8 for o, _ in shapes]
    bias = [torch.randn(o) for o, _ in shapes]
    a = [(torch.randn(r, 70) / 8).requires_grad_() for _, r in shapes]
    b = [torch.randn(o, r, requires_grad=True) for o, r in shapes]
    scale, seed = [0.5, 2.0, -1.0], torch.tensor(99)
    dy = [torch.randn(37, o) for o, _ in shapes]

    def run(x, weight, bias, a, b, dy, together):
        if together:
            y, _ = torch.ops.perl_kernels.lora_linear(x, weight, bias, a, b, scale, 0.25, seed)
        else:
            y = [
                lora.lora_linear(x, w, p, q, bias=c, scale=k, dropout_p=0.25, seed=seed)
                for w, c, p, q, k in zip(weight, bias, a, b, scale, strict=True)
            ]
        found = [*(t.detach() for t in y), *torch.autograd.grad(y, [x, *a, *b], dy)]
        return dict(enumerate(found))

    def twice(tensors):
        return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]

    given = (weight, bias, a, b, dy)
    exact = run(*twice([x]), *map(twice, given), False)
    compare(run(x, *given, True), run(x, *given, False), exact, torch.float32)


@pytest.mark.parametrize(
    "case", ["strided x", "transposed weight", "3-D x", "expanded dy", "N = 0", "float32 adapters"]
)
def test_layouts(case):
    dtype = torch.float16 if case == "float32 adapters" else torch.float32
    tensors = make_lora(18, 72, 40, 7, dtype, adapter_dtype=torch.float32)
    if case == "strided x":
        tensors["x"] = torch.randn(18, 144)[:, ::2].detach().requires_grad_()
    elif case == "transposed weight":
        tensors["weight"] = torch.randn(72, 40).t() / 8
    elif case == "3-D x":
        tensors["x"] = torch.randn(3, 6, 72).requires_grad_()
    elif case == "N = 0":
        tensors["x"] = torch.randn(0, 72).requires_grad_()
    dy = torch.randn(*tensors["x"].shape[:-1], 40).to(dtype)
    if case == "expanded dy":
        dy = torch.randn(1, 1).expand(18, 40)
    ours = run_lora(pk.lora_linear, tensors, dy, scale=3.0)
    theirs = run_lora(plain_lora, tensors, dy, scale=3.0)
    compare(ours, theirs, run_lora(plain_lora, doubled(tensors), dy, scale=3.0), dtype)
    assert ours["da"].dtype == ours["db"].dtype == torch.float32


def test_only_the_wanted_gradients():
    tensors, dy = make_lora(20, 40, 33, 5, torch.float32), torch.randn(20, 33)
    expected = run_lora(plain_lora, tensors, dy, scale=1.0)
    for frozen in (["x"], ["a", "b"]):
        some = {k: t.detach() if k in frozen else t for k, t in tensors.items()}
        found = run_lora(pk.lora_linear, some, dy, scale=1.0)
        assert not {f"d{name}" for name in frozen} & found.keys()
        torch.testing.assert_close(found, {name: expected[name] for name in found})


# ------------------------------------------------------------------------------------------------
# The tuner, with a clock that is told what each candidate takes
# ------------------------------------------------------------------------------------------------

SHAPE = (5, 24, 40, 3)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """tuned(seconds by route) tunes SHAPE; what it found, by product, and its file."""
    file = tmp_path / "findings.json"
    monkeypatch.setattr(tune, "VARIANTS", {"fused": [{"GROUP": 1}], "decode": [{"BLOCK_O": 16}]})

    def run(seconds):
        def clock(_run, _seconds):
            ((_, by_key),) = _tuned._findings.items()
            ((route, tile),) = by_key.values()
            return seconds[route] - (1e-9 if tile and 1 in tile.values() else 0)

        monkeypatch.setattr(tune, "seconds_of", clock)
        found = pk.tune_lora_linear([SHAPE], file, dtype=torch.float32)
        return {key.split(" ")[0]: entry for key, entry in found.items()}, file

    yield run
    pk.use_tuned(None)


def test_the_tuner_keeps_the_fastest_and_uses_it(tuned):
    found, file = tuned({"library": 4e-6, "fused": 3e-6, "decode": 2e-6})
    assert {product: entry["route"] for product, entry in found.items()} == {
        "y": "decode", "dx": "fused", "dx_dropout": "fused"
    }  # fmt: skip
    assert found["dx"]["tile"]["GROUP"] == 1  # the faster of two tiles
    assert sorted(found["y"]["microseconds"].values()) == [2.0, 2.0, 3.0, 3.0, 4.0]
    x = torch.randn(SHAPE[:2])
    assert _tuned.finding("dx", x, *SHAPE[2:]).route == "fused"
    assert _tuned.finding("dx", torch.randn(7, SHAPE[1]), SHAPE[2], 4).route == "fused"
    assert _tuned.finding("dx", torch.randn(9, SHAPE[1]), *SHAPE[2:]) is None
    pk.use_tuned(None)
    assert _tuned.finding("dx", x, *SHAPE[2:]) is None
    pk.use_tuned(file)
    assert _tuned.finding("dx", x, *SHAPE[2:]).tile == found["dx"]["tile"]


def test_the_library_stays_where_little_is_won(tuned):
    found, _ = tuned({"library": 4e-6, "fused": 3.95e-6, "decode": 3.95e-6})
    assert {entry["route"] for entry in found.values()} == {"library"}


def test_findings_are_added_to_a_file(tuned):
    _, file = tuned({"library": 1e-6, "fused": 2e-6, "decode": 2e-6})
    of_another = {"y bfloat16 N8 D8 O8 R8": {"route": "library"}}
    kept = {**json.loads(file.read_text()), "another": of_another}
    file.write_text(json.dumps(kept))
    found, _ = tuned({"library": 3e-6, "fused": 2e-6, "decode": 4e-6})
    now = json.loads(file.read_text())
    assert now["another"] == of_another and now.keys() == {"another", "interpreter"}
    assert {entry["route"] for entry in now["interpreter"].values()} == {"fused"}


def test_a_wrong_route_is_left_out(tuned, monkeypatch):
    right = lora_kernels._decode
    monkeypatch.setattr(lora_kernels, "_decode", lambda *a: right(*a) + 1)
    with pytest.warns(UserWarning, match="decode O.* differs from the library by .* left out"):
        found, _ = tuned({"library": 4e-6, "fused": 3e-6, "decode": 2e-6})
    assert found["y"]["route"] == "fused"


# ------------------------------------------------------------------------------------------------
# lora_mlp: the kernels above, and its own between them
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", mlp.SAVE)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_mlp(p, save):
    tensors = mlp.make(37, 24, 45, 33, (5, 3, 16))
    compare(*mlp.three_ways(tensors, save, dropout_p=p), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_the_activation_and_its_gradient(activation, dtype):
    """3 x 1111 elements: past one block, into the middle of another; far out both ways."""
    gate, up, dh = (3 * torch.randn(3, 3, 1111)).to(dtype)
    gate[:, :5] = torch.tensor([-90.0, -9.0, 0.0, 9.0, 90.0])

    def plain(gate, up, dh):
        gate, up = gate.requires_grad_(), up.requires_grad_()
        h = activate(gate, activation) * up
        dgate, dup = torch.autograd.grad(h, (gate, up), dh)
        return {"h": h.detach(), "dgate": dgate, "dup": dup}

    ours = {"h": mlp_kernels.gated(gate, up, activation)}
    ours["dgate"], ours["dup"] = mlp_kernels.gated_backward(dh.clone(), gate, up, activation)
    exact = plain(*(t.double() for t in (gate, up, dh)))
    compare(ours, plain(gate.clone(), up.clone(), dh), exact, dtype)


# ------------------------------------------------------------------------------------------------
# multi_lora_linear
# ------------------------------------------------------------------------------------------------

# (N, D, O, ranks) beside tiles of 16 rows in chunks of 32, and 32 columns. 70: past one chunk of an
# adapter's rows; 43, 37: multiples of no tile. Rank 80: past a block of 64, and the others padded
# by more than one. N = 1: tiles that do not exist. D = 3: less than one Philox group.
MULTI_SIZES = [(70, 43, 37, (5, 3)), (30, 35, 20, (17, 80, 5)), (1, 40, 33, (16, 16)),
               (7, 3, 1, (1, 2))]  # fmt: skip


@pytest.mark.parametrize("sizes", MULTI_SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.3), (torch.float16, 0.0)], ids=str)
def test_multi_lora_linear(sizes, dtype, p):
    tensors, adapter = multi.make(*sizes, dtype, bias=sizes[1] % 2 == 1)
    dy = torch.randn(sizes[0], sizes[2]).to(dtype)
    compare(*multi.three_ways(tensors, adapter, dy, p), dtype)


@pytest.mark.parametrize("case", ["strided x", "transposed weight", "N = 0", "all base", "float32"])
def test_multi_lora_linear_layouts(case):
    dtype = torch.float16 if case == "float32" else torch.float32
    tensors, adapter = multi.make(18, 36, 20, (7, 3), dtype, adapter_dtype=torch.float32)
    if case == "strided x":
        tensors["x"] = torch.randn(18, 72)[:, ::2].detach().requires_grad_()
    elif case == "transposed weight":
        tensors["weight"] = torch.randn(36, 20).t() / 6
    elif case == "N = 0":
        tensors["x"], adapter = torch.randn(0, 36).requires_grad_(), adapter[:0]
    elif case == "all base":
        adapter = torch.full_like(adapter, -1)
    dy = torch.randn(len(tensors["x"]), 20).to(dtype)
    found, theirs, exact = multi.three_ways(tensors, adapter, dy)
    compare(found, theirs, exact, dtype)
    assert found["da0"].dtype == found["db0"].dtype == torch.float32


def test_numbers_of_no_adapter_are_the_base():
    """A GPU cannot say so without making the host wait."""
    tensors, adapter = multi.make(20, 12, 9, (3, 2))
    wrong = adapter.masked_fill(adapter == -1, 2).masked_fill(torch.arange(20) % 5 == 0, -7)
    right = wrong.masked_fill((wrong < 0) | (wrong > 1), -1)
    dy = torch.randn(20, 9)
    found, expected = (
        multi.outputs_and_gradients(multi.ours, tensors, t, dy) for t in (wrong, right)
    )
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("rows", [1, 5, 2500])
def test_segments_are_a_stable_sort(rows):
    """2500: past two blocks of 1024."""
    adapter = torch.randint(-1, 6, (rows,))
    order, start = multi_kernels._segments(adapter, 6)
    expected = adapter.where(adapter >= 0, 6).sort(stable=True)
    assert torch.equal(order.long(), expected.indices)
    assert torch.equal(start.long(), torch.searchsorted(expected.values, torch.arange(8)))


def test_the_mask_of_sorted_rows_is_the_references():
    """Each product that draws it, made to show it: identity adapters, a zero base."""
    n, d, p = 19, 35, 0.3
    seed, adapter = torch.tensor(-(2**61) - 7), torch.arange(n) % 2
    kept = _dropout.keep_mask(seed, n, d, p).float() * torch.tensor(1.0 / (1.0 - p))
    ones, eye, base = torch.ones(n, d), torch.eye(d), torch.zeros(d, d)
    rest = ([eye] * 2, [eye] * 2, [1.0] * 2, adapter, p, seed)
    y, s = multi_kernels.forward(ones, base, None, *rest)
    assert torch.equal(y, kept)
    dx, da, _ = multi_kernels.backward(ones, ones, base, *rest, s, True, True)
    assert torch.equal(dx, kept)
    for g in range(2):  # all rows of da are sums over the adapter's rows
        torch.testing.assert_close(da[g], kept[adapter == g].sum(0).expand(d, d))


# ------------------------------------------------------------------------------------------------
# head
# ------------------------------------------------------------------------------------------------

# (N, H, V) beside tiles of 16, 32 and 256 columns in two splits. 37: past one group of two row
# tiles; 1003: two tiles a split, the last one partial. N = 1, V = 2: the smallest choice.
HEAD_SIZES = [(37, 33, 1003), (1, 8, 2), (7, 123, 300)]
OPTIONS = [{}, {"temperature": 0.7}, {"temperature": 1.3, "softcap": 2.0}]


def make_head(n, h, v, dtype, bias=True, trainable_head=False):
    return {
        "hidden": (2 * torch.randn(n, h)).to(dtype).requires_grad_(),
        "weight": (torch.randn(v, h) / h**0.5).to(dtype).requires_grad_(trainable_head),
        "bias": torch.randn(v).to(dtype).requires_grad_(trainable_head) if bias else None,
    }


def make_target(n, v):
    target = torch.randint(0, v, (n,))
    target[0], target[-1] = 0, v - 1  # the two edge columns
    if n > 2:
        target[1] = -100
    return target


def near(tensor, step=0.3):
    """A reference's tensor beside a policy's."""
    moved = tensor.detach().float() + step * torch.randn(tensor.shape)
    return moved.to(tensor.dtype)


def rms_of_log_ratio(kl):
    """The size of the terms a KL adds up: it is about half their mean square."""
    return (2 * kl.mean().item()) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=str)
def test_linear_log_prob(sizes, options, dtype):
    n, _, v = sizes
    tensors = make_head(*sizes, dtype, bias=bool(options), trainable_head=True)
    target, incoming = make_target(n, v), (torch.randn(n), torch.randn(n))

    def run(function, tensors, **more):
        found = function(**tensors, target=target, **options, **more)
        return {
            "log_prob": found[0].detach(),
            "entropy": found[1].detach(),
            **gradients(found, incoming, tensors),
        }

    compare(
        run(pk.linear_log_prob, tensors, return_entropy=True),
        run(head.linear_log_prob, tensors),
        run(head.linear_log_prob, doubled(tensors)),
        dtype,
    )


# Rank 5 is below a block of features, 37 past one; over 16 bits in three terms and in two.
@pytest.mark.parametrize(("rank", "adapter"), [(5, "float32"), (37, "as hidden")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_on_the_head(dtype, rank, adapter):
    tensors = make_head(17, 33, 290, dtype)
    for name, shape in (("a", (rank, 33)), ("b", (290, rank))):
        factor = torch.randn(shape) / shape[1] ** 0.5
        tensors[name] = factor.to(dtype if adapter == "as hidden" else torch.float32)
        tensors[name].requires_grad_()
    ref_hidden, target = near(tensors["hidden"]), make_target(17, 290)
    incoming, options = torch.randn(3, 17), {"temperature": 1.3, "softcap": 2.0, "scale": 0.5}

    def run(log_prob, kl, tensors, ref_hidden):
        found = (*log_prob(**tensors, target=target, **options),)
        found += (kl(**tensors, ref_hidden=ref_hidden, **options),)
        named = zip(("log_prob", "entropy", "kl"), found, strict=True)
        return {k: t.detach() for k, t in named} | gradients(found, incoming, tensors)

    def ours(**given):
        return pk.linear_log_prob(**given, return_entropy=True)

    exact = run(head.linear_log_prob, head.linear_kl, doubled(tensors), ref_hidden.double())
    compare(
        run(ours, lambda **given: pk.linear_kl(**given).kl, tensors, ref_hidden),
        run(head.linear_log_prob, head.linear_kl, tensors, ref_hidden),
        exact,
        dtype,
        kl=rms_of_log_ratio(exact["kl"]),
    )


def test_an_adapter_in_16_bits_is_as_exact_as_the_head():
    """log p of a float32 adapter over 16-bit weights: both factors keep more than 16 bits do."""
    tensors = make_head(16, 33, 250, torch.float16)
    tensors["a"], tensors["b"] = torch.randn(16, 33), torch.randn(250, 16)
    target = make_target(16, 250)
    ours = pk.linear_log_prob(**tensors, target=target, scale=0.1)
    exact, _ = head.linear_log_prob(**doubled(tensors), target=target, scale=0.1)
    assert (ours - exact).abs().max() < 2e-5


def test_deep_in_the_softcap():
    """Every logit at three to five times the cap: the slope is what tanh^2 leaves of 1."""
    options = {"softcap": 3.0, "temperature": 0.7, "target": torch.randint(0, 4, (32,))}
    logits = 3.0 * (3 + 2 * torch.rand(32, 4)) * torch.randn(32, 4).sign()

    def run(function, tensors):
        found = function(**tensors, **options)
        found = found if isinstance(found, torch.Tensor) else found[0]
        return gradients((found,), torch.ones(1, 32), tensors)

    for ours, theirs, given in (
        (pk.linear_log_prob, head.linear_log_prob, {"hidden": logits, "weight": torch.eye(4)}),
        (pk.log_prob, logits_room.log_prob, {"logits": logits}),
    ):
        given[next(iter(given))].requires_grad_()
        exact = run(theirs, doubled(given))
        compare(run(ours, given), run(theirs, given), exact, torch.float32)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss_of_ratios(level):
    dtype = torch.float32
    tensors, target = clipped.off_policy(8, 4, 16, 250, dtype, ref=True, rank=3)
    options = {"importance_sampling_level": level, "kl_coef": 0.3, **clipped.CLIPPED}

    def run(function, tensors):
        found = function(**tensors, target=target, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return {"loss": loss.detach(), **gradients((loss,), (torch.tensor(3.0),), tensors)}

    compare(
        run(pk.policy_loss, tensors),
        run(head.policy_loss, tensors),
        run(head.policy_loss, doubled(tensors)),
        dtype,
        loss=1.0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=str)
def test_linear_kl(sizes, options, dtype):
    n, _, v = sizes
    tensors = make_head(*sizes, dtype)
    tensors["ref_hidden"] = near(tensors["hidden"])
    incoming = (torch.randn(n),)

    def run(function, tensors):
        found = function(**tensors, **options)
        kl = found.kl if isinstance(found, tuple) else found
        return {"kl": kl.detach(), **gradients((kl,), incoming, tensors)}

    exact = run(head.linear_kl, doubled(tensors))
    theirs = run(head.linear_kl, tensors)
    scale = rms_of_log_ratio(exact["kl"])
    compare(run(pk.linear_kl, tensors), theirs, exact, dtype, kl=scale)


def test_linear_kl_with_targets():
    tensors = make_head(20, 12, 301, torch.float32)
    ref_hidden, target = near(tensors["hidden"]), make_target(20, 301)
    found = pk.linear_kl(**tensors, ref_hidden=ref_hidden, target=target)
    log_prob, entropy = head.linear_log_prob(**tensors, target=target)
    moved = {**tensors, "hidden": ref_hidden}
    ref_log_prob, _ = head.linear_log_prob(**moved, target=target)
    kl = head.linear_kl(**tensors, ref_hidden=ref_hidden).where(target != -100, 0.0)
    expected = (kl, log_prob, ref_log_prob, entropy)
    torch.testing.assert_close(
        tuple(t.detach() for t in found), tuple(t.detach() for t in expected)
    )
    c = torch.randn(3, 20)
    ours = (c[0] * found.kl + c[1] * found.log_prob + c[2] * found.entropy).sum()
    theirs = (c[0] * kl + c[1] * log_prob + c[2] * entropy).sum()
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors["hidden"]), torch.autograd.grad(theirs, tensors["hidden"])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl_coef", [None, 0.4])
def test_policy_loss_in_blocks(monkeypatch, dtype, kl_coef):
    """The gradient made over several blocks of rows and of columns."""
    monkeypatch.setattr(head_kernels, "BLOCK_ROWS", 16)
    monkeypatch.setattr(head_kernels, "BLOCK_BYTES", 16 * 300 * 4)
    n, h, v = 37, 31, 1003
    tensors = make_head(n, h, v, dtype, trainable_head=kl_coef is None)
    target, advantage = make_target(n, v), torch.randn(n)
    options = {"temperature": 0.9, "softcap": 4.0}
    if kl_coef is not None:
        tensors["ref_hidden"] = near(tensors["hidden"])
        options["kl_coef"] = kl_coef

    def run(function, tensors):
        found = function(**tensors, target=target, advantage=advantage, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return {"loss": loss.detach(), **gradients((loss,), (torch.tensor(3.0),), tensors)}

    compare(
        run(pk.policy_loss, tensors),
        run(head.policy_loss, tensors),
        run(head.policy_loss, doubled(tensors)),
        dtype,
        loss=1.0,
    )


@pytest.fixture
def blocks(monkeypatch):
    """The other route, by blocks of 16 rows, or of 8 and their references."""
    monkeypatch.setattr(head_op, "ROUTE", "blocks")
    monkeypatch.setattr(head_kernels, "LOGITS_BYTES", 0)
    monkeypatch.setattr(head_kernels, "LOGITS_ROWS", 16)
    monkeypatch.setattr(head_kernels, "_head_stats_kernel", None)  # not by tiles


@pytest.mark.parametrize(("test", "arguments"), clipped.of_blocks(DTYPES[1]), ids=clipped.said)
def test_by_blocks(blocks, test, arguments):
    test("triton", *arguments)


def test_a_row_does_not_depend_on_its_batch():
    """The vocabulary's splits, and the order of their sum, are the same for any N. Row 32 leads
    its tile, as it does alone: numpy's product, unlike a GPU's, depends on the place in a tile."""
    tensors = make_head(37, 33, 1003, torch.float32)
    target = make_target(37, 1003)
    batch = pk.linear_log_prob(**tensors, target=target, return_entropy=True)
    tensors["hidden"] = tensors["hidden"][32:33]
    alone = pk.linear_log_prob(**tensors, target=target[32:33], return_entropy=True)
    assert torch.equal(batch[0][32:33], alone[0]) and torch.equal(batch[1][32:33], alone[1])


@pytest.mark.parametrize(
    ("offset", "dtype"), [(0.0, DTYPES[1]), (1e4, DTYPES[1]), (-1e4, DTYPES[0])], ids=str
)
def test_the_published_error(offset, dtype):
    """Of both routes, and of log_prob; a bias of -inf masks a class, and all of the last tile."""
    t = {k: x.detach() for k, x in make_head(16, 40, 300, dtype).items()}
    t["bias"] = (offset + torch.randn(300)).to(dtype)
    t["bias"][10:20], t["bias"][256:] = -torch.inf, -torch.inf
    target = torch.arange(16) * 13 % 9
    exact_t = {k: x.double() for k, x in t.items()}
    kept = t["bias"].isfinite()
    exact_t["weight"], exact_t["bias"] = exact_t["weight"][kept], exact_t["bias"][kept]
    exact = head.linear_log_prob(**exact_t, target=target)
    largest = exact_t["weight"].norm(dim=1).max()
    size = exact_t["hidden"].norm(dim=1) * largest + exact_t["bias"].abs().max()
    for route in ("tiles", "blocks"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_op, "ROUTE", route)
            found = pk.linear_log_prob(**t, target=target, return_entropy=True)
        check_bound(found, exact, size, 1.0)
    logits = (t["hidden"].float() @ t["weight"].float().T + t["bias"].float()).to(dtype)
    found = pk.log_prob(logits, target, return_entropy=True)
    logits = logits[:, kept].double()
    check_bound(found, logits_room.log_prob(logits, target), logits.abs().amax(1), 1.0)


@pytest.mark.parametrize("route", ["tiles", "blocks"])
def test_the_largest_vocabulary(monkeypatch, route):
    monkeypatch.setattr(head_op, "ROUTE", route)
    monkeypatch.setitem(_triton._INTERPRETER, "BLOCK_V", 16384)  # in fewer tiles
    tensors, target = make_head(2, 4, 262144, torch.float32, bias=False), make_target(2, 262144)

    def run(function, tensors):
        found = function(**tensors, target=target)
        found = found if isinstance(found, torch.Tensor) else found[0]
        return {"log_prob": found.detach(), **gradients((found,), (torch.ones(2),), tensors)}

    exact = run(head.linear_log_prob, doubled(tensors))
    theirs = run(head.linear_log_prob, tensors)
    compare(run(pk.linear_log_prob, tensors), theirs, exact, torch.float32)


@pytest.mark.parametrize("case", ["transposed weight", "strided hidden", "N = 0", "all ignored"])
def test_head_layouts(case):
    tensors = make_head(9, 24, 290, torch.float32, trainable_head=case == "N = 0")
    target = make_target(9, 290)
    if case == "transposed weight":
        tensors["weight"] = torch.randn(24, 290).t() / 5
    elif case == "strided hidden":
        tensors["hidden"] = torch.randn(9, 48)[:, ::2].detach().requires_grad_()
    elif case == "N = 0":
        tensors["hidden"], target = torch.randn(0, 24).requires_grad_(), target[:0]
    else:
        target = torch.full_like(target, -100)

    def run(function, tensors):
        found = function(**tensors, target=target)
        found = found if isinstance(found, torch.Tensor) else found[0]
        incoming = (torch.linspace(-1, 1, len(target)),)
        return {"log_prob": found.detach(), **gradients((found,), incoming, tensors)}

    compare(
        run(pk.linear_log_prob, tensors),
        run(head.linear_log_prob, tensors),
        run(head.linear_log_prob, doubled(tensors)),
        torch.float32,
    )


# ------------------------------------------------------------------------------------------------
# log_prob and kl from logits
# ------------------------------------------------------------------------------------------------

# (N, V): 1003 = three tiles of 256 columns and a part; V = 2: the smallest choice.
LOGITS_SIZES = [(7, 1003), (3, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", LOGITS_SIZES, ids=str)
def test_log_prob(sizes, options, dtype):
    n, v = sizes
    tensors = {"logits": (2 * torch.randn(n, v)).to(dtype).requires_grad_()}
    target, incoming = make_target(n, v), (torch.randn(n), torch.randn(n))

    def run(function, tensors, **more):
        found = function(**tensors, target=target, **options, **more)
        return {
            "log_prob": found[0].detach(),
            "entropy": found[1].detach(),
            **gradients(found, incoming, tensors),
        }

    compare(
        run(pk.log_prob, tensors, return_entropy=True),
        run(logits_room.log_prob, tensors),
        run(logits_room.log_prob, doubled(tensors)),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
@pytest.mark.parametrize("sizes", LOGITS_SIZES, ids=str)
def test_kl(sizes, options, dtype):
    n, v = sizes

    def sample():
        tensors = {"logits": (2 * torch.randn(n, v)).to(dtype).requires_grad_()}
        tensors["ref_logits"] = near(tensors["logits"])
        incoming = (torch.randn(n),)

        def run(function, tensors):
            kl = function(**tensors, **options)
            return {"kl": kl.detach(), **gradients((kl,), incoming, tensors)}

        return (
            run(pk.kl, tensors),
            run(logits_room.kl, tensors),
            run(logits_room.kl, doubled(tensors)),
        )

    ours, theirs, exact = gathered(sample, min(n, v))
    compare(ours, theirs, exact, dtype, kl=rms_of_log_ratio(exact["kl"]))


def test_masked_and_shifted_logits():
    """-inf logits have probability 0 and no gradient; a constant offset costs no precision."""
    logits = torch.randn(4, 700)
    logits[:, 300:] = -torch.inf  # all of the last tile
    logits[1] += 1e4
    logits.requires_grad_()
    target = torch.tensor([0, 299, 5, 17])
    ours = pk.log_prob(logits, target, return_entropy=True)
    exact = logits_room.log_prob(logits.double()[:, :300], target)
    torch.testing.assert_close([t.double() for t in ours], list(exact), atol=3e-6, rtol=0)
    (found,) = torch.autograd.grad(sum(t.sum() for t in ours), logits)
    (expected,) = torch.autograd.grad(sum(t.sum() for t in exact), logits)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
    assert (found[:, 300:] == 0).all()


@pytest.mark.parametrize("case", ["transposed", "3-D", "N = 0"])
def test_logits_layouts(case):
    logits = {"transposed": torch.randn(300, 6).t(), "N = 0": torch.randn(0, 300)}.get(case)
    logits = torch.randn(2, 3, 300) if logits is None else logits
    target = torch.randint(0, 300, logits.shape[:-1])
    logits = logits.detach().requires_grad_()
    ours = pk.log_prob(logits, target)
    theirs, _ = logits_room.log_prob(logits.reshape(-1, 300), target.reshape(-1))
    torch.testing.assert_close(ours.reshape(-1), theirs)
    incoming = torch.randn(ours.shape)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits, incoming),
        torch.autograd.grad(theirs, logits, incoming.reshape(-1)),
    )


# ------------------------------------------------------------------------------------------------
# rms_norm
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype):
    for mode in norm.CASTING_MODES:
        norm.test_law("triton", dtype, mode)


def test_rms_norm_layouts():
    norm.test_float64_gradient_and_layouts("triton")
