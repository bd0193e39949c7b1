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
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import Cache

from .attention_correction import additive_masks, distance_term, refuse_backend
from .configuration_vlmpruner import PruningSettings, layer_types_of
from .pruned_cache import (
    CACHE_NAME,
    PrunedCacheState,
    PrunedImage,
    PruningRecord,
    continued_padding_mask,
    found_notes,
    mask_layer,
    open_state,
    pruning_states,
    stage_mask,
    state_of_layer,
)
from .pruning_contract import checked_counts, checked_merge, checked_selection, checked_sizes
from .pruning_method import PruningMethod, StageTokens
from .recurrent_rows import row_runs
from .stage_packing import PackedGrids, Packing
from .stock_lookups import undecorated
from .tensor_parallel import all_heads
from .token_pruning import Selection
from .token_pruning_device import upload
from .visual_grids import VisualGrid, VisualTokens, ends_of_prompts, keep_needed_outputs, visual_grids


# Keys of the pruned layers' masks among the masks that `generate` makes in advance for compiled decoding: this and the layer,
# and where attention is corrected, with `OWN` behind, that of this layer alone.
PRUNED_MASK = "pruned_attention_"
OWN = "_own"


@dataclass(frozen=True)
class StageMask:
    """What layers from a stage on know of padding, once it is known how many tokens they get.

    Attributes:
        counts: how many tokens of the call each row holds from it on.
        valid: [batch, packed_length] bool, False at the padding in front of shorter rows; None where none is.
        padding: the same with what the cache holds in front, [batch, past and new entries, or room for more]; None where no
            entry is padding.
        causal: the mask for attention, as `create_causal_mask` makes it.
    """

    counts: Sequence[int]
    valid: torch.BoolTensor | None
    padding: torch.Tensor | None
    causal: object


@dataclass(frozen=True)
class StageChoice:
    """What a stage found and chose.

    Attributes:
        tokens: the visual tokens that it found.
        view: the same as the method sees them.
        selection: which of them stay.
        packing: from the tokens that it found to those that go on.
        whole_packing: from the call's tokens to those that go on.
    """

    tokens: PackedGrids
    view: StageTokens
    selection: Selection
    packing: Packing
    whole_packing: Packing


class LayerBelow:
    """What the layer below a stage leaves for a method to look at, until the stage has chosen.

    Attributes:
        keys: [batch, num_key_value_heads, length, head_dim], of the call's tokens, after RoPE.
        all_keys: the same with the cache's in front, where `last_tokens` are there.
        last_tokens: of the layer's input, as `PruningPlan._last_tokens` gives them; None where no attention is looked at.
    """

    def __init__(self):
        self.keys: torch.Tensor | None = None
        self.all_keys: torch.Tensor | None = None
        self.last_tokens: tuple | None = None


class LayerInputs:
    """Keyword inputs of several decoder layers, which may lie on different devices."""

    def __init__(self, values: dict):
        self.values, self.device = values, None

    def on(self, device: torch.device) -> dict:
        if self.device != device:
            self.values, self.device = {name: _on_device(value, device) for name, value in self.values.items()}, device
        return self.values


