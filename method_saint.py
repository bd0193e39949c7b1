"""SAINT as a pruning method."""

from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, count, largest, number, unit


@dataclass(frozen=True)
class SAINTParameters(MethodParameters):
    """Parameters of SAINT.

    Args:
        similarity_threshold: cosine from which two tokens count as alike, tau; in [-1, 2], above 1 nothing is pruned.
        min_neighbours: alike tokens that make a token redundant, K_n; >= 1.
        sharpness: weight of their mean similarity in the score, gamma; in [0, 1000].
    """

    similarity_threshold: float = 0.83
    min_neighbours: int = 5
    sharpness: float = 10.0

    legal = {"similarity_threshold": number(-1, 2), "min_neighbours": count(1), "sharpness": number(0, 1000)}


class SAINT(PruningMethod):
    """Drop what has many alike, layer after layer (SAINT, arXiv 2503.11549, the mode in the language model).

    After each of layers 7 to 16 of 32 (scaled to the decoder), the tokens at even places are compared with those at odd ones by
    the cosine of their keys in the layer below, mean over heads. As many even tokens leave as have at least K_n alike, those of
    the highest score first.

    The number is the content's own. `pruning_ratio` bounds it: no stage goes below the budget, and with nothing alike nothing
    leaves.

    Deviations: each image has its own count, where the authors share one over a batch; padding is masked; positions while
    decoding are those of the sequence, where the authors' are one off above the first layers.
    """

    Parameters = SAINTParameters
    looks_at = frozenset({"keys"})
    counts_are_known = False

    def stage_layers(self):
        first, last = (max(1, round(layer * self.num_layers / 32)) for layer in (8, 17))
        return tuple(range(first, min(last, self.num_layers - 1) + 1))

    def counts(self, num_visual, num_keep):
        return (num_keep,) * len(self.stage_layers())

    def select(self, image):
        tau, sharpness = self.parameters.similarity_threshold, self.parameters.sharpness
        num_tokens = len(image.indices)
        everything = torch.arange(num_tokens, device=image.keys.device)
        keys = unit(image.keys.double().mean(0))
        similarity = keys[0::2] @ keys[1::2].T
        is_alike = similarity >= tau
        alike = is_alike.sum(1)
        num_drop = min(int((alike >= self.parameters.min_neighbours).sum()), num_tokens - image.num_keep)
        if num_drop <= 0:
            return everything
        mean_alike = (similarity * is_alike).sum(1) / alike.clamp_min(1)
        score = torch.where(alike > 0, alike * torch.exp(sharpness * (mean_alike - tau)), similarity.mean(1))
        is_kept = torch.ones(num_tokens, dtype=torch.bool, device=keys.device)
        is_kept[2 * largest(score, num_drop)] = False
        return everything[is_kept]
