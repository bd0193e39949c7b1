"""The maths of VLM-Pruner (arXiv 2512.02700): which visual tokens of one image stay, and what they absorb.

Tensors in, tensors out; this file knows no model. Three stages, after the paper: pivots (max-min distance in key
space), greedy selection under the BSS criterion (buffering for spatial sparsity), and similarity-weighted aggregation
(SWA) of the discarded tokens.

Notable choices
- Cosines are summed in float64 and rounded once to float32, on every device. So equal tokens have equal similarities,
  ties are real ties (the lower index wins), and no TF32, bfloat16 or autocast setting can change what is kept.
- The greedy loop steps over accepting batches only, in NumPy: O(N) work per accepted token, about a microsecond per
  operation.
- Selection is not differentiable and runs under `no_grad`; aggregation is, with constant weights.

It does not batch images, and it does not decide what is an image: call it once per image, tile or video frame group.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


ROWS_PER_CHUNK = 64  # tokens handled at once where a temporary is as wide as the input: about 1 MiB at 4,096 channels
COMFORTABLE = (1e-12, 1e12)  # largest magnitudes whose squares are safe in float32; other inputs are rescaled
SCORE_LIMIT = 1e30  # spatial weights are cut here, so that every score is finite
THRESHOLD_LIMIT = 1e38  # thresholds are cut here: finite in float32, above every score


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
    """What stays and what it absorbs: R kept tokens and N groups' members, all on the device of the hidden states.

    Attributes:
        order: [R] int64, the kept tokens in the order of their selection, pivots first.
        kept: [R] int64, the same tokens ascending.
        members: [N] int64, all tokens grouped by the kept token they belong to (groups in the order of `kept`), the
            kept token first in its group.
        offsets: [R] int64, where each group starts in `members`.
        shares: [N] float32, aligned with `members`: the share of each discarded token in its group's mean. The kept
            token's own entry is 0, or 1 where nothing is aggregated into it.
    """

    order: torch.Tensor
    kept: torch.Tensor
    members: torch.Tensor
    offsets: torch.Tensor
    shares: torch.Tensor


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
        ValueError: shapes, grid or budget do not fit together, or an input holds NaN or infinite values.
    """
    selection = select_tokens(hidden_states, keys, grid, num_keep, parameters)
    return selection.kept, aggregate_tokens(hidden_states, selection, parameters.aggregation_weight)


@torch.no_grad()
def select_tokens(
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    grid: Sequence[int],
    num_keep: int,
    parameters: PruningParameters = PAPER_PARAMETERS,
) -> Selection:
    """Choose the tokens to keep and the groups to aggregate: stages 1 and 2, and the weights of stage 3.

    Arguments and errors are those of `prune_tokens`. Ties go to the lower index everywhere; tokens that are accepted
    together are ordered by score, ascending. The choice is made in float32 whatever the dtype of the inputs.
    """
    _check_arguments(hidden_states, keys, grid, num_keep)
    hidden_states = _rescale("hidden_states", hidden_states).float()
    keys = _rescale("keys", keys)
    pivots = choose_pivots(keys, min(parameters.num_pivots, num_keep)).tolist()
    similarity = channel_cosines(hidden_states, parameters.num_channels).cpu().numpy()
    candidates = _Candidates(similarity, grid_coordinates(grid), parameters.spatial_weight)
    candidates.accept(pivots)
    _accept_rounds(candidates, num_keep, parameters)
    arrays = _group_tokens(similarity, np.array(candidates.accepted))
    return Selection(*(torch.from_numpy(array).to(hidden_states.device) for array in arrays))


def aggregate_tokens(hidden_states: torch.Tensor, selection: Selection, aggregation_weight: float) -> torch.Tensor:
    """Merge the discarded tokens into the kept ones: SWA, VLM-Pruner (arXiv 2512.02700), stage 3.

    For a kept token j with discarded tokens u assigned to it: E_j = sum_u M_uj X_u / sum_u M_uj and
    X_j <- beta X_j + (1 - beta) E_j over all channels. A kept token with nothing assigned stays as it is. The sum is
    taken in float32 for half precision. Deviation: out of place, where the authors write into the layer's output.

    Args:
        hidden_states: [N, D], any floating dtype. Gradients flow to kept and to discarded tokens; weights are constant.
        selection: what `select_tokens` chose.
        aggregation_weight: beta in [0, 1]. 1 returns the kept rows untouched.

    Returns:
        [R, D] in the dtype of `hidden_states`, rows in the order of `selection.kept`.

    Raises:
        ValueError: the number of rows is not that of the selection, or the weight is outside its range.
    """
    if not _is_number(aggregation_weight, 0, 1):
        raise ValueError(f"aggregation_weight must be a number in [0, 1], but is {aggregation_weight!r}.")
    if hidden_states.ndim != 2 or len(hidden_states) != len(selection.members):
        found, expected = tuple(hidden_states.shape), len(selection.members)
        raise ValueError(f"hidden_states must be [N, D] with the selection's N = {expected}, but has shape {found}.")
    if aggregation_weight == 1:
        return hidden_states[selection.kept]
    own_share = selection.shares[selection.offsets]
    weights = selection.shares * (1 - aggregation_weight)
    weights[selection.offsets] = torch.where(own_share > 0, own_share, aggregation_weight)
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    # An embedding bag is a gather, a weighting and a segmented sum in one pass, without a temporary.
    merged = F.embedding_bag(selection.members, wide, selection.offsets, mode="sum", per_sample_weights=weights.to(wide.dtype))
    return merged.to(hidden_states.dtype)


