"""Qwen2-VL and Qwen2.5-VL with pruning: the difference to transformers' classes.

What is Qwen's own: an image or a video is a (time, height, width) grid of patches that the vision tower merges by
`spatial_merge_size`, so the grid of the tokens is the merged one, one for each temporal slice; and positions have three axes
(M-RoPE), which text continues from where the images end. The stock model keeps that offset on the module; here it stays with
the cache, so that two requests do not meet. Everything else is in `pruned_decoder.py` and `pruned_model.py`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import (
    Cache,
    GenerationMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.utils import can_return_tuple
from transformers.vision_utils import get_vision_window_index

from .configuration_vlmpruner import VLMPrunerQwen2_5_VLConfig, VLMPrunerQwen2VLConfig
from .pruned_cache import CACHE_NAME, found_notes, position_notes
from .pruned_decoder import PrunedLayerMixin
from .pruned_model import (
    PrunedForConditionalGenerationMixin,
    PrunedModelMixin,
    explained_to_later_turns,
    pruned_forward,
)
from .pruning_method import TowerSignals
from .tower_signals import attention_to_merged, watch
from .visual_grids import GridView, video_views


class Qwen2VLDecoderLayer(PrunedLayerMixin, modeling_qwen2_vl.Qwen2VLDecoderLayer):
    """Qwen2-VL's layer, which follows a plan."""


class Qwen2_5_VLDecoderLayer(PrunedLayerMixin, modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer):
    """Qwen2.5-VL's layer, which follows a plan."""


