"""The ops on a GPU, held to float64 and to the CPU's dropout mask: `pytest -m gpu`."""

import importlib

import pytest
import test_head as clipped
import test_lora_mlp as mlp
import test_multi_lora_linear as multi
import torch
from _compare import check_bound, check_law, doubled

import perl_kernels as pk
from perl_kernels import _dropout, _library, _tuned
from perl_kernels.head import op as head_op
from perl_kernels.head import reference as head
from perl_kernels.log_prob import reference as logits_room
from perl_kernels.lora_linear import reference as lora
from perl_kernels.rms_norm import reference as norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"temperature": 0.7, "softcap": 5.0}]


@pytest.fixture(autouse=True)
def on_gpu(request):
    """Tensors are made on the GPU, and Triton runs the ops; `backend` in a test names another."""
    backend = getattr(request.node, "callspec", None) and request.node.callspec.params.get(
        "backend"
    )
    backend = backend or "triton"
    if _library.missing[backend]:
        pytest.skip(f"backend {backend}: {_library.missing[backend]}")
    with pk.use_backend(backend), torch.device("cuda"):
        yield


def gradients(outputs, leaves, incoming):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def leaves_of(tensors):
    return {name: t for name, t in tensors.items() if t is not None and t.requires_grad}


# ------------------------------------------------------------------------------------------------
# lora_linear
# ------------------------------------------------------------------------------------------------

# (N, D, O, R). 507, 123, 45: multiples of no tile. N = 1, 2, 15 .. 65: decode, and on both sides
# of a tile. R = 256: the largest rank. 1030: past one split of rows. O = 1: a scalar head.
LORA_SIZES = [
    (507, 123, 45, 5),
    (1, 123, 77, 17),
    (2, 64, 64, 8),
    (15, 96, 33, 16),
    (64, 256, 192, 16),
    (65, 256, 192, 64),
    (1030, 512, 768, 256),
    (33, 3, 1, 1),
]


def make_lora(n, d, o, r, dtype, adapter_dtype=None):
    return {
        "x": torch.randn(n, d).to(dtype).requires_grad_(),
        "weight": (torch.randn(o, d) / d**0.5).to(dtype),
        "a": (torch.randn(r, d) / d**0.5).to(adapter_dtype or dtype).requires_grad_(),
        "b": (torch.randn(o, r) / r**0.5).to(adapter_dtype or dtype).requires_grad_(),
        "bias": torch.randn(o).to(dtype).requires_grad_(),
    }


def run_lora(function, tensors, dy, **options):
    y = function(**tensors, **options)
    return {"y": y.detach(), **gradients(y, leaves_of(tensors), [dy.to(y.dtype)])}


def plain_lora(x, weight, a, b, **options):
    return lora.lora_linear(x, weight, a.to(x.dtype), b.to(x.dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LORA_SIZES, ids=str)
def test_lora_linear(sizes, dtype):
    tensors, dy = make_lora(*sizes, dtype), torch.randn(sizes[0], sizes[2]).to(dtype)
    ours = run_lora(pk.lora_linear, tensors, dy, scale=0.7)
    theirs = run_lora(plain_lora, tensors, dy, scale=0.7)
    exact = run_lora(plain_lora, doubled(tensors), dy, scale=0.7)
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


def by_routes(tensors, y, dx):
    """lora_linear takes these routes at the sizes of these tensors, in the pinned tiles."""
    x, sizes = tensors["x"], (*tensors["x"].shape, *tensors["b"].shape)
    wanted = {"y": y, "dx": dx, "dx_dropout": dx}
    return _tuned.using(
        _tuned.gpu_name(x.device),
        {_tuned.key_of(k, x.dtype, *sizes): _tuned.Finding(route) for k, route in wanted.items()},
    )


# Any size may take any route. 123, 45: plain loads; 512, 1096: tensor descriptors.
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "routes", [("library", "library"), ("fused", "fused"), ("decode", "fused")]
)
@pytest.mark.parametrize("sizes", [*LORA_SIZES[:2], (300, 512, 1096, 48)], ids=str)
def test_every_route(sizes, routes, dtype):
    tensors, dy = make_lora(*sizes, dtype), torch.randn(sizes[0], sizes[2]).to(dtype)
    p, seed = 0.3, torch.tensor(2**62 + 12345)

    def seeded(x, weight, a, b, bias):
        rest = ([a], [b], [0.7], p, seed)
        (y,), _ = torch.ops.perl_kernels.lora_linear(x, [weight], [bias], *rest)
        return y

    with by_routes(tensors, *routes):
        ours = run_lora(seeded, tensors, dy)
    options = {"scale": 0.7, "dropout_p": p, "seed": seed}
    theirs = run_lora(plain_lora, tensors, dy, **options)
    exact = run_lora(plain_lora, doubled(tensors), dy, **options)
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