def choose_pivots(keys: torch.Tensor, num_pivots: int) -> torch.Tensor:
    """Pivots spread out in key space: VLM-Pruner (arXiv 2512.02700), stage 1.

    j_1 = argmax_j ||K_j||_1, then the token whose smallest L2 distance to the chosen ones is largest. A token's key is
    the concatenation of its heads. Deviation: a chosen token is never chosen again; the authors' argmax runs over all
    tokens, so that equal keys give duplicate pivots.

    Args:
        keys: [heads, N, head_dim], any floating dtype, finite.
        num_pivots: integer in 1..N.

    Returns:
        [num_pivots] int64, in the order of choice.
    """
    by_token = keys.transpose(0, 1)
    if by_token.is_contiguous():  # as projections leave them: one head as wide as all is the same memory, read faster
        keys = by_token.flatten(1)[None]
    pivot = _per_token(keys, torch.abs).argmax().view(1)
    pivots, nearest = [pivot], keys.new_full(keys.shape[1:2], torch.inf, dtype=torch.float32)
    while len(pivots) < num_pivots:
        last = keys.index_select(1, pivot).float()
        distance = _per_token(keys, lambda part, last=last: (part - last).square_())
        nearest = torch.minimum(nearest, distance).index_fill_(0, pivot, -1)
        pivot = nearest.argmax().view(1)
        pivots.append(pivot)
    return torch.cat(pivots)


