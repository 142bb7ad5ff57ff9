"""Findings files: what is read, what is refused, what is used. The tuner itself is tested with the
kernels that it times, in interpreter_triton.py."""

import json
import os
import subprocess
import sys

import pytest
import torch

import perl_kernels as pk
from perl_kernels import _tuned

TILE = {"BLOCK_O": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3}
KEY = "y bfloat16 N8 D64 O32 R16"


@pytest.fixture
def file(tmp_path):
    yield tmp_path / "findings.json"
    pk.use_tuned(None)


def write(file, entry, key=KEY):
    file.write_text(json.dumps({"A GPU": {key: entry}}))


def test_a_file_is_taken_and_given_back(file, capsys, monkeypatch):
    monkeypatch.setattr(_tuned, "gpu_name", lambda device: "A GPU")
    write(file, {"route": "decode", "tile": TILE, "microseconds": {"library": 3.5}})
    x = torch.empty(5, 64, dtype=torch.bfloat16)
    assert _tuned.finding("y", x, 32, 9) is None
    pk.use_tuned(file)
    assert _tuned.finding("y", x, 32, 9) == ("decode", TILE)
    assert _tuned.finding("y", x, 33, 9) is None and _tuned.finding("dx", x, 32, 9) is None
    assert _tuned.finding("y", x.half(), 32, 9) is None
    pk.show_config()
    assert f"{file}, of A GPU (1)" in capsys.readouterr().out
    pk.use_tuned(None)
    assert _tuned.finding("y", x, 32, 9) is None
    pk.show_config()
    assert "pinned routes and tiles" in capsys.readouterr().out


def test_sizes_of_a_key():
    """N and R to the next power of two; D and O as they are."""
    assert _tuned.key_of("y", torch.bfloat16, 8, 64, 32, 16) == KEY
    assert _tuned.key_of("y", torch.bfloat16, 5, 64, 32, 9) == KEY
    assert _tuned.key_of("dx", torch.float16, 1, 3, 5, 1) == "dx float16 N1 D3 O5 R1"


@pytest.mark.parametrize(
    "content, why",
    [
        ("{", "is no JSON"),
        ("[]", "is a list; wanted an object"),
        ({"route": "fast"}, "route is 'fast'; wanted one of library, fused, decode"),
        ({}, "route is None; wanted one of"),
        ({"route": "library", "tile": TILE}, "wanted nothing"),
        ({"route": "decode"}, "tile is {}; wanted BLOCK_D, BLOCK_O, num_stages, num_warps"),
        ({"route": "decode", "tile": {**TILE, "BLOCK_X": 1}}, "wanted BLOCK_D, BLOCK_O"),
        ({"route": "decode", "tile": {**TILE, "BLOCK_O": -1}}, "wanted positive whole numbers"),
        ({"route": "decode", "tile": {**TILE, "BLOCK_O": 1.5}}, "wanted positive whole numbers"),
    ],
)
def test_what_is_no_findings_file(file, content, why):
    if isinstance(content, str):
        file.write_text(content)
    else:
        write(file, content)
    with pytest.raises(ValueError, match=f"findings.json.*{why}"):
        pk.use_tuned(file)


def test_a_product_that_is_not_there(file):
    write(file, {"route": "decode", "tile": TILE}, KEY.replace("y ", "dw "))
    with pytest.raises(ValueError, match="a key that begins with y, dx, dx_dropout"):
        pk.use_tuned(file)
    write(file, {"route": "decode", "tile": TILE}, KEY.replace("y ", "dx "))
    with pytest.raises(ValueError, match="route is 'decode'; wanted one of library, fused"):
        pk.use_tuned(file)
    with pytest.raises(FileNotFoundError):
        pk.use_tuned(file.with_name("nothing.json"))


def test_the_environment_names_the_first_file(file):
    write(file, {"route": "decode", "tile": TILE})
    command = [sys.executable, "-c", "import perl_kernels as pk; pk.show_config()"]
    environment = {**os.environ, "PERL_KERNELS_TUNED": str(file)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"tuned      {file}, of A GPU (1)" in run.stdout


def test_what_the_tuner_refuses(file):
    for shapes in ([(1, 2, 3)], [(1, 2, 3, 0)], [(1, 2, 3, 4.0)]):
        with pytest.raises(ValueError, match="positive whole numbers"):
            pk.tune_lora_linear(shapes, file)
    with pytest.raises(TypeError, match="dtype is torch.float64"):
        pk.tune_lora_linear([(1, 2, 3, 4)], file, dtype=torch.float64)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="nothing to tune: no GPU is visible"):
            pk.tune_lora_linear([(1, 2, 3, 4)], file)
    assert not file.exists()


def test_pinned_tiles_say_what_a_finding_says():
    pytest.importorskip("triton")
    from perl_kernels._triton import PINNED

    pinned = [
        (route, tile)
        for (kernel, _), entry in PINNED.items()
        for route in ("fused", "decode")
        if kernel.startswith(f"lora_linear_{route}")
        for tile in entry.values()
    ]
    assert len(pinned) >= 6
    assert all(tile.keys() == _tuned.TILES[route] for route, tile in pinned)
