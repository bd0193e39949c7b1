"""LLaVA-1.5 with pruning: the difference to transformers' classes.

What is LLaVA's own: each image is one grid of the vision tower's patches, and with the "full" feature strategy a class token
comes first, which is structure. Everything else is in `pruned_decoder.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import VLMPrunerLlavaConfig
from .pruned_decoder import (
    GridView,
    PrunedForConditionalGenerationMixin,
    PruningRecord,
    PruningRequest,
    make_plan,
    prune_decoder,
    pruning_state,
    register_weight_renaming,
    stock_mask,
)


register_weight_renaming(VLMPrunerLlavaForConditionalGeneration="llava", VLMPrunerLlavaModel="LlavaModel")


@dataclass
class VLMPrunerLlavaCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """Adds `pruning_record` (`PruningRecord`, *optional*): what was kept of this call's images."""

    pruning_record: PruningRecord | None = None


class VLMPrunerLlavaModel(LlavaModel):
    """`LlavaModel` whose decoder drops visual tokens. `last_hidden_state` keeps the caller's length, with zeros where a token
    was dropped. See `VLMPrunerLlavaForConditionalGeneration` for `pruning_ratio`."""

    config: VLMPrunerLlavaConfig

    def __init__(self, config: VLMPrunerLlavaConfig):
        super().__init__(config)
        self._no_split_modules |= prune_decoder(self.language_model)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ):
        """As in the stock class. Each tensor of `pooler_output` gets an attribute `grid_views` that says what grid it forms: the
        features travel through `generate` without the arguments that would tell."""
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
                f"An image of {image_height} x {image_width} pixels makes a grid of {height} x {width} = {height * width} patches, "
                f"but it has {num_features} features. Set pruning_ratio=0 for inputs that are no whole images, such as a prompt "
                "prefilled in chunks (prefill_chunk_size) that cut an image."
            )
        return [GridView(height, width, start=num_structure)]

    def _image_features(self, pixel_values, mm_encoder_outputs, kwargs: dict) -> list[torch.Tensor]:
        """One tensor [num_features, hidden_size] per image, with its `grid_views`."""
        names = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
        encoder_inputs = {name: kwargs.pop(name) for name in names if name in kwargs}
        outputs = (mm_encoder_outputs or {}).get("image")
        if outputs is None:
            outputs = self.get_image_features(pixel_values, **encoder_inputs, return_dict=True)
        size = self.config.vision_config.image_size
        for features in outputs.pooler_output:
            if not hasattr(features, "grid_views"):
                features.grid_views = self._grid_views(len(features), size, size)
        return list(outputs.pooler_output)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        pruning_ratio: float | None = None,
        pruning_request: PruningRequest | None = None,
        **kwargs,
    ):
        request = pruning_request or PruningRequest(pruning_ratio)
        settings = self.config.pruning_settings(request.ratio)
        has_images = pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None
        inputs = {"position_ids": position_ids, "past_key_values": past_key_values, "return_dict": True} | kwargs
        if pruning_state(past_key_values) is None and not (settings and has_images):
            if mm_encoder_outputs is not None:  # an argument that transformers 5.17 does not have
                inputs["mm_encoder_outputs"] = mm_encoder_outputs
            return super().forward(
                input_ids, pixel_values, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **inputs
            )

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = visual_mask = None
        images = []
        if has_images:
            per_image = self._image_features(pixel_values, mm_encoder_outputs, inputs)
            images = [(len(image), image.grid_views) for image in per_image]
            features = torch.cat(per_image).to(inputs_embeds.device, inputs_embeds.dtype)
            ids = request.without_drafted(input_ids, self.config.image_token_id, len(features))
            placeholders = self.get_placeholder_mask(ids, inputs_embeds=inputs_embeds, image_features=features)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders, features)
            visual_mask = placeholders[..., 0]
        request.plan = make_plan(
            self.language_model.config, settings, past_key_values, attention_mask, position_ids, visual_mask, images
        )
        outputs = super().forward(
            inputs_embeds=inputs_embeds, attention_mask=stock_mask(attention_mask), pruning_plan=request.plan, **inputs
        )
        request.plan.unpack_outputs(outputs)
        outputs.image_hidden_states = features
        return outputs


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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        pruning_ratio: float | None = None,
        **kwargs,
    ) -> VLMPrunerLlavaCausalLMOutputWithPast:
        request = PruningRequest(pruning_ratio, num_drafted=logits_to_keep - 1 if isinstance(logits_to_keep, int) else 0)
        if mm_encoder_outputs is not None:
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            pruning_request=request,
            return_dict=True,
            **kwargs,
        )
        loss = None if labels is None else self.supervised_loss(outputs.logits, labels, request, **kwargs)
        return VLMPrunerLlavaCausalLMOutputWithPast(loss=loss, **outputs, pruning_record=request.record)


__all__ = ["VLMPrunerLlavaForConditionalGeneration", "VLMPrunerLlavaModel"]
