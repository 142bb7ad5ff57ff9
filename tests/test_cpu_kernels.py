"""The compiled CPU kernels: seeded sweeps of odd shapes, dtypes, layouts and options against the
law, at every instruction set of this machine; the same bits whatever the threads and the batch;
the dropout mask; no [N, V] buffer and no copy of the head.

Many outputs of a sweep are a handful of numbers, where plain torch is exact by luck. So the law is
asked of each output in the geometric mean over a sweep, and every case of 16 numbers or more may
have four times as much.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from _compare import Law, check_law, doubled

import perl_kernels as pk
from perl_kernels import _dropout, _library
from perl_kernels.head import reference as head_reference
from perl_kernels.log_prob import reference as logits_reference
from perl_kernels.lora_linear import reference as lora_reference
from perl_kernels.lora_mlp import LoRAProjection
from perl_kernels.lora_mlp import reference as mlp_reference
from perl_kernels.multi_lora_linear import reference as multi_reference

if _library.missing["cpu"]:
    pytest.skip(f"cpu backend: {_library.missing['cpu']}", allow_module_level=True)

ops = torch.ops.perl_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def cpu_backend():
    with pk.use_backend("cpu"):
        yield


def laid_out(random_: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory that is contiguous, transposed, a slice, or strided twice over."""
    rows, columns = tensor.shape
    layout = random_.choice(["contiguous", "contiguous", "transposed", "slice", "strided"])
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "slice":
        room = tensor.new_full((rows + 2, columns + 3), float("nan"))
        room[1 : rows + 1, 2 : columns + 2] = tensor
        return room[1 : rows + 1, 2 : columns + 2]
    room = tensor.new_full((2 * rows, 3 * columns), float("nan"))
    room[::2, ::3] = tensor
    return room[::2, ::3]


def cases(count: int) -> range:
    """All of them; under a capped instruction set, where the sweep runs once more, every third."""
    return range(0, count, 3 if os.environ.get("PERL_KERNELS_CPU_CAPABILITY") else 1)


# ------------------------------------------------------------------------------------------------
# lora_linear. Rows: up to 8 or 32 meet the weight as it lies, up to 4 by sums across the lanes, and
# 19 are past one vector; up to 256 go to ATen in bfloat16 where the processor multiplies that; 121
# and 259 are one past a block of 120 and past a float16 sum of sums. Columns: 193 and 385 are one
# past a tile of 192.
# ------------------------------------------------------------------------------------------------


def lora_case(index: int, dtype: torch.dtype):
    choose = random.Random(index)
    torch.manual_seed(index)
    adapter_dtype = torch.float32 if choose.random() < 0.3 else dtype
    n, d = choose.choice([1, 3, 7, 19, 33, 64, 121, 259]), choose.choice([1, 3, 17, 123, 256, 300])
    projections = choose.choice([1, 1, 2, 3])
    out = [choose.choice([1, 7, 45, 193, 385]) for _ in range(projections)]
    rank = [choose.choice([1, 5, 16, 33, 129, 256]) for _ in range(projections)]
    with_bias = choose.random() < 0.5
    tensors = {"x": laid_out(choose, torch.randn(n, d).to(dtype)).requires_grad_()}
    for i in range(projections):
        weight = (torch.randn(out[i], d) / d**0.5).to(dtype)
        tensors[f"weight{i}"] = laid_out(choose, weight)
        a = (torch.randn(rank[i], d) / d**0.5).to(adapter_dtype)
        tensors[f"a{i}"] = laid_out(choose, a).requires_grad_()
        b = torch.randn(out[i], rank[i]).to(adapter_dtype)
        tensors[f"b{i}"] = laid_out(choose, b).requires_grad_()
        tensors[f"bias{i}"] = torch.randn(out[i]).to(dtype) if with_bias else None
        tensors[f"dy{i}"] = laid_out(choose, torch.randn(n, out[i]).to(dtype))
    scale = [choose.choice([0.5, 1.0, 2.0]) for _ in range(projections)]
    return tensors, scale, choose.choice([0.0, 0.0, 0.3]), torch.tensor(choose.getrandbits(62))


