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
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from .configuration_vlmpruner import PruningSettings
from .token_pruning import Selection, aggregate_tokens, num_tokens_to_keep, select_tokens


@dataclass(frozen=True)
class GridView:
    """The visual tokens of an image that lie on one (height, width) grid.

    Token (y, x) of the grid is row `start + y * row_stride + x` of the image's features. Rows of the features that no view
    covers (a class token, row-end newlines) are structure: never candidates, always kept.
    """

    height: int
    width: int
    start: int = 0
    row_stride: int | None = None

    def token_indices(self, device: torch.device) -> torch.LongTensor:
        """Rows of the image's features, in row-major order of the grid. [height * width]"""
        y = torch.arange(self.height, device=device)[:, None] * (self.row_stride or self.width)
        return (self.start + y + torch.arange(self.width, device=device)).flatten()


@dataclass(frozen=True)
class PrunedImage:
    """What was kept of one grid of visual tokens.

    Attributes:
        row: row of the batch.
        image: number of the image in the request, counted over all rows in order.
        view: number of the grid within its image (LLaVA-1.5 has one).
        grid: (height, width) of the grid, in tokens.
        positions: [height * width] int64, place of each of the grid's tokens in the sequence, padding included.
        order: [num_kept] int64, indices into the grid (row-major) in order of selection.
    """

    row: int
    image: int
    view: int
    grid: tuple[int, int]
    positions: torch.LongTensor
    order: torch.LongTensor

    @property
    def kept(self) -> torch.LongTensor:
        """[num_kept] int64, the kept indices into the grid, ascending."""
        return self.order.sort().values

    @property
    def num_visual(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_kept(self) -> int:
        return self.order.shape[0]


@dataclass(frozen=True)
class PruningRecord:
    """What a request kept: one `PrunedImage` per grid, ordered by row and image."""

    images: tuple[PrunedImage, ...] = ()

    def __iter__(self) -> Iterator[PrunedImage]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_visual(self) -> int:
        """Visual tokens on all grids before pruning."""
        return sum(image.num_visual for image in self.images)

    @property
    def num_kept(self) -> int:
        """Visual tokens on all grids after pruning."""
        return sum(image.num_kept for image in self.images)


@dataclass(frozen=True)
class VisualGrid:
    """One grid to prune: which row of the batch, which `columns` [num_visual] of this call's tokens, how many to keep."""

    row: int
    image: int
    view: int
    grid: tuple[int, int]
    columns: torch.LongTensor
    num_keep: int


@dataclass
class Packing:
    """Which of a call's `length` tokens go on, and where.

    Attributes:
        index: [batch, packed_length] int64, the column that each packed place takes.
        valid: [batch, packed_length] bool, False where a place is padding; None when no place is.
        kept: [batch, length] bool, whether a token goes on.
        merged_places: the (row, packed place) of each kept visual token, in the order of the selections.
    """

    index: torch.LongTensor
    valid: torch.BoolTensor | None
    kept: torch.BoolTensor
    merged_places: tuple[torch.LongTensor, torch.LongTensor]

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


def visual_grids(
    visual_mask: torch.BoolTensor, images: Sequence[tuple[int, Sequence[GridView]]], ratio: float
) -> list[VisualGrid]:
    """Place the images of a call in its tokens.

    Args:
        visual_mask: [batch, length], True at the tokens that hold image features, which fill them in row-major order.
        images: for each image in prompt order, its number of features and its grids.
        ratio: fraction of each grid to remove.

    Raises:
        ValueError: if the images do not fill the rows one after another, or a grid does not fit its image.
    """
    columns = visual_mask.nonzero()[:, 1]
    rows = _rows_of_images(visual_mask.sum(1).tolist(), [num_features for num_features, _ in images])
    grids, offset = [], 0
    for image, (row, (num_features, views)) in enumerate(zip(rows, images, strict=True)):
        image_columns = columns[offset : offset + num_features]
        offset += num_features
        for number, view in enumerate(views):
            tokens = view.token_indices(columns.device)
            num_keep = num_tokens_to_keep(len(tokens), ratio)
            grids.append(VisualGrid(row, image, number, (view.height, view.width), image_columns[tokens], num_keep))
    return grids


def _rows_of_images(tokens_of_rows: list[int], features_of_images: list[int]) -> list[int]:
    rows, row, free = [], 0, tokens_of_rows[0] if tokens_of_rows else 0
    for image, num_features in enumerate(features_of_images):
        while free == 0 and row + 1 < len(tokens_of_rows):
            row += 1
            free = tokens_of_rows[row]
        if num_features > free:
            raise ValueError(
                f"Image {image} has {num_features} features, but row {row} of the batch has only {free} of its "
                f"{tokens_of_rows[row]} image placeholders left. Each row needs the placeholders of its own images. "
                "(A prompt that is prefilled in chunks can not be cut within an image: set prefill_chunk_size=None.)"
            )
        rows.append(row)
        free -= num_features
    return rows


class KeyRecorder:
    """A cache as one attention layer sees it, which also leaves that layer's new keys (after RoPE) with the plan.

    It works with every attention backend, and without a cache, because `update` is the one place all of them share.
    """

    def __init__(self, cache: Cache | None, plan: "PruningPlan"):
        self.cache = cache
        self.plan = plan

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.plan.keys = key_states
        if self.cache is None:
            return key_states, value_states
        return self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.cache, name)


