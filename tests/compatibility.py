"""Writes docs/compatibility.md and README.md's part of it: `python tests/compatibility.py`.

A row is a case of a test, so what the tables say is what the tests hold; test_compatibility.py
fails where a file is not what this makes. README.md has the first table between MARKERS.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import test_peft
import test_trl
import test_works_with
import torch
import transformers
from _architectures import ARCHITECTURES, build
from peft import LoraConfig, get_peft_model
from test_blocks import kept_bytes
from torch import nn

import perl_kernels as pk

ROOT = Path(__file__).parents[1]
FILE, README = ROOT / "docs" / "compatibility.md", ROOT / "README.md"
COMMAND = "python tests/compatibility.py"
MARKERS = "<!-- compatibility -->\n", "<!-- /compatibility -->\n"


def page() -> str:
    return f"""# Compatibility

Made from the tests by `{COMMAND}`.

## Architectures
Tiny random models of transformers. For each, `tests/test_architectures.py` holds logits, loss and
every gradient to 1e-5 of the peft package's in float32: `apply_lora` on all linear modules;
`accelerate_peft`; adapter files from PEFT to here and back, with rank and alpha patterns, rsLoRA,
`layers_to_transform`, trained biases, `modules_to_save`, a regular expression, an adapter on the
embedding and, where there are experts, on their weights (`target_parameters`). Routes and lean
blocks are those of `pk.explain`.

{architectures()}
What is no plain linear module (embeddings, expert weights, a forward of its own, modules with
hooks) is computed unfused, with equal results. A block that is not proven to have the structure
stays the model's own.

## Kept for backward
What autograd keeps of one more decoder layer of a Llama (F = 8/3 D, LoRA on all linear modules,
attention by `scaled_dot_product_attention`), measured by `saved_tensors_hooks`, each memory counted
once: bytes a token for each of the width D. Adapters are in float32, PEFT's default and ours.

{kept()}
## Works with
`tests/test_works_with.py`, with `apply_lora`, with `accelerate_peft` and with unfused layers: equal
to the same model without. `tests/test_trl.py`, `tests/test_peft.py`: equal to PEFT's own layers.

{_table([("", "test"), *_tests(test_works_with), *_tests(test_trl), *_tests(test_peft)])}
## Refused by name
`load_adapter`: DoRA and other variants, PiSSA, OLoRA, LoftQ and what else changes the base at the
start, layer replication, trainable tokens, quantised bases, pickles. `accelerate_peft` leaves
variants and quantised bases to PEFT's own code; PiSSA and OLoRA are plain LoRA there, and fused.
"""


def readme() -> str:
    """README.md as it is, with the table of architectures between its markers."""
    text = README.read_text(encoding="utf-8")
    start, end = MARKERS
    return re.sub(f"(?s)(?<={start}).*(?={end})", lambda _: f"\n{architectures()}\n", text)


def architectures() -> str:
    """A table with a row for those that have the same routes and blocks."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name in ARCHITECTURES:
        alike.setdefault(_routes_and_blocks(name), []).append(name)
    rows = [(", ".join(names), *found) for found, names in alike.items()]
    return _table([("architectures", "adapted linear modules", "lean blocks"), *rows])


def _routes_and_blocks(name: str) -> tuple[str, str]:
    explanation = pk.explain(pk.apply_lora(build(name), pk.LoRAConfig(r=2)))
    routes = Counter(
        "fused" if row.route in ("lora_linear", "lora_mlp") else f"unfused: {row.why}"
        for row in explanation
    )
    blocks = {"lora_mlp": "gated MLPs", "rms_norm": "RMSNorms"}
    found = {block.route for block in explanation.blocks}
    return "; ".join(routes), " and ".join(v for k, v in blocks.items() if k in found) or "none"


def kept() -> str:
    """A table of the bytes that autograd keeps of a decoder layer."""

    def leanest(model: nn.Module) -> None:
        pk.accelerate_peft(model)
        pk.lean_blocks(model, save="input")

    rows = {
        "PEFT": lambda model: None,
        "`accelerate_peft(model, lean=False)`": lambda m: pk.accelerate_peft(m, lean=False),
        "`accelerate_peft(model)`": pk.accelerate_peft,
        '... and `lean_blocks(model, save="input")`': leanest,
    }
    columns = [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 0.1)]
    figures = [
        (how, *(f"{kept_of_a_layer(change, *column):.1f}" for column in columns))
        for how, change in rows.items()
    ]
    return _table([("", "float32", "bfloat16", "bfloat16, dropout 0.1"), *figures])


def kept_of_a_layer(
    change: Callable[[nn.Module], object], dtype: torch.dtype, dropout: float
) -> float:
    """Bytes that autograd keeps of the third layer, a token and element of the hidden state."""
    tokens, width, kept = torch.full((1, 64), 5), 192, []
    for layers in (2, 3):
        config = transformers.LlamaConfig(
            hidden_size=width, intermediate_size=512, num_hidden_layers=layers,
            num_attention_heads=6, vocab_size=32, use_cache=False,
        )  # fmt: skip
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
        model = get_peft_model(transformers.LlamaForCausalLM(config).to(dtype), lora).train()
        change(model)
        kept.append(kept_bytes(model, input_ids=tokens))
    return (kept[1] - kept[0]) / tokens.numel() / width


def _tests(module: ModuleType) -> list[tuple[str, str]]:
    """Those that say in a docstring what they hold."""
    functions = inspect.getmembers(module, inspect.isfunction)
    tests = [(f.__code__.co_firstlineno, f.__doc__, n) for n, f in functions if n[:5] == "test_"]
    return [(doc, f"`{name}`") for _, doc, name in sorted(tests) if doc]


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *rest = ("| " + " | ".join(row) + " |\n" for row in rows)
    return head + "|---" * len(rows[0]) + "|\n" + "".join(rest)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    FILE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