@pytest.mark.parametrize("route", ["library", "fused"])
def test_lora_linear_beyond_two_to_the_31_elements(route):
    n, d, o = 540_000, 64, 4096
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors = make_lora(n, d, o, 8, torch.bfloat16)
    last = {**tensors, "x": tensors["x"][-5:].detach().requires_grad_()}
    dy = torch.zeros(n, o, dtype=torch.bfloat16)
    dy[-5:].normal_()
    with by_routes(tensors, route, route):
        ours = run_lora(pk.lora_linear, tensors, dy)
    theirs = run_lora(plain_lora, last, dy[-5:])
    exact = run_lora(plain_lora, doubled(last), dy[-5:])
    for name in exact:
        found = ours[name][-5:] if name in ("y", "dx") else ours[name]
        check_law(name, found, theirs[name], exact[name], torch.bfloat16)


def test_the_tuner_finds_a_route_that_is_right(tmp_path):
    sizes = (300, 256, 512, 16)
    found = pk.tune_lora_linear([sizes], tmp_path / "findings.json", seconds=0.01)
    try:
        assert all(len(entry["microseconds"]) > 1 for entry in found.values())
        test_lora_linear(sizes, torch.bfloat16)
    finally:
        pk.use_tuned(None)


def test_float32_adapters_on_a_bfloat16_base():
    tensors = make_lora(65, 48, 33, 5, torch.bfloat16, adapter_dtype=torch.float32)
    dy = torch.randn(65, 33).to(torch.bfloat16)
    ours = run_lora(pk.lora_linear, tensors, dy, scale=2.0)
    theirs = run_lora(plain_lora, tensors, dy, scale=2.0)
    exact = run_lora(plain_lora, doubled(tensors), dy, scale=2.0)
    assert ours["da"].dtype == ours["db"].dtype == torch.float32
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["strided x", "transposed weight", "3-D x", "N=0"])
def test_layouts(case, dtype):
    tensors = make_lora(48, 72, 40, 6, dtype)
    if case == "strided x":
        tensors["x"] = torch.randn(48, 144).to(dtype)[:, ::2].detach().requires_grad_()
    elif case == "transposed weight":
        tensors["weight"] = (torch.randn(72, 40) / 72**0.5).to(dtype).t()
    elif case == "3-D x":
        tensors["x"] = torch.randn(6, 8, 72).to(dtype).requires_grad_()
    else:
        tensors["x"] = torch.randn(0, 72).to(dtype).requires_grad_()
    dy = torch.randn(*tensors["x"].shape[:-1], 40).to(dtype)
    ours = run_lora(pk.lora_linear, tensors, dy, scale=3.0)
    theirs = run_lora(plain_lora, tensors, dy, scale=3.0)
    exact = run_lora(plain_lora, doubled(tensors), dy, scale=3.0)
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


