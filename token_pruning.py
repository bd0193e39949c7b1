"""The maths of VLM-Pruner (arXiv 2512.02700): which visual tokens of an image stay, and what they absorb.

Tensors in, tensors out; this file knows no model. Three stages, after the paper: pivots (max-min distance in key
space), greedy selection under the BSS criterion (buffering for spatial sparsity), and similarity-weighted aggregation
(SWA) of the discarded tokens. Here are the parameters, the entry points, and the selection on a CPU;
`token_pruning_device.py` holds the definitions and the selection on a CUDA device, which chooses the same.

Notable choices
- Whatever decides is summed in float64 and rounded once to float32, on every device. So equal tokens have equal
  similarities, ties are real ties (the lower index wins), and neither the order of a sum nor any TF32, bfloat16 or
  autocast setting can change what is kept. On the CPU, norms, distances and variances are summed in float32 first, and
  in float64 only where that leaves a doubt.
- The greedy loop of the CPU steps over accepting batches only, in NumPy: O(N) work per accepted token, about a
  microsecond per operation.
- Selection is not differentiable and runs under `no_grad`; aggregation is, with constant weights.

It does not decide what is an image: each image, tile or video frame group is a grid of its own.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .token_pruning_device import (
    FAR,
    SCORE_LIMIT,
    GridBatch,
    Thresholds,
    channel_deviations,
    cosines,
    diagonal,
    group_tokens,
    key_distances,
    key_norms,
    select_packed_in_torch,
    triton_stages,
)


ROWS_PER_CHUNK = 64  # tokens handled at once where a temporary is as wide as the input: about 1 MiB at 4,096 channels
ROUGH_ERROR, ROUGH_MEAN_ERROR = 1e-4, 4e-6  # bounds, with room to spare, on the relative errors of float32 sums and means
COMFORTABLE = (1e-12, 1e12)  # largest magnitudes whose squares are safe in float32; other inputs are rescaled


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _is_number(value: object, low: float, high: float) -> bool:
    """Whether `value` is a real number in [low, high]; false for NaN, infinities beyond the bounds and booleans."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class PruningParameters:
    """Parameters of VLM-Pruner, by default those of the paper (arXiv 2512.02700).

    Every field is validated on construction; a ValueError names the field, its value and the legal range.

    Args:
        num_pivots: number of pivot tokens, kappa in the paper; integer >= 1. Cut to the number of kept tokens.
        num_channels: channels of largest variance over the tokens that enter the similarity, q; integer >= 1. All of
            them where there are fewer.
        threshold: acceptance threshold of the first round on the score (cosine x spatial factor, no unit), tau_0; any
            finite number.
        threshold_step: what the threshold grows by after every round, delta tau; finite and > 0.
        spatial_weight: weight of the distance to the nearest kept token (in grid diagonals) in the score, lambda;
            finite and >= 0. 0 leaves the plain cosine.
        token_batch: candidates that are scored against the same selected set, B; integer >= 1. Smaller follows the
            criterion more closely.
        aggregation_weight: share of a kept token's own hidden state in the merged one, beta; in [0, 1]. 1 means no
            aggregation.
        fill_budget: after a round that accepts nothing, raise the threshold and go on until the budget is filled.
            False stops there, as the authors' code does, and may keep fewer tokens than asked for.
    """

    num_pivots: int = 4
    num_channels: int = 256
    threshold: float = 0.8
    threshold_step: float = 0.1
    spatial_weight: float = 0.5
    token_batch: int = 16
    aggregation_weight: float = 0.3
    fill_budget: bool = True

    def __post_init__(self):
        largest, smallest = sys.float_info.max, math.ulp(0.0)
        for name in ("num_pivots", "num_channels", "token_batch"):
            self._require(name, _is_count(getattr(self, name)), "an integer >= 1")
        self._require("threshold", _is_number(self.threshold, -largest, largest), "a finite number")
        self._require("threshold_step", _is_number(self.threshold_step, smallest, largest), "a finite number > 0")
        self._require("spatial_weight", _is_number(self.spatial_weight, 0, largest), "a finite number >= 0")
        self._require("aggregation_weight", _is_number(self.aggregation_weight, 0, 1), "a number in [0, 1]")
        self._require("fill_budget", isinstance(self.fill_budget, bool), "True or False")

    def _require(self, name: str, legal: bool, legal_range: str):
        if not legal:
            raise ValueError(f"{name} must be {legal_range}, but is {getattr(self, name)!r}.")


