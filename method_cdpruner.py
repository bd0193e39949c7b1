"""CDPruner as a pruning method."""

import math
from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, number, unit


@dataclass(frozen=True)
class CDPrunerParameters(MethodParameters):
    """Parameters of CDPruner.

    Args:
        relevance_weight: theta in [0, 1]: 0 is diversity alone; below 1 the relevance r becomes
            exp(theta r / (2 (1 - theta))); 1 takes r itself, as the authors' code does.
    """

    relevance_weight: float = 1.0

    legal = {"relevance_weight": number(0, 1)}


class CDPruner(PruningMethod):
    """Keep tokens that are far apart and belong to the question, before the decoder: greedy MAP of a determinantal point
    process (CDPruner, arXiv 2506.10967).

    Kernel diag(r) S diag(r), with S the cosines of the projected features and r their relevance, min-max normalised within the
    image; greedy by Cholesky factors.

    Deviations: the relevance is that of the port in OpenVINO GenAI, for every family: the mean cosine of a token's features
    with the embeddings of the text in its row. The authors take CLIP's text tower for LLaVA, with the sign turned, which a
    vision-language checkpoint does not hold. A constant relevance counts as 1; where the rank of S is reached, what is left of
    the variance is below 1e-10, and the rest is filled by relevance (the authors' code goes on with NaN).
    """

    Parameters = CDPrunerParameters
    looks_at = frozenset({"text"})

    def stage_layers(self):
        return (0,)

    def select(self, image):
        features, text = unit(image.hidden_states), unit(image.text_states)
        relevance = (features @ text.T).mean(1) if len(text) else features.new_ones(len(features))
        return greedy_map(features, self.weights(relevance), image.num_keep)

    def weights(self, relevance: torch.Tensor) -> torch.Tensor:
        """r of the kernel, from the raw relevance [n]."""
        low, high = relevance.aminmax()
        scaled = (relevance - low + 1e-6) / (high - low) if high - low > 1e-12 else torch.ones_like(relevance)
        theta = self.parameters.relevance_weight
        return scaled if theta == 1 else torch.exp(theta / (2 * (1 - theta)) * scaled)


def greedy_map(features: torch.Tensor, weights: torch.Tensor, num_keep: int) -> torch.LongTensor:
    """The set of `num_keep` tokens that greedily maximises the determinant of diag(r) F F^T diag(r) (Chen et al. 2018).

    Args:
        features: [n, d] float64, of length 1.
        weights: [n] float64, r > 0.
    """
    rows = features * weights[:, None]
    variance, factors, order = weights.square(), rows.new_zeros(num_keep, len(rows)), []
    for step in range(num_keep):
        token = int(variance.argmax())
        if variance[token] < 1e-10:
            rest = weights.index_fill(0, torch.tensor(order, dtype=torch.long, device=rows.device), -math.inf)
            order += rest.sort(descending=True, stable=True).indices[: num_keep - step].tolist()
            break
        order.append(token)
        factor = (rows @ rows[token] - factors[:step, token] @ factors[:step]) / variance[token].sqrt()
        factors[step] = factor
        variance = variance - factor.square()
        variance[token] = -math.inf
    return torch.tensor(order, device=rows.device)
