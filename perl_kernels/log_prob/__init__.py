"""The same quantities as the head's, from logits that already exist.

Replaces, with z = softcap * tanh(logits / softcap) / temperature,

    log_prob   log_softmax(z.float(), -1).gather(-1, target), and the entropy of softmax(z)
    kl         (softmax(z) * (log_softmax(z) - log_softmax(z_ref))).sum(-1)

One pass over the logits, float32 statistics whatever the input type, no [N, V] temporary. The
gradient writes dlogits once; its formula is the head's. Saved for backward: the logits themselves
and four numbers a row (the largest logit, log of the sum, entropy, and for kl E_p[z - z_ref]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_alike, check_constant, check_float, check_range, check_shape
from . import op as _op  # noqa: F401 - registers the ops

__all__ = ["kl", "log_prob"]


def log_prob(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...,)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[target] of each row of logits, in nats.

    Args:
        logits: (..., V) float32, bfloat16, float16, or float64 (which runs on the reference).
        target: (...,) int64 classes in [0, V), or ignore_index (those rows give 0, no gradient).
            Checked on CPU; on a GPU a class out of range is undefined.
        temperature: > 0. softcap: > 0 or None.
        return_entropy: also return the entropy of softmax(z), in nats.

    Returns:
        (...,) float32 (float64 for float64), or the pair (log_prob, entropy).

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong.
    """
    lead = _check("logits", logits, temperature, softcap)
    if target.dtype != torch.int64:
        raise TypeError(f"target is {target.dtype}; wanted torch.int64")
    check_shape("target", target, tuple(lead), "logits' leading shape")
    log_p, _, _, entropy, *_ = torch.ops.perl_kernels.logits_stats(
        logits.reshape(-1, logits.shape[-1]), target.reshape(-1), None,
        temperature, softcap or 0.0, ignore_index,
    )  # fmt: skip
    return (log_p.view(lead), entropy.view(lead)) if return_entropy else log_p.view(lead)


def kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """KL(softmax(z) || softmax(z_ref)) of each row, in nats; the gradient goes to logits only.

    Returns:
        (...,) float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or range is wrong; ref_logits requires grad.
    """
    lead = _check("logits", logits, temperature, softcap)
    check_float("ref_logits", ref_logits)
    check_shape("ref_logits", ref_logits, tuple(logits.shape), "logits' shape")
    check_alike("ref_logits", ref_logits, "logits", logits)
    check_constant("ref_logits", ref_logits, "the reference is a constant here")
    columns = logits.shape[-1]
    *_, divergence = torch.ops.perl_kernels.logits_stats(
        logits.reshape(-1, columns), None, ref_logits.reshape(-1, columns),
        temperature, softcap or 0.0, -100,
    )  # fmt: skip
    return divergence.view(lead)


def _check(name: str, logits: Tensor, temperature: float, softcap: float | None) -> torch.Size:
    check_float(name, logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{name} has no vocabulary dimension; wanted (..., V) with V >= 1")
    check_range("temperature", temperature, torch.finfo(torch.float32).tiny, float("inf"), "> 0")
    if softcap is not None:
        check_range("softcap", softcap, torch.finfo(torch.float32).tiny, float("inf"), "> 0")
    return logits.shape[:-1]
