"""What a cache remembers of pruned tokens: which entries are padding, where they stood, what was kept.

The state lives with the cache, never on a module, and follows it through cropping, reordering, copying and resetting.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, wraps

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

from .token_pruning_device import upload


# Attention whose masks say how far each query sees. Of every other a 2-D mask alone tells how many entries a cache holds.
CAUSAL_BY_MASK = ("sdpa", "eager", "flex_attention")

# What transformers calls a cache in arguments and outputs: "cache" from 5.24 on, "past_key_values" before.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def takes_cache(function: Callable) -> Callable:
    """Let an argument `cache` come under the library's name for it. Where "past_key_values" is the old name of it, that still
    works and is deprecated, as in the stock classes; where it is the only one, "cache" raises a ValueError."""
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function)

    @wraps(function)
    def renamed(*args, **kwargs):
        if "cache" in kwargs:
            raise ValueError(f"Pass a cache as `{CACHE_NAME}`: this version of transformers does not call it `cache`.")
        if CACHE_NAME in kwargs:
            kwargs["cache"] = kwargs.pop(CACHE_NAME)
        return function(*args, **kwargs)

    return renamed


def cache_of(outputs) -> Cache | None:
    """The cache among the outputs of `forward` or `generate`, if there is one."""
    return getattr(outputs, CACHE_NAME, None)


@dataclass(frozen=True)
class PrunedImage:
    """What was kept of one grid of visual tokens.

    Attributes:
        row: row of the batch.
        image: number of the image (or video) in the request, counted over all rows in order.
        view: number of the grid within its image: LLaVA-1.5 has one, LLaVA-NeXT a base view and a larger one, InternVL and
            SmolVLM one for each tile, a video one for each temporal slice.
        modality: "image" or "video".
        grid: (height, width) of the grid in tokens, or (frames, height, width).
        positions: [num_visual] int64, place of each of the grid's tokens in the sequence, padding included.
        order: [num_kept] int64, indices into the grid (row-major) in order of selection; of the last stage where there are
            several, and then possibly none.
        stages: for each stage its decoder layer, and what was left from it on, as `order`.
    """

    row: int
    image: int
    view: int
    modality: str
    grid: tuple[int, ...]
    positions: torch.LongTensor
    order: torch.LongTensor
    stages: tuple[tuple[int, torch.LongTensor], ...] = ()

    @property
    def kept(self) -> torch.LongTensor:
        """[num_kept] int64, the kept indices into the grid, ascending."""
        return self.order.sort().values

    @property
    def num_visual(self) -> int:
        return math.prod(self.grid)

    @property
    def num_kept(self) -> int:
        return self.order.shape[0]

    def mean_kept(self, num_layers: int, first: int | None = None) -> float:
        """Tokens that a layer sees, on average over the layers from `first` on, by default the first stage's. 0 is all."""
        first = self.stages[0][0] if first is None else first
        ends = [layer for layer, _ in self.stages[1:]] + [num_layers]
        widths = [(end - max(layer, first), len(order)) for (layer, order), end in zip(self.stages, ends, strict=True)]
        seen = sum(width * count for width, count in widths) + max(self.stages[0][0] - first, 0) * self.num_visual
        return seen / (num_layers - first)


@dataclass(frozen=True)
class PruningRecord:
    """What a request kept: one `PrunedImage` per grid, ordered by row and image."""

    images: tuple[PrunedImage, ...] = ()

    def __iter__(self) -> Iterator[PrunedImage]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def after(self, earlier: "PruningRecord") -> "PruningRecord":
        """This record with its images and videos counted on from an earlier one."""
        first = {
            modality: max((image.image + 1 for image in earlier if image.modality == modality), default=0)
            for modality in ("image", "video")
        }
        return PruningRecord(tuple(replace(image, image=image.image + first[image.modality]) for image in self.images))

    @property
    def num_visual(self) -> int:
        """Visual tokens on all grids before pruning."""
        return sum(image.num_visual for image in self.images)

    @property
    def num_kept(self) -> int:
        """Visual tokens on all grids after pruning."""
        return sum(image.num_kept for image in self.images)


