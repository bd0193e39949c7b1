"""DART as a pruning method."""

from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, count, largest, unit


@dataclass(frozen=True)
class DARTParameters(MethodParameters):
    """Parameters of DART.

    Args:
        num_image_pivots: image tokens of largest key norm, >= 1.
        num_text_pivots: the same of the text after the image, >= 0.
    """

    num_image_pivots: int = 4
    num_text_pivots: int = 4

    legal = {"num_image_pivots": count(1), "num_text_pivots": count(0)}


class DART(PruningMethod):
    """Keep what duplicates the pivots least (DART, arXiv 2502.11494, K = `pruning_layer` = 2).

    Pivots are the tokens whose keys in the layer below have the largest L1 norm, of the image and of the text after it. Each
    pivot in turn takes the image tokens of smallest cosine with it, of the hidden states after the decoder's last norm.

    Deviations: the budget is exact, with the rest of T - pivots over the pivots going to the first ones, where the authors keep
    8 * floor(.) + 4; pivots come in the order of their norms, image before text, where the authors' order is that of a set of
    Python; where fewer text tokens follow the image, there are fewer text pivots.
    """

    Parameters = DARTParameters
    looks_at = frozenset({"keys", "text"})

    def select(self, image):
        pivots = largest(_norms(image.keys), min(self.parameters.num_image_pivots, image.num_keep))
        text = image.is_after.nonzero()[:, 0]
        text = text[largest(_norms(image.text_keys[:, text]), self.parameters.num_text_pivots)]
        states = unit(image.final_norm(image.hidden_states))
        directions = torch.cat([states[pivots], unit(image.final_norm(image.text_states[text]))])
        similarity = directions @ states.T
        similarity[:, pivots] = torch.inf
        order, missing = [pivots], image.num_keep - len(pivots)
        for number, row in enumerate(similarity):
            share = missing // len(similarity) + (number < missing % len(similarity))
            order.append(row.sort(stable=True).indices[:share])
            similarity[:, order[-1]] = torch.inf
        return torch.cat(order)


def _norms(keys: torch.Tensor) -> torch.Tensor:
    """L1 norm of each token's key over all heads, [heads, n, head_dim] to [n]."""
    return keys.double().abs().sum(dim=(0, 2))
