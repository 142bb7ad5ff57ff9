"""A static KV cache for rows of different ages: what continuous batching wants of transformers.

    column  0      first                                end                 columns
    row 0          [ prompt        | answer ............ ]
    row 1                 [ prompt      | answer ....... ]                     came later
    row 2                                   [ prompt     ]                     came just now

Every row writes its newest token into the same column, and a prompt that comes in is laid so that
it ends there. A row's tokens are then consecutive columns, and the distance of two columns is the
distance of two positions: transformers' own masks, causal or with a sliding window, are right for
each row, with no more to know than where its left padding ends.
Memory is allocated once and written in place; attention reads views of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


@dataclass
class Window:
    """The part of the cache that a pass works on."""

    rows: slice
    columns: slice  # what its tokens may see, themselves included
    new: slice | Tensor  # the columns of its tokens; or one column, a tensor (1,)
    past: int | Tensor  # columns that it sees before them


class SlotCache(Cache):
    """Keys and values (rows, heads, columns, head size) of every layer, zero at the start.

    static: the shapes of a pass do not change from one to the next, as a CUDA graph wants it; no
    decision of transformers' then waits for the device.
    """

    def __init__(self, config: Any, rows: int, columns: int, static: bool = False) -> None:
        self.window = Window(slice(0), slice(0), slice(0), 0)
        layers = [
            layer
            if isinstance(layer, DummyLayer)
            else SlotLayer(self.window, rows, columns, layer.is_sliding, static)
            for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=layers)

    @staticmethod
    def holds(config: Any) -> bool:
        """Whether a model's layers remember keys and values, and nothing else."""
        kinds = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
        return all(type(layer) in kinds for layer in DynamicCache(config=config).layers)

    def see(self, rows: slice, columns: slice, new: slice | Tensor, past: int | Tensor) -> None:
        """Sets the window of the next pass; see `Window`."""
        window = self.window
        window.rows, window.columns, window.new, window.past = rows, columns, new, past

    def shift(self, rows: int, columns: slice, by: int) -> None:
        """Moves these columns of the first rows so many to the left."""
        for states in self._states():
            moved = states[:rows, :, columns].clone()  # where it goes may overlap
            states[:rows, :, columns.start - by : columns.stop - by] = moved

    def reorder(self, order: Tensor, columns: slice) -> None:
        """Row i becomes what row order[i] was, in these columns."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        for states in self._states():
            seen = states[:, :, columns]
            seen[moved] = seen[order[moved]]

    def _states(self) -> list[Tensor]:
        layers = [layer for layer in self.layers if layer.keys is not None]
        return [layer.keys for layer in layers] + [layer.values for layer in layers]


class GroupCache(DynamicCache):
    """transformers' own cache, for rows that start together in a model that SlotCache cannot hold.

    It has the same faces as SlotCache, and grows with every pass.
    """

    def see(self, *window: Any) -> None:
        """Its rows see all that it has."""

    def reorder(self, order: Tensor, columns: slice) -> None:
        self.reorder_cache(order)


class SlotLayer(CacheLayerMixin):
    """One layer's memory. A sliding window is the mask's matter: all columns are kept."""

    def __init__(
        self, window: Window, rows: int, columns: int, is_sliding: bool, static: bool
    ) -> None:
        super().__init__()
        self.window, self.rows, self.columns = window, rows, columns
        self.is_sliding, self.is_compileable = is_sliding, static

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.rows, key_states.shape[1], self.columns)
        # zeros: a masked column has weight 0, and 0 times what lies in fresh memory may be NaN
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:  # (n, heads, new, head size) -> (n, heads, seen, head size)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        self.keys[window.rows, :, window.new] = key_states
        self.values[window.rows, :, window.new] = value_states
        seen = window.rows, slice(None), window.columns
        return self.keys[seen], self.values[seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        columns = self.window.columns
        return columns.stop - columns.start, 0

    def get_seq_length(self) -> int | Tensor:
        return self.window.past

    def get_max_length(self) -> int:
        return self.columns
