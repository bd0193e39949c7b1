"""SCOPE as a pruning method."""

from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, number, unit


@dataclass(frozen=True)
class SCOPEParameters(MethodParameters):
    """Parameters of SCOPE.

    Args:
        saliency_power: exponent of the attention, alpha; in [0, 100]. 0 leaves coverage alone.
    """

    saliency_power: float = 1.0

    legal = {"saliency_power": number(0, 100)}


class SCOPE(PruningMethod):
    """Keep attended patches that cover what is not covered yet, before the decoder (SCOPE, arXiv 2510.24214).

    Greedy: the patch of largest a^alpha * sum_i max(0, S_ij - covered_i), where S are cosines of the tower's states before the
    projector and a the attention that each gets in it (`tower_signals.py`).

    Deviation: each grid of an image has a budget of its own, as the authors' LLaVA-NeXT code does per tile.
    """

    Parameters = SCOPEParameters
    looks_at = frozenset({"tower"})

    def stage_layers(self):
        return (0,)

    def select(self, image):
        states = unit(image.tower.states)
        similarity = states @ states.T
        weight = image.tower.attention.double() ** self.parameters.saliency_power
        covered, is_kept, order = torch.zeros_like(weight), torch.zeros(len(weight), dtype=torch.bool), []
        is_kept = is_kept.to(weight.device)
        for _ in range(image.num_keep):
            gain = (similarity - covered[:, None]).clamp_min_(0).sum(0) * weight
            order.append(int(gain.masked_fill(is_kept, -torch.inf).argmax()))
            is_kept[order[-1]] = True
            covered = torch.maximum(covered, similarity[order[-1]])
        return torch.tensor(order, device=weight.device)
