"""VLM-Pruner (arXiv 2512.02700) for all grids of a call at once, on the device that holds the tokens.

The host is never asked for a value: no synchronisation, a number of operations that does not depend on the number of grids,
and nothing that CUDA graph capture forbids. Here it is plain torch, on any device; `token_pruning_triton.py` does the same
in a few launches. The definitions at the top are also those of the CPU path in `token_pruning.py`.

Notable choices
- Rows of all grids lie packed, one grid after another; what is two-dimensional is padded to the longest grid.
- Every sum that decides something is taken in float64 and rounded once to float32, every other step is one correctly rounded
  operation. So neither the order of a sum nor the device changes what is kept, and equal tokens tie exactly.
- Values that are not finite can not be reported without asking the host. They choose arbitrary but valid tokens, and the
  logits, which they reach too, show them.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch


SCORE_LIMIT = 1e30  # spatial weights are cut here, so that every score is finite
NOT_A_SCORE = 1e37  # in place of a score that is NaN: above every other score, below the largest threshold
THRESHOLD_LIMIT = 1e38  # thresholds are cut here: finite in float32, above every score
SMALLEST_STEP = 1e-30  # threshold steps are cut here: below what float32 can tell apart, and their number stays finite
FAR = 2**30  # squared distance to the nearest kept token before there is one


# Definitions, shared with the CPU path


def key_norms(keys: torch.Tensor) -> torch.Tensor:
    """||K_j||_1 of each token, divided by the number of its values: [..., C] to [...] float32."""
    return (torch.linalg.vector_norm(keys, 1, dim=-1, dtype=torch.float64) / keys.shape[-1]).float()


def key_distances(keys: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """||K_j - K_s||_2, divided by the root of the number of values: [..., C] and [..., C] to [...] float32."""
    norms = torch.linalg.vector_norm(keys.float() - others.float(), dim=-1, dtype=torch.float64)
    return (norms / math.sqrt(keys.shape[-1])).float()


def channel_deviations(rows: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each channel over the tokens, which ranks as the variance does; exactly 0 for a constant channel.

    Args:
        rows: [..., N, D].
        is_token: [..., N] bool, False where a row is padding.

    Returns:
        [..., D] float32.
    """
    is_padding = ~is_token[..., None]
    count = is_token.sum(-1, keepdim=True).double()
    rows = rows.float().masked_fill(is_padding, 0)
    mean = (rows.sum(-2, dtype=torch.float64) / count).float()
    from_mean = (rows - mean[..., None, :]).masked_fill_(is_padding, 0)
    return (torch.linalg.vector_norm(from_mean, dim=-2, dtype=torch.float64) / count.sqrt()).float()


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of rows, [..., N, q] to [..., N, N] float32; 0 with a row of zeros.

    One product of the raw rows, so that orthogonal ones have exactly 0.
    """
    rows = rows.double()
    norms = torch.linalg.vector_norm(rows, dim=-1).clamp_min_(torch.finfo(rows.dtype).tiny)
    return (rows @ rows.mT).div_(norms[..., None, :]).div_(norms[..., None]).float()


def group_tokens(order: torch.Tensor, owner: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fields of `Selection` from `kept` to `shares`: SWA weights of VLM-Pruner (arXiv 2512.02700), stage 3.

    Deviation: negative cosines count as 0; in the authors' code they enter the weights and can make them explode.

    Args:
        order: [R] int64, the kept tokens.
        owner: [T] int64, the kept token that each token belongs to, j*(u); a kept one to itself.
        weight: [T] float32, its cosine with it.
    """
    kept = order.sort().values
    is_kept = torch.zeros_like(owner, dtype=torch.bool).index_fill_(0, kept, True)
    group = is_kept.cumsum(0)[owner] - 1
    ranked, members = (2 * group + ~is_kept).sort(stable=True)
    offsets = torch.searchsorted(ranked, 2 * torch.arange(len(kept), device=kept.device))
    weight = weight.double().clamp_min_(0).masked_fill_(is_kept, 0)
    total = torch.zeros_like(kept, dtype=torch.float64).index_add_(0, group, weight)
    alone = total == 0
    shares = (weight / total.masked_fill(alone, 1)[group]).index_copy_(0, kept, alone.double())
    return kept, members, offsets, shares[members].float()


