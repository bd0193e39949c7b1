"""How a stock transformers decoder runs with fewer visual tokens from one layer on. Knows no model family.

A `PruningPlan` is made for one forward call and travels to the decoder layers as a keyword argument. The layer below the
pruning layer leaves its new keys with the plan, the pruning layer selects, merges and packs, and it and all layers above get
packed position embeddings and a mask of their own. Nothing is kept on a module: what later calls need (which entries of the
shorter cache are padding, where they stood, what was kept) lives with the cache, so requests and threads do not meet.

Notable choices:
- Rows of a batch keep different numbers of tokens. Each row's kept tokens are packed to the right, in order, and the padding
  in front is masked; padding of the input is dropped as well.
- Layers above see `position_ids=None`. Their rotations are already in `position_embeddings`, and gaps in `position_ids`
  would make the FlashAttention path believe in packed sequences.
- One mask serves all layers from the pruning layer on; it is sized by their own cache length (`layer_idx`).
- What the host must know (where visual tokens lie, how many stay, what is padding) it learns when the plan is made, in one
  transfer, and the mask follows from it before the first layer. So on a GPU nothing waits at the pruning layer, unless the
  budget may stay unfilled (`fill_budget=False`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from .configuration_vlmpruner import PruningSettings
from .pruned_cache import (
    CACHE_NAME,
    PrunedCacheState,
    PrunedImage,
    PruningRecord,
    continued_padding_mask,
    open_state,
    pruning_state,
)
from .token_pruning import SELECTORS, Selection, aggregate_tokens, num_tokens_to_keep
from .token_pruning_device import GridBatch, upload


# Key of the pruned layers' mask among the masks that `generate` makes in advance for compiled decoding.
PRUNED_MASK = "pruned_attention"


@dataclass(frozen=True)
class GridView:
    """The visual tokens of an image or video that lie on one (height, width) or (frames, height, width) grid.

    Token (f, y, x) of the grid is row `start + f * height * width + y * row_stride + x` of the features. Rows of the features
    that no view covers (a class token, row-end newlines) are structure: never candidates, always kept.
    """

    height: int
    width: int
    start: int = 0
    row_stride: int | None = None
    frames: int = 1

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.height, self.width) if self.frames == 1 else (self.frames, self.height, self.width)

    def token_indices(self) -> torch.LongTensor:
        """Rows of the features, in row-major order of the grid. [frames * height * width]"""
        f = torch.arange(self.frames)[:, None, None] * (self.height * self.width)
        y = torch.arange(self.height)[:, None] * (self.row_stride or self.width)
        return (self.start + f + y + torch.arange(self.width)).flatten()


def video_views(frames: int, height: int, width: int, scope: str) -> list[GridView]:
    """The grids of a video of `frames` slices: one each with scope "slice", one for all with "video"."""
    if scope == "video":
        return [GridView(height, width, frames=frames)]
    return [GridView(height, width, start=frame * height * width) for frame in range(frames)]


@dataclass(frozen=True)
class VisualTokens:
    """The images, or the videos, that come with a call.

    Attributes:
        modality: "image" or "video".
        mask: [batch, length] bool, True at the tokens that hold the features, which fill them in row-major order.
        features: for each image in prompt order, [num_features, hidden_size].
        views: for each image, its grids.
    """

    modality: str
    mask: torch.BoolTensor
    features: Sequence[torch.Tensor]
    views: Sequence[Sequence[GridView]]


@dataclass(frozen=True)
class VisualGrid:
    """One grid to prune: which row of the batch, which `columns` [num_visual] of this call's tokens, how many to keep.

    `columns` is ascending and on the host. `keeps_last` says that the last of them must stay, because its output is needed.
    """

    row: int
    image: int
    view: int
    modality: str
    grid: tuple[int, ...]
    columns: torch.LongTensor
    num_keep: int
    keeps_last: bool = False


def visual_grids(visual: VisualTokens, ratio: float) -> list[VisualGrid]:
    """Place the grids of a call in its tokens. `ratio` is the fraction of each grid to remove; `visual.mask` is on the host.

    Raises:
        ValueError: if the images do not fill the rows one after another.
    """
    columns = visual.mask.nonzero()[:, 1]
    lengths = [len(features) for features in visual.features]
    rows = rows_of_images(visual.mask.sum(1).tolist(), lengths, visual.modality)
    grids, offset = [], 0
    for image, (row, length, views) in enumerate(zip(rows, lengths, visual.views, strict=True)):
        image_columns = columns[offset : offset + length]
        offset += length
        for number, view in enumerate(views):
            tokens = view.token_indices()
            num_keep = num_tokens_to_keep(len(tokens), ratio)
            grids.append(VisualGrid(row, image, number, visual.modality, view.grid, image_columns[tokens], num_keep))
    return grids


def keep_needed_outputs(
    grids: Sequence[VisualGrid], attention_mask: torch.BoolTensor | None, length: int, num_outputs: int
) -> list[VisualGrid]:
    """`grids`, of which those keep their last token that end where an output is needed.

    It is needed at the last real token of each row, from which generation goes on, and at the first of the last `num_outputs`
    tokens of the call: where text was drafted behind a prompt that ends with an image, that is the end of the prompt.

    Args:
        attention_mask: [batch, length or more] bool on the host, or None.
        length: number of tokens of the call.
        num_outputs: number of outputs that are asked for, or 0 where it is not said.
    """
    last_candidate = {}
    for grid in grids:
        last_candidate[grid.row] = max(last_candidate.get(grid.row, -1), int(grid.columns[-1]))

    def is_needed(grid: VisualGrid) -> bool:
        last = int(grid.columns[-1])
        is_end = last == length - 1 or (attention_mask is not None and not attention_mask[grid.row, last - length + 1 :].any())
        return last == last_candidate[grid.row] and (is_end or last == length - num_outputs)

    return [replace(grid, keeps_last=is_needed(grid)) for grid in grids]


def rows_of_images(tokens_of_rows: list[int], features_of_images: list[int], modality: str) -> list[int]:
    """The row of each image, given the number of placeholders of each row and of features of each image.

    Raises:
        ValueError: if the images do not fill the rows one after another.
    """
    rows, row, free = [], 0, tokens_of_rows[0] if tokens_of_rows else 0
    for image, num_features in enumerate(features_of_images):
        while free == 0 and row + 1 < len(tokens_of_rows):
            row += 1
            free = tokens_of_rows[row]
        if num_features > free:
            raise ValueError(
                f"{modality.capitalize()} {image} has {num_features} features, but row {row} of the batch has only {free} of "
                f"its {tokens_of_rows[row]} placeholders left. Each row needs the placeholders of its own {modality}s."
            )
        rows.append(row)
        free -= num_features
    return rows


@dataclass
class Packing:
    """Which of a call's `length` tokens go on, and where.

    Attributes:
        index: [batch, packed_length] int64, the column that each packed place takes.
        valid: [batch, packed_length] bool, False where a place is padding; None when no place is.
        kept: [batch, length] bool, whether a token goes on.
        merged_places: the (row, packed place) of each kept visual token, ascending; None where nothing is merged into them.
    """

    index: torch.LongTensor
    valid: torch.BoolTensor | None
    kept: torch.BoolTensor
    merged_places: tuple[torch.LongTensor, torch.LongTensor] | None

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch or 1, length, ...] -> [batch, packed_length, ...]"""
        tokens = tokens.expand(self.index.shape[0], *tokens.shape[1:])
        return tokens.gather(1, _over_features(self.index, tokens))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[batch, packed_length, ...] -> [batch, length, ...], zero where a token was dropped."""
        if self.valid is not None:
            packed = packed.masked_fill(~_over_features(self.valid, packed), 0)
        full = packed.new_zeros(packed.shape[0], self.kept.shape[1], *packed.shape[2:])
        return full.scatter(1, _over_features(self.index, packed), packed)


def _over_features(per_token: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """View [batch, n] as [batch, n, ...] with the trailing dimensions of `tokens`."""
    trailing = tokens.shape[2:]
    return per_token.reshape(*per_token.shape, *(1 for _ in trailing)).expand(*per_token.shape, *trailing)


class PackedGrids:
    """The visual tokens of all grids of a call, one grid after another, and the text that stays: where they are.

    Args:
        grids: ordered by row.
        is_text: [batch, length] bool, on the host.
        device: where the tensors are made; the host does not wait for them.

    Attributes:
        batch, layout: the grids for the selection.
        rows, columns: [T] int64 each, where each token is in the batch.
        places: [T] int64, where it is in the flattened batch.
        is_text: [batch, length] bool, on the device.
        hidden_states: [T, hidden_size] from the selection to the merge, else None.
    """

    def __init__(self, grids: Sequence[VisualGrid], is_text: torch.BoolTensor, device: torch.device):
        self.device = device
        required = [len(grid.columns) - 1 if grid.keeps_last else None for grid in grids]
        self.batch = GridBatch([grid.grid for grid in grids], [grid.num_keep for grid in grids], device, required)
        rows = torch.cat([torch.full_like(grid.columns, grid.row) for grid in grids])
        columns = torch.cat([grid.columns for grid in grids])
        self.rows, self.columns, self.places = upload(
            torch.stack([rows, columns, rows * is_text.shape[1] + columns]), device
        ).unbind()
        self.is_text = upload(is_text, device)
        self.row_of_grid = [grid.row for grid in grids]
        self.num_text = is_text.sum(1).tolist()
        self.layout = self.batch.layout  # made now, not in the middle of the layers
        self.hidden_states: torch.Tensor | None = None

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens' [T, ...] of [batch, length, ...]."""
        return states.flatten(0, 1).index_select(0, self.places)

    def counts_of_rows(self, counts: Sequence[int] | None = None) -> list[int]:
        """Number of tokens that go on in each row, where each grid keeps `counts`, by default what it is to keep."""
        totals = list(self.num_text)
        for row, count in zip(self.row_of_grid, counts or self.batch.num_keep, strict=True):
            totals[row] += count
        return totals

    def valid(self, counts_of_rows: Sequence[int]) -> torch.BoolTensor | None:
        """[batch, packed_length] bool, False at the padding in front of shorter rows; None where all are of one length."""
        longest, shortest = max(counts_of_rows), min(counts_of_rows)
        if longest == shortest:
            return None
        return upload(torch.arange(longest) >= longest - torch.tensor(counts_of_rows)[:, None], self.device)


