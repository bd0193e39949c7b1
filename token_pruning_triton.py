"""The stages of `token_pruning_device.py` as Triton kernels: the same choice in about twenty launches.

Pivots take one launch each, in which every token is a program; the deviations of the channels take one, the whole greedy
selection of a grid is one program, and merging is one launch. The cosines between them are torch's. No kernel trusts its
input to be finite: every loop ends and every index is that of a token.

Multiplications and additions must not be fused (`enable_fp_fusion=False`): the CPU rounds after each.
"""

import torch

from .token_pruning_device import (
    FAR,
    NOT_A_SCORE,
    SCORE_LIMIT,
    SMALLEST_STEP,
    THRESHOLD_LIMIT,
    GridBatch,
    Thresholds,
    screened_cosines,
)


try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError("Triton is not installed; token_pruning_device.py does without it.") from None


FAR, NOT_A_SCORE = tl.constexpr(FAR), tl.constexpr(NOT_A_SCORE)
SMALLEST_STEP, THRESHOLD_LIMIT = tl.constexpr(SMALLEST_STEP), tl.constexpr(THRESHOLD_LIMIT)
TABLE_WIDTH = tl.constexpr(9)
EPSILON = tl.constexpr(2**-23)
LAST = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(2**63 - 1)


# Pivots and channels


@triton.jit
def _pivot_of(cell):
    """The token of a pivot's cell, which holds the bits of the largest value and, below them, `LAST` less the token.

    A grid of fewer tokens than pivots leaves some cells 0. No more of its pivots are used than it has tokens.
    """
    return tl.where(cell == 0, 0, LAST - (cell & LAST).to(tl.int32))


@triton.jit
def _pivot_kernel(
    keys, stride, width, table, image_of, place_of, nearest, cells, num_images, number, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """One token's L1 norm, or its distance to the nearest pivot. The largest of a grid stays in its cell of this pivot."""
    row = tl.program_id(0).to(tl.int64)
    image, place = tl.load(image_of + row), tl.load(place_of + row)
    columns, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float64)
    if FIRST:
        for begin in range(0, width, BLOCK):
            part = tl.load(keys + row * stride + begin + columns, mask=begin + columns < width, other=0)
            total += tl.abs(part.to(tl.float32)).to(tl.float64)
        value = (tl.sum(total) / width).to(tl.float32)
        value = tl.where(value == value, value, 0.0)
    else:
        pivot = _pivot_of(tl.load(cells + (number - 1) * num_images + image))
        other = tl.load(table + image * TABLE_WIDTH) + pivot
        for begin in range(0, width, BLOCK):
            part = tl.load(keys + row * stride + begin + columns, mask=begin + columns < width, other=0)
            last = tl.load(keys + other * stride + begin + columns, mask=begin + columns < width, other=0)
            difference = (part.to(tl.float32) - last.to(tl.float32)).to(tl.float64)
            total += difference * difference
        value = tl.sqrt(tl.sum(total) / width).to(tl.float32)
        value = tl.where(value == value, value, 0.0)
        if number > 1:
            value = tl.minimum(value, tl.load(nearest + row))
        value = tl.where(place == pivot, -1.0, value)
        tl.store(nearest + row, value)
    if value >= 0:
        bits = value.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.atomic_max(cells + number * num_images + image, bits | (LAST - place))


