"""What each pruning method chooses, without a model: against restatements, recorded vectors, and its listed invariants."""

from dataclasses import asdict
from types import SimpleNamespace

import method_oracles
import numpy as np
import pytest
import torch

from vlmpruner.method_btp import grid_distance, rebalance
from vlmpruner.method_cdpruner import greedy_map
from vlmpruner.method_visionzip import zip_groups
from vlmpruner.pruning_method import TowerSignals, farthest, largest, unit
from vlmpruner.pruning_methods import METHODS


NUM_LAYERS = 32
RANDOM_CASES = 200
CHECKED = [name for name in METHODS if name not in ("vlm_pruner", "random")]  # these two have tests of their own


def method(name, **parameters):
    return METHODS[name](METHODS[name].Parameters(**parameters), 2, NUM_LAYERS)


def random_image(seed):
    """One grid at one stage, of which some tokens may already be gone, as the methods see it."""
    rng = np.random.default_rng(seed)
    grid = tuple(rng.integers(4, 9, 2).tolist())
    indices = np.sort(rng.permutation(np.prod(grid))[: rng.integers(12, np.prod(grid) + 1)])
    num_tokens, num_text, width, heads = len(indices), rng.integers(2, 9), 16, 2
    draw = rng.standard_normal
    image = {
        "stage": 0,
        "num_keep": int(rng.integers(1, 12)),
        "grid": grid,
        "indices": indices,
        "hidden_states": draw((num_tokens, width)),
        "keys": draw((heads, num_tokens, 4)) + rng.uniform(0, 4) * draw((heads, 1, 4)),
        "attention": rng.random(num_tokens),
        "logits": draw(num_tokens),
        "text_states": draw((num_text, width)),
        "text_keys": draw((heads, num_text, 4)),
        "is_after": rng.random(num_text) < 0.6,
        "tower_attention": rng.random(num_tokens),
        "tower_states": draw((num_tokens, width)) + 0.5 * draw(width),
        "tower_keys": draw((num_tokens, 6)),
        "tower_has_class_token": bool(rng.random() < 0.5),
        "keeps_last": bool(rng.random() < 0.2),
    }
    return image, rng


def select(name, image, **parameters):
    tensors = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in image.items()}
    if "tower_attention" in image:
        tower = (tensors.pop(f"tower_{part}") for part in ("attention", "states", "keys"))
        has_class_token = tensors.pop("tower_has_class_token", True)
        tensors["tower"] = TowerSignals(*tower, project=None, has_class_token=has_class_token)
    return method(name, **parameters).select(SimpleNamespace(**tensors, final_norm=lambda states: states * 2)).tolist()


def restated(name, image, **parameters):
    facts = method_oracles.Image(**image)
    facts.normed, facts.normed_text = facts.hidden_states, facts.text_states
    return getattr(method_oracles, name)(facts, **asdict(METHODS[name].Parameters(**parameters)))


@pytest.mark.parametrize("name", CHECKED)
def test_each_method_equals_its_restatement(name):
    num_different_sizes = set()
    for seed in range(RANDOM_CASES):
        image, rng = random_image(seed)
        parameters = {}
        if name == "dart":
            parameters = {"num_image_pivots": int(rng.integers(1, 6)), "num_text_pivots": int(rng.integers(0, 6))}
        if name == "cdpruner":
            parameters = {"relevance_weight": float(rng.choice([0, 0.5, 1]))}
        if name == "saint":
            parameters = {"similarity_threshold": rng.uniform(0.3, 0.9), "min_neighbours": int(rng.integers(1, 6))}
        if name == "holov":
            parameters = {"num_crops": int(rng.integers(0, 7)), "context_weight": float(rng.uniform(0, 2))}
        if name == "scope":
            parameters = {"saliency_power": float(rng.choice([0.3, 0.5, 1, 3]))}  # with 0, pairs tie
        if name == "vispruner":
            parameters = {"important_share": float(rng.uniform(0, 1))}
        if name == "visionzip":
            parameters = {"contextual_share": float(rng.choice([0, 0.15, 0.5, 1]))}
        if name == "restore":
            parameters = {"selector": str(rng.choice(["divprune", "vispruner", "holov"]))}
        if name == "btp":
            image["stage"] = int(rng.integers(0, 3))
            parameters = {"schedule": str(rng.choice(["llava", "qwen2_5_vl"]))}
        found = select(name, image, **parameters)
        assert found == restated(name, image, **parameters), f"seed {seed}"
        assert len(set(found)) == len(found) and (name == "saint" or len(found) == image["num_keep"])
        num_different_sizes.add(len(found))
    assert len(num_different_sizes) > 8


# The vectors that a second restatement of the same papers prints, on inputs made of sines


def waves(rows, width, a=0.7, b=0.37, c=1.3):
    row, column = np.arange(rows)[:, None].astype(float), np.arange(width)[None].astype(float)
    return np.sin(a * row * (1 + 0.1 * column) + b * column) + 0.25 * np.cos(c * row + 0.11 * column * row)


