"""The ops on a GPU, held to float64 and to the CPU's dropout mask: `pytest -m gpu`."""

import pytest
import test_lora_mlp as mlp
import torch
from _compare import check_bound, check_law, doubled

import perl_kernels as pk
from perl_kernels import _dropout, _library
from perl_kernels.head import reference as head
from perl_kernels.log_prob import reference as logits_room
from perl_kernels.lora_linear import reference as lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]

if torch.cuda.is_available():
    from perl_kernels.head import triton as head_kernels

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
# lora_mlp
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", mlp.SAVE)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_mlp(p, save, dtype):
    tensors = mlp.make(507, 123, 200, 96, (5, 16, 64), dtype)
    mlp.hold_to_law(*mlp.three_ways(tensors, save, dropout_p=p), dtype)


# ------------------------------------------------------------------------------------------------
# head
# ------------------------------------------------------------------------------------------------

# (N, H, V). 50257, 1003: multiples of no tile. N = 1: one row. V = 2: the smallest choice.
HEAD_SIZES = [(7, 33, 1003), (1, 64, 50257), (19, 5, 2), (300, 256, 4099)]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [*HEAD_SIZES, (70, 64, 20000)], ids=str)
def test_linear_log_prob_by_blocks(monkeypatch, sizes, options, dtype):
    """The other route, of two blocks of columns and a part at the largest; over a frozen head."""
    monkeypatch.setattr(head_kernels, "ROUTE", "blocks")
    tensors, target = make_head(*sizes, dtype, bias=bool(options)), make_target(sizes[0], sizes[2])
    incoming = torch.randn(sizes[0])

    def run(function, tensors, **more):
        found = function(**tensors, target=target, **options, **more)
        named = dict(zip(("log_prob", "entropy"), (t.detach() for t in found), strict=True))
        return {**named, **gradients(found[0], leaves_of(tensors), [incoming.to(found[0].dtype)])}

    ours = run(pk.linear_log_prob, tensors, return_entropy=True)
    theirs = run(head.linear_log_prob, tensors)
    exact = run(head.linear_log_prob, doubled(tensors))
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


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
    monkeypatch.setattr(head_kernels, "ROUTE", route)
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

    logits = torch.randn(40, 1003, dtype=torch.bfloat16, requires_grad=True)

    def logits_step():
        found = pk.log_prob(logits, target)
        return [found.detach(), *torch.autograd.grad(found, logits, coefficient)]

    block = mlp.make(130, 96, 160, 96, (8, 4, 16), torch.bfloat16)
    d_block = torch.randn(130, 96).to(torch.bfloat16)

    def block_step():
        return list(mlp.outputs_and_gradients(mlp.ours, block, d_block).values())

    return {
        "lora_linear": (lora_step, lora_tensors["x"]),
        "lora_mlp": (block_step, block["x"]),
        "linear_log_prob": (log_prob_step, hidden),
        "policy_loss": (policy_step, hidden),
        "log_prob": (logits_step, logits),
    }


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


@pytest.mark.parametrize(
    "name", ["lora_linear", "lora_mlp", "linear_log_prob", "policy_loss", "log_prob"]
)
def test_cuda_graph_replays_on_new_values(name):
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


@pytest.mark.parametrize(
    "name", ["lora_linear", "lora_mlp", "linear_log_prob", "policy_loss", "log_prob"]
)
def test_nothing_waits_for_the_device_and_results_repeat(name):
    step, _ = steps()[name]
    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
