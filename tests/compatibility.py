"""Writes docs/compatibility.md from the tests: `python tests/compatibility.py`.

A row is a case of a test, so what the table says is what the tests hold; test_compatibility.py
fails where the file is not what this makes.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType

import test_trl
import test_works_with
from _architectures import ARCHITECTURES, build

import perl_kernels as pk

FILE = Path(__file__).parents[1] / "docs" / "compatibility.md"
COMMAND = "python tests/compatibility.py"


def page() -> str:
    return f"""# Compatibility

Made from the tests by `{COMMAND}`.

## Architectures
Tiny random models of transformers. For each, `tests/test_architectures.py` holds logits, loss and
every gradient to 1e-5 of the peft package's in float32: `apply_lora` on all linear modules;
`accelerate_peft`; adapter files from PEFT to here and back, with rank and alpha patterns, rsLoRA,
`layers_to_transform`, trained biases, `modules_to_save`, a regular expression, an adapter on the
embedding and, where there are experts, on their weights (`target_parameters`). The routes are those
of `pk.explain`.

| architecture | linear modules | route |
|---|---|---|
{_rows(_architecture(name) for name in ARCHITECTURES)}

What is no plain linear module (embeddings, expert weights, a forward of its own, modules with
hooks) is computed unfused, with equal results.

## Works with
`tests/test_works_with.py`, with `apply_lora`, with `accelerate_peft` and with unfused layers: equal
to the same model without. `tests/test_trl.py`: equal to PEFT's own layers.

| | test |
|---|---|
{_rows([*_tests(test_works_with), *_tests(test_trl)])}

## Refused by name
`load_adapter`: DoRA and other variants, PiSSA, OLoRA, LoftQ and what else changes the base at the
start, layer replication, trainable tokens, quantised bases, pickles. `accelerate_peft` leaves
variants, quantised bases and several active adapters to PEFT's own code; PiSSA and OLoRA are plain
LoRA there, and fused.
"""


def _rows(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _architecture(name: str) -> tuple[str, str, str]:
    explanation = pk.explain(pk.apply_lora(build(name), pk.LoRAConfig(r=2)))
    routes = Counter(
        "fused" if row.route == "lora_linear" else f"unfused: {row.why}" for row in explanation
    )
    return name, str(len(explanation)), "; ".join(routes)


def _tests(module: ModuleType) -> list[tuple[str, str]]:
    functions = inspect.getmembers(module, inspect.isfunction)
    tests = [(f.__code__.co_firstlineno, f.__doc__, n) for n, f in functions if n[:5] == "test_"]
    return [(doc, f"`{name}`") for _, doc, name in sorted(tests)]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    FILE.write_text(page(), encoding="utf-8")
