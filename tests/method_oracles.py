"""Each pruning method once more, in NumPy and float64, written from its paper's algorithm: what the tests compare with.

Each takes an `Image` and returns the kept tokens in order of selection; ties go to the lower index.
"""

from dataclasses import dataclass, replace

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
    tower_has_class_token: bool = True
    keeps_last: bool = False


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


def cdpruner(image, relevance_weight=1.0, text_tower=None, relevance=None):
    """The greedy set of the largest determinant, by determinants."""
    features = unit(image.hidden_states)
    relevance = (features @ unit(image.text_states).T).mean(1) if relevance is None else relevance
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


def btp(image, schedule="llava"):
    if image.num_keep == 0:
        return []
    if schedule == "llava":
        quotas = (86 / 288, 86 / 288, 318 / 86, 1 / 2), (14 / 144, 129 / 144, 193 / 129, 0), (0, 1, 57 / 48, 0)
    else:
        quotas = (0, 0.12, 1, 0), (0, 0.4, 1, 0), (0, 1, 1.2, 0)
    quota = quotas[image.stage]
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


def visionzip(image, contextual_share=10 / 64):
    num_contextual = min(max(1, round(image.num_keep * contextual_share)), image.num_keep) if contextual_share else 0
    dominant, targets, _ = zipped(image, num_contextual)
    return dominant + targets


def zipped(image, num_contextual):
    """Dominant patches, targets, and for each target what is merged into it."""
    attention, keys = image.tower_attention, image.tower_keys
    dominant = sorted(top(attention, image.num_keep - num_contextual))
    rest = [token for token in range(len(attention)) if token not in dominant]
    step = max(1, len(rest) // max(num_contextual, 1))
    targets = [rest[step * number] for number in range(num_contextual)]
    joined = {target: [] for target in targets}
    for token in rest if targets else []:
        if token not in targets:
            cosines = [unit(keys[token]) @ unit(keys[target]) for target in targets]
            joined[targets[int(np.argmax(cosines))]].append(token)
    return dominant, targets, joined


def scope(image, saliency_power=1.0):
    attention, states = image.tower_attention, image.tower_states
    similarity, chosen = unit(states) @ unit(states).T, []
    for _ in range(image.num_keep):
        covered = similarity[chosen].max(0).clip(0) if chosen else np.zeros(len(states))
        gains = [
            -np.inf if token in chosen else np.maximum(similarity[token] - covered, 0).sum() * weight
            for token, weight in enumerate(attention**saliency_power)
        ]
        chosen.append(int(np.argmax(gains)))
    return chosen


def vispruner(image, important_share=0.5):
    attention, states = image.tower_attention, image.tower_states
    ranked, directions = top(attention, len(states)), unit(states)
    important = ranked[: int(image.num_keep * important_share)]
    rest, number = ranked[len(important) :], image.num_keep - len(important)
    while len(rest) > number > 0:
        first, second = rest[::2], rest[1::2]
        worst = [max(directions[token] @ directions[other] for other in second) for token in first]
        ranks = top(np.array(worst), len(first))
        rest = [first[place] for place in ranks[min(8, len(rest) - number, len(first)) :]] + second
    return important + rest[:number]


def holov(image, num_crops=0, context_weight=0.09):
    attention, features = image.tower_attention, image.hidden_states
    number = len(attention)
    runs = num_crops or max(1, int(1024 / 576 * number / image.num_keep))
    sizes = [number // runs + (run < number % runs) for run in range(runs)]
    ends = np.cumsum(sizes)
    parts = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True) if size]
    scores = []
    for part in parts:
        if len(part) == 1:
            scores.append(attention[part[0]])
            continue
        rows = features[part] / (np.linalg.norm(features[part], axis=1, keepdims=True) + 1e-6)
        similar = rows @ rows.T
        np.fill_diagonal(similar, 0)
        mean = similar.sum(1) / (len(part) - 1)
        variance = ((similar - mean[:, None]) ** 2).sum(1) / (len(part) - 1)
        a = attention[part] * 1e3
        scores.append(np.mean(a + context_weight * variance * a.mean() / (variance.mean() + 1e-6)))
    weights = np.array(scores) / (np.sum(scores) + 1e-6)
    quotas = np.floor(weights * image.num_keep).astype(int)
    for part in top(weights, image.num_keep - quotas.sum()):
        quotas[part] += 1
    room = np.array([len(part) for part in parts])
    quotas = np.minimum(quotas, room)
    while quotas.sum() < image.num_keep:
        open_parts = [part for part in top(weights, len(parts)) if quotas[part] < room[part]]
        for part in open_parts[: image.num_keep - quotas.sum()]:
            quotas[part] += 1
    return [int(part[place]) for part, quota in zip(parts, quotas, strict=True) for place in top(attention[part], quota)]