class PrunedCacheState:
    """What a cache remembers of the tokens that its layers from `layer` on do not hold.

    `positions` describes the first entries of those layers: [rows, entries] int64, the place of an entry in the full sequence,
    -1 for padding. Everything after them, and after `full_length` in the full sequence, is one to one: decoded tokens and
    later turns of text. `rows` tells which described row each row of the cache is, because beam search moves rows at every step.
    """

    def __init__(self, layer: int):
        self.layer = layer
        self.clear()

    def clear(self) -> None:
        self.full_length = 0
        self.positions: torch.LongTensor | None = None
        self.has_padding = False
        self.rows: torch.LongTensor | None = None
        self._record = PruningRecord()

    @property
    def num_entries(self) -> int:
        return 0 if self.positions is None else self.positions.shape[1]

    @property
    def record(self) -> PruningRecord:
        """What was kept, for the rows as they are now."""
        self._settle_rows()
        return self._record

    def extend(self, packing: Packing, record: PruningRecord, attention_mask: torch.Tensor | None, past_length: int) -> None:
        """Describe the entries up to the end of a call that prunes.

        Args:
            packing: of the call's tokens.
            record: what the call kept.
            attention_mask: the caller's 2-D mask of the whole sequence, or None.
            past_length: full sequence length before the call.
        """
        self._settle_rows()
        batch, device = packing.index.shape[0], packing.index.device
        since = torch.arange(self.full_length, past_length, device=device).expand(batch, -1)
        if attention_mask is not None:
            is_padding = attention_mask[:, self.full_length : past_length].to(device) == 0
            self.has_padding |= bool(is_padding.any())
            since = since.masked_fill(is_padding, -1)
        new = packing.index + past_length
        if packing.valid is not None:
            self.has_padding = True
            new = new.masked_fill(~packing.valid, -1)
        described = [] if self.positions is None else [self.positions.to(device)]
        self.positions = torch.cat([*described, since, new], dim=1)
        self.full_length = past_length + packing.kept.shape[1]
        num_images = max((image.image + 1 for image in self._record), default=0)
        later = tuple(replace(image, image=image.image + num_images) for image in record)
        self._record = PruningRecord(self._record.images + later)

    def padding_mask(self, attention_mask: torch.Tensor | None, kv_length: int) -> torch.Tensor | None:
        """The 2-D mask of the pruned layers' entries, or None where none is padding.

        Args:
            attention_mask: the caller's 2-D mask of the whole sequence, or None where it has no padding.
            kv_length: number of entries that the layers will hold or have room for.
        """
        if attention_mask is None and not self.has_padding:
            return None
        self._settle_rows()
        described = self.positions >= 0
        if attention_mask is None:
            later = described.new_ones(described.shape[0], kv_length - self.num_entries)
        else:
            later = attention_mask[:, self.full_length :].to(described.device, torch.bool)
        return torch.cat([described, later], dim=1)

    def crop(self, target: int, num_entries: int) -> int:
        """Forget what lies at and after `target` in the full sequence.

        Args:
            target: full sequence length to go back to, below the present one.
            num_entries: how many entries the pruned layers hold now.

        Returns:
            How many entries to remove from the pruned layers.

        Raises:
            ValueError: where the cut would go through an image, or leave rows of different length.
        """
        if target >= self.full_length:
            return num_entries - self.num_entries - (target - self.full_length)
        self._settle_rows()
        gone = self.positions >= target
        stays = (self.positions >= 0) & ~gone
        num_stay = int(stays.any(0).nonzero().max()) + 1 if stays.any() else 0
        cut = [image for image in self._record if image.positions[0] < target <= image.positions[-1]]
        if cut or gone[:, :num_stay].any():
            where = f"through image {cut[0].image} of row {cut[0].row}" if cut else "through pruned rows at different places"
            raise ValueError(
                f"Cropping this cache to {target} tokens would cut {where}, where tokens were pruned. Crop to a length at which "
                "every image is wholly in or wholly out."
            )
        removed = num_entries - num_stay
        self.positions = self.positions[:, :num_stay]
        self.full_length = target
        self._record = PruningRecord(tuple(image for image in self._record if image.positions[0] < target))
        return removed

    def move_rows(self, rows: torch.LongTensor) -> None:
        """Row r of the cache becomes what row `rows[r]` was."""
        if self.positions is not None:
            rows = rows.to(self.positions.device)
            self.rows = rows if self.rows is None else self.rows[rows]

    def repeat_rows(self, repeats: int) -> None:
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], device=self.positions.device) if self.rows is None else self.rows
            self.rows = rows.repeat_interleave(repeats)

    def _settle_rows(self) -> None:
        if self.rows is None:
            return
        self.positions = self.positions[self.rows]
        images = [
            replace(image, row=row)
            for row, source in enumerate(self.rows.tolist())
            for image in self._record
            if image.row == source
        ]
        number_of = {}
        self._record = PruningRecord(
            tuple(replace(image, image=number_of.setdefault((image.row, image.image), len(number_of))) for image in images)
        )
        self.rows = None