@triton.jit
def _deviation_kernel(rows, stride, width, table, deviations, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Standard deviation of a block of channels over the tokens of one grid."""
    image, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, num_tokens = tl.load(table + image * TABLE_WIDTH), tl.load(table + image * TABLE_WIDTH + 1)
    total, squares = tl.zeros([ROWS, BLOCK], tl.float64), tl.zeros([ROWS, BLOCK], tl.float64)
    for begin in range(0, num_tokens, ROWS):
        places = begin + tl.arange(0, ROWS)
        mask = (places < num_tokens)[:, None] & (columns < width)[None, :]
        total += tl.load(rows + (start + places)[:, None] * stride + columns[None, :], mask=mask, other=0).to(tl.float64)
    mean = (tl.sum(total, 0) / num_tokens).to(tl.float32)
    for begin in range(0, num_tokens, ROWS):
        places = begin + tl.arange(0, ROWS)
        mask = (places < num_tokens)[:, None] & (columns < width)[None, :]
        part = tl.load(rows + (start + places)[:, None] * stride + columns[None, :], mask=mask, other=0).to(tl.float32)
        difference = tl.where(mask, part - mean[None, :], 0.0).to(tl.float64)
        squares += difference * difference
    deviation = tl.sqrt(tl.sum(squares, 0) / num_tokens).to(tl.float32)
    tl.store(deviations + image * width + columns, deviation, mask=columns < width)


# Greedy selection


@triton.jit
def _threshold(number, first, step):
    return tl.minimum(tl.maximum(number * step + first, -THRESHOLD_LIMIT), THRESHOLD_LIMIT).to(tl.float32)


@triton.jit
def _scores(most_similar, nearest, free, diagonal, spatial_weight):
    distance = tl.div_rn(tl.sqrt_rn(nearest.to(tl.float32)), diagonal)
    scores = most_similar * (1.0 + spatial_weight * distance)
    scores = tl.where(scores == 0.0, 0.0, scores)  # no -0.0, whose bits would rank below 0.0
    scores = tl.where(scores == scores, scores, NOT_A_SCORE)
    return tl.where(free, scores, float("inf"))


@triton.jit
def _accept(token, similarity, longest, height, width, tokens, is_token, most_similar, owner, nearest, free):
    """The state of all tokens after one more is accepted."""
    row = tl.load(similarity + token.to(tl.int64) * longest + tokens, mask=is_token, other=float("-inf"))
    is_more_similar = (row > most_similar) | ((row == most_similar) & (token < owner))
    y, x = token // width % height - tokens // width % height, token % width - tokens % width
    frame = token // (height * width) - tokens // (height * width)
    nearest = tl.minimum(nearest, frame * frame + y * y + x * x)
    owner = tl.where(is_more_similar, token, owner)
    return tl.where(is_more_similar, row, most_similar), owner, nearest, free & (tokens != token)


@triton.jit
def _or_required(token, required, tokens, free, is_last):
    """`token`, or in the last place of the budget the one that must be kept, where it is not yet."""
    is_waiting = tl.max((free & (tokens == required)).to(tl.int32)) > 0
    return tl.where(is_last & is_waiting, required, token)


@triton.jit
def _rank(values, tokens, is_token, num_tokens, scratch):
    """Place of each token in the stable ascending order of `values`, by counting. All threads read what all have written."""
    tl.store(scratch + tokens, values, mask=is_token)
    tl.debug_barrier()
    rank = tl.zeros_like(tokens)
    for other in range(num_tokens):
        value = tl.load(scratch + other)
        rank += ((value < values) | ((value == values) & (other < tokens))).to(tl.int32)
    tl.debug_barrier()
    return rank


@triton.jit
def _raised(lowest, number, first, step):
    """The number of the first round whose threshold is above `lowest`, and that threshold: rounds that take nothing are left
    out."""
    exact = lowest.to(tl.float64)
    number = tl.maximum(number, tl.floor((exact - first) / step))
    number = tl.where(_threshold(number, first, step) <= lowest, number + 1.0, number)
    number = tl.where(_threshold(number, first, step) <= lowest, number + 1.0, number)
    above = (exact + tl.maximum(tl.abs(exact) * EPSILON, SMALLEST_STEP)).to(tl.float32)
    return number, tl.maximum(_threshold(number, first, step), above)


@triton.jit
def _ranked_keys(scores, is_candidate, tokens):
    """Numbers that order candidates by score, then by place, and hold the token in their lower half; `NO_KEY` for others."""
    bits = scores.to(tl.int32, bitcast=True)
    keys = ((bits ^ ((bits >> 31) & LAST)).to(tl.int64) << 32) | tokens
    return tl.where(is_candidate, keys, NO_KEY)


@triton.jit
def _store_groups(
    is_kept,
    owner,
    most_similar,
    tokens,
    is_token,
    num_tokens,
    start,
    kept_start,
    scratch,
    total,
    kept,
    members,
    offsets,
    shares,
):
    """The kept tokens of a grid, ascending, and each with those that it owns behind it: places, where a group begins, and the
    share that each has in its group."""
    owner = tl.where(is_kept, tokens, owner)
    tl.store(scratch + tokens, tl.cumsum(is_kept.to(tl.int32), 0).to(tl.float32), mask=is_token)
    tl.debug_barrier()
    group = tl.load(scratch + owner, mask=is_token, other=1).to(tl.int32) - 1
    tl.debug_barrier()
    place = _rank((2 * group + tl.where(is_kept, 0, 1)).to(tl.float32), tokens, is_token, num_tokens, scratch)
    tl.store(members + start + place, start + tokens, mask=is_token)
    tl.store(kept + kept_start + group, start + tokens, mask=is_kept)
    tl.store(offsets + kept_start + group, start + place, mask=is_kept)
    weight = tl.where(is_kept, 0.0, tl.maximum(most_similar, 0.0)).to(tl.float64)
    tl.atomic_add(total + kept_start + group, weight, mask=is_token)
    tl.debug_barrier()
    weights = tl.load(total + kept_start + group, mask=is_token, other=1, volatile=True)
    share = tl.where(weights > 0.0, weight / tl.where(weights > 0.0, weights, 1.0), is_kept.to(tl.float64))
    tl.store(shares + start + place, share.to(tl.float32), mask=is_token)


@triton.jit
def _greedy_kernel(
    similarity,
    longest,
    table,
    cells,
    num_images,
    most_pivots,
    first_pointer,
    step_pointer,
    spatial_weight,
    batch_size,
    scratch,
    total,
    order,
    kept,
    members,
    offsets,
    shares,
    FILL_BUDGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds and groups of one grid. Thresholds rise, batches walk, as in `_accept_rounds` of the CPU path."""
    image = tl.program_id(0)
    table += image * TABLE_WIDTH
    start, num_tokens = tl.load(table), tl.load(table + 1).to(tl.int32)
    num_keep, kept_start = tl.load(table + 2).to(tl.int32), tl.load(table + 3)
    height, width = tl.load(table + 5).to(tl.int32), tl.load(table + 6).to(tl.int32)
    diagonal = tl.load(table + 7).to(tl.float64, bitcast=True).to(tl.float32)
    required, budget = tl.load(table + 8).to(tl.int32), num_keep
    first, step = tl.load(first_pointer), tl.load(step_pointer)
    similarity += image.to(tl.int64) * longest * longest
    scratch += start
    tokens = tl.arange(0, BLOCK)
    is_token = tokens < num_tokens

    most_similar, nearest = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], FAR, tl.int32)
    owner, free = tl.zeros([BLOCK], tl.int32) + _pivot_of(tl.load(cells + image)), is_token
    num_accepted = tl.minimum(most_pivots, num_keep)
    for place in range(num_accepted):
        pivot = _pivot_of(tl.load(cells + place * num_images + image))
        pivot = _or_required(pivot, required, tokens, free, place == budget - 1)
        tl.store(order + kept_start + place, start + pivot)
        most_similar, owner, nearest, free = _accept(
            pivot, similarity, longest, height, width, tokens, is_token, most_similar, owner, nearest, free
        )

    number, threshold = tl.full([], -1.0, tl.float64), tl.full([], float("-inf"), tl.float32)
    while num_accepted < num_keep:
        scores = _scores(most_similar, nearest, free, diagonal, spatial_weight)
        lowest = tl.min(scores)
        number += 1.0
        threshold = tl.maximum(threshold, _threshold(number, first, step))
        if lowest >= threshold:
            if FILL_BUDGET:
                number, threshold = _raised(lowest, number, first, step)
            else:
                num_keep = num_accepted
        rank = _rank(scores, tokens, is_token, num_tokens, scratch)
        cursor = tl.full([], 0, tl.int32)
        is_walking = num_accepted < num_keep
        while is_walking:
            is_waiting = (scores < threshold) & (rank >= cursor)
            begin = tl.min(tl.where(is_waiting, rank, num_tokens)) // batch_size * batch_size
            cursor = begin + batch_size
            keys = _ranked_keys(scores, is_waiting & (rank < cursor), tokens)
            lowest_key = tl.min(keys)
            is_walking = lowest_key != NO_KEY
            while (lowest_key != NO_KEY) & (num_accepted < num_keep):
                token = (lowest_key & LAST).to(tl.int32)
                token = _or_required(token, required, tokens, free, num_accepted == budget - 1)
                tl.store(order + kept_start + num_accepted, start + token)
                num_accepted += 1
                most_similar, owner, nearest, free = _accept(
                    token, similarity, longest, height, width, tokens, is_token, most_similar, owner, nearest, free
                )
                keys = tl.where(tokens == token, NO_KEY, keys)
                lowest_key = tl.min(keys)
            is_walking = is_walking & (num_accepted < num_keep)
            scores = _scores(most_similar, nearest, free, diagonal, spatial_weight)

    if not FILL_BUDGET:  # noqa: SIM102 - compiled away where it is True
        if tl.max((free & (tokens == required)).to(tl.int32)) > 0:
            tl.store(order + kept_start + num_accepted, start + required)
            most_similar, owner, nearest, free = _accept(
                required, similarity, longest, height, width, tokens, is_token, most_similar, owner, nearest, free
            )

    _store_groups(
        is_token & ~free,
        owner,
        most_similar,
        tokens,
        is_token,
        num_tokens,
        start,
        kept_start,
        scratch,
        total,
        kept,
        members,
        offsets,
        shares,
    )