def test_projections_that_share_x():
    x = torch.randn(130, 96).requires_grad_()
    shapes = [(64, 5), (32, 16), (33, 40)]
    weight = [torch.randn(o, 96) / 96**0.5 for o, _ in shapes]
    a = [(torch.randn(r, 96) / 96**0.5).requires_grad_() for _, r in shapes]
    b = [torch.randn(o, r, requires_grad=True) for o, r in shapes]
    dy = [torch.randn(130, o) for o, _ in shapes]

    def run(x, weight, a, b, dy, together):
        if together:
            y = pk.lora_linear(x, weight, a, b)
        else:
            y = tuple(lora.lora_linear(x, *t) for t in zip(weight, a, b, strict=True))
        return [*(t.detach() for t in y), *torch.autograd.grad(y, [x, *a, *b], dy)]

    def twice(tensors):
        return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]

    ours, theirs = run(x, weight, a, b, dy, True), run(x, weight, a, b, dy, False)
    exact = run(*twice([x]), *map(twice, (weight, a, b, dy)), False)
    for i, (o, t, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        check_law(f"result {i}", o, t, e, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(507, 123), (1, 64), (70, 257)], ids=str)
def test_dropout_mask_is_the_cpu_mask(shape, dtype):
    """With identity adapters and no base, y is drop(1) and dx its slope: both are the mask."""
    rows, columns = shape
    seed, p = torch.tensor(2**40 + 12345), 0.3
    kept = _dropout.keep_mask(seed.cpu(), rows, columns, p)
    x = torch.ones(rows, columns, dtype=dtype, requires_grad=True)
    identity = torch.eye(columns, dtype=dtype, requires_grad=True)
    nothing = torch.zeros(columns, columns, dtype=dtype)
    (y,), _ = torch.ops.perl_kernels.lora_linear(
        x, [nothing], [], [identity], [identity], [1.0], p, seed
    )
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for found in (y, dx):
        assert torch.equal(found.detach().cpu() != 0, kept)
        torch.testing.assert_close(found.detach().cpu()[kept].float().mean().item(), 1 / (1 - p),
                                   rtol=1e-2, atol=0)  # fmt: skip


def test_dropout_obeys_the_law():
    tensors, dy = make_lora(300, 123, 45, 5, torch.float32), torch.randn(300, 45)
    torch.manual_seed(7)
    seed = _dropout.new_seed(torch.device("cuda"))
    torch.manual_seed(7)
    ours = run_lora(pk.lora_linear, tensors, dy, dropout_p=0.25)
    options = {"dropout_p": 0.25, "seed": seed}
    theirs = run_lora(lora.lora_linear, tensors, dy, **options)
    exact = run_lora(lora.lora_linear, doubled(tensors), dy, **options)
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], torch.float32)


# ------------------------------------------------------------------------------------------------
# The thin products of lora_linear by themselves: Triton's kernels and CUDA C++'s
# ------------------------------------------------------------------------------------------------

# (N, D or O, R). 507, 123: rows off 16 bytes. 17, 65: past a tile. 1: a token, its columns cut into
# pieces. R up to 270: each width of tile, and more ranks than a block has. 8200: a ring many times
# over.
THIN_SIZES = [
    (507, 123, 5),
    (1, 600, 16),
    (65, 520, 24),
    (17, 1032, 64),
    (130, 264, 100),
    (70, 136, 270),
    (8200, 1024, 16),
    (1, 1, 1),
]
# Triton compiles for each dtype, which takes seconds, and is tested in all of them above.
TWINS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.bfloat16), ("cuda", torch.bfloat16), ("cuda", torch.float16)],
    ids=str,
)


def hold_product_to_law(name, found, one, other, scale=1.0):
    check_law(
        name, found, scale * (one @ other), scale * (one.double() @ other.double()), one.dtype
    )


def thin_ds_db(kernels, dy, b, s, scale, db):
    ds = dy.new_empty(dy.shape[0], b.shape[1] + 3)[:, 1:-2]  # as one of several projections
    kernels._ds_db(dy, b, s, scale, ds, db)
    return ds


