"""BTP as a pruning method."""

from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, choice, farthest, largest, unit


# The authors' schedules: the number of decoder layers they are for, and of each stage its layer, the share of the image that is
# left, and of that what comes by max-min on hidden states, by attention (and how many candidates it has, as a multiple), and by
# max-min on the grid.
SCHEDULES = {
    "llava": (
        32,
        (
            (3, 1 / 2, 86 / 288, 86 / 288, 318 / 86, 144 / 288),
            (6, 1 / 4, 14 / 144, 129 / 144, 193 / 129, 0.0),
            (14, 1 / 12, 0.0, 1.0, 57 / 48, 0.0),
            (22, 0.0, 0.0, 0.0, 0.0, 0.0),
        ),
    ),
    "qwen2_5_vl": (
        28,
        (
            (3, 1 / 2, 0.0, 0.12, 1.0, 0.0),
            (6, 1 / 4, 0.0, 0.4, 1.0, 0.0),
            (15, 1 / 8, 0.0, 1.0, 1.2, 0.0),
            (22, 0.0, 0.0, 0.0, 0.0, 0.0),
        ),
    ),
}


@dataclass(frozen=True)
class BTPParameters(MethodParameters):
    """Parameters of BTP.

    Args:
        schedule: whose stages and shares, "llava" (LLaVA-1.5) or "qwen2_5_vl". Models of Qwen's kind have the second unless
            it is set, all others the first.
    """

    schedule: str = "llava"

    legal = {"schedule": choice(*SCHEDULES)}


class BTP(PruningMethod):
    """Spread tokens first, attended ones later, none at the end: balanced token pruning (BTP, arXiv 2505.22038).

    Four stages, at layers 3, 6, 14 and 22 of 32 for LLaVA-1.5, and at 3, 6, 15 and 22 of 28 for Qwen2.5-VL. Each keeps the
    union of tokens far apart in hidden states, of those with the highest logits of the last query in the layer below (the
    first half of the image before the second), and of those far apart on the grid, in shares that the schedule says; what is
    missing is filled by max-min. The last stage drops the image. The authors' schedules are those of a `pruning_ratio` of
    0.856 (LLaVA-1.5) and 0.815 (Qwen2.5-VL); others scale the counts.

    Deviations: the authors calibrate a schedule for each model on training data and give these two. Other models have no
    calibration of their own: they take the nearer one, with its layers scaled to the decoder's depth, which is a guess. Counts
    are shares of the budget, rounded, where the authors' are truncated. A token is counted once in the union, where the
    authors' second stage may keep it twice; quotas that make more than the budget are cut, where the authors' code prints
    "Bug!" and goes on. The first half is the half of what is left, as their paper says; their code passes the budget, which is
    that but for LLaVA's third stage.
    """

    Parameters = BTPParameters
    looks_at = frozenset({"attention"})

    @classmethod
    def defaults_for(cls, model_type):
        return {"schedule": "qwen2_5_vl"} if model_type.startswith("qwen") else {}

    def stage_layers(self):
        depth, stages = SCHEDULES[self.parameters.schedule]
        layers = []
        for layer, *_ in stages:
            layers.append(max(round(layer * self.num_layers / depth), layers[-1] + 1 if layers else 1))
        return tuple(layer for layer in layers if layer < self.num_layers)

    def stage_shares(self):
        _, stages = SCHEDULES[self.parameters.schedule]
        return tuple(share for _, share, *_ in stages[: len(self.stage_layers())])

    def select(self, image):
        _, _, spread, attended, candidates, spatial = SCHEDULES[self.parameters.schedule][1][image.stage]
        num_keep, num_tokens = image.num_keep, len(image.indices)
        distance = torch.tensor([])
        order = []
        if num_keep > 0:
            states = unit(image.hidden_states)
            distance = 1 - states @ states.T
            order += farthest(distance, round(spread * num_keep))
            num_attended = round(attended * num_keep)
            order += rebalance(image.logits, num_attended, round(candidates * num_attended), num_tokens // 2)
            if num_spatial := round(spatial * num_keep):
                order += farthest(grid_distance(image.grid, image.indices), num_spatial, [0])
        order = list(dict.fromkeys(order))[:num_keep]
        if len(order) < num_keep:
            order = farthest(distance, num_keep, order)
        return torch.tensor(order, dtype=torch.long, device=image.hidden_states.device)


def rebalance(scores: torch.Tensor, num_keep: int, num_candidates: int, boundary: int) -> list[int]:
    """Of the `num_candidates` highest scores, those at places below `boundary` before the others. Counters that RoPE favours
    late positions."""
    candidates = largest(scores, num_candidates).tolist()
    early = [token for token in candidates if token < boundary]
    return (early + [token for token in candidates if token >= boundary])[:num_keep]


def grid_distance(grid: tuple[int, ...], indices: torch.Tensor) -> torch.Tensor:
    """Manhattan distances between places of a grid, [n] to [n, n] float64."""
    places = torch.stack(torch.unravel_index(indices, grid), dim=1).double()
    return torch.cdist(places, places, p=1)
