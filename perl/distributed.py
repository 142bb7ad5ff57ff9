"""One training on several processes: `torchrun --nproc-per-node N -m perl sft|reward|reinforce ...`

    batch, alike everywhere ─ share ─► own rows ─► losses / counts of the whole batch ─► gradients
    ─ sum_gradients ─► clip, update, alike everywhere; rank 0 shows progress and writes files

A step of N processes is the step of one, up to rounding: every process reads all the data in the
same seeded order, and takes each N-th row of a batch, so rows of like length are dealt out evenly.
Nothing wraps the model: gradients gather over micro-batches where they always do, and one message
carries them all. Dropout alone differs, since each process has random numbers of its own.
Without torchrun there is one process, and everything here returns what it was given.

`shard` (FSDP2) is for a model that one process cannot hold: each keeps 1/N of every decoder block
and fetches the rest of a block while it runs. Adapters, an untied LM head and scalar heads stay
whole on every process: adapters are small, and the losses read the head as one weight.

Left out: sending gradients while backward still runs, as DDP does (LoRA's are small); reading a
model's file on one process only.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perl.config import UsageError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_COMMAND = "torchrun --nproc-per-node N -m perl COMMAND ..."
_MESSAGE = 2**24  # elements of one message: 64 MB of float32

_store: dist.Store | None = None


# ---------------------------------------------------------------------------------------------
# The processes


def start(device: str) -> str:
    """Joins the processes that torchrun started; returns the device of this one.

    device: as in `--device`; auto and cuda become the GPU of this process's number on its machine.
    Raises UsageError where torchrun's variables are not all there, or GPUs are too few.
    """
    if not any(name in os.environ for name in _VARIABLES[:3]):
        return device
    numbers = _numbers()
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        device = _gpu(device, numbers["LOCAL_RANK"], numbers["WORLD_SIZE"])
        torch.cuda.set_device(device)
    elif device == "auto":
        device = "cpu"
    if not dist.is_initialized():
        global _store
        _store, rank, size = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
        atexit.register(dist.destroy_process_group)
    return device


def _numbers() -> dict[str, int]:
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        given = next(name for name in _VARIABLES if name in os.environ)
        raise UsageError(
            f"the environment has {given} but no {missing[0]}, so it is not torchrun's; start "
            f"several processes with {_COMMAND}, or unset {given}"
        )
    try:
        numbers = {name: int(os.environ[name]) for name in _VARIABLES[:3]}
    except ValueError as error:
        raise UsageError(f"torchrun's variables want numbers: {error}; use {_COMMAND}") from None
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UsageError(
            f"RANK is {numbers['RANK']} and WORLD_SIZE {numbers['WORLD_SIZE']}; use {_COMMAND}"
        )
    return numbers


def _gpu(device: str, number: int, processes: int) -> str:
    if ":" in device:
        if processes == 1:
            return device
        raise UsageError(
            f"--device is {device} and there are {processes} processes; give cuda, and each takes "
            "the GPU of its number"
        )
    if number >= torch.cuda.device_count():
        raise UsageError(
            f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "give torchrun as many --nproc-per-node, or --device cpu"
        )
    return f"cuda:{number}"


def started() -> bool:
    """Whether this process is one of torchrun's (even the only one)."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process shows progress and writes files."""
    return rank() == 0


def launcher() -> str:
    """How this training was started, for the command that goes on with it."""
    if size() == 1:
        return "python"
    return f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', size())}"


def first_to_fail() -> bool:
    """Whether this process, which fails now, is the one to say why.

    When one process stops the others fail in what they wait for: the first one speaks for all.
    """
    atexit.unregister(dist.destroy_process_group)  # it could wait for the others
    if _store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:  # rank 0 keeps the store, and is gone
        return False


# ---------------------------------------------------------------------------------------------
# What they tell each other


def share(items: Sequence[Any]) -> list[Any]:
    """Every N-th of the items, from this process's rank on; as many for each process.

    Where they do not divide, the first ones come round again; `gathered` leaves those out.
    """
    count = -(-len(items) // size())
    return [items[(rank() + i * size()) % len(items)] for i in range(count)]


def gathered(mine: Sequence[Any], count: int) -> list[Any]:
    """One result for each of `count` items that `share` gave out, in their order, everywhere."""
    if size() == 1:
        return list(mine)
    return [value for values in zip(*_gather(mine), strict=True) for value in values][:count]


def _gather(value: Any) -> list[Any]:
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def each(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    return [value] if size() == 1 else _gather(value)


def total(value: float) -> float:
    """The sum over the processes."""
    if size() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.item()


def mean(value: float) -> float:
    """The mean over the processes; of the batch, where each has as many rows of it."""
    return total(value) / size()


def wait() -> None:
    """Until all processes are here."""
    each(None)


def check_same(what: str, value: Any) -> None:
    """UsageError that names the first process whose value is another than rank 0's."""
    values = each(value)
    other = next((i for i, v in enumerate(values) if v != values[0]), None)
    if other is not None:
        raise UsageError(
            f"process {other} has another {what} than process 0; give all machines the same files"
        )


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums `.grad` over the processes, in place; those of sharded parameters are summed already.

    A parameter that has a gradient on one process gets one on all: an expert of a mixture may have
    seen no token here. One without any keeps None.
    """
    if size() == 1:
        return
    parameters = [p for p in parameters if not is_sharded(p)]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    parameters = [p for p, one in zip(parameters, used.tolist(), strict=True) if one]
    for group in _messages(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, part in zip(group, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)


def _messages(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups of one type, each about as large as a message should be."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        group, elements = [], 0
        for parameter in (p for p in parameters if p.dtype == dtype):
            group.append(parameter)
            elements += parameter.numel()
            if elements >= _MESSAGE:
                yield group
                group, elements = [], 0
        if group:
            yield group


# ---------------------------------------------------------------------------------------------
# Sharding (FSDP2)


def shard(model: nn.Module, device: torch.device, keep: Collection[nn.Parameter]) -> None:
    """Spreads the decoder of a transformers model over the processes, in place, onto the device.

    keep: parameters of it that stay whole on every process. Raises UsageError for a family that
    does not name its blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = model._no_split_modules or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise UsageError(
            f"--shard wants decoder blocks, and {type(model).__name__} names none; leave it out"
        )
    # it asks not to write hidden states in place, and nothing here does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (size(),))
    for module in [*blocks, model.base_model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(keep))
        # gradients are summed: losses are divided by the counts of the whole batch
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo can do no other
    model.to(device)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it: a DTensor, whose import one process is spared."""
    return hasattr(tensor, "full_tensor")


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all of them together, sharded or not."""
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if sharded:
        others = [tensor for tensor in tensors if not is_sharded(tensor)]
        tensors = [*others, nn.utils.get_total_norm(sharded).full_tensor()]
    return nn.utils.get_total_norm(tensors)


def whole_on_first(tensor: Tensor) -> Tensor:
    """A sharded tensor on one piece in rank 0's CPU memory, where files are written from."""
    if not is_sharded(tensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if is_first() else tensor.new_empty(0)


def as_part_of(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """A whole tensor on the parameter's device, cut up as that is; a number stays one."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter) or tensor.dim() == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
