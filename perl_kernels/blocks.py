"""Blocks around adapted layers that keep less for backward than the model's own code does.

    pk.apply_lora(model, config)        # or accelerate_peft(model): both make the blocks lean
    pk.lean_blocks(model, save="input")         # leaner still

Gated MLP, down(act(gate(x)) * up(x)): becomes one `pk.lora_mlp`. Autograd keeps 4 F elements a
token of it, lora_mlp 2 F, or none with save="input"; F is 2.5 to 4 times the width D.

RMSNorm: becomes `pk.rms_norm`. Autograd keeps x in float32, whatever x is; rms_norm keeps x as it
came, which saves 2 D bytes a token and norm in 16-bit models, and goes over it once.

What a decoder layer of a Llama keeps then, in elements of D a token, with F = 8/3 D: 4 for q, k, v
and what attention makes of them, which is o's input too; 1 for the input of q, k and v and 1 for
that of gate and up; 2 for the inputs of two norms; 5.3 in the MLP. 13.3 in place of 18.7, or of
20.7 in 16 bits; with save="input" 8.

Blocks are found by structure, whatever the model and its modules are called, and the structure is
proven: the module's own forward, with small random parameters in the place of its own, has to give
what the formula gives, in training and in eval mode. What is not proven stays as it is. Parameters,
names, hooks and state_dict stay too; only the module's class changes, to a subclass of its own,
until `unload_lora`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import dimensions_of, has_hooks, is_linear, is_wrapper
from .lora_mlp import ACTIVATIONS, SAVE, LoRAProjection, lora_mlp
from .lora_mlp.reference import activate
from .rms_norm import CASTING_MODES, reference, rms_norm

__all__ = ["lean_blocks"]


class GatedMLP(NamedTuple):
    """How a module is down(act(gate(x)) * up(x)): the names of its three children."""

    gate: str
    up: str
    down: str
    activation: str


class RMSNorm(NamedTuple):
    """How a module is an RMSNorm: the keywords of `pk.rms_norm`."""

    eps: float
    offset: float
    casting_mode: str


def lean_blocks(model: nn.Module, *, save: str | None = None) -> list[str]:
    """Let the gated MLPs and RMSNorms of `model` keep less for backward, in place.

    `apply_lora`, `load_adapter` and `accelerate_peft` do it by default; call it to change `save`.

    Results are the same up to rounding, except that with adapter dropout gate and up share one
    mask, as projections of one `lora_linear` do. An MLP computes by its own code where it has a
    child with hooks or another forward, as long as an adapter of it is disabled, merged, different
    from row to row or not fused, and on a GPU in eval mode without gradient; a norm where its
    weight is trained, or of another type than x. `pk.explain` lists the blocks.

    Args:
        save: what an MLP keeps beside its input: "gate_up", 2 F elements a token; "input", nothing,
            and gate and up are computed again in backward, a third more work for the block. None:
            as it does already, and "gate_up" at first.

    Returns:
        The names of the blocks, in the model's order; empty where nothing has the structure.

    Raises:
        ValueError: save is neither.
    """
    if save is not None and save not in SAVE:
        raise ValueError(f"save is {save!r}; wanted one of {', '.join(SAVE)}")
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (LeanGatedMLP, LeanRMSNorm)) and not _make_lean(module):
            continue
        if isinstance(module, LeanGatedMLP) and save is not None:
            module.lean_save = save
        found.append(name)
    return found


def plain_blocks(model: nn.Module) -> None:
    """Take `lean_blocks` back: every block is of its own class again."""
    for module in model.modules():
        if isinstance(module, LeanBlock):
            module.__class__ = module.lean_of
            del module.lean_structure
            vars(module).pop("lean_save", None)


def _make_lean(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return False
    for structure_of, lean in ((gated_mlp_of, LeanGatedMLP), (rms_norm_of, LeanRMSNorm)):
        structure = structure_of(module)
        if structure is not None:
            module.__class__ = _lean(lean, type(module))
            module.lean_structure = structure
            return True
    return False


@functools.cache
def _lean(lean: type[LeanBlock], kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Lean{kind.__name__}", (lean, kind), {"__module__": __name__, "lean_of": kind})


def _empty(lean: type[LeanBlock], kind: type[nn.Module]) -> nn.Module:
    made = _lean(lean, kind)
    return made.__new__(made)


class LeanBlock:
    """What lean blocks share: they are copied and pickled by the classes that they are made of.

    Names begin with lean, so that they hide none of the block's own.
    """

    lean_of: type[nn.Module]  # its own class
    lean_structure: NamedTuple

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty, type(self).__bases__, *state


class LeanGatedMLP(LeanBlock):
    """The forward of a gated MLP by one op, where its three layers are what that op computes."""

    lean_save = "gate_up"

    def forward(self, x: Tensor) -> Tensor:
        # In training always: with dropout a reentrant checkpoint has to draw at first, without
        # gradient, the masks that it draws again. Decode steps of a GPU keep its own code.
        wanted = torch.is_grad_enabled() or self.training or x.is_cpu
        parts = self.lean_projections(x.dtype) if wanted else None
        if parts is None:
            return super().forward(x)
        return lora_mlp(
            x,
            *(projection for projection, _ in parts),
            activation=self.lean_structure.activation,
            dropout_p=parts[0][1],
            save=self.lean_save,
        )

    def lean_projections(self, dtype: torch.dtype) -> list[tuple[LoRAProjection, float]] | None:
        """Gate, up and down with their dropout for an x of that dtype; None: not for the op."""
        layers = [getattr(self, name) for name in self.lean_structure[:3]]
        if not all(hasattr(type(layer), "as_projection") for layer in layers):
            return None  # of the type: a wrapper may pass on its module's attributes
        if any(has_hooks(child) or "forward" in vars(child) for child in self.children()):
            return None
        parts = [layer.as_projection(dtype) for layer in layers]
        if None in parts or len({dropout_p for _, dropout_p in parts}) > 1:
            return None
        return parts


class LeanRMSNorm(LeanBlock):
    """The forward of an RMSNorm that keeps its input as it came."""

    def forward(self, x: Tensor) -> Tensor:
        if self.why_not_lean(x.dtype):
            return super().forward(x)
        return rms_norm(x, self.weight, **self.lean_structure._asdict())

    def why_not_lean(self, dtype: torch.dtype) -> str:
        """Why an x of that dtype goes through the module's own forward; "" where it does not."""
        weight = self.weight
        if weight.requires_grad:
            return "its weight is trained"
        if is_wrapper(weight):
            return f"its weight is a {type(weight).__name__}"
        if dtype != weight.dtype or dtype == torch.float64:
            return f"its weight is {weight.dtype} and x is {dtype}"
        return ""