class KeyRecorder:
    """A cache as one attention layer sees it, which also leaves that layer's new keys (after RoPE) with the plan.

    It works with every attention backend, and without a cache, because `update` is the one place all of them share.
    """

    def __init__(self, cache: Cache | None, plan: "PruningPlan"):
        self.cache = cache
        self.plan = plan

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.plan.packing is None:  # not where gradient checkpointing runs the layer again
            self.plan.keys = key_states
        if self.cache is None:
            return key_states, value_states
        return self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.cache, name)


class PruningPlan:
    """What one forward call does at and above the pruning layer.

    It goes from layer to layer as it is. So it is no dataclass: FSDP copies those on their way.

    Args:
        config: the decoder's config.
        layer: the pruning layer.
        attention_mask: the caller's 2-D mask [batch, past + length], or None. On the host where there are `grids`.
        grids: what to select from, ordered by row; empty in a call that only continues on a pruned cache.
        settings: how to select; None in such a call.
        prepared_mask: the mask of the layers from `layer` on, where `generate` made it in advance.
        past_length: full sequence length before the call, and `is_text` [batch, length] bool on the host, the call's tokens
            that stay in any case, where there are `grids`.

    Attributes:
        deepstack: for each of the first layers, what to add after it: pairs of tokens [batch, length] bool and, in their
            row-major order, their features [num_visual, hidden_size].
        record: what was kept, once the pruning layer has run.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer: int,
        attention_mask: torch.Tensor | None = None,
        grids: Sequence[VisualGrid] = (),
        settings: PruningSettings | None = None,
        prepared_mask: torch.Tensor | None = None,
        past_length: int = 0,
        is_text: torch.BoolTensor | None = None,
    ):
        self.config, self.layer, self.attention_mask = config, layer, attention_mask
        self.grids, self.settings, self.prepared_mask = grids, settings, prepared_mask
        self.past_length, self.is_text = past_length, is_text
        self.deepstack: Sequence[Sequence[tuple[torch.BoolTensor, torch.Tensor]]] = ()
        self.record: PruningRecord | None = None
        self.keys: torch.Tensor | None = None
        self.tokens: PackedGrids | None = None
        self.selection: Selection | None = None
        self.packing: Packing | None = None
        self.valid: torch.BoolTensor | None = None
        self.mask: torch.Tensor | None = None
        self.layer_inputs: dict | None = None
        self.layer_device: torch.device | None = None

    def before_layer(self, layer_idx: int, hidden_states: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict]:
        """The hidden states and keyword inputs that decoder layer `layer_idx` runs on instead of the given ones."""
        if layer_idx == 0 and self.tokens is not None and self._counts_are_known:
            self._make_mask(hidden_states, inputs.get(CACHE_NAME), self.tokens.counts_of_rows())
        if layer_idx == self.layer - 1 and self.grids:
            inputs = inputs | {CACHE_NAME: KeyRecorder(inputs.get(CACHE_NAME), self)}
        if layer_idx == self.layer:
            hidden_states = self._enter(hidden_states, inputs)
        if layer_idx >= self.layer:
            if self.layer_device != hidden_states.device:
                self.layer_inputs = _on_device(self.layer_inputs, hidden_states.device)
                self.layer_device = hidden_states.device
            inputs = inputs | self.layer_inputs
        return hidden_states, inputs

    def unpack_outputs(self, outputs) -> None:
        """Give the decoder's `last_hidden_state` and `hidden_states` the caller's sequence length again, in place."""
        if self.packing is None:
            return
        outputs["last_hidden_state"] = self.packing.unpack(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs["hidden_states"] = tuple(
                self.packing.unpack(states) if number > self.layer and states is not None else states
                for number, states in enumerate(outputs.hidden_states)
            )

    def add_deepstack(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The input of decoder layer `layer_idx` with the visual features added that belong after the layer before."""
        layer = layer_idx - 1
        if not 0 <= layer < len(self.deepstack):
            return hidden_states
        for mask, features in self.deepstack[layer]:
            mask, features = mask.to(hidden_states.device), features.to(hidden_states.device, hidden_states.dtype)
            added = features.new_zeros(*mask.shape, features.shape[-1]).masked_scatter(mask[..., None], features)
            if layer >= self.layer and self.packing is not None:
                added = self.packing.pack(added)
            hidden_states = hidden_states + added
        return hidden_states

    def _enter(self, hidden_states: torch.Tensor, inputs: dict) -> torch.Tensor:
        cache, self.layer_device = inputs.get(CACHE_NAME), hidden_states.device
        if not self.grids:
            self.layer_inputs = {"attention_mask": self._continued_mask(hidden_states, cache), "position_ids": None}
            return hidden_states
        is_first_run = self.packing is None  # gradient checkpointing runs a layer again: same tokens, new graph
        if is_first_run:
            self._select(hidden_states)
            self._make_packing(hidden_states, cache)
        packed = self._pack_and_merge(hidden_states)
        if is_first_run:
            self.layer_inputs = {
                "attention_mask": self.mask,
                "position_ids": None,
                "position_embeddings": tuple(self.packing.pack(part) for part in inputs["position_embeddings"]),
            }
            self.layer_inputs = _on_device(self.layer_inputs, hidden_states.device)
            self._remember(cache)
        return packed

    def prepare(self, device: torch.device) -> None:
        """Put on `device` what selection and packing need there."""
        self.tokens = PackedGrids(self.grids, self.is_text, device)

    @property
    def _counts_are_known(self) -> bool:
        return self.settings.method != "vlm_pruner" or self.settings.parameters.fill_budget

    def _select(self, hidden_states: torch.Tensor) -> None:
        num_heads = self.config.num_key_value_heads
        if self.keys.shape[1] != num_heads:
            raise ValueError(
                f"Decoder layer {self.layer - 1} has {self.keys.shape[1]} key heads here, the whole model {num_heads}. Tensor "
                "parallelism is not supported, because each rank would choose other tokens."
            )
        if self.tokens.device != hidden_states.device:
            self.prepare(hidden_states.device)
        self.tokens.hidden_states = self.tokens.take(hidden_states.detach())
        keys = self.tokens.take(self.keys.detach().to(hidden_states.device).transpose(1, 2)).transpose(0, 1)
        self.keys = None
        select = SELECTORS[self.settings.method]
        self.selection = select(self.tokens.hidden_states, keys, self.tokens.batch, self.settings.parameters)

    def _make_packing(self, hidden_states: torch.Tensor, cache: Cache | None) -> None:
        length, tokens, chosen = hidden_states.shape[1], self.tokens, self.selection.kept
        counts = tokens.counts_of_rows(self.selection.counts)
        packed_length = max(counts)
        kept = tokens.is_text.clone()
        kept.view(-1).index_fill_(0, tokens.places[chosen], True)
        # A stable sort takes the dropped tokens to the left and leaves the kept ones in order at the right.
        index = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, length - packed_length :]
        # The last kept token of a row has place packed_length - 1, counted back from there.
        place = packed_length - kept.flip(1).cumsum(1).flip(1)
        merged_places = None
        if self.selection.members is not None and self.settings.parameters.aggregation_weight < 1:
            merged_places = tokens.rows[chosen], place.view(-1)[tokens.places[chosen]]
        if not self._counts_are_known:
            self._make_mask(hidden_states, cache, counts)
        valid = None if self.valid is None else self.valid.to(index.device)
        self.packing = Packing(index, valid, kept, merged_places)

    def _pack_and_merge(self, hidden_states: torch.Tensor) -> torch.Tensor:
        packed = self.packing.pack(hidden_states)
        if self.packing.merged_places is None:
            return packed
        states, self.tokens.hidden_states = self.tokens.hidden_states, None
        if states is None or torch.is_grad_enabled():  # the gradient belongs to this run of the layer
            states = self.tokens.take(hidden_states)
        merged = aggregate_tokens(states, self.selection, self.settings.parameters.aggregation_weight)
        return packed.index_put_(self.packing.merged_places, merged)

    def _make_mask(self, hidden_states: torch.Tensor, cache: Cache | None, counts: Sequence[int]) -> None:
        """The mask of the pruned layers, whose rows will hold `counts` tokens of this call."""
        packed, self.valid = hidden_states[:, : max(counts)], self.tokens.valid(counts)
        padding_mask = self.valid
        if cache is not None:
            kv_length, _ = cache.get_mask_sizes(packed.shape[1], self.layer)
            state = pruning_state(cache) or PrunedCacheState(self.layer)
            padding_mask = state.padding_mask_with(self.valid, packed, self.past_length, self.attention_mask, kv_length)
        self.mask = self._causal_mask(packed, padding_mask, cache)

    def _remember(self, cache: Cache | None) -> None:
        """Write down what was kept, here and with the cache."""
        order = self.tokens.layout.place[self.selection.order].split(self.selection.counts)
        positions = (self.tokens.columns + self.past_length).split(self.tokens.batch.sizes)
        self.record = PruningRecord(
            tuple(
                PrunedImage(grid.row, grid.image, grid.view, grid.modality, grid.grid, *places)
                for grid, *places in zip(self.grids, positions, order, strict=True)
            )
        )
        if cache is not None:
            index, valid, length = self.packing.index, self.packing.valid, self.packing.kept.shape[1]
            state = open_state(cache, self.layer)
            state.extend(index, valid, length, self.past_length, self.record, self.attention_mask)

    def _continued_mask(self, hidden_states: torch.Tensor, cache: Cache) -> torch.Tensor | None:
        if self.prepared_mask is not None:
            return self.prepared_mask
        padding_mask = continued_padding_mask(cache, self.attention_mask, hidden_states.shape[1])
        if padding_mask is None and hidden_states.shape[1] == 1 and not cache.is_compileable:
            return None  # one token sees all entries: as under every backend without a mask, and without the work of making one
        return self._causal_mask(hidden_states, padding_mask, cache)

    def _causal_mask(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None, cache: Cache | None):
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=padding_mask,
            position_ids=None,
            layer_idx=self.layer,
            **{CACHE_NAME: cache},
        )


