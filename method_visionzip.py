"""VisionZip as a pruning method."""

from dataclasses import dataclass

import torch

from .pruning_method import MethodParameters, PruningMethod, largest, number, unit


@dataclass(frozen=True)
class VisionZipParameters(MethodParameters):
    """Parameters of VisionZip.

    Args:
        contextual_share: what of the budget goes to tokens that others are merged into; in [0, 1].
    """

    contextual_share: float = 10 / 64

    legal = {"contextual_share": number(0, 1)}


class VisionZip(PruningMethod):
    """Keep the patches that the tower's class token attends to, and merge the others into a few, before the decoder
    (VisionZip, arXiv 2412.04467).

    Contextual tokens are taken at equal distances from the rest in raster order; every other patch joins the one whose key in
    the tower is most like its own. Their states before the projector become target + mean of the joined, as in the authors'
    code: a sum, not an average. Where the tower merges patches itself (Qwen), the features of a target and of all that join it
    become their mean, as in the port of AngelSlim; DeepStack features stay those of the target.

    Deviations: the class token, which the authors send along and count, has no place in the prompt; its place in the budget
    goes to one more patch. Tokens stay in raster order at their places, where the authors put the contextual ones last.
    """

    Parameters = VisionZipParameters
    looks_at = frozenset({"tower"})
    has_merge = True

    def __init__(self, parameters, layer, num_layers):
        super().__init__(parameters, layer, num_layers)
        self.groups = []

    def stage_layers(self):
        return (0,)

    def select(self, image):
        num_contextual = min(max(1, round(image.num_keep * self.parameters.contextual_share)), image.num_keep)
        num_contextual = num_contextual if self.parameters.contextual_share > 0 else 0
        dominant, targets, others, owner = zip_groups(image.tower, image.num_keep - num_contextual, num_contextual)
        self.groups.append((targets, others, owner))
        return torch.cat([dominant, targets])

    def merge(self, hidden_states, selection, tokens):
        merged, start = hidden_states[selection.kept], 0
        for image, (targets, others, owner) in zip(tokens.images(), self.groups, strict=True):
            states, seen = image.tower.states, image.tower.seen()
            if seen is not None:
                targets, others = seen[targets], seen[others]
            counts = torch.zeros(len(targets), dtype=states.dtype, device=states.device)
            counts = counts.index_add(0, owner, torch.ones_like(owner, dtype=states.dtype))[:, None]
            sums = torch.zeros_like(states[targets]).index_add(0, owner, states[others])
            if image.tower.project is None:
                rows = ((states[targets] + sums) / (1 + counts)).to(merged)
            else:
                rows = image.tower.project(states[targets] + sums / counts.clamp_min(1)).to(merged)
            is_kept = torch.isin(targets + start, selection.kept)
            merged = merged.index_copy(0, torch.searchsorted(selection.kept, (targets + start)[is_kept]), rows[is_kept])
            start += len(states)
        return merged


def zip_groups(tower, num_dominant: int, num_contextual: int) -> tuple[torch.Tensor, ...]:
    """Dominant patches [num_dominant] ascending, targets [num_contextual], the others, and the number of each one's target."""
    dominant = largest(tower.attention, num_dominant).sort().values
    is_rest = torch.ones(len(tower.attention), dtype=torch.bool, device=dominant.device)
    is_rest[dominant] = False
    rest = is_rest.nonzero()[:, 0]
    targets = rest[:: max(1, len(rest) // max(num_contextual, 1))][:num_contextual]
    others = rest[~torch.isin(rest, targets)] if num_contextual else rest[:0]
    keys = unit(tower.keys)
    owner = (keys[others] @ keys[targets].T).argmax(1) if num_contextual else rest[:0]
    return dominant, targets, others, owner
