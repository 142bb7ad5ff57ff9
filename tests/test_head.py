import pytest
import torch
from _compare import ROWS, Law, check_bound, check_law, doubled, gathered

import perl_kernels as pk
from perl_kernels.head import reference

# (N, H, V). 1003 and 50257: multiples of no tile. N = 1: one row. V = 2: the smallest choice.
# V = 4099: one column past the plain sweep's tile. N = 1030: six rows past its block of rows.
SIZES = [(7, 33, 1003), (1, 8, 50257), (19, 5, 2), (33, 123, 4099), (1030, 16, 257)]
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 5.0}, {"temperature": 1.3, "softcap": 2.0}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(n, h, v, dtype, bias=False, trainable_head=False, spread=2.0, rank=0):
    tensors = {
        "hidden": (spread * torch.randn(n, h)).to(dtype).requires_grad_(),
        "weight": (torch.randn(v, h) / h**0.5).to(dtype).requires_grad_(trainable_head),
        "bias": torch.randn(v).to(dtype).requires_grad_(trainable_head) if bias else None,
    }
    if rank:  # kept in float32 over 16 bits, as layers keep it, if the rank is odd
        adapter_dtype = torch.float32 if rank % 2 and dtype != torch.float64 else dtype
        tensors["a"] = (torch.randn(rank, h) / h**0.5).to(adapter_dtype).requires_grad_()
        tensors["b"] = (torch.randn(v, rank) / rank**0.5).to(adapter_dtype).requires_grad_()
    return tensors


def make_target(n, v, ignored=True):
    target = torch.randint(0, v, (n,))
    target[0], target[-1] = 0, v - 1  # the two edge columns
    if ignored and n > 2:
        target[1] = -100
    return target


