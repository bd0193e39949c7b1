"""Where tokens are as a stage of pruning finds them, and where those that it keeps go."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch

from .token_pruning import Selection
from .token_pruning_device import GridBatch, upload
from .visual_grids import VisualGrid


@dataclass
class Packing:
    """Which of a call's `length` tokens go on, and where. What is packed and unpacked may lie on another device.

    Attributes:
        index: [batch, packed_length] int64, the column that each packed place takes.
        valid: [batch, packed_length] bool, False where a place is padding; None when no place is.
        kept: [batch, length] bool, whether a token goes on.
        merged_places: the (row, packed place) of each kept visual token, ascending; None where nothing is merged into them.
        place: [batch, length] int64, the packed place of each kept token.
    """

    index: torch.LongTensor
    valid: torch.BoolTensor | None
    kept: torch.BoolTensor
    merged_places: tuple[torch.LongTensor, torch.LongTensor] | None = None
    place: torch.LongTensor | None = None

    def following(self, earlier: "Packing") -> "Packing":
        """This packing of what an earlier one packed, as one."""
        index = earlier.index.to(self.index.device).gather(1, self.index)
        goes_on = torch.ones_like(index, dtype=torch.bool) if self.valid is None else self.valid
        kept = torch.zeros_like(earlier.kept, device=index.device)
        return Packing(index, self.valid, kept.scatter(1, index, goes_on))

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch or 1, length, ...] -> [batch, packed_length, ...]"""
        tokens = tokens.expand(self.index.shape[0], *tokens.shape[1:])
        return tokens.gather(1, _over_features(self.index.to(tokens.device), tokens))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[batch, packed_length, ...] -> [batch, length, ...], zero where a token was dropped."""
        if self.valid is not None:
            packed = packed.masked_fill(~_over_features(self.valid.to(packed.device), packed), 0)
        full = packed.new_zeros(packed.shape[0], self.kept.shape[1], *packed.shape[2:])
        return full.scatter(1, _over_features(self.index.to(packed.device), packed), packed)


def _over_features(per_token: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """View [batch, n] as [batch, n, ...] with the trailing dimensions of `tokens`."""
    trailing = tokens.shape[2:]
    return per_token.reshape(*per_token.shape, *(1 for _ in trailing)).expand(*per_token.shape, *trailing)


class PackedGrids:
    """The visual tokens of all grids that a stage finds, one grid after another, and the text that stays: where they are.

    Args:
        grids: ordered by row.
        num_keep: how many tokens of each grid the stage is to keep.
        is_text: [batch, length] bool, on the host.
        device: where the tensors are made; the host does not wait for them.

    Attributes:
        sizes: how many tokens of each grid are there.
        batch, layout: at the first stage, the grids for the selection.
        rows, columns: [T] int64 each, where each token is among the tokens of the call.
        places: [T] int64, where it is in the flattened batch as the stage finds it.
        indices: [T] int64, its place in its grid.
        is_text: [batch, length] bool, on the device.
    """

    def __init__(self, grids: Sequence[VisualGrid], num_keep: Sequence[int], is_text: torch.BoolTensor, device: torch.device):
        self.device, self.grids = device, grids
        required = [len(grid.columns) - 1 if grid.keeps_last else None for grid in grids]
        self.batch = GridBatch([grid.grid for grid in grids], num_keep, device, required)
        self.sizes, self.num_keep = self.batch.sizes, self.batch.num_keep
        rows = torch.cat([torch.full_like(grid.columns, grid.row) for grid in grids])
        columns = torch.cat([grid.columns for grid in grids])
        self.rows, self.columns, self.places = upload(
            torch.stack([rows, columns, rows * is_text.shape[1] + columns]), device
        ).unbind()
        self.is_text = upload(is_text, device)
        self.num_text = is_text.sum(1).tolist()
        self.layout = self.batch.layout  # made now, not in the middle of the layers
        self.indices = self.layout.place

    def after(self, selection: Selection, packing: Packing, num_keep: Sequence[int], device: torch.device) -> "PackedGrids":
        """Those of the next stage, on its device."""
        later, chosen = copy(self), selection.kept
        later.batch = later.layout = None
        later.sizes, later.num_keep = selection.counts, tuple(map(min, num_keep, selection.counts))
        later.rows, later.columns, later.indices = self.rows[chosen], self.columns[chosen], self.indices[chosen]
        later.places = later.rows * packing.index.shape[1] + packing.place.view(-1)[self.places[chosen]]
        later.is_text = packing.pack(self.is_text)
        if packing.valid is not None:
            later.is_text = later.is_text & packing.valid
        later.device = device
        for name in ("rows", "columns", "places", "indices", "is_text"):
            setattr(later, name, getattr(later, name).to(device))
        return later

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens' [T, ...] of [batch, length, ...]."""
        return states.flatten(0, 1).index_select(0, self.places)

    def counts_of_rows(self, counts: Sequence[int] | None = None) -> list[int]:
        """Number of tokens that go on in each row, where each grid keeps `counts`, by default what it is to keep."""
        totals = list(self.num_text)
        for grid, count in zip(self.grids, self.num_keep if counts is None else counts, strict=True):
            totals[grid.row] += count
        return totals

    def packing(
        self, selection: Selection, counts_of_rows: Sequence[int], valid: torch.BoolTensor | None, has_merge: bool
    ) -> Packing:
        """Where the text and the selected tokens go.

        Args:
            counts_of_rows: how many go on in each row.
            valid: see `Packing`.
            has_merge: whether something is merged into the selected tokens.
        """
        chosen = self.places[selection.kept]
        kept = self.is_text.clone()
        kept.view(-1).index_fill_(0, chosen, True)
        length, packed_length = kept.shape[1], max(counts_of_rows)
        # A stable sort takes the dropped tokens to the left and leaves the kept ones in order at the right.
        index = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, length - packed_length :]
        # The last kept token of a row has place packed_length - 1, counted back from there.
        place = packed_length - kept.flip(1).cumsum(1).flip(1)
        merged_places = (self.rows[selection.kept], place.view(-1)[chosen]) if has_merge else None
        valid = None if valid is None else valid.to(index.device)
        return Packing(index, valid, kept, merged_places, place)

    def valid(self, counts_of_rows: Sequence[int]) -> torch.BoolTensor | None:
        """[batch, packed_length] bool, False at the padding in front of shorter rows; None where all are of one length."""
        longest, shortest = max(counts_of_rows), min(counts_of_rows)
        if longest == shortest:
            return None
        return upload(torch.arange(longest) >= longest - torch.tensor(counts_of_rows)[:, None], self.device)
