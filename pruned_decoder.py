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
- One mask serves all layers from the pruning layer on; it is sized by their own cache length (`layer_idx`). In a hybrid
  decoder it serves those of full attention; those of linear attention, which have a recurrent state in place of keys, get a 2-D
  one, or run rows one by one where padding would stand between their tokens (`recurrent_rows.py`).
- To a layer of linear attention kept tokens are neighbours: its convolution and its state go from one to the next.
- What the host must know (where visual tokens lie, how many stay, what is padding) it learns when the plan is made, in one
  transfer, and the mask follows from it before the first layer. So on a GPU nothing waits at the pruning layer, unless the
  budget may stay unfilled (`fill_budget=False`).
"""

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from .attention_correction import additive_masks, distance_term, refuse_backend
from .configuration_vlmpruner import PruningSettings, layer_types_of
from .pruned_cache import (
    CACHE_NAME,
    PrunedCacheState,
    PrunedImage,
    PruningRecord,
    continued_padding_mask,
    mask_layer,
    open_state,
    pruning_states,
    state_of_layer,
)
from .pruning_method import StageTokens, TowerSignals
from .recurrent_rows import row_runs
from .tensor_parallel import all_heads
from .token_pruning import Selection, num_tokens_to_keep
from .token_pruning_device import GridBatch, upload


# Keys of the pruned layers' masks among the masks that `generate` makes in advance for compiled decoding: this and the layer,
# and where attention is corrected, with `OWN` behind, that of this layer alone.
PRUNED_MASK = "pruned_attention_"
OWN = "_own"


@dataclass(frozen=True)
class GridView:
    """The visual tokens of an image or video that lie on one (height, width) or (frames, height, width) grid.

    Token (f, y, x) of the grid is row `start + f * frame_stride + y * row_stride + x` of the features. Rows of the features
    that no view covers (a class token, newlines) are structure: never candidates, always kept.
    """

    height: int
    width: int
    start: int = 0
    row_stride: int | None = None  # None: width
    frames: int = 1
    frame_stride: int | None = None  # None: height * row_stride

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.height, self.width) if self.frames == 1 else (self.frames, self.height, self.width)

    def token_indices(self) -> torch.LongTensor:
        """Rows of the features, in row-major order of the grid. [frames * height * width]"""
        row_stride = self.row_stride or self.width
        f = torch.arange(self.frames)[:, None, None] * (self.frame_stride or self.height * row_stride)
        y = torch.arange(self.height)[:, None] * row_stride
        return (self.start + f + y + torch.arange(self.width)).flatten()


def video_views(
    frames: int, height: int, width: int, scope: str, row_stride: int | None = None, frame_stride: int | None = None
) -> list[GridView]:
    """The grids of a video of `frames` slices: one each with scope "slice", one for all with "video". See `GridView`."""
    if scope == "video":
        return [GridView(height, width, row_stride=row_stride, frames=frames, frame_stride=frame_stride)]
    step = frame_stride or height * (row_stride or width)
    return [GridView(height, width, start=frame * step, row_stride=row_stride) for frame in range(frames)]


@dataclass(frozen=True)
class VisualTokens:
    """The images, or the videos, that come with a call.

    Attributes:
        modality: "image" or "video".
        mask: [batch, length] bool, True at the tokens that hold the features, which fill them in row-major order.
        features: for each image in prompt order, [num_features, hidden_size].
        views: for each image, its grids.
        image_ends: [batch, length] bool, True at the last token of an image's last grid, where `features` are of tiles, or of
            rows of the batch; None where they are of images.
    """

    modality: str
    mask: torch.BoolTensor
    features: Sequence[torch.Tensor]
    views: Sequence[Sequence[GridView]]
    image_ends: torch.BoolTensor | None = None


@dataclass(frozen=True)
class VisualGrid:
    """One grid to prune: which row of the batch, which `columns` [num_visual] of this call's tokens, how many to keep.

    `columns` is ascending and on the host. `keeps_last` says that the last of them must stay, because its output is needed.
    `features` are those of the image, of which the grid's are `tokens` [num_visual].
    """

    row: int
    image: int
    view: int
    modality: str
    grid: tuple[int, ...]
    columns: torch.LongTensor
    num_keep: int
    keeps_last: bool = False
    features: torch.Tensor | None = None
    tokens: torch.LongTensor | None = None

    def tower(self) -> TowerSignals:
        """What the vision tower knows of the grid's tokens.

        Raises:
            ValueError: for features that came without it.
        """
        if not hasattr(self.features, "tower"):
            raise ValueError(
                f"The {self.modality} features of shape {tuple(self.features.shape)} do not tell what the vision tower "
                "attended to, which pruning_method looks at. Encode the pixels after pruning_method is set. Videos of LLaVA "
                "never tell: they are pooled behind the projector, for which no author says what to look at."
            )
        return self.features.tower.of(self.tokens)


def visual_grids(visual: VisualTokens, ratio: float) -> list[VisualGrid]:
    """Place the grids of a call in its tokens. `ratio` is the fraction of each grid to remove; the masks are on the host.

    Raises:
        ValueError: if the images do not fill the rows one after another.
    """
    columns = visual.mask.nonzero()[:, 1]
    lengths = [len(features) for features in visual.features]
    rows = rows_of_images(visual.mask.sum(1).tolist(), lengths, visual.modality)
    grids, offset, image, number = [], 0, 0, 0
    for row, features, views in zip(rows, visual.features, visual.views, strict=True):
        image_columns = columns[offset : offset + len(features)]
        offset += len(features)
        for view in views:
            tokens = view.token_indices()
            num_keep = num_tokens_to_keep(len(tokens), ratio)
            place = (row, image, number, visual.modality, view.grid, image_columns[tokens], num_keep)
            grids.append(VisualGrid(*place, features=features, tokens=tokens))
            number += 1
            if visual.image_ends is not None and visual.image_ends[row, grids[-1].columns[-1]]:
                image, number = image + 1, 0
        if visual.image_ends is None:
            image, number = image + 1, 0
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


def ends_of_prompts(is_token: torch.BoolTensor, is_visual: torch.BoolTensor, num_outputs: int) -> torch.LongTensor:
    """The column of the last token of each row's prompt: where the first of `num_outputs` is, but not before an image's end.

    So a method that looks at the prompt's last token sees the same one when decoding runs the whole sequence again, without a
    cache, and when text was drafted behind the prompt.

    Args:
        is_token: [batch, length] bool, False at padding.
        is_visual: [batch, length] bool.
        num_outputs: number of outputs that are asked for, or 0 where it is not said, and the prompt is the whole row.
    """
    columns = torch.arange(is_token.shape[1])
    limit = torch.where(is_visual, columns, -1).amax(1).clamp_min(is_token.shape[1] - max(num_outputs, 1))
    return torch.where(is_token & (columns <= limit[:, None]), columns, 0).amax(1)


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
        place: [batch, length] int64, the packed place of each kept token.
    """

    index: torch.LongTensor
    valid: torch.BoolTensor | None
    kept: torch.BoolTensor
    merged_places: tuple[torch.LongTensor, torch.LongTensor] | None = None
    place: torch.LongTensor | None = None

    def following(self, earlier: "Packing") -> "Packing":
        """This packing of what an earlier one packed, as one."""
        index = earlier.index.gather(1, self.index)
        goes_on = torch.ones_like(index, dtype=torch.bool) if self.valid is None else self.valid
        return Packing(index, self.valid, torch.zeros_like(earlier.kept).scatter(1, index, goes_on))

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
    """The visual tokens of all grids that a stage finds, one grid after another, and the text that stays: where they are.

    Args:
        grids: ordered by row.
        num_keep: how many tokens of each grid the stage is to keep.
        is_text: [batch, length] bool, on the host.
        device: where the tensors are made; the host does not wait for them.

    Attributes:
        sizes: how many tokens of each grid are there.
        batch, layout: at the first stage, the grids for the selection.
        rows, columns: [T] int64 each, where each token is among the tokens of the call.
        places: [T] int64, where it is in the flattened batch as the stage finds it.
        indices: [T] int64, its place in its grid.
        is_text: [batch, length] bool, on the device.
        hidden_states: [T, hidden_size] from the selection to the merge, else None.
    """

    def __init__(self, grids: Sequence[VisualGrid], num_keep: Sequence[int], is_text: torch.BoolTensor, device: torch.device):
        self.device, self.grids = device, grids
        required = [len(grid.columns) - 1 if grid.keeps_last else None for grid in grids]
        self.batch = GridBatch([grid.grid for grid in grids], num_keep, device, required)
        self.sizes, self.num_keep = self.batch.sizes, self.batch.num_keep
        rows = torch.cat([torch.full_like(grid.columns, grid.row) for grid in grids])
        columns = torch.cat([grid.columns for grid in grids])
        self.rows, self.columns, self.places = upload(
            torch.stack([rows, columns, rows * is_text.shape[1] + columns]), device
        ).unbind()
        self.is_text = upload(is_text, device)
        self.num_text = is_text.sum(1).tolist()
        self.layout = self.batch.layout  # made now, not in the middle of the layers
        self.indices = self.layout.place
        self.hidden_states: torch.Tensor | None = None

    def after(self, selection: Selection, packing: Packing, num_keep: Sequence[int]) -> "PackedGrids":
        """Those of the next stage."""
        later, chosen = copy(self), selection.kept
        later.batch = later.layout = later.hidden_states = None
        later.sizes, later.num_keep = selection.counts, tuple(map(min, num_keep, selection.counts))
        later.rows, later.columns, later.indices = self.rows[chosen], self.columns[chosen], self.indices[chosen]
        later.places = later.rows * packing.index.shape[1] + packing.place.view(-1)[self.places[chosen]]
        later.is_text = packing.pack(self.is_text)
        if packing.valid is not None:
            later.is_text = later.is_text & packing.valid
        return later

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens' [T, ...] of [batch, length, ...]."""
        return states.flatten(0, 1).index_select(0, self.places)

    def counts_of_rows(self, counts: Sequence[int] | None = None) -> list[int]:
        """Number of tokens that go on in each row, where each grid keeps `counts`, by default what it is to keep."""
        totals = list(self.num_text)
        for grid, count in zip(self.grids, self.num_keep if counts is None else counts, strict=True):
            totals[grid.row] += count
        return totals

    def valid(self, counts_of_rows: Sequence[int]) -> torch.BoolTensor | None:
        """[batch, packed_length] bool, False at the padding in front of shorter rows; None where all are of one length."""
        longest, shortest = max(counts_of_rows), min(counts_of_rows)
        if longest == shortest:
            return None
        return upload(torch.arange(longest) >= longest - torch.tensor(counts_of_rows)[:, None], self.device)


