"""The home of the op schemas, and the answer to "which implementation runs this tensor?".

Schemas live in the `perl_kernels` namespace of the torch dispatcher; implementations register from
Python or from a compiled extension. Each op is one Python body for every device that asks
`backend_of(tensor)` and calls the kernel of that backend, so the choice happens inside the op and
`torch.compile` sees a single node.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ._tuned import config_line

NAMESPACE = "perl_kernels"
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
_DEVICE_OF_BACKEND = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

library = torch.library.Library(NAMESPACE, "DEF")
_chosen = "auto"


def define(schema: str) -> None:
    """Add one op schema, e.g. `scaled(Tensor x, float scale) -> Tensor`."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def define_twins(name: str, *backends: str) -> None:
    """Give op `name` a twin per backend: same arguments, `_cpu`, `_cuda` or `_python` behind."""
    schema = str(getattr(torch.ops.perl_kernels, name).default._schema)
    for backend in backends:
        define(schema.replace(f"{NAMESPACE}::{name}", f"{name}_{backend}"))


def implement(
    name: str,
    body: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    *,
    dispatched_in_cpp: bool = False,
) -> None:
    """Register an op's body (every device), its fake (shapes only) and its autograd formula.

    dispatched_in_cpp: where the CPU extension is there, csrc/cpu/dispatch.cpp owns the op on the
    CPU and its autograd formula on every device; `body` is then also the op `<name>_python`, which
    it calls where the compiled kernel is not wanted.
    """
    library.impl(name, body, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=library)
    if dispatched_in_cpp and not missing["cpu"]:
        define_twins(name, "python")
        library.impl(f"{name}_python", body, "CompositeExplicitAutograd")
    elif backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=library
        )


# ------------------------------------------------------------------------------------------------
# Which backends exist here
# ------------------------------------------------------------------------------------------------


def _load_extension(stem: str) -> str:
    """Load `perl_kernels/<stem>*.so`. Returns "" when loaded, else why it is not there."""
    folder = Path(__file__).parent
    files = sorted([*folder.glob(f"{stem}.*so"), *folder.glob(f"{stem}.*pyd")])
    if not files:
        return "not compiled: install with a C++ compiler, `pip install --no-build-isolation .`"
    stamp = folder / f"{stem}.json"
    built = json.loads(stamp.read_text())["torch"] if stamp.exists() else "unknown"
    if built.split("+")[0] != torch.__version__.split("+")[0]:
        return (
            f"compiled for torch {built}, this is {torch.__version__}: install this package again"
        )
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"{files[0].name} does not load: {error}"
    return ""