def test_recorded_vectors():
    features, question = waves(24, 16), waves(1, 16, a=0.2, b=0.9)
    assert select("divprune", {"hidden_states": features, "num_keep": 8}) == [8, 10, 20, 22, 1, 6, 4, 17]
    image = {"hidden_states": features, "text_states": question, "num_keep": 8}
    assert select("cdpruner", image) == [8, 9, 4, 0, 16, 23, 13, 20]
    features, question = torch.from_numpy(features), torch.from_numpy(question)
    against = -(unit(features) @ unit(question).T)[:, 0]
    order = greedy_map(unit(features), method("cdpruner").weights(against), 8)
    assert order.tolist() == [6, 11, 10, 5, 21, 22, 18, 1]
    states, keys = waves(40, 16), waves(40, 16, a=0.45, b=0.8, c=0.6)
    image = {
        "hidden_states": states[5:29],
        "keys": keys[None, 5:29],
        "text_states": np.concatenate([states[:5], states[29:]]),
        "text_keys": np.concatenate([keys[:5], keys[29:]])[None],
        "is_after": np.arange(16) >= 5,
        "num_keep": 12,
    }
    kept = sorted(token + 5 for token in select("dart", image))
    assert kept == [7, 8, 9, 10, 14, 15, 16, 17, 19, 23, 24, 27]
    image = {"keys": waves(24, 3, a=0.3, b=0.9, c=0.5)[None], "indices": np.arange(24), "num_keep": 1}
    assert select("saint", image) == list(range(24))
    assert select("saint", image, min_neighbours=3) == [token for token in range(24) if token != 8]
    spread = farthest(grid_distance((6, 6), torch.arange(36)), 9, [0])
    assert spread == [0, 35, 5, 20, 30, 9, 2, 7, 12]
    scores = torch.from_numpy(np.sin(np.arange(16) * 1.7) + np.arange(16) * 0.05)
    assert rebalance(scores, 4, 8, 8) == [5, 1, 4, 12]
    assert largest(scores, 8).tolist() == [12, 8, 15, 5, 1, 9, 4, 13]
    weights = np.abs(np.sin(np.outer(np.arange(1, 4), np.arange(30))))
    weights /= weights.sum(1, keepdims=True)
    assert sorted(select("fastv", {"attention": weights.mean(0)[5:21], "num_keep": 5})) == [2, 5, 7, 10, 13]


def test_recorded_vectors_of_methods_that_look_at_the_tower():
    states, keys = waves(25, 16), waves(25, 8, a=0.45, b=0.8, c=0.6)[1:]
    attention = np.abs(np.sin(1.7 * np.arange(24) + 0.3)) + 0.05
    attention /= attention.sum()
    states = states[1:]
    tower = TowerSignals(*map(torch.from_numpy, (attention, states, keys)), project=None, has_class_token=True)
    dominant, targets, others, owner = zip_groups(tower, 5, 4)
    assert dominant.tolist() == [8, 10, 12, 21, 23] and targets.tolist() == [0, 4, 9, 15]
    joined = [others[owner == number].tolist() for number in range(4)]
    assert joined == [[1, 2], [3, 5, 13], [7, 11, 18, 19, 20, 22], [6, 14, 16, 17]]
    row = states[0] + states[joined[0]].mean(0)
    np.testing.assert_allclose(row[:3], [1.437569, 1.466278, 1.140546], atol=1e-6)
    image = {"tower_attention": attention, "tower_states": states, "tower_keys": keys, "hidden_states": states}
    assert select("visionzip", image | {"num_keep": 9}, contextual_share=4 / 9) == [8, 10, 12, 21, 23, 0, 4, 9, 15]
    image["num_keep"] = 8
    assert select("scope", image) == [10, 8, 21, 19, 6, 17, 12, 1]
    assert select("scope", image, saliency_power=0.5) == [10, 8, 16, 6, 21, 19, 1, 4]
    assert select("scope", image, saliency_power=3.0) == [10, 8, 21, 19, 12, 23, 6, 1]
    assert sorted(select("holov", image, num_crops=4)) == [1, 3, 4, 10, 12, 14, 17, 21]
    assert select("holov", image | {"num_keep": 9}, num_crops=5) == [1, 3, 8, 6, 10, 12, 19, 17, 21]
    hot = np.where(np.arange(24) < 6, 1.0, 0.01) + 0.001 * np.arange(24)
    hot = image | {"tower_attention": hot / hot.sum()}
    assert sorted(select("holov", hot, num_crops=4)) == [0, 1, 2, 3, 4, 5, 17, 23]
    kept = [0, 1, 2, 4, 6, 8, 10, 11, 12, 13, 15, 17, 19, 21, 22, 23]
    assert sorted(select("vispruner", image | {"num_keep": 16})) == kept
    wide = {"tower_states": waves(48, 16), "tower_attention": np.abs(np.cos(0.9 * np.arange(48))) + 0.01, "num_keep": 16}
    wide["tower_keys"] = wide["tower_states"]
    kept = select("vispruner", wide)
    assert sorted(kept[:8]) == [0, 7, 14, 21, 28, 35, 42, 45] and kept[8:] == [13, 37, 2, 6, 4, 11, 29, 47]
    kept = [0, 3, 6, 7, 8, 10, 11, 14, 20, 21, 24, 25, 27, 29, 43, 47]
    assert sorted(select("vispruner", wide, important_share=0.25)) == kept
    wide["tower_states"], wide["num_keep"] = waves(49, 16)[1:] + 0.5, 15
    assert select("prunesid", wide) == [42, 31, 24, 32, 35, 38, 41, 15, 21, 18, 45, 0, 3, 7, 14]
    image["tower_states"], image["num_keep"] = states + 0.5, 11
    assert select("prunesid", image) == [23, 20, 1, 17, 10, 8, 6, 21, 19, 12, 14]


