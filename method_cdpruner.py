"""CDPruner as a pruning method."""

import math
from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, number, unit
from .text_tower import text_tower


# What the authors' benchmarks add to a question, and leave out before CLIP reads it.
INSTRUCTION = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class CDPrunerParameters(MethodParameters):
    """Parameters of CDPruner.

    Args:
        relevance_weight: theta in [0, 1]: 0 is diversity alone; below 1 the relevance r becomes
            exp(theta r / (2 (1 - theta))); 1 takes r itself, as the authors' code does.
        text_tower: folder or Hub id of the CLIP model whose vision tower the model has, for the authors' relevance; `None`
            takes the language model's own embeddings.
    """

    relevance_weight: float = 1.0
    text_tower: str | None = None

    legal = {
        "relevance_weight": number(0, 1),
        "text_tower": (
            lambda value: value is None or (isinstance(value, str) and value != ""),
            "None, or the folder or Hub id of a CLIP model",
        ),
    }


class CDPruner(PruningMethod):
    """Keep tokens that are far apart and belong to the question, before the decoder: greedy MAP of a determinantal point
    process (CDPruner, arXiv 2506.10967).

    Kernel diag(r) S diag(r), with S the cosines of the projected features and r their relevance, min-max normalised within the
    image; greedy by Cholesky factors.

    The relevance of the authors, for models with a CLIP vision tower, needs `pruning_text_tower`: minus the mean cosine of a
    patch, through CLIP's last norm and projection, with the question, `pruning_question` of the call, through CLIP's text
    tower. Without it, it is that of the port in OpenVINO GenAI, for every family: the mean cosine of a token's features with
    the embeddings of the text in its row.

    Deviations: each grid is normalised by itself, where the authors take all tiles of an image together; each segment of a
    question longer than CLIP's 77 tokens has a start and an end, where only the authors' first and last one has. A constant
    relevance counts as 1; where the rank of S is reached, what is left of the variance is below 1e-10, and the rest is filled
    by relevance (the authors' code goes on with NaN).
    """

    Parameters = CDPrunerParameters
    question_parameter = "text_tower"
    looks_at = frozenset({"text"})

    def __init__(self, parameters, layer, num_layers):
        super().__init__(parameters, layer, num_layers)
        self.questions = {}
        if parameters.text_tower is not None:
            self.looks_at = frozenset({"question", "tower"})

    def stage_layers(self):
        return (0,)

    def select(self, image):
        features = unit(image.hidden_states)
        if self.parameters.text_tower is not None:
            relevance = self.relevance_to_question(image)
        elif len(image.text_states) > 0:
            relevance = (features @ unit(image.text_states).T).mean(1)
        else:
            relevance = features.new_ones(len(features))
        return greedy_map(features, self.weights(relevance), image.num_keep)

    def relevance_to_question(self, image) -> torch.Tensor:
        """[n] float64"""
        if not image.tower.is_clip:
            raise ValueError(
                f"pruning_text_tower is {self.parameters.text_tower!r}, but this model's vision tower is not CLIP's, so its "
                "states can not be compared with what CLIP's text tower makes of a question. Set it to None."
            )
        clip = text_tower(self.parameters.text_tower, image.hidden_states.device)
        question = image.question.removesuffix(INSTRUCTION)
        if question not in self.questions:
            self.questions[question] = unit(clip.of_text(question))
        return -(unit(clip.of_patches(image.tower.states)) @ self.questions[question].T).mean(1)

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