@TWINS
@pytest.mark.parametrize("size", THIN_SIZES, ids=str)
def test_thin_products(size, dtype, backend):
    from perl_kernels.lora_linear import triton as kernels

    n, d, r = size
    x, a = torch.randn(n, d).to(dtype), (torch.randn(r, d) / d**0.5).to(dtype)
    s = kernels._shrink(x, a, 0.0, None)
    hold_product_to_law("s", s, x, a.T)
    assert torch.equal(s, kernels._shrink(x, a, 0.0, None))
    b, db = torch.randn(d, r).to(dtype), torch.empty(d, r, dtype=dtype)
    ds = thin_ds_db(kernels, x, b, s, 0.7, db)
    hold_product_to_law("ds", ds, x, b, 0.7)
    hold_product_to_law("db", db, x.T, s, 0.7)
    again = torch.empty_like(db)
    assert torch.equal(ds, thin_ds_db(kernels, x, b, s, 0.7, again)) and torch.equal(db, again)
    assert torch.equal(ds, thin_ds_db(kernels, x, b, s, 0.7, None))


@TWINS
@pytest.mark.parametrize("layout", ["every other column", "rows apart", "off 16 bytes", "turned"])
def test_thin_products_of_layouts(layout, dtype, backend):
    from perl_kernels.lora_linear import triton as kernels

    whole = torch.randn(80, 160).to(dtype)
    x = {
        "every other column": whole[:, ::2],
        "rows apart": whole[:, 16:96],
        "off 16 bytes": whole[:, 3:83],
        "turned": whole.T[:, :80],
    }[layout]
    a, b = torch.randn(8, 80).to(dtype), torch.randn(8, 80).to(dtype).T
    hold_product_to_law("s", kernels._shrink(x, a, 0.0, None), x, a.T)
    s, db = torch.randn(x.shape[0], 13).to(dtype)[:, 5:], torch.empty(80, 8)  # a float32 adapter
    ds = thin_ds_db(kernels, x, b, s, 2.0, db)
    hold_product_to_law("ds", ds, x, b, 2.0)
    exact = 2.0 * x.double().T @ s.double()
    check_law("db", db, 2.0 * x.float().T @ s.float(), exact, torch.float32)


