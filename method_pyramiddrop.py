"""PyramidDrop as a pruning method."""

from dataclasses import dataclass

from .pruning_method import MethodParameters, PruningMethod, count, largest, number


@dataclass(frozen=True)
class PyramidDropParameters(MethodParameters):
    """Parameters of PyramidDrop.

    Args:
        num_stages: how often tokens leave, at equal distances in the decoder; >= 1.
        stage_share: what each stage leaves of the one before, at the paper's budget; in [0.01, 0.99].
    """

    num_stages: int = 3
    stage_share: float = 0.5

    legal = {"num_stages": count(1), "stage_share": number(0.01, 0.99)}


class PyramidDrop(PruningMethod):
    """Drop half at a time, at a quarter, a half and three quarters of the decoder (PyramidDrop, arXiv 2410.17247).

    At each stage the row of the last token of the prompt in the pruned layer itself, from its own norm and projections; mean
    over heads, image columns, the largest. The paper's schedule is that of a `pruning_ratio` of 0.708.

    Deviations: key heads are repeated for the query heads (the authors' product fails on grouped heads); tokens keep their
    original positions unless `pruning_positions` is "packed", as the authors' code does at each stage; pruned in the prefill
    alone.
    """

    Parameters = PyramidDropParameters
    looks_at = frozenset({"own_attention"})

    def stage_layers(self):
        parts = self.parameters.num_stages + 1
        layers = {self.num_layers * stage // parts for stage in range(1, parts)}
        return tuple(sorted(layer for layer in layers if layer > 0)) or (1,)

    def stage_shares(self):
        return tuple(self.parameters.stage_share ** (stage + 1) for stage in range(len(self.stage_layers())))

    def select(self, image):
        return largest(image.attention, image.num_keep)
