"""InternVL3 and InternVL3.5 with pruning: the difference to transformers' classes.

What is InternVL's own: an image is cut into square tiles, with a thumbnail last where there are several. The encoder takes
tiles, of 16 x 16 tokens each after its pixel shuffle, and is not told which images they are of. Each tile is a grid of its
own, with a selection and a budget of its own, as each view of LLaVA-NeXT. The tiles of an image follow one another in the
prompt, between tokens of text, by which the record numbers images. A video comes as one image of one tile for each frame,
each between its text, so its frames are images here too. Everything else is in `pruned_decoder.py` and `pruned_model.py`.
"""

from collections.abc import Sequence
from functools import partial
from math import isqrt

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration, InternVLModel, InternVLVisionModel
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import VLMPrunerInternVLConfig
from .modeling_vlmpruner_llava import LlamaDecoderLayer, LlavaGenerationMixin, Qwen2DecoderLayer
from .pruned_decoder import PrunedLayerMixin
from .pruned_model import PrunedModelMixin, pruned_forward
from .pruning_method import TowerSignals
from .tower_signals import attention_to_patches, merged_patches, watch
from .visual_grids import GridView


class Qwen3DecoderLayer(PrunedLayerMixin, modeling_qwen3.Qwen3DecoderLayer):
    """Qwen3's layer, which follows a plan."""


class Qwen3MoeDecoderLayer(PrunedLayerMixin, modeling_qwen3_moe.Qwen3MoeDecoderLayer):
    """Qwen3-MoE's layer, which follows a plan."""


class VLMPrunerInternVLModel(PrunedModelMixin, InternVLModel):
    """`InternVLModel` whose decoder drops visual tokens."""

    config: VLMPrunerInternVLConfig
    decoder_layers = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, Qwen3MoeDecoderLayer)
    encoder_inputs = {"image": ("pixel_values", ("vision_feature_layer", "vision_feature_select_strategy"))}

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, vision_feature_layer: int | list[int] | None = None, **kwargs):
        """As in the stock class. Where the method looks at the tower, `pooler_output` gets an attribute `towers` with what that
        tells of each tile."""
        encode = partial(
            super().get_image_features,
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            **(kwargs | {"return_dict": True}),
        )
        if not self.config.looks_at_tower or self.tower_blocks() is None:
            return encode()
        block = self.block_of_features(vision_feature_layer)
        with watch(block) as seen, watch(self.multi_modal_projector) as projected:
            outputs = encode()
        attention, keys = attention_to_patches(block, seen["hidden_states"].detach(), has_class_token=True)
        grid, side = (isqrt(attention.shape[1]),) * 2, round(1 / self.config.downsample_ratio)
        attention, keys = (merged_patches(part, grid, side).mean(2) for part in (attention[..., None], keys))
        tiles = zip(attention[..., 0], projected["hidden_states"].float(), keys, strict=True)
        outputs.pooler_output.towers = [TowerSignals(*tile, self.project_states, has_class_token=True) for tile in tiles]
        return outputs

    def tower_blocks(self):
        return self.vision_tower.encoder.layer if isinstance(self.vision_tower, InternVLVisionModel) else None

    def project_states(self, states: torch.Tensor) -> torch.Tensor:
        """Of the patches of a token side by side, [n, patches * tower_size] to [n, hidden_size]."""
        return self.multi_modal_projector(states.to(self.dtype)[None])[0]

    def get_placeholder_mask(self, input_ids, inputs_embeds: torch.Tensor, image_features: torch.Tensor):
        """As in the stock class, also for features [num_features, hidden_size] of all tiles in a row."""
        image_features = image_features[None] if image_features.ndim == 2 else image_features
        return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)

    def grid_views_of(self, modality: str, features: torch.Tensor) -> Sequence[GridView]:
        side = isqrt(len(features))  # the stock encoder takes square tiles alone
        return [GridView(side, side)]

    def ends_of_images(self, mask, views, tokens):
        return mask & ~nn.functional.pad(mask[:, 1:], (0, 1))


class VLMPrunerInternVLForConditionalGeneration(LlavaGenerationMixin, InternVLForConditionalGeneration):
    """`InternVLForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerInternVLConfig

    def __init__(self, config: VLMPrunerInternVLConfig):
        super(InternVLForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerInternVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(InternVLForConditionalGeneration)


__all__ = ["VLMPrunerInternVLForConditionalGeneration", "VLMPrunerInternVLModel"]