def select_packed(hidden_states: torch.Tensor, keys: torch.Tensor, batch: GridBatch, parameters) -> tuple:
    """As `select_packed_in_torch`."""
    layout, counts = batch.layout, batch.num_keep
    hidden_states, keys = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (hidden_states, keys))
    (num_tokens, width), (num_images, longest) = hidden_states.shape, layout.padded.shape
    num_pivots, device = min(parameters.num_pivots, max(counts)), hidden_states.device
    with torch.cuda.device_of(hidden_states):
        cells = torch.zeros(num_pivots, num_images, dtype=torch.int64, device=device)
        nearest = torch.empty(num_tokens, device=device)
        tokens = (layout.table, layout.image, layout.place, nearest, cells, num_images)
        for number in range(num_pivots):
            _pivot_kernel[(num_tokens,)](
                keys, keys.stride(0), keys.shape[1], *tokens, number, FIRST=number == 0, BLOCK=1024, enable_fp_fusion=False
            )
        deviations = None
        if parameters.num_channels < width:
            deviations = torch.empty(num_images, width, device=device)
            _deviation_kernel[(num_images, triton.cdiv(width, 32))](
                hidden_states,
                hidden_states.stride(0),
                width,
                layout.table,
                deviations,
                ROWS=32,
                BLOCK=32,
                enable_fp_fusion=False,
            )
        similarity = screened_cosines(hidden_states, deviations, parameters, layout)
        first, step = (torch.full((1,), value, dtype=torch.float64, device=device) for value in Thresholds.of(parameters))
        order, kept, offsets = torch.full((3, sum(counts)), -1, device=device)
        members = torch.empty_like(layout.place)
        scratch, shares = torch.empty(2, num_tokens, device=device)
        total = torch.zeros(sum(counts), dtype=torch.float64, device=device)
        block = triton.next_power_of_2(longest)
        _greedy_kernel[(num_images,)](
            similarity,
            longest,
            layout.table,
            cells,
            num_images,
            num_pivots,
            first,
            step,
            float(min(parameters.spatial_weight, SCORE_LIMIT)),
            min(parameters.token_batch, longest),
            scratch,
            total,
            order,
            kept,
            members,
            offsets,
            shares,
            FILL_BUDGET=parameters.fill_budget,
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
            enable_fp_fusion=False,
        )
    if not parameters.fill_budget:
        order, kept, offsets = (places[places >= 0] for places in (order, kept, offsets))
        counts = tuple(torch.bincount(layout.image[order], minlength=num_images).tolist())
    return counts, order, kept, members, offsets, shares


