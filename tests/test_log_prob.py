import pytest
import torch
from _compare import check_bound, check_law, doubled, gathered

import perl_kernels as pk
from perl_kernels.log_prob import op, reference

# (N, V). 1003: multiple of no tile or vector width. N = 1: one row. V = 4099: past one tile.
# V = 1: nothing to choose. N = 1030: past one block of rows.
SIZES = [(7, 1003), (1, 4099), (5, 1), (1030, 65)]
OPTIONS = [{}, {"temperature": 0.7, "softcap": 5.0}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(n, v, dtype):
    return {"logits": (3 * torch.randn(n, v)).to(dtype).requires_grad_()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_log_prob_and_entropy(backend, sizes, options, dtype):
    n, v = sizes

    def run(function, tensors, target, incoming, **more):
        log_prob, entropy = function(**tensors, target=target, **options, **more)
        total = (incoming[0] * log_prob + incoming[1] * entropy).sum()
        gradient = torch.autograd.grad(total, tensors["logits"])[0]
        return {"log_prob": log_prob.detach(), "entropy": entropy.detach(), "dlogits": gradient}

    def sample():
        tensors, incoming = make(n, v, dtype), torch.randn(2, n)
        target = torch.randint(0, v, (n,))
        target[n // 2] = -100 if n > 1 else 0
        return (
            run(pk.log_prob, tensors, target, incoming, return_entropy=True),
            run(reference.log_prob, tensors, target, incoming),
            run(reference.log_prob, doubled(tensors), target, incoming),
        )

    ours, theirs, exact = gathered(sample, n)
    for name in exact:
        kind = dtype if name == "dlogits" else torch.float32
        check_law(name, ours[name], theirs[name], exact[name], kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kl(backend, sizes, options, dtype):
    n, v = sizes

    def run(function, tensors, incoming):
        kl = function(**tensors, **options)
        gradient = torch.autograd.grad((incoming * kl).sum(), tensors["logits"])[0]
        return {"kl": kl.detach(), "dlogits": gradient}

    def sample():
        tensors, incoming = make(n, v, dtype), torch.randn(n)
        shift = 0.3 * torch.randn(n, v)
        tensors["ref_logits"] = (tensors["logits"].detach().float() + shift).to(dtype)
        return (
            run(pk.kl, tensors, incoming),
            run(reference.kl, tensors, incoming),
            run(reference.kl, doubled(tensors), incoming),
        )

    ours, theirs, exact = gathered(sample, n)
    # the terms of a KL are log-ratios, and it is about half their mean square
    scale = (2 * exact["kl"].mean().item()) ** 0.5
    check_law("kl", ours["kl"], theirs["kl"], exact["kl"], torch.float32, scale)
    check_law("dlogits", ours["dlogits"], theirs["dlogits"], exact["dlogits"], dtype)


def test_leading_dimensions_strides_and_an_empty_batch(backend):
    logits = torch.randn(3, 4, 22)[..., ::2].detach().requires_grad_()
    target = torch.randint(0, 11, (3, 4))
    expected = torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(pk.log_prob(logits, target), expected)
    assert pk.kl(logits, logits.detach()).shape == (3, 4)
    empty = pk.log_prob(logits[:0], target[:0])
    assert empty.shape == (0, 4)
    assert torch.autograd.grad(empty.sum(), logits)[0].abs().sum() == 0


# 262144: the largest vocabulary; 65541 rows: past 16 bits.
@pytest.mark.parametrize("sizes", [(33, 1003), (2, 262144), (65541, 3)], ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_published_error(backend, dtype, offset, sizes):
    for spread, temperature in ((0.1, 1.0), (3.0, 0.5), (10.0, 2.0)):
        logits = (offset + spread * torch.randn(sizes)).to(dtype)
        target = torch.randint(0, sizes[1], sizes[:1])
        given = {"target": target, "temperature": temperature}
        found = pk.log_prob(logits, **given, return_entropy=True)
        exact = reference.log_prob(logits.double(), **given)
        check_bound(found, exact, logits.abs().amax(1), temperature)


def test_masked_logits_of_minus_infinity(backend):
    logits = torch.randn(4, 50)
    logits[:, 7:20] = -torch.inf
    logits.requires_grad_()
    target = torch.tensor([0, 30, 49, 6])
    log_prob, entropy = pk.log_prob(logits, target, return_entropy=True)
    distribution = torch.distributions.Categorical(logits=logits.detach().double())
    torch.testing.assert_close(log_prob.double(), distribution.log_prob(target))
    kept = torch.cat([logits[:, :7], logits[:, 20:]], dim=1).detach().double()
    expected = torch.distributions.Categorical(logits=kept).entropy()
    torch.testing.assert_close(entropy.double(), expected)
    gradient = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)[0]
    assert gradient.isfinite().all() and not gradient[:, 7:20].any()


# (...,): one class a row; (..., K): one, and several with the same one twice.
@pytest.mark.parametrize("classes", [None, 1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_selective_log_softmax_of_trl(backend, dtype, masked, classes):
    utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    logits = (3 * torch.randn(2, 9, 101)).to(dtype).requires_grad_()
    index = torch.randint(0, 101, (2, 9) if classes is None else (2, 9, classes))
    if classes == 4:
        index[..., 2] = index[..., 0]
    row_mask = (torch.rand(index.shape) < 0.7).long() if masked else None
    incoming = torch.randn(index.shape)

    def run(function, logits):
        found = function(logits, index, 0.7, row_mask)
        gradient = torch.autograd.grad(found, logits, incoming.to(found.dtype))[0]
        return {"log_prob": found.detach(), "dlogits": gradient}

    ours, theirs = (run(f, logits) for f in (pk.selective_log_softmax, utils.selective_log_softmax))
    assert ours["log_prob"].dtype == torch.float32 and ours["dlogits"].dtype == dtype
    exact = run(utils.selective_log_softmax, logits.detach().double().requires_grad_())
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype)


def test_selective_log_softmax_of_masked_and_misshapen(backend):
    logits, index = torch.randn(3, 11), torch.tensor([[0, 1], [2, 0], [1, 1]])
    logits[:, 0] = -torch.inf
    found = pk.selective_log_softmax(logits, index)
    assert found.isneginf().equal(index == 0) and not found.isnan().any()
    with pytest.raises(ValueError, match="index has shape"):
        pk.selective_log_softmax(logits, index[:2])
    with pytest.raises(ValueError, match="row_mask has shape"):
        pk.selective_log_softmax(logits, index, row_mask=index[:2])


@pytest.mark.parametrize("of", ["log_prob", "kl"])
@pytest.mark.parametrize("layout", ["rows", "part", "copied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward(backend, monkeypatch, dtype, layout, of):
    """The same gradient to the bit, in the memory of the logits, over several blocks of rows."""
    monkeypatch.setattr(op, "_OVER_BYTES", 4 * 101 * 2)
    leaf, target = torch.randn(3, 8, 101).to(dtype), torch.randint(0, 101, (3, 8))
    target[1, 2] = -100
    leaf.requires_grad_()
    incoming = torch.randn(3, 8)

    def run(inplace):
        logits = 2 * leaf
        if layout == "part":
            logits, t = logits[1:], target[1:]
        else:  # a transposed one has no flat view: its copy is written over
            logits, t = logits.transpose(0, 1) if layout == "copied" else logits, target
            t = t.t() if layout == "copied" else t
        if of == "kl":
            found = pk.kl(logits, logits.detach() / 2, inplace_backward=inplace)
        else:
            found, _ = pk.log_prob(logits, t, inplace_backward=inplace, return_entropy=True)
        sent = incoming.view(-1)[: found.numel()].view(found.shape)
        (gradient,) = torch.autograd.grad((found * sent).sum(), leaf)
        return logits.detach(), gradient

    (kept, expected), (written, found) = run(False), run(True)
    assert torch.equal(found, expected)
    if layout != "copied":
        dlogits = (expected if layout == "rows" else expected[1:]) / 2
        assert torch.equal(written, dlogits) and not torch.equal(kept, dlogits)


def test_inplace_backward_where_it_cannot_be_right(backend):
    leaf, target = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 8, 2, 3])
    for logits in (leaf, leaf[:]):
        with pytest.raises(ValueError, match="logits are a leaf that requires grad"):
            pk.log_prob(logits, target, inplace_backward=True)
    with pytest.raises(ValueError, match="logits are expanded"):
        pk.log_prob((2 * leaf[:1]).expand(4, 9), target, inplace_backward=True)
    with pytest.raises(Exception, match="under torch.compile"):
        torch.compile(
            lambda z: pk.log_prob(2 * z, target, inplace_backward=True),
            fullgraph=True, backend="eager",
        )(leaf)  # fmt: skip
    logits = 2 * leaf
    twice = logits.square().sum()  # its backward comes after ours
    twice = twice + pk.log_prob(logits, target, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice.backward()
    found = pk.log_prob(2 * leaf, target, inplace_backward=True).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_float64_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    ref_logits = torch.randn(4, 6, dtype=torch.float64)
    target = torch.tensor([0, 5, -100, 2])
    torch.autograd.gradcheck(
        lambda z: pk.log_prob(z, target, temperature=0.8, softcap=3.0, return_entropy=True),
        (logits,),
    )
    torch.autograd.gradcheck(lambda z: pk.kl(z, ref_logits, temperature=0.8), (logits,))
    torch.autograd.gradcheck(lambda z: reference.kl(z, ref_logits, softcap=2.0), (logits,))


def test_opcheck_and_compile(backend):
    logits, target = torch.randn(5, 11, requires_grad=True), torch.randint(0, 11, (5,))
    ref_logits = torch.randn(5, 11)
    stats = torch.ops.perl_kernels.logits_stats.default
    torch.library.opcheck(stats, (logits, target, None, 1.0, 0.0, -100))
    torch.library.opcheck(stats, (logits, None, ref_logits, 0.7, 4.0, -100))

    def function(z):
        return pk.log_prob(z, target).sum() + pk.kl(z, ref_logits).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(logits), logits), torch.autograd.grad(function(logits), logits)
    )


def bad_calls():
    z, t = torch.randn(4, 9), torch.tensor([0, 8, 2, 3])
    yield "range", dict(logits=z, target=t + 1), ValueError, "target holds 9"
    yield "shape", dict(logits=z, target=t[:2]), ValueError, "target has shape"
    yield "dtype", dict(logits=z.long(), target=t), TypeError, "logits is torch.int64"
    yield "int32", dict(logits=z, target=t.int()), TypeError, "target is torch.int32"
    yield "empty", dict(logits=z[:, :0], target=t), ValueError, "no vocabulary"
    yield "t", dict(logits=z, target=t, temperature=-1.0), ValueError, "temperature is -1.0"


@pytest.mark.parametrize("call", bad_calls(), ids=lambda c: c[0])
def test_bad_arguments_are_named(backend, call):
    _, arguments, kind, message = call
    with pytest.raises(kind, match=message):
        pk.log_prob(**arguments)