class KeyRecorder:
    """A cache as one attention layer sees it, which also leaves that layer's keys (after RoPE) with the stage above.

    It works with every attention backend, and without a cache, because `update` is the one place all of them share.
    """

    def __init__(self, cache: Cache | None, stage: "PruningStage"):
        self.cache = cache
        self.stage = stage

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        is_first_run = self.stage.packing is None  # not where gradient checkpointing runs the layer again
        if is_first_run:
            self.stage.keys = key_states
        if self.cache is None:
            all_keys = key_states, value_states
        else:
            all_keys = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        if is_first_run and self.stage.query_inputs is not None:
            self.stage.all_keys = all_keys[0]
        return all_keys

    def __getattr__(self, name):
        return getattr(self.cache, name)


class PruningStage:
    """One layer at whose input tokens leave, in one call.

    Attributes:
        layer: that layer.
        earlier: the stage before, if any.
        num_keep: how many tokens of each grid it is to keep; empty in a call that only continues on a pruned cache.
        prepared_mask: the mask of the layers from `layer` on, where `generate` made it in advance.
        tokens, selection, packing: what it found, chose and where that goes, once it has run.
        layer_inputs: what the layers from `layer` to the next stage get in place of the decoder's inputs.
        counts: how many tokens of the call each row holds from it on.
        own_mask: the mask of layer `layer` itself where attention is corrected; that of the layers above is in `layer_inputs`.
    """

    def __init__(self, layer: int, earlier: "PruningStage | None", num_keep: Sequence[int] = (), prepared_mask=None):
        self.layer, self.earlier, self.num_keep, self.prepared_mask = layer, earlier, num_keep, prepared_mask
        self.keys = self.all_keys = self.query_inputs = None
        self.tokens = self.selection = self.packing = self.valid = self.padding_mask = self.mask = None
        self.layer_inputs = self.layer_device = self.view = self._whole = self.counts = self.own_mask = None

    @property
    def whole_packing(self) -> Packing:
        """From the call's tokens to those after this stage."""
        if self.earlier is None:
            return self.packing
        if self._whole is None:
            self._whole = self.packing.following(self.earlier.whole_packing)
        return self._whole

    def unpack_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch * packed_length, n] -> [batch * length, n], zero where a token was dropped."""
        return self.whole_packing.unpack(rows.unflatten(0, self.packing.index.shape)).flatten(0, 1)


class PruningPlan:
    """What one forward call does at and above the first pruning layer.

    It goes from layer to layer as it is. So it is no dataclass: FSDP copies those on their way.

    Args:
        decoder: the language model.
        layers: those at whose input tokens leave, ascending.
        attention_mask: the caller's 2-D mask [batch, past + length], or None. On the host where there are `grids`.
        grids: what to select from, ordered by row; empty in a call that only continues on a pruned cache.
        settings: how to select; None in such a call.
        prepared_masks: layer -> mask, where `generate` made them in advance.
        past_length: full sequence length before the call, and `past_entries` what of it the layers from each of `layers` hold.
        is_text: [batch, length] bool on the host, the call's tokens that stay in any case, where there are `grids`.
        is_prompt_text: the same without those of images that are on no grid, and those after the prompt.
        prompt_ends: [batch] int64 on the host, the column of the last token of each row's prompt.
        is_token: [batch, length] bool on the host, False at the call's padding; None where none is, or no layer asks.

    Attributes:
        layer: the first of the layers.
        layer_types: of each decoder layer.
        deepstack: for each of the first layers, what to add after it: pairs of tokens [batch, length] bool and, in their
            row-major order, their features [num_visual, hidden_size].
        question: what the caller gave as `pruning_question`.
        corrects_attention: whether the masks of the pruned layers say how many tokens a row stands for.
        record: what was kept, once the last stage has run.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[int],
        attention_mask: torch.Tensor | None = None,
        grids: Sequence[VisualGrid] = (),
        settings: PruningSettings | None = None,
        prepared_masks: dict[int, torch.Tensor] | None = None,
        past_length: int = 0,
        past_entries: dict[int, int] | None = None,
        is_text: torch.BoolTensor | None = None,
        is_prompt_text: torch.BoolTensor | None = None,
        prompt_ends: torch.LongTensor | None = None,
        is_token: torch.BoolTensor | None = None,
    ):
        self.past_entries, self.is_prompt_text, self.prompt_ends = past_entries, is_prompt_text, prompt_ends
        self.decoder, self.config, self.attention_mask, self.grids = decoder, decoder.config, attention_mask, grids
        self.settings, self.past_length, self.is_text = settings, past_length, is_text
        self.layer_types, self.is_token, self._linear_inputs = layer_types_of(self.config), is_token, {}
        self.method = None if settings is None else settings.method_for(self.config.num_hidden_layers)
        self.deepstack: Sequence[Sequence[tuple[torch.BoolTensor, torch.Tensor]]] = ()
        self.question: str | Sequence[str] | None = None
        self.corrects_attention = False
        self.record: PruningRecord | None = None
        counts = [self.method.counts(len(grid.columns), grid.num_keep) for grid in grids]
        self.stages, prepared_masks = [], prepared_masks or {}
        for number, layer in enumerate(layers):
            earlier = self.stages[-1] if self.stages else None
            num_keep = tuple(max(count[number], int(grid.keeps_last)) for count, grid in zip(counts, grids, strict=True))
            self.stages.append(PruningStage(layer, earlier, num_keep, prepared_masks.get(layer)))
        self.stage = self.stages[0]

    def correct_attention(self, states: Sequence[PrunedCacheState]) -> None:
        """Find out whether attention is corrected: by this call's method, or because of what the cache holds.

        Raises:
            ValueError: where the decoder's attention takes no such mask.
        """
        self.corrects_attention = bool(self.grids and self.method.corrections) or any(
            state.sizes is not None for state in states
        )
        if self.corrects_attention:
            refuse_backend(self.config)

    @property
    def layer(self) -> int:
        return self.stages[0].layer

    @property
    def is_below_all_keys(self) -> bool:
        """Whether no layer below the first stage attends to keys, so none needs the decoder's own mask."""
        return all(layer_type == "linear_attention" for layer_type in self.layer_types[: self.layer])

    @property
    def packing(self) -> Packing | None:
        """From the call's tokens to those that go on to the end; None where no stage has run."""
        return None if self.stages[-1].packing is None else self.stages[-1].whole_packing

    @property
    def layer_inputs(self) -> dict | None:
        """What layers get since the stage that ran last."""
        return self.stage.layer_inputs

    def stage_of(self, layer_idx: int) -> PruningStage | None:
        """The stage whose tokens layer `layer_idx` runs on; None below the first."""
        return next((stage for stage in reversed(self.stages) if stage.layer <= layer_idx), None)

    def before_layer(self, layer_idx: int, hidden_states: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict]:
        """The hidden states and keyword inputs that decoder layer `layer_idx` runs on instead of the given ones."""
        if layer_idx == 0 and self.stages[0].tokens is not None and self.method.counts_are_known:
            for stage in self.stages:
                counts = self.stages[0].tokens.counts_of_rows(stage.num_keep)
                self._make_mask(stage, hidden_states, inputs.get(CACHE_NAME), counts)
        stage = self.stage_of(layer_idx)
        if stage is not None:
            if layer_idx == stage.layer:
                self.stage = stage
                hidden_states = self._enter(hidden_states, inputs)
            if stage.layer_device != hidden_states.device:
                stage.layer_inputs = _on_device(stage.layer_inputs, hidden_states.device)
                stage.layer_device = hidden_states.device
            inputs = inputs | stage.layer_inputs
            if layer_idx == stage.layer and stage.own_mask is not None:
                inputs["attention_mask"] = stage.own_mask
        if self.layer_types[layer_idx] == "linear_attention":
            return hidden_states, inputs | self._inputs_of_linear(stage, hidden_states.device)
        if self.grids and (above := self._stage_at(layer_idx + 1)) is not None:
            if above.packing is None and "attention" in self.method.looks_at:
                above.query_inputs = self._last_tokens(stage, hidden_states, inputs)
            inputs = inputs | {CACHE_NAME: KeyRecorder(inputs.get(CACHE_NAME), above)}
        return hidden_states, inputs

    def _inputs_of_linear(self, stage: PruningStage | None, device: torch.device) -> dict:
        """What a layer of linear attention gets in place of a causal mask, on tokens as `stage` left them."""
        stage = stage if self.grids else None  # else what comes in is what every layer adds
        if stage is None and self.is_token is None:
            return {"attention_mask": None}
        if (stage, device) not in self._linear_inputs:
            is_token = self.is_token
            if stage is not None:
                longest = max(stage.counts)
                is_token = torch.arange(longest) >= longest - torch.tensor(stage.counts)[:, None]
            runs = row_runs(is_token, self.past_length > 0 or not self.grids, device)
            mask = None if is_token is None or runs is not None else upload(is_token, device)
            self._linear_inputs[stage, device] = {"attention_mask": mask, "row_runs": runs}
        return self._linear_inputs[stage, device]

    def _stage_at(self, layer_idx: int) -> PruningStage | None:
        stage = self.stage_of(layer_idx)
        return stage if stage is not None and stage.layer == layer_idx else None

    def unpack_outputs(self, outputs) -> None:
        """Give the decoder's `last_hidden_state`, `hidden_states` and `router_logits` the caller's sequence length again, in
        place."""
        if self.packing is None:
            return
        outputs["last_hidden_state"] = self.packing.unpack(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs["hidden_states"] = tuple(
                stage.whole_packing.unpack(states) if states is not None and stage is not None else states
                for stage, states in zip(
                    map(self.stage_of, range(-1, len(outputs.hidden_states) - 1)), outputs.hidden_states, strict=True
                )
            )
        if outputs.get("router_logits") is not None:
            stages = map(self.stage_of, self._layers_with_router())
            outputs["router_logits"] = tuple(
                logits if stage is None else stage.unpack_rows(logits)
                for stage, logits in zip(stages, outputs.router_logits, strict=True)
            )

    def routed(self, router_logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Of the logits [batch * length, num_experts] of each layer with a router, the rows of the tokens that it ran on."""
        rows = []
        for stage, logits in zip(map(self.stage_of, self._layers_with_router()), router_logits, strict=True):
            is_routed = self._new_mask(self.packing.kept.shape[1]) if stage is None else stage.whole_packing.kept
            rows.append(logits if is_routed is None else logits[is_routed.flatten().to(logits.device)])
        return tuple(rows)

    def _layers_with_router(self) -> list[int]:
        return [number for number, layer in enumerate(self.decoder.layers) if hasattr(layer.mlp, "gate")]

    def add_deepstack(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The input of decoder layer `layer_idx` with the visual features added that belong after the layer before."""
        layer = layer_idx - 1
        if not 0 <= layer < len(self.deepstack):
            return hidden_states
        stage = self.stage_of(layer)
        for mask, features in self.deepstack[layer]:
            mask, features = mask.to(hidden_states.device), features.to(hidden_states.device, hidden_states.dtype)
            added = features.new_zeros(*mask.shape, features.shape[-1]).masked_scatter(mask[..., None], features)
            if stage is not None and stage.packing is not None:
                added = stage.whole_packing.pack(added)
            hidden_states = hidden_states + added
        return hidden_states

    def _enter(self, hidden_states: torch.Tensor, inputs: dict) -> torch.Tensor:
        stage, cache = self.stage, inputs.get(CACHE_NAME)
        stage.layer_device = hidden_states.device
        if not self.grids:
            mask = self._continued_mask(hidden_states, cache)
            if self.corrects_attention and stage.prepared_mask is None:
                sizes = state_of_layer(cache, stage.layer).sizes_of_rows()
                stage.own_mask, mask = additive_masks(mask, sizes, hidden_states.dtype)
            stage.layer_inputs = {"attention_mask": mask, "position_ids": None}
            stage.layer_inputs |= self._continued_positions(cache, hidden_states, inputs)
            return hidden_states
        is_first_run = stage.packing is None  # gradient checkpointing runs a layer again: same tokens, new graph
        embeddings = (
            inputs["position_embeddings"] if stage.earlier is None else stage.earlier.layer_inputs["position_embeddings"]
        )
        if is_first_run:
            self._select(hidden_states, embeddings, cache)
            self._make_packing(hidden_states, cache)
        packed = self._pack_and_merge(hidden_states)
        if is_first_run:
            if self.settings.positions == "packed":
                embeddings = self._packed_positions(cache, packed, inputs)
            else:
                embeddings = tuple(stage.packing.pack(part.to(packed.device)) for part in embeddings)
            self._remember(cache)
            if self.corrects_attention:
                self._correct_masks(packed, cache)
            stage.layer_inputs = {"attention_mask": stage.mask, "position_ids": None, "position_embeddings": embeddings}
            stage.layer_inputs = _on_device(stage.layer_inputs, hidden_states.device)
        return packed

    def prepare(self, device: torch.device) -> None:
        """Put on `device` what selection and packing need there."""
        self.stages[0].tokens = PackedGrids(self.grids, self.stages[0].num_keep, self.is_text, device)

    @torch.no_grad()  # what is looked at has no part in a graph that gradient checkpointing makes again
    def _select(self, hidden_states: torch.Tensor, embeddings: tuple, cache: Cache | None) -> None:
        stage = self.stage
        if "keys" not in self.method.looks_at:
            stage.keys = None
        elif stage.keys is not None:
            stage.keys = all_heads(stage.keys.detach(), self.config.num_key_value_heads, self.decoder.layers[stage.layer - 1])
        if stage.earlier is not None:
            stage.tokens = stage.earlier.tokens.after(stage.earlier.selection, stage.earlier.packing, stage.num_keep)
        elif stage.tokens.device != hidden_states.device:
            self.prepare(hidden_states.device)
        tokens = stage.tokens
        tokens.hidden_states = tokens.take(hidden_states.detach())
        keys = None
        if stage.keys is not None:
            keys = tokens.take(stage.keys.to(hidden_states.device).transpose(1, 2)).transpose(0, 1)
        stage.view = StageTokens(
            stage=self.stages.index(stage),
            hidden_states=tokens.hidden_states,
            keys=keys,
            indices=tokens.indices,
            grids=[grid.grid for grid in self.grids],
            sizes=tokens.sizes,
            num_keep=tokens.num_keep,
            keeps_last=[grid.keeps_last for grid in self.grids],
            batch=tokens.batch,
            signals=self._signals(hidden_states, embeddings, cache) if self.method.looks_at - {"keys"} else {},
        )
        stage.selection = self.method.select_batch(stage.view)
        stage.keys = stage.all_keys = None

    def _make_packing(self, hidden_states: torch.Tensor, cache: Cache | None) -> None:
        stage = self.stage
        length, tokens, chosen = hidden_states.shape[1], stage.tokens, stage.selection.kept
        counts = tokens.counts_of_rows(stage.selection.counts)
        packed_length = max(counts)
        kept = tokens.is_text.clone()
        kept.view(-1).index_fill_(0, tokens.places[chosen], True)
        # A stable sort takes the dropped tokens to the left and leaves the kept ones in order at the right.
        index = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, length - packed_length :]
        # The last kept token of a row has place packed_length - 1, counted back from there.
        place = packed_length - kept.flip(1).cumsum(1).flip(1)
        merged_places = None
        if self.method.has_merge:
            merged_places = tokens.rows[chosen], place.view(-1)[tokens.places[chosen]]
        if not self.method.counts_are_known:
            self._make_mask(stage, hidden_states, cache, counts)
        valid = None if stage.valid is None else stage.valid.to(index.device)
        stage.packing = Packing(index, valid, kept, merged_places, place)

    def _pack_and_merge(self, hidden_states: torch.Tensor) -> torch.Tensor:
        stage = self.stage
        packed = stage.packing.pack(hidden_states)
        if stage.packing.merged_places is None:
            stage.tokens.hidden_states = None
            return packed
        states, stage.tokens.hidden_states = stage.tokens.hidden_states, None
        if states is None or torch.is_grad_enabled():  # the gradient belongs to this run of the layer
            states = stage.tokens.take(hidden_states)
        merged = self.method.merge(states, stage.selection, stage.view)
        return packed.index_put_(stage.packing.merged_places, merged)

    def _make_mask(self, stage: PruningStage, hidden_states: torch.Tensor, cache: Cache | None, counts: Sequence[int]) -> None:
        """The mask of the layers from a stage on, whose rows will hold `counts` tokens of this call."""
        packed, stage.valid, stage.counts = hidden_states[:, : max(counts)], self.stages[0].tokens.valid(counts), counts
        padding_mask = stage.valid
        if cache is not None:
            kv_length, _ = cache.get_mask_sizes(packed.shape[1], mask_layer(cache, stage.layer))
            state = state_of_layer(cache, stage.layer) or PrunedCacheState(stage.layer)
            padding_mask = state.padding_mask_with(stage.valid, packed, self.past_length, self.attention_mask, kv_length)
        stage.padding_mask = padding_mask
        stage.mask = self._causal_mask(stage, packed, padding_mask, cache)

    def _remember(self, cache: Cache | None) -> None:
        """Write down what was kept, here and with the cache."""
        stage, tokens = self.stage, self.stage.tokens
        order = tokens.indices[stage.selection.order].split(stage.selection.counts)
        positions = (self.stages[0].tokens.columns + self.past_length).split(self.stages[0].tokens.sizes)
        before = [image.stages for image in self.record] if self.record is not None else [()] * len(self.grids)
        self.record = PruningRecord(
            tuple(
                PrunedImage(
                    grid.row,
                    grid.image,
                    grid.view,
                    grid.modality,
                    grid.grid,
                    *places,
                    stages=(*earlier, (stage.layer, places[1])),
                )
                for grid, earlier, *places in zip(self.grids, before, positions, order, strict=True)
            )
        )
        if cache is not None:
            packing = stage.whole_packing
            state = open_state(cache, stage.layer)
            place = packing.index, packing.valid, packing.kept.shape[1], self.past_length
            state.extend(*place, self.record, self.attention_mask, self._sizes() if self.method.corrections else None)
            state.is_packed = self.settings.positions == "packed"

    def _sizes(self) -> torch.Tensor:
        """How many tokens each packed one stands for, in the stage's layer and in those above. [batch, packed_length, 2]"""
        stage, index = self.stage, self.stage.packing.index
        sizes = torch.ones(*index.shape, 2, device=index.device)
        return sizes.index_put_(stage.packing.merged_places, self.method.sizes(stage.selection, stage.view))

    @torch.no_grad()
    def _correct_masks(self, packed: torch.Tensor, cache: Cache | None) -> None:
        """Let the masks of the stage's layer and of those above add what methods ask for; see `attention_correction.py`."""
        stage, packing, distance = self.stage, self.stage.whole_packing, None
        state = None if cache is None else state_of_layer(cache, stage.layer)
        places = packing.index if state is None else state.positions
        if "distance" in self.method.corrections:
            ends = upload(self.prompt_ends, packed.device)
            has_image = torch.zeros(len(ends), dtype=torch.bool)
            has_image[[grid.row for grid in self.grids]] = True
            is_prompt = (packing.index <= ends[:, None]) & upload(has_image, packed.device)[:, None]
            length = self.past_length + packing.kept.shape[1]
            distance = distance_term(places, is_prompt, self.attention_mask, length, self.decoder.rotary_emb.inv_freq)
        sizes = self._sizes() if state is None else state.sizes
        stage.own_mask, stage.mask = additive_masks(stage.mask, sizes, packed.dtype, distance)

    def _continued_mask(self, hidden_states: torch.Tensor, cache: Cache) -> torch.Tensor | None:
        if self.stage.prepared_mask is not None:
            return self.stage.prepared_mask
        state = state_of_layer(cache, self.stage.layer)
        padding_mask = continued_padding_mask(cache, state, self.attention_mask, hidden_states.shape[1])
        if padding_mask is None and hidden_states.shape[1] == 1 and not cache.is_compileable and not self.corrects_attention:
            return None  # one token sees all entries: as under every backend without a mask, and without the work of making one
        return self._causal_mask(self.stage, hidden_states, padding_mask, cache)

    def _causal_mask(
        self, stage: PruningStage, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None, cache: Cache | None
    ):
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=padding_mask,
            position_ids=None,
            layer_idx=mask_layer(cache, stage.layer),
            allow_is_causal_skip=not self.corrects_attention,
            **{CACHE_NAME: cache},
        )

    def _continued_positions(self, cache: Cache, hidden_states: torch.Tensor, inputs: dict) -> dict:
        """Position embeddings of new tokens, where kept ones were packed; else those that the decoder made stay."""
        if not state_of_layer(cache, self.stage.layer).is_packed:
            return {}
        dropped = upload(state_of_layer(cache, self.stage.layer).dropped_of_rows(len(hidden_states)), hidden_states.device)
        return {"position_embeddings": self.decoder.rotary_emb(hidden_states, inputs["position_ids"] - dropped[:, None])}

    def _packed_positions(self, cache: Cache | None, packed: torch.Tensor, inputs: dict) -> tuple:
        """Position embeddings that count the kept tokens alone."""
        packing, device = self.stage.whole_packing, packed.device
        is_dropped = ~packing.kept
        if self.attention_mask is not None:
            is_dropped = is_dropped & upload(self._new_mask(is_dropped.shape[1]), device)
        before = is_dropped.cumsum(1)
        state = None if cache is None else state_of_layer(cache, self.stage.layer)
        if state is not None:
            before = before + upload(state.dropped_of_rows(len(packed)), device)[:, None]
        return self.decoder.rotary_emb(packed, packing.pack(inputs["position_ids"] - before))

    # What methods look at

    def _last_tokens(self, below: PruningStage | None, hidden_states: torch.Tensor, inputs: dict) -> tuple:
        """The last token of each row's prompt in a layer's input, [batch, hidden_size], its position embeddings, [batch, dim]
        each, and its place, [batch]."""
        last = self._last_places(below, hidden_states)
        rows = torch.arange(len(last), device=last.device)
        embeddings = (part.to(last.device).expand(len(last), -1, -1) for part in inputs["position_embeddings"])
        return hidden_states.detach()[rows, last], tuple(part[rows, last] for part in embeddings), last

    def _last_places(self, below: PruningStage | None, hidden_states: torch.Tensor) -> torch.LongTensor:
        """The place of each row's last token of the prompt, as the stage `below` left them. [batch]"""
        if below is None:
            return upload(self.prompt_ends, hidden_states.device)
        tokens_after = self.is_text & (torch.arange(self.is_text.shape[1]) > self.prompt_ends[:, None])
        return upload(hidden_states.shape[1] - 1 - tokens_after.sum(1), hidden_states.device)

    def _signals(self, hidden_states: torch.Tensor, embeddings: tuple, cache: Cache | None) -> dict:
        """What the method looks at beside hidden states and keys; see `ImageTokens`."""
        stage, looks_at, signals = self.stage, self.method.looks_at, {}
        below, num_new = stage.earlier, hidden_states.shape[1]
        if "attention" in looks_at:
            mask = self.attention_mask if below is None else below.padding_mask
            num_past = self.past_length if below is None else self.past_entries[below.layer]
            keys = stage.all_keys[:, :, : num_past + num_new]
            signals |= self._attention(self.decoder.layers[stage.layer - 1], stage.query_inputs, keys, mask)
        if "own_attention" in looks_at:
            layer = self.decoder.layers[stage.layer]
            last = self._last_tokens(below, hidden_states, {"position_embeddings": embeddings})
            keys = projected(layer, "k", hidden_states.detach(), embeddings)
            mask = self._new_mask(num_new) if below is None else below.valid
            if num_past := self.past_entries[stage.layer]:
                keys = torch.cat([cache.layers[stage.layer].keys[:, :, :num_past].to(keys), keys], dim=2)
                mask = self._with_past(mask, cache, num_past, len(hidden_states), num_new)
            signals |= self._attention(layer, last, keys, mask)
        if "text" in looks_at:
            is_text = upload(self.is_prompt_text, hidden_states.device)
            if below is not None:
                is_text = below.whole_packing.pack(is_text & below.whole_packing.kept)
            signals |= {
                "text": partial(self._text_of, hidden_states.detach(), is_text, stage.keys),
                "final_norm": self.decoder.norm,
            }
        if "question" in looks_at:
            questions = self._questions(len(hidden_states))
            signals["question"] = lambda image: questions[self.grids[image].row]
        if "tower" in looks_at:
            signals["tower"] = lambda image: self.grids[image].tower()
        return signals

    def _questions(self, batch: int) -> Sequence[str]:
        """The text of each row.

        Raises:
            ValueError: unless the caller gave one for each.
        """
        questions = [self.question] if isinstance(self.question, str) else self.question
        if questions is None or len(questions) != batch or not all(isinstance(text, str) for text in questions):
            raise ValueError(
                f"pruning_method {self.settings.method!r} looks at the question here: pass pruning_question to forward or "
                f"generate, a list of one string for each of the {batch} rows, but it is {self.question!r}."
            )
        return questions

    def _new_mask(self, length: int) -> torch.BoolTensor | None:
        """[batch, length] bool on the host, the call's tokens that are no padding; None where none is."""
        return None if self.attention_mask is None else self.attention_mask[:, -length:] != 0

    def _with_past(self, mask: torch.Tensor | None, cache: Cache, num_past: int, batch: int, num_new: int):
        """The mask of a call's tokens with that of the stage's cache in front; None where neither has padding."""
        seen = None if self.attention_mask is None else self.attention_mask[:, : self.past_length]
        state = state_of_layer(cache, self.stage.layer)
        past = seen if state is None else state.padding_mask(seen, num_past)
        if mask is None and past is None:
            return None
        parts = [
            torch.ones(batch, num, dtype=torch.bool) if part is None else part.cpu() != 0
            for part, num in ((past, num_past), (mask, num_new))
        ]
        return torch.cat(parts, dim=1)

    def _attention(self, layer: nn.Module, last: tuple, keys: torch.Tensor, mask: torch.Tensor | None) -> dict:
        """The rows of the prompts' last tokens over `keys`: at the stage's visual tokens, mean over heads, [T] float32 each.

        Args:
            layer: the decoder layer they belong to.
            last: of `_last_tokens`.
            keys: [batch, num_key_value_heads, past and new tokens, head_dim], after RoPE.
            mask: [batch, past and new tokens (or room for more)], zero at padding; None where none is.
        """
        tokens, (states, embeddings, places) = self.stage.tokens, last
        query = projected(layer, "q", states[:, None], tuple(part[:, None] for part in embeddings))[:, :, 0].float()
        keys = keys.detach().to(query.device, torch.float32).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        logits = torch.einsum("bhd,bhnd->bhn", query, keys) * layer.self_attn.scaling
        scores = logits.clone()
        if mask is not None:
            mask = mask[:, : keys.shape[2]].to(query.device) != 0
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        num_new = tokens.is_text.shape[1]
        is_later = torch.arange(num_new, device=query.device) > places[:, None]
        scores[..., -num_new:].masked_fill_(is_later[:, None], -torch.inf)
        places = tokens.rows, keys.shape[2] - num_new + tokens.places % num_new
        num_heads = self.config.num_attention_heads
        scores, logits = (all_heads(rows, num_heads, layer) for rows in (scores.softmax(-1), logits))
        rows = {"attention": scores.mean(1), "logits": logits.mean(1)}
        return {name: row.to(tokens.rows.device)[places] for name, row in rows.items()}

    def _text_of(self, hidden_states: torch.Tensor, is_text: torch.Tensor, keys: torch.Tensor | None, image: int) -> tuple:
        """`text_states`, `text_keys` and `is_after` of `ImageTokens`."""
        tokens, row = self.stage.tokens, self.grids[image].row
        text = is_text[row].nonzero()[:, 0]
        end = sum(tokens.sizes[: image + 1])
        is_after = text > tokens.places[end - 1] % is_text.shape[1]
        return hidden_states[row, text], None if keys is None else keys.detach().to(text.device)[row][:, text], is_after