@TWINS
@pytest.mark.parametrize("shape", [(507, 123), (1, 64), (70, 200)], ids=str)
def test_shrink_draws_the_mask_of_the_definition(shape, dtype, backend):
    from perl_kernels.lora_linear import triton as kernels

    seed, p = torch.tensor(2**62 + 2**33 + 12345), 0.3
    identity = torch.eye(shape[1], dtype=dtype)
    s = kernels._shrink(torch.ones(shape, dtype=dtype), identity, p, seed)
    kept = _dropout.keep_mask(seed.cpu(), *shape, p)
    assert torch.equal(s.cpu(), (kept / (1 - p)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_lora_linear_with_cuda_kernels(p, dtype, backend):
    tensors, dy = make_lora(130, 264, 136, 16, dtype), torch.randn(130, 136).to(dtype)
    options = {"scale": 0.7, "dropout_p": p}
    torch.manual_seed(7)
    ours = run_lora(pk.lora_linear, tensors, dy, **options)
    torch.manual_seed(7)
    seed = _dropout.new_seed(torch.device("cuda")) if p else None
    theirs = run_lora(plain_lora, tensors, dy, **options, seed=seed)
    exact = run_lora(plain_lora, doubled(tensors), dy, **options, seed=seed)
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


# ------------------------------------------------------------------------------------------------
# lora_mlp
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", mlp.SAVE)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_lora_mlp(activation, p, save, dtype):
    tensors = mlp.make(507, 123, 200, 96, (5, 16, 64), dtype)
    found = mlp.three_ways(tensors, save, dropout_p=p, activation=activation)
    mlp.hold_to_law(*found, dtype)


# ------------------------------------------------------------------------------------------------
# multi_lora_linear
# ------------------------------------------------------------------------------------------------

# 3000: past one chunk of an adapter's rows. Rank 200: more than a block, the others padded.
MULTI_SIZES = [*multi.SIZES, (3000, 256, 192, (16, 5, 200, 64))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MULTI_SIZES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_multi_lora_linear(p, sizes, dtype):
    tensors, adapter = multi.make(*sizes, dtype, bias=sizes[1] % 2 == 1)
    dy = torch.randn(sizes[0], sizes[2]).to(dtype)
    multi.hold_to_law(*multi.three_ways(tensors, adapter, dy, p), dtype)


def test_a_cuda_graph_reads_the_rows_adapters_anew():
    tensors, adapter = multi.make(130, 96, 64, (8, 5, 3))
    graph, (y,) = captured(lambda: [multi.ours(tensors, adapter).detach()])
    adapter.copy_(adapter.flip(0))
    graph.replay()
    assert torch.equal(y, multi.ours(tensors, adapter))


# ------------------------------------------------------------------------------------------------
# head
# ------------------------------------------------------------------------------------------------

# (N, H, V). 50257, 1003: multiples of no tile. N = 1: one row. V = 2: the smallest choice.
HEAD_SIZES = [(7, 33, 1003), (1, 64, 50257), (19, 5, 2), (300, 256, 4099)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (37, 130), (65, 4096), (3, 16384)], ids=str)
def test_rms_norm(sizes, dtype):
    x, dy, weight = (torch.randn(*s).to(dtype) for s in (sizes, sizes, sizes[1:]))
    found = []
    for function, cast in ((pk.rms_norm, dtype), (norm.rms_norm, dtype), (norm.rms_norm, None)):
        given = [t.double() if cast is None else t for t in (x, weight, dy)]
        given[0].requires_grad_()
        y = function(*given[:2], eps=1e-3)
        found.append((y.detach(), *torch.autograd.grad(y, given[0], given[2])))
    scale = float((dy * weight).double().abs().mean()) if sizes[1] == 1 else None
    check_law("y", *(f[0] for f in found), dtype)
    check_law("dx", *(f[1] for f in found), dtype, scale)


def make_head(n, h, v, dtype, trainable=False, bias=False):
    hidden = (2 * torch.randn(n, h)).to(dtype)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": (torch.randn(v, h) / h**0.5).to(dtype).requires_grad_(trainable),
        "bias": torch.randn(v).to(dtype).requires_grad_(trainable) if bias else None,
    }


def make_target(n, v):
    target = torch.randint(0, v, (n,))
    target[0], target[-1] = 0, v - 1
    if n > 2:
        target[1] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=str)
def test_linear_log_prob(sizes, options, dtype):
    tensors = make_head(*sizes, dtype, trainable=True, bias=bool(options))
    target = make_target(sizes[0], sizes[2])
    incoming = [torch.randn(sizes[0]) for _ in range(2)]

    def run(function, tensors, **more):
        found = function(**tensors, target=target, **options, **more)
        sent = [g.to(found[0].dtype) for g in incoming]
        named = dict(zip(("log_prob", "entropy"), (t.detach() for t in found), strict=True))
        return {**named, **gradients(tuple(found), leaves_of(tensors), sent)}

    ours = run(pk.linear_log_prob, tensors, return_entropy=True)
    theirs = run(head.linear_log_prob, tensors)
    exact = run(head.linear_log_prob, doubled(tensors))
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=str)
def test_linear_kl(sizes, options, dtype):
    tensors = make_head(*sizes, dtype)
    shift = 0.3 * torch.randn(*tensors["hidden"].shape)
    tensors["ref_hidden"] = (tensors["hidden"].detach().float() + shift).to(dtype)
    incoming = torch.randn(sizes[0])

    def run(function, tensors):
        found = function(**tensors, **options)
        kl = found.kl if isinstance(found, tuple) else found
        return {
            "kl": kl.detach(),
            **gradients(kl, {"hidden": tensors["hidden"]}, [incoming.to(kl.dtype)]),
        }

    ours, theirs = run(pk.linear_kl, tensors), run(head.linear_kl, tensors)
    exact = run(head.linear_kl, doubled(tensors))
    # the terms of a KL are log-ratios, and it is about half their mean square
    log_ratio = (2 * exact["kl"].mean().item()) ** 0.5
    check_law("kl", ours["kl"], theirs["kl"], exact["kl"], dtype, log_ratio)
    check_law("dhidden", ours["dhidden"], theirs["dhidden"], exact["dhidden"], dtype)


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(head_op, "ROUTE", "blocks")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("test", "arguments"),
    [one for low in DTYPES[1:] for one in clipped.of_blocks(low)],
    ids=clipped.said,
)
def test_by_blocks(blocks, test, arguments, backend):
    test(backend, *arguments)


