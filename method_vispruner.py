"""VisPruner as a pruning method."""

from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, largest, number, unit


@dataclass(frozen=True)
class VisPrunerParameters(MethodParameters):
    """Parameters of VisPruner.

    Args:
        important_share: what of the budget goes to the most attended patches, r; in [0, 1]. 1 is FasterVLM.
    """

    important_share: float = 0.5

    legal = {"important_share": number(0, 1)}


class VisPruner(PruningMethod):
    """Keep attended patches, and of the rest those without a duplicate, before the decoder (VisPruner, arXiv 2412.01818).

    The rest, by attention, is split into every first and every second one; up to eight of the first with the most similar
    partner among the second leave, round after round. Attention of the class token, or received where there is none, as
    `tower_signals.py` says; cosines of the tower's states before the projector.

    Deviation: a round drops at most as many as the first half has, where the authors' code fails on odd or small rests.
    """

    Parameters = VisPrunerParameters
    looks_at = frozenset({"tower"})

    def stage_layers(self):
        return (0,)

    def select(self, image):
        states = unit(image.tower.states)
        ranked = largest(image.tower.attention, len(states))
        num_important = int(image.num_keep * self.parameters.important_share)
        important, rest = ranked[:num_important], ranked[num_important:]
        num_diverse = image.num_keep - num_important
        while len(rest) > num_diverse > 0:
            first, second = rest[0::2], rest[1::2]
            duplicates = (states[first] @ states[second].T).amax(1)
            num_drop = min(8, len(rest) - num_diverse, len(first))
            rest = torch.cat([first[largest(duplicates, len(first))[num_drop:]], second])
        return torch.cat([important, rest[:num_diverse]])