# Invariants


def test_max_min_never_chooses_twice_and_chooses_prefixes():
    distinct = waves(7, 5)
    features = {"hidden_states": distinct[np.arange(30) % 7], "num_keep": 20}
    assert len(set(select("divprune", features))) == 20
    features = waves(40, 6)
    order = select("divprune", {"hidden_states": features, "num_keep": 30})
    assert select("divprune", {"hidden_states": features, "num_keep": 12}) == order[:12]
    scaled = features * np.linspace(0.1, 9, 40)[:, None]
    assert select("divprune", {"hidden_states": scaled, "num_keep": 30}) == order


def test_a_determinantal_process_of_orthogonal_tokens_takes_the_relevant_ones():
    features, weights = torch.eye(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.1
    assert greedy_map(features, weights, 4).tolist() == largest(weights, 4).tolist()
    repeated = torch.cat([features[:3]] * 3)  # a rank of three
    order = greedy_map(repeated, weights, 6).tolist()
    assert len(set(order)) == 6 and len({token % 3 for token in order[:3]}) == 3
    constant = torch.ones(5, dtype=torch.float64)
    assert torch.equal(method("cdpruner").weights(constant), constant)


def test_dart_keeps_pivots_and_ignores_the_scale_of_states():
    image, rng = random_image(3)
    image["num_keep"] = 10
    kept = select("dart", image)
    norms = np.abs(image["keys"]).sum(axis=(0, 2))
    assert kept[:4] == np.argsort(-norms)[:4].tolist()
    image["hidden_states"] = image["hidden_states"] * rng.uniform(0.1, 9, (len(image["hidden_states"]), 1))
    assert select("dart", image) == kept
    image["is_after"][:] = False
    assert select("dart", image, num_image_pivots=10) == np.argsort(-norms)[:10].tolist()


def test_saint_drops_half_of_equal_tokens_and_nothing_above_the_threshold():
    image = {"keys": np.ones((1, 20, 4)), "indices": np.arange(20), "num_keep": 1}
    assert select("saint", image) == list(range(1, 20, 2))
    assert select("saint", image | {"num_keep": 15}) == sorted([*range(1, 20, 2), *range(10, 20, 2)])
    assert select("saint", image, similarity_threshold=1.5) == list(range(20))


def test_schedules_of_the_papers_and_their_scaling():
    btp, pyramid = method("btp"), method("pyramiddrop")
    qwen = METHODS["btp"](METHODS["btp"].Parameters(schedule="qwen2_5_vl"), 2, 28)
    assert qwen.stage_layers() == (3, 6, 15, 22)
    assert qwen.counts(800, round(800 * 0.185)) == (400, 200, 100, 0)
    assert btp.stage_layers() == (3, 6, 14, 22) and pyramid.stage_layers() == (8, 16, 24)
    assert btp.counts(576, round(576 * 0.1437)) == (289, 144, 48, 0)  # the authors' 288, 144, 48, 0, up to rounding
    assert pyramid.counts(576, 168) == (288, 144, 72)
    for name in METHODS:
        for num_layers in (2, 4, 5, 24, 28, 32, 36, 80):
            scaled = METHODS[name](METHODS[name].Parameters(), 1, num_layers)
            layers = scaled.stage_layers()
            assert list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < num_layers
    for budget in (6, 30, 64, 128, 192, 300):
        for scaled in (btp, pyramid):
            counts, ends = scaled.counts(576, budget), (*scaled.stage_layers()[1:], NUM_LAYERS)
            widths = np.subtract(ends, scaled.stage_layers())
            assert abs(np.dot(widths, counts) / widths.sum() - budget) < 1 and sorted(counts, reverse=True) == list(counts)


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match="num_image_pivots must be an integer >= 1, but is 0"):
        METHODS["dart"].Parameters(num_image_pivots=0)
    with pytest.raises(ValueError, match=r"relevance_weight must be a number in \[0, 1\], but is nan"):
        METHODS["cdpruner"].Parameters(relevance_weight=float("nan"))