PAPER_PARAMETERS = PruningParameters()


class Selection(NamedTuple):
    """What stays of the T packed tokens of one grid or several, and what it absorbs. On the device of the hidden states.

    Indices are places among the packed tokens, grids one after another. Where nothing is absorbed, the last three are None.

    Attributes:
        counts: number of tokens kept of each grid; their sum is R.
        order: [R] int64, the kept tokens of each grid in the order of their selection, pivots first.
        kept: [R] int64, the same tokens ascending.
        members: [T] int64, all tokens grouped by the kept token they belong to (groups in the order of `kept`), the
            kept token first in its group.
        offsets: [R] int64, where each group starts in `members`.
        shares: [T] float32, aligned with `members`: the share of each discarded token in its group's mean. The kept
            token's own entry is 0, or 1 where nothing is aggregated into it.
    """

    counts: tuple[int, ...]
    order: torch.Tensor
    kept: torch.Tensor
    members: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    shares: torch.Tensor | None = None


def num_tokens_to_keep(num_visual: int, ratio: float) -> int:
    """Number R = round(N (1 - r)) of tokens to keep, at least 1 and at most N.

    The product is cleaned of its floating-point noise before it is rounded half to even, so 35 tokens at 0.9 (3.5, but
    3.4999999999999996 in binary) keep 4. The authors round on LLaVA and floor on Qwen2-VL; we round everywhere.

    Args:
        num_visual: visual tokens N; integer >= 1.
        ratio: fraction removed r; in [0, 1).

    Raises:
        ValueError: an argument is outside its range.
    """
    if not _is_count(num_visual):
        raise ValueError(f"num_visual must be an integer >= 1, but is {num_visual!r}.")
    if not (_is_number(ratio, 0, 1) and ratio < 1):
        raise ValueError(f"ratio must be a number in [0, 1), but is {ratio!r}.")
    return min(max(round(round(num_visual * (1 - ratio), 6)), 1), num_visual)