def _on_device(layer_inputs: dict, device: torch.device) -> dict:
    """Move the inputs of the pruned layers, for models whose layers are spread over devices."""

    def move(value):
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        return value.to(device) if hasattr(value, "to") else value

    return {name: move(value) for name, value in layer_inputs.items()}


def make_plan(
    config: PreTrainedConfig,
    settings: PruningSettings | None,
    cache: Cache | None,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    visuals: Sequence[VisualTokens],
    num_outputs: int = 0,
) -> PruningPlan:
    """Plan one forward call that prunes, or that goes on with a pruned cache.

    Args:
        config: the decoder's config.
        settings: what to prune, or None to add the new tokens unpruned.
        cache: the cache, if there is one.
        attention_mask: the caller's 2-D mask, None, or what `create_masks_for_generate` below made.
        position_ids: the caller's, if any.
        visuals: the images and videos among the new tokens.
        num_outputs: how many of the last outputs the caller asks for, or 0 where that is not said.

    Raises:
        ValueError: for packed sequences, for a cache that was pruned at another layer, and what `visual_grids` raises.
    """
    state = pruning_state(cache)
    prepared_mask = attention_mask.get(PRUNED_MASK) if isinstance(attention_mask, dict) else None
    if settings is None or not visuals:
        if state is None:
            raise ValueError("Nothing to plan: no visual tokens to prune and no pruned cache.")
        mask = None if prepared_mask is not None else attention_mask
        return PruningPlan(config, state.layer, mask, prepared_mask=prepared_mask)
    if state is not None and state.layer != settings.layer:
        raise ValueError(
            f"The cache was pruned at pruning_layer={state.layer}, this call would prune at pruning_layer={settings.layer}. "
            "Use one layer for a whole conversation, or start with a new cache."
        )
    if cache is None and attention_mask is None:
        _refuse_packed_sequences(position_ids)
    past_length = 0 if cache is None else int(cache.get_seq_length())
    device = visuals[0].mask.device
    masks = [visual.mask for visual in visuals] + ([] if attention_mask is None else [attention_mask.to(device, torch.bool)])
    masks = _on_host(masks)
    visuals = [replace(visual, mask=mask) for visual, mask in zip(visuals, masks, strict=False)]
    attention_mask = None if attention_mask is None else masks[-1]
    grids = [grid for visual in visuals for grid in visual_grids(visual, settings.ratio)]
    grids.sort(key=lambda grid: grid.row)
    batch, length = visuals[0].mask.shape
    grids = keep_needed_outputs(grids, attention_mask, length, num_outputs)
    is_text = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask[:, -length:].clone()
    for grid in grids:
        is_text[grid.row, grid.columns] = False
    plan = PruningPlan(config, settings.layer, attention_mask, grids, settings, past_length=past_length, is_text=is_text)
    if grids:
        plan.prepare(device)
    return plan


