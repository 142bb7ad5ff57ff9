"""The softmax statistics of a row of logits, folded one tile of columns at a time, in plain torch.

Both rooms that compute log-probabilities (`head` from hidden states, `log_prob` from logits) share
these formulas; their C++ and Triton kernels keep the same state in registers.

State of a row over the columns seen so far, with z the logits and zq the reference's:

    m = max z       l = sum e^(z-m)       u = sum e^(z-m) (z-m)       t = z[target]
    mq = max zq     lq = sum e^(zq-mq)    d = sum e^(z-m) (z-zq)      tq = zq[target]

A tile that raises m by `up` rescales: l' = l e^-up, d' = d e^-up, u' = (u - l up) e^-up. At the end

    log p = t - m - log l     entropy = log l - u / l     gap = d / l = E_p[z - zq]
    KL(p || q) = gap - (m - mq) - (log l - log lq)

The maximum and log l are kept apart, never added to one log-sum-exp: a constant offset of the
logits then costs no precision, and neither does a KL that is small beside them. The gradient of
the three quantities needs nothing else:

    d log p[target] / dz_j = [j = target] - p_j
    d entropy / dz_j       = -p_j (log p_j + entropy)
    d KL / dz_j            = p_j ((z - zq)_j - gap)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """Per row, float32 (float64 for float64 inputs). Fields that were not asked for are empty."""

    log_prob: Tensor  # (N,) log p[target]
    peak: Tensor  # (N,) m, the largest logit
    log_sum: Tensor  # (N,) log l; the log-sum-exp is peak + log_sum
    entropy: Tensor  # (N,) of p
    ref_log_prob: Tensor  # (N,) log q[target]
    gap: Tensor  # (N,) E_p[z - zq]
    kl: Tensor  # (N,) KL(p || q)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_stats(like: Tensor, rows: int, has_target: bool, has_ref: bool) -> Stats:
    def column(wanted: bool) -> Tensor:
        return like.new_empty(rows if wanted else 0, dtype=statistics_dtype(like.dtype))

    return Stats(
        log_prob=column(has_target),
        peak=column(True),
        log_sum=column(True),
        entropy=column(True),
        ref_log_prob=column(has_target and has_ref),
        gap=column(has_ref),
        kl=column(has_ref),
    )


def transform(raw: Tensor, temperature: float, softcap: float) -> Tensor:
    """z = softcap * tanh(raw / softcap) / temperature; softcap 0 means none."""
    if softcap > 0.0:
        return torch.tanh(raw / softcap) * (softcap / temperature)
    return raw / temperature


def transform_slope(raw: Tensor, temperature: float, softcap: float) -> Tensor | float:
    """dz / draw."""
    if softcap > 0.0:
        return (1.0 - torch.tanh(raw / softcap).square()) / temperature
    return 1.0 / temperature


class RowState:
    """The state above for a block of rows. `fold` takes tiles of z (rows, columns) in any order."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.m = like.new_full((rows,), torch.finfo(like.dtype).min)
        self.l = torch.zeros_like(self.m)  # noqa: E741 - the letter of the formulas
        self.u = torch.zeros_like(self.m)
        self.t = torch.zeros_like(self.m)
        self.mq, self.lq = self.m.clone(), torch.zeros_like(self.m)
        self.d, self.tq = torch.zeros_like(self.m), torch.zeros_like(self.m)

    def fold(self, z: Tensor, zq: Tensor | None, target: Tensor | None, first: int) -> None:
        """Add columns first .. first + z.shape[1]."""
        m = torch.maximum(self.m, z.amax(1))
        up = self.m - m
        shrink = torch.exp(up)
        centred = z - m[:, None]
        e = torch.exp(centred)
        # e * centred is 0 where e is: a masked logit of -inf has no say
        centred = torch.where(e > 0, centred, 0.0)
        self.u = (self.u + self.l * up) * shrink + (e * centred).sum(1)
        if zq is not None:
            mq = torch.maximum(self.mq, zq.amax(1))
            self.lq = self.lq * torch.exp(self.mq - mq) + torch.exp(zq - mq[:, None]).sum(1)
            self.mq = mq
            self.d = self.d * shrink + torch.where(e > 0, e * (z - zq), 0.0).sum(1)
        self.l = self.l * shrink + e.sum(1)
        self.m = m
        if target is not None:
            column = target - first
            inside = (column >= 0) & (column < z.shape[1])
            column = column.clamp(0, z.shape[1] - 1)[:, None]
            self.t = torch.where(inside, z.gather(1, column)[:, 0], self.t)
            if zq is not None:
                self.tq = torch.where(inside, zq.gather(1, column)[:, 0], self.tq)

    def write(self, out: Stats, rows: slice, counted: Tensor | None) -> None:
        """Finish, and write rows of `out`; rows that are not counted become 0."""

        def put(column: Tensor, value: Tensor) -> None:
            column[rows] = value if counted is None else torch.where(counted, value, 0.0)

        log_l, log_lq = torch.log(self.l), torch.log(self.lq)
        put(out.peak, self.m)
        put(out.log_sum, log_l)
        put(out.entropy, log_l - self.u / self.l)
        if out.log_prob.numel():
            put(out.log_prob, self.t - self.m - log_l)
        if out.kl.numel():
            gap = self.d / self.l
            put(out.gap, gap)
            put(out.kl, gap - (self.m - self.mq) - (log_l - log_lq))
        if out.ref_log_prob.numel():
            put(out.ref_log_prob, self.tq - self.mq - log_lq)


def logits_gradient(
    z: Tensor,  # (rows, columns)
    zq: Tensor | None,
    target: Tensor | None,  # (rows,)
    first: int,  # column number of z[:, 0]
    peak: Tensor,  # (rows,) and the three below, as in Stats
    log_sum: Tensor,
    entropy: Tensor,
    gap: Tensor,
    d_log_prob: Tensor | None,  # (rows,) incoming gradients
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
) -> Tensor:
    """d loss / dz of one tile, all incoming gradients in one pass:

    d_log_prob ([j = target] - p)  -  d_entropy p (log p + entropy)  +  d_kl p (z - zq - gap)
    """
    log_p = z - peak[:, None] - log_sum[:, None]
    p = torch.exp(log_p)
    log_p = torch.where(p > 0, log_p, 0.0)
    slope = torch.zeros_like(p)
    if d_log_prob is not None:
        slope -= d_log_prob[:, None]
    if d_entropy is not None:
        slope -= d_entropy[:, None] * (log_p + entropy[:, None])
    if d_kl is not None:
        slope += d_kl[:, None] * torch.where(p > 0, z - zq - gap[:, None], 0.0)
    dz = p * slope
    if d_log_prob is not None:
        column = target - first
        inside = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)[:, None]
        dz.scatter_add_(1, column, torch.where(inside, d_log_prob, 0.0)[:, None])
    return dz


def check_targets(target: Tensor | None, columns: int, ignore_index: int) -> None:
    """Targets are classes or ignore_index. Not checked on a GPU, where it would wait for it."""
    if target is None or target.is_cuda or target.numel() == 0:
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= columns))
    if bool(wrong.any()):
        given = int(target[wrong][0])
        raise ValueError(
            f"target holds {given}; wanted 0 <= target < {columns} or ignore_index {ignore_index}"
        )
