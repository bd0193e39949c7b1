"""Qwen3-VL, dense and with experts, with pruning: the difference to transformers' classes.

What is Qwen3-VL's own, beside what `modeling_vlmpruner_qwen2vl.py` says: timestamps stand between the temporal slices of a
video, so its tokens are separate runs; and the first decoder layers are followed by visual features (DeepStack), which must
reach exactly the tokens that are still there. What experts add, their router's logits and loss, is in `pruned_model.py`.
"""

import torch
from torch import nn
from transformers import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
)
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import VLMPrunerQwen3VLConfig, VLMPrunerQwen3VLMoeConfig
from .modeling_vlmpruner_qwen2vl import PrunedQwenForConditionalGenerationMixin, PrunedQwenModelMixin
from .pruned_decoder import PrunedLayerMixin
from .pruned_model import pruned_forward


class Qwen3VLTextDecoderLayer(PrunedLayerMixin, modeling_qwen3_vl.Qwen3VLTextDecoderLayer):
    """Qwen3-VL's layer, which follows a plan."""


class Qwen3VLMoeTextDecoderLayer(PrunedLayerMixin, modeling_qwen3_vl_moe.Qwen3VLMoeTextDecoderLayer):
    """The layer of Qwen3-VL with experts, which follows a plan."""


class PrunedQwen3VLModelMixin(PrunedQwenModelMixin):
    """Put in front of a stock Qwen3-VL model."""

    @can_return_tuple
    def get_video_features(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor | None = None, **kwargs):
        """As in the stock class, which takes videos for images, with `grid_views` as in `get_image_features`."""
        self._grid_views("video_grid_thw", video_grid_thw, pixel_values_videos)
        return self.get_image_features(pixel_values_videos, video_grid_thw, **(kwargs | {"return_dict": True}))

    def deepstack(self, encoded, visuals):
        """For each of the first decoder layers, the features to add after it, of each modality."""
        after_layer = []
        for layers in zip(*(encoded[visual.modality].deepstack_features for visual in visuals), strict=True):
            # One tensor for all images in transformers 5.17, one for each later on.
            flat = [features if isinstance(features, torch.Tensor) else torch.cat(list(features)) for features in layers]
            after_layer.append([(visual.mask, features) for visual, features in zip(visuals, flat, strict=True)])
        return after_layer


class VLMPrunerQwen3VLModel(PrunedQwen3VLModelMixin, Qwen3VLModel):
    """`Qwen3VLModel` whose decoder drops visual tokens."""

    config: VLMPrunerQwen3VLConfig
    decoder_layers = (Qwen3VLTextDecoderLayer,)


class VLMPrunerQwen3VLForConditionalGeneration(PrunedQwenForConditionalGenerationMixin, Qwen3VLForConditionalGeneration):
    """`Qwen3VLForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerQwen3VLConfig

    def __init__(self, config: VLMPrunerQwen3VLConfig):
        super(Qwen3VLForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerQwen3VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Qwen3VLForConditionalGeneration)


class VLMPrunerQwen3VLMoeModel(PrunedQwen3VLModelMixin, Qwen3VLMoeModel):
    """`Qwen3VLMoeModel` whose decoder drops visual tokens."""

    config: VLMPrunerQwen3VLMoeConfig
    decoder_layers = (Qwen3VLMoeTextDecoderLayer,)


class VLMPrunerQwen3VLMoeForConditionalGeneration(PrunedQwenForConditionalGenerationMixin, Qwen3VLMoeForConditionalGeneration):
    """`Qwen3VLMoeForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerQwen3VLMoeConfig

    def __init__(self, config: VLMPrunerQwen3VLMoeConfig):
        super(Qwen3VLMoeForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerQwen3VLMoeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Qwen3VLMoeForConditionalGeneration)


__all__ = [
    "VLMPrunerQwen3VLForConditionalGeneration",
    "VLMPrunerQwen3VLModel",
    "VLMPrunerQwen3VLMoeForConditionalGeneration",
    "VLMPrunerQwen3VLMoeModel",
]