def prunesid(image, **_):
    attention, states = image.tower_attention, image.tower_states
    has_class_token, num_tokens = image.tower_has_class_token, len(states)
    need = image.num_keep + has_class_token
    number = max(1, need // 4) if has_class_token else max(4, need // 4)
    scaled = (1 / (1 + np.exp(-states))).T
    scaled = scaled - scaled.mean(0)
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    kept = np.abs(vectors[:, np.argsort(-values)][:, : min(number, *scaled.shape)])
    groups = kept.argmax(1)
    similar = unit(states) @ unit(states).T
    if has_class_token:
        pairs = [similar[i, j] for i in range(num_tokens) for j in range(i + 1, num_tokens)]
        threshold = need / 32 * np.mean(pairs)
    else:
        attention = kept[np.arange(num_tokens), groups]
        pairs = [similar[i, j] for i in range(num_tokens) for j in range(i, num_tokens)]
        threshold = max(1, 18 * need / num_tokens) * np.sum(pairs) / num_tokens**2
    orders, distinct_counts = [], []
    for group in range(groups.max() + 1):
        alive = {token: attention[token] for token in np.flatnonzero(groups == group)}
        picks = []
        while alive:
            best = min(alive, key=lambda token: (-alive[token], token))
            picks.append(best)
            alive = {token: a for token, a in alive.items() if token != best and similar[best, token] <= threshold}
        others = [token for token in np.flatnonzero(groups == group) if token not in picks]
        orders.append(picks + sorted(others, key=lambda token: (-attention[token], token)))
        distinct_counts.append(len(picks))
    sizes, counts = np.array([len(order) for order in orders]), np.array(distinct_counts)
    low, up = np.minimum(1, sizes), np.minimum(np.minimum(5 * -(-need // 64), sizes), counts)
    while up.sum() < need and (up < sizes).any():
        up = np.minimum(up + 1, sizes)
    total = need - has_class_token
    rest = max(0, total - low.sum())
    quotas = np.minimum(np.diff(np.round(np.cumsum(counts) * rest / counts.sum()), prepend=0).astype(int) + low, up)
    for group in np.argsort(-counts, kind="stable"):
        quotas[group] += max(0, min(up[group] - quotas[group], total - quotas.sum()))
    chosen = [int(token) for order, quota in zip(orders, quotas, strict=True) for token in order[:quota]]
    return chosen[:total]


def restore(image, selector="divprune", attention_correction="full"):
    return [place_of(group, image) for group in restored(image, selector)]


def place_of(group, image):
    last = len(image.hidden_states) - 1
    return last if image.keeps_last and last in group else group[(len(group) - 1) // 2]


def restored(image, selector="divprune"):
    """The groups, ascending members each: those of the selector in its order, then those of the anchors by score."""
    half, number = replace(image, num_keep=image.num_keep // 2), len(image.hidden_states)
    kept = {"divprune": divprune, "vispruner": vispruner, "holov": holov}[selector](half) if half.num_keep else []
    pool = [token for token in range(number) if token not in kept]
    similar = unit(image.hidden_states[pool]) @ unit(image.hidden_states[pool]).T
    density, scores = similar.sum(1), []
    for token, row in enumerate(similar):
        sparser = [row[other] for other in range(len(pool)) if density[other] < density[token]]
        scores.append(density[token] * (1 - max(sparser, default=0)))
    anchors = top(np.array(scores), image.num_keep - len(kept))
    groups = {anchor: [pool[anchor]] for anchor in anchors}
    for token, row in enumerate(similar):
        if token not in anchors:
            groups[max(sorted(anchors), key=lambda anchor: row[anchor])].append(pool[token])
    return [[token] for token in kept] + [sorted(groups[anchor]) for anchor in anchors]


def rope_decay(distance, dim=128, base=10000.0):
    return np.mean([np.cos(distance * base ** (-2 * t / dim)) for t in range(dim // 2)], axis=0)


def restore_bias(positions, sizes, is_prompt=True, dim=128, base=10000.0):
    """What is added to the logits of each query (rows) and key, -inf at later keys; of a prompt's queries with distance."""
    apart = np.abs(np.subtract.outer(positions, positions)).astype(float)
    bias = np.log(np.asarray(sizes, float)) + np.where(np.asarray(is_prompt), np.log(2 - rope_decay(apart, dim, base)).T, 0).T
    return np.where(np.tri(len(bias), dtype=bool), bias, -np.inf)