# Merging


@triton.jit
def _aggregate_kernel(
    rows,
    stride,
    width,
    members,
    offsets,
    shares,
    num_groups,
    num_tokens,
    own,
    merged,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of channels of one kept token after the merge, summed in float32."""
    group, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(offsets + group), tl.full([], num_tokens, tl.int64)
    if group + 1 < num_groups:
        end = tl.load(offsets + group + 1)
    total = tl.zeros([MEMBERS, BLOCK], tl.float32)
    for place in range(begin, end, MEMBERS):
        places = place + tl.arange(0, MEMBERS)
        member, share = (
            tl.load(members + places, mask=places < end, other=0),
            tl.load(shares + places, mask=places < end, other=0),
        )
        weight = tl.where(places == begin, tl.where(share > 0, share, own), share * (1.0 - own))
        mask = (places < end)[:, None] & (columns < width)[None, :]
        part = tl.load(rows + member[:, None] * stride + columns[None, :], mask=mask, other=0)
        total += part.to(tl.float32) * weight[:, None]
    result = tl.sum(total, 0).to(merged.dtype.element_ty)
    tl.store(merged + group.to(tl.int64) * width + columns, result, mask=columns < width)


def aggregate_packed(hidden_states: torch.Tensor, selection, aggregation_weight: float) -> torch.Tensor:
    """As `aggregate_tokens`, without a float32 copy of the rows and without a gradient."""
    rows = hidden_states if hidden_states.stride(1) == 1 else hidden_states.contiguous()
    num_groups, (num_tokens, width) = len(selection.kept), rows.shape
    merged = rows.new_empty(num_groups, width)
    groups = (selection.members, selection.offsets, selection.shares, num_groups, num_tokens, float(aggregation_weight))
    with torch.cuda.device_of(rows):
        _aggregate_kernel[(num_groups, triton.cdiv(width, 256))](
            rows, rows.stride(0), width, *groups, merged, MEMBERS=8, BLOCK=256
        )
    return merged