def lora_results(tensors, scale, p, seed, compiled: bool):
    n = len(scale)

    def of(name: str) -> list:
        return [tensors[f"{name}{i}"] for i in range(n)]

    if compiled:
        bias = of("bias") if tensors["bias0"] is not None else []
        y, s = ops.lora_linear(tensors["x"], of("weight"), bias, of("a"), of("b"), scale, p, seed)
        assert s.isfinite().all()
    else:
        y = [
            lora_reference.lora_linear(
                tensors["x"], w, a.to(w.dtype), b.to(w.dtype), bias=bias, scale=k, dropout_p=p,
                seed=seed,
            )
            for w, a, b, bias, k in zip(
                of("weight"), of("a"), of("b"), of("bias"), scale, strict=True
            )
        ]  # fmt: skip
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(y, list(leaves.values()), of("dy"))
    outputs = {f"y{i}": t.detach() for i, t in enumerate(y)}
    assert not compiled or all(t.is_contiguous() for t in (*y, *found))
    return {**outputs, **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_lora_linear(dtype):
    law = Law(dtype)
    for case in cases(120):
        torch.set_num_threads(1 + case % 2)
        tensors, *rest = lora_case(case, dtype)
        law.add(
            case,
            lora_results(tensors, *rest, True),
            lora_results(tensors, *rest, False),
            lora_results(doubled(tensors), *rest, False),
        )
    law.check()


# ------------------------------------------------------------------------------------------------
# multi_lora_linear. Rows as above, and 400: past a block of 120 rows of one adapter. Up to 5
# adapters, some without a row, with ranks of their own; rows in no order, or in runs.
# ------------------------------------------------------------------------------------------------


def multi_case(index: int, dtype: torch.dtype):
    choose = random.Random(index)
    torch.manual_seed(index)
    adapter_dtype = torch.float32 if choose.random() < 0.3 else dtype
    n, d = choose.choice([1, 7, 33, 64, 259, 400]), choose.choice([1, 3, 17, 123, 256])
    o, count = choose.choice([1, 7, 45, 193, 385]), choose.choice([1, 2, 3, 5])
    tensors = {"x": laid_out(choose, torch.randn(n, d).to(dtype)).requires_grad_()}
    for g in range(count):
        rank = choose.choice([1, 5, 16, 33, 129])
        a, b = torch.randn(rank, d) / d**0.5, torch.randn(o, rank)
        tensors[f"a{g}"] = laid_out(choose, a.to(adapter_dtype)).requires_grad_()
        tensors[f"b{g}"] = laid_out(choose, b.to(adapter_dtype)).requires_grad_()
    tensors["weight"] = laid_out(choose, (torch.randn(o, d) / d**0.5).to(dtype))
    has_bias = choose.random() < 0.5
    tensors["bias"] = torch.randn(o).to(dtype).requires_grad_() if has_bias else None
    adapter = torch.randint(-1, count, (n,))
    if choose.random() < 0.3:
        adapter = adapter.sort().values
    scale = [choose.choice([0.5, 1.0, 2.0]) for _ in range(count)]
    dy = laid_out(choose, torch.randn(n, o).to(dtype))
    p, seed = choose.choice([0.0, 0.0, 0.3]), torch.tensor(choose.getrandbits(62))
    return tensors, scale, adapter, dy, p, seed


def multi_results(tensors, scale, adapter, dy, p, seed, compiled: bool):
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    a, b = ([tensors[f"{letter}{g}"] for g in range(len(scale))] for letter in "ab")
    if compiled:
        y, s = ops.multi_lora_linear(x, weight, bias, a, b, scale, adapter, p, seed)
        assert s.isfinite().all()
    else:
        a, b = ([t.to(x.dtype) for t in factors] for factors in (a, b))
        y = multi_reference.multi_lora_linear(
            x, weight, a, b, adapter, scale=scale, bias=bias, dropout_p=p, seed=seed
        )
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    assert not compiled or all(t.is_contiguous() for t in (y, *found))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_multi_lora_linear(dtype):
    law = Law(dtype)
    for case in cases(45):
        torch.set_num_threads(1 + case % 2)
        tensors, *rest = multi_case(case, dtype)
        law.add(
            case,
            multi_results(tensors, *rest, True),
            multi_results(tensors, *rest, False),
            multi_results(doubled(tensors), *rest, False),
        )
    law.check()


# ------------------------------------------------------------------------------------------------
# lora_mlp. Rows as above. F: 193 and 385 are one past a tile; an odd F, like an odd D, takes float
# panels where bfloat16 goes by pairs. Ranks to 256, more than D has. Threads in turn, 1 and 2.
# ------------------------------------------------------------------------------------------------


def mlp_case(index: int, dtype: torch.dtype):
    choose = random.Random(index)
    torch.manual_seed(index)
    adapter_dtype = torch.float32 if choose.random() < 0.3 else dtype
    n, d = choose.choice([1, 3, 7, 64, 121, 259]), choose.choice([2, 17, 64, 130, 256])
    f, o = choose.choice([1, 45, 96, 193, 200, 385]), choose.choice([d, d, 1, 66])
    if f == o == 1:
        o = d  # or every gradient of down would be one number times a vector, right by luck
    with_bias = choose.random() < 0.5
    tensors = {"x": laid_out(choose, torch.randn(n, d).to(dtype)).requires_grad_()}
    scale = []
    for i, (outs, ins) in enumerate(((f, d), (f, d), (o, f))):
        rank = choose.choice([1, 5, 16, 33, 64, 129, 256])
        scale.append(choose.choice([0.5, 1.0, 2.0]))
        tensors[f"weight{i}"] = laid_out(choose, (torch.randn(outs, ins) / ins**0.5).to(dtype))
        tensors[f"bias{i}"] = torch.randn(outs).to(dtype).requires_grad_() if with_bias else None
        if choose.random() < 0.1:  # no adapter
            tensors[f"a{i}"] = tensors[f"b{i}"] = None
            continue
        a = (torch.randn(rank, ins) / ins**0.5).to(adapter_dtype)
        tensors[f"a{i}"] = laid_out(choose, a).requires_grad_()
        b = (torch.randn(outs, rank) / rank**0.5).to(adapter_dtype)
        tensors[f"b{i}"] = laid_out(choose, b).requires_grad_()
    options = {
        "activation": choose.choice(["silu", "gelu_tanh"]),
        "dropout_p": choose.choice([0.0, 0.0, 0.3]),
    }
    dy = laid_out(choose, torch.randn(n, o).to(dtype))
    return tensors, scale, options, dy, choose.choice(["gate_up", "input"]), index


def mlp_results(tensors, scale, options, dy, save, seed, compiled: bool):
    tensors = {k: t.requires_grad_() if t is not None else None for k, t in tensors.items()}
    for i in range(3):
        tensors[f"weight{i}"].requires_grad_(False)
    cast = {k: t.to(tensors["x"].dtype) if t is not None else None for k, t in tensors.items()}
    of = tensors if compiled else cast
    blocks = [
        LoRAProjection(of[f"weight{i}"], of[f"a{i}"], of[f"b{i}"], of[f"bias{i}"], scale[i])
        for i in range(3)
    ]
    torch.manual_seed(seed)
    if compiled:
        y = pk.lora_mlp(tensors["x"], *blocks, save=save, **options)
    else:
        seeds = [_dropout.new_seed(torch.device("cpu")) for _ in range(2)]
        y = mlp_reference.lora_mlp(
            tensors["x"], *blocks, **options, seed_x=seeds[0], seed_h=seeds[1]
        )
    leaves = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    assert not compiled or all(t.is_contiguous() for t in (y, *found))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_lora_mlp(dtype):
    law = Law(dtype)
    for case in cases(120):
        tensors, *rest = mlp_case(case, dtype)
        torch.set_num_threads(1 + case % 2)
        ours = mlp_results(tensors, *rest, compiled=True)
        torch.set_num_threads(1)
        law.add(
            case,
            ours,
            mlp_results(tensors, *rest, compiled=False),
            mlp_results(doubled(tensors), *rest, compiled=False),
        )
    law.check()


# ------------------------------------------------------------------------------------------------
# The head and log_prob. V: 193 and 961 are one past a tile and past a slab of the gradient. Ranks
# of an adapter: 1, odd ones, a multiple of no vector and more than a panel of columns.
# ------------------------------------------------------------------------------------------------


HEAD_OPS = ["linear_log_prob", "linear_kl", "policy_loss"]


def head_case(index: int, op: str, dtype: torch.dtype):
    choose = random.Random(f"{op} {index}")
    torch.manual_seed(index)
    n, h = choose.choice([1, 5, 121, 260]), choose.choice([2, 8, 33, 130])
    v = choose.choice([2, 45, 193, 961, 2500])
    trained = op != "linear_kl" and choose.random() < 0.4
    hidden, weight = 2 * torch.randn(n, h), torch.randn(v, h) / h**0.5
    tensors = {
        "hidden": laid_out(choose, hidden.to(dtype)).requires_grad_(),
        "weight": laid_out(choose, weight.to(dtype)).requires_grad_(trained),
        "bias": torch.randn(v).to(dtype).requires_grad_(trained) if choose.random() < 0.5 else None,
    }
    if op == "linear_kl" or (op == "policy_loss" and not trained and choose.random() < 0.7):
        shifted = tensors["hidden"].detach().float() + 0.3 * torch.randn(n, h)
        tensors["ref_hidden"] = laid_out(choose, shifted.to(dtype))
    options = {
        "temperature": choose.choice([1.0, 1.0, 0.7]),
        "softcap": choose.choice([None, None, 4.0]),
    }
    if not trained and choose.random() < 0.6:
        rank = choose.choice([1, 5, 16, 33, 64])
        adapter_dtype = choose.choice([dtype, torch.float32])
        a, b = torch.randn(rank, h) / h**0.5, 0.5 * torch.randn(v, rank) / rank**0.5
        trains = choose.choice(["ab", "ab", "b", ""])
        tensors["a"] = laid_out(choose, a.to(adapter_dtype)).requires_grad_("a" in trains)
        tensors["b"] = laid_out(choose, b.to(adapter_dtype)).requires_grad_("b" in trains)
        options["scale"] = choose.choice([1.0, 0.5, 2.0])
        tensors["hidden"].requires_grad_(not trains or choose.random() < 0.8)
    if n > 5 and choose.random() < 0.3:
        tensors["hidden"] = (6 * tensors["hidden"].detach()).requires_grad_()  # sure of one class
    if not trained and v > 2 and options["softcap"] is None and choose.random() < 0.4:
        bias = torch.zeros(v, dtype=dtype) if tensors["bias"] is None else tensors["bias"]
        tensors["bias"] = bias.masked_fill(torch.rand(v) < 0.1, -torch.inf)
    target = torch.randint(0, v, (n,))
    if not trained and tensors["bias"] is not None:
        target = target.where(tensors["bias"][target].isfinite(), tensors["bias"].argmax())
    target[torch.rand(n) < 0.2] = -100
    incoming = dict(zip(("log_prob", "entropy", "kl"), torch.randn(3, n), strict=True))
    if choose.random() < 0.6:  # without it one sweep makes all there is to make over a frozen head
        del incoming["entropy"]
    return op, tensors, target, options, incoming


def head_results(op, tensors, target, options, incoming, compiled: bool):
    tensors = dict(tensors)
    ref_hidden = tensors.pop("ref_hidden", None)
    loss_options = {
        "advantage": incoming["log_prob"],
        "kl_coef": 0.0 if ref_hidden is None else 0.3,
    }
    loss_options["reduction"] = "sum" if "entropy" in incoming else "mean"
    if compiled and op == "policy_loss":
        found = pk.policy_loss(
            **tensors, ref_hidden=ref_hidden, target=target, **loss_options, **options
        )
        outputs = {"log_prob": found.log_prob, "entropy": found.entropy, "loss": found.loss}
        if ref_hidden is not None:
            outputs["kl"] = found.kl
    elif compiled and op == "linear_kl":
        found = pk.linear_kl(**tensors, ref_hidden=ref_hidden, target=target, **options)
        outputs = {"log_prob": found.log_prob, "entropy": found.entropy, "kl": found.kl}
    elif compiled:
        found = pk.linear_log_prob(**tensors, target=target, **options, return_entropy=True)
        outputs = {"log_prob": found[0], "entropy": found[1]}
    else:
        kept, kept_target = without_masked_classes(tensors, target)
        log_prob, entropy = head_reference.linear_log_prob(**kept, target=kept_target, **options)
        outputs = {"log_prob": log_prob, "entropy": entropy}
        if ref_hidden is not None:
            kl = head_reference.linear_kl(**kept, ref_hidden=ref_hidden, **options)
            outputs["kl"] = kl.where(target != -100, 0.0)
        if op == "policy_loss":
            outputs["loss"] = head_reference.policy_loss(
                **kept, ref_hidden=ref_hidden, target=kept_target, **loss_options, **options
            )
    if op == "policy_loss":
        incoming = {"loss": torch.ones(())}
    total = sum(
        (o * incoming[name].to(o.dtype)).sum() for name, o in outputs.items() if name in incoming
    )
    leaves = {k: t for k, t in tensors.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(total, list(leaves.values()))
    outputs = {name: o.detach() for name, o in outputs.items()}
    return {**outputs, **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def without_masked_classes(tensors, target):
    """A bias of -inf removes a class; to autograd, softmax of -inf is NaN."""
    if tensors["bias"] is None:
        return tensors, target
    keep = tensors["bias"].isfinite()
    of_classes = {name: tensors[name][keep] for name in ("weight", "bias", "b") if name in tensors}
    place = keep.cumsum(0) - 1
    counted = target != -100
    return {**tensors, **of_classes}, place[target.where(counted, 0)].where(counted, -100)


@pytest.mark.parametrize("op", HEAD_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_head(dtype, op):
    law = Law(dtype)
    for case in cases(100):
        torch.set_num_threads(1 + case % 2)
        op, tensors, *rest = head_case(case, op, dtype)
        exact = head_results(op, doubled(tensors), *rest, compiled=False)
        law.add(
            case,
            head_results(op, tensors, *rest, compiled=True),
            head_results(op, tensors, *rest, compiled=False),
            exact,
            **kl_scale(exact),
        )
    law.check()


def kl_scale(exact: dict) -> dict[str, float]:
    """The terms of a KL are log-ratios, and it is about half their mean square."""
    return {"kl": (2 * exact["kl"].mean().item()) ** 0.5} if "kl" in exact else {}


# V: 2049 is one past a strip.
def logits_case(index: int, dtype: torch.dtype):
    choose = random.Random(index)
    torch.manual_seed(index)
    n, v = choose.choice([16, 33]), choose.choice([1, 2, 45, 2049, 5000])
    logits = laid_out(choose, (3 * torch.randn(n, v)).to(dtype)).requires_grad_()
    ref_logits = (logits.detach().float() + 0.3 * torch.randn(n, v)).to(dtype)
    options = {"temperature": choose.choice([1.0, 0.7]), "softcap": choose.choice([None, 4.0])}
    target = torch.randint(0, v, (n,))
    target[0] = -100
    return {"logits": logits, "ref_logits": laid_out(choose, ref_logits)}, target, options


def logits_results(tensors, target, options, incoming, module, **more):
    logits = tensors["logits"]
    found = module.log_prob(logits, target, **options, **more)
    found = (*found, module.kl(logits, tensors["ref_logits"], **options))
    total = sum((o * c.to(o.dtype)).sum() for o, c in zip(found, incoming, strict=True))
    (gradient,) = torch.autograd.grad(total, logits)
    outputs = zip(("log_prob", "entropy", "kl"), (o.detach() for o in found), strict=True)
    return {**dict(outputs), "dlogits": gradient}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_log_prob(dtype):
    law = Law(dtype)
    for case in cases(100):
        tensors, *rest = logits_case(case, dtype)
        rest.append(torch.randn(3, tensors["logits"].shape[0]))
        exact = logits_results(doubled(tensors), *rest, logits_reference)
        law.add(
            case,
            logits_results(tensors, *rest, pk, return_entropy=True),
            logits_results(tensors, *rest, logits_reference),
            exact,
            **kl_scale(exact),
        )
    law.check()


def run_capped(cap: str, *arguments: str) -> str:
    environment = {**os.environ, "PERL_KERNELS_CPU_CAPABILITY": cap}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("cap", ["default", "avx2", "avx512"])
def test_every_instruction_set(cap):
    """The tests above and the mask's run on the widest; here they run again on a narrower one."""
    name = run_capped(cap, "-c", "import perl_kernels._library as l; print(l.cpu_capability())")
    assert name.startswith("0\n"), name
    if name.split()[1] == _library.cpu_capability():
        pytest.skip(f"{_library.cpu_capability()} is the widest here")
    assert name.split()[1] == cap.upper()
    found = run_capped(cap, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "law")
    assert found.startswith("0\n") and "24 passed" in found, found


def test_an_unknown_instruction_set_is_refused():
    found = run_capped("sse9", "-c", "import perl_kernels._library as l; l.cpu_capability()")
    assert found.startswith("1\n")
    assert (
        "PERL_KERNELS_CPU_CAPABILITY is 'sse9'; wanted default, avx2, avx512 or avx512_bf16"
        in found
    )


# ------------------------------------------------------------------------------------------------
# Dropout
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_law_of_the_dropout_mask(dtype):
    """With a = identity, s is the dropped x: bit for bit the mask of _dropout, in forward; and
    with weight = 0 and da = x, dx is the mask again. Columns: none is a multiple of a group of 4.
    """
    n, d, p = 130, 203, 0.3
    seed = torch.tensor(2**62 + 12345)
    keep = _dropout.keep_mask(seed, n, d, p)
    x = torch.ones(n, d, dtype=dtype)
    a, b, weight = torch.eye(d, dtype=dtype), torch.eye(d, dtype=dtype), torch.zeros(d, d).to(dtype)
    _, s = ops.lora_linear_cpu(x, [weight], [], [a], [b], [1.0], p, seed)
    assert torch.equal(s != 0, keep)
    torch.testing.assert_close(s[keep], torch.full_like(s[keep], 1 / (1 - p)))
    dx, da, _ = ops.lora_linear_backward_cpu(
        [x], x, [weight], [a], [b], [1.0], p, seed, s, True, True
    )
    assert torch.equal(dx != 0, keep)
    counts = keep.sum(0) / (1 - p)
    torch.testing.assert_close(da[0].float()[0], counts.float(), rtol=8e-3, atol=0.0)


# ------------------------------------------------------------------------------------------------
# The same bits: run to run, on any number of threads, and for a row in any batch
# ------------------------------------------------------------------------------------------------


def mlp_lists(d: int, f: int):
    """weight, bias, a, b and scale of gate, up and down; bfloat16, adapters float32."""
    shapes = [(f, d, 9), (f, d, 5), (d, f, 16)]
    weight = [(torch.randn(outs, ins) / ins**0.5).bfloat16() for outs, ins, _ in shapes]
    bias = [torch.randn(outs).bfloat16() for outs, _, _ in shapes]
    a = [torch.randn(r, ins) / ins**0.5 for _, ins, r in shapes]
    b = [torch.randn(outs, r) for outs, _, r in shapes]
    return weight, bias, a, b, [0.5, 1.0, 2.0]


def everything_of_lora_mlp(n: int, d: int, f: int, keep: bool):
    x, dy, lists = torch.randn(n, d).bfloat16(), torch.randn(n, d).bfloat16(), mlp_lists(d, f)
    rest = ("silu", 0.2, torch.tensor(7), torch.tensor(8))
    y, s, s_down, gate_up = ops.lora_mlp_cpu(x, *lists, *rest, keep)
    dx, *gradients = ops.lora_mlp_backward_cpu(
        dy, x, *lists, *rest, s, s_down, gate_up, True, True, True
    )
    return [y, s, s_down, *gate_up, dx, *(t for of in gradients for t in of)]


def everything():
    """Each op's outputs on inputs of several tiles, 16 bits so that lora_linear tiles too."""
    torch.manual_seed(3)
    n, d, o, r, v = 250, 130, 200, 9, 2500
    x, weight = torch.randn(n, d).bfloat16(), torch.randn(o, d).bfloat16()
    a, b, dy = torch.randn(r, d), torch.randn(o, r), torch.randn(n, o).bfloat16()
    seed = torch.tensor(7)
    y, s = ops.lora_linear_cpu(x, [weight], [], [a], [b], [0.5], 0.2, seed)
    gradients = ops.lora_linear_backward_cpu(
        [dy], x, [weight], [a], [b], [0.5], 0.2, seed, s, True, True
    )
    found = [*y, s, gradients[0], *gradients[1], *gradients[2]]
    adapter = torch.randint(-1, 2, (n,))
    rest = ([a, a[:5]], [b, b[:, :5]], [0.5, 2.0], adapter, 0.2, seed)
    y, s = ops.multi_lora_linear_cpu(x, weight, None, *rest)
    dx, da, db = ops.multi_lora_linear_backward_cpu(dy, x, weight, *rest, s, True, True)
    found += [y, s, dx, *da, *db]
    for keep in (True, False):
        found += everything_of_lora_mlp(n, d, o, keep)
    hidden, ref_hidden, head = torch.randn(n, d), torch.randn(n, d), torch.randn(v, d) / d**0.5
    target, c = torch.randint(0, v, (n,)), torch.randn(3, n)
    bias, options, adapter = torch.randn(v), (0.5, 1.0, 0.0, -100), (a, torch.randn(v, r))
    plain, adapted = (True, True, True, False), (True, False, True, True)
    for a_b, need in (((None, None), plain), (adapter, adapted)):
        inputs = (hidden, head, bias, *a_b, target, ref_hidden)
        stats = ops.head_stats_cpu(*inputs, *options)
        _, peak, log_sum, entropy, _, gap, _ = stats
        saved = (peak, log_sum, entropy, gap)
        gradients = ops.head_grad_cpu(*inputs, *saved, *c, *options, *need)
        found += [*stats, *(g for g, n in zip(gradients, (*need, need[3]), strict=True) if n)]
        for dtype in (torch.float32, torch.bfloat16):
            frozen = (hidden.to(dtype), head.to(dtype), None, *a_b, target)
            found += ops.head_units_cpu(*frozen, ref_hidden.to(dtype), None, None, *options)
            units = ops.head_units_cpu(*frozen, None, c[0], None, *options)
            found += [*units[:4], units[7]]
    found += [ops.head_logits_cpu(hidden.to(dtype), head.to(dtype)) for dtype in DTYPES]
    logits, ref_logits = hidden @ head.T, ref_hidden @ head.T
    found += ops.logits_stats_cpu(logits, target, ref_logits, 1.0, 0.0, -100)
    found.append(ops.logits_grad_cpu(logits, target, ref_logits, *saved, *c, 1.0, 0.0, -100))
    return found


def test_bits_repeat_and_do_not_depend_on_the_threads():
    torch.set_num_threads(1)
    single = everything()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(single, everything(), strict=True):
            assert one.numel() and torch.equal(one, other)


@pytest.mark.parametrize("learns", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("has_ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_log_prob_does_not_depend_on_the_rows_beside_it(dtype, rank, has_ref, learns):
    """Nor do KL and entropy, nor the gradient where there is one."""
    n, h, v = 307, 72, 3001
    hidden, weight = torch.randn(n, h).to(dtype), torch.randn(v, h).to(dtype)
    target, ref_hidden = torch.randint(0, v, (n,)), torch.randn(n, h).to(dtype)
    adapter = {"a": torch.randn(rank, h), "b": torch.randn(v, rank)} if rank else {}

    def of(rows):
        leaf = hidden[rows].detach().requires_grad_(learns)
        if has_ref:
            found = pk.linear_kl(leaf, ref_hidden[rows], weight, target[rows], **adapter)
            learned = found.log_prob.sum() + found.kl.sum()
        else:
            found = pk.linear_log_prob(leaf, weight, target[rows], return_entropy=True, **adapter)
            learned = found[0].sum()
        gradient = torch.autograd.grad(learned, leaf)[0] if learns else leaf
        return torch.stack([t.detach() for t in found]), gradient

    whole, gradient = of(slice(None))
    for rows in (slice(0, 1), slice(5, 12), slice(119, 241), slice(306, 307)):
        part, part_gradient = of(rows)
        assert torch.equal(part, whole[:, rows]) and torch.equal(part_gradient, gradient[rows])


# ------------------------------------------------------------------------------------------------
# Edges
# ------------------------------------------------------------------------------------------------


def test_no_rows():
    x, weight = torch.empty(0, 6), torch.randn(5, 6)
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    for dtype in DTYPES:
        t = [v.to(dtype) for v in (x, weight, a, b)]
        (y,), s = ops.lora_linear_cpu(t[0], [t[1]], [], [t[2]], [t[3]], [1.0], 0.0, None)
        assert y.shape == (0, 5) and s.shape == (0, 2)
        dx, da, db = ops.lora_linear_backward_cpu(
            [y], t[0], [t[1]], [t[2]], [t[3]], [1.0], 0.0, None, s, True, True
        )
        assert dx.shape == (0, 6) and not da[0].any() and not db[0].any()
        nobody = torch.empty(0, dtype=torch.long)
        rest = (t[1], [t[2]] * 2, [t[3]] * 2, [1.0] * 2, nobody, 0.0, None)
        y, s = ops.multi_lora_linear_cpu(t[0], rest[0], None, *rest[1:])
        dx, da, db = ops.multi_lora_linear_backward_cpu(y, t[0], *rest, s, True, True)
        assert y.shape == (0, 5) and s.shape == (0, 2) and dx.shape == (0, 6)
        assert not any(gradient.any() for gradient in (*da, *db))
    y, *rest, dx, da_gate = everything_of_lora_mlp(0, 6, 8, True)[:7]
    assert y.shape == dx.shape == (0, 6) and rest[2].shape == (0, 8) and not da_gate.any()
    target, none = torch.empty(0, dtype=torch.long), torch.empty(0)
    options = (1.0, 1.0, 0.0, -100)
    for a_b, trained, sizes in (
        ((None, None), (True, True, False), [30, 5, 0, 0]),
        ((a, b), (False, True, True), [0, 5, 12, 10]),
    ):
        inputs = (x, weight, None, *a_b, target)
        stats = ops.head_stats_cpu(*inputs, x, *options)
        assert [len(t) for t in stats] == [0] * 7
        dhidden, *of_head = ops.head_grad_cpu(
            *inputs, None, none, none, none, none, none, None, None, *options, True, *trained
        )
        assert dhidden.shape == (0, 6) and not any(g.any() for g in of_head)
        assert [g.numel() for g in of_head] == sizes


def test_what_was_not_asked_for_is_empty():
    x, weight = torch.randn(9, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    (y,), s = ops.lora_linear_cpu(x, [weight], [], [a], [b], [1.0], 0.0, None)
    arguments = ([y], x, [weight], [a], [b], [1.0], 0.0, None, s)
    dx, da, db = ops.lora_linear_backward_cpu(*arguments, False, True)
    assert dx.numel() == 0 and da[0].any() and db[0].any()
    dx, da, db = ops.lora_linear_backward_cpu(*arguments, True, False)
    assert dx.any() and da == db == []
    head, options = (x, weight, None, a, b), (1.0, 1.0, 0.0, -100)
    sizes = [len(t) for t in ops.head_stats_cpu(*head, None, None, *options)]
    assert sizes == [0, 9, 9, 9, 0, 0, 0]
    stats = ops.head_stats_cpu(*head, None, x, *options)
    assert [len(t) for t in stats] == [0, 9, 9, 9, 0, 9, 9]
    _, peak, log_sum, entropy, _, gap, kl = stats
    for need in ((True, False, False, False), (False, False, False, True)):
        grads = ops.head_grad_cpu(
            *head, None, x, peak, log_sum, entropy, gap, None, entropy, kl, *options, *need
        )
        dhidden, dweight, dbias, da, db = (g.any().item() for g in grads)
        assert (dhidden, dweight, dbias, da, db) == (need[0], False, False, need[3], need[3])


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits(softcap):
    """Logits of +-1e4, a bias of -inf (a masked class), an ignored row that is far too large."""
    hidden = torch.tensor([[1e2, 0.0], [-1e2, 1.0], [1e4, 1e4], [0.0, 0.0]], requires_grad=True)
    weight = torch.randn(300, 2) * 100
    bias = torch.zeros(300)
    bias[7:20] = -torch.inf
    target = torch.tensor([3, 4, -100, 299])
    both = [
        f(hidden, weight, target, bias=bias, softcap=softcap, **more)
        for f, more in (
            (pk.linear_log_prob, {"return_entropy": True}),
            (head_reference.linear_log_prob, {}),
        )
    ]
    torch.testing.assert_close(both[0][0], both[1][0])
    assert both[0][1].isfinite().all() and both[0][0][2] == 0
    (dhidden,) = torch.autograd.grad(both[0][0].sum() + both[0][1].sum(), hidden)
    assert dhidden.isfinite().all() and not dhidden[2].any() and dhidden[3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_rise_by_hundreds_along_the_vocabulary(dtype):
    """Beyond what e^(z-m) can hold for an m of the first classes, for policy and reference apart;
    fall again, and where the first tile is masked there is no m at all."""
    steps = torch.zeros(3000)
    for column, height in (
        (200, 100.0),
        (1200, 250.0),
        (1201, 249.0),
        (2100, 240.0),
        (2999, 400.0),
    ):
        steps[column] = height
    steps = torch.stack([steps, steps.flip(0)])
    weight = torch.cat([steps.T, 0.5 * torch.randn(3000, 6)], 1).to(dtype)
    sides = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]).repeat(8, 1)
    hidden = torch.cat([sides, torch.randn(32, 6)], 1).to(dtype).requires_grad_()
    ref_hidden = torch.cat([sides.flip(0), torch.randn(32, 6)], 1).to(dtype)
    masked = torch.zeros(3000)
    masked[:192] = -torch.inf
    target = torch.randint(192, 3000, (32,))
    for first, bias in ((0, None), (192, masked.to(dtype))):
        exact, plain, ours = {}, {}, {}
        for found, width in ((exact, torch.float64), (plain, dtype)):
            h = hidden.detach().to(width).requires_grad_()
            tensors = (h, ref_hidden.to(width), weight[first:].to(width))
            found["kl"] = head_reference.linear_kl(*tensors)
            found["log_prob"], _ = head_reference.linear_log_prob(h, tensors[2], target - first)
            total = found["kl"].sum() + found["log_prob"].sum()
            (found["dhidden"],) = torch.autograd.grad(total, h)
        found = pk.linear_kl(hidden, ref_hidden, weight, target, bias=bias)
        total = found.kl.sum() + found.log_prob.sum()
        ours = {"kl": found.kl, "log_prob": found.log_prob}
        (ours["dhidden"],) = torch.autograd.grad(total, hidden)
        for name in exact:
            check_law(name, ours[name].detach(), plain[name].detach(), exact[name].detach(), dtype)


def test_nan_is_not_hidden():
    hidden, weight = torch.randn(3, 8), torch.randn(500, 8)
    hidden[1, 2] = torch.nan
    log_prob = pk.linear_log_prob(hidden, weight, torch.tensor([1, 2, 3]))
    assert log_prob.isnan().tolist() == [False, True, False]
    found = pk.linear_kl(
        hidden.requires_grad_(), torch.randn(3, 8), weight, torch.tensor([1, 2, 3])
    )
    gradient = torch.autograd.grad(found.kl.sum(), hidden)[0]
    for rows in (found.kl, found.log_prob, gradient.sum(1)):
        assert rows.isnan().tolist() == [False, True, False]
    logits = torch.randn(2, 50)
    logits[0, 49] = torch.nan
    assert pk.log_prob(logits, torch.tensor([1, 2])).isnan().tolist() == [True, False]


def test_an_unsupported_dtype_is_refused():
    with pytest.raises(TypeError, match="wanted float32, bfloat16 or float16|want float32"):
        ops.logits_stats_cpu(torch.randn(2, 3).double(), None, None, 1.0, 0.0, -100)


# ------------------------------------------------------------------------------------------------
# Memory: a head whose logits take 154 MB and whose weight, transposed, would take 51 MB to copy;
# a block whose h takes 96 MB, in forward and in backward
# ------------------------------------------------------------------------------------------------

GROWTH = """
import sys
import torch
import perl_kernels as pk

def growth(function):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    field = lambda name: int(open("/proc/self/status").read().split(name)[1].split()[0]) * 1024
    before = field("VmRSS:")
    kept = function()
    return field("VmHWM:") - before

torch.set_num_threads(2)
pk.use_backend("cpu")
"""

HEAD = """
n, h, v = 768, 256, 50257
weight = torch.randn(h, v).t()
hidden, ref_hidden = torch.randn(n, h, requires_grad=True), torch.randn(n, h)
target = torch.randint(0, v, (n,))
small = (hidden[:2].detach().requires_grad_(), ref_hidden[:2], weight[:300], target[:2] % 300)
rank = int(sys.argv[1])
a, b = torch.randn(rank, h, requires_grad=True), torch.randn(v, rank, requires_grad=True)

def step(hidden, ref_hidden, weight, target, a, b):
    adapter = {"a": a, "b": b} if rank else {}
    found = pk.linear_kl(hidden, ref_hidden, weight, target, **adapter)
    leaves = [hidden, *adapter.values()]
    return torch.autograd.grad((found.log_prob + found.kl).sum(), leaves)

# what is loaded once is not counted
step(*small, a, b[:300].detach().requires_grad_())
print(growth(lambda: step(hidden, ref_hidden, weight, target, a, b)))
"""

MLP = """
d, f = 256, 4096
blocks = [
    pk.LoRAProjection(
        torch.randn(o, i, dtype=torch.bfloat16), torch.randn(8, i, requires_grad=True),
        torch.randn(o, 8, requires_grad=True),
    )
    for o, i in ((f, d), (f, d), (d, f))
]
small, x = (torch.randn(n, d).bfloat16().requires_grad_() for n in (32, 12288))

def step(x):
    y = pk.lora_mlp(x, *blocks, save="input", dropout_p=0.1)
    return torch.autograd.grad(y, x, y.detach())

step(small)
print(growth(lambda: step(x)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
@pytest.mark.parametrize("rank", [0, 16])
def test_the_head_needs_little_memory(rank):
    found = run_capped("avx512_bf16", "-c", GROWTH + HEAD, str(rank))
    assert found.startswith("0\n"), found
    assert int(found.split()[1]) <= 32 * 2**20, f"{int(found.split()[1]) / 2**20:.0f} MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_block_makes_nothing_of_its_width():
    found = run_capped("avx512_bf16", "-c", GROWTH + MLP)
    assert found.startswith("0\n"), found
    assert int(found.split()[1]) <= 64 * 2**20, f"{int(found.split()[1]) / 2**20:.0f} MiB"