def _on_host(masks: Sequence[torch.BoolTensor]) -> list[torch.BoolTensor]:
    """Copies of the masks on the host, in one transfer."""
    flat = torch.cat([mask.flatten() for mask in masks]).cpu()
    parts = flat.split([mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def check_mask(attention_mask) -> None:
    """Raise a ValueError for a mask that says more than which tokens are padding, and that is not made by `generate`."""
    if attention_mask is None or (isinstance(attention_mask, dict) and PRUNED_MASK in attention_mask):
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "Pruning needs a 2-D attention_mask [batch, length] that marks padding, because layers hold different tokens; got "
            f"{type(attention_mask).__name__} of shape {tuple(getattr(attention_mask, 'shape', ()))}. "
            "Set pruning_ratio=0 to use it."
        )


def _refuse_packed_sequences(position_ids: torch.Tensor | None) -> None:
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]  # M-RoPE: text positions, then time, height and width
    if position_ids is not None and position_ids.ndim == 2 and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids restart within a row, which means several sequences packed into one. Pruning does not support that: "
            "give each sequence a row of its own, or set pruning_ratio=0."
        )


class PrunedLayerMixin:
    """Put in front of a decoder layer's class. Without a plan it is the stock layer."""

    def __call__(self, hidden_states: torch.Tensor, *args, pruning_plan: PruningPlan | None = None, **kwargs):
        if pruning_plan is not None:  # here, outside of what gradient checkpointing runs again
            hidden_states = pruning_plan.add_deepstack(self.self_attn.layer_idx, hidden_states)
        return super().__call__(hidden_states, *args, pruning_plan=pruning_plan, **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args, pruning_plan: PruningPlan | None = None, **kwargs):
        if pruning_plan is not None:
            hidden_states, kwargs = pruning_plan.before_layer(self.self_attn.layer_idx, hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)


def prune_decoder(decoder: nn.Module, layer_classes: Sequence[type[nn.Module]]) -> None:
    """Let the layers of this decoder follow a plan. Weights and their names stay as they are.

    Args:
        layer_classes: each a subclass, by `PrunedLayerMixin` in front, of a layer class whose layers hand keywords on, and
            whose attention calls `update` of the cache once with keys after RoPE. A subclass has the name of its stock class,
            by which FSDP and `device_map` look for layers.

    Raises:
        ValueError: for a decoder of other layers.
    """
    pruned_class_of = {layer_class.__bases__[1]: layer_class for layer_class in layer_classes}
    for layer in decoder.layers:
        if type(layer) not in pruned_class_of:
            supported = ", ".join(stock_class.__module__.split(".")[-2] for stock_class in pruned_class_of)
            raise ValueError(
                f"Language models of type {decoder.config.model_type!r} are not supported. Supported: {supported}."
            )
        layer.__class__ = pruned_class_of[type(layer)]
