"""A pool for torch's CPU tensors, so that a training step takes the memory it counts.

The C library keeps freed blocks in a heap, where a tensor of another size often does not fit: a
step then holds a third more than its tensors need. In the pool (csrc/cpu/pool.cpp) pages of freed
tensors are moved behind each other where no single free block is large enough, as "virtual memory
stitching" does on GPUs (GMLake, arXiv 2401.08156), and are never zeroed again.
"""

from __future__ import annotations

import torch

from ._library import missing

__all__ = ["empty_cpu_pool", "use_cpu_pool"]


def use_cpu_pool() -> bool:
    """Take every CPU tensor of 256 KiB or more from a pool, from now on, in the whole process.

    The pool holds at most what was in use at once, in units of 2 MiB a tensor (64 KiB for tensors
    under 4 MiB), and keeps it until `empty_cpu_pool`. Smaller tensors, and those made before, stay
    where torch has them. Tensors of the pool may be freed by any thread. `show_config()` tells its
    size.

    Returns:
        False where there is no such pool: without the compiled kernels, or not on Linux.
    """
    return not missing["cpu"] and torch.ops.perl_kernels.use_cpu_pool()


def empty_cpu_pool() -> None:
    """Give what the pool holds and no tensor uses back to the system."""
    if not missing["cpu"]:
        torch.ops.perl_kernels.empty_cpu_pool()
