"""VLM-Pruner as a pruning method; the maths is in `token_pruning.py`."""

from .pruning_method import PruningMethod
from .token_pruning import PruningParameters, aggregate_tokens, select_batch


class VLMPruner(PruningMethod):
    """Spread pivots, greedy selection that buffers for spatial sparsity, and aggregation of what is dropped
    (arXiv 2512.02700). Deviations are listed where they are, in `token_pruning.py`.

    All images at once, and on a GPU without waiting for it unless `fill_budget` is False.
    """

    Parameters = PruningParameters
    presets = {"paper": {}, "fine": {"token_batch": 1}}
    looks_at = frozenset({"keys"})
    choose = staticmethod(select_batch)

    def __init__(self, parameters, layer, num_layers):
        super().__init__(parameters, layer, num_layers)
        self.counts_are_known = parameters.fill_budget
        self.has_merge = parameters.aggregation_weight < 1

    def select_batch(self, tokens):
        return self.choose(tokens.hidden_states, tokens.keys, tokens.batch, self.parameters)

    def merge(self, hidden_states, selection, tokens):
        return aggregate_tokens(hidden_states, selection, self.parameters.aggregation_weight)
