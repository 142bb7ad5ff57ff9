"""The thin products of lora_linear by themselves, each bound by reading its one large tensor.

shrink      s = drop(x) a^T
ds and db   ds = scale * dy b and db = scale * dy^T s, in one pass over dy

ours     what "auto" runs: Triton's kernel on a GPU, plain torch elsewhere
cuda     the kernel of csrc/cuda; one of the two goes when a GPU has measured both
library  the same from torch's products, dropout and second pass included
copy     one read and one write of the large tensor
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks._lora import SCALE
from benchmarks._measure import Case, Compared, Contest, Run, measure, normal, without_gradients
from perl_kernels import _dropout, _library

ROOM = "lora_linear_parts"
SHRINK, DS_DB = "shrink", "ds and db"
SHRINK_DROPOUT = f"{SHRINK}, dropout 0.1"


def cases(preset: str) -> list[Case]:
    if preset == "h200":
        return list(_h200())
    if preset == "tiny":
        return [_case(check, 33, 48, 4, "fp32") for check in (SHRINK, SHRINK_DROPOUT, DS_DB)]
    return []  # the CPU's ops have no such parts


def _h200() -> Iterator[Case]:
    more = {"device": "cuda", "graphed": True}  # launches would be most of the time
    for rank in (16, 64, 256):
        yield _case(SHRINK, 8192, 4096, rank, "bf16", **more)
        yield _case(DS_DB, 8192, 4096, rank, "bf16", **more)
    yield _case(SHRINK_DROPOUT, 8192, 4096, 16, "bf16", **more)
    yield _case(DS_DB, 8192, 14336, 16, "bf16", **more)
    yield _case(SHRINK, 64, 4096, 16, "bf16", **more)


def _case(check: str, n: int, width: int, r: int, dtype: str, **more) -> Case:
    dropout_p = 0.1 if "dropout" in check else 0.0
    shape = {"N": n, "O" if check == DS_DB else "D": width, "R": r}
    return Case(ROOM, check, shape, dtype, dropout_p=dropout_p, **more)


def test_lora_linear_parts(case, record):
    record(measure, contest, case)


# ------------------------------------------------------------------------------------------------


def contest(case: Case) -> Contest:
    torch.manual_seed(0)
    n, width, r = case.shape.values()
    large, other = normal(case, n, width), normal(case, n, width)  # x or dy, and where to copy it
    thin = normal(case, r, width, std=width**-0.5)  # a, or b^T
    on_gpu, missing = case.device != "cpu", {}
    if case.check == DS_DB:
        s = normal(case, n, r)
        run, results = _ds_db(large, thin.T.contiguous(), s, on_gpu)
        thin_bytes = 2 * n * r + 2 * r * width  # s, ds; b, db
    else:
        run, results = _shrink(large, thin, case.dropout_p, on_gpu)
        thin_bytes = n * r + r * width  # s; a
    if on_gpu and _library.missing["cuda"]:
        del run["cuda"]
        missing["cuda"] = _library.missing["cuda"]
    run["copy"] = without_gradients(lambda: other.copy_(large))

    def compare() -> list[Compared]:
        names = ("ds", "db") if case.check == DS_DB else ("s",)
        exact, plain = results(torch.float64), results(large.dtype)
        return [
            Compared(f"{name} of {which}", found, p, e)
            for which in ("ours", "cuda")
            if which in run
            for name, found, p, e in zip(names, run[which](), plain, exact, strict=True)
        ]

    size = large.element_size()
    return Contest(
        run=run,
        compare=compare,
        bytes=size * (large.numel() + thin_bytes),
        copied_bytes=2 * size * large.numel(),
        missing=missing,
    )


def _shrink(x: Tensor, a: Tensor, p: float, on_gpu: bool) -> tuple[dict[str, Run], object]:
    seed = _dropout.new_seed(x.device) if p else None

    def results(dtype: torch.dtype) -> tuple[Tensor]:
        return (_dropout.drop(x.to(dtype), p, seed) @ a.to(dtype).T,)

    def library() -> tuple[Tensor]:
        return (torch.nn.functional.dropout(x, p) @ a.T,)

    if not on_gpu:
        return {"ours": lambda: results(x.dtype), "library": library}, results
    from perl_kernels.lora_linear import triton as kernels

    in_cuda = torch.ops.perl_kernels.lora_linear_shrink_cuda
    run = {
        "ours": lambda: (kernels._shrink(x, a, p, seed),),
        "cuda": lambda: (in_cuda(x, a, p, seed),),
        "library": library,
    }
    return run, results


def _ds_db(dy: Tensor, b: Tensor, s: Tensor, on_gpu: bool) -> tuple[dict[str, Run], object]:
    def results(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dy_, b_, s_ = (t.to(dtype) for t in (dy, b, s))
        return SCALE * (dy_ @ b_), SCALE * (dy_.T @ s_)

    def into(kernel) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            ds, db = torch.empty_like(s), torch.empty_like(b)
            kernel(dy, b, s, SCALE, ds, db)
            return ds, db

        return run

    if not on_gpu:
        return {"ours": lambda: results(dy.dtype), "library": lambda: results(dy.dtype)}, results
    from perl_kernels.lora_linear import triton as kernels

    run = {
        "ours": into(kernels._ds_db),
        "cuda": into(torch.ops.perl_kernels.lora_linear_ds_db_cuda),
        "library": lambda: results(dy.dtype),
    }
    return run, results