class Thresholds(NamedTuple):
    """The rounds' thresholds tau_0 + number * delta tau, as numbers that float64 and float32 hold without overflow."""

    first: float
    step: float

    @classmethod
    def of(cls, parameters) -> "Thresholds":
        first = max(-THRESHOLD_LIMIT, min(parameters.threshold, THRESHOLD_LIMIT))
        return cls(float(first), float(max(SMALLEST_STEP, min(parameters.threshold_step, THRESHOLD_LIMIT))))

    def at(self, number: float) -> np.float32:
        """The threshold of a round."""
        return np.float32(max(-THRESHOLD_LIMIT, min(number * self.step + self.first, THRESHOLD_LIMIT)))

    def leap(self, number: float, lowest: float) -> tuple[float, np.float32]:
        """The first round from `number` on whose threshold exceeds the lowest score, and that threshold.

        Rounds that accept nothing change nothing but the threshold. Where a step is too small for float32 to show, the
        threshold is the next float32 or so above the score.
        """
        lowest = float(lowest)
        number = max(number, float(np.floor((lowest - self.first) / self.step)))
        for _ in range(2):
            number += self.at(number) <= lowest
        return number, max(self.at(number), np.float32(lowest + max(abs(lowest) * 2**-23, SMALLEST_STEP)))


# The grids of a call


class GridBatch:
    """The grids of a call, whose tokens lie packed one grid after another, and how many tokens of each to keep.

    Args:
        grids: (height, width) or (frames, height, width) of each.
        num_keep: number of tokens to keep of each, from 1 to all of them.
        device: where `layout` is made.
        required: a token of each grid that must be among those kept, or None. Where it is not chosen, it takes the last place.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[int]],
        num_keep: Sequence[int],
        device: torch.device | str = "cpu",
        required: Sequence[int | None] | None = None,
    ):
        self.grids = tuple(tuple(grid) for grid in grids)
        self.num_keep = tuple(num_keep)
        self.required = (None,) * len(self.grids) if required is None else tuple(required)
        self.sizes = tuple(math.prod(grid) for grid in self.grids)
        self.device = torch.device(device)
        self._layout: Layout | None = None

    @property
    def layout(self) -> "Layout":
        """The same as tensors, made once, on the host, and copied at once. The host does not wait for the copy."""
        # No `cached_property`: up to Python 3.11 it holds a lock, and tools that send custom code by value can not pickle one.
        if self._layout is None:
            self._layout = self._make_layout()
        return self._layout

    @layout.setter
    def layout(self, layout: "Layout") -> None:
        self._layout = layout

    def _make_layout(self) -> "Layout":
        sizes, num_keep = np.array(self.sizes), np.array(self.num_keep)
        starts, kept_starts = sizes.cumsum() - sizes, num_keep.cumsum() - num_keep
        sides = np.array([(1, *grid)[-3:] for grid in self.grids])
        diagonals = np.array([diagonal(grid) for grid in self.grids], dtype=np.float64).view(np.int64)
        required = np.array([-1 if token is None else token for token in self.required])
        places = np.arange(sizes.max())
        is_token = places < sizes[:, None]
        image = np.repeat(np.arange(len(sizes)), sizes)
        arrays = (
            np.column_stack([starts, sizes, num_keep, kept_starts, sides, diagonals, required]),
            starts[:, None] + np.where(is_token, places, 0),
            is_token,
            image,
            np.arange(sizes.sum()) - starts[image],
        )
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int64))
        parts = upload(flat, self.device).split([array.size for array in arrays])
        return Layout(*(part.view(array.shape) for part, array in zip(parts, arrays, strict=True)))


class Layout(NamedTuple):
    """A `GridBatch` of G grids and T tokens as int64 tensors.

    Attributes:
        table: [G, 9]: first packed row, number of tokens, number to keep, their first place among all kept tokens, frames,
            height, width, the bits of the diagonal as float64, and the token that must be kept, -1 for none.
        padded: [G, longest], the packed row of each token; after the last token, that of the first.
        is_token: [G, longest], 0 after the last token.
        image: [T], the grid of each packed row.
        place: [T], its place in the grid.
    """

    table: torch.Tensor
    padded: torch.Tensor
    is_token: torch.Tensor
    image: torch.Tensor
    place: torch.Tensor


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`; the host does not wait for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def diagonal(grid: Sequence[int]) -> np.float32:
    """Length of a grid's diagonal in tokens, sqrt(H^2 + W^2)."""
    return np.float32(math.sqrt(sum(side * side for side in grid)))