def _per_token(keys: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[N] float32: an elementwise function of the keys, summed over each token's values, in chunks of tokens."""
    return torch.cat([function(part.float()).sum(-1).sum(0) for part in keys.split(ROWS_PER_CHUNK, dim=1)])


def channel_cosines(hidden_states: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Cosines M of all pairs of tokens over the channels of largest variance: VLM-Pruner (arXiv 2512.02700), stage 2.

    A row of zeros has cosine 0 with everything. Deviations: one matrix product, where the authors hold an N x N x q
    temporary; in float64, see the top of this file; and of the raw rows, so that orthogonal ones have exactly 0.

    Args:
        hidden_states: [N, D] float32, finite.
        num_channels: channels q to screen, >= 1; all of them where D <= q. Equal variances: the lower channel first.

    Returns:
        [N, N] float32.
    """
    rows = hidden_states
    if num_channels < rows.shape[1]:
        ranked = channel_variances(rows).sort(descending=True, stable=True).indices
        rows = rows.index_select(1, ranked[:num_channels].sort().values)
    exact = torch.float32 if rows.device.type == "mps" else torch.float64  # Metal has no float64, and no TF32 either
    rows = rows.to(exact)
    norms = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(exact).tiny)
    return (rows @ rows.T).div_(norms).div_(norms[:, None]).float()


def channel_variances(hidden_states: torch.Tensor) -> torch.Tensor:
    """N times the variance of each channel over the tokens, [N, D] to [D]; exactly 0 for a constant channel.

    Two passes in chunks that stay in the cache: three times as fast on a CPU as `torch.var`.
    """
    mean = hidden_states.mean(0)
    squares = hidden_states.new_zeros(ROWS_PER_CHUNK, hidden_states.shape[1])
    for part in hidden_states.split(ROWS_PER_CHUNK):
        deviation = part - mean
        squares[: len(part)].addcmul_(deviation, deviation)
    return squares.sum(0).masked_fill_(hidden_states.amax(0) == hidden_states.amin(0), 0)


def grid_coordinates(grid: Sequence[int]) -> np.ndarray:
    """[N, 2] float64 (y, x) of every token of a row-major grid, in units of the grid's diagonal sqrt(H^2 + W^2).

    With them D_ij of VLM-Pruner (arXiv 2512.02700), stage 2, is the plain Euclidean distance. The paper knows planes only; a
    third side is time, of which one slice is as far as one token in the plane (as positions advance in Qwen2-VL).
    """
    positions = np.indices(grid, dtype=np.float64).reshape(len(grid), -1).T
    return positions / np.sqrt(sum(side * side for side in grid))


class _Candidates:
    """Scores of all tokens against the accepted set S: the BSS criterion of VLM-Pruner (arXiv 2512.02700), stage 2.

    score_i(S) = max_{j in S} M_ij (1 + lambda min_{j in S} D_ij). The spatial factor belongs to the candidate, so a
    running maximum and a running minimum suffice: O(N) work per accepted token. Accepted tokens score infinity.

    Args:
        similarity: [N, N] float32, M.
        coordinates: [N, k] float64; D is their Euclidean distance.
        spatial_weight: lambda.
    """

    def __init__(self, similarity: np.ndarray, coordinates: np.ndarray, spatial_weight: float):
        self.similarity = similarity
        self.axes = np.ascontiguousarray(coordinates.T)
        self.spatial_weight = np.float32(min(spatial_weight, SCORE_LIMIT))
        self.accepted: list[int] = []
        self.most_similar = np.full(len(similarity), -np.inf, dtype=np.float32)
        self.nearest = np.full(len(similarity), np.inf)  # squared, and in float64 so that equal distances stay equal
        self.scores = self.most_similar

    def accept(self, tokens: Sequence[int]):
        """Add tokens to S, in this order, and bring every score up to date."""
        self.accepted.extend(tokens)
        np.maximum(self.most_similar, self.similarity[tokens].max(0), out=self.most_similar)
        self.most_similar[tokens] = np.inf
        squared = sum((axis[tokens, None] - axis) ** 2 for axis in self.axes)
        np.minimum(self.nearest, squared.min(0), out=self.nearest)
        distance = np.sqrt(self.nearest).astype(np.float32)
        self.scores = self.most_similar * (1 + self.spatial_weight * distance)


def _accept_rounds(candidates: _Candidates, num_keep: int, parameters: PruningParameters):
    """Rounds of rising thresholds until `num_keep` are accepted: VLM-Pruner (arXiv 2512.02700), stage 2.

    A round walks the candidates by ascending score in batches of B, each scored against the S of that moment, and
    accepts what scores below the threshold. S changes only where a batch accepts, so the walk leaps from one accepting
    batch to the next. Deviation: the authors stop for good when a round accepts nothing; here that is `fill_budget`
    = False.
    """
    batch_size, number = parameters.token_batch, -1
    while len(candidates.accepted) < num_keep:
        number, lowest = number + 1, candidates.scores.min()
        if lowest >= _threshold(number, parameters):
            if not parameters.fill_budget:
                return
            number = _next_accepting_round(number, lowest, parameters)
        threshold = _threshold(number, parameters)
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


def _threshold(number: int, parameters: PruningParameters) -> np.float32:
    """Threshold tau_0 + number * delta tau of a round, exact until the end: repeated addition without its rounding."""
    exact = Fraction(parameters.threshold) + number * Fraction(parameters.threshold_step)
    return np.float32(max(-THRESHOLD_LIMIT, min(float(exact), THRESHOLD_LIMIT)))


def _next_accepting_round(number: int, lowest: np.float32, parameters: PruningParameters) -> int:
    """First round after `number` whose threshold exceeds the lowest score, found by doubling and halving.

    Rounds that accept nothing change nothing but the threshold, and a step may be far smaller than the gap.
    """
    leap = 1
    while _threshold(number + leap, parameters) <= lowest:
        leap *= 2
    rejecting, accepting = number + leap // 2, number + leap
    while accepting - rejecting > 1:
        middle = (rejecting + accepting) // 2
        if _threshold(middle, parameters) <= lowest:
            rejecting = middle
        else:
            accepting = middle
    return accepting


def _group_tokens(similarity: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of `Selection`: each discarded u joins j*(u) = argmax_{j in S} M_uj with weight M_uj, stage 3 (SWA).

    Deviation: negative cosines count as 0; in the authors' code they enter the weights and can make them explode.
    """
    kept = np.sort(order)
    to_kept = similarity[kept]
    group, weight = to_kept.argmax(0), to_kept.max(0).clip(min=0)
    group[kept], weight[kept] = np.arange(len(kept)), 0
    total = np.bincount(group, weight, len(kept))
    weight[kept] = total == 0
    total[total == 0] = 1
    not_kept = np.ones(len(group), dtype=np.int64)
    not_kept[kept] = 0
    members = np.argsort(2 * group + not_kept, kind="stable")
    offsets = np.flatnonzero(not_kept[members] == 0)
    shares = weight[members] / total[group[members]]
    return order, kept, members, offsets, shares.astype(np.float32)


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


def _rescale(name: str, values: torch.Tensor) -> torch.Tensor:
    """`values`, scaled to a largest magnitude of 1 if their squares could leave float32; selection ignores scale.

    One pass over the input is the whole cost unless that magnitude is extreme, zero or not finite.

    Raises:
        ValueError: some values are NaN or infinite; the message counts them.
    """
    smallest, largest = values.aminmax()
    peak = torch.maximum(largest, -smallest).item()
    if COMFORTABLE[0] < peak < COMFORTABLE[1]:
        return values
    num_bad = values.numel() - values.isfinite().sum().item()
    if num_bad:
        raise ValueError(f"{name} must be finite, but {num_bad} of its {values.numel()} values are NaN or infinite.")
    return (values.double() / peak).float() if peak else values
