"""Idefics3 and SmolVLM with pruning: the difference to transformers' classes.

What is their own: an image is cut into square tiles of few tokens (SmolVLM: 8 x 8), with a view of the whole image last. Each
tile is a grid of its own, with a selection and a budget of its own, as each view of LLaVA-NeXT; a budget rounds, and is never
less than one token of a tile. The encoder takes the tiles of a row of the batch and is not told which images they are of; in
the prompt each follows a tag, and the tag of the whole view ends an image. SmolVLM's videos are a whole view for each frame,
so its frames are images here too. The stock model calls its decoder `text_model`. Everything else is in `pruned_decoder.py`
and `pruned_model.py`.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
)
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import VLMPrunerIdefics3Config, VLMPrunerSmolVLMConfig
from .modeling_vlmpruner_llava import LlamaDecoderLayer
from .pruned_model import PrunedForConditionalGenerationMixin, PrunedModelMixin, features_of_images, pruned_forward
from .pruning_method import TowerSignals
from .tower_signals import attention_to_patches, merged_patches, watch
from .visual_grids import GridView


class PrunedIdefics3ModelMixin(PrunedModelMixin):
    """Put in front of a stock Idefics3 or SmolVLM model."""

    decoder_layers = (LlamaDecoderLayer,)
    encoder_inputs = {"image": ("pixel_values", ("pixel_attention_mask",))}

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor | None = None, **kwargs):
        """As in the stock class. Where `pooler_output` is a list, of the rows of the batch, each tensor of it gets an attribute
        `grid_views` that says what grids its tiles form, because the features travel through `generate` without the pixels."""
        kwargs |= {"return_dict": True}
        outputs = self.with_tower_signals(partial(super().get_image_features, pixel_values, pixel_attention_mask, **kwargs))
        if not isinstance(outputs.pooler_output, torch.Tensor):
            tile_length = sum(map(len, outputs.pooler_output)) // len(outputs.last_hidden_state)
            side = isqrt(tile_length)  # the stock connector takes square tiles alone
            for features in outputs.pooler_output:
                features.grid_views = [GridView(side, side, start) for start in range(0, len(features), tile_length)]
        return outputs

    def tower_blocks(self):
        return self.vision_model.encoder.layers

    def with_tower_signals(self, encode: Callable):
        """The outputs of `encode`. If the method asks for it, each tensor of its `pooler_output` gets an attribute `tower`, or
        `towers` where that is one of all tiles."""
        if not self.config.looks_at_tower:
            return encode()
        block, projection = self.tower_blocks()[-1], self.connector.modality_projection
        with watch(block) as seen, watch(projection) as projected, watch(self.vision_model) as tower:
            outputs = encode()
        is_patch = tower["patch_attention_mask"].flatten(1).to(seen["hidden_states"].device)
        attention, keys = attention_to_patches(block, seen["hidden_states"].detach(), False, is_patch)
        grid, side = (isqrt(is_patch.shape[1]),) * 2, self.config.scale_factor  # the stock connector takes square tiles alone
        sums = (merged_patches(part, grid, side).sum(2) for part in (attention[..., None], keys, is_patch[..., None]))
        attention, keys, num_patches = sums
        attention, keys = ((part / num_patches.clamp_min(1)).flatten(0, 1) for part in (attention, keys))
        parts = attention[:, 0], projected["hidden_states"].flatten(0, 1).float(), keys, num_patches.flatten() > 0
        pooled = outputs.pooler_output
        lengths = [len(features) for features in pooled]
        signals = [
            TowerSignals(*part, self.project_states, has_class_token=False, is_seen=is_seen)
            for *part, is_seen in zip(*(part.split(lengths) for part in parts), strict=True)
        ]
        if isinstance(pooled, torch.Tensor):
            pooled.towers = signals
        else:
            for features, tower in zip(pooled, signals, strict=True):
                features.tower = tower
        return outputs

    def project_states(self, states: torch.Tensor) -> torch.Tensor:
        """Of the patches of a token side by side, [n, patches * tower_size] to [n, hidden_size]."""
        return self.connector.modality_projection(states.to(self.dtype))

    def has_visuals(self, inputs: dict) -> bool:
        return _encoded_tensor(inputs) is not None or super().has_visuals(inputs)

    def _encode(self, inputs: dict) -> dict:
        """The encoder's outputs, as a list of rows or, before transformers 5.24, of tiles.

        Raises:
            ValueError: for encoded images that come as a tensor, which some versions take.
        """
        if (name := _encoded_tensor(inputs)) is not None:
            raise ValueError(
                f"{name} is a tensor, which does not tell what grids it forms. Pass pixels, or set pruning_ratio=0."
            )
        encoded = super()._encode(inputs)
        for outputs in encoded.values():
            if isinstance(outputs.pooler_output, torch.Tensor):
                outputs.pooler_output = features_of_images(outputs.pooler_output)
                for features in outputs.pooler_output:
                    features.grid_views = [GridView(isqrt(len(features)), isqrt(len(features)))]
        return encoded

    def get_placeholder_mask(self, input_ids, inputs_embeds: torch.Tensor, image_features: torch.Tensor) -> torch.BoolTensor:
        """[batch, length, 1], where the features go: as in the stock class, where it has this method.

        Raises:
            ValueError: for another number of placeholders than `image_features` [num_features, hidden_size].
        """
        if hasattr(super(), "get_placeholder_mask"):
            return super().get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens = int(mask.sum())
        if num_tokens != len(image_features):
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {num_tokens}, features: {len(image_features)}"
            )
        return mask[..., None].to(inputs_embeds.device)

    def ends_of_images(self, mask, views, tokens):
        """An image ends with its whole view: a tile behind the tag that the last tile of all has.

        The tokenizer makes one token of a tag, or several. The last two tokens in front of a tile tell tags apart in both
        cases. In front of a tag of one token stands the same token for every tile.
        """
        view = next((views_of_row[0] for views_of_row in views if views_of_row), None)
        if view is None:
            return None
        tokens = (tokens if tokens.ndim == 3 else tokens[..., None]).to(mask.device)
        ends = mask & ~nn.functional.pad(mask[:, 1:], (0, 1))  # of tiles
        last = (ends.flatten() * torch.arange(mask.numel(), device=mask.device)).argmax()
        for distance in (view.height * view.width, view.height * view.width + 1):  # from a tile's last token to the two
            before = tokens.roll(distance, dims=1)
            ends = ends & (before == before.flatten(0, 1)[last]).all(-1)
        return ends


def _encoded_tensor(inputs: dict) -> str | None:
    """The name of an argument that holds encoded images as a tensor."""
    for name in ("image_hidden_states", "mm_encoder_outputs"):
        if isinstance(inputs.get(name), torch.Tensor):
            return name
    return None


class VLMPrunerIdefics3Model(PrunedIdefics3ModelMixin, Idefics3Model):
    """`Idefics3Model` whose decoder drops visual tokens."""

    config: VLMPrunerIdefics3Config


class VLMPrunerIdefics3ForConditionalGeneration(PrunedForConditionalGenerationMixin, Idefics3ForConditionalGeneration):
    """`Idefics3ForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerIdefics3Config

    def __init__(self, config: VLMPrunerIdefics3Config):
        super(Idefics3ForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerIdefics3Model(config)
        self.image_token_id = config.image_token_id
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vocab_size = config.text_config.vocab_size
        self.post_init()

    forward = pruned_forward(Idefics3ForConditionalGeneration)


class VLMPrunerSmolVLMModel(PrunedIdefics3ModelMixin, SmolVLMModel):
    """`SmolVLMModel` whose decoder drops visual tokens."""

    config: VLMPrunerSmolVLMConfig


class VLMPrunerSmolVLMForConditionalGeneration(PrunedForConditionalGenerationMixin, SmolVLMForConditionalGeneration):
    """`SmolVLMForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerSmolVLMConfig

    def __init__(self, config: VLMPrunerSmolVLMConfig):
        super(SmolVLMForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerSmolVLMModel(config)
        self.image_token_id = config.image_token_id
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vocab_size = config.text_config.vocab_size
        self.model.text_model.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    forward = pruned_forward(SmolVLMForConditionalGeneration)


__all__ = [
    "VLMPrunerIdefics3ForConditionalGeneration",
    "VLMPrunerIdefics3Model",
    "VLMPrunerSmolVLMForConditionalGeneration",
    "VLMPrunerSmolVLMModel",
]
