"""Counter-based dropout: the mask is a function of (seed, row, column), so it is never stored.

Element (n, d) of an (N, D) input is kept when 16 bits of a Philox-4x32-7 word

    philox(counter=(d // 8, n, 0, 0), key=(seed low 32 bits, seed high 32 bits))[d % 8 // 2]

the lower ones where d is even, the upper ones where it is odd, are at least p * 2**16. So p counts
in steps of 2**-16. Seven rounds pass every test of randomness that the source put them to; ten, and
a whole word for each element, would take three times as long. The C++ and Triton kernels compute
the same words, so forward, backward and a recomputation under activation checkpointing all see the
same mask, on every backend.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUNDS = 7


def new_seed(device: torch.device) -> Tensor:
    """A fresh 63-bit seed, shape (), drawn from torch's generator of that device (no host sync)."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * constant, both operands below 2**32, without int64 overflow."""
    x_low, x_high = x & 0xFFFF, x >> 16
    c_low, c_high = constant & 0xFFFF, constant >> 16
    low = x_low * c_low
    middle = x_high * c_low + (low >> 16)
    other = x_low * c_high + (middle & 0xFFFF)
    high = x_high * c_high + (middle >> 16) + (other >> 16)
    return high, ((other & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(seed: Tensor, rows: int, groups: int) -> Tensor:
    """(rows, groups, 4) int64 in [0, 2**32): the words of counters (group, row, 0, 0)."""
    device = seed.device
    c0 = torch.arange(groups, device=device).expand(rows, groups)
    c1 = torch.arange(rows, device=device)[:, None].expand(rows, groups)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def threshold_of(p: float) -> int:
    """Numbers below it drop their element: p in steps of 2**-16."""
    return int(p * 2**16)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """(rows, columns) bool: True where the element is kept, with probability 1 - p."""
    words = philox_words(seed, rows, (columns + 7) // 8)
    numbers = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)
    return numbers[:, :columns] >= threshold_of(p)


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x with dropped elements zero and kept ones divided by 1 - p. x: (N, D); p = 0: x itself."""
    if p == 0.0:
        return x
    return x * keep_mask(seed, x.shape[0], x.shape[1], p) * (1.0 / (1.0 - p))
