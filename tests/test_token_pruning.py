"""The maths against the authors' recorded vectors, against plain loops, at its edges, and its cost in operations."""

import inspect
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from vlmpruner import token_pruning
from vlmpruner.token_pruning import (
    PruningParameters,
    Selection,
    aggregate_tokens,
    num_tokens_to_keep,
    prune_tokens,
    select_tokens,
)
from vlmpruner.token_pruning_device import Thresholds, channel_deviations


GOLDEN = sorted((Path(__file__).parent / "data" / "golden").glob("select_*.safetensors"))


def load_case(path):
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parameters = {name: case[name] for name in PruningParameters.__dataclass_fields__ if name in case}
    return tensors, (case["height"], case["width"]), case["budget"], parameters


def random_inputs(grid, width=12, heads=2, head_dim=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = math.prod(grid)
    hidden_states = torch.randn(num_tokens, width, generator=generator) + 0.7
    return hidden_states.to(dtype), torch.randn(heads, num_tokens, head_dim, generator=generator).to(dtype)


# The authors' vectors


def test_golden_vectors_are_there():
    assert len(GOLDEN) == 23


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("fill_budget", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_keeps_what_the_authors_keep(path, fill_budget, dtype):
    tensors, grid, budget, parameters = load_case(path)
    parameters = PruningParameters(**parameters, fill_budget=fill_budget)
    kept, _ = prune_tokens(tensors["hidden_states"].to(dtype), tensors["keys"].to(dtype), grid, budget, parameters)
    assert torch.equal(kept, tensors["kept_filled" if fill_budget else "kept"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_merges_what_the_authors_merge(path):
    tensors, grid, budget, parameters = load_case(path)
    parameters = PruningParameters(**parameters, fill_budget=False)
    _, merged = prune_tokens(tensors["hidden_states"].float(), tensors["keys"], grid, budget, parameters)
    expected = tensors["merged"]
    assert merged.dtype == torch.float32
    assert ((merged - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


# Plain loops


def oracle(hidden_states, keys, grid, num_keep, parameters):
    """VLM-Pruner in plain loops from its description: (tokens in order of selection, merged rows of the kept, ascending)."""
    rows = hidden_states.double().tolist()
    features = oracle_screened(rows, parameters.num_channels)
    similarity = [[oracle_cosine(one, other) for other in features] for one in features]
    key_rows = keys.double().transpose(0, 1).flatten(1).tolist()
    order = oracle_pivots(key_rows, min(parameters.num_pivots, num_keep))
    tau = float(parameters.threshold)
    while len(order) < num_keep:
        before = len(order)
        oracle_round(order, similarity, grid, num_keep, tau, parameters)
        if len(order) == before and not parameters.fill_budget:
            break
        tau += parameters.threshold_step
    return order, oracle_merged(rows, similarity, sorted(order), parameters.aggregation_weight)


def oracle_screened(rows, num_channels):
    columns = list(zip(*rows, strict=True))
    variances = [sum((value - sum(column) / len(column)) ** 2 for value in column) for column in columns]
    chosen = sorted(range(len(columns)), key=lambda channel: (-variances[channel], channel))[:num_channels]
    return [[row[channel] for channel in chosen] for row in rows]


def oracle_cosine(one, other):
    norms = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return np.float32(sum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0)


def oracle_pivots(key_rows, num_pivots):
    pivots = [max(range(len(key_rows)), key=lambda j: (sum(map(abs, key_rows[j])), -j))]
    while len(pivots) < num_pivots:
        rest = [j for j in range(len(key_rows)) if j not in pivots]
        pivots.append(max(rest, key=lambda j: (min(math.dist(key_rows[j], key_rows[s]) for s in pivots), -j)))
    return pivots


def oracle_score(token, selected, similarity, grid, spatial_weight):
    height, width = grid
    squared = min((token % width - s % width) ** 2 + (token // width - s // width) ** 2 for s in selected)
    distance = np.float32(math.sqrt(squared) / math.sqrt(height**2 + width**2))
    return max(similarity[token][s] for s in selected) * (1 + np.float32(spatial_weight) * distance)


def oracle_round(order, similarity, grid, num_keep, tau, parameters):
    def score(token):
        return oracle_score(token, order, similarity, grid, parameters.spatial_weight), token

    queue = sorted((token for token in range(len(similarity)) if token not in order), key=score)
    for start in range(0, len(queue), parameters.token_batch):
        scored = sorted(score(token) for token in queue[start : start + parameters.token_batch])
        accepted = [token for value, token in scored if value < np.float32(tau)]
        order += accepted[: num_keep - len(order)]


def oracle_merged(rows, similarity, kept, beta):
    merged = []
    nearest = {u: max(kept, key=lambda j: (similarity[u][j], -j)) for u in range(len(rows)) if u not in kept}
    for j in kept:
        weights = {u: max(float(similarity[u][j]), 0) for u in nearest if nearest[u] == j}
        total = sum(weights.values())
        mean = [sum(w * rows[u][c] for u, w in weights.items()) / (total or 1) for c in range(len(rows[j]))]
        merged.append([beta * x + (1 - beta) * e for x, e in zip(rows[j], mean, strict=True)] if total else rows[j])
    return torch.tensor(merged, dtype=torch.float64)


def random_case(seed):
    """A small random problem; every third has small integers for values, so that scores tie exactly."""
    rng = np.random.default_rng(seed)
    grid = tuple(int(side) for side in rng.integers(1, 7, size=2))
    num_tokens, width, heads, head_dim = math.prod(grid), *(int(size) for size in rng.integers(1, 10, size=3))
    hidden_states = rng.normal(rng.uniform(0, 2), 1, (num_tokens, width))
    keys = rng.normal(0, 1, (heads, num_tokens, head_dim))
    num_channels = int(rng.integers(1, width + 3))
    if seed % 3 == 0:
        hidden_states, keys = np.rint(hidden_states), np.rint(keys)
        num_channels = width
    if seed % 2 == 0:
        copies = rng.integers(0, num_tokens, num_tokens)
        hidden_states, keys = hidden_states[copies], keys[:, copies]
    parameters = PruningParameters(
        num_pivots=int(rng.integers(1, 7)),
        num_channels=num_channels,
        threshold=float(rng.choice([-0.5, 0.0, 0.5, 0.8, 1.0])),
        threshold_step=float(rng.choice([0.03, 0.1, 0.5])),
        spatial_weight=float(rng.choice([0.0, 0.5, 0.5, 3.0])),
        token_batch=int(rng.integers(1, 21)),
        aggregation_weight=float(rng.choice([0.0, 0.3, 0.3, 1.0])),
        fill_budget=bool(rng.integers(2)),
    )
    tensors = (torch.from_numpy(values).float() for values in (hidden_states, keys))
    return *tensors, grid, int(rng.integers(1, num_tokens + 1)), parameters


@pytest.mark.parametrize("block", range(10))
def test_equals_plain_loops(block):
    for seed in range(40 * block, 40 * (block + 1)):
        hidden_states, keys, grid, num_keep, parameters = random_case(seed)
        order, merged = oracle(hidden_states, keys, grid, num_keep, parameters)
        context = f"seed {seed}: {grid}, {num_keep}, {parameters}"
        assert select_tokens(hidden_states, keys, grid, num_keep, parameters).order.tolist() == order, context
        kept, ours = prune_tokens(hidden_states, keys, grid, num_keep, parameters)
        assert kept.tolist() == sorted(order), context
        torch.testing.assert_close(ours.double(), merged, rtol=1e-5, atol=1e-5, msg=context)


# Edges


@pytest.mark.parametrize(
    ("num_visual", "ratio", "expected"),
    [
        (576, 0.889, 64), (576, 0.778, 128), (576, 0.667, 192), (1410, 0.889, 157), (576, 0, 576), (1, 0.5, 1),
        (10, 0.999, 1), (3, 0.0, 3), (25, 0.9, 2), (35, 0.9, 4), (30, 0.95, 2), (5, 1e-9, 5),
    ],
)  # fmt: skip
def test_num_tokens_to_keep(num_visual, ratio, expected):
    assert num_tokens_to_keep(num_visual, ratio) == expected


@pytest.mark.parametrize("ratio", [1.0, -0.1, math.nan, math.inf, "0.5", True, None])
def test_ratio_is_checked(ratio):
    with pytest.raises(ValueError, match=rf"ratio must be a number in \[0, 1\), but is {ratio!r}"):
        num_tokens_to_keep(576, ratio)


@pytest.mark.parametrize("num_visual", [0, -5, 9.0, True])
def test_number_of_tokens_is_checked(num_visual):
    with pytest.raises(ValueError, match=f"num_visual must be an integer >= 1, but is {num_visual!r}"):
        num_tokens_to_keep(num_visual, 0.5)


@pytest.mark.parametrize("num_keep", [1, 2, 3, 12])
def test_budget_is_met_from_one_token_to_all(num_keep):
    hidden_states, keys = random_inputs((3, 4))
    kept, merged = prune_tokens(hidden_states, keys, (3, 4), num_keep)
    assert kept.dtype == torch.int64 and len(kept) == num_keep and kept.tolist() == sorted(set(kept.tolist()))
    if num_keep == 12:
        assert torch.equal(merged, hidden_states)


@pytest.mark.parametrize("grid", [(1, 9), (9, 1), (1, 1), (1, 2)])
def test_lines_and_fewer_tokens_than_pivots(grid):
    hidden_states, keys = random_inputs(grid)
    for num_keep in range(1, math.prod(grid) + 1):
        assert len(prune_tokens(hidden_states, keys, grid, num_keep)[0]) == num_keep


def test_equal_keys_give_distinct_pivots():
    """The authors' argmax runs over all tokens: with equal keys it chose token 0 four times, and three tokens were lost."""
    hidden_states, keys = random_inputs((3, 4))
    order = select_tokens(hidden_states, torch.ones_like(keys), (3, 4), 6).order.tolist()
    assert order[:4] == [0, 1, 2, 3] and len(set(order)) == 6


@pytest.mark.parametrize("value", [1.0, -3.5, 0.0, 1e-3])
@pytest.mark.parametrize("token_batch", [1, 16])
def test_constant_image_fills_its_budget_or_stops_at_the_pivots(value, token_batch):
    """A near-uniform image made the authors' selection stop with 4 of 64 tokens."""
    hidden_states, keys = torch.full((30, 300), value), torch.full((2, 30, 4), value)
    parameters = {"token_batch": token_batch, "threshold": -0.5}
    kept, merged = prune_tokens(hidden_states, keys, (5, 6), 9, PruningParameters(**parameters))
    assert len(kept) == 9
    torch.testing.assert_close(merged, hidden_states[:9], rtol=1e-6, atol=0)
    kept, _ = prune_tokens(hidden_states, keys, (5, 6), 9, PruningParameters(**parameters, fill_budget=False))
    assert kept.tolist() == [0, 1, 2, 3]


def test_a_row_of_zeros_is_similar_to_nothing():
    hidden_states, keys = random_inputs((3, 4))
    hidden_states[5] = 0
    cosines = token_pruning.channel_cosines(hidden_states, 8)
    assert (cosines[5] == 0).all() and (cosines[:, 5] == 0).all() and cosines.isfinite().all()
    # It scores 0 against any set, so it is taken as soon as the threshold is positive; where it is discarded it weighs 0.
    assert 5 in prune_tokens(hidden_states, keys, (3, 4), 7)[0].tolist()
    selection = select_tokens(hidden_states, keys, (3, 4), 1)
    assert 5 not in selection.kept.tolist() and selection.shares[selection.members == 5] == 0


def test_orthogonal_rows_have_cosine_zero_and_equal_rows_one():
    """Products of normalised rows left 2e-17 for (1, 2) and (2, -1), which broke ties at random."""
    hidden_states = torch.tensor([[1.0, 2.0], [2.0, -1.0], [3.0, 6.0], [1.0, 2.0]])
    expected = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1], [1, 0, 1, 1]])
    assert torch.equal(token_pruning.channel_cosines(hidden_states, 2), expected)


def test_negative_cosines_weigh_nothing():
    """In the authors' code they entered the weights, whose sum could come close to zero and make the mean explode."""
    hidden_states = torch.tensor([[2.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    keys = torch.tensor([[[3.0], [1.0], [1.0]]])
    kept, merged = prune_tokens(hidden_states, keys, (1, 3), 1)
    assert kept.tolist() == [0] and torch.equal(merged, hidden_states[:1])


def test_constant_channels_rank_last_and_in_order():
    """Rounding of the mean gave constant channels tiny variances, which differ from machine to machine."""
    hidden_states = torch.full((700, 9), 0.1)
    hidden_states[:, 4] += torch.arange(700) * 1e-6
    deviations = channel_deviations(hidden_states, torch.ones(700, dtype=torch.bool))
    assert deviations[4] > 0 and deviations.count_nonzero() == 1
    assert token_pruning.screened_channels(hidden_states, 3).tolist() == [0, 1, 4]


def test_deviations_survive_a_large_mean():
    hidden_states = torch.randn(200, 40) * torch.linspace(1, 2, 40) + 100
    deviations = channel_deviations(hidden_states, torch.ones(200, dtype=torch.bool))
    torch.testing.assert_close(deviations, hidden_states.double().std(0, correction=0).float())


@pytest.mark.parametrize("offset", [0, 3, 1000, 1e5])
def test_channels_are_those_of_largest_deviation_however_close(offset):
    """A float32 sum takes the wrong one of two close channels about once in a thousand images, another one on each device."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        one = torch.randn(150, 1, generator=generator)
        spread = 1 + 1e-7 * torch.randint(0, 40, (60,), generator=generator) + (torch.arange(60) % 3 - 1) * 1e-3
        shuffled = torch.stack([one[torch.randperm(150, generator=generator), 0] for _ in range(60)], 1)
        hidden_states = shuffled * spread + offset
        exact = hidden_states.double()
        exact = (exact - exact.mean(0).float()).float().double().square().mean(0).sqrt().float()
        expected = exact.sort(descending=True, stable=True).indices[:30].sort().values
        assert torch.equal(token_pruning.screened_channels(hidden_states, 30), expected)


def test_pivots_are_those_of_largest_distance_however_close():
    """As for channels: the order of a float32 sum must not choose."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(512, generator=generator)
        keys = torch.stack([base[torch.randperm(512, generator=generator)] for _ in range(50)])
        keys = torch.cat([keys, -keys]) * (1 + 1e-8 * torch.arange(100)[:, None].double()).float()
        exact = keys.double()
        expected = [int(exact.abs().mean(1).float().argmax())]
        while len(expected) < 5:
            distances = [(keys - keys[pivot]).double().square().mean(1).sqrt().float() for pivot in expected]
            nearest = torch.stack(distances).amin(0)
            nearest[expected] = -1
            expected.append(int(nearest.argmax()))
        assert token_pruning.choose_pivots(keys.view(100, 4, 128).transpose(0, 1).contiguous(), 5) == expected
        assert token_pruning.choose_pivots(keys[None], 5) == expected


@pytest.mark.parametrize("spatial_weight", [1000, 1e30, 1.7e308])
@pytest.mark.parametrize("threshold", [0.8, -1.7e308, 1.7e308])
@pytest.mark.parametrize("threshold_step", [0.1, 5e-324, 1.7e308])
def test_ends_for_any_parameters(spatial_weight, threshold, threshold_step):
    hidden_states, keys = random_inputs((5, 6))
    parameters = PruningParameters(spatial_weight=spatial_weight, threshold=threshold, threshold_step=threshold_step)
    assert len(prune_tokens(hidden_states, keys, (5, 6), 20, parameters)[0]) == 20


@pytest.mark.parametrize("step", [0.1, 1 / 3, 1e-3, 1e-5])
@pytest.mark.parametrize("lowest", [0.1, 0.8, 0.80001, 1.0, 1.6180339, 2.3])
def test_the_threshold_leaps_to_where_repeated_addition_would_arrive(step, lowest):
    tau, number = 0.8, 0
    while np.float32(tau) <= np.float32(lowest) or number == 0:
        tau, number = tau + step, number + 1
    found, threshold = Thresholds.of(PruningParameters(threshold_step=step)).leap(1, np.float32(lowest))
    assert (found, threshold) == (number, np.float32(tau))


@pytest.mark.parametrize("step", [5e-324, 1e-30, 1e-9, 0.1, 1.7e308])
@pytest.mark.parametrize("first", [-1.7e308, -3e10, -1.0, 0.8])
@pytest.mark.parametrize("lowest", [-1e30, -1.0, -1e-20, 0.0, 0.8, 1.5, 1e30])
def test_a_leap_always_passes_the_lowest_score(step, first, lowest):
    lowest = np.float32(lowest)
    _, threshold = Thresholds.of(PruningParameters(threshold=first, threshold_step=step)).leap(0.0, lowest)
    assert lowest < threshold < np.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_of_the_same_values(dtype):
    for seed in range(5):
        hidden_states, keys = random_inputs((9, 11), width=300, seed=seed, dtype=dtype)
        expected_kept, expected = prune_tokens(hidden_states.float(), keys.float(), (9, 11), 20)
        kept, merged = prune_tokens(hidden_states, keys, (9, 11), 20)
        assert torch.equal(kept, expected_kept)
        assert torch.equal(merged, expected.to(dtype))


def test_double_precision_keeps_what_float32_keeps():
    hidden_states, keys = random_inputs((9, 11), width=300)
    expected_kept, expected = prune_tokens(hidden_states, keys, (9, 11), 20)
    kept, merged = prune_tokens(hidden_states.double(), keys.double(), (9, 11), 20)
    assert torch.equal(kept, expected_kept) and merged.dtype == torch.float64
    torch.testing.assert_close(merged.float(), expected)


def test_choice_does_not_depend_on_scale_or_layout():
    hidden_states, keys = random_inputs((9, 11), width=300)
    expected = prune_tokens(hidden_states, keys, (9, 11), 20)[0]
    by_token = keys.transpose(0, 1).contiguous().transpose(0, 1)
    strided = torch.stack([hidden_states, hidden_states], dim=-1)[..., 0]
    assert torch.equal(prune_tokens(strided, by_token, (9, 11), 20)[0], expected)
    for scale in (2.0**-60, 2.0**60):  # squares leave float32
        assert torch.equal(prune_tokens(hidden_states * scale, keys * scale, (9, 11), 20)[0], expected)
    assert torch.equal(prune_tokens(hidden_states.double() * 1e300, keys.double() * 1e-300, (9, 11), 20)[0], expected)


def test_choice_does_not_depend_on_precision_settings():
    hidden_states, keys = random_inputs((9, 11), width=300)
    expected = prune_tokens(hidden_states, keys, (9, 11), 20)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            kept, merged = prune_tokens(hidden_states, keys, (9, 11), 20)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
    assert torch.equal(kept, expected[0]) and torch.equal(merged, expected[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["hidden_states", "keys"])
def test_values_that_are_not_finite_are_counted_in_the_error(name, dtype, bad):
    inputs = dict(zip(("hidden_states", "keys"), random_inputs((3, 4), dtype=dtype), strict=True))
    inputs[name].view(-1)[[0, 7]] = bad
    with pytest.raises(ValueError, match=f"{name} must be finite, but 2 of its {inputs[name].numel()} values"):
        prune_tokens(**inputs, grid=(3, 4), num_keep=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_keep": 0}, r"num_keep must be an integer in 1..12, but is 0"),
        ({"num_keep": 13}, r"num_keep must be an integer in 1..12, but is 13"),
        ({"num_keep": 3.0}, r"num_keep must be an integer in 1..12, but is 3.0"),
        ({"num_keep": True}, r"num_keep must be"),
        ({"grid": (3, 5)}, r"grid 3 x 5 has 15 cells, but there are 12 tokens"),
        ({"grid": (12,)}, r"grid must be \(height, width\)"),
        ({"grid": (-3, -4)}, r"grid must be \(height, width\)"),
        ({"hidden_states": torch.zeros(11, 4)}, r"hidden_states has shape \(11, 4\) and keys has shape \(2, 12, 3\)"),
        ({"hidden_states": torch.zeros(1, 12, 4)}, r"hidden_states has shape \(1, 12, 4\) and keys has shape"),
        ({"keys": torch.zeros(12, 6)}, r"keys has shape \(12, 6\)"),
        ({"keys": torch.zeros(0, 12, 6)}, r"must not be empty.*\(0, 12, 6\)"),
        ({"hidden_states": torch.zeros(12, 4, dtype=torch.int64)}, r"floating point.*torch.int64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    hidden_states, keys = random_inputs((3, 4))
    with pytest.raises(ValueError, match=message):
        prune_tokens(**({"hidden_states": hidden_states, "keys": keys, "grid": (3, 4), "num_keep": 3} | change))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("num_pivots", [0, -1, 1.0, True, "4", None]),
        ("num_channels", [0, 2.5, False, None]),
        ("token_batch", [0, 16.0, True]),
        ("threshold", [math.nan, math.inf, -math.inf, "0.8", True, None]),
        ("threshold_step", [0, 0.0, -0.1, math.nan, math.inf]),
        ("spatial_weight", [-0.1, math.nan, math.inf]),
        ("aggregation_weight", [-0.01, 1.01, math.nan]),
        ("fill_budget", [1, 0, None, "yes"]),
    ],
)
def test_parameters_are_checked_at_the_door(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be .* but is {value!r}"):
            PruningParameters(**{name: value})


def test_parameters_default_to_the_paper():
    assert PruningParameters() == PruningParameters(4, 256, 0.8, 0.1, 0.5, 16, 0.3, True)
    PruningParameters(threshold=-3, threshold_step=1, spatial_weight=0, aggregation_weight=1)


# Aggregation


def test_weight_one_returns_the_kept_rows_untouched():
    hidden_states, keys = random_inputs((5, 6), dtype=torch.bfloat16)
    kept, merged = prune_tokens(hidden_states, keys, (5, 6), 7, PruningParameters(aggregation_weight=1))
    assert torch.equal(merged, hidden_states[kept])


def test_aggregation_gradient():
    hidden_states, keys = random_inputs((3, 4), width=5, dtype=torch.float64)
    selection = select_tokens(hidden_states, keys, (3, 4), 4)
    hidden_states.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: aggregate_tokens(x, selection, 0.3), (hidden_states,))


def test_gradient_reaches_kept_and_discarded_tokens_alike():
    hidden_states, keys = random_inputs((5, 6))
    hidden_states.requires_grad_()
    kept, merged = prune_tokens(hidden_states, keys, (5, 6), 7)
    merged.sum().backward()
    cosines = token_pruning.channel_cosines(hidden_states.detach(), 256)
    group = cosines[:, kept].argmax(1)
    group[kept] = -1
    expected = torch.zeros(30)
    for place, token in enumerate(kept.tolist()):
        members = (group == place).nonzero().flatten()
        weights = cosines[members, token].clamp(min=0)
        expected[members] = 0.7 * weights / weights.sum()
        expected[token] = 0.3 if weights.sum() > 0 else 1
    assert (expected > 0).sum() > 20
    torch.testing.assert_close(hidden_states.grad, expected[:, None].expand_as(hidden_states))


def test_half_precision_gradient_and_no_graph_through_the_selection():
    hidden_states, keys = random_inputs((5, 6), dtype=torch.bfloat16)
    keys.requires_grad_()
    hidden_states.requires_grad_()
    _, merged = prune_tokens(hidden_states, keys, (5, 6), 7)
    merged.float().sum().backward()
    assert keys.grad is None and hidden_states.grad.dtype == torch.bfloat16 and hidden_states.grad.isfinite().all()


def test_aggregation_of_other_rows_than_selected_is_refused():
    hidden_states, keys = random_inputs((3, 4))
    selection = select_tokens(hidden_states, keys, (3, 4), 4)
    with pytest.raises(ValueError, match=r"N = 12, but has shape \(11, 12\)"):
        aggregate_tokens(hidden_states[:11], selection, 0.3)
    with pytest.raises(ValueError, match=r"aggregation_weight must be a number in \[0, 1\], but is 1.5"):
        aggregate_tokens(hidden_states, selection, 1.5)


def test_selection_describes_groups():
    hidden_states, keys = random_inputs((5, 6))
    counts, order, kept, members, offsets, shares = selection = select_tokens(hidden_states, keys, (5, 6), 7)
    assert isinstance(selection, Selection) and counts == (7,) and shares.dtype == torch.float32
    assert torch.equal(order.sort().values, kept) and torch.equal(members.sort().values, torch.arange(30))
    assert torch.equal(members[offsets], kept)
    groups = torch.tensor_split(shares, offsets[1:].tolist())
    torch.testing.assert_close(torch.stack([group.sum() for group in groups]), torch.ones(7))


def test_inputs_are_left_alone():
    hidden_states, keys = random_inputs((5, 6))
    copies = hidden_states.clone(), keys.clone()
    prune_tokens(hidden_states, keys, (5, 6), 7)
    assert torch.equal(hidden_states, copies[0]) and torch.equal(keys, copies[1])


# Cost, counted instead of timed


def count_lines(function):
    """Lines of token_pruning.py that run: grows with every Python loop, whatever its body does."""
    file, lines = inspect.getsourcefile(token_pruning), 0

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != file:
            return None
        lines += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)
    return lines


class Operations(TorchDispatchMode):
    """Counts torch operations and remembers the largest tensor that one of them returned.

    `scattered` names the operations that read a tensor of at least `size` values whose last dimension is not the one that
    memory runs along.
    """

    def __init__(self, size=math.inf):
        super().__init__()
        self.count, self.largest = 0, 0
        self.size, self.scattered = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        inputs = [each for each in args if isinstance(each, torch.Tensor) and each.numel() >= self.size]
        if not func.is_view and any(each.stride(-1) != 1 for each in inputs):
            self.scattered.append(func.overloadpacket.__name__)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max([self.largest, *(output.numel() for output in outputs if isinstance(output, torch.Tensor))])
        return result


LAYOUTS = {
    "columns first": lambda states: states.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other column": lambda states: torch.stack([states, states], dim=-1)[..., 0],
    "columns of a wider one": lambda states: torch.cat([states, states], dim=-1)[..., : states.shape[-1]],
    "rows of a longer one": lambda states: torch.cat([states, states], dim=-2)[..., : states.shape[-2], :],
    "tokens first": lambda states: states.transpose(0, -2).contiguous().transpose(0, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_read_along_memory(layout):
    """Columns read in rows cost several times as much: such an input is copied once, before anything else reads it."""
    hidden_states, keys = random_inputs((9, 11), width=300, heads=4, head_dim=75)
    expected = prune_tokens(hidden_states, keys, (9, 11), 20)
    hidden_states, keys = (LAYOUTS[layout](states) for states in (hidden_states, keys))
    with Operations(size=hidden_states.numel()) as operations:
        kept, merged = prune_tokens(hidden_states, keys, (9, 11), 20)
    assert torch.equal(kept, expected[0]) and torch.equal(merged, expected[1])
    assert operations.scattered == (["clone"] * 2 if layout in ("columns first", "every other column") else [])


@pytest.mark.parametrize("token_batch", [1, 16])
def test_python_runs_once_per_accepting_batch_only(token_batch):
    """A walk over all batches of a round, or over all tokens, runs at least 1,600 / B lines in each of the rounds."""
    hidden_states, keys = random_inputs((40, 40), width=64)
    parameters = PruningParameters(token_batch=token_batch, threshold=-0.5, threshold_step=0.02, num_pivots=2)
    assert count_lines(lambda: prune_tokens(hidden_states, keys, (40, 40), 6, parameters)) < 600
    more = count_lines(lambda: prune_tokens(hidden_states, keys, (40, 40), 6 + 32, parameters))
    assert more < 600 + 32 * 40


def test_a_tiny_step_costs_no_more_rounds():
    hidden_states, keys = random_inputs((5, 6))
    parameters = PruningParameters(threshold_step=1e-12, spatial_weight=1000)
    assert count_lines(lambda: prune_tokens(hidden_states, keys, (5, 6), 8, parameters)) < 4000


def test_torch_operations_grow_neither_with_the_budget_nor_with_the_token_batch():
    hidden_states, keys = random_inputs((16, 16), width=300)
    counts = set()
    for num_keep in (28, 128):
        for token_batch in (1, 16):
            with Operations() as operations:
                prune_tokens(hidden_states, keys, (16, 16), num_keep, PruningParameters(token_batch=token_batch))
            counts.add(operations.count)
    assert len(counts) == 1 and counts.pop() < 240


def test_no_tensor_larger_than_the_input_or_the_similarity():
    """The authors' cosine holds N x N x q values: 4 GiB at 2,880 tokens."""
    hidden_states, keys = random_inputs((16, 16), width=300, head_dim=64)
    with Operations() as operations:
        prune_tokens(hidden_states, keys, (16, 16), 28)
    assert operations.largest <= max(hidden_states.numel(), 256 * 256)
