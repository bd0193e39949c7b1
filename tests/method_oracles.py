"""Each pruning method once more, in NumPy and float64, written from its paper's algorithm: what the tests compare with.

Each takes an `Image` and returns the kept tokens in order of selection; ties go to the lower index.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Image:
    """What `pruning_method.ImageTokens` has, as arrays; what a method does not look at may be missing."""

    num_keep: int
    hidden_states: np.ndarray
    keys: np.ndarray = None
    grid: tuple = ()
    indices: np.ndarray = None
    stage: int = 0
    attention: np.ndarray = None
    logits: np.ndarray = None
    text_states: np.ndarray = None
    text_keys: np.ndarray = None
    is_after: np.ndarray = None
    normed: np.ndarray = None
    normed_text: np.ndarray = None
    tower_attention: np.ndarray = None
    tower_states: np.ndarray = None
    tower_keys: np.ndarray = None


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def top(values, number):
    return np.argsort(-values, kind="stable")[:number].tolist()


def fastv(image, **_):
    return top(image.attention, image.num_keep)


pyramiddrop = fastv


def dart(image, num_image_pivots=4, num_text_pivots=4):
    norm = lambda keys: np.abs(keys).sum(axis=(0, 2))  # noqa: E731
    pivots = top(norm(image.keys), min(num_image_pivots, image.num_keep))
    after = np.flatnonzero(image.is_after)
    text = after[top(norm(image.text_keys[:, after]), num_text_pivots)]
    states, free = unit(image.normed), [token for token in range(len(image.normed)) if token not in pivots]
    directions = [states[pivot] for pivot in pivots] + [row / np.linalg.norm(row) for row in image.normed_text[text]]
    kept, missing = list(pivots), image.num_keep - len(pivots)
    for number, direction in enumerate(directions):
        share = missing // len(directions) + (1 if number < missing % len(directions) else 0)
        ranked = sorted(free, key=lambda token: (states[token] @ direction, token))[:share]
        kept += ranked
        free = [token for token in free if token not in ranked]
    return kept


def max_min(distance, number, chosen=()):
    chosen, others = list(chosen), distance + np.diag(np.full(len(distance), np.inf))
    while len(chosen) < number:
        value = distance[chosen].min(0) if chosen else others.min(0)
        value = np.where(np.isin(np.arange(len(distance)), chosen), -np.inf, value)
        chosen.append(int(value.argmax()))
    return chosen[:number]


def divprune(image, **_):
    features = unit(image.hidden_states)
    return max_min(1 - features @ features.T, image.num_keep)


def cdpruner(image, relevance_weight=1.0):
    """The greedy set of the largest determinant, by determinants."""
    features = unit(image.hidden_states)
    relevance = (features @ unit(image.text_states).T).mean(1)
    scaled = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    if relevance_weight < 1:
        scaled = np.exp(relevance_weight / (2 * (1 - relevance_weight)) * scaled)
    kernel, chosen = scaled[:, None] * (features @ features.T) * scaled, []
    np.fill_diagonal(kernel, scaled**2)  # exactly, so that equal relevance ties
    for _ in range(image.num_keep):
        volumes = [
            -np.inf if token in chosen else np.linalg.slogdet(kernel[np.ix_([*chosen, token], [*chosen, token])])[1]
            for token in range(len(kernel))
        ]
        chosen.append(int(np.argmax(volumes)))
    return chosen


def saint(image, similarity_threshold=0.83, min_neighbours=5, sharpness=10.0):
    keys, number = unit(image.keys.mean(0)), image.keys.shape[1]
    scores = {}
    num_drop = 0
    for even in range(0, number, 2):
        similar = np.array([keys[even] @ keys[odd] for odd in range(1, number, 2)])
        alike = similar[similar >= similarity_threshold]
        num_drop += len(alike) >= min_neighbours
        if len(alike):
            scores[even] = len(alike) * np.exp(sharpness * (alike.mean() - similarity_threshold))
        else:
            scores[even] = similar.mean() if len(similar) else 0.0
    num_drop = max(0, min(num_drop, number - image.num_keep))
    dropped = sorted(scores, key=lambda token: (-scores[token], token))[:num_drop]
    return [token for token in range(number) if token not in dropped]


def btp(image, **_):
    if image.num_keep == 0:
        return []
    quota = {
        0: (86 / 288, 86 / 288, 318 / 86, 1 / 2),
        1: (14 / 144, 129 / 144, 193 / 129, 0),
        2: (0, 1, 57 / 48, 0),
    }[image.stage]
    spread, attended, candidates, spatial = quota
    states, number = unit(image.hidden_states), len(image.hidden_states)
    distance = 1 - states @ states.T
    kept = max_min(distance, round(spread * image.num_keep))
    num_attended = round(attended * image.num_keep)
    best = top(image.logits, round(candidates * num_attended))
    early = [token for token in best if token < number // 2]
    kept += (early + [token for token in best if token >= number // 2])[:num_attended]
    if num_spatial := round(spatial * image.num_keep):
        places = np.stack(np.unravel_index(image.indices, image.grid), axis=1)
        kept += max_min(np.abs(places[:, None] - places).sum(-1).astype(float), num_spatial, [0])
    kept = list(dict.fromkeys(kept))[: image.num_keep]
    return max_min(distance, image.num_keep, kept)