def prune_tokens(
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    grid: Sequence[int],
    num_keep: int,
    parameters: PruningParameters = PAPER_PARAMETERS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `num_keep` tokens of one image and merge the others into them: all three stages of VLM-Pruner.

    Args:
        hidden_states: [N, D], any floating dtype, row-major over the grid: the output of the decoder layer before the
            pruning, X.
        keys: [heads, N, head_dim], any floating dtype: that layer's keys of the same tokens after RoPE, K. Key heads
            need not be repeated.
        grid: (height, width) of the image in tokens, or (frames, height, width) of a video; their product is N.
        num_keep: tokens to keep R; integer in 1..N.
        parameters: the method's parameters.

    Returns:
        kept: [R] int64, indices of the kept tokens, ascending. Fewer than R only if `fill_budget` is False.
        merged: [R, D] in the dtype of `hidden_states`, their hidden states after the aggregation. Differentiable with
            respect to `hidden_states`.

    Raises:
        ValueError: shapes, grid or budget do not fit together, or, outside CUDA, an input holds NaN or infinite values.
    """
    hidden_states = _in_rows(hidden_states)
    selection = select_tokens(hidden_states, keys, grid, num_keep, parameters)
    return selection.kept, aggregate_tokens(hidden_states, selection, parameters.aggregation_weight)


def select_tokens(
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    grid: Sequence[int],
    num_keep: int,
    parameters: PruningParameters = PAPER_PARAMETERS,
    required: int | None = None,
) -> Selection:
    """Choose the tokens to keep and the groups to aggregate: stages 1 and 2, and the weights of stage 3.

    Arguments and errors are those of `prune_tokens`. Ties go to the lower index everywhere; tokens that are accepted
    together are ordered by score, ascending. The choice is made in float32 whatever the dtype of the inputs.

    Args:
        required: a token in 0..N-1 that must be among those kept, because its output is needed. Where it is not chosen, it
            takes the last place in the order of selection. The paper has no such token: there, text follows the image.
    """
    _check_arguments(hidden_states, keys, grid, num_keep)
    if required is not None and not (isinstance(required, Integral) and 0 <= required < len(hidden_states)):
        raise ValueError(f"required must be None or an integer in 0..{len(hidden_states) - 1}, but is {required!r}.")
    batch = GridBatch([grid], [num_keep], hidden_states.device, [required])
    return select_batch(hidden_states, keys, batch, parameters)


@torch.no_grad()
def select_batch(
    hidden_states: torch.Tensor, keys: torch.Tensor, batch: GridBatch, parameters: PruningParameters = PAPER_PARAMETERS
) -> Selection:
    """`select_tokens` for several grids, each on its own.

    On a CUDA device nothing waits for the device, unless `fill_budget` is False, and values that are not finite raise no
    error; elsewhere the selection runs on the CPU.

    Args:
        hidden_states: [T, D], the tokens of all grids, one grid after another.
        keys: [heads, T, head_dim] of the same tokens.
        batch: the grids, and how many tokens of each to keep.
        parameters: the method's parameters.

    Raises:
        ValueError: outside CUDA, if an input holds NaN or infinite values.
    """
    if hidden_states.device.type == "cuda":
        stages = triton_stages()
        select = select_packed_in_torch if stages is None else stages[0]
        return Selection(*select(hidden_states, keys.transpose(0, 1).flatten(1), batch, parameters))
    parts = zip(hidden_states.cpu().split(batch.sizes), keys.cpu().split(batch.sizes, dim=1), strict=True)
    chosen = [
        _select_on_cpu(*part, grid, num_keep, parameters, required)
        for part, grid, num_keep, required in zip(parts, batch.grids, batch.num_keep, batch.required, strict=True)
    ]
    starts = itertools.accumulate(batch.sizes, initial=0)
    chosen = [(order + start, owner + start, weight) for start, (order, owner, weight) in zip(starts, chosen, strict=False)]
    order, owner, weight = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*chosen, strict=True))
    fields = order, *group_tokens(order, owner, weight)
    return Selection(tuple(len(order) for order, _, _ in chosen), *(field.to(hidden_states.device) for field in fields))


@torch.no_grad()
def select_random(
    hidden_states: torch.Tensor, keys: torch.Tensor, batch: GridBatch, parameters: PruningParameters = PAPER_PARAMETERS
) -> Selection:
    """As many tokens of each grid, chosen uniformly at random, and nothing merged: the control that a method has to beat.

    Arguments are those of `select_batch`; only `batch` matters. Draws from the global generator of the device. A
    token that must be kept takes the last place where it is not drawn.
    """
    layout, device = batch.layout, hidden_states.device
    shuffled = torch.rand(len(hidden_states), device=device).argsort()
    shuffled = shuffled[layout.image[shuffled].argsort(stable=True)]  # each grid's tokens together, in random order
    num_keep, start, kept_start = layout.table[:, 2], layout.table[:, 0], layout.table[:, 3]
    total = sum(batch.num_keep)
    image = torch.arange(len(num_keep), device=device).repeat_interleave(num_keep, output_size=total)
    order = shuffled[start[image] + torch.arange(total, device=device) - kept_start[image]]
    if any(token is not None for token in batch.required):
        required = layout.table[:, 8]
        num_drawn = torch.zeros_like(required).index_add_(0, image, (order == start[image] + required[image]).long())
        places = kept_start + num_keep - 1
        order[places] = torch.where((required < 0) | (num_drawn > 0), order[places], start + required)
    return Selection(batch.num_keep, order, order.sort().values)


def aggregate_tokens(hidden_states: torch.Tensor, selection: Selection, aggregation_weight: float) -> torch.Tensor:
    """Merge the discarded tokens into the kept ones: SWA, VLM-Pruner (arXiv 2512.02700), stage 3.

    For a kept token j with discarded tokens u assigned to it: E_j = sum_u M_uj X_u / sum_u M_uj and
    X_j <- beta X_j + (1 - beta) E_j over all channels. A kept token with nothing assigned stays as it is. The sum is
    taken in float32 for half precision. Deviation: out of place, where the authors write into the layer's output.

    Args:
        hidden_states: [N, D], any floating dtype. Gradients flow to kept and to discarded tokens; weights are constant.
        selection: what `select_tokens` or `select_batch` chose.
        aggregation_weight: beta in [0, 1]. 1 returns the kept rows untouched.

    Returns:
        [R, D] in the dtype of `hidden_states`, rows in the order of `selection.kept`.

    Raises:
        ValueError: the number of rows is not that of the selection, or the weight is outside its range.
    """
    if not _is_number(aggregation_weight, 0, 1):
        raise ValueError(f"aggregation_weight must be a number in [0, 1], but is {aggregation_weight!r}.")
    if selection.members is None or aggregation_weight == 1:
        return hidden_states[selection.kept]
    if hidden_states.ndim != 2 or len(hidden_states) != len(selection.members):
        found, expected = tuple(hidden_states.shape), len(selection.members)
        raise ValueError(f"hidden_states must be [N, D] with the selection's N = {expected}, but has shape {found}.")
    needs_graph = torch.is_grad_enabled() and hidden_states.requires_grad
    if hidden_states.is_cuda and not needs_graph and hidden_states.dtype != torch.float64 and triton_stages():
        return triton_stages()[1](hidden_states, selection, aggregation_weight)
    own_share = selection.shares[selection.offsets]
    weights = selection.shares * (1 - aggregation_weight)
    weights[selection.offsets] = torch.where(own_share > 0, own_share, aggregation_weight)
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    # An embedding bag is a gather, a weighting and a segmented sum in one pass, without a temporary.
    merged = F.embedding_bag(selection.members, wide, selection.offsets, mode="sum", per_sample_weights=weights.to(wide.dtype))
    return merged.to(hidden_states.dtype)


# Selection of one grid on the CPU


def _select_on_cpu(
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    grid: Sequence[int],
    num_keep: int,
    parameters: PruningParameters,
    required: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kept tokens in order [R], the kept token that each token belongs to [N], and its cosine with it [N]."""
    hidden_states = _rescale("hidden_states", _in_rows(hidden_states)).float()
    pivots = choose_pivots(_rescale("keys", _in_rows(keys)), min(parameters.num_pivots, num_keep))
    similarity = channel_cosines(hidden_states, parameters.num_channels).numpy()
    candidates = _Candidates(similarity, grid, parameters.spatial_weight, num_keep, required)
    candidates.accept(pivots)
    _accept_rounds(candidates, parameters)
    if required is not None and required not in candidates.accepted:  # a round that took nothing was the last
        candidates.accept([required])
    order = np.array(candidates.accepted)
    kept = np.sort(order)
    to_kept = similarity[kept]
    owner = kept[to_kept.argmax(0)]  # j*(u) = argmax_{j in S} M_uj
    owner[kept] = kept
    return order, owner, to_kept.max(0)


def choose_pivots(keys: torch.Tensor, num_pivots: int) -> list[int]:
    """Pivots spread out in key space: VLM-Pruner (arXiv 2512.02700), stage 1.

    j_1 = argmax_j ||K_j||_1, then the token whose smallest L2 distance to the chosen ones is largest. A token's key is
    the concatenation of its heads. Deviation: a chosen token is never chosen again; the authors' argmax runs over all
    tokens, so that equal keys give duplicate pivots.

    Args:
        keys: [heads, N, head_dim], any floating dtype, finite.
        num_pivots: integer in 1..N.

    Returns:
        `num_pivots` tokens, in the order of choice.
    """
    by_token = keys.transpose(0, 1)
    if by_token.is_contiguous():  # as projections leave them: one head as wide as all is the same memory, read faster
        keys = by_token.flatten(1)[None]

    def rows(tokens):
        return keys[:, tokens].transpose(0, 1).flatten(1)

    def distances(tokens):
        return functools.reduce(torch.minimum, (key_distances(rows(tokens), rows([pivot])) for pivot in pivots))

    pivots = [_first_largest(_per_token(keys, torch.abs), lambda tokens: key_norms(rows(tokens)))]
    nearest = keys.new_full(keys.shape[1:2], torch.inf, dtype=torch.float32)
    while len(pivots) < num_pivots:
        last = keys[:, pivots[-1:]].float()
        distance = _per_token(keys, lambda part, last=last: (part - last).square_())
        nearest = torch.minimum(nearest, distance)
        nearest[pivots[-1]] = -1
        pivots.append(_first_largest(nearest, distances))
    return pivots


def _per_token(keys: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[N] float32: an elementwise function of the keys, summed over each token's values, in chunks of tokens."""
    return torch.cat([function(part.float()).sum(-1).sum(0) for part in keys.split(ROWS_PER_CHUNK, dim=1)])


def _first_largest(rough: torch.Tensor, exact: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """The first of the largest values, by `exact` of those tokens that `rough` [N] does not tell apart for sure."""
    close = (rough >= rough.max() * (1 - ROUGH_ERROR)).nonzero()[:, 0]
    return close[exact(close).argmax() if len(close) > 1 else 0].item()


def channel_cosines(hidden_states: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Cosines M of all pairs of tokens over the channels of largest variance: VLM-Pruner (arXiv 2512.02700), stage 2.

    A row of zeros has cosine 0 with everything. Deviations: one matrix product, where the authors hold an N x N x q
    temporary; in float64, see the top of this file.

    Args:
        hidden_states: [N, D] float32, finite.
        num_channels: channels q to screen, >= 1; all of them where D <= q. Equal variances: the lower channel first.

    Returns:
        [N, N] float32.
    """
    if num_channels < hidden_states.shape[1]:
        hidden_states = hidden_states.index_select(1, screened_channels(hidden_states, num_channels))
    return cosines(hidden_states)


def screened_channels(hidden_states: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The channels of largest `channel_deviations`, ascending, [N, D] to [num_channels].

    A rough variance in float32, three times as fast as `torch.var`, leaves only a few channels to decide in float64.
    """
    variances, error = _rough_variances(hidden_states)
    smallest, largest = variances - error, variances + error
    bounds = [values.topk(num_channels).values[-1] for values in (smallest, largest)]
    is_certain = smallest > bounds[1]
    close = ((largest >= bounds[0]) & ~is_certain).nonzero()[:, 0]
    certain = is_certain.nonzero()[:, 0]
    if len(close) > num_channels - len(certain):
        is_token = torch.ones(len(hidden_states), dtype=torch.bool)
        ranked = channel_deviations(hidden_states[:, close], is_token).sort(descending=True, stable=True).indices
        close = close[ranked[: num_channels - len(certain)]]
    return torch.cat([certain, close]).sort().values


def _rough_variances(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """N times the variance of each channel, [N, D] to [D], and how far it may be off. In chunks that stay in the cache."""
    mean = hidden_states.mean(0)
    squares = hidden_states.new_zeros(ROWS_PER_CHUNK, hidden_states.shape[1])
    for part in hidden_states.split(ROWS_PER_CHUNK):
        deviation = part - mean
        squares[: len(part)].addcmul_(deviation, deviation)
    variances = squares.sum(0)
    return variances, ROUGH_ERROR * variances + len(hidden_states) * (ROUGH_MEAN_ERROR * mean) ** 2


class _Candidates:
    """Scores of all tokens against the accepted set S: the BSS criterion of VLM-Pruner (arXiv 2512.02700), stage 2.

    score_i(S) = max_{j in S} M_ij (1 + lambda min_{j in S} D_ij). The spatial factor belongs to the candidate, so a
    running maximum and a running minimum suffice: O(N) work per accepted token. Accepted tokens score infinity.
    D is the Euclidean distance over the diagonal sqrt(H^2 + W^2). The paper knows planes only; a third side is time, of which
    one slice is as far as one token in the plane (as positions advance in Qwen2-VL).

    Args:
        similarity: [N, N] float32, M.
        grid: its sides, row-major.
        spatial_weight: lambda.
        num_keep: R.
        required: the token that takes the last place in S where it has none before; None for no such token.
    """

    def __init__(
        self, similarity: np.ndarray, grid: Sequence[int], spatial_weight: float, num_keep: int, required: int | None = None
    ):
        self.similarity = similarity
        self.num_keep, self.required = num_keep, required
        self.axes = np.indices(grid, dtype=np.int32).reshape(len(grid), -1)
        self.diagonal = diagonal(grid)
        self.spatial_weight = np.float32(min(spatial_weight, SCORE_LIMIT))
        self.accepted: list[int] = []
        self.most_similar = np.full(len(similarity), -np.inf, dtype=np.float32)
        self.nearest = np.full(len(similarity), FAR, dtype=np.int32)  # squared, so that equal distances are equal
        self.scores = self.most_similar

    def accept(self, tokens: Sequence[int]):
        """Add tokens to S, in this order, and bring every score up to date."""
        is_full = len(self.accepted) + len(tokens) == self.num_keep
        if is_full and self.required is not None and self.required not in (*self.accepted, *tokens):
            tokens = [*tokens[:-1], self.required]
        self.accepted.extend(tokens)
        np.maximum(self.most_similar, self.similarity[tokens].max(0), out=self.most_similar)
        self.most_similar[tokens] = np.inf
        squared = sum((axis[tokens, None] - axis) ** 2 for axis in self.axes)
        np.minimum(self.nearest, squared.min(0), out=self.nearest)
        distance = np.sqrt(self.nearest.astype(np.float32)) / self.diagonal
        self.scores = self.most_similar * (1 + self.spatial_weight * distance)


def _accept_rounds(candidates: _Candidates, parameters: PruningParameters):
    """Rounds of rising thresholds until R tokens are accepted: VLM-Pruner (arXiv 2512.02700), stage 2.

    A round walks the candidates by ascending score in batches of B, each scored against the S of that moment, and
    accepts what scores below the threshold. S changes only where a batch accepts, so the walk leaps from one accepting
    batch to the next. Deviation: the authors stop for good when a round accepts nothing; here that is `fill_budget`
    = False.
    """
    thresholds, number, threshold, batch_size = Thresholds.of(parameters), -1.0, -math.inf, parameters.token_batch
    num_keep = candidates.num_keep
    while len(candidates.accepted) < num_keep:
        number += 1
        threshold, lowest = max(threshold, thresholds.at(number)), candidates.scores.min()
        if lowest >= threshold:
            if not parameters.fill_budget:
                return
            number, threshold = thresholds.leap(number, lowest)
        queue = np.argsort(candidates.scores, kind="stable")  # accepted tokens come last, with infinite scores
        while len(candidates.accepted) < num_keep:
            below = np.flatnonzero(candidates.scores[queue] < threshold)
            if not len(below):
                break
            start = below[0] // batch_size * batch_size
            batch = np.sort(queue[start : start + batch_size])
            batch = batch[np.argsort(candidates.scores[batch], kind="stable")]
            fitting = batch[candidates.scores[batch] < threshold][: num_keep - len(candidates.accepted)]
            candidates.accept(fitting.tolist())
            queue = queue[start + batch_size :]


def _check_arguments(hidden_states: torch.Tensor, keys: torch.Tensor, grid: Sequence[int], num_keep: int):
    shapes = f"hidden_states has shape {tuple(hidden_states.shape)} and keys has shape {tuple(keys.shape)}"
    if hidden_states.ndim != 2 or keys.ndim != 3 or hidden_states.shape[0] != keys.shape[1]:
        raise ValueError(f"hidden_states must be [N, D] and keys [heads, N, head_dim] with the same N, but {shapes}.")
    if not hidden_states.numel() or not keys.numel():
        raise ValueError(f"hidden_states and keys must not be empty, but {shapes}.")
    if not hidden_states.is_floating_point() or not keys.is_floating_point():
        raise ValueError(f"Inputs must be floating point, but have dtypes {hidden_states.dtype} and {keys.dtype}.")
    num_tokens = len(hidden_states)
    if len(grid) not in (2, 3) or not all(_is_count(side) for side in grid):
        raise ValueError(f"grid must be (height, width) or (frames, height, width), integers >= 1, but is {tuple(grid)}.")
    if math.prod(grid) != num_tokens:
        sides = " x ".join(map(str, grid))
        raise ValueError(f"grid {sides} has {math.prod(grid)} cells, but there are {num_tokens} tokens.")
    if not _is_count(num_keep) or num_keep > num_tokens:
        raise ValueError(f"num_keep must be an integer in 1..{num_tokens}, but is {num_keep!r}.")


def _in_rows(values: torch.Tensor) -> torch.Tensor:
    """`values`, copied unless those of the last dimension are neighbors in memory: what is not is read many times slower."""
    return values if values.is_contiguous() or values.stride(-1) == 1 else values.contiguous()


def _rescale(name: str, values: torch.Tensor) -> torch.Tensor:
    """`values`, scaled to a largest magnitude of 1 if their squares could leave float32; selection ignores scale.

    One pass over the input is the whole cost unless that magnitude is extreme, zero or not finite.

    Raises:
        ValueError: some values are NaN or infinite; the message counts them.
    """
    as_stored = values.transpose(0, 1) if values.stride(0) < values.stride(1) else values
    smallest, largest = as_stored.aminmax()
    peak = torch.maximum(largest, -smallest).item()
    if COMFORTABLE[0] < peak < COMFORTABLE[1]:
        return values
    num_bad = values.numel() - values.isfinite().sum().item()
    if num_bad:
        raise ValueError(f"{name} must be finite, but {num_bad} of its {values.numel()} values are NaN or infinite.")
    return (values.double() * 2.0 ** -max(math.frexp(peak)[1], -1000)).float()
