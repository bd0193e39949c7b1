"""What a pruning method is: one class in one file, which says where it prunes, what it looks at, and what it chooses.

A method subclasses `PruningMethod`, overrides `select` (one image) and, where the defaults do not fit, `stage_layers`,
`stage_shares` and `merge`, and joins by one line in `pruning_methods.py`. Everything else is not its business: batches,
padding, caches, masks, positions, later turns, drawing. docs/methods.md adds one step by step.

Notable choices
- One budget for all methods: `pruning_ratio` is the fraction of an image's tokens that is gone, on average over the layers from
  the first pruning layer on. For a method with one stage that is the number kept at the pruning point; schedules of several
  stages are scaled to it.
- Attention rows are recomputed from the last query and the keys, so they do not depend on the attention backend.
- What decides is computed in float64; ties go to the lower index.
- What a method says and returns is checked by `pruning_contract.py`.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from .pruning_contract import check_class, checked_places, checked_shares
from .token_pruning import Selection
from .token_pruning_device import GridBatch


@dataclass(frozen=True)
class MethodParameters:
    """A method's own parameters. A subclass gives defaults, those of its paper, and in `legal` what is allowed.

    Each is a key `pruning_<name>` of the config. Every field is validated on construction; a ValueError names the field, its
    value and the legal range.
    """

    # name -> (whether a value is legal, the legal range in words)
    legal: ClassVar[dict[str, tuple[Callable[[object], bool], str]]] = {}

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            is_legal, legal_range = self.legal[field.name]
            if not is_legal(value):
                raise ValueError(f"{field.name} must be {legal_range}, but is {value!r}.")


def number(low: float, high: float) -> tuple[Callable[[object], bool], str]:
    """A legal range for `MethodParameters.legal`: any real number in [low, high]."""

    def is_legal(value) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return is_legal, f"a number in [{low}, {high}]"


def count(low: int) -> tuple[Callable[[object], bool], str]:
    """A legal range for `MethodParameters.legal`: an integer from `low` on."""

    def is_legal(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    return is_legal, f"an integer >= {low}"


def choice(*values: str) -> tuple[Callable[[object], bool], str]:
    """A legal range for `MethodParameters.legal`: one of some words."""
    return lambda value: value in values, f"one of {values}"


@dataclass(frozen=True)
class TowerSignals:
    """What the vision tower knows of an image's N tokens, in the order of its features; `tower_signals.py` says where from.

    Attributes:
        attention: [N] float32, how much attention each token gets, of the class token or, where there is none, of all.
        states: [N, tower_size], the tower's hidden states before the projector; of a token of several patches theirs side by
            side, [N, patches * tower_size]; where the tower itself merges them, what it makes of them, [N, hidden_size].
        keys: [N, head_dim], of the block of the attention.
        project: from states to [n, hidden_size]; None where these are what the decoder gets.
        has_class_token: whether the attention is that of one.
        is_clip: whether the states are those of the patches of CLIP's tower.
        is_seen: [N] bool, False where all patches of a token are padding of its tile; None where none is.
    """

    attention: torch.Tensor
    states: torch.Tensor
    keys: torch.Tensor
    project: Callable[[torch.Tensor], torch.Tensor] | None
    has_class_token: bool
    is_clip: bool = False
    is_seen: torch.BoolTensor | None = None

    def of(self, tokens: torch.LongTensor) -> "TowerSignals":
        """Those of some tokens."""
        tokens = tokens.to(self.states.device)
        names = [name for name in ("attention", "states", "keys", "is_seen") if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name)[tokens] for name in names})

    def seen(self) -> torch.LongTensor | None:
        """Places of the tokens that are not padding alone, ascending; None where none is, or all are."""
        if self.is_seen is None or bool(self.is_seen.all()) or not bool(self.is_seen.any()):
            return None
        return self.is_seen.nonzero()[:, 0]


class ImageTokens:
    """The tokens of one grid at one stage, n of which are left of N; what a method's `select` looks at.

    Only what the method's `looks_at` names is there.

    Attributes:
        stage: number of the stage, from 0.
        num_keep: how many to keep, from 0 to n.
        keeps_last: whether the last token must stay; where `select` does not choose it, it takes the last place.
        grid: (height, width) or (frames, height, width) of the whole grid; their product is N.
        indices: [n] int64, row-major places in the grid, ascending.
        hidden_states: [n, hidden_size], the input of the pruned layer. At layer 0 these are the projected features.
        keys: "keys", [num_key_value_heads, n, head_dim], of the layer below, after RoPE.
        attention, logits: "attention", [n] float32: the row of the last token of the text in the layer below, mean over heads,
            after a softmax over all keys but padding, and before it.
        text_states: "text", [m, hidden_size], and
        text_keys: if "keys" too, [num_key_value_heads, m, head_dim]: the call's text tokens in the row of the image, and
        is_after: [m] bool, which of them come after the image.
        final_norm: "text", the decoder's last norm.
        question: "question", the text that the caller gave as `pruning_question` for the row of the image.
        tower: "tower", `TowerSignals` of the image's tokens that are on the grid.
    """

    def __init__(self, tokens: "StageTokens", image: int):
        start, size = sum(tokens.sizes[:image]), tokens.sizes[image]
        here, signals = slice(start, start + size), tokens.signals
        self.stage, self.num_keep, self.grid = tokens.stage, tokens.num_keep[image], tokens.grids[image]
        self.keeps_last = tokens.keeps_last[image]
        self.indices, self.hidden_states = tokens.indices[here], tokens.hidden_states[here]
        self.keys = None if tokens.keys is None else tokens.keys[:, here]
        for name in ("attention", "logits"):
            setattr(self, name, signals[name][here] if name in signals else None)
        if "text" in signals:
            self.text_states, self.text_keys, self.is_after = signals["text"](image)
            self.final_norm = signals["final_norm"]
        if "question" in signals:
            self.question = signals["question"](image)
        if "tower" in signals:
            self.tower = signals["tower"](image)

    def of(self, places: torch.LongTensor, num_keep: int) -> "ImageTokens":
        """Those at some places alone, of which `num_keep` are to be kept."""
        some = copy(self)
        some.num_keep, some.hidden_states, some.indices = num_keep, self.hidden_states[places], self.indices[places.cpu()]
        some.keys = None if self.keys is None else self.keys[:, places]
        for name in ("attention", "logits"):
            signal = getattr(self, name)
            setattr(some, name, None if signal is None else signal[places])
        some.tower = self.tower.of(places)
        return some


@dataclass
class StageTokens:
    """The tokens of all grids at one stage, T of them, one grid after another.

    Attributes:
        stage, hidden_states, keys, indices: as in `ImageTokens`, for T in place of n.
        grids, sizes, num_keep: of each grid, and
        keeps_last: whether its last token must stay, because its output is needed.
        batch: at the first stage, grids and budgets as `token_pruning.select_batch` takes them.
        signals: what `looks_at` asked for.
    """

    stage: int
    hidden_states: torch.Tensor
    keys: torch.Tensor | None
    indices: torch.LongTensor
    grids: Sequence[tuple[int, ...]]
    sizes: Sequence[int]
    num_keep: Sequence[int]
    keeps_last: Sequence[bool]
    batch: GridBatch | None
    signals: dict

    def images(self) -> list[ImageTokens]:
        return [ImageTokens(self, image) for image in range(len(self.sizes))]


class PruningMethod:
    """One pruning method with its parameters, made for one call.

    Attributes:
        Parameters: the class of its own parameters.
        presets: what `pruning_preset` may name -> the parameters that differ from the paper's.
        looks_at: of "keys", "attention", "own_attention", "text", "question", "tower", what it needs beside the tokens' hidden
            states. An instance may need others, as its parameters say.
        question_parameter: the parameter that, where it is set, makes an instance look at the question; None where none does.
            "own_attention" is the row in the pruned layer itself, from its own projections, where "attention" is that of the
            layer below. What a layer below gives, layer 0 has not.
        counts_are_known: whether `select` always keeps `num_keep`. If not, masks are made at each stage.
        has_merge: whether `merge` changes the kept tokens.
        corrections: of "size" and "distance", what the decoder adds to the logits of attention from the stage on, see
            `attention_correction.py`. A method with "size" has a merge, and says in `sizes` what a kept token stands for.
        counts_positions: whether positions must be counts of the full sequence's tokens. M-RoPE and packed ones are refused.
    """

    Parameters: ClassVar[type] = MethodParameters
    presets: ClassVar[dict[str, dict]] = {"paper": {}}
    looks_at: frozenset[str] = frozenset()
    question_parameter: ClassVar[str | None] = None
    counts_are_known: bool = True
    has_merge: bool = False
    corrections: frozenset[str] = frozenset()
    counts_positions: bool = False

    def __init_subclass__(cls):
        super().__init_subclass__()
        check_class(cls)

    def __init__(self, parameters, layer: int, num_layers: int):
        self.parameters, self.layer, self.num_layers = parameters, layer, num_layers

    @classmethod
    def defaults_for(cls, model_type: str) -> dict:
        """Parameters that the authors give for this type of base model alone, in place of the class's defaults."""
        return {}

    def stage_layers(self) -> tuple[int, ...]:
        """The decoder layers at whose input tokens leave, ascending. By default `pruning_layer` alone; (0,) is before the
        decoder."""
        return (self.layer,)

    def stage_shares(self) -> tuple[float, ...]:
        """What share of the image's tokens is left after each stage at the paper's budget, where there are several."""
        return (1.0,)

    def counts(self, num_visual: int, num_keep: int) -> tuple[int, ...]:
        """How many of `num_visual` tokens are left after each stage, for a budget of `num_keep`.

        `stage_shares` times one factor, at most 1, such that the mean over the layers from the first stage on is the budget.
        A stage keeps at least one token, unless its share is 0.
        """
        layers = self.stage_layers()
        if len(layers) == 1:
            return (num_keep,)
        shares = checked_shares(self, layers)
        widths = [end - start for start, end in zip(layers, (*layers[1:], self.num_layers), strict=True)]
        target, low, high = num_keep / num_visual * sum(widths), 0.0, 1 / min(share for share in shares if share > 0)
        for _ in range(60):
            factor = (low + high) / 2
            mean = sum(width * min(factor * share, 1) for width, share in zip(widths, shares, strict=True))
            low, high = (factor, high) if mean < target else (low, factor)
        return tuple(max(1, round(num_visual * min(round(high * share, 9), 1))) if share > 0 else 0 for share in shares)

    def select(self, image: ImageTokens) -> torch.LongTensor:
        """The tokens to keep, as places among the n of `image`, in order of selection. [num_keep] int64,
        distinct, on the device of the hidden states"""
        raise NotImplementedError(f"{type(self).__name__} must override select or select_batch.")

    @torch.no_grad()
    def select_batch(self, tokens: StageTokens) -> Selection:
        """`select` of every image. A method that can take all images at once overrides this instead."""
        orders = [_with_last(self._select_seen(image), image) for image in tokens.images()]
        starts = [sum(tokens.sizes[:image]) for image in range(len(orders))]
        order = torch.cat([order + start for order, start in zip(orders, starts, strict=True)])
        return Selection(tuple(map(len, orders)), order, order.sort().values)

    def _checked_select(self, image: ImageTokens) -> torch.LongTensor:
        num_keep, device = image.num_keep if self.counts_are_known else None, image.hidden_states.device
        return checked_places(self.select(image), len(image.indices), num_keep, device, f"{type(self).__name__}.select")

    def _select_seen(self, image: ImageTokens) -> torch.LongTensor:
        """`select`, for which tokens that are padding of their tile alone are not there where the method looks at the tower:
        they stay, in raster order, where more is to be kept than the rest."""
        seen = image.tower.seen() if hasattr(image, "tower") else None
        if seen is None:
            return self._checked_select(image)
        num_keep = min(image.num_keep, len(seen))
        order = seen[self._checked_select(image.of(seen, num_keep))]
        return torch.cat([order, (~image.tower.is_seen).nonzero()[: image.num_keep - num_keep, 0]])

    def merge(self, hidden_states: torch.Tensor, selection: Selection, tokens: StageTokens) -> torch.Tensor:
        """New hidden states of the kept tokens, [T, hidden_size] to [R, hidden_size] in the order of `selection.kept`."""
        raise NotImplementedError(f"{type(self).__name__} has has_merge, so it must override merge.")

    def sizes(self, selection: Selection, tokens: StageTokens) -> torch.Tensor:
        """How many tokens each of `selection.kept` stands for: in the stage's own layer, and in those above it. [R, 2] float32,
        positive"""
        raise NotImplementedError(f"{type(self).__name__} has 'size' among its corrections, so it must override sizes.")