class PrunedCacheMixin:
    """Put in front of a cache's class when its layers from `pruning_state.layer` on hold fewer tokens than those below."""

    pruning_state: PrunedCacheState

    @property
    def pruning_record(self) -> PruningRecord:
        """What was kept of each image, over all turns that this cache holds."""
        return self.pruning_state.record

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negated number of tokens to remove from a pruned cache, got {tokens_to_remove}.")
        full_length, layer = self.get_seq_length(), self.pruning_state.layer
        target = max(full_length + tokens_to_remove, 0)
        removed = full_length - target
        removed_pruned = self.pruning_state.crop(target, self.get_seq_length(layer)) if removed else 0
        for number, cache_layer in enumerate(self.layers):
            cache_layer.crop(-removed if number < layer else -removed_pruned)

    def reset(self) -> None:
        super().reset()
        self.pruning_state.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.pruning_state.move_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.pruning_state.move_rows(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.pruning_state.repeat_rows(repeats)


@lru_cache
def _pruned_cache_class(cache_class: type[Cache]) -> type[Cache]:
    return type(f"Pruned{cache_class.__name__}", (PrunedCacheMixin, cache_class), {})


def pruning_state(cache: Cache | None) -> PrunedCacheState | None:
    """The state of a cache that was pruned, else None."""
    state = getattr(cache, "pruning_state", None)
    return state if state is not None and state.positions is not None else None


def _open_state(cache: Cache, layer: int) -> PrunedCacheState:
    if not isinstance(cache, PrunedCacheMixin):
        cache.__class__ = _pruned_cache_class(type(cache))
        cache.pruning_state = PrunedCacheState(layer)
    cache.pruning_state.layer = layer
    return cache.pruning_state


@dataclass
class PruningPlan:
    """What one forward call does at and above the pruning layer.

    Attributes:
        config: the decoder's config.
        layer: the pruning layer.
        attention_mask: the caller's 2-D mask [batch, past + length], or None.
        grids: what to select from; empty in a call that only continues on a pruned cache.
        settings: how to select; None in such a call.
        prepared_mask: the mask of the layers from `layer` on, where `generate` made it in advance.
        record: what was kept, once the pruning layer has run.
    """

    config: PreTrainedConfig
    layer: int
    attention_mask: torch.Tensor | None = None
    grids: Sequence[VisualGrid] = ()
    settings: PruningSettings | None = None
    prepared_mask: torch.Tensor | None = None
    record: PruningRecord | None = field(default=None, init=False)
    keys: torch.Tensor | None = field(default=None, init=False)
    selections: list[Selection] | None = field(default=None, init=False)
    packing: Packing | None = field(default=None, init=False)
    layer_inputs: dict | None = field(default=None, init=False)

    def before_layer(self, layer_idx: int, hidden_states: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict]:
        """The hidden states and keyword inputs that decoder layer `layer_idx` runs on instead of the given ones."""
        if layer_idx == self.layer - 1 and self.grids:
            inputs = inputs | {"past_key_values": KeyRecorder(inputs.get("past_key_values"), self)}
        if layer_idx == self.layer:
            hidden_states = self._enter(hidden_states, inputs)
        if layer_idx >= self.layer:
            inputs = inputs | _on_device(self.layer_inputs, hidden_states.device)
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

    def ignore_dropped(self, labels: torch.Tensor, is_shifted: bool = False, ignore_index: int = -100) -> torch.Tensor:
        """`labels` [batch, length] with `ignore_index` for those that a dropped token would have to predict."""
        if self.packing is None:
            return labels
        dropped = ~self.packing.kept.to(labels.device)
        labels = labels.clone()
        if is_shifted:
            labels[dropped] = ignore_index
        else:
            labels[:, 1:][dropped[:, :-1]] = ignore_index
        return labels

    def _enter(self, hidden_states: torch.Tensor, inputs: dict) -> torch.Tensor:
        cache = inputs.get("past_key_values")
        if not self.grids:
            self.layer_inputs = {"attention_mask": self._continued_mask(hidden_states, cache), "position_ids": None}
            return hidden_states
        is_first_run = self.packing is None  # gradient checkpointing runs a layer again: same tokens, new graph
        if is_first_run:
            self._select(hidden_states)
            self._make_packing(hidden_states)
        packed = self._pack_and_merge(hidden_states)
        if is_first_run:
            self.layer_inputs = {
                "attention_mask": self._packed_mask(packed, cache),
                "position_ids": None,
                "position_embeddings": tuple(self.packing.pack(part) for part in inputs["position_embeddings"]),
            }
        return packed

    def _select(self, hidden_states: torch.Tensor) -> None:
        num_heads = self.config.num_key_value_heads
        if self.keys.shape[1] != num_heads:
            raise ValueError(
                f"Decoder layer {self.layer - 1} has {self.keys.shape[1]} key heads on this device, the whole model {num_heads}. "
                "Tensor parallelism is not supported, because each rank would choose other tokens."
            )
        hidden_states, device = hidden_states.detach(), hidden_states.device
        self.grids = [replace(grid, columns=grid.columns.to(device)) for grid in self.grids]
        keys, self.keys = self.keys.detach().to(device), None
        self.selections = [
            select_tokens(
                hidden_states[grid.row, grid.columns],
                keys[grid.row][:, grid.columns],
                grid.grid,
                grid.num_keep,
                self.settings.parameters,
            )
            for grid in self.grids
        ]

    def _make_packing(self, hidden_states: torch.Tensor) -> None:
        batch, length = hidden_states.shape[:2]
        kept = torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
        if self.attention_mask is not None:
            kept &= self.attention_mask[:, -length:].to(kept.device, torch.bool)
        chosen = [
            (torch.full_like(selection.kept, grid.row), grid.columns[selection.kept])
            for grid, selection in zip(self.grids, self.selections, strict=True)
        ]
        rows, columns = (torch.cat(part) for part in zip(*chosen, strict=True))
        for grid in self.grids:
            kept[grid.row, grid.columns] = False
        kept[rows, columns] = True
        counts = kept.sum(1).tolist()
        packed_length = max(counts)
        # A stable sort takes the dropped tokens to the left and leaves the kept ones in order at the right.
        index = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, length - packed_length :]
        valid = None if min(counts) == packed_length else kept.gather(1, index)
        # The last kept token of a row has place packed_length - 1, counted back from there.
        place = packed_length - kept.flip(1).cumsum(1).flip(1)
        self.packing = Packing(index, valid, kept, merged_places=(rows, place[rows, columns]))

    def _pack_and_merge(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.settings.parameters.aggregation_weight
        merged = [
            aggregate_tokens(hidden_states[grid.row, grid.columns], selection, weight)
            for grid, selection in zip(self.grids, self.selections, strict=True)
        ]
        return self.packing.pack(hidden_states).index_put(self.packing.merged_places, torch.cat(merged))

    def _packed_mask(self, packed: torch.Tensor, cache: Cache | None) -> torch.Tensor | None:
        """The mask of the pruned layers. Also writes down what was kept, here and with the cache."""
        # The layers below have stored this call's tokens already.
        past_length = 0 if cache is None else int(cache.get_seq_length()) - self.packing.kept.shape[1]
        self.record = PruningRecord(
            tuple(
                PrunedImage(grid.row, grid.image, grid.view, grid.grid, grid.columns + past_length, selection.order)
                for grid, selection in zip(self.grids, self.selections, strict=True)
            )
        )
        if cache is None:
            return self._causal_mask(packed, self.packing.valid, cache)
        state = _open_state(cache, self.layer)
        state.extend(self.packing, self.record, self.attention_mask, past_length)
        kv_length, _ = cache.get_mask_sizes(packed.shape[1], self.layer)
        return self._causal_mask(packed, state.padding_mask(None, kv_length), cache)

    def _continued_mask(self, hidden_states: torch.Tensor, cache: Cache) -> torch.Tensor | None:
        if self.prepared_mask is not None:
            return self.prepared_mask
        padding_mask = continued_padding_mask(cache, self.attention_mask, hidden_states.shape[1])
        return self._causal_mask(hidden_states, padding_mask, cache)

    def _causal_mask(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None, cache: Cache | None):
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=padding_mask,
            past_key_values=cache,
            position_ids=None,
            layer_idx=self.layer,
        )


