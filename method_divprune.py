"""DivPrune as a pruning method."""

import torch

from .pruning_method import PruningMethod, farthest, unit


class DivPrune(PruningMethod):
    """Keep tokens far apart: greedy max-min on the cosine distance of the projected features, before the decoder
    (DivPrune, arXiv 2503.02175).

    Deviations: a chosen token is never chosen again, where the authors' argmax runs over all tokens and picks duplicates twice;
    distances are taken in float64; tokens keep their original positions unless `pruning_positions` is "packed", as the authors'
    LLaVA does.
    """

    def stage_layers(self):
        return (0,)

    def select(self, image):
        features = unit(image.hidden_states)
        return torch.tensor(farthest(1 - features @ features.T, image.num_keep), device=features.device)
