"""The same quantities as the head's, from logits that already exist.

Replaces, with z = softcap * tanh(logits / softcap) / temperature,

    log_prob   log_softmax(z.float(), -1).gather(-1, target), and the entropy of softmax(z)
    kl         (softmax(z) * (log_softmax(z) - log_softmax(z_ref))).sum(-1)

and TRL's selective_log_softmax by its own name.

One pass over the logits, float32 statistics whatever the input type, no [N, V] temporary. The
gradient writes dlogits once; its formula is the head's. Saved for backward: the logits themselves
and four numbers a row (the largest logit, log of the sum, entropy, and for kl E_p[z - z_ref]).
With inplace_backward the gradient takes the place of the logits: no second [N, V] exists then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_alike, check_constant, check_float, check_range, check_shape
from .._softmax import statistics_dtype
from . import op as _op

__all__ = ["kl", "log_prob", "selective_log_softmax"]


def log_prob(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...,)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] of each row of logits, in nats.

    Args:
        logits: (..., V) float32, bfloat16, float16, or float64 (which runs on the reference).
        target: (...,) int64 classes in [0, V), or ignore_index (those rows give 0, no gradient).
            Checked on CPU; on a GPU a class out of range is undefined.
        temperature: > 0. softcap: > 0 or None.
        return_entropy: also return the entropy of softmax(z), in nats.
        inplace_backward: backward writes the gradient over logits, whose values are then gone (or
            over a copy, where they have no view as (N, V)). Autograd refuses it if another backward
            still needs them, or this one a second time.

    Returns:
        (...,) float32 (float64 for float64), or the pair (log_prob, entropy). Against float64 on
        the same logits, float32, bfloat16 or float16, each is within 2^-20 max(1, max_j |logit_j|)
        / min(1, temperature) nats.

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; inplace_backward over a
            leaf that requires grad, over memory that several logits share, or under torch.compile.
    """
    lead = _check("logits", logits, temperature, softcap)
    if target.dtype != torch.int64:
        raise TypeError(f"target is {target.dtype}; wanted torch.int64")
    check_shape("target", target, tuple(lead), "logits' leading shape")
    log_p, _, _, entropy, *_ = _stats(
        logits,
        target.reshape(-1).contiguous(),
        None,
        temperature,
        softcap,
        ignore_index,
        inplace_backward,
    )
    return (log_p.view(lead), entropy.view(lead)) if return_entropy else log_p.view(lead)


def kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """KL(softmax(z) || softmax(z_ref)) of each row, in nats; the gradient goes to logits only.

    Arguments as in log_prob.

    Returns:
        (...,) float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as in log_prob; ref_logits requires grad.
    """
    lead = _check("logits", logits, temperature, softcap)
    check_float("ref_logits", ref_logits)
    check_shape("ref_logits", ref_logits, tuple(logits.shape), "logits' shape")
    check_alike("ref_logits", ref_logits, "logits", logits)
    check_constant("ref_logits", ref_logits, "the reference is a constant here")
    ref_logits = ref_logits.reshape(-1, logits.shape[-1])
    *_, divergence = _stats(logits, None, ref_logits, temperature, softcap, -100, inplace_backward)
    return divergence.view(lead)


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...,) or (..., K)
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # as index
) -> Tensor:
    """log softmax(logits / temperature)[index], in place of TRL's function of that name.

    The result is float32 where TRL's has the dtype of 16-bit logits, rounded. K classes a row
    are found from the likeliest, whose log p is log_prob's; that costs a pass over [N, V] more, and
    their gradient two.

    Args:
        row_mask: nonzero where an element of index counts; the others give 0 and no gradient.

    Returns:
        As index, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong.
    """
    if row_mask is not None:
        check_shape("row_mask", row_mask, tuple(index.shape), "index's shape")
    if index.ndim < logits.ndim:
        target = index if row_mask is None else index.where(row_mask != 0, -100)
        return log_prob(logits, target, temperature=temperature)
    check_shape("index", index, (*logits.shape[:-1], index.shape[-1]), "(..., K)")
    top = logits.detach().argmax(-1)
    wanted = torch.cat([top[..., None], index], -1)
    z = logits.gather(-1, wanted).to(statistics_dtype(logits.dtype)) / temperature
    log_p = log_prob(logits, top, temperature=temperature)[..., None] + (z[..., 1:] - z[..., :1])
    return log_p if row_mask is None else log_p.where(row_mask != 0, 0.0)


def _stats(
    logits: Tensor,
    target: Tensor | None,
    ref_logits: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    op = torch.ops.perl_kernels.logits_stats
    if inplace_backward:
        _check_over(logits)
        op = _op.OverLogits.apply
    rows = logits.reshape(-1, logits.shape[-1])
    return op(rows, target, ref_logits, temperature, softcap or 0.0, ignore_index)


def _check_over(logits: Tensor) -> None:
    """Refuse to write a gradient over logits where that would be wrong, or cannot be seen to be."""
    if torch.compiler.is_compiling():
        raise ValueError("inplace_backward is True under torch.compile, which may use logits again")
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "inplace_backward is True and logits are a leaf that requires grad, whose values would "
            "be lost; wanted the output of another operation"
        )
    if any(n > 1 and step == 0 for n, step in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            "inplace_backward is True and logits are expanded: elements share memory; pass "
            "logits.contiguous()"
        )


def _check(name: str, logits: Tensor, temperature: float, softcap: float | None) -> torch.Size:
    check_float(name, logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} has no vocabulary dimension; wanted (..., V) with V >= 1")
    check_range("temperature", temperature, torch.finfo(torch.float32).tiny, float("inf"), "> 0")
    if softcap is not None:
        check_range("softcap", softcap, torch.finfo(torch.float32).tiny, float("inf"), "> 0")
    return logits.shape[:-1]