# Two blocks of rows and a part, alone and with as many references; rows of no whole 16 bytes.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("of", [("log_prob",), ("log_prob", "kl")], ids=str)
def test_gradients_by_several_blocks(blocks, monkeypatch, of, dtype, backend):
    kernels = importlib.import_module("perl_kernels.head.triton")
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 128 * 4 * 20032)
    sizes = (300 if len(of) == 1 else 150, 64, 20001)
    clipped.test_gradient_over_a_frozen_head(backend, of, 2.0, sizes, OPTIONS[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rank", [0, 5, 64])
def test_policy_loss_of_ratios(rank, level, dtype):
    """With an adapter on the head, kept in float32 where its rank is odd, and without."""
    tensors = make_head(300, 64, 1003, dtype)
    if rank:
        adapter_dtype = torch.float32 if rank % 2 else dtype
        tensors["a"] = (torch.randn(rank, 64) / 8).to(adapter_dtype).requires_grad_()
        tensors["b"] = (torch.randn(1003, rank) / rank**0.5).to(adapter_dtype).requires_grad_()
    tensors = {k: t.view(60, 5, 64) if k == "hidden" else t for k, t in tensors.items()}
    tensors["hidden"] = tensors["hidden"].detach().requires_grad_()
    shift = 0.3 * torch.randn(60, 5, 64)
    tensors["ref_hidden"] = (tensors["hidden"].detach().float() + shift).to(dtype)
    target, advantage = make_target(300, 1003).view(60, 5), torch.randn(60, 5)
    options = {"kl_coef": 0.3, "epsilon": 0.2, "importance_sampling_level": level}
    with torch.no_grad():
        log_prob = pk.policy_loss(**tensors, target=target, advantage=advantage).log_prob
    old = log_prob + 0.3 * torch.randn(60, 5)

    def run(function, tensors, advantage, old):
        given = {"advantage": advantage, "old_log_prob": old}
        found = function(**tensors, target=target, **given, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return {"loss": loss.detach(), **gradients(loss, leaves_of(tensors), None)}

    ours = run(pk.policy_loss, tensors, advantage, old)
    theirs = run(head.policy_loss, tensors, advantage, old)
    exact = run(head.policy_loss, doubled(tensors), advantage.double(), old.double())
    scale = {"loss": advantage.abs().mean().item()}
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype, scale.get(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    """Bit for bit: alone, among a few, among many."""
    tensors, target = make_head(300, 256, 4099, dtype), make_target(300, 4099)
    whole = pk.linear_log_prob(**tensors, target=target)
    for rows in (slice(299, 300), slice(5, 9), slice(40, 171)):
        part = {**tensors, "hidden": tensors["hidden"][rows]}
        assert torch.equal(pk.linear_log_prob(**part, target=target[rows]), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [(33, 1024, 300), (3, 8, 262144), (65541, 8, 17)], ids=str)
@pytest.mark.parametrize("route", ["tiles", "blocks"])
def test_the_published_error(monkeypatch, route, sizes, offset, dtype):
    monkeypatch.setattr(head_op, "ROUTE", route)
    t = {k: x.detach() for k, x in make_head(*sizes, dtype, bias=True).items()}
    t["bias"] = (offset + t["bias"].float()).to(dtype)
    target = make_target(sizes[0], sizes[2]).clamp(min=0)
    found = pk.linear_log_prob(**t, target=target, return_entropy=True)
    t = {k: x.double() for k, x in t.items()}
    size = t["hidden"].norm(dim=1) * t["weight"].norm(dim=1).max() + t["bias"].abs().max()
    check_bound(found, head.linear_log_prob(**t, target=target), size, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl_coef", [None, 0.4])
def test_policy_loss(kl_coef, dtype):
    n, h, v = 300, 64, 1003
    tensors, options = make_head(n, h, v, dtype), {}
    if kl_coef is not None:
        shift = 0.3 * torch.randn(n, h)
        tensors["ref_hidden"] = (tensors["hidden"].detach().float() + shift).to(dtype)
        options["kl_coef"] = kl_coef
    target, advantage = make_target(n, v), torch.randn(n)

    def run(function, tensors, advantage):
        found = function(**tensors, target=target, advantage=advantage, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return {"loss": loss.detach(), **gradients(loss, {"hidden": tensors["hidden"]}, None)}

    log_prob, _ = head.linear_log_prob(
        tensors["hidden"].detach(), tensors["weight"], target, bias=tensors["bias"]
    )
    ours = run(pk.policy_loss, tensors, advantage)
    theirs = run(head.policy_loss, tensors, advantage)
    exact = run(head.policy_loss, doubled(tensors), advantage.double())
    terms = (advantage * log_prob).abs().mean().item()
    check_law("loss", ours["loss"], theirs["loss"], exact["loss"], dtype, terms)
    check_law("dhidden", ours["dhidden"], theirs["dhidden"], exact["dhidden"], dtype)


# ------------------------------------------------------------------------------------------------
# log_prob and kl from logits
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(7, 1003), (1, 50257), (5, 1), (1030, 65)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_logits(backend, sizes, options, dtype):
    n, v = sizes
    logits = (3 * torch.randn(n, v)).to(dtype).requires_grad_()
    ref_logits = (logits.detach().float() + 0.3 * torch.randn(n, v)).to(dtype)
    target, incoming = make_target(n, v), torch.randn(n)

    def run(log_prob, kl, logits, ref_logits, **more):
        found = tuple(log_prob(logits, target, **options, **more))
        divergence = kl(logits, ref_logits, **options)
        sent = incoming.to(divergence.dtype)
        return {
            "log_prob": found[0].detach(),
            "entropy": found[1].detach(),
            "kl": divergence.detach(),
            **gradients(found, {"logits": logits}, [sent, sent.flip(0)]),
            **gradients(divergence, {"logits of kl": logits}, [sent]),
        }

    ours = run(pk.log_prob, pk.kl, logits, ref_logits, return_entropy=True)
    theirs = run(logits_room.log_prob, logits_room.kl, logits, ref_logits)
    twice = logits.detach().double().requires_grad_()
    exact = run(logits_room.log_prob, logits_room.kl, twice, ref_logits.double())
    log_ratio = (2 * exact["kl"].mean().item()) ** 0.5 or None
    for name in exact:
        found_dtype = dtype if name.startswith("d") else torch.float32
        scale = log_ratio if name == "kl" else None
        check_law(name, ours[name], theirs[name], exact[name], found_dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_inplace_backward(backend, dtype):
    leaf = torch.randn(70000, 33).to(dtype).requires_grad_()
    target, incoming = torch.randint(0, 33, (70000,)), torch.randn(70000)

    def run(inplace):
        logits = 2 * leaf
        found = pk.log_prob(logits, target, inplace_backward=inplace)
        return logits.detach(), torch.autograd.grad(found, leaf, incoming)[0]

    (_, expected), (written, gradient) = run(False), run(True)
    assert torch.equal(gradient, expected) and torch.equal(written, expected / 2)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_logits_beyond_two_to_the_31_elements(backend):
    n, v = 16500, 131072
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.empty(n, v, dtype=torch.bfloat16)
    logits[:-3].fill_(0.0)
    logits[-3:].normal_()
    target = torch.full((n,), v - 1)
    found = pk.log_prob(logits, target)[-3:]
    torch.testing.assert_close(found, logits_room.log_prob(logits[-3:], target[-3:])[0])


# ------------------------------------------------------------------------------------------------
# CUDA graphs, synchronisation, repeatability
# ------------------------------------------------------------------------------------------------


def steps():
    """Each op forward and backward, as a call without arguments and the input to vary."""
    lora_tensors = make_lora(130, 96, 64, 8, torch.bfloat16)
    dy = torch.randn(130, 64).to(torch.bfloat16)

    def lora_step():
        return list(run_lora(pk.lora_linear, lora_tensors, dy).values())

    def fused_step():
        with by_routes(lora_tensors, "fused", "fused"):
            return lora_step()

    tensors = make_head(40, 64, 1003, torch.bfloat16)
    hidden, weight = tensors["hidden"], tensors["weight"]
    ref_hidden = torch.randn(40, 64).to(torch.bfloat16)
    target, coefficient = make_target(40, 1003), torch.randn(40)

    def log_prob_step():
        found = pk.linear_log_prob(hidden, weight, target)
        return [found.detach(), *torch.autograd.grad(found, hidden, coefficient)]

    def policy_step():
        found = pk.policy_loss(
            hidden, weight, target, coefficient, ref_hidden=ref_hidden, kl_coef=0.1
        )
        return [found.kl, found.entropy, *torch.autograd.grad(found.loss, hidden)]

    def blocks_step():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_op, "ROUTE", "blocks")
            return policy_step()

    logits = torch.randn(40, 1003, dtype=torch.bfloat16, requires_grad=True)

    def logits_step():
        found = pk.log_prob(logits, target)
        return [found.detach(), *torch.autograd.grad(found, logits, coefficient)]

    block = mlp.make(130, 96, 160, 96, (8, 4, 16), torch.bfloat16)
    d_block = torch.randn(130, 96).to(torch.bfloat16)

    def block_step():
        return list(mlp.outputs_and_gradients(mlp.ours, block, d_block).values())

    rows_tensors, adapter = multi.make(130, 96, 64, (8, 5, 3), torch.bfloat16)

    def rows_step():
        found = multi.outputs_and_gradients(multi.ours, rows_tensors, adapter, dy)
        return list(found.values())

    return {
        "lora_linear": (lora_step, lora_tensors["x"]),
        "lora_linear, fused": (fused_step, lora_tensors["x"]),
        "lora_mlp": (block_step, block["x"]),
        "multi_lora_linear": (rows_step, rows_tensors["x"]),
        "linear_log_prob": (log_prob_step, hidden),
        "policy_loss": (policy_step, hidden),
        "policy_loss, blocks": (blocks_step, hidden),
        "log_prob": (logits_step, logits),
    }


STEPS = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "triton") for name in ("linear_log_prob", "multi_lora_linear", "policy_loss")]
    + [
        (name, b)
        for name in (
            "lora_linear",
            "lora_linear, fused",
            "lora_mlp",
            "log_prob",
            "policy_loss, blocks",
        )
        for b in ("triton", "cuda")
    ],
)


def captured(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@STEPS
def test_cuda_graph_replays_on_new_values(name, backend):
    step, varied = steps()[name]
    graph, outputs = captured(step)
    with torch.no_grad():
        varied.copy_(torch.randn(*varied.shape))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, eager in zip(outputs, step(), strict=True):
        assert torch.equal(replayed, eager)


def test_dropout_in_a_cuda_graph_draws_a_new_mask_each_time():
    tensors = make_lora(64, 96, 64, 8, torch.float32)
    graph, (y,) = captured(lambda: [pk.lora_linear(**tensors, dropout_p=0.5).detach()])
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(y.clone())
    assert not torch.equal(*masks)


@STEPS
def test_nothing_waits_for_the_device_and_results_repeat(name, backend):
    step, _ = steps()[name]
    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