def _on_device(value, device: torch.device):
    if isinstance(value, tuple):
        return tuple(_on_device(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value


class PruningStage:
    """One layer at whose input tokens leave, in one call.

    Attributes:
        layer: that layer.
        earlier: the stage before, if any.
        num_keep: how many tokens of each grid it is to keep; empty in a call that only continues on a pruned cache.
        prepared_mask: the mask of the layers from `layer` on, where `generate` made it in advance.
        below: what the method may look at there; None once it has chosen.
        mask: before layer 0 where the method's counts are known, else once it has chosen.
        choice: what it found and chose; None before it has run, and in a call that only continues.
        inputs: what the layers from `layer` to the next stage get in place of the decoder's inputs, once they run.
        own_mask: the mask of layer `layer` itself where attention is corrected; `inputs` has that of the layers above.
    """

    def __init__(self, layer: int, earlier: "PruningStage | None", num_keep: Sequence[int] = (), prepared_mask=None):
        self.layer, self.earlier, self.num_keep, self.prepared_mask = layer, earlier, num_keep, prepared_mask
        self.below: LayerBelow | None = LayerBelow()
        self.mask: StageMask | None = None
        self.choice: StageChoice | None = None
        self.inputs: LayerInputs | None = None
        self.own_mask: torch.Tensor | None = None

    def unpack_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch * packed_length, n] -> [batch * length, n], zero where a token was dropped."""
        packing = self.choice.whole_packing
        return packing.unpack(rows.unflatten(0, packing.index.shape)).flatten(0, 1)


class KeyRecorder:
    """A cache as one attention layer sees it, which also leaves that layer's keys (after RoPE) with the stage above.

    It works with every attention backend, and without a cache, because `update` is the one place all of them share.
    """

    def __init__(self, cache: Cache | None, below: LayerBelow):
        self.cache, self.below = cache, below

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.cache is None:
            all_keys = key_states, value_states
        else:
            all_keys = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        self.below.keys = key_states.detach()
        if self.below.last_tokens is not None:
            self.below.all_keys = all_keys[0].detach()
        return all_keys

    def __getattr__(self, name):
        return getattr(self.cache, name)


class PruningPlan:
    """What one forward call does at and above the first pruning layer.

    It goes from layer to layer as it is. So it is no dataclass: FSDP copies those on their way.

    Args:
        decoder: the language model.
        layers: those at whose input tokens leave, ascending.
        attention_mask: the caller's 2-D mask [batch, past + length], or None. On the host where there are `grids`.
        grids: what to select from, ordered by row; empty in a call that only continues on a pruned cache.
        settings: how to select, and
        method: which selects so; None in such a call.
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
        tokens: what the first stage will find, and `is_text`, on the device; None in a call that only continues.
        record: what was kept, once the last stage has run.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[int],
        attention_mask: torch.Tensor | None = None,
        grids: Sequence[VisualGrid] = (),
        settings: PruningSettings | None = None,
        method: PruningMethod | None = None,
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
        self.method = method
        self.deepstack: Sequence[Sequence[tuple[torch.BoolTensor, torch.Tensor]]] = ()
        self.question: str | Sequence[str] | None = None
        self.corrects_attention = False
        self.tokens: PackedGrids | None = None
        self.record: PruningRecord | None = None
        sizes = [(len(grid.columns), grid.num_keep) for grid in grids]
        counts_of = {size: checked_counts(method, *size) for size in dict.fromkeys(sizes)}
        counts = [counts_of[size] for size in sizes]
        self.stages, prepared_masks = [], prepared_masks or {}
        for number, layer in enumerate(layers):
            earlier = self.stages[-1] if self.stages else None
            num_keep = tuple(max(count[number], int(grid.keeps_last)) for count, grid in zip(counts, grids, strict=True))
            self.stages.append(PruningStage(layer, earlier, num_keep, prepared_masks.get(layer)))

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
        return None if self.stages[-1].choice is None else self.stages[-1].choice.whole_packing

    def positions_without_padding(self, cache: Cache | None, inputs_embeds: torch.Tensor) -> torch.LongTensor | None:
        """Positions [batch, length] that count no padding, as of the row alone. None where those that the decoder makes are the
        same, and where the cache's count padding."""
        (batch, length, _), device, mask = inputs_embeds.shape, inputs_embeds.device, self.attention_mask
        continues, notes = self.settings is None, found_notes(cache)
        past_length = int(cache.get_seq_length()) if continues and notes is not None else self.past_length
        if notes is not None and past_length > 0:
            if mask is not None and not continues:  # then it is on the host
                mask = upload(mask, device)
            new = inputs_embeds.new_ones(batch, length) if mask is None else mask[:, -length:] != 0
            return notes.after(past_length, mask, batch, device)[:, -1:] + positions_of(new)
        if continues or mask is None or mask.all() or mask.shape[1] != past_length + length:
            return None
        if has_padding_before_tokens(mask, past_length):
            return None
        return upload(positions_of(mask)[:, -length:], device)

    def stage_of(self, layer_idx: int) -> PruningStage | None:
        """The stage whose tokens layer `layer_idx` runs on; None below the first."""
        return next((stage for stage in reversed(self.stages) if stage.layer <= layer_idx), None)

    def merged_states(self, layer_idx: int) -> tuple[torch.Tensor, ...]:
        """The vision tower's states of each grid, where a stage at layer `layer_idx` may merge them and gradients go on to the
        tower; else none. The layer gets them by position: from others re-entrant checkpointing takes no gradient."""
        stage = self.stage_of(layer_idx) if self.grids and torch.is_grad_enabled() else None
        if stage is None or stage.layer != layer_idx or not (self.method.has_merge and "tower" in self.method.looks_at):
            return ()
        return tuple(grid.tower().states for grid in self.grids)

    def before_layer(
        self, layer_idx: int, hidden_states: torch.Tensor, inputs: dict, tower_states: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, dict]:
        """The hidden states and keyword inputs that decoder layer `layer_idx` runs on instead of the given ones.

        Args:
            tower_states: of `merged_states`.
        """
        if layer_idx == 0 and self.grids and self.method.counts_are_known:
            for stage in self.stages:
                counts = self.tokens.counts_of_rows(stage.num_keep)
                stage.mask = self._make_mask(stage.layer, hidden_states, inputs.get(CACHE_NAME), counts)
        stage = self.stage_of(layer_idx)
        if stage is not None:
            if layer_idx == stage.layer:
                hidden_states = self._enter(stage, hidden_states, inputs, tower_states)
            if stage.inputs is None:
                raise self.skipped()
            inputs = inputs | stage.inputs.on(hidden_states.device)
            if layer_idx == stage.layer and stage.own_mask is not None:
                inputs["attention_mask"] = stage.own_mask
        if self.layer_types[layer_idx] == "linear_attention":
            return hidden_states, inputs | self._inputs_of_linear(stage, hidden_states.device)
        below = self._below_stage_at(layer_idx + 1)
        if below is not None:
            if "attention" in self.method.looks_at:
                below.last_tokens = self._last_tokens(stage, hidden_states, inputs)
            inputs = inputs | {CACHE_NAME: KeyRecorder(inputs.get(CACHE_NAME), below)}
        return hidden_states, inputs

    def skipped(self) -> RuntimeError:
        """The error where a layer at which tokens should leave has not followed the plan."""
        return RuntimeError(
            f"Nothing was pruned at decoder layer {self.layer}, where it should have been: a layer of this model was replaced, "
            "or is called by code that leaves out its keyword arguments."
        )

    def _inputs_of_linear(self, stage: PruningStage | None, device: torch.device) -> dict:
        """What a layer of linear attention gets in place of a causal mask, on tokens as `stage` left them."""
        stage = stage if self.grids else None  # else what comes in is what every layer adds
        if stage is None and self.is_token is None:
            return {"attention_mask": None}
        if (stage, device) not in self._linear_inputs:
            is_token = self.is_token
            if stage is not None:
                longest, counts = max(stage.mask.counts), torch.tensor(stage.mask.counts)
                is_token = torch.arange(longest) >= longest - counts[:, None]
            runs = row_runs(is_token, self.past_length > 0 or not self.grids, device)
            mask = None if is_token is None or runs is not None else upload(is_token, device)
            self._linear_inputs[stage, device] = {"attention_mask": mask, "row_runs": runs}
        return self._linear_inputs[stage, device]

    def _below_stage_at(self, layer_idx: int) -> LayerBelow | None:
        """Where the layer below leaves what a stage at layer `layer_idx` looks at; None where no stage there chooses, or it has
        chosen: gradient checkpointing runs layers again."""
        stage = self.stage_of(layer_idx) if self.grids else None
        return stage.below if stage is not None and stage.layer == layer_idx else None

    def unpack_outputs(self, outputs) -> None:
        """Give the decoder's `last_hidden_state`, `hidden_states` and `router_logits` the caller's sequence length again, in
        place."""
        if self.packing is None:
            return
        outputs["last_hidden_state"] = self.packing.unpack(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs["hidden_states"] = tuple(
                stage.choice.whole_packing.unpack(states) if states is not None and stage is not None else states
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
            is_routed = self._new_mask(self.packing.kept.shape[1]) if stage is None else stage.choice.whole_packing.kept
            rows.append(logits if is_routed is None else logits[is_routed.flatten().to(logits.device)])
        return tuple(rows)

    def _layers_with_router(self) -> list[int]:
        return [number for number, layer in enumerate(self.decoder.layers) if hasattr(layer.mlp, "gate")]

    def add_deepstack(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output of decoder layer `layer` with the visual features added that belong after it."""
        if layer >= len(self.deepstack):
            return hidden_states
        stage = self.stage_of(layer)
        for mask, features in self.deepstack[layer]:
            mask, features = mask.to(hidden_states.device), features.to(hidden_states.device, hidden_states.dtype)
            added = features.new_zeros(*mask.shape, features.shape[-1]).masked_scatter(mask[..., None], features)
            if stage is not None and stage.choice is not None:
                added = stage.choice.whole_packing.pack(added)
            hidden_states = hidden_states + added
        return hidden_states

    def _enter(
        self, stage: PruningStage, hidden_states: torch.Tensor, inputs: dict, tower_states: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The hidden states that go on from a stage, whose `inputs` are made."""
        cache = inputs.get(CACHE_NAME)
        if not self.grids:
            mask = self._continued_mask(stage, hidden_states, cache)
            if self.corrects_attention and stage.prepared_mask is None:
                sizes = state_of_layer(cache, stage.layer).sizes_of_rows()
                stage.own_mask, mask = additive_masks(mask, sizes, hidden_states.dtype)
            positions = self._continued_positions(stage, cache, hidden_states, inputs)
            stage.inputs = LayerInputs({"attention_mask": mask, "position_ids": None} | positions)
            return hidden_states
        if stage.choice is not None:  # gradient checkpointing runs a layer again: same tokens, new graph
            return self._pack_and_merge(stage.choice, hidden_states, tower_states)
        embeddings = (
            inputs["position_embeddings"] if stage.earlier is None else stage.earlier.inputs.values["position_embeddings"]
        )
        choice = stage.choice = self._choose(stage, hidden_states, embeddings, cache)
        packed = self._pack_and_merge(choice, hidden_states, tower_states)
        if self.settings.positions == "packed":
            embeddings = self._packed_positions(stage, cache, packed, inputs)
        else:
            embeddings = tuple(choice.packing.pack(part.to(packed.device)) for part in embeddings)
        self._remember(stage, cache)
        mask = stage.mask.causal
        if self.corrects_attention:
            stage.own_mask, mask = self._corrected_masks(stage, packed, cache)
        stage.inputs = LayerInputs({"attention_mask": mask, "position_ids": None, "position_embeddings": embeddings})
        return packed

    def prepare(self, device: torch.device) -> None:
        """Put on `device` what selection and packing need there."""
        self.tokens = PackedGrids(self.grids, self.stages[0].num_keep, self.is_text, device)

    @torch.no_grad()  # what is looked at has no part in a graph that gradient checkpointing makes again
    def _choose(self, stage: PruningStage, hidden_states: torch.Tensor, embeddings: tuple, cache: Cache | None) -> StageChoice:
        """Let the method choose, and say where what stays goes."""
        hidden_states = hidden_states.detach()
        if stage.earlier is not None:
            earlier = stage.earlier.choice
            tokens = earlier.tokens.after(earlier.selection, earlier.packing, stage.num_keep, hidden_states.device)
        else:
            if self.tokens.device != hidden_states.device:
                self.prepare(hidden_states.device)
            tokens = self.tokens
        below, stage.below, keys = stage.below, None, None
        if "keys" not in self.method.looks_at:
            below.keys = None
        elif below.keys is not None:
            below.keys = all_heads(below.keys, self.config.num_key_value_heads, self.decoder.layers[stage.layer - 1])
            keys = tokens.take(below.keys.to(hidden_states.device).transpose(1, 2)).transpose(0, 1)
        looks_further = self.method.looks_at - {"keys"}
        view = StageTokens(
            stage=self.stages.index(stage),
            hidden_states=tokens.take(hidden_states),
            keys=keys,
            indices=tokens.indices,
            grids=[grid.grid for grid in self.grids],
            sizes=tokens.sizes,
            num_keep=tokens.num_keep,
            keeps_last=[grid.keeps_last for grid in self.grids],
            batch=tokens.batch,
            signals=self._signals(stage, tokens, below, hidden_states, embeddings, cache) if looks_further else {},
        )
        selection = checked_selection(self.method, view)
        if not self.method.counts_are_known:
            counts = tokens.counts_of_rows(selection.counts)
            stage.mask = self._make_mask(stage.layer, hidden_states, cache, counts)
        packing = tokens.packing(selection, stage.mask.counts, stage.mask.valid, self.method.has_merge)
        whole_packing = packing if stage.earlier is None else packing.following(stage.earlier.choice.whole_packing)
        return StageChoice(tokens, view, selection, packing, whole_packing)

    def _pack_and_merge(
        self, choice: StageChoice, hidden_states: torch.Tensor, tower_states: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        packed = choice.packing.pack(hidden_states)
        if choice.packing.merged_places is None:
            return packed
        # A gradient belongs to this run of the layer.
        states = choice.tokens.take(hidden_states) if torch.is_grad_enabled() else choice.view.hidden_states
        view = self._with_tower_states(choice.view, tower_states)
        merged = checked_merge(self.method, states, choice.selection, view)
        return packed.index_put_(choice.packing.merged_places, merged)

    def _with_tower_states(self, view: StageTokens, tower_states: Sequence[torch.Tensor]) -> StageTokens:
        if not tower_states:
            return view
        signal = {"tower": lambda image: replace(self.grids[image].tower(), states=tower_states[image])}
        return replace(view, signals=view.signals | signal)

    def _make_mask(self, layer: int, hidden_states: torch.Tensor, cache: Cache | None, counts: Sequence[int]) -> StageMask:
        """The mask of the layers from `layer` on, whose rows will hold `counts` tokens of this call."""
        packed, valid = hidden_states[:, : max(counts)], self.tokens.valid(counts)
        padding = valid
        if cache is not None:
            kv_length, _ = cache.get_mask_sizes(packed.shape[1], mask_layer(cache, layer))
            state = state_of_layer(cache, layer) or PrunedCacheState(layer)
            padding = state.padding_mask_with(valid, packed, self.past_length, self.attention_mask, kv_length)
        return StageMask(counts, valid, padding, self._causal_mask(layer, packed, padding, cache))

    def _remember(self, stage: PruningStage, cache: Cache | None) -> None:
        """Write down what was kept, here and with the cache."""
        selection = stage.choice.selection
        order = stage.choice.tokens.indices[selection.order].split(selection.counts)
        positions = (self.tokens.columns + self.past_length).split(self.tokens.sizes)
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
            packing = stage.choice.whole_packing
            state = open_state(cache, stage.layer)
            place = packing.index, packing.valid, packing.kept.shape[1], self.past_length
            sizes = self._sizes(stage.choice) if self.method.corrections else None
            state.extend(*place, self.record, self.attention_mask, sizes)
            state.is_packed = self.settings.positions == "packed"

    def _sizes(self, choice: StageChoice) -> torch.Tensor:
        """How many tokens each packed one stands for, in the stage's layer and in those above. [batch, packed_length, 2]"""
        index = choice.packing.index
        sizes = torch.ones(*index.shape, 2, device=index.device)
        return sizes.index_put_(choice.packing.merged_places, checked_sizes(self.method, choice.selection, choice.view))

    @torch.no_grad()
    def _corrected_masks(
        self, stage: PruningStage, packed: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks of the stage's layer and of those above, with what methods add; see `attention_correction.py`."""
        packing, distance = stage.choice.whole_packing, None
        state = None if cache is None else state_of_layer(cache, stage.layer)
        places = packing.index if state is None else state.positions
        if "distance" in self.method.corrections:
            ends = upload(self.prompt_ends, packed.device)
            has_image = torch.zeros(len(ends), dtype=torch.bool)
            has_image[[grid.row for grid in self.grids]] = True
            is_prompt = (packing.index <= ends[:, None]) & upload(has_image, packed.device)[:, None]
            length = self.past_length + packing.kept.shape[1]
            distance = distance_term(places, is_prompt, self.attention_mask, length, self.decoder.rotary_emb.inv_freq)
        sizes = self._sizes(stage.choice) if state is None else state.sizes
        return additive_masks(stage.mask.causal, sizes, packed.dtype, distance)

    def _continued_mask(self, stage: PruningStage, hidden_states: torch.Tensor, cache: Cache) -> torch.Tensor | None:
        if stage.prepared_mask is not None:
            return stage.prepared_mask
        state = state_of_layer(cache, stage.layer)
        padding_mask = continued_padding_mask(cache, state, self.attention_mask, hidden_states.shape[1])
        if padding_mask is None and hidden_states.shape[1] == 1 and not cache.is_compileable and not self.corrects_attention:
            return None  # one token sees all entries: as under every backend without a mask, and without the work of making one
        return self._causal_mask(stage.layer, hidden_states, padding_mask, cache)

    def _causal_mask(self, layer: int, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None, cache: Cache | None):
        allow_skip = not self.corrects_attention
        return stage_mask(self.config, hidden_states, padding_mask, cache, layer, allow_is_causal_skip=allow_skip)

    def _continued_positions(self, stage: PruningStage, cache: Cache, hidden_states: torch.Tensor, inputs: dict) -> dict:
        """Position embeddings of new tokens, where kept ones were packed; else those that the decoder made stay."""
        state = state_of_layer(cache, stage.layer)
        if not state.is_packed:
            return {}
        dropped = upload(state.dropped_of_rows(len(hidden_states)), hidden_states.device)
        return {"position_embeddings": self.decoder.rotary_emb(hidden_states, inputs["position_ids"] - dropped[:, None])}

    def _packed_positions(self, stage: PruningStage, cache: Cache | None, packed: torch.Tensor, inputs: dict) -> tuple:
        """Position embeddings that count the kept tokens alone."""
        packing, device = stage.choice.whole_packing, packed.device
        is_dropped = ~packing.kept
        if self.attention_mask is not None:
            is_dropped = is_dropped & upload(self._new_mask(is_dropped.shape[1]), device)
        before = is_dropped.cumsum(1)
        state = None if cache is None else state_of_layer(cache, stage.layer)
        if state is not None:
            before = before + upload(state.dropped_of_rows(len(packed)), device)[:, None]
        return self.decoder.rotary_emb(packed, packing.pack(inputs["position_ids"] - before))

    # What methods look at

    def _last_tokens(self, earlier: PruningStage | None, hidden_states: torch.Tensor, inputs: dict) -> tuple:
        """The last token of each row's prompt in a layer's input, [batch, hidden_size], its position embeddings, [batch, dim]
        each, and its place, [batch]."""
        last = self._last_places(earlier, hidden_states)
        rows = torch.arange(len(last), device=last.device)
        embeddings = (part.to(last.device).expand(len(last), -1, -1) for part in inputs["position_embeddings"])
        return hidden_states.detach()[rows, last], tuple(part[rows, last] for part in embeddings), last

    def _last_places(self, earlier: PruningStage | None, hidden_states: torch.Tensor) -> torch.LongTensor:
        """The place of each row's last token of the prompt, as the stage `earlier` left them. [batch]"""
        if earlier is None:
            return upload(self.prompt_ends, hidden_states.device)
        tokens_after = self.is_text & (torch.arange(self.is_text.shape[1]) > self.prompt_ends[:, None])
        return upload(hidden_states.shape[1] - 1 - tokens_after.sum(1), hidden_states.device)

    def _signals(
        self,
        stage: PruningStage,
        tokens: PackedGrids,
        below: LayerBelow,
        hidden_states: torch.Tensor,
        embeddings: tuple,
        cache: Cache | None,
    ) -> dict:
        """What the method looks at beside hidden states and keys; see `ImageTokens`."""
        earlier, looks_at, signals, num_new = stage.earlier, self.method.looks_at, {}, hidden_states.shape[1]
        if "attention" in looks_at:
            mask = self.attention_mask if earlier is None else earlier.mask.padding
            num_past = self.past_length if earlier is None else self.past_entries[earlier.layer]
            keys = below.all_keys[:, :, : num_past + num_new]
            signals |= self._attention(tokens, self.decoder.layers[stage.layer - 1], below.last_tokens, keys, mask)
        if "own_attention" in looks_at:
            layer = self.decoder.layers[stage.layer]
            last = self._last_tokens(earlier, hidden_states, {"position_embeddings": embeddings})
            keys = projected(layer, "k", hidden_states, embeddings)
            mask = self._new_mask(num_new) if earlier is None else earlier.mask.valid
            if num_past := self.past_entries[stage.layer]:
                keys = torch.cat([cache.layers[stage.layer].keys[:, :, :num_past].to(keys), keys], dim=2)
                mask = self._with_past(stage, mask, cache, num_past, len(hidden_states), num_new)
            signals |= self._attention(tokens, layer, last, keys, mask)
        if "text" in looks_at:
            is_text = upload(self.is_prompt_text, hidden_states.device)
            if earlier is not None:
                packing = earlier.choice.whole_packing
                is_text = packing.pack(is_text & packing.kept)
            signals |= {
                "text": partial(self._text_of, tokens, hidden_states, is_text, below.keys),
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

    def _with_past(self, stage: PruningStage, mask: torch.Tensor | None, cache: Cache, num_past: int, batch: int, num_new: int):
        """The mask of a call's tokens with that of the stage's cache in front; None where neither has padding."""
        seen = None if self.attention_mask is None else self.attention_mask[:, : self.past_length]
        state = state_of_layer(cache, stage.layer)
        past = seen if state is None else state.padding_mask(seen, num_past)
        if mask is None and past is None:
            return None
        parts = [
            torch.ones(batch, num, dtype=torch.bool) if part is None else part.cpu() != 0
            for part, num in ((past, num_past), (mask, num_new))
        ]
        return torch.cat(parts, dim=1)

    def _attention(
        self, tokens: PackedGrids, layer: nn.Module, last: tuple, keys: torch.Tensor, mask: torch.Tensor | None
    ) -> dict:
        """The rows of the prompts' last tokens over `keys`: at a stage's visual tokens, mean over heads, [T] float32 each.

        Args:
            tokens: the visual tokens.
            layer: the decoder layer they belong to.
            last: of `_last_tokens`.
            keys: [batch, num_key_value_heads, past and new tokens, head_dim], after RoPE.
            mask: [batch, past and new tokens (or room for more)], zero at padding; None where none is.
        """
        states, embeddings, places = last
        query = projected(layer, "q", states[:, None], tuple(part[:, None] for part in embeddings))[:, :, 0].float()
        keys = keys.to(query.device, torch.float32).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
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

    def _text_of(
        self,
        tokens: PackedGrids,
        hidden_states: torch.Tensor,
        is_text: torch.Tensor,
        keys: torch.Tensor | None,
        image: int,
    ) -> tuple:
        """`text_states`, `text_keys` and `is_after` of `ImageTokens`."""
        row = self.grids[image].row
        text = is_text[row].nonzero()[:, 0]
        end = sum(tokens.sizes[: image + 1])
        is_after = text > tokens.places[end - 1] % is_text.shape[1]
        return hidden_states[row, text], None if keys is None else keys.to(text.device)[row][:, text], is_after


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


def make_plan(
    decoder: nn.Module,
    settings: PruningSettings | None,
    cache: Cache | None,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    visuals: Sequence[VisualTokens],
    num_outputs: int = 0,
    length: int | None = None,
    may_count_padding: bool = False,
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
        may_count_padding: whether the cache's tokens, and so the call's, may have positions that count padding.

    Raises:
        ValueError: for packed sequences, for a cache that was pruned at other layers, for a method that looks at keys where
            positions may count padding, and what `visual_grids` raises.
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
    method = settings.method_for(decoder.config.num_hidden_layers)
    new_layers = list(method.stage_layers())
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
    if may_count_padding and "keys" in method.looks_at and has_padding_before_tokens(attention_mask, past_length):
        raise ValueError(
            "Rows of the cache have padding before their tokens, which positions count where no position_ids are given. "
            f"pruning_method {settings.method!r} looks at keys, which depend on positions: it would keep other tokens than of "
            "the row alone. Pass position_ids, that count no padding, in each call of the conversation."
        )
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
        method,
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


def positions_of(is_token: torch.Tensor) -> torch.LongTensor:
    """How many tokens stand before each in its row, 0 at padding in front. [batch, length]"""
    return (is_token.long().cumsum(1) - 1).clamp_min(0)


def has_padding_before_tokens(attention_mask: torch.Tensor | None, length: int) -> bool:
    """Whether a token comes after padding in one of the rows, among the first `length` of a mask on the host."""
    return attention_mask is not None and bool((attention_mask[:, :length].to(torch.int8).diff(dim=1) > 0).any())


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
        if pruning_plan is None:
            return super().__call__(hidden_states, *args, **kwargs)
        states = pruning_plan.merged_states(layer_index(self))
        hidden_states = super().__call__(hidden_states, *states, *args, pruning_plan=pruning_plan, **kwargs)
        # Here, outside of what gradient checkpointing runs again.
        return pruning_plan.add_deepstack(layer_index(self), hidden_states)

    def forward(self, hidden_states: torch.Tensor, *args, pruning_plan: PruningPlan | None = None, **kwargs):
        if pruning_plan is None:
            return super().forward(hidden_states, *args, **kwargs)
        hidden_states, kwargs = pruning_plan.before_layer(layer_index(self), hidden_states, kwargs, args)
        return super().forward(hidden_states, **kwargs)


def layer_index(layer: nn.Module) -> int:
    """Which one of its decoder's layers a layer is."""
    return (layer.self_attn if hasattr(layer, "self_attn") else layer.linear_attn).layer_idx


def prune_decoder(decoder: nn.Module, layer_classes: Sequence[type[nn.Module]]) -> None:
    """Let the layers of this decoder follow a plan. Weights and their names stay as they are. See `pruned_layer_classes`."""
    for module, pruned_class in pruned_layer_classes(decoder, layer_classes).items():
        module.__class__ = pruned_class


def pruned_layer_classes(decoder: nn.Module, layer_classes: Sequence[type[nn.Module]]) -> dict[nn.Module, type]:
    """Which modules of a decoder follow a plan, and the class that each needs for that.

    Args:
        decoder: its layers may be wrapped, each in a module of its own, as for activation checkpointing.
        layer_classes: each a subclass, by `PrunedLayerMixin` in front, of a layer class whose layers hand keywords on, and
            whose attention calls `update` of the cache once with keys after RoPE. A subclass has the name of its stock class,
            by which FSDP and `device_map` look for layers. One of a hybrid decoder names in `linear_attention_class` the class
            of its linear attention with `RecurrentRowsMixin` in front.

    Raises:
        ValueError: for a decoder of other layers.
    """
    pruned_class_of, found = {layer_class.__bases__[1]: layer_class for layer_class in layer_classes}, {}
    for number, wrapped in enumerate(decoder.layers):
        layer = next((each for each in wrapped.modules() if undecorated(type(each)) in pruned_class_of), None)
        if layer is None:
            supported = ", ".join(stock_class.__module__.split(".")[-2] for stock_class in pruned_class_of)
            raise ValueError(
                f"Language models of type {decoder.config.model_type!r} are not supported: decoder layer {number} is a "
                f"{type(wrapped).__name__}. Supported: {supported}."
            )
        found[layer] = pruned_class_of[undecorated(type(layer))]
        if hasattr(layer, "linear_attn"):
            found[layer.linear_attn] = found[layer].linear_attention_class
    return found
