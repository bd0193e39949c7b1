"""HoloV as a pruning method."""

from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, count, largest, number


@dataclass(frozen=True)
class HoloVParameters(MethodParameters):
    """Parameters of HoloV.

    Args:
        num_crops: runs of the raster that share the budget, P; 0 takes 16/9 of N / T, which is 16 for 64 of 576 tokens.
        context_weight: weight of the variance of similarities, alpha; in [0, 100].
    """

    num_crops: int = 0
    context_weight: float = 0.09

    legal = {"num_crops": count(0), "context_weight": number(0, 100)}


class HoloV(PruningMethod):
    """Share the budget among stretches of the image by their attention, and keep the attended patches of each, before the
    decoder (HoloV, arXiv 2510.02912).

    A stretch is a run of the raster, scored by the mean of 1000 a + alpha v mean(1000 a) / mean(v), a the attention that a
    patch gets in the tower and v the variance of a token's cosines within the run, of the projected features.

    Deviations: a quota is cut to its run and the rest goes to the best runs with room, where the authors append rows of zeros;
    the number of runs is that of the authors' Qwen code, which their LLaVA code sets to 16; there attention is brought into
    the order of the features, which the authors' code leaves window by window. As in theirs, v hardly matters.
    """

    Parameters = HoloVParameters
    looks_at = frozenset({"tower"})

    def stage_layers(self):
        return (0,)

    def select(self, image):
        attention, features = image.tower.attention.double(), image.hidden_states.double()
        num_runs = self.parameters.num_crops or max(1, int(1024 / 576 * len(attention) / image.num_keep))
        runs = [run for run in torch.arange(len(attention), device=features.device).tensor_split(num_runs) if len(run)]
        weights = torch.stack([self.score(attention[run], features[run]) for run in runs])
        weights = weights / (weights.sum() + 1e-6)
        room = torch.tensor([len(run) for run in runs], device=weights.device)
        quotas = (weights * image.num_keep).floor().long()
        quotas[largest(weights, int(image.num_keep - quotas.sum()))] += 1
        quotas = torch.minimum(quotas, room)
        while (missing := int(image.num_keep - quotas.sum())) > 0:
            has_room = quotas < room
            best = largest(weights.masked_fill(~has_room, -torch.inf), min(missing, int(has_room.sum())))
            quotas[best] += 1
        return torch.cat([run[largest(attention[run], quota)] for run, quota in zip(runs, quotas.tolist(), strict=True)])

    def score(self, attention: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Of one run of m tokens."""
        if len(attention) == 1:
            return attention[0]
        features = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-6)
        similarity = (features @ features.T).fill_diagonal_(0)
        others = len(attention) - 1
        mean = similarity.sum(1) / others
        variance = (similarity - mean[:, None]).square().sum(1) / others
        attention = 1000 * attention
        scale = attention.abs().mean() / (variance.abs().mean() + 1e-6)
        return (attention + self.parameters.context_weight * variance * scale).mean()
