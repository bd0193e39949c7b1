"""Rows of a batch in a layer with a recurrent state (linear attention), which must see no padding between a row's tokens.

Such a layer has no keys to mask. A padded input is zeroed, which adds nothing to a state that is zero: padding in front of a
row's first token does no harm. Behind one it does, because the state decays at every step, whatever comes in, and the causal
convolution in front of it counts zeros as neighbours. Rows of a later turn that are not equally long have padding there, be it
the caller's or that of packing; so has a prompt that is padded to the right. There the layer runs on the rows' tokens alone:
without a state, all rows at once with their padding in front; with one, the rows of one length at a time.
"""

from copy import copy
from dataclasses import dataclass

import torch
from transformers import Cache

from .token_pruning_device import upload


@dataclass(frozen=True)
class RowRun:
    """Rows that run together.

    Attributes:
        rows: [r] int64, which rows of the batch; None for all.
        columns: [r, n] int64, which of the call's tokens of each.
        mask: [r, n] bool, False at padding in front; None where none is.
    """

    rows: torch.LongTensor | None
    columns: torch.LongTensor
    mask: torch.BoolTensor | None


def row_runs(is_token: torch.BoolTensor | None, has_past: bool, device: torch.device) -> list[RowRun] | None:
    """How a layer with a recurrent state runs the tokens of a call; None where it can run them as they are.

    Args:
        is_token: [batch, length] bool on the host, False at padding; None where none is.
        has_past: whether the rows have states already.
        device: of the result.
    """
    if is_token is None or is_token.all():
        return None
    counts = is_token.sum(1)
    if not has_past:
        if not (is_token[:, :-1] & ~is_token[:, 1:]).any():
            return None
        longest = int(counts.max())
        columns = is_token.to(torch.uint8).argsort(dim=1, stable=True)[:, is_token.shape[1] - longest :]
        return [RowRun(None, upload(columns, device), upload(is_token.gather(1, columns), device))]
    runs = []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        if count > 0:
            columns = is_token[rows].nonzero()[:, 1].view(len(rows), count)
            runs.append(RowRun(None if len(rows) == len(counts) else upload(rows, device), upload(columns, device), None))
    return runs


class RecurrentRowsMixin:
    """Put in front of the class of a linear attention, whose decoder layer hands keywords on."""

    def __call__(self, hidden_states: torch.Tensor, *args, row_runs: list[RowRun] | None = None, **kwargs):
        if row_runs is None:
            return super().__call__(hidden_states, *args, **kwargs)
        name = "cache" if "cache" in kwargs else "cache_params"  # the latter before transformers 5.24
        cache, outputs = kwargs[name], torch.zeros_like(hidden_states)
        for run in row_runs:
            rows = torch.arange(len(hidden_states), device=hidden_states.device) if run.rows is None else run.rows
            place = rows[:, None], run.columns
            of_run = cache if cache is None or run.rows is None else _rows_of(cache, self.layer_idx, rows)
            inputs = kwargs | {name: of_run, "attention_mask": run.mask}
            found = super().__call__(hidden_states[place], *args, **inputs)
            if run.mask is not None:
                found = found.masked_fill(~run.mask[..., None], 0)
            outputs = outputs.index_put(place, found)
            if of_run is not cache:
                _put_rows(cache.layers[self.layer_idx], rows, of_run.layers[self.layer_idx])
        return outputs


def _rows_of(cache: Cache, layer_idx: int, rows: torch.LongTensor) -> Cache:
    """The cache as if it had these rows alone, as far as layer `layer_idx` is concerned."""
    view, layer = copy(cache), copy(cache.layers[layer_idx])
    view.layers = list(cache.layers)
    view.layers[layer_idx] = layer
    for name in ("conv_states", "recurrent_states"):  # which selecting replaces: the copy needs its own
        setattr(layer, name, dict(getattr(layer, name)))
    layer.reorder_cache(rows)
    return view


def _put_rows(layer, rows: torch.LongTensor, of_rows) -> None:
    """Write the states of some rows back, in place: their address is static for compiled decoding."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        for number, state in getattr(of_rows, name).items():
            if state is not None:
                states[number].index_copy_(0, rows, state)