class PrunedQwenModelMixin(PrunedModelMixin):
    """Put in front of a stock Qwen-VL model."""

    encoder_inputs = {
        "image": ("pixel_values", ("image_grid_thw",)),
        "video": ("pixel_values_videos", ("video_grid_thw",)),
    }

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor | None = None, **kwargs):
        """As in the stock class. Each tensor of `pooler_output` gets an attribute `grid_views` that says what grids it forms:
        the features travel through `generate` without `image_grid_thw`."""
        views = self._grid_views("image_grid_thw", image_grid_thw, pixel_values)
        encode = partial(super().get_image_features, pixel_values, image_grid_thw, **(kwargs | {"return_dict": True}))
        return _with_views(self.with_tower_signals(encode, image_grid_thw), views)

    @can_return_tuple
    def get_video_features(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor | None = None, **kwargs):
        """As in the stock class, with `grid_views` as in `get_image_features`."""
        views = self._grid_views("video_grid_thw", video_grid_thw, pixel_values_videos)
        encode = partial(super().get_video_features, pixel_values_videos, video_grid_thw, **(kwargs | {"return_dict": True}))
        return _with_views(self.with_tower_signals(encode, video_grid_thw), views)

    def tower_blocks(self):
        blocks = self.visual.blocks
        return blocks if hasattr(blocks[0], "norm1") and hasattr(getattr(blocks[0], "attn", None), "qkv") else None

    def with_tower_signals(self, encode: Callable, grid_thw: torch.LongTensor):
        """The outputs of `encode`; each tensor of its `pooler_output` gets an attribute `tower` if the method asks for it."""
        if not self.config.looks_at_tower or (blocks := self.tower_blocks()) is None:
            return encode()
        tower = self.config.vision_config
        windowless = getattr(self.visual, "fullatt_block_indexes", None)  # of Qwen2.5-VL, whose other blocks attend to windows
        block, num_merged = blocks[max(windowless) if windowless else -1], tower.spatial_merge_size**2
        with watch(block) as seen:
            outputs = encode()
        attention, keys = attention_to_merged(block, seen, num_merged)
        if windowless is not None:  # the blocks have the tokens window by window
            sizes = tower.spatial_merge_size, tower.window_size, tower.patch_size
            order = get_vision_window_index(grid_thw, *sizes)[0].argsort().to(attention.device)
            attention, keys = attention[order], keys[order]
        lengths = [len(features) for features in outputs.pooler_output]
        parts = zip(outputs.pooler_output, attention.split(lengths), keys.split(lengths), strict=True)
        for features, received, own_keys in parts:
            features.tower = TowerSignals(received, features.float(), own_keys, project=None, has_class_token=False)
        return outputs

    def _grid_views(self, name: str, grid_thw: torch.LongTensor | None, pixels: torch.Tensor) -> list[list[GridView]]:
        if grid_thw is None:
            raise ValueError(f"{name} is missing: the pixels of an image or video do not tell what grid they form.")
        grids = grid_thw.tolist()
        num_patches = sum(map(math.prod, grids))
        if num_patches != len(pixels):
            raise ValueError(f"{name} {grids} makes {num_patches} patches, but pixels of {len(pixels)} came.")
        merge, scope = self.config.vision_config.spatial_merge_size, self.config.pruning_video_scope
        return [video_views(frames, height // merge, width // merge, scope) for frames, height, width in grids]

    def resolve_position_ids(
        self, input_ids, inputs_embeds, attention_mask, position_ids, cache, has_visuals, is_stock_call, inputs
    ):
        """M-RoPE positions [3, batch, length] of a call's tokens, after those of its cache.

        Where nothing is pruned, a call without `mm_token_type_ids` is the stock class's, which raises or counts text alone.
        """
        if position_ids is not None:
            return position_ids
        past_length = 0 if cache is None else cache.get_seq_length()
        if past_length == 0 and not has_visuals:
            return None
        lacks_types = has_visuals and inputs.get("mm_token_type_ids") is None
        if lacks_types and is_stock_call and past_length == 0:
            return None
        if lacks_types and not (is_stock_call and input_ids is None):
            raise ValueError(
                "mm_token_type_ids is missing. With images or videos it tells M-RoPE which tokens lie on a grid; the processor "
                "returns it along with input_ids."
            )
        for pixels, (grid_thw,) in self.encoder_inputs.values():
            if inputs.get(pixels) is not None:
                self._grid_views(grid_thw, inputs.get(grid_thw), inputs[pixels])
        tokens = input_ids if input_ids is not None else torch.zeros_like(inputs_embeds[..., 0], dtype=torch.long)
        types = inputs.get("mm_token_type_ids") if has_visuals else None
        has_grids = any(inputs.get(grid_thw) is not None for _, (grid_thw,) in self.encoder_inputs.values())
        if types is not None and (types.shape != tokens.shape or not has_grids):
            return None  # embeddings with virtual tokens before them, of prompt tuning: text, as in the stock class
        return self.mrope_position_ids(tokens, types, attention_mask, cache, inputs)

    def get_rope_index(self, input_ids, mm_token_type_ids, image_grid_thw=None, video_grid_thw=None, **kwargs):
        """As in the stock class.

        Raises:
            ValueError: if a modality has another number of placeholders than its grids make of features.
        """
        grids = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
        try:
            return super().get_rope_index(input_ids, mm_token_type_ids=mm_token_type_ids, **grids, **kwargs)
        except (IndexError, RuntimeError, StopIteration, TypeError):
            for number, (modality, grid_thw) in enumerate(zip(("Image", "Video"), grids.values(), strict=True), start=1):
                num_tokens = int((mm_token_type_ids == number).sum())
                num_patches = 0 if grid_thw is None else int(grid_thw.prod(-1).sum())
                num_features = num_patches // self.config.vision_config.spatial_merge_size**2
                if num_tokens != num_features:
                    raise ValueError(
                        f"{modality} features and {modality.lower()} tokens do not match, tokens: {num_tokens}, "
                        f"features: {num_features}"
                    ) from None
            raise

    def mrope_position_ids(
        self, tokens: torch.Tensor, types: torch.Tensor | None, attention_mask, cache: Cache | None, inputs: dict
    ) -> torch.LongTensor:
        """Positions [3, batch, length] of new tokens, after those of the cache.

        Args:
            tokens: [batch, length], the new tokens; only their shape counts.
            types: [batch, length], their `mm_token_type_ids`, or None where all are text.
            attention_mask: [batch, past + length], or None.
            cache: with the tokens before, if any.
            inputs: with the `image_grid_thw` and `video_grid_thw` of the new tokens.
        """
        batch, length = tokens.shape
        new_mask = attention_mask
        if attention_mask is not None and attention_mask.shape[1] != length:
            new_mask = attention_mask[:, -length:]
        if types is not None:
            names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            grids = {name: inputs[name] for name in names if inputs.get(name) is not None}
            with explained_to_later_turns(cache):
                positions, _ = self.get_rope_index(tokens, mm_token_type_ids=types, attention_mask=new_mask, **grids)
        elif new_mask is not None:
            positions = (new_mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        else:
            positions = torch.arange(length, device=tokens.device).expand(3, batch, -1)
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if past_length == 0:
            return positions
        if found_notes(cache) is None and self.rope_deltas is not None:
            # The stock class has filled this cache, before the model was pruned in place. Its offset is on the module.
            num_past = past_length if attention_mask is None else attention_mask[:, :past_length].sum(1, keepdim=True)
            deltas = self.rope_deltas.to(tokens.device)
            return positions + num_past + deltas.repeat_interleave(batch // len(deltas), dim=0)
        return positions + position_notes(cache).after(past_length, attention_mask, batch, tokens.device)[:, -1:]


def _with_views(outputs, views: list[list[GridView]]):
    for features, image_views in zip(outputs.pooler_output, views, strict=True):
        features.grid_views = image_views
    return outputs


class PrunedQwenForConditionalGenerationMixin(PrunedForConditionalGenerationMixin):
    """Put in front of a stock generating Qwen-VL model."""

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """The stock method reads the offset of M-RoPE from the module; a later turn of another request needs its own."""
        cache = model_kwargs.get(CACHE_NAME)
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if past_length == 0:
            positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            self.model.rope_deltas = None  # else the stock forward adds it to what the next request embeds by hand
            return positions
        text = GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)
        tokens = model_kwargs.get("input_ids", inputs_tensor)
        tokens = tokens if tokens.shape[1] > 0 else inputs_tensor
        tokens = tokens if tokens.ndim == 2 else torch.zeros_like(tokens[..., 0], dtype=torch.long)
        attention_mask = model_kwargs.get("attention_mask")
        total = attention_mask.shape[1] if attention_mask is not None else text.shape[1]
        new = tokens[:, past_length - total :]
        has_visuals = self.model.has_visuals(model_kwargs)
        types = model_kwargs.get("mm_token_type_ids") if has_visuals else None
        types = None if types is None else types[:, past_length - total :]
        positions = self.model.mrope_position_ids(new, types, attention_mask, cache, model_kwargs)
        past = text[:, :past_length].expand(4, new.shape[0], -1)
        return torch.cat([past, torch.cat([text[None, :, past_length:].expand(1, new.shape[0], -1), positions])], dim=-1)


class VLMPrunerQwen2VLModel(PrunedQwenModelMixin, Qwen2VLModel):
    """`Qwen2VLModel` whose decoder drops visual tokens."""

    config: VLMPrunerQwen2VLConfig
    decoder_layers = (Qwen2VLDecoderLayer,)


class VLMPrunerQwen2VLForConditionalGeneration(PrunedQwenForConditionalGenerationMixin, Qwen2VLForConditionalGeneration):
    """`Qwen2VLForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerQwen2VLConfig

    def __init__(self, config: VLMPrunerQwen2VLConfig):
        super(Qwen2VLForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerQwen2VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Qwen2VLForConditionalGeneration)


class VLMPrunerQwen2_5_VLModel(PrunedQwenModelMixin, Qwen2_5_VLModel):
    """`Qwen2_5_VLModel` whose decoder drops visual tokens."""

    config: VLMPrunerQwen2_5_VLConfig
    decoder_layers = (Qwen2_5_VLDecoderLayer,)


class VLMPrunerQwen2_5_VLForConditionalGeneration(PrunedQwenForConditionalGenerationMixin, Qwen2_5_VLForConditionalGeneration):
    """`Qwen2_5_VLForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerQwen2_5_VLConfig

    def __init__(self, config: VLMPrunerQwen2_5_VLConfig):
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerQwen2_5_VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Qwen2_5_VLForConditionalGeneration)


__all__ = [
    "VLMPrunerQwen2VLForConditionalGeneration",
    "VLMPrunerQwen2VLModel",
    "VLMPrunerQwen2_5_VLForConditionalGeneration",
    "VLMPrunerQwen2_5_VLModel",
]
