"""PruneSID as a pruning method."""

import math

import torch

from .pruning_method import PruningMethod, largest, unit


class PruneSID(PruningMethod):
    """Group patches by principal components, suppress duplicates in each group, and share the budget among the groups, before
    the decoder (PruneSID, arXiv 2603.09480).

    With a class token in the tower, patches are ranked by its attention, and compared by the tower's states before the
    projector. Without one, tokens are ranked by how much their component weighs at them, as in the authors' Qwen2-VL code,
    whose groups and threshold these are then too; no attention counts.

    Deviations: the decomposition is exact, where the authors' is randomised and differs from run to run; quotas are rounded in
    float64, theirs in float32; the class token, which they count, has no place in the prompt, so the budget is all patches. The
    budget is the common one, where their Qwen2-VL code keeps at least 16 tokens of an image.
    """

    looks_at = frozenset({"tower"})

    def stage_layers(self):
        return (0,)

    def select(self, image):
        states = image.tower.states.double()
        directions, num_tokens = unit(states), len(states)
        similarity = directions @ directions.T
        upper = torch.triu(torch.ones_like(similarity, dtype=torch.bool), int(image.tower.has_class_token))
        if image.tower.has_class_token:
            need, others = image.num_keep + 1, 1  # the authors count the class token
            groups, _ = principal_groups(states, max(1, need // 4))
            ranks = image.tower.attention.double()
            threshold = need / 32 * similarity[upper].mean()
        else:
            need, others = image.num_keep, 0
            groups, ranks = principal_groups(states, max(4, need // 4))
            threshold = max(18 * need / num_tokens, 1) * similarity[upper].sum() / num_tokens**2
        orders, num_distinct = [], []
        for group in range(int(groups.max()) + 1):
            members = (groups == group).nonzero()[:, 0]
            ranked = members[largest(ranks[members], len(members))].tolist()
            distinct = []
            for token in ranked:
                if not distinct or bool((similarity[distinct, token] <= threshold).all()):
                    distinct.append(token)
            num_distinct.append(len(distinct))
            orders.append(distinct + [token for token in ranked if token not in distinct])
        quotas = share(need, [len(order) for order in orders], num_distinct, others)
        order = [token for tokens, quota in zip(orders, quotas, strict=True) for token in tokens[:quota]]
        return torch.tensor(order, device=states.device)


def principal_groups(states: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The principal component that weighs most at each token, tokens being the variables, and how much. [N, d] to [N] each"""
    scaled = torch.sigmoid(states).T
    components = torch.linalg.svd(scaled - scaled.mean(0), full_matrices=False).Vh[:num_groups]
    weights, groups = components.abs().max(0)
    return groups, weights


def share(need: int, sizes: list[int], num_distinct: list[int], others: int) -> list[int]:
    """How many of each group to take, `need` - `others` in all."""
    lower = [min(1, size) for size in sizes]
    upper = [min(5 * math.ceil(need / 64), size, distinct) for size, distinct in zip(sizes, num_distinct, strict=True)]
    while sum(upper) < need and upper != sizes:
        upper = [min(most + 1, size) for most, size in zip(upper, sizes, strict=True)]
    total = need - others
    rest, passed, quotas = max(0, total - sum(lower)), 0, []
    for group, (least, most) in enumerate(zip(lower, upper, strict=True)):
        reached = round(sum(num_distinct[: group + 1]) * rest / sum(num_distinct))
        quotas.append(min(least + reached - passed, most))
        passed = reached
    for group in sorted(range(len(sizes)), key=lambda group: -num_distinct[group]):
        quotas[group] += max(0, min(upper[group] - quotas[group], total - sum(quotas)))
    for group in reversed(range(len(sizes))):  # more groups than tokens to keep
        quotas[group] -= min(quotas[group], max(0, sum(quotas) - total))
    return quotas