def _with_last(order: torch.LongTensor, image: ImageTokens) -> torch.LongTensor:
    last = len(image.indices) - 1
    if not image.keeps_last or bool((order == last).any()):
        return order
    return torch.cat([order[: max(len(order) - 1, 0)], order.new_tensor([last])])


def largest(scores: torch.Tensor, num_keep: int) -> torch.LongTensor:
    """Places of the `num_keep` largest of `scores` [n], descending; equal ones by index."""
    return scores.sort(descending=True, stable=True).indices[:num_keep]


def unit(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [n, d] at length 1 in float64; rows of zeros stay."""
    rows = rows.double()
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def farthest(distance: torch.Tensor, num_keep: int, chosen: Sequence[int] = ()) -> list[int]:
    """Max-min selection: `chosen`, then one by one the token whose distance to the nearest chosen one is largest.

    Args:
        distance: [n, n], symmetric.
        num_keep: how many in all.
        chosen: where there is none, the first is the token with the farthest nearest neighbour.

    Returns:
        Distinct places, in order of selection.
    """
    chosen = list(chosen)
    if not chosen and num_keep > 0:
        alone = distance.clone().fill_diagonal_(math.inf)
        chosen = [int(alone.amin(0).argmax())]
    if len(chosen) >= num_keep:
        return chosen[:num_keep]
    nearest = distance[chosen].amin(0)
    nearest[chosen] = -math.inf
    while len(chosen) < num_keep:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
        nearest[chosen[-1]] = -math.inf
    return chosen