# ------------------------------------------------------------------------------------------------
# The structure, and its proof
# ------------------------------------------------------------------------------------------------


def gated_mlp_of(module: nn.Module) -> GatedMLP | None:
    """The structure of a module whose own forward is proven to be a gated MLP; else None."""
    layers = {name: _base(child) for name, child in module.named_children()}
    linear = {name: layer for name, layer in layers.items() if is_linear(layer)}
    others = [child for name, child in module.named_children() if name not in linear]
    if len(linear) != 3 or "forward" in vars(module) or any(map(_does_more, others)):
        return None
    return next((s for s in _candidates(linear) if _is_proven(module, s)), None)


def _base(module: nn.Module) -> nn.Module:
    """The layer under an adapter, ours or PEFT's."""
    return getattr(module, "base_layer", module)


def _does_more(module: nn.Module) -> bool:
    """Whether a child could do what a proof on random numbers does not show."""
    return any(
        isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules()
    ) or any(True for _ in module.parameters())


def _candidates(linear: dict[str, nn.Module]) -> Iterator[GatedMLP]:
    for gate, up, down in permutations(linear):
        shapes = [dimensions_of(linear[name])[1:] for name in (gate, up, down)]  # (O, D)
        if shapes[0] == shapes[1] and shapes[0][0] == shapes[2][1]:
            yield from (GatedMLP(gate, up, down, activation) for activation in ACTIVATIONS)


def _is_proven(module: nn.Module, structure: GatedMLP) -> bool:
    generator = torch.Generator().manual_seed(0)

    def small(ins: int, outs: int) -> nn.Linear:
        layer = nn.Linear(ins, outs, dtype=torch.float64, device="cpu")
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
        return layer

    *names, activation = structure
    layers = gate, up, down = small(4, 6), small(4, 6), small(6, 5)
    probe = copy.copy(module)  # its own dictionaries, so that the module's stay as they are
    probe._modules = dict(module._modules) | dict(zip(names, layers, strict=True))
    probe._parameters, probe._buffers = {}, {}
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64, device="cpu")
    x = torch.cat([x, 100 * x])[None]  # the large ones meet any limit
    with torch.no_grad():
        expected = down(activate(gate(x), activation) * up(x))
        for training in (True, False):
            probe.training = training
            if not _gives(type(module), probe, x, expected, rtol=1e-9, atol=1e-9):
                return False
    return True


def _gives(
    kind: type[nn.Module], probe: nn.Module, x: Tensor, expected: Tensor, **tolerance: float
) -> bool:
    """Whether the forward of `kind` makes of x what is expected, in its type and shape."""
    try:
        y = kind.forward(probe, x)
    except Exception:  # whatever it wants that the structure does not have
        return False
    alike = isinstance(y, Tensor) and y.dtype == expected.dtype and y.shape == expected.shape
    return alike and torch.allclose(y, expected, **tolerance)


def rms_norm_of(module: nn.Module) -> RMSNorm | None:
    """The structure of a module whose own forward is proven to be an RMSNorm; else None."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.ndim != 1 or "forward" in vars(module):
        return None
    numbers = {value for value in vars(module).values() if isinstance(value, float)}
    candidates = (
        RMSNorm(eps, offset, casting_mode)
        for eps in sorted(numbers)
        for offset in (0.0, 1.0)
        for casting_mode in CASTING_MODES
    )
    return next((s for s in candidates if _is_proven_norm(module, len(weight), s)), None)


def _is_proven_norm(module: nn.Module, features: int, structure: RMSNorm) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, features, generator=generator, device="cpu")
    x = torch.cat([x, 1e-3 * x])  # the small ones show eps
    weight = torch.randn(features, generator=generator, device="cpu")
    probe = copy.copy(module)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            probe._parameters = {"weight": nn.Parameter(weight.to(dtype))}
            expected = reference.rms_norm(x.to(dtype), weight.to(dtype), **structure._asdict())
            # in 16 bits: equal
            if not _gives(type(module), probe, x.to(dtype), expected, rtol=1e-6, atol=0.0):
                return False
    return True