def projected(layer: nn.Module, name: str, hidden_states: torch.Tensor, embeddings: tuple) -> torch.Tensor:
    """The queries ("q") or keys ("k") of a decoder layer after RoPE, [batch, heads, length, head_dim].

    Args:
        hidden_states: [batch, length, hidden_size], the layer's input.
        embeddings: cosines and sines of the positions, [batch or 1, length, head_dim] each.
    """
    attention = layer.self_attn
    states = getattr(attention, f"{name}_proj")(layer.input_layernorm(hidden_states))
    states = states.unflatten(-1, (-1, attention.head_dim))
    if name == "q" and states.shape[-2] == 2 * attention.config.num_attention_heads:
        states = states[..., ::2, :]  # each head's query is followed by a gate of its output
    if hasattr(attention, f"{name}_norm"):
        states = getattr(attention, f"{name}_norm")(states)
    states = states.transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # some rotate pairs, or a part of each head
    return rotate(states, states, *(part.to(states.device) for part in embeddings))[0]


def _on_device(layer_inputs: dict, device: torch.device) -> dict:
    """Move the inputs of the pruned layers, for models whose layers are spread over devices."""

    def move(value):
        if isinstance(value, tuple):
            return tuple(move(part) for part in value)
        return value.to(device) if hasattr(value, "to") else value

    return {name: move(value) for name, value in layer_inputs.items()}


