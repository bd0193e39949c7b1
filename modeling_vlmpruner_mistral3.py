"""Mistral3 (Mistral Small 3.1 and 3.2) with pruning: the difference to transformers' classes.

What is Mistral3's own: an image has the (height, width) grid of the Pixtral tower's patches, merged by `spatial_merge_size`.
A break token stands at the end of each row and an end token after the last one. These are tokens of text in `input_ids`, not
features: they are on no grid, never candidates, and always kept. Everything else is in `pruned_decoder.py` and
`pruned_model.py`.
"""

from functools import partial

import torch
from torch import nn
from transformers import Mistral3ForConditionalGeneration, Mistral3Model
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import VLMPrunerMistral3Config
from .modeling_vlmpruner_llava import (
    LlamaDecoderLayer,
    LlavaGenerationMixin,
    MistralDecoderLayer,
    pixtral_blocks,
    refuse_old_pixtral,
    with_pixtral_signals,
)
from .pruned_model import PrunedModelMixin, pruned_forward
from .visual_grids import GridView


class VLMPrunerMistral3Model(PrunedModelMixin, Mistral3Model):
    """`Mistral3Model` whose decoder drops visual tokens."""

    config: VLMPrunerMistral3Config
    decoder_layers = (LlamaDecoderLayer, MistralDecoderLayer)
    encoder_inputs = {"image": ("pixel_values", ("image_sizes", "vision_feature_layer"))}

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        **kwargs,
    ):
        """As in the stock class. Each tensor of `pooler_output` gets an attribute `grid_views` that says what grid it forms,
        because the features travel through `generate` without the arguments that would tell.

        Raises:
            ValueError: where `image_sizes` are missing, and what `refuse_old_pixtral` raises.
        """
        refuse_old_pixtral(self.vision_tower)
        if image_sizes is None:
            raise ValueError(
                f"{type(self).__name__} got pixel_values but no image_sizes, the (height, width) of each image without the "
                "padding to the largest. Pass what the processor returned for the same images."
            )
        encode = partial(
            super().get_image_features,
            pixel_values,
            image_sizes,
            vision_feature_layer=vision_feature_layer,
            **(kwargs | {"return_dict": True}),
        )
        if self.config.looks_at_tower and self.tower_blocks() is not None:
            merge = self.config.spatial_merge_size
            outputs = with_pixtral_signals(self, encode, vision_feature_layer, image_sizes, merge)
        else:
            outputs = encode()
        side = self.config.vision_config.patch_size * self.config.spatial_merge_size
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        for features, (height, width) in zip(outputs.pooler_output, sizes, strict=True):
            features.grid_views = [GridView(int(height) // side, int(width) // side)]
        return outputs

    def tower_blocks(self):
        return pixtral_blocks(self.vision_tower)

    def project_states(self, states: torch.Tensor) -> torch.Tensor:
        """Of the patches of a token side by side, [n, patches * tower_size] to [n, hidden_size], each an image of its own."""
        if not len(states):
            return states.new_zeros(0, self.config.text_config.hidden_size)
        side = self.config.vision_config.patch_size * self.config.spatial_merge_size
        patches = states.to(self.dtype).view(-1, self.config.vision_config.hidden_size)
        return self.multi_modal_projector(patches, [(side, side)] * len(states))


class VLMPrunerMistral3ForConditionalGeneration(LlavaGenerationMixin, Mistral3ForConditionalGeneration):
    """`Mistral3ForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerMistral3Config

    def __init__(self, config: VLMPrunerMistral3Config):
        super(Mistral3ForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerMistral3Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Mistral3ForConditionalGeneration)


__all__ = ["VLMPrunerMistral3ForConditionalGeneration", "VLMPrunerMistral3Model"]