def triton_interpreted() -> bool:
    """True when Triton kernels run in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    if not torch.cuda.is_available() and not triton_interpreted():
        return "no GPU is visible to torch"
    return ""


missing: dict[str, str] = {
    "cpu": _load_extension("_cpu"),
    "triton": _why_no_triton(),
    "cuda": _load_extension("_cuda") if torch.cuda.is_available() else "no GPU is visible to torch",
}
_warned = False
# The plain cases of pk.lora_linear, and of pk.lora_mlp without gradient, in one step; None for
# arguments that want checking or casting.
lora_linear_in_cpp: Callable[..., Tensor | tuple[Tensor, ...] | None]
lora_mlp_in_cpp: Callable[..., Tensor | None]
if missing["cpu"]:
    lora_linear_in_cpp = lora_mlp_in_cpp = lambda *arguments: None
else:
    _cpu = importlib.import_module("perl_kernels._cpu")
    lora_linear_in_cpp, lora_mlp_in_cpp = _cpu.lora_linear, _cpu.lora_mlp


def _say_once_what_is_missing(device: str) -> None:
    global _warned
    backend = "cpu" if device == "cpu" else "triton"
    if _warned or not missing[backend]:
        return
    _warned = True
    warnings.warn(
        f"perl_kernels runs plain torch on {device}, slower: {backend} backend: {missing[backend]}",
        stacklevel=3,
    )


class use_backend:  # noqa: N801 - a function to its callers, usable as a context manager
    """Choose the implementation of every op: `pk.use_backend("reference")`.

    Args:
        name: "auto" (the default: compiled C++ on CPU, Triton on GPU, plain torch where neither
            exists), "reference" (plain torch everywhere), "cpu", "triton", or "cuda" (CUDA C++
            where a room has it, Triton in the others). A forced backend holds for tensors on its
            device; others follow "auto".

    Takes effect at once, for all threads; as a context manager it is undone on exit.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: that backend does not exist here; says what is missing.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend is {name!r}; wanted one of {', '.join(BACKENDS)}")
        if missing.get(name):
            raise RuntimeError(f"backend {name!r} is not available: {missing[name]}")
        self._previous = _chosen
        _choose(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _choose(self._previous)


def _choose(name: str) -> None:
    global _chosen
    _chosen = name
    if not missing["cpu"]:
        compiled = backend_of(torch.empty(0, dtype=torch.float32, device="cpu")) == "cpu"
        torch.ops.perl_kernels.use_compiled_on_cpu(compiled)


def backend_of(tensor: Tensor) -> str:
    """The backend that runs an op on this tensor: "reference", "cpu", "triton" or "cuda"."""
    if _chosen == "reference" or tensor.dtype not in _KERNEL_DTYPES:
        return "reference"
    device = tensor.device.type
    if _chosen == "triton" and (device == "cuda" or triton_interpreted()):
        return "triton"
    if _DEVICE_OF_BACKEND.get(_chosen) == device:
        return _chosen
    automatic = {"cpu": "cpu", "cuda": "triton"}.get(device)
    if automatic is not None and not missing[automatic]:
        return automatic
    _say_once_what_is_missing(device)
    return "reference"


def compiled_for(tensor: Tensor) -> bool:
    """True when the compiled CPU kernels run this tensor; torch.compile can trace the question."""
    on_cpu = tensor.device.type == "cpu" and tensor.dtype in _KERNEL_DTYPES
    return on_cpu and _chosen in ("auto", "cpu", "cuda") and not missing["cpu"]


def reaches_kernel(x: Tensor) -> bool:
    """True where an op on x may be called as its compiled CPU twin: nothing learns, nobody listens.

    For one token the dispatcher's way to the kernel costs more than the kernel.
    """
    if type(x) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return compiled_for(x) and torch._C._len_torch_dispatch_stack() == 0


def cpu_capability() -> str:
    """Instruction set the compiled CPU kernels use ("AVX2", "AVX512", ...); "" without them."""
    return "" if missing["cpu"] else torch.ops.perl_kernels.cpu_capability()


def show_config() -> None:
    """Print versions, backends with what is missing, CPU instruction sets, findings of the tuner
    that are in use, and devices."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("perl-kernels", "torch", "triton", "transformers", "peft", "safetensors", "numpy")
    print("versions   " + " · ".join(f"{p} {version_of(p)}" for p in packages))
    print(f"python     {platform.python_version()} on {platform.platform()}")
    print(f"backend    {_chosen} (chosen)")
    for name, why in missing.items():
        print(f"  {name:<8} {why or 'ready'}")
    ours = f", compiled kernels use {cpu_capability()}" if cpu_capability() else ""
    print(
        f"cpu        torch uses {torch.backends.cpu.get_cpu_capability()}{ours}, "
        f"{torch.get_num_threads()} threads"
    )
    if ours:
        print(
            "           no packed copy of a weight is kept between calls; scratch: at most "
            f"{torch.ops.perl_kernels.cpu_scratch_bytes() >> 20} MiB a thread"
        )
        used, kept = (b >> 20 for b in torch.ops.perl_kernels.cpu_pool_bytes())
        print(f"           pool of large tensors: {used} MiB in use, {kept} MiB kept free")
    print(f"tuned      {config_line()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = gpu.total_memory / 2**30
        print(f"cuda:{i}     {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda       no device")


define("cpu_capability() -> str")
define("cpu_scratch_bytes() -> int")
define("use_compiled_on_cpu(bool wanted) -> ()")
define("use_cpu_pool() -> bool")
define("cpu_pool_bytes() -> int[]")  # in use, kept free
define("empty_cpu_pool() -> ()")