def make_plan(
    decoder: nn.Module,
    settings: PruningSettings | None,
    cache: Cache | None,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    visuals: Sequence[VisualTokens],
    num_outputs: int = 0,
    length: int | None = None,
) -> PruningPlan:
    """Plan one forward call that prunes, or that goes on with a pruned cache.

    Args:
        decoder: the language model.
        settings: what to prune, or None to add the new tokens unpruned.
        cache: the cache, if there is one.
        attention_mask: the caller's 2-D mask, None, or what `create_masks_for_generate` of the model made.
        position_ids: the caller's, if any.
        visuals: the images and videos among the new tokens.
        num_outputs: how many of the last outputs the caller asks for, or 0 where that is not said.
        length: number of the call's tokens.

    Raises:
        ValueError: for packed sequences, for a cache that was pruned at other layers, and what `visual_grids` raises.
    """
    states = pruning_states(cache)
    layers = [state.layer for state in states]
    is_hybrid = "linear_attention" in layer_types_of(decoder.config)
    if settings is None or not visuals:
        if not states:
            raise ValueError("Nothing to plan: no visual tokens to prune and no pruned cache.")
        prepared = attention_mask if isinstance(attention_mask, dict) else {}
        masks = {layer: prepared[f"{PRUNED_MASK}{layer}"] for layer in layers if f"{PRUNED_MASK}{layer}" in prepared}
        is_token = None
        if is_hybrid and length > 1 and isinstance(attention_mask, torch.Tensor):
            is_token = attention_mask[:, -length:].cpu() != 0
        plan = PruningPlan(decoder, layers, None if masks else attention_mask, prepared_masks=masks, is_token=is_token)
        for stage in plan.stages:
            stage.own_mask = prepared.get(f"{PRUNED_MASK}{stage.layer}{OWN}")
        plan.correct_attention(states)
        return plan
    new_layers = list(settings.method_for(decoder.config.num_hidden_layers).stage_layers())
    if states and layers != new_layers:
        raise ValueError(
            f"The cache was pruned at {_name_layers(layers)}, this call would prune at {_name_layers(new_layers)}. "
            "Use one method and layer for a whole conversation, or start with a new cache."
        )
    past_length = 0 if cache is None else int(cache.get_seq_length())
    past_entries = dict.fromkeys(new_layers, past_length)
    past_entries |= {state.layer: past_length - state.full_length + state.num_entries for state in states}
    device = visuals[0].mask.device
    masks = [mask for visual in visuals for mask in (visual.mask, visual.image_ends) if mask is not None]
    if attention_mask is not None:
        attention_mask = attention_mask.to(device, torch.bool)
        masks.append(attention_mask)
    restarts = restarting_positions(position_ids, attention_mask)
    masks = _on_host([*masks, restarts.to(device)])
    if masks.pop().any():
        raise ValueError(
            "position_ids restart within a row, which means several sequences packed into one. Pruning does not support that: "
            "give each sequence a row of its own, or set pruning_ratio=0."
        )
    attention_mask = None if attention_mask is None else masks[-1]
    masks = iter(masks)
    visuals = [
        replace(visual, mask=next(masks), image_ends=None if visual.image_ends is None else next(masks)) for visual in visuals
    ]
    grids = [grid for visual in visuals for grid in visual_grids(visual, settings.ratio)]
    grids.sort(key=lambda grid: grid.row)
    batch, length = visuals[0].mask.shape
    grids = keep_needed_outputs(grids, attention_mask, length, num_outputs)
    is_text = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask[:, -length:].clone()
    is_visual = torch.stack([visual.mask for visual in visuals]).any(0)
    prompt_ends = ends_of_prompts(is_text, is_visual, num_outputs)
    is_prompt_text = is_text & ~is_visual & (torch.arange(length) <= prompt_ends[:, None])
    for grid in grids:
        is_text[grid.row, grid.columns] = False
    plan = PruningPlan(
        decoder,
        new_layers,
        attention_mask,
        grids,
        settings,
        past_length=past_length,
        past_entries=past_entries,
        is_text=is_text,
        is_prompt_text=is_prompt_text,
        prompt_ends=prompt_ends,
        is_token=attention_mask[:, -length:] if is_hybrid and attention_mask is not None else None,
    )
    plan.correct_attention(states)
    if grids:
        plan.prepare(device)
    return plan


