"""Run by test_distributed_trainers.py: each command by two gloo processes together.

    python two_trainers.py FOLDER COMMANDS.json        [{"name": ..., "argv": [...]}, ...]

The processes are forked from one that has loaded a model, so imports happen once. "{rank}" in an
argument becomes the rank; exit codes and what was printed go to FOLDER/NAME-RANK.json.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

from perl import cli
from perl.backbone import Backbone

MODULES = [
    "perl.train_sft", "perl.train_reward", "perl.train_policy", "torch.distributed.fsdp",
    "torch.distributed.tensor",
]  # fmt: skip


def worker(rank: int, folder: str, port: int, name: str, argv: list[str]) -> None:
    torch.set_num_threads(1)
    cli._report = lambda config: None  # figures take longer than these runs
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([argument.replace("{rank}", str(rank)) for argument in argv])
    found = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    Path(folder, f"{name}-{rank}.json").write_text(json.dumps(found))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    folder, commands = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    for module in MODULES:
        importlib.import_module(module)
    Backbone.load(Path(folder, "base"))
    for command in commands:
        arguments = (folder, free_port(), command["name"], command["argv"])
        mp.start_processes(worker, arguments, nprocs=2, start_method="fork")