@dataclass
class PruningRequest:
    """What the caller of `forward` asks for, and the plan that the model made of it (None when the stock code ran).

    `num_drafted` of the last tokens may be candidates of speculative decoding, which can copy placeholders from the prompt.
    """

    ratio: float | None = None
    num_drafted: int = 0
    plan: PruningPlan | None = None

    @property
    def record(self) -> PruningRecord | None:
        return None if self.plan is None else self.plan.record

    def without_drafted(self, input_ids: torch.Tensor | None, placeholder: int, num_features: int) -> torch.Tensor | None:
        """`input_ids` to look for placeholders in. A drafted token is text: features came for the prompt's placeholders alone."""
        if not self.num_drafted or input_ids is None or int((input_ids == placeholder).sum()) == num_features:
            return input_ids
        input_ids = input_ids.clone()
        input_ids[:, -self.num_drafted :].masked_fill_(input_ids[:, -self.num_drafted :] == placeholder, -1)
        return input_ids

    def supervised_labels(self, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """See `PruningPlan.ignore_dropped`."""
        return labels if self.plan is None else self.plan.ignore_dropped(labels, **kwargs)


def _on_device(layer_inputs: dict, device: torch.device) -> dict:
    """Move the inputs of the pruned layers, for models whose layers are spread over devices."""

    def move(value):
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        return value.to(device) if hasattr(value, "to") else value

    return {name: move(value) for name, value in layer_inputs.items()}


def continued_padding_mask(cache: Cache, attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The 2-D mask of the pruned layers in a call of `length` tokens that adds no image.

    Raises:
        ValueError: if the caller's 2-D `attention_mask` does not cover the tokens since the last pruned call.
    """
    state = cache.pruning_state
    kv_length, _ = cache.get_mask_sizes(length, state.layer)
    if attention_mask is not None and not cache.is_compileable:
        needed = state.full_length + kv_length - state.num_entries
        if attention_mask.shape[1] != needed:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the cache and the new tokens make {needed}. "
                "Pass the mask of the whole unpruned sequence, or None."
            )
    return state.padding_mask(attention_mask, kv_length)


def make_plan(
    config: PreTrainedConfig,
    settings: PruningSettings | None,
    cache: Cache | None,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    visual_mask: torch.BoolTensor | None,
    images: Sequence[tuple[int, Sequence[GridView]]],
) -> PruningPlan:
    """Plan one forward call that prunes, or that goes on with a pruned cache.

    Args:
        config: the decoder's config.
        settings: what to prune, or None to add the new tokens unpruned.
        cache: the cache, if there is one.
        attention_mask: the caller's 2-D mask, None, or what `create_masks_for_generate` below made.
        position_ids: the caller's, if any.
        visual_mask, images: see `visual_grids`.

    Raises:
        ValueError: for masks and positions that say more than which tokens are padding, for a cache that was pruned at another
            layer, and what `visual_grids` raises.
    """
    state = pruning_state(cache)
    prepared_mask = attention_mask.get(PRUNED_MASK) if isinstance(attention_mask, dict) else None
    if prepared_mask is None and attention_mask is not None:
        shape = getattr(attention_mask, "shape", None)
        if not isinstance(attention_mask, torch.Tensor) or len(shape) != 2:
            raise ValueError(
                "Pruning needs a 2-D attention_mask [batch, length] that marks padding, because layers hold different tokens; got "
                f"{type(attention_mask).__name__} of shape {tuple(shape) if shape else None}. Set pruning_ratio=0 to use it."
            )
    if settings is None or not images:
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
    return PruningPlan(config, settings.layer, attention_mask, visual_grids(visual_mask, images, settings.ratio), settings)


def _refuse_packed_sequences(position_ids: torch.Tensor | None) -> None:
    if position_ids is not None and position_ids.ndim == 2 and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids restart within a row, which means several sequences packed into one. Pruning does not support that: "
            "give each sequence a row of its own, or set pruning_ratio=0."
        )


class PrunedLayerMixin:
    """Put in front of a decoder layer's class. Without a plan it is the stock layer."""

    def forward(self, hidden_states: torch.Tensor, *args, pruning_plan: PruningPlan | None = None, **kwargs):
        if pruning_plan is not None:
            hidden_states, kwargs = pruning_plan.before_layer(self.self_attn.layer_idx, hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)


@lru_cache
def _pruned_layer_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Pruned{layer_class.__name__}", (PrunedLayerMixin, layer_class), {})


# Decoders whose layers take the plan as a keyword and whose attention calls `cache.update` once with keys after RoPE.
SUPPORTED_DECODERS = ("llama", "mistral", "qwen2")


def prune_decoder(decoder: nn.Module) -> set[str]:
    """Let the layers of this decoder follow a plan. Weights and their names stay as they are.

    Returns:
        The names of the new layer classes, for `_no_split_modules`.

    Raises:
        ValueError: for a decoder type that was not tried.
    """
    model_type = decoder.config.model_type
    if model_type not in SUPPORTED_DECODERS:
        raise ValueError(f"Language models of type {model_type!r} are not supported. Supported: {', '.join(SUPPORTED_DECODERS)}.")
    for layer in decoder.layers:
        layer.__class__ = _pruned_layer_class(type(layer))
    names = {type(layer).__name__ for layer in decoder.layers}
    decoder._no_split_modules = {*decoder._no_split_modules, *names}
    return names


def register_weight_renaming(**base_class_of: str) -> None:
    """Let checkpoints of the base classes load into ours: the library renames old parameters by class, and skips custom code.

    Args:
        base_class_of: name of our class -> class name or model type that the library knows a renaming for.
    """
    for name, base in base_class_of.items():
        renaming = get_checkpoint_conversion_mapping(base)
        if renaming is not None:
            register_checkpoint_conversion_mapping(name, renaming, overwrite=True)


# Key of the pruned layers' mask among the masks that `generate` makes in advance for compiled decoding.
PRUNED_MASK = "pruned_attention"
STOCK_MASK = "stock_attention"


class PrunedForConditionalGenerationMixin:
    """What every generating model of ours adds to its stock class, apart from `forward`."""

    _auto_class = "AutoModelForImageTextToText"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """See `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if the checkpoint lacks a weight, where the library would initialise it at random and go on.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of the weights of {cls.__name__}: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}."
            )
        return (model, info) if output_loading_info else model

    def get_pruning_record(self, outputs) -> PruningRecord | None:
        """What was kept, from the outputs of `forward` or `generate(..., return_dict_in_generate=True)`; None if nothing was pruned."""
        record = getattr(outputs, "pruning_record", None)
        if record is None and (state := pruning_state(getattr(outputs, "past_key_values", None))) is not None:
            record = state.record
        return record

    def supervised_loss(self, logits: torch.Tensor, labels: torch.Tensor, request: PruningRequest, **kwargs) -> torch.Tensor:
        """The stock loss, without the labels that a dropped token would predict."""
        if (shift_labels := kwargs.get("shift_labels")) is not None:
            kwargs["shift_labels"] = request.supervised_labels(shift_labels, is_shifted=True)
        labels = request.supervised_labels(labels)
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """The masks that `generate` prepares for compiled decoding, with one more for the pruned layers."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask  # a prefill: the model makes its masks itself, once it knows what stays
        masks = create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        state = pruning_state(past_key_values)
        if state is None:
            return masks
        pruned_mask = create_causal_mask(
            config=config.get_text_config(decoder=True),
            inputs_embeds=inputs_embeds,
            attention_mask=continued_padding_mask(past_key_values, attention_mask, inputs_embeds.shape[1]),
            past_key_values=past_key_values,
            position_ids=None,
            layer_idx=state.layer,
        )
        return (masks if isinstance(masks, dict) else {STOCK_MASK: masks}) | {PRUNED_MASK: pruned_mask}


def stock_mask(attention_mask: torch.Tensor | dict | None) -> torch.Tensor | dict | None:
    """Of masks made by `create_masks_for_generate`, those of the stock decoder; any other mask as it is."""
    if not isinstance(attention_mask, dict) or PRUNED_MASK not in attention_mask:
        return attention_mask
    masks = {name: mask for name, mask in attention_mask.items() if name != PRUNED_MASK}
    return masks.get(STOCK_MASK, masks)
