"""The law every kernel is held to: no less exact than plain torch in the same dtype.

`check_law(ours, plain, exact)` holds two computations of one thing against a float64 one:

    ||ours - exact|| / ||exact||  <=  1.1 * ||plain - exact|| / ||exact||  +  a tiny floor

and, so that one wrong element among many cannot hide in a norm, the largest difference of ours is
at most twice the largest of plain torch's plus a few roundings and one of the largest element.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Plain torch may be exact by luck on a tiny tensor. float32 errors are those of the order of
# summation, a couple of roundings; in 16 bits the rounding of the result itself rules.
FLOOR = {
    torch.float32: 2 * torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps / 4,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 4,
}


ROWS = 16  # per-row numbers are held to the law this many at a time, or one of luck would decide


def errors(value: Tensor, exact: Tensor, scale: float | None = None) -> tuple[float, float]:
    """RMS and largest difference, over `scale`: the RMS of exact unless given."""
    assert value.shape == exact.shape, f"{tuple(value.shape)} against {tuple(exact.shape)}"
    if value.numel() == 0:
        return 0.0, 0.0
    difference = value.double() - exact.double()
    assert difference.isfinite().all(), "an element was not written, or the result is not finite"
    scale = scale or exact.double().square().mean().sqrt().item() or 1.0
    return difference.square().mean().sqrt().item() / scale, difference.abs().max().item() / scale


def check_law(
    name: str,
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    scale: float | None = None,
) -> None:
    """Assert the law for one output or gradient; `dtype` is the inputs'.

    `scale` is the size of the terms that were added up, where the result itself is much smaller.
    """
    norm, largest = errors(ours, exact, scale)
    plain_norm, plain_largest = errors(plain, exact, scale)
    assert norm <= 1.1 * plain_norm + FLOOR[dtype], (
        f"{name}: error {norm:.3g} against float64, plain torch has {plain_norm:.3g}"
    )
    # an element is rounded in proportion to itself, and one may be far larger than the RMS
    _, peak = errors(torch.zeros_like(exact), exact, scale)
    assert largest <= 2 * plain_largest + (8 + peak) * FLOOR[dtype], (
        f"{name}: largest difference {largest:.3g} from float64, plain torch {plain_largest:.3g}"
    )


class Law:
    """Collects the errors of many cases; `check` holds their geometric mean to plain torch's.

    For results that are a handful of numbers, where plain torch is exact by luck in some case.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.floor = FLOOR[dtype]
        self.ratios: dict[str, list[float]] = {}

    def add(self, case: int, ours: dict, plain: dict, exact: dict, **scales: float) -> None:
        assert ours.keys() == plain.keys() == exact.keys()
        for name in exact:
            (norm, largest), (plain_norm, plain_largest) = (
                errors(found[name], exact[name], scales.get(name)) for found in (ours, plain)
            )
            said = f"case {case}, {name}: {norm:.3g} ({largest:.3g}) against float64, plain torch "
            said += f"has {plain_norm:.3g} ({plain_largest:.3g})"
            few = exact[name].numel() < 16  # these count in the mean alone
            assert few or norm <= 4 * plain_norm + 4 * self.floor, said
            # an element is rounded in proportion to itself, and one may be far larger than the RMS
            _, peak = errors(torch.zeros_like(exact[name]), exact[name], scales.get(name))
            assert few or largest <= 4 * plain_largest + (16 + peak) * self.floor, said
            kind = name.rstrip("0123456789")
            rounding = self.floor / 4
            self.ratios.setdefault(kind, []).append((norm + rounding) / (plain_norm + rounding))

    def check(self) -> None:
        for name, ratios in self.ratios.items():
            if len(ratios) < ROWS:
                continue  # their mean is luck too
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            assert mean <= 1.1, f"{name}: {mean:.3f} of plain torch's error, {len(ratios)} cases"


def doubled(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values in float64 as fresh leaves, so that a reference runs on exact inputs."""
    return {
        name: t.detach().double().requires_grad_(t.requires_grad)
        if t is not None and t.is_floating_point()
        else t
        for name, t in tensors.items()
    }


def gathered(sample: Callable[[], tuple[dict[str, Tensor], ...]], n: int) -> tuple[dict, ...]:
    """Call `sample`, which draws n rows, until there are ROWS, and lay the results end to end."""
    draws = [sample() for _ in range(-(-ROWS // n))]
    return tuple(
        {name: torch.cat([d[name] for d in of]) for name in of[0]}
        for of in zip(*draws, strict=True)
    )


def check_bound(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], size: Tensor, t: float):
    """The error that the docstrings of linear_log_prob and log_prob give, in nats.

    size (N,): the largest logit a row could have. t: the temperature.
    """
    bound = 2.0**-20 * size.double().clamp(min=1) / min(1.0, t)
    for one, other in zip(found, exact, strict=True):
        worst = ((one.double() - other).abs() / bound).max().item()
        assert worst <= 1, f"{worst:.3g} of the published error"
