"""Random tokens as a pruning method, the control that every other has to beat."""

from .pruning_method import PruningMethod
from .token_pruning import select_random


class RandomTokens(PruningMethod):
    """As many tokens of each image, chosen uniformly at random by the device's global generator; nothing is merged."""

    def select_batch(self, tokens):
        return select_random(tokens.hidden_states, None, tokens.batch)