class PrunedCacheState:
    """What a cache remembers of the tokens that its layers from `layer` on do not hold.

    `positions` describes the first entries of those layers: [rows, entries] int64, the place of an entry in the full sequence,
    -1 for padding. Everything after them, and after `full_length` in the full sequence, is one to one: decoded tokens and
    later turns of text. `rows` tells which described row each row of the cache is, since beam search moves rows at every step.
    Where a method says how many tokens an entry stands for, `sizes` has it, [rows, entries, 2] as `PruningMethod.sizes`; it is
    None where each stands for itself, as everything after them does.
    """

    def __init__(self, layer: int):
        self.layer = layer
        self.is_packed = False  # whether the positions of these layers count the kept tokens alone
        self.clear()

    def clear(self) -> None:
        self.full_length = 0
        self.positions: torch.LongTensor | None = None
        self.sizes: torch.Tensor | None = None
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

    def extend(
        self,
        index: torch.LongTensor,
        valid: torch.BoolTensor | None,
        length: int,
        past_length: int,
        record: PruningRecord,
        attention_mask: torch.Tensor | None,
        sizes: torch.Tensor | None = None,
    ) -> None:
        """Describe the entries up to the end of a call that prunes.

        Args:
            index: [batch, entries] int64, the column among the call's tokens that each new entry holds.
            valid: [batch, entries] bool, False where a new entry is padding; None when none is.
            length: number of the call's tokens.
            past_length: full sequence length before the call.
            record: what the call kept.
            attention_mask: the caller's 2-D mask of the whole sequence on the host, or None.
            sizes: [batch, entries, 2] float32, how many tokens each new entry stands for; None where each is one.
        """
        self._settle_rows()
        batch, device = index.shape[0], index.device
        since = torch.arange(self.full_length, past_length, device=device).expand(batch, -1)
        is_padding = self._padding_since(past_length, attention_mask)
        if is_padding is not None:
            since = since.masked_fill(upload(is_padding, device), -1)
        new = index + past_length
        if valid is not None:
            new = new.masked_fill(~valid, -1)
        self.has_padding |= valid is not None or is_padding is not None
        described = [] if self.positions is None else [self.positions.to(device)]
        if sizes is not None or self.sizes is not None:
            ones = torch.ones(batch, self.num_entries + since.shape[1] + new.shape[1], 2, device=device)
            parts = [ones[:, : self.num_entries] if self.sizes is None else self.sizes.to(device), ones[:, : since.shape[1]]]
            self.sizes = torch.cat([*parts, ones[:, : new.shape[1]] if sizes is None else sizes], dim=1)
        self.positions = torch.cat([*described, since, new], dim=1)
        self.full_length = past_length + length
        self._record = PruningRecord(self._record.images + record.after(self._record).images)

    def _padding_since(self, past_length: int, attention_mask: torch.Tensor | None) -> torch.BoolTensor | None:
        """Which tokens between those described and `past_length` are padding, on the host; None where none is."""
        if attention_mask is None or past_length == self.full_length:
            return None
        is_padding = attention_mask[:, self.full_length : past_length] == 0
        return is_padding if is_padding.any() else None

    def padding_mask_with(
        self,
        valid: torch.BoolTensor | None,
        new: torch.Tensor,
        past_length: int,
        attention_mask: torch.Tensor | None,
        kv_length: int,
    ) -> torch.BoolTensor | None:
        """The 2-D mask of the pruned layers' entries once they hold the `new` ones too; see `extend` and `padding_mask`.

        Args:
            new: [batch, entries, ...], any tensor of that shape on the right device.
        """
        is_padding = self._padding_since(past_length, attention_mask)
        if valid is None and is_padding is None and not self.has_padding:
            return None
        self._settle_rows()
        batch, num_new = new.shape[:2]
        ones = torch.ones(batch, kv_length, dtype=torch.bool, device=new.device)
        described = ones[:, :0] if self.positions is None else self.positions.to(new.device) >= 0
        num_since = past_length - self.full_length
        since = ones[:, :num_since] if is_padding is None else upload(~is_padding, new.device)
        parts = [described, since, ones[:, :num_new] if valid is None else valid]
        room = kv_length - sum(part.shape[1] for part in parts)
        return torch.cat([*parts, ones[:, :room]], dim=1)

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

    def sizes_of_rows(self) -> torch.Tensor:
        """`sizes` for the rows as they are now."""
        self._settle_rows()
        return self.sizes

    def dropped_of_rows(self, batch: int) -> torch.LongTensor:
        """How many tokens of each row these layers do not hold. [batch] int64, on the host."""
        dropped = torch.zeros(batch, dtype=torch.long)
        for image in self.record:
            dropped[image.row] += image.num_visual - image.num_kept
        return dropped

    def check_crop(self, target: int) -> None:
        """Raise a ValueError where a cut at `target` would go through an image, or leave rows of different length."""
        if target >= self.full_length:
            return
        self._settle_rows()
        gone = self.positions >= target
        stays = (self.positions >= 0) & ~gone
        num_stay = int(stays.any(0).nonzero().max()) + 1 if stays.any() else 0
        cut = [image for image in self._record if image.positions[0] < target <= image.positions[-1]]
        if cut or gone[:, :num_stay].any():
            where = (
                f"through {cut[0].modality} {cut[0].image} of row {cut[0].row}" if cut else "through rows at different places"
            )
            raise ValueError(
                f"Cropping this cache to {target} tokens would cut {where}, where tokens were pruned. "
                "Crop to a length at which every image is wholly in or wholly out."
            )

    def crop(self, target: int, num_entries: int) -> int:
        """Forget what lies at and after `target` in the full sequence.

        Args:
            target: full sequence length to go back to, below the present one.
            num_entries: how many entries the pruned layers hold now.

        Returns:
            How many entries to remove from the pruned layers.

        Raises:
            ValueError: as `check_crop`.
        """
        self.check_crop(target)
        if target >= self.full_length:
            return num_entries - self.num_entries - (target - self.full_length)
        self._settle_rows()
        gone = self.positions >= target
        stays = (self.positions >= 0) & ~gone
        num_stay = int(stays.any(0).nonzero().max()) + 1 if stays.any() else 0
        removed = num_entries - num_stay
        self.positions = self.positions[:, :num_stay]
        self.sizes = None if self.sizes is None else self.sizes[:, :num_stay]
        self.full_length = target
        self._record = PruningRecord(tuple(image for image in self._record if image.positions[0] < target))
        return removed

    def move_rows(self, rows: torch.LongTensor) -> None:
        """Row r of the cache becomes what row `rows[r]` was."""
        if self.positions is not None:
            rows = rows.to(self.positions.device)
            self.rows = rows if self.rows is None else self.rows[rows]

    def repeat_rows(self, repeats: int) -> None:
        """Each row of the cache becomes `repeats` rows, one after another."""
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], device=self.positions.device) if self.rows is None else self.rows
            self.rows = rows.repeat_interleave(repeats)

    def _settle_rows(self) -> None:
        if self.rows is None:
            return
        self.positions = self.positions[self.rows]
        self.sizes = None if self.sizes is None else self.sizes[self.rows]
        images = [
            replace(image, row=row)
            for row, source in enumerate(self.rows.tolist())
            for image in self._record
            if image.row == source
        ]
        number_of = {"image": {}, "video": {}}
        self._record = PruningRecord(
            tuple(
                replace(
                    image, image=number_of[image.modality].setdefault((image.row, image.image), len(number_of[image.modality]))
                )
                for image in images
            )
        )
        self.rows = None