def gradients(outputs, incoming, tensors):
    leaves = {k: t for k, t in tensors.items() if t is not None and t.requires_grad}
    total = sum((o * i.to(o.dtype)).sum() for o, i in zip(outputs, incoming, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()))
    return {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def compare(ours, theirs, exact, dtype, **scales):
    assert ours.keys() == theirs.keys() == exact.keys()
    for name in exact:
        check_law(name, ours[name], theirs[name], exact[name], dtype, scales.get(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_log_prob_and_entropy(backend, sizes, options, dtype):
    """Outputs and every gradient, head trained too, held to plain torch."""
    n, _, v = sizes

    def run(function, tensors, target, incoming, **more):
        found = function(**tensors, target=target, **options, **more)
        return {
            "log_prob": found[0].detach(),
            "entropy": found[1].detach(),
            **gradients(found, incoming, tensors),
        }

    def sample():
        tensors = make(*sizes, dtype, bias=bool(options), trainable_head=True)
        rest = make_target(n, v), (torch.randn(n), torch.randn(n))
        return (
            run(pk.linear_log_prob, tensors, *rest, return_entropy=True),
            run(reference.linear_log_prob, tensors, *rest),
            run(reference.linear_log_prob, doubled(tensors), *rest),
        )

    compare(*gathered(sample, min(n, v)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (3, 129, 64), (17, 257, 65)], ids=str)
def test_logits_are_not_rounded_to_16_bits(backend, sizes, options, dtype):
    """The law of float32 for 16-bit inputs. 3 and 17 rows: below and above one vector."""
    n, h, v = sizes
    tensors = make(n, h, v, dtype, bias=bool(options), rank=3 if "softcap" in options else 0)
    options = {**options, "scale": 0.5} if "a" in tensors else options
    wide = {name: t if t is None else t.float() for name, t in tensors.items()}
    with torch.no_grad():
        found = pk.linear_logits(**tensors, **options)
        plain = reference.linear_logits(**wide, **options)
        exact = reference.linear_logits(**doubled(tensors), **options)
        assert found.dtype == torch.float32
        check_law("logits", found, plain, exact, torch.float32)
        shaped = pk.linear_logits(**tensors | {"hidden": tensors["hidden"].view(1, n, h)})
        assert shaped.shape == (1, n, v)


def test_logits_have_no_gradient():
    tensors = make(2, 3, 4, torch.float32)
    with pytest.raises(ValueError, match="hidden requires grad, and linear_logits has no gradient"):
        pk.linear_logits(**tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kl(backend, sizes, options, dtype):
    n, h, _ = sizes

    def run(function, tensors, incoming):
        found = function(**tensors, **options)
        divergence = found.kl if isinstance(found, tuple) else found
        return {"kl": divergence.detach(), **gradients((divergence,), incoming, tensors)}

    def sample():
        tensors = make(*sizes, dtype, bias=bool(options))
        shift = 0.3 * torch.randn(n, h)
        tensors["ref_hidden"] = (tensors["hidden"].detach().float() + shift).to(dtype)
        incoming = (torch.randn(n),)
        return (
            run(pk.linear_kl, tensors, incoming),
            run(reference.linear_kl, tensors, incoming),
            run(reference.linear_kl, doubled(tensors), incoming),
        )

    ours, theirs, exact = gathered(sample, n)
    # the terms of a KL are log-ratios, and it is about half their mean square
    compare(ours, theirs, exact, dtype, kl=(2 * exact["kl"].mean().item()) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("spread", [2.0, 8.0, 30.0])
@pytest.mark.parametrize("of", [("log_prob",), ("kl",), ("log_prob", "kl")], ids=str)
def test_gradient_over_a_frozen_head(backend, of, spread, sizes, options, dtype):
    """Made in the forward sweep. With a wide spread the likeliest class is the target of most rows
    and p is near 1, where weight[target] - E_p[weight] would cancel, and z - z_ref - E_p[z - z_ref]
    too; or its logit lies deep in the softcap."""
    n, h, v = sizes

    def ours(ref_hidden, **given):
        if of == ("log_prob",):
            return [pk.linear_log_prob(**given, return_entropy=True)[0]]
        found = pk.linear_kl(**given, ref_hidden=ref_hidden)
        return [getattr(found, name) for name in of]

    def theirs(ref_hidden, target, **given):
        log_prob, _ = reference.linear_log_prob(**given, target=target)
        kl = reference.linear_kl(**given, ref_hidden=ref_hidden).where(target != -100, 0.0)
        return [{"log_prob": log_prob, "kl": kl}[name] for name in of]

    def sample():
        tensors = make(*sizes, dtype, bias=bool(options), spread=spread)
        hidden = tensors["hidden"].detach()
        ref_hidden = (hidden.float() + 0.3 * torch.randn(n, h)).to(dtype)
        target, incoming = make_target(n, v, ignored=spread == 2.0), torch.randn(2, n)[: len(of)]
        if spread > 2.0:
            z = hidden.double() @ tensors["weight"].double().T
            z = z if tensors["bias"] is None else z + tensors["bias"].double()
            target = target.where(torch.arange(n) % 4 == 1, z.argmax(1))

        def run(function, tensors, ref_hidden):
            found = function(ref_hidden, target=target, **tensors, **options)
            return gradients(found, incoming, tensors)

        return (
            run(ours, tensors, ref_hidden),
            run(theirs, tensors, ref_hidden),
            run(theirs, doubled(tensors), ref_hidden.double()),
        )

    rows = min(n, v)
    if rows >= ROWS or dtype != torch.float32:
        return compare(*gathered(sample, rows), dtype)
    # one draw of a few rows may decide the norm of all: here the mean over draws is asked
    law = Law(dtype)
    for draw in range(-(-ROWS // rows)):
        law.add(draw, *sample())
    law.check()


# Rank 1, odd ranks, a panel of columns and one more.
@pytest.mark.parametrize("rank", [1, 5, 16, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("trains", [True, False], ids=["", "frozen"])
def test_adapter(backend, trains, options, dtype, rank):
    """log p, entropy and KL with an adapter on the head, and every gradient; where the adapter is
    frozen the gradient of log p alone, which the forward sweep makes."""
    n, h, v = 19, 33, 1003
    options = {**options, "scale": 0.5}

    def run(log_prob, kl, tensors, ref_hidden, target, incoming):
        found = [log_prob(**tensors, target=target, **options)]
        if trains:
            found = [*found[0], kl(**tensors, ref_hidden=ref_hidden, **options)]
        names = ("log_prob", "entropy", "kl")[: len(found)]
        outputs = {name: o.detach() for name, o in zip(names, found, strict=True)}
        return {**outputs, **gradients(found, incoming[: len(found)], tensors)}

    def ours(**given):
        found = pk.linear_log_prob(**given, return_entropy=True)
        return found if trains else found[0]

    def theirs(**given):
        found = reference.linear_log_prob(**given)
        return found if trains else found[0]

    tensors = make(n, h, v, dtype, bias=bool(options), rank=rank)
    for name in "ab":
        tensors[name].requires_grad_(trains)
    ref_hidden = (tensors["hidden"].detach().float() + 0.3 * torch.randn(n, h)).to(dtype)
    rest = make_target(n, v), torch.randn(3, n)
    exact = run(theirs, reference.linear_kl, doubled(tensors), ref_hidden.double(), *rest)
    compare(
        run(ours, lambda **k: pk.linear_kl(**k).kl, tensors, ref_hidden, *rest),
        run(theirs, reference.linear_kl, tensors, ref_hidden, *rest),
        exact,
        dtype,
        **({"kl": (2 * exact["kl"].mean().item()) ** 0.5} if trains else {}),
    )


def test_an_adapter_is_a_merged_head_for_the_policy_and_none_for_the_reference(backend):
    t = make(9, 12, 301, torch.float32, rank=3)
    target, ref_hidden, options = make_target(9, 301), torch.randn(9, 12), {"temperature": 0.8}
    merged = (t["weight"] + 0.5 * t["b"] @ t["a"]).detach()
    found = pk.linear_kl(**t, ref_hidden=ref_hidden, target=target, scale=0.5, **options)
    policy, _ = reference.linear_log_prob(t["hidden"], merged, target, **options)
    base, _ = reference.linear_log_prob(ref_hidden, t["weight"], target, **options)
    torch.testing.assert_close(found.log_prob, policy)
    torch.testing.assert_close(found.ref_log_prob, base)
    log_p = reference.log_probs(t["hidden"], merged, **options)
    log_q = reference.log_probs(ref_hidden, t["weight"], **options)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).where(target != -100, 0.0)
    torch.testing.assert_close(found.kl, expected)
    same = pk.linear_kl(t["hidden"], t["hidden"].detach(), t["weight"], a=t["a"], b=0 * t["b"])
    assert not same.kl.any()


def test_one_factor_of_an_adapter_may_train_alone(backend):
    t, target = make(9, 12, 301, torch.float32, rank=3), make_target(9, 301)
    whole = gradients([pk.linear_log_prob(**t, target=target)], [torch.ones(9)], t)
    for name in ("a", "b", "hidden"):
        one = {k: v if v is None else v.detach().requires_grad_(k == name) for k, v in t.items()}
        found = gradients([pk.linear_log_prob(**one, target=target)], [torch.ones(9)], one)
        assert found.keys() == {f"d{name}"}
        torch.testing.assert_close(found[f"d{name}"], whole[f"d{name}"])


def test_gradients_of_log_prob_and_entropy_over_a_frozen_head(backend):
    tensors, target = make(9, 12, 301, torch.float32), make_target(9, 301)
    incoming = (torch.randn(9), torch.randn(9))

    def run(function, tensors, **more):
        return gradients(function(**tensors, target=target, **more), incoming, tensors)

    compare(
        run(pk.linear_log_prob, tensors, return_entropy=True),
        run(reference.linear_log_prob, tensors),
        run(reference.linear_log_prob, doubled(tensors)),
        torch.float32,
    )


def test_kl_gives_the_log_probs_of_both_sides(backend):
    tensors = make(9, 12, 301, torch.float32)
    ref_hidden = torch.randn(9, 12)
    target = make_target(9, 301)
    found = pk.linear_kl(tensors["hidden"], ref_hidden, tensors["weight"], target)
    weight = tensors["weight"]
    log_prob, entropy = reference.linear_log_prob(tensors["hidden"], weight, target)
    ref_log_prob, _ = reference.linear_log_prob(ref_hidden, weight, target)
    torch.testing.assert_close(found.log_prob, log_prob)
    torch.testing.assert_close(found.ref_log_prob, ref_log_prob)
    torch.testing.assert_close(found.entropy, entropy)
    assert not found.ref_log_prob.requires_grad and found.kl[1] == 0
    without = pk.linear_kl(tensors["hidden"], ref_hidden, weight)
    assert without.log_prob is None and without.ref_log_prob is None and without.kl[1] > 0


def test_gradients_of_kl_log_prob_and_entropy_add_up(backend):
    tensors = make(6, 10, 77, torch.float32)
    ref_hidden, target = torch.randn(6, 10), make_target(6, 77, ignored=False)
    hidden, weight = tensors["hidden"], tensors["weight"]
    c = torch.randn(3, 6)
    found = pk.linear_kl(hidden, ref_hidden, weight, target)
    total = (c[0] * found.kl + c[1] * found.log_prob + c[2] * found.entropy).sum()
    log_prob, entropy = reference.linear_log_prob(hidden, weight, target)
    divergence = reference.linear_kl(hidden, ref_hidden, weight)
    expected = (c[0] * divergence + c[1] * log_prob + c[2] * entropy).sum()
    torch.testing.assert_close(
        torch.autograd.grad(total, hidden), torch.autograd.grad(expected, hidden)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kl_coef", [None, 0.0, 0.4])
@pytest.mark.parametrize("rank", [0, 5, 8])
def test_policy_loss(backend, dtype, reduction, kl_coef, rank):
    n, h, v = 23, 31, 1003
    trainable_head = kl_coef is None and not rank
    tensors = make(n, h, v, dtype, bias=True, trainable_head=trainable_head, rank=rank)
    target, advantage = make_target(n, v), torch.randn(n)
    options = {"reduction": reduction, "temperature": 0.9, "softcap": 4.0}
    if rank:
        options["scale"] = 2.0
    if kl_coef is not None:
        shift = 0.3 * torch.randn(n, h)
        tensors["ref_hidden"] = (tensors["hidden"].detach().float() + shift).to(dtype)
        options["kl_coef"] = kl_coef

    def run(function, tensors, advantage):
        found = function(**tensors, target=target, advantage=advantage, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return {"loss": loss.detach(), **gradients((loss,), (torch.tensor(3.0),), tensors)}

    with torch.no_grad():
        log_prob, _ = reference.linear_log_prob(tensors["hidden"], tensors["weight"], target)
    terms = (advantage * log_prob).abs()
    compare(
        run(pk.policy_loss, tensors, advantage),
        run(reference.policy_loss, tensors, advantage),
        run(reference.policy_loss, doubled(tensors), advantage.double()),
        dtype,
        loss=getattr(terms, reduction)().item(),
    )


CLIPPED = {"epsilon": 0.2, "epsilon_high": 0.3}


def off_policy(b, t, h, v, dtype, ref=False, **more):
    """A batch of sequences of which one has no token that counts, with log-probabilities that have
    moved: ratios on both sides of either bound."""
    tensors = make(b * t, h, v, dtype, **more)
    tensors["hidden"] = tensors["hidden"].detach().view(b, t, h).requires_grad_()
    target = torch.randint(0, v, (b, t))
    target[0, 1], target[-1] = -100, -100
    with torch.no_grad():
        flat = {**tensors, "hidden": tensors["hidden"].view(-1, h)}
        log_prob, _ = reference.linear_log_prob(**flat, target=target.view(-1))
    tensors["old_log_prob"] = log_prob.view(b, t) + 0.3 * torch.randn(b, t)
    tensors["old_log_prob"][target == -100] = torch.nan  # nothing is read there
    tensors["advantage"] = torch.randn(b, t)
    if ref:
        shift = 0.3 * torch.randn(b, t, h)
        tensors["ref_hidden"] = (tensors["hidden"].detach().float() + shift).to(dtype)
    return tensors, target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize(
    ("of", "reduction"),
    [("frozen", "mean"), ("kl", "grpo"), ("adapter", "sum"), ("trained", "mean"), ("free", "grpo")],
)
def test_policy_loss_of_ratios(backend, of, reduction, level, dtype):
    options = {"reduction": reduction, "importance_sampling_level": level, "temperature": 0.9}
    options |= {"kl_coef": 0.4} if of == "kl" else {}
    options |= {} if of == "free" else CLIPPED
    terms = []

    def run(function, tensors, target):
        found = function(**tensors, target=target, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return {"loss": loss.detach()[None], **gradients((loss,), (torch.tensor(3.0),), tensors)}

    def sample():
        tensors, target = off_policy(
            40, 4, 31, 303, dtype, bias=True, ref=of == "kl",
            trainable_head=of == "trained", rank=4 if of == "adapter" else 0,
        )  # fmt: skip
        sizes = tensors["advantage"].abs()
        terms.append((sizes.sum() if reduction == "sum" else sizes.mean()).item())
        return (
            run(pk.policy_loss, tensors, target),
            run(reference.policy_loss, tensors, target),
            run(reference.policy_loss, doubled(tensors), target),
        )

    compare(*gathered(sample, 4), dtype, loss=terms[0])


def test_the_first_step_of_every_form_is_reinforce(backend):
    """Ratios of 1: no clip bites, and the gradient is that of -advantage * log_prob."""
    tensors, target = off_policy(4, 6, 12, 301, torch.float32)
    now = {k: tensors[k] for k in ("hidden", "weight", "advantage")}
    plain = pk.policy_loss(**now, target=target)
    expected = torch.autograd.grad(plain.loss, tensors["hidden"])
    found = pk.policy_loss(**now, target=target, old_log_prob=plain.log_prob, epsilon=0.2)
    torch.testing.assert_close(torch.autograd.grad(found.loss, tensors["hidden"]), expected)
    counts = target != -100
    torch.testing.assert_close(found.loss, -tensors["advantage"][counts].mean())


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("reduction", ["mean", "grpo"])
def test_equals_the_losses_of_trl(backend, reduction, level):
    """GRPOTrainer's own loss at either level, and RLOOTrainer's, on the log-probabilities here."""
    trainers = pytest.importorskip("trl.trainer", reason="trl is not installed")
    from types import SimpleNamespace
    from unittest.mock import MagicMock

    tensors, target = off_policy(5, 7, 12, 41, torch.float32)
    target[-1, 0] = 4
    mask, old = (target != -100).long(), tensors["old_log_prob"].nan_to_num()
    options = {"reduction": reduction, "importance_sampling_level": level, **CLIPPED}
    tensors |= {"old_log_prob": old, "advantage": tensors["advantage"][:, :1].expand(5, 7)}
    ours = pk.policy_loss(**tensors, target=target, **options).loss

    def log_probs(*args, **kwargs):
        flat = tensors["hidden"].view(-1, 12)
        found = reference.linear_log_prob(flat, tensors["weight"], target.view(-1))
        return *(t.view(5, 7) for t in found), None

    trainer = MagicMock(
        epsilon_low=CLIPPED["epsilon"], epsilon_high=CLIPPED["epsilon_high"], beta=0.0,
        loss_type={"mean": "bnpo"}.get(reduction, reduction), importance_sampling_level=level,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        _entropy_bonus_enabled=False, aux_loss_enabled=False, args=SimpleNamespace(delta=None),
        current_gradient_accumulation_steps=1, _get_per_token_logps_and_entropies=log_probs,
    )  # fmt: skip
    trainer.accelerator.reduce = lambda t, reduction: t
    trainer.accelerator.gather = lambda t: t
    inputs = {"prompt_ids": target[:, :0], "prompt_mask": target[:, :0], "completion_ids": target}
    inputs |= {"completion_mask": mask, "advantages": tensors["advantage"][:, 0]}
    if level == "sequence_sum":
        if reduction != "grpo":
            pytest.skip("RLOOTrainer has no loss_type")
        inputs["old_logps"] = (old * mask).sum(1)
        theirs = trainers.RLOOTrainer._compute_loss(trainer, None, inputs)
    else:
        inputs["old_per_token_logps"] = old
        theirs = trainers.GRPOTrainer._compute_loss(trainer, None, inputs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors["hidden"]), torch.autograd.grad(theirs, tensors["hidden"])
    )


def test_a_ratio_beyond_its_bound_has_no_gradient(backend):
    """Above the bound with a gain, below it with a loss; the other two are pulled back."""
    tensors = make(4, 6, 40, torch.float32)
    target, advantage = torch.tensor([0, 3, 7, 9]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    log_prob = pk.linear_log_prob(**tensors, target=target).detach()
    old = log_prob - torch.tensor([1.0, 1.0, -1.0, -1.0])
    found = pk.policy_loss(
        **tensors, target=target, advantage=advantage, old_log_prob=old, epsilon=0.2
    )
    gradient = torch.autograd.grad(found.loss, tensors["hidden"])[0]
    assert gradient.any(dim=1).tolist() == [False, True, True, False]


def test_a_ratio_that_overflows_where_nothing_is_to_gain(backend):
    tensors, target = make(2, 6, 40, torch.float32), torch.tensor([0, 3])
    old, advantage = torch.tensor([-1e3, -1.0]), torch.tensor([0.0, 1.0])
    found = pk.policy_loss(**tensors, target=target, advantage=advantage, old_log_prob=old)
    assert found.loss.isfinite()
    assert torch.autograd.grad(found.loss, tensors["hidden"])[0].isfinite().all()


def test_policy_loss_reports_detached_facts(backend):
    tensors = make(8, 6, 40, torch.float32)
    target, ref_hidden = make_target(8, 40), torch.randn(8, 6)
    found = pk.policy_loss(
        **tensors, target=target, advantage=torch.ones(8), ref_hidden=ref_hidden, kl_coef=0.1
    )
    separate = pk.linear_kl(tensors["hidden"], ref_hidden, tensors["weight"], target)
    for name in ("log_prob", "kl", "entropy"):
        value = getattr(found, name)
        assert not value.requires_grad
        torch.testing.assert_close(value, getattr(separate, name).detach())


def test_masked_tokens_have_no_say(backend):
    tensors = make(10, 6, 40, torch.float32)
    target, advantage = make_target(10, 40), torch.randn(10)
    mask = torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 1, 1])
    masked = pk.policy_loss(**tensors, target=target, advantage=advantage, mask=mask)
    keep = mask.bool()
    tensors_kept = {**tensors, "hidden": tensors["hidden"][keep]}
    kept = pk.policy_loss(**tensors_kept, target=target[keep], advantage=advantage[keep])
    torch.testing.assert_close(masked.loss, kept.loss)
    assert not masked.log_prob[~keep].any() and not masked.entropy[~keep].any()
    gradient = torch.autograd.grad(masked.loss, tensors["hidden"])[0]
    assert not gradient[~keep].any() and gradient[keep].any(dim=1).sum() == keep.sum() - 1


@pytest.mark.parametrize("n", [0, 5])
def test_no_token_counts(backend, n):
    """An empty batch, and a batch in which every token is ignored: zeros, never NaN."""
    tensors = make(n, 6, 40, torch.float32)
    target = torch.full((n,), -100)
    found = pk.policy_loss(**tensors, target=target, advantage=torch.ones(n))
    assert found.loss.item() == 0 and found.log_prob.shape == (n,)
    assert not torch.autograd.grad(found.loss, tensors["hidden"])[0].any()
    log_prob = pk.linear_log_prob(**tensors, target=target)
    assert not log_prob.any()
    gradient = torch.autograd.grad(log_prob.sum(), tensors["hidden"])[0]
    assert gradient.shape == (n, 6) and not gradient.any()


@pytest.mark.parametrize("lead", [(0, 4), (3, 0), (0,), ()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "grpo"])
def test_ratios_of_no_token_or_one(backend, reduction, lead):
    hidden, weight = torch.randn(*lead, 6, requires_grad=True), torch.randn(40, 6)
    target, old = torch.full(lead, 7), torch.zeros(lead)
    options = {"importance_sampling_level": "sequence", "reduction": reduction}
    found = pk.policy_loss(
        hidden, weight, target, torch.ones(lead), old_log_prob=old, epsilon=0.2, **options
    )
    expected = pk.linear_log_prob(hidden, weight, target).exp().sum()
    torch.testing.assert_close(found.loss, -expected)  # a ratio to 1, or nothing
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, hidden), torch.autograd.grad(-expected, hidden)
    )


def test_leading_dimensions_and_strides(backend):
    hidden, target = torch.randn(3, 4, 16)[..., ::2], torch.randint(0, 20, (4, 3)).t()
    weight = torch.randn(8, 20).t()
    log_prob, entropy = pk.linear_log_prob(hidden, weight, target, return_entropy=True)
    expected, _ = reference.linear_log_prob(hidden.reshape(12, 8), weight, target.reshape(12))
    assert log_prob.shape == entropy.shape == (3, 4)
    torch.testing.assert_close(log_prob.reshape(12), expected)
    apart = {"target": torch.randint(0, 20, (24,))[::2], "bias": torch.randn(40)[::2]}
    found = pk.linear_log_prob(hidden.reshape(12, 8), weight, **apart)
    expected, _ = reference.linear_log_prob(hidden.reshape(12, 8), weight, **apart)
    torch.testing.assert_close(found, expected)


# (N, H, V): few and many features; 262144: the largest vocabulary; 65541 rows: past 16 bits.
EXTREMES = [(33, 64, 1003), (33, 1024, 300), (3, 4, 262144), (65541, 2, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, -1e4])
@pytest.mark.parametrize("sizes", EXTREMES, ids=str)
def test_the_published_error(backend, sizes, offset, dtype):
    n, _, v = sizes
    for spread, temperature in ((0.1, 1.0), (2.0, 0.5), (10.0, 2.0)):
        t = make(*sizes, dtype, spread=spread)
        t["bias"] = (offset + torch.randn(v)).to(dtype)
        target = make_target(n, v, ignored=False)
        given = {"target": target, "temperature": temperature}
        found = pk.linear_log_prob(**t, **given, return_entropy=True)
        t = {name: tensor.detach().double() for name, tensor in t.items()}
        size = t["hidden"].norm(dim=1) * t["weight"].norm(dim=1).max() + t["bias"].abs().max()
        check_bound(found, reference.linear_log_prob(**t, **given), size, temperature)


@pytest.mark.parametrize("sizes", EXTREMES[2:], ids=str)
def test_gradients_at_extreme_sizes(backend, sizes):
    n, h, v = sizes
    tensors, target, advantage = make(*sizes, torch.float32), make_target(n, v), torch.randn(n)
    tensors["ref_hidden"] = tensors["hidden"].detach() + 0.3 * torch.randn(n, h)
    options = {"target": target, "kl_coef": 0.3, "reduction": "sum"}

    def run(function, tensors, advantage):
        found = function(**tensors, advantage=advantage, **options)
        loss = found.loss if isinstance(found, tuple) else found
        return gradients((loss,), (torch.ones(()),), tensors)

    compare(
        run(pk.policy_loss, tensors, advantage),
        run(reference.policy_loss, tensors, advantage),
        run(reference.policy_loss, doubled(tensors), advantage.double()),
        torch.float32,
    )


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_constant_offset_of_the_logits_costs_no_more_than_its_own_rounding(backend, offset):
    """Logits near 1e4 carry a float32 rounding of 5e-4 each; nothing may be lost beyond that."""
    tensors = make(5, 8, 300, torch.float32)
    target = make_target(5, 300, ignored=False)
    bias = torch.full((300,), offset)
    plain = pk.linear_log_prob(tensors["hidden"], tensors["weight"], target, return_entropy=True)
    shifted = pk.linear_log_prob(
        tensors["hidden"], tensors["weight"], target, bias=bias, return_entropy=True
    )
    for one, other in zip(plain, shifted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4e-3)
    kl = pk.linear_kl(tensors["hidden"], tensors["hidden"].detach(), tensors["weight"], bias=bias)
    assert kl.kl.abs().max() < 1e-5


def test_a_masked_class_has_no_say(backend):
    """A bias of -inf removes a class: finite results, no gradient through it."""
    tensors = make(5, 8, 300, torch.float32)
    target = make_target(5, 300, ignored=False)
    bias = torch.zeros(300)
    bias[10:20] = -torch.inf
    target[(target >= 10) & (target < 20)] = 3
    kept = torch.cat([tensors["weight"][:10], tensors["weight"][20:]])
    moved = torch.where(target >= 20, target - 10, target)
    found = pk.linear_log_prob(
        tensors["hidden"], tensors["weight"], target, bias=bias, return_entropy=True
    )
    expected = reference.linear_log_prob(tensors["hidden"], kept, moved)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    ours = torch.autograd.grad(found[0].sum() + found[1].sum(), tensors["hidden"])
    theirs = torch.autograd.grad(expected[0].sum() + expected[1].sum(), tensors["hidden"])
    torch.testing.assert_close(ours, theirs)
    ref_hidden, hidden = torch.randn(5, 8), tensors["hidden"]
    divergence = pk.linear_kl(hidden, ref_hidden, tensors["weight"], bias=bias).kl
    expected = reference.linear_kl(hidden, ref_hidden, kept)
    torch.testing.assert_close(divergence, expected)
    torch.testing.assert_close(
        torch.autograd.grad(divergence.sum(), hidden), torch.autograd.grad(expected.sum(), hidden)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_divergence_has_no_gradient(backend, softcap, dtype):
    tensors, target = make(9, 12, 1003, dtype, bias=True), make_target(9, 1003)
    same = tensors["hidden"].detach()
    found = pk.linear_kl(**tensors, ref_hidden=same, target=target, softcap=softcap)
    assert found.kl.abs().max() < 1e-6
    assert not torch.autograd.grad(found.kl.sum(), tensors["hidden"])[0].any()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_reference_gradcheck(softcap):
    t = make(4, 3, 6, torch.float64, bias=True, trainable_head=True)
    target = torch.tensor([0, 5, -100, 2])

    def both(hidden, weight, bias):
        return reference.linear_log_prob(
            hidden, weight, target, bias=bias, temperature=0.8, softcap=softcap
        )

    torch.autograd.gradcheck(both, (t["hidden"], t["weight"], t["bias"]))
    ref_hidden = torch.randn(4, 3, dtype=torch.float64)
    adapter = make(4, 3, 6, torch.float64, rank=2)
    torch.autograd.gradcheck(
        lambda hidden, a, b: reference.linear_kl(
            hidden, ref_hidden, t["weight"].detach(), a=a, b=b, scale=0.5, temperature=0.8,
            softcap=softcap,
        ),
        (t["hidden"], adapter["a"], adapter["b"]),
    )  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_float64_gradchecks_through_the_ops(softcap):
    t = make(4, 3, 6, torch.float64, bias=True, trainable_head=True)
    target = torch.tensor([0, 5, -100, 2])
    options = {"temperature": 0.8, "softcap": softcap}
    torch.autograd.gradcheck(
        lambda h, w, b: pk.linear_log_prob(h, w, target, bias=b, return_entropy=True, **options),
        (t["hidden"], t["weight"], t["bias"]),
    )
    ref_hidden, weight = torch.randn(4, 3, dtype=torch.float64), t["weight"].detach()
    torch.autograd.gradcheck(
        lambda h: pk.linear_kl(h, ref_hidden, weight, **options).kl, (t["hidden"],)
    )
    advantage = torch.randn(4, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda h: (
            pk.policy_loss(
                h, weight, target, advantage, ref_hidden=ref_hidden, kl_coef=0.3, **options
            ).loss
        ),
        (t["hidden"],),
    )


@pytest.mark.parametrize("reduction", ["mean", "grpo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_float64_gradchecks_of_ratios(level, reduction):
    tensors, target = off_policy(3, 3, 3, 6, torch.float64, ref=True)
    hidden = tensors.pop("hidden")
    options = {"importance_sampling_level": level, "reduction": reduction, "kl_coef": 0.3}
    torch.autograd.gradcheck(
        lambda h: pk.policy_loss(h, target=target, **tensors, **options, **CLIPPED).loss, (hidden,)
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_float64_gradchecks_of_an_adapter_through_the_ops(softcap):
    t = make(4, 3, 6, torch.float64, bias=True, rank=2)
    leaves = (t["hidden"], t["a"], t["b"])
    target, advantage = torch.tensor([0, 5, -100, 2]), torch.randn(4, dtype=torch.float64)
    ref_hidden, weight = torch.randn(4, 3, dtype=torch.float64), t["weight"]
    options = {"temperature": 0.8, "softcap": softcap, "scale": 0.5, "bias": t["bias"]}

    def log_prob(h, a, b):
        return pk.linear_log_prob(h, weight, target, a=a, b=b, return_entropy=True, **options)

    def kl(h, a, b):
        return pk.linear_kl(h, ref_hidden, weight, a=a, b=b, **options).kl

    def loss(h, a, b):
        more = {"ref_hidden": ref_hidden, "kl_coef": 0.3, "a": a, "b": b}
        return pk.policy_loss(h, weight, target, advantage, **more, **options).loss

    for function in (log_prob, kl, loss):
        torch.autograd.gradcheck(function, leaves)


def test_opcheck(backend):
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    bias = torch.randn(11, requires_grad=True)
    target, ops = torch.tensor([0, 10, -100, 3, 4]), torch.ops.perl_kernels
    frozen, ref_hidden, none = weight.detach(), torch.randn(5, 8), (None, None)
    adapter = torch.randn(3, 8, requires_grad=True), torch.randn(11, 3, requires_grad=True)
    for inputs in (
        (hidden, weight, bias, *none, target, None, 1.0, 0.9, 0.0, -100),
        (hidden, frozen, None, *none, target, ref_hidden, 1.0, 1.0, 5.0, -100),
        (hidden, frozen, None, *none, None, ref_hidden, 1.0, 1.0, 0.0, -100),
        (hidden, frozen, bias, *adapter, target, ref_hidden, 0.5, 1.0, 0.0, -100),
    ):
        torch.library.opcheck(ops.head_stats.default, inputs)
    torch.library.opcheck(ops.head_logits.default, (ref_hidden, frozen))
    frozen_adapter = tuple(t.detach() for t in adapter)
    c = torch.randn(2, 5)
    for a_b, rest in (
        (none, (target, None, None, None)),
        (none, (target, None, c[0], None)),
        (none, (None, ref_hidden, None, None)),
        (frozen_adapter, (target, ref_hidden, None, None)),
        (frozen_adapter, (target, ref_hidden, c[0], c[1])),
    ):
        torch.library.opcheck(
            ops.head_units.default, (hidden, frozen, None, *a_b, *rest, 1.0, 0.9, 4.0, -100)
        )
    advantage, old = torch.randn(5), torch.randn(5)
    plain, clipped = (0.0, 0.0, "token", "mean", 5), (0.8, 1.2, "sequence", "sum", 1)
    for head, old_log_prob, ref, need in (
        ((weight, bias, *none), old, None, (True, True, True, False)),
        ((frozen, None, *none), old, ref_hidden, (True, False, False, False)),
        ((frozen, None, *adapter), None, ref_hidden, (True, False, False, True)),
        ((frozen, bias, *adapter), None, None, (True, False, True, True)),
    ):
        torch.library.opcheck(
            ops.policy_loss.default,
            (hidden, *head, target, advantage, old_log_prob, ref, 0.0 if ref is None else 0.2)
            + (*(plain if old_log_prob is None else clipped), 1.0, 1.0, 0.0, -100, *need),
        )


@pytest.mark.parametrize("rank", [0, 3])
def test_compiles_without_a_graph_break(backend, rank):
    t = make(6, 8, 50, torch.float32, rank=rank)
    target, ref_hidden, weight = make_target(6, 50), torch.randn(6, 8), t.pop("weight")
    leaves = {name: tensor for name, tensor in t.items() if tensor is not None}

    def function(leaves):
        log_prob, entropy = pk.linear_log_prob(
            weight=weight, target=target, return_entropy=True, **leaves
        )
        kl = pk.linear_kl(ref_hidden=ref_hidden, weight=weight, target=target, **leaves).kl
        loss = pk.policy_loss(
            weight=weight, target=target, advantage=torch.ones(6), ref_hidden=ref_hidden,
            kl_coef=0.1, **leaves,
        ).loss  # fmt: skip
        return loss + log_prob.sum() + 0.5 * entropy.sum() + kl.mean()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaves), function(leaves))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(leaves), list(leaves.values())),
        torch.autograd.grad(function(leaves), list(leaves.values())),
    )


def bad_calls():
    h, w, t = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([0, 8, 2, 3])
    good = dict(hidden=h, weight=w, target=t)
    yield "features", dict(good, hidden=h[:, :5]), ValueError, "hidden has 5 features"
    yield "dtype", dict(good, weight=w.half()), TypeError, "weight is torch.float16"
    yield "target dtype", dict(good, target=t.float()), TypeError, "target is torch.float32"
    yield "target shape", dict(good, target=t[:3]), ValueError, r"target has shape \(3,\)"
    yield "target range", dict(good, target=t + 1), ValueError, "target holds 9; wanted 0 <= target"
    yield "target negative", dict(good, target=t - 7), ValueError, "target holds -7"
    yield "temperature", dict(good, temperature=0.0), ValueError, "temperature is 0.0; wanted > 0"
    yield "nan", dict(good, temperature=float("nan")), ValueError, "temperature is nan"
    yield "softcap", dict(good, softcap=-1.0), ValueError, "softcap is -1.0; wanted > 0"
    yield "bias", dict(good, bias=w[0]), ValueError, "bias has shape"
    yield "vocabulary", dict(good, weight=w[:0]), ValueError, "weight has 0 rows"
    a, b = torch.randn(2, 6), torch.randn(9, 2)
    adapted = dict(good, a=a, b=b)
    yield "half an adapter", dict(good, a=a), ValueError, "a is given without b"
    yield "the other half", dict(good, b=b), ValueError, "b is given without a"
    yield "scale alone", dict(good, scale=2.0), ValueError, "scale is 2.0 and there is no adapter"
    yield "scale nan", dict(adapted, scale=float("nan")), ValueError, "scale is nan; wanted a fini"
    yield "a", dict(adapted, a=a[:, :5]), ValueError, r"a has shape \(2, 5\); wanted \(R, H\)"
    yield "b", dict(adapted, b=b[:8]), ValueError, r"b has shape \(8, 2\); wanted \(V, R\)"
    yield "rank", dict(adapted, a=a[:0], b=b[:, :0]), ValueError, "a has rank 0"
    yield "dimensions", dict(adapted, a=a[0]), ValueError, "a has 1 dimensions; wanted 2"
    yield "adapter dtype", dict(adapted, b=b.half()), TypeError, "b is torch.float16 and hidden"
    trained = dict(adapted, weight=w.clone().requires_grad_())
    yield "trained base", trained, ValueError, "weight requires grad, and the base of an adapter"


@pytest.mark.parametrize("call", bad_calls(), ids=lambda c: c[0])
def test_bad_arguments_are_named(backend, call):
    _, arguments, kind, message = call
    with pytest.raises(kind, match=message):
        pk.linear_log_prob(**arguments)


def bad_ratios():
    old = {"old_log_prob": torch.zeros(4)}
    yield {"epsilon": 0.2}, ValueError, "epsilon is 0.2 and there is no old_log_prob"
    yield {**old, "epsilon": -0.1}, ValueError, "epsilon is -0.1; wanted >= 0"
    yield {**old, "epsilon_high": 0.1}, ValueError, "epsilon_high is 0.1 without epsilon"
    yield {"importance_sampling_level": "sequence"}, ValueError, "'sequence' and there is no old_lo"
    yield {**old, "importance_sampling_level": "word"}, ValueError, "level is 'word'; wanted 'token"
    yield {"old_log_prob": torch.zeros(3)}, ValueError, "old_log_prob has shape"
    yield {"old_log_prob": torch.zeros(4).long()}, TypeError, "old_log_prob is torch.int64"


@pytest.mark.parametrize("call", bad_ratios(), ids=lambda c: c[2])
def test_ratios_that_would_say_nothing_are_refused(call):
    options, kind, message = call
    h, w, t = torch.randn(4, 6), torch.randn(9, 6), torch.tensor([0, 8, 2, 3])
    with pytest.raises(kind, match=message):
        pk.policy_loss(h, w, t, torch.ones(4), **options)


def test_gradients_that_do_not_exist_are_refused():
    h, w = torch.randn(4, 6), torch.randn(9, 6)
    t, trained = torch.tensor([0, 8, 2, 3]), torch.randn(4, 6, requires_grad=True)
    with pytest.raises(ValueError, match="ref_hidden requires grad"):
        pk.linear_kl(h, trained, w)
    with pytest.raises(ValueError, match="weight requires grad"):
        pk.linear_kl(trained, h, w.clone().requires_grad_())
    with pytest.raises(ValueError, match="advantage requires grad"):
        pk.policy_loss(trained, w, t, torch.ones(4, requires_grad=True))
    with pytest.raises(ValueError, match="there is no ref_hidden"):
        pk.policy_loss(trained, w, t, torch.ones(4), kl_coef=0.1)
    with pytest.raises(ValueError, match="reduction is 'none'"):
        pk.policy_loss(trained, w, t, torch.ones(4), reduction="none")
    with pytest.raises(ValueError, match="old_log_prob requires grad"):
        pk.policy_loss(trained, w, t, torch.ones(4), old_log_prob=torch.ones(4, requires_grad=True))
    with pytest.raises(TypeError, match="mask is torch.float32"):
        pk.policy_loss(trained, w, t, torch.ones(4), mask=torch.ones(4))


def of_blocks(low):
    """What the route "blocks" of a GPU is held to, wherever it can run: tests of this file, and
    what they take after `backend`. low: a dtype of 16 bits."""
    sizes, capped, single = (7, 33, 300), OPTIONS[3], torch.float32
    gradient = test_gradient_over_a_frozen_head
    return [
        (gradient, (("log_prob",), 30.0, sizes, {}, single)),
        (gradient, (("log_prob", "kl"), 2.0, sizes, capped, single)),
        (gradient, (("log_prob", "kl"), 8.0, sizes, {}, low)),
        (gradient, (("kl",), 30.0, sizes, {}, single)),
        (test_kl, (sizes, capped, low)),
        (test_adapter, (False, capped, single, 5)),
        (test_policy_loss, (single, "mean", 0.4, 5)),
        (test_policy_loss, (low, "sum", 0.4, 0)),
        (test_policy_loss, (low, "mean", None, 8)),
        (test_the_first_step_of_every_form_is_reinforce, ()),
        (test_a_ratio_beyond_its_bound_has_no_gradient, ()),
        (test_kl_gives_the_log_probs_of_both_sides, ()),
        (test_no_token_counts, (0,)),
        (test_no_token_counts, (5,)),
        (test_a_masked_class_has_no_say, ()),
        (test_a_constant_offset_of_the_logits_costs_no_more_than_its_own_rounding, (-1e4,)),
        (test_no_divergence_has_no_gradient, (3.0, low)),
        (test_leading_dimensions_and_strides, ()),
    ]


def said(value):
    return value.__name__.removeprefix("test_") if callable(value) else str(value)
