"""RESTORE as a pruning method."""

from copy import copy
from dataclasses import dataclass

import torch

from .method_divprune import DivPrune
from .method_holov import HoloV
from .method_vispruner import VisPruner
from .pruning_method import MethodParameters, PruningMethod, choice, largest, unit


# pruning_selector -> the method that chooses the first half, with its paper's parameters.
SELECTORS: dict[str, type[PruningMethod]] = {"divprune": DivPrune, "vispruner": VisPruner, "holov": HoloV}
CORRECTIONS = {"full": frozenset({"size", "distance"}), "size": frozenset({"size"}), "none": frozenset()}


@dataclass(frozen=True)
class RESTOREParameters(MethodParameters):
    """Parameters of RESTORE.

    Args:
        selector: the method that chooses half of the tokens: "divprune", "vispruner" or "holov".
        attention_correction: what is added to the logits of attention: "full" is the paper's, the log of sizes and the distance
            term; "size" the first alone; "none" nothing, so that tokens are merged and no more.
    """

    selector: str = "divprune"
    attention_correction: str = "full"

    legal = {"selector": choice(*SELECTORS), "attention_correction": choice(*CORRECTIONS)}


class RESTORE(PruningMethod):
    """Let another method keep half of the budget, merge all other tokens into distinctive anchors, and correct the decoder's
    attention for what the rows stand for (RESTORE, arXiv 2606.01711), before the decoder.

    Of T tokens the selector keeps T // 2. Of the others, S their cosines and den = their sums over S, the T - T // 2 of largest
    den (1 - near) are anchors, near the largest cosine with a token of lower den, 0 where there is none; every other token
    joins the anchor of largest cosine. A group's row is the mean of its members' features. It stands at the position of their
    lower median, which is the token that a record calls kept.

    Added to the logits of a query and a key, `log size + log(2 - c(d))`: the size is the number of tokens in the key's row, 1
    for text, but in layer 0 N / T for all rows of an image of N tokens; d is the distance of their positions, and c(d) the mean
    of cos(d f) over the decoder's inverse frequencies f, which the authors write down for one model (head_dim 128, base 10000).

    The distance term is for prompts: the tokens, of rows that bring an image in the call, up to the prompt's last. Those that
    are decoded, and later turns of text alone, attend with sizes alone, as the authors decode. So decoding with and without a
    cache is equal, also with drafts, beams and rows of other lengths, and so is a later turn with an image that follows a
    prompt; but what a conversation has decoded, or asked without an image, is not as if it had been in the prompt. With
    `attention_correction` "size" or "none", every call equals one of all turns in one piece.

    What the specification leaves open, and what is done here: anchors are compared with tokens of lower density, as the
    authors' code does, though what it calls its model (density peaks) compares with higher ones; HoloV has its own number of
    runs for T // 2 tokens; an image of several grids has sizes N / T of each; d counts the tokens of the row, without padding.

    Deviations: VisPruner and HoloV are those of this repo, with the deviations they name; where a row's last token must stay,
    its group stands there. Refused by name: M-RoPE, where positions have no median; packed positions; attention that takes no
    additive mask (anything but sdpa and eager); and with the distance term, RoPE whose frequencies change with the length.
    """

    Parameters = RESTOREParameters
    has_merge = True
    counts_positions = True

    def __init__(self, parameters, layer, num_layers):
        super().__init__(parameters, layer, num_layers)
        selector = SELECTORS[parameters.selector]
        self.selector = selector(selector.Parameters(), layer, num_layers)
        self.looks_at, self.corrections = self.selector.looks_at, CORRECTIONS[parameters.attention_correction]
        self.owners = []

    def stage_layers(self):
        return (0,)

    def select(self, image):
        owner = self.groups(image)
        self.owners.append(owner)
        return places_of_groups(owner, image.num_keep, image.keeps_last)

    def groups(self, image) -> torch.LongTensor:
        """The number of the group of each token: of the selector's in its order, then of the anchors'. [n] int64"""
        features, half = image.hidden_states, copy(image)
        half.num_keep = image.num_keep // 2
        kept = self.selector.select(half) if half.num_keep else torch.zeros(0, dtype=torch.long, device=features.device)
        is_rest = torch.ones(len(features), dtype=torch.bool, device=features.device)
        is_rest[kept] = False
        owner = torch.empty(len(features), dtype=torch.long, device=features.device)
        owner[kept] = torch.arange(len(kept), device=features.device)
        owner[is_rest] = len(kept) + anchored(features[is_rest], image.num_keep - len(kept))
        return owner

    def merge(self, hidden_states, selection, tokens):
        owner, sizes = self._owner(selection, tokens)
        rows = hidden_states.new_zeros(len(sizes), hidden_states.shape[1], dtype=torch.float32)
        return (rows.index_add(0, owner, hidden_states.float()) / sizes[:, None]).to(hidden_states)

    def sizes(self, selection, tokens):
        _, sizes = self._owner(selection, tokens)
        counts = torch.tensor(selection.counts, device=sizes.device)
        shares = torch.tensor(tokens.sizes, device=sizes.device) / counts
        return torch.stack([shares.repeat_interleave(counts, output_size=len(sizes)), sizes], dim=1)

    def _owner(self, selection, tokens) -> tuple[torch.LongTensor, torch.Tensor]:
        """The row among `selection.kept` that each token is merged into, [T] int64, and how many each has, [R] float32."""
        owners, start = [], 0
        for owner, count in zip(self.owners, selection.counts, strict=True):
            owners.append(owner + start)
            start += count
        rows = torch.searchsorted(selection.kept, selection.order)
        owner = rows[torch.cat(owners)]
        return owner, torch.zeros(len(rows), device=owner.device).index_add(
            0, owner, torch.ones_like(owner, dtype=torch.float32)
        )


def anchored(features: torch.Tensor, num_anchors: int) -> torch.LongTensor:
    """The number of the anchor that each token of `features` [n, d] is or joins. [n] int64, anchors by score, descending"""
    directions = unit(features)
    similarity = directions @ directions.T
    density = similarity.sum(1)
    is_sparser = density < density[:, None]
    nearest = similarity.masked_fill(~is_sparser, -torch.inf).amax(1)
    nearest = torch.where(is_sparser.any(1), nearest, 0)
    anchors = largest(density * (1 - nearest), num_anchors)
    # Ascending, so that of equal cosines the anchor of lower index wins.
    ascending, number = anchors.sort()
    owner = number[similarity[:, ascending].argmax(1)]
    owner[anchors] = torch.arange(num_anchors, device=owner.device)
    return owner


def places_of_groups(owner: torch.LongTensor, num_groups: int, keeps_last: bool) -> torch.LongTensor:
    """Where each group stands: the lower median of its members, or the last token where that must stay. [num_groups] int64"""
    by_group = owner.argsort(stable=True)  # members of a group in ascending order, one group after another
    sizes = torch.bincount(owner, minlength=num_groups)
    places = by_group[sizes.cumsum(0) - sizes + (sizes - 1) // 2]
    if keeps_last:
        places[owner[-1]] = len(owner) - 1
    return places