class PositionNotes:
    """What position follows each token of a cache. It is no count of tokens where rows are padded, or images came with M-RoPE.

    The stock models keep an offset of M-RoPE on the module, where a second request overwrites that of the first, and a crop
    leaves it stale. Here a call leaves its `position_ids`, and nothing is computed until a later turn asks.

    Attributes:
        count_padding: whether a decoder made the first positions, which counts padding.
    """

    def __init__(self):
        self.count_padding = False
        self._known: torch.LongTensor | None = None  # [batch, length], the position after each token
        self._noted: tuple | None = None

    @property
    def are_empty(self) -> bool:
        return self._known is None and self._noted is None

    def note(self, position_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None, length: int) -> None:
        """Add the positions of a call.

        Args:
            position_ids: [1, 3 or 4, batch, length of the call]; None for a first call whose decoder counted tokens and
                padding.
            attention_mask: the 2-D one of the whole sequence, or None.
            length: of the whole sequence after the call.
        """
        self._fold()
        self.count_padding |= position_ids is None
        self._noted = (position_ids, attention_mask, length)

    def after(self, length: int, attention_mask: torch.Tensor | None, batch: int, device: torch.device) -> torch.LongTensor:
        """The position that follows each of the first `length` tokens. [batch, length]"""
        self._fold()
        known = torch.zeros(batch, 0, dtype=torch.long) if self._known is None else self._known[:, :length]
        rows = known.shape[0]  # fewer than asked for: all alike; more: each asked for was repeated, as `generate` does later
        known = known.to(device)
        known = known[:: rows // batch] if rows > batch else known.repeat_interleave(batch // rows, dim=0)
        last = known[:, -1:] if known.shape[1] else known.new_zeros(batch, 1)
        if attention_mask is None:
            since = known.new_ones(batch, length - known.shape[1])
        else:
            since = attention_mask[:, known.shape[1] : length].to(device, torch.long)
        return torch.cat([known, last + since.cumsum(1)], dim=1)

    def crop(self, length: int) -> None:
        self._fold()
        if self._known is not None:
            self._known = self._known[:, :length]

    def move_rows(self, rows: torch.LongTensor) -> None:
        self._fold()
        if self._known is not None and len(self._known) > 1:  # one row stands for as many as there are
            self._known = self._known[rows.to(self._known.device)]

    def repeat_rows(self, repeats: int) -> None:
        self._fold()
        if self._known is not None and len(self._known) > 1:
            self._known = self._known.repeat_interleave(repeats, dim=0)

    def _fold(self) -> None:
        if self._noted is None:
            return
        (position_ids, attention_mask, length), self._noted = self._noted, None
        reached = torch.arange(length)[None] if position_ids is None else position_ids[-3:].amax(0)
        past_length = length - reached.shape[1]
        if attention_mask is not None:
            reached = reached.masked_fill(attention_mask[:, past_length:length].to(reached.device) == 0, -1)
        past = self.after(past_length, attention_mask, len(reached), reached.device)
        self._known = torch.cat([past, reached.cummax(dim=1).values + 1], dim=1)


class FollowingMixin:
    """Put in front of the class of a cache, or of one of its layers, so that what we note there follows what is done to it.

    Such a class is made where a cache is met, of whatever class it is. So it is pickled by the two that it is made of.
    """

    name_prefix: str

    def __reduce_ex__(self, protocol):
        return _new_in_front, type(self).__bases__, self.__dict__


@lru_cache
def _class_in_front(mixin: type, stock_class: type) -> type:
    # The library registers each class of layers that names its `_layer_type` as the one to make from then on.
    return type(f"{mixin.name_prefix}{stock_class.__name__}", (mixin, stock_class), {"_layer_type": None})


def _new_in_front(mixin: type, stock_class: type):
    joined = _class_in_front(mixin, stock_class)
    return joined.__new__(joined)


class NotedLayerMixin(FollowingMixin):
    """The first layer of a cache, pruned or not, that counts tokens; they have `position_notes`."""

    name_prefix = "Noted"
    position_notes: PositionNotes

    def crop(self, tokens_to_remove: int, full_length: int | None = None) -> None:
        """As in the stock class; `full_length` is that of the notes to keep, where the layer holds fewer tokens."""
        super().crop(tokens_to_remove)
        self.position_notes.crop(int(self.get_seq_length()) if full_length is None else full_length)

    def reset(self) -> None:
        super().reset()
        self.position_notes = PositionNotes()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.position_notes.move_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.position_notes.move_rows(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.position_notes.repeat_rows(repeats)


def found_notes(cache: Cache | None) -> PositionNotes | None:
    """The notes of a cache that a call has left positions with; None where none has."""
    if cache is None or not cache.layers:
        return None
    notes = getattr(cache.layers[counting_layer(cache, 0)], "position_notes", None)
    return None if notes is None or notes.are_empty else notes


def position_notes(cache: Cache) -> PositionNotes:
    """The notes of a cache; new ones where it has none, which stay with it once it has layers."""
    if not cache.layers:
        return PositionNotes()
    number = counting_layer(cache, 0)
    first = cache.layers[number]
    if not isinstance(first, NotedLayerMixin):
        noted = cache.layers[number] = _new_in_front(NotedLayerMixin, type(first))
        noted.__dict__ = first.__dict__ | {"position_notes": PositionNotes()}
        return noted.position_notes
    return first.position_notes


def note_positions(cache: Cache | None, position_ids: torch.LongTensor | None, attention_mask) -> None:
    """Leave the positions of a call with its cache. The paged cache of continuous batching is no `Cache` and takes none.

    Args:
        position_ids: [batch, length], or with axes of M-RoPE in front; None where a decoder made them in a first call.
        attention_mask: the call's, of any kind.
    """
    if not isinstance(cache, Cache):
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        attention_mask = None
    if position_ids is not None and position_ids.ndim == 2:
        position_ids = position_ids[None]
    position_notes(cache).note(position_ids, attention_mask, int(cache.get_seq_length()))


class PrunedCacheMixin(FollowingMixin):
    """Put in front of a cache's class when some of its layers hold fewer tokens than the full sequence has.

    `pruning_states` has a state for each stage, by its layer. The layers below the first hold all tokens. Where the first that
    counts tokens is pruned as well, `get_seq_length()` is still the length of the full sequence, which positions and masks
    count by. The layers of a hybrid decoder that have a recurrent state count none, and do what the stock cache's do.
    """

    name_prefix = "Pruned"
    pruning_states: dict[int, PrunedCacheState]

    @property
    def pruning_record(self) -> PruningRecord:
        """What was kept of each image, over all turns that this cache holds."""
        return self._last_state.record

    @property
    def _last_state(self) -> PrunedCacheState:
        return self.pruning_states[max(self.pruning_states)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length, dropped = super().get_seq_length(layer_idx), self._dropped_of_first(layer_idx)
        return length + dropped if dropped else length  # a static cache tells by a tensor

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As in the stock class, of what the layer holds: masks are made by it."""
        offset, dropped = super().get_query_offset(layer_idx), self._dropped_of_first(layer_idx)
        return offset - dropped if dropped else offset

    def _dropped_of_first(self, layer_idx: int) -> int:
        """How many tokens the first layer that counts them does not hold, if it is asked for as layer 0; else 0."""
        stage = self._stage_of(counting_layer(self, 0)) if layer_idx == 0 else None
        return 0 if stage is None else self.pruning_states[stage].full_length - self.pruning_states[stage].num_entries

    def _stage_of(self, layer_idx: int) -> int | None:
        """The layer of the stage whose tokens layer `layer_idx` holds, None where it holds all."""
        return max((layer for layer in self.pruning_states if layer <= layer_idx), default=None)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negated number of tokens to remove from a pruned cache, got {tokens_to_remove}.")
        for cache_layer in self.layers:
            if not isinstance(cache_layer, CacheLayerMixin) and not getattr(cache_layer, "record_past", True):
                cache_layer.crop(tokens_to_remove)  # raises, before anything is changed: a recurrent state has no past
        full_length = int(self.get_seq_length())
        target = max(full_length + tokens_to_remove, 0)
        if target == full_length:
            return
        removed, removed_pruned, states = full_length - target, {}, self.pruning_states
        for state in states.values():
            state.check_crop(target)
        for layer, state in states.items():
            num_entries = int(self.layers[counting_layer(self, layer)].get_seq_length())
            removed_pruned[layer] = state.crop(target, num_entries)
        for number, cache_layer in enumerate(self.layers):
            stage = self._stage_of(number)
            options = {"full_length": target} if isinstance(cache_layer, NotedLayerMixin) else {}
            cache_layer.crop(-removed if stage is None else -removed_pruned[stage], **options)

    def reset(self) -> None:
        super().reset()
        for state in self.pruning_states.values():
            state.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        for state in self.pruning_states.values():
            state.move_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        for state in self.pruning_states.values():
            state.move_rows(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for state in self.pruning_states.values():
            state.repeat_rows(repeats)


def pruning_states(cache: Cache | None) -> list[PrunedCacheState]:
    """The states of a cache that was pruned, by layer; else none."""
    states = getattr(cache, "pruning_states", None) or {}
    return [state for _, state in sorted(states.items()) if state.positions is not None]


def pruning_state(cache: Cache | None) -> PrunedCacheState | None:
    """The state of the last stage of a cache that was pruned, else None."""
    states = pruning_states(cache)
    return states[-1] if states else None


def state_of_layer(cache: Cache | None, layer: int) -> PrunedCacheState | None:
    """The state of the stage at `layer` of a cache that was pruned, else None."""
    return next((state for state in pruning_states(cache) if state.layer == layer), None)


def open_state(cache: Cache, layer: int) -> PrunedCacheState:
    """The state of the stage at `layer`, made where there is none; the cache becomes one that knows of pruning."""
    if not isinstance(cache, PrunedCacheMixin):
        cache.__class__ = _class_in_front(PrunedCacheMixin, type(cache))
        cache.pruning_states = {}
    if not pruning_states(cache):
        cache.pruning_states = {}  # of a cache that was emptied, which may be pruned at other layers now
    return cache.pruning_states.setdefault(layer, PrunedCacheState(layer))


def counting_layer(cache: Cache | None, layer: int) -> int:
    """The first cache layer from `layer` on that counts tokens, as one with a recurrent state does not. Where there is none,
    the last before it; where the cache has no such layer yet, `layer`."""
    layers = () if cache is None else cache.layers
    if layer >= len(layers):
        return layer
    numbers = (*range(layer, len(layers)), *reversed(range(layer)))
    return next((number for number in numbers if isinstance(layers[number], CacheLayerMixin)), layer)


def mask_layer(cache: Cache | None, layer: int) -> int:
    """The cache layer whose length masks of a stage at `layer` are made by: not layer 0 where another holds the same, since
    `get_seq_length` gives that of layer 0 as the full one."""
    return counting_layer(cache, max(layer, 1))


def continued_padding_mask(
    cache: Cache, state: PrunedCacheState, attention_mask: torch.Tensor | None, length: int
) -> torch.Tensor | None:
    """The 2-D mask of the layers that a state is of, in a call of `length` tokens that adds no image.

    Raises:
        ValueError: if the caller's 2-D `attention_mask` does not cover the tokens since the last pruned call.
    """
    kv_length, _ = cache.get_mask_sizes(length, mask_layer(cache, state.layer))
    if attention_mask is not None and not cache.is_compileable:
        needed = state.full_length + kv_length - state.num_entries
        if attention_mask.shape[1] != needed:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the cache and the new tokens make {needed}. "
                "Pass the mask of the whole unpruned sequence, or None."
            )
    return state.padding_mask(attention_mask, kv_length)


def mask_of_entries(
    config, new: torch.Tensor, padding_mask: torch.Tensor | None, cache: Cache | None, layer: int
) -> torch.Tensor | None:
    """A 2-D mask that ends with the entries that a cache layer will hold, where attention would see its empty ones too.

    A static cache is allocated at full length. FlashAttention gets all of it, and sees as much of it as its mask is long.

    Args:
        config: the decoder's.
        new: [batch, entries, ...], the tokens that the layer is about to get.
        padding_mask: [batch, past and new entries, or room for more], zero at padding; None where none is.
        layer: the cache layer.
    """
    if cache is None or config._attn_implementation in CAUSAL_BY_MASK:
        return padding_mask
    batch, num_new = new.shape[:2]
    num_entries = int(cache.get_seq_length(layer)) + num_new
    if cache.get_mask_sizes(num_new, layer)[0] <= num_entries:
        return padding_mask
    if padding_mask is None:
        return torch.ones(batch, num_entries, dtype=torch.bool, device=new.device)
    return padding_mask[:, :num_entries]


def stage_mask(config, new: torch.Tensor, padding_mask: torch.Tensor | None, cache: Cache | None, layer: int, **options):
    """The causal mask of the layers of a stage at `layer`, as `create_causal_mask` makes it with these `options`.

    Args:
        config, new, padding_mask: see `mask_of_entries`.

    Raises:
        ValueError: what `refuse_without_mask` raises.
    """
    number = mask_layer(cache, layer)
    padding_mask = mask_of_entries(config, new, padding_mask, cache, number)
    refuse_without_mask(config, new.shape[1], padding_mask, cache, number)
    return create_causal_mask(
        config=config,
        inputs_embeds=new,
        attention_mask=padding_mask,
        position_ids=None,
        layer_idx=number,
        **{CACHE_NAME: cache},
        **options,
    )


def refuse_without_mask(config, num_new: int, padding_mask: torch.Tensor | None, cache: Cache | None, layer: int) -> None:
    """Raise a ValueError where the library makes no mask for the decoder's attention, but it would see too much without one."""
    name = config._attn_implementation
    if name in CAUSAL_BY_MASK or name in ALL_MASK_ATTENTION_FUNCTIONS:
        return
    if padding_mask is not None:
        has_room = cache is not None and cache.get_mask_sizes(num_new, layer)[0] > padding_mask.shape[1]
        sees_too_much = has_room or not padding_mask.all()
    else:
        sees_too_much = name.startswith("paged|")  # of continuous batching, whose calls say where each row begins
    if sees_too_much:
        raise ValueError(
            f"transformers makes no mask for attn_implementation {name!r}, so pruned layers would see padding, the empty "
            "entries of a static cache or, with a paged one, later tokens. Load the model with FlashAttention or one of "
            f"{CAUSAL_BY_MASK}, or register what makes the mask with AttentionMaskInterface."
        )