def _name_layers(layers: Sequence[int]) -> str:
    return f"pruning_layer={layers[0]}" if len(layers) == 1 else f"layers {layers}"


def _on_host(masks: Sequence[torch.BoolTensor]) -> list[torch.BoolTensor]:
    """Copies of the masks on the host, in one transfer."""
    flat = torch.cat([mask.flatten() for mask in masks]).cpu()
    parts = flat.split([mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def has_pruned_mask(masks: dict) -> bool:
    """Whether masks that `generate` made are of a pruned cache."""
    return any(name.startswith(PRUNED_MASK) for name in masks)


def check_mask(attention_mask) -> None:
    """Raise a ValueError for a mask that says more than which tokens are padding, and that is not made by `generate`."""
    if attention_mask is None or (isinstance(attention_mask, dict) and has_pruned_mask(attention_mask)):
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "Pruning needs a 2-D attention_mask [batch, length] that marks padding, because layers hold different tokens; got "
            f"{type(attention_mask).__name__} of shape {tuple(getattr(attention_mask, 'shape', ()))}. "
            "Set pruning_ratio=0 to use it."
        )


def restarting_positions(position_ids: torch.Tensor | None, attention_mask: torch.BoolTensor | None) -> torch.BoolTensor:
    """Where the position of a token is not above that of the token before it, both no padding. [batch, length - 1] bool

    Of M-RoPE positions with four rows the first counts text; of three nothing can be told.
    """
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids is None or position_ids.ndim != 2:
        return torch.zeros(0, dtype=torch.bool)
    restarts = position_ids.diff(dim=-1) < 1
    if attention_mask is not None:
        is_token = attention_mask[:, -position_ids.shape[1] :].to(restarts.device)
        restarts = restarts & is_token[:, 1:] & is_token[:, :-1]
    return restarts


class PrunedLayerMixin:
    """Put in front of a decoder layer's class. Without a plan it is the stock layer."""

    def __call__(self, hidden_states: torch.Tensor, *args, pruning_plan: PruningPlan | None = None, **kwargs):
        if pruning_plan is not None:  # here, outside of what gradient checkpointing runs again
            hidden_states = pruning_plan.add_deepstack(layer_index(self), hidden_states)
        return super().__call__(hidden_states, *args, pruning_plan=pruning_plan, **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args, pruning_plan: PruningPlan | None = None, **kwargs):
        if pruning_plan is not None:
            hidden_states, kwargs = pruning_plan.before_layer(layer_index(self), hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)


def layer_index(layer: nn.Module) -> int:
    """Which one of its decoder's layers a layer is."""
    return (layer.self_attn if hasattr(layer, "self_attn") else layer.linear_attn).layer_idx


def prune_decoder(decoder: nn.Module, layer_classes: Sequence[type[nn.Module]]) -> None:
    """Let the layers of this decoder follow a plan. Weights and their names stay as they are.

    Args:
        layer_classes: each a subclass, by `PrunedLayerMixin` in front, of a layer class whose layers hand keywords on, and
            whose attention calls `update` of the cache once with keys after RoPE. A subclass has the name of its stock class,
            by which FSDP and `device_map` look for layers. One of a hybrid decoder names in `linear_attention_class` the class
            of its linear attention with `RecurrentRowsMixin` in front.

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
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.__class__ = layer.linear_attention_class
