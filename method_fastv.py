"""FastV as a pruning method."""

from .pruning_method import PruningMethod, largest


class FastV(PruningMethod):
    """Keep what the last token of the prompt attends to in the layer below (FastV, arXiv 2403.06764, K = `pruning_layer` = 2).

    Mean over heads of the softmax row, image columns, the largest `num_keep`.

    Deviations: the row is recomputed from the last query and the keys instead of running the layer twice, which doubled its
    cache entry in the authors' file; pruned once, in the prefill, not again at each decoded token.
    """

    looks_at = frozenset({"attention"})

    def select(self, image):
        return largest(image.attention, image.num_keep)
