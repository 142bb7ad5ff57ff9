import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import perl_kernels as pk
from perl_kernels import _library
from perl_kernels.lora_linear import reference

ROOT = Path(__file__).parents[1]

# Lower numbers never import higher ones; rooms of one level never import each other.
LEVELS = {
    "_arguments": 0, "_dropout": 0, "_softmax": 0, "_library": 0, "_tuned": 0, "_triton": 1,
    "lora_linear": 2, "lora_mlp": 2, "multi_lora_linear": 2, "rms_norm": 2,
    "head": 2, "log_prob": 2,
    "tune": 3, "cpu_pool": 3, "layers": 3, "adapters": 4, "blocks": 4, "peft": 5, "explain": 6,
}  # fmt: skip


def imported_rooms(path: Path) -> set[str]:
    """Rooms of perl_kernels that a file imports, from its syntax tree."""
    package = list(path.relative_to(ROOT).parent.parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            if module[:1] == ["perl_kernels"]:
                rooms |= {module[1]} if len(module) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            rooms |= {n[1] for n in names if n[0] == "perl_kernels" and len(n) > 1}
    return rooms


def test_imports_go_one_way():
    for path in sorted((ROOT / "perl_kernels").rglob("*.py")):
        room = path.relative_to(ROOT / "perl_kernels").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imported_rooms(path) - {room}:
            assert other in LEVELS, f"{path.name} imports {other}, which has no level here"
            assert LEVELS[other] < LEVELS[room] or LEVELS[other] == LEVELS[room] == 0, (
                f"{path.relative_to(ROOT)} imports {other}"
            )


def test_perl_uses_public_names_only():
    for path in sorted([*(ROOT / "perl").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        private = {r for r in imported_rooms(path) if r.startswith("_")}
        assert not private or path.parts[-2] == "benchmarks", f"{path.name} imports {private}"


def test_public_names():
    for name in pk.__all__:
        assert getattr(pk, name).__doc__, f"pk.{name} has no docstring"


def test_use_backend_chooses_and_restores():
    x = torch.randn(2, 3)
    automatic = _library.backend_of(x)
    with pk.use_backend("reference"):
        assert _library.backend_of(x) == "reference"
    assert _library.backend_of(x) == automatic
    assert _library.backend_of(x.double()) == "reference"
    with pytest.raises(ValueError, match="backend is 'gpu'; wanted one of auto, reference"):
        pk.use_backend("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no GPU is visible"):
            pk.use_backend("triton")


def test_show_config_says_what_is_here(capsys):
    pk.show_config()
    printed = capsys.readouterr().out
    for word in ("torch " + torch.__version__, "triton", "cpu", "cuda", "threads"):
        assert word in printed
    assert _library.missing["cpu"] or "scratch: at most 16 MiB a thread" in printed


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


# An extension compiled for another torch is not loaded.
WITHOUT_EXTENSION = (
    "import json, pathlib, warnings\n"
    "read = pathlib.Path.read_text\n"
    "pathlib.Path.read_text = lambda p, *a, **k: json.dumps({'torch': '1.0'})"
    " if p.name == '_cpu.json' else read(p, *a, **k)\n"
    "import torch, perl_kernels as pk\n"
)
needs_extension = pytest.mark.skipif(
    bool(_library.missing["cpu"]), reason="the CPU kernels are not compiled"
)


@needs_extension
def test_works_without_the_extension_and_says_so_once():
    found = run(
        WITHOUT_EXTENSION
        + "x, w, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)\n"
        "print(pk.lora_linear(x, w, a, b).sum().item())\n"
        "pk.lora_linear(x, w, a, b)\n"
    )
    assert found.stdout.strip() == "48.0", found.stderr
    assert found.stderr.count("perl_kernels runs plain torch on cpu, slower") == 1
    assert "compiled for torch 1.0" in found.stderr


@needs_extension
def test_autograd_without_the_extension():
    """Its formula is in Python then, with it in C++: all gradients, of projections that share x."""
    code = (
        "torch.manual_seed(0)\n"
        "sizes = [(5, 7), (4, 7), (6, 7), (2, 7), (3, 7), (4, 2), (6, 3), (4,), (6,)]\n"
        "x, w0, w1, *leaves = [torch.randn(*size) for size in sizes]\n"
        "a0, a1, b0, b1, c0, c1 = [t.requires_grad_() for t in leaves]\n"
        "x.requires_grad_()\n"
        "y = pk.lora_linear(x, [w0, w1], [a0, a1], [b0, b1], bias=[c0, c1], dropout_p=0.3)\n"
        "total = y[0].square().sum() + y[1].sin().sum()\n"
        "for g in torch.autograd.grad(total, [x, *leaves]): print(g.flatten().tolist())\n"
    )
    python, cpp = run(WITHOUT_EXTENSION + code), run("import torch, perl_kernels as pk\n" + code)
    assert "runs plain torch" in python.stderr and "plain torch" not in cpp.stderr
    gradients = [[ast.literal_eval(line) for line in r.stdout.splitlines()] for r in (python, cpp)]
    assert len(gradients[0]) == 7, python.stderr
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-5, rtol=1e-5)


def test_import_does_not_need_triton():
    found = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, perl_kernels as pk\n"
        "t = torch.zeros(1, dtype=torch.long)\n"
        "print(pk.linear_log_prob(torch.ones(1, 2), torch.ones(4, 2), t).item())"
    )
    assert found.returncode == 0 and found.stdout.startswith("-1.386"), found.stderr


def test_the_plain_case_is_one_step_from_python():
    """Tensor for tensor, tuple for sequences; None for all that Python has to check or cast."""
    if _library.missing["cpu"]:
        pytest.skip(_library.missing["cpu"])
    call = _library.lora_linear_in_cpp
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    a, b = torch.randn(4, 8, requires_grad=True), torch.randn(5, 4)
    expected = reference.lora_linear(x, weight, a, b, bias=bias, scale=0.5)
    y = call(x, weight, a, b, bias, 0.5)
    torch.testing.assert_close(y, expected)
    assert y.requires_grad
    both = call(x[0], [weight, weight], [a, a], (b, b), None, [0.5, 2.0])
    assert isinstance(both, tuple) and [t.shape for t in both] == [(3, 5)] * 2
    plain = (x, weight, a, b, bias, 0.5)
    subclass = type("Other", (torch.Tensor,), {})
    wanting = [
        (0, None), (0, x.bfloat16()), (0, x[..., :7]), (0, torch.tensor(1.0)), (0, x.int()),
        (0, x.as_subclass(subclass)), (1, weight.clone().requires_grad_()), (1, weight[:4]),
        (1, [weight, weight]), (2, a[0]), (2, a.double()), (2, a[:, :7]), (3, b.T), (3, "b"),
        (4, bias[:4]), (4, bias.double()), (4, [bias, None]), (5, 1), (5, None),
    ]  # fmt: skip
    for i, other in wanting:
        assert call(*plain[:i], other, *plain[i + 1 :]) is None, (i, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*plain) is None