# Selection


@lru_cache
def triton_stages() -> tuple[Callable, Callable] | None:
    """`select_packed` and `aggregate_packed` of `token_pruning_triton.py`, or None where Triton can not compile."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return None
    try:
        from .token_pruning_triton import aggregate_packed, select_packed
    except ImportError:
        return None
    return select_packed, aggregate_packed


def select_packed_in_torch(hidden_states: torch.Tensor, keys: torch.Tensor, batch: GridBatch, parameters) -> tuple:
    """The fields of `Selection`. Waits for the device only with `fill_budget=False`, where the host must learn the counts.

    Args:
        hidden_states: [T, D], any floating dtype; float64 is read as float32.
        keys: [T, C], any floating dtype, likewise.
        batch: the grids.
        parameters: `PruningParameters`.
    """
    layout, counts = batch.layout, batch.num_keep
    pivots = _choose_pivots(keys, batch, min(parameters.num_pivots, max(counts)))
    deviations = channel_deviations(hidden_states[layout.padded], layout.is_token.bool())
    candidates = _Candidates(screened_cosines(hidden_states, deviations, parameters, layout), batch, parameters)
    candidates.accept(pivots, torch.arange(pivots.shape[1], device=pivots.device) < candidates.num_keep)
    # Each round accepts something, and at least one token after the other pivots.
    for _ in range(max(num_keep - parameters.num_pivots for num_keep in counts)):
        candidates.accept_next_batch()
    order = candidates.order[:-1]
    if not parameters.fill_budget:
        candidates.accept_required()
        order, counts = order[order >= 0], tuple(candidates.num_accepted.flatten().tolist())
    owner, weight = (values[layout.image, layout.place] for values in candidates.owners())
    return counts, order, *group_tokens(order, owner, weight)


def screened_cosines(hidden_states: torch.Tensor, deviations: torch.Tensor, parameters, layout: Layout) -> torch.Tensor:
    """Cosines M over each grid's channels of largest deviation, [G, longest, longest] float32. Equal ones: the lower first.

    Args:
        hidden_states: [T, D].
        deviations: [G, D], of `channel_deviations`.
    """
    rows, num_channels = layout.padded, parameters.num_channels
    if num_channels >= hidden_states.shape[1]:
        return cosines(hidden_states[rows].float())
    channels = deviations.sort(dim=1, descending=True, stable=True).indices[:, :num_channels]
    return cosines(hidden_states[rows[:, :, None], channels[:, None]].float())


def _choose_pivots(keys: torch.Tensor, batch: GridBatch, num_pivots: int) -> torch.Tensor:
    """The pivots of each grid, [G, num_pivots] int64, of which a grid that keeps fewer takes the first."""
    layout = batch.layout
    is_token = layout.is_token.bool()
    excluded = ~is_token
    values, pivots = key_norms(keys)[layout.padded], []
    while True:
        pivot = values.nan_to_num(0).masked_fill(excluded, -1).argmax(1, keepdim=True)
        pivots.append(pivot)
        if len(pivots) == num_pivots:
            return torch.cat(pivots, 1)
        excluded = excluded.scatter(1, pivot, True)
        last = keys[layout.padded.gather(1, pivot)[:, 0]]
        distances = key_distances(keys, last[layout.image])[layout.padded]
        values = distances if len(pivots) == 1 else torch.minimum(values, distances)


def sortable(scores: torch.Tensor) -> torch.Tensor:
    """int64 with the order of float32 `scores`, and below them 32 bits for an index."""
    bits = (scores + 0.0).view(torch.int32)  # the sum makes -0.0 equal to 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32


class _Candidates:
    """The BSS criterion of VLM-Pruner (arXiv 2512.02700), stage 2, for all grids at once; see `_Candidates` of the CPU path.

    Grids are at different rounds and places: each accepting batch is one step, the same for all, and a grid that is full
    accepts nothing. A round's queue is kept as each token's rank in it, and its front as a cursor.

    Args:
        similarity: [G, N, N] float32, M.
        batch: the grids.
        parameters: `PruningParameters`.
    """

    def __init__(self, similarity: torch.Tensor, batch: GridBatch, parameters):
        table, device = batch.layout.table, similarity.device
        self.similarity, self.parameters, self.thresholds = similarity, parameters, Thresholds.of(parameters)
        self.start, self.num_keep, self.kept_start = table[:, 0, None], table[:, 2, None], table[:, 3, None]
        self.tokens = torch.arange(similarity.shape[1], device=device)
        height, width = table[:, 5, None], table[:, 6, None]
        self.axes = (self.tokens // (height * width), self.tokens // width % height, self.tokens % width)
        self.diagonal = table[:, 7:8].view(torch.float64).float()
        self.required = table[:, 8, None] if any(token is not None for token in batch.required) else None
        self.budget = self.num_keep
        self.is_token = batch.layout.is_token.bool()
        self.free = self.is_token
        self.largest_share = max(batch.num_keep)
        self.most_similar = similarity.new_full(similarity.shape[:2], -torch.inf)
        self.nearest = torch.full_like(batch.layout.padded, FAR)
        self.rank = torch.zeros_like(self.nearest)
        self.cursor = torch.full_like(self.start, len(self.tokens))  # at the end: the first step begins a round
        self.number = torch.full_like(self.diagonal, -1, dtype=torch.float64)
        self.threshold = torch.full_like(self.diagonal, -torch.inf)
        self.num_accepted = torch.zeros_like(self.start)
        self.order = torch.full((sum(batch.num_keep) + 1,), -1, device=device)  # the last place takes what is no token

    def accept(self, tokens: torch.Tensor, is_accepted: torch.Tensor) -> None:
        """Add those of `tokens` [G, K] that `is_accepted` [G, K], the first of each row, in this order."""
        number = self.num_accepted + torch.arange(tokens.shape[1], device=tokens.device)
        if self.required is not None:
            is_waiting = self._required_is_free() & ~(is_accepted & (tokens == self.required)).any(1, keepdim=True)
            tokens = torch.where(is_waiting & (number == self.budget - 1), self.required, tokens)
        place = self.kept_start + number
        place = place.masked_fill(~is_accepted, len(self.order) - 1)
        self.order.scatter_(0, place.flatten(), (self.start + tokens).flatten())
        self.num_accepted = self.num_accepted + is_accepted.sum(1, keepdim=True)
        self.free = self.free & ~((tokens[..., None] == self.tokens) & is_accepted[..., None]).any(1)
        is_rejected = ~is_accepted[..., None]
        similarity = self.similarity.gather(1, tokens[..., None].expand(-1, -1, len(self.tokens)))
        self.most_similar = torch.maximum(self.most_similar, similarity.masked_fill(is_rejected, -torch.inf).amax(1))
        squared = sum((axis.gather(1, tokens)[..., None] - axis[:, None]) ** 2 for axis in self.axes)
        self.nearest = torch.minimum(self.nearest, squared.masked_fill(is_rejected, FAR).amin(1))

    def _required_is_free(self) -> torch.BoolTensor:
        """[G, 1], whether a grid has a token that must be kept and is not yet."""
        return self.free.gather(1, self.required.clamp_min(0)) & (self.required >= 0)

    def accept_required(self) -> None:
        """Add what must be kept where a grid stopped before its budget was full."""
        if self.required is not None:
            self.accept(self.required.clamp_min(0), self._required_is_free())

    def scores(self) -> torch.Tensor:
        distance = self.nearest.float().sqrt() / self.diagonal
        scores = self.most_similar * (1 + min(self.parameters.spatial_weight, SCORE_LIMIT) * distance)
        return scores.nan_to_num(NOT_A_SCORE, torch.inf, -torch.inf).masked_fill(~self.free, torch.inf)

    def accept_next_batch(self) -> None:
        """The next batch of each grid's queue that accepts something, in a new round where none is left in this one."""
        scores, size, last = self.scores(), self.parameters.token_batch, len(self.tokens)
        is_waiting = (self.rank >= self.cursor) & (scores < self.threshold)
        self._begin_round(scores, ~is_waiting.any(1, keepdim=True))
        is_waiting = (self.rank >= self.cursor) & (scores < self.threshold) & (self.num_accepted < self.num_keep)
        begin = self.rank.masked_fill(~is_waiting, last).amin(1, keepdim=True) // size * size
        self.cursor = begin + size
        is_in_batch = is_waiting & (self.rank < self.cursor)
        queue = (sortable(scores) + self.tokens).masked_fill(~is_in_batch, torch.iinfo(torch.int64).max)
        tokens = queue.sort(1).indices[:, : min(size, self.largest_share)]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        fitting = torch.minimum(is_in_batch.sum(1, keepdim=True), self.num_keep - self.num_accepted)
        self.accept(tokens, place < fitting)

    def _begin_round(self, scores: torch.Tensor, is_new: torch.Tensor) -> None:
        """Where `is_new` [G, 1]: the next round, or the first one later whose threshold exceeds the lowest score."""
        first, step = self.thresholds
        lowest = scores.amin(1, keepdim=True).double()
        number = self.number + 1
        threshold = torch.maximum(self.threshold, self._threshold(number))
        is_stalled = lowest >= threshold
        if not self.parameters.fill_budget:
            self.num_keep = torch.where(is_new & is_stalled, self.num_accepted, self.num_keep)
        accepting = torch.maximum(number, ((lowest - first) / step).floor())
        for _ in range(2):
            accepting = accepting + (self._threshold(accepting) <= lowest)
        above = (lowest + (lowest.abs() * 2**-23).clamp_min(SMALLEST_STEP)).float()
        number = torch.where(is_stalled, accepting, number)
        threshold = torch.where(is_stalled, torch.maximum(self._threshold(accepting), above), threshold)
        queue = (sortable(scores) + self.tokens).argsort(1)
        rank = torch.empty_like(queue).scatter_(1, queue, self.tokens.expand_as(queue))
        self.number = torch.where(is_new, number, self.number)
        self.threshold = torch.where(is_new, threshold, self.threshold)
        self.rank = torch.where(is_new, rank, self.rank)
        self.cursor = self.cursor.masked_fill(is_new, 0)

    def _threshold(self, number: torch.Tensor) -> torch.Tensor:
        first, step = self.thresholds
        return (number * step + first).clamp(-THRESHOLD_LIMIT, THRESHOLD_LIMIT).float()

    def owners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The packed row that each token belongs to once all are accepted, and its cosine with it, [G, longest] each."""
        last = len(self.tokens)
        is_kept = self.is_token & ~self.free
        kept = self.tokens.expand_as(is_kept).masked_fill(~is_kept, last).sort(1).values[:, : self.largest_share]
        rows = kept.clamp_max(last - 1)[..., None].expand(-1, -1, last)
        similarity = self.similarity.gather(1, rows).masked_fill_((kept == last)[..., None], -torch.inf)
        group = similarity.argmax(1, keepdim=True)
        owner = torch.where(is_kept, self.tokens, kept.gather(1, group[:, 0]))
        return self.start + owner, similarity.gather(1, group)[:, 0]
