"""Run by test_works_with.py: two gloo processes train as one would, under DDP or fully_shard."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _tiny import difference, stir, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import perl_kernels as pk


def build(checkpointing: bool, by_peft: bool):
    model = tiny_model()
    if by_peft:
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
        pk.accelerate_peft(model)
    else:
        pk.apply_lora(model, pk.LoRAConfig(r=3))
        pk.apply_lora(model, pk.LoRAConfig(r=2, target_modules=["q_proj"]), "other")
    stir(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def losses(model, rows, base_alone) -> list[float]:
    """Three steps on these rows of the batch; then the base alone."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(4)[rows], labels=tokens(4)[rows]).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    with torch.no_grad(), base_alone():
        found.append(model(input_ids=tokens(4)[rows], labels=tokens(4)[rows]).loss)
    return found


def base_of(model):
    return getattr(model, "disable_adapter", lambda: pk.disable_adapters(model))


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check(rank: int, how: str, checkpointing: bool, by_peft: bool) -> None:
    alone = build(checkpointing, by_peft)
    wanted = losses(alone, slice(None), base_of(alone))
    model = whole = build(checkpointing, by_peft)
    if how == "ddp":
        model = DistributedDataParallel(whole)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in whole.get_submodule("base_model.model" if by_peft else "").model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    got = torch.stack(losses(model, slice(2 * rank, 2 * rank + 2), base_of(whole)))
    dist.all_reduce(got)
    assert difference(got / 2, torch.stack(wanted)) < 1e-5
    assert wanted[2] < wanted[0], "nothing was learned"
    start, learned = trained(build(checkpointing, by_peft)), trained(alone)
    for name, parameter in trained(whole).items():
        value = parameter.full_tensor() if how == "fsdp2" else parameter
        change = learned[name] - start[name]
        assert difference(value - start[name], change) < 1e-4, name


def worker(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for how in ("ddp", "fsdp2"):
        check(rank, how, checkpointing=False, by_peft=False)
        check(rank, how, checkpointing=True, by_peft=False)
        check(rank, how, checkpointing=True, by_peft=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "store")
        mp.start_processes(worker, (file,), nprocs=2, start_method="fork")  # imports only once
