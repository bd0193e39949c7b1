"""LLaVA-NeXT-Video with pruning: the difference to transformers' classes.

Images are those of LLaVA-NeXT (`modeling_vlmpruner_llava.py`). A video is pooled frames in a row, without newlines between
them: a grid for each frame, or one for all (`pruning_video_scope`).
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoModel

from .configuration_vlmpruner import VLMPrunerLlavaNextVideoConfig
from .modeling_vlmpruner_llava import AnyResolutionMixin, LlavaGenerationMixin, with_image_sizes
from .pruned_model import pruned_forward
from .visual_grids import GridView, video_views


class VLMPrunerLlavaNextVideoModel(AnyResolutionMixin, LlavaNextVideoModel):
    """`LlavaNextVideoModel` whose decoder drops visual tokens."""

    config: VLMPrunerLlavaNextVideoConfig
    encoder_inputs = {
        "image": ("pixel_values", ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy")),
        "video": ("pixel_values_videos", ("vision_feature_layer", "vision_feature_select_strategy")),
    }
    get_image_features = with_image_sizes(LlavaNextVideoModel.get_image_features)

    def pack_image_features(self, image_features, image_sizes, vision_feature_select_strategy, image_newline=None):
        """As in the stock class, which calls it by position."""
        options = {"vision_feature_select_strategy": vision_feature_select_strategy, "image_newline": image_newline}
        return super().pack_image_features(image_features, image_sizes, **options)

    def grid_views_of(self, modality: str, features: torch.Tensor) -> Sequence[GridView]:
        if modality != "video":
            return super().grid_views_of(modality, features)
        height, width = (side // self.config.spatial_pool_stride for side in self._tower_grid())
        frames, surplus = divmod(len(features), height * width)
        if surplus:
            raise ValueError(
                f"A video has {len(features)} features, which is no number of frames of {height} x {width} = {height * width}."
            )
        return video_views(frames, height, width, self.config.pruning_video_scope)

    def _encode(self, inputs: dict) -> dict:
        """Of each video [num_features, hidden_size], where older versions of `get_video_features` have its frames apart.

        Raises:
            ValueError: for a method that looks at the vision tower, whose patches are no tokens of a pooled frame.
        """
        encoded = super()._encode(inputs)
        if "video" not in encoded:
            return encoded
        if self.config.looks_at_tower:
            raise ValueError(
                f"pruning_method {self.config.pruning_method!r} looks at the vision tower's patches, but a video's tokens are "
                "patches pooled. Choose a method that does not look at the tower, or set pruning_ratio=0."
            )
        if not isinstance(videos := encoded["video"].pooler_output, torch.Tensor):
            encoded["video"].pooler_output = [video.flatten(0, -2) for video in videos]
        return encoded


class VLMPrunerLlavaNextVideoForConditionalGeneration(LlavaGenerationMixin, LlavaNextVideoForConditionalGeneration):
    """`LlavaNextVideoForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerLlavaNextVideoConfig

    def __init__(self, config: VLMPrunerLlavaNextVideoConfig):
        super(LlavaNextVideoForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerLlavaNextVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(LlavaNextVideoForConditionalGeneration)


__all__ = ["VLMPrunerLlavaNextVideoForConditionalGeneration", "VLMPrunerLlavaNextVideoModel"]
