"""LLaVA-1.5 with pruning: the difference to transformers' classes.

What is LLaVA's own: each image is one grid of the vision tower's patches, and with the "full" feature strategy a class token
comes first, which is structure. Everything else is in `pruned_decoder.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import VLMPrunerLlavaConfig
from .pruned_cache import PruningRecord
from .pruned_decoder import GridView
from .pruned_model import (
    PrunedForConditionalGenerationMixin,
    PrunedModelMixin,
    pruned_forward,
    register_weight_renaming,
)


register_weight_renaming(VLMPrunerLlavaForConditionalGeneration="llava", VLMPrunerLlavaModel="LlavaModel")


class VLMPrunerLlavaModel(PrunedModelMixin, LlavaModel):
    """`LlavaModel` whose decoder drops visual tokens. `last_hidden_state` keeps the caller's length, with zeros where a token
    was dropped."""

    config: VLMPrunerLlavaConfig
    encoder_inputs = {"image": ("pixel_values", ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"))}

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ):
        """As in the stock class. Each tensor of `pooler_output` gets an attribute `grid_views` that says what grid it forms,
        because the features travel through `generate` without the arguments that would tell."""
        outputs = super().get_image_features(
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            **(kwargs | {"return_dict": True}),
        )
        sizes = [pixel_values.shape[-2:]] * len(outputs.pooler_output) if image_sizes is None else image_sizes
        for features, (height, width) in zip(outputs.pooler_output, sizes, strict=True):
            features.grid_views = self._grid_views(len(features), int(height), int(width))
        return outputs

    def _grid_views(self, num_features: int, image_height: int, image_width: int) -> list[GridView]:
        patch_size = self.config.vision_config.patch_size
        height, width = image_height // patch_size, image_width // patch_size
        num_structure = num_features - height * width
        if num_structure not in (0, 1):
            raise ValueError(
                f"An image of {image_height} x {image_width} pixels makes a grid of {height} x {width} = {height * width} "
                f"patches, but it has {num_features} features."
            )
        return [GridView(height, width, start=num_structure)]


@dataclass
class VLMPrunerLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Adds `pruning_record` (`PruningRecord`, *optional*): what was kept of this call's images."""

    pruning_record: PruningRecord | None = None


class VLMPrunerLlavaForConditionalGeneration(PrunedForConditionalGenerationMixin, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` that removes visual tokens inside the decoder (VLM-Pruner, arXiv 2512.02700).

    `forward` and `generate` take everything that the stock class takes, and `pruning_ratio` (`float` in [0, 1), *optional*),
    which replaces `config.pruning_ratio` for one call. Logits keep the caller's length; those of dropped tokens come from a
    zero hidden state, and labels that a dropped token would predict do not count in the loss. What was kept is in
    `outputs.pruning_record`, in `outputs.past_key_values.pruning_record`, and given by `get_pruning_record(outputs)`.
    """

    config: VLMPrunerLlavaConfig

    def __init__(self, config: VLMPrunerLlavaConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)  # not LLaVA's own, which would build the stock model
        self.model = VLMPrunerLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(LlavaForConditionalGeneration.forward, VLMPrunerLlavaCausalLMOutputWithPast)


__all__ = ["VLMPrunerLlavaForConditionalGeneration", "VLMPrunerLlavaModel"]
