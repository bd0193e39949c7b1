"""The families that the plugin serves: vLLM's model class, and what grids an image or a video forms.

A new family joins by one entry in `FAMILIES` and one class in `models.py`. It runs without a model, in the scheduler too.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vlmpruner.visual_grids import GridView, video_views


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_class: vLLM's class with pruning, as `module:Name`.
        grid_views: from the config and a feature of a request to the grids that its embeddings form, in the order of the rows.
    """

    model_class: str
    grid_views: Callable[[object, MultiModalFeatureSpec], Sequence[GridView]]


def llava_views(config, feature: MultiModalFeatureSpec) -> list[GridView]:
    """One grid of the vision tower's patches; with the "full" feature strategy a class token before it."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [GridView(side, side, start=feature.mm_position.get_num_embeds() - side * side)]


def any_resolution_views(config, feature: MultiModalFeatureSpec) -> list[GridView]:
    """A base view, and a view of higher resolution that lost its padding and has a newline at the end of each row."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    image_size = feature.data["image_sizes"].data.tolist()
    tiles = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, config.vision_config.image_size)
    padded = torch.empty(1, tiles[0] * side, tiles[1] * side, device="cpu")
    _, height, width = unpad_image(padded, image_size).shape
    limit = re.fullmatch(r"anyres_max_(\d+)", getattr(config, "vision_aspect_ratio", ""))
    if limit and (excess := math.sqrt(height * width / (int(limit[1]) * side**2))) > 1.1:
        height, width = int(height // excess), int(width // excess)
    views = [GridView(side, side)]
    if height * width > 0:
        views.append(GridView(height, width, start=side * side, row_stride=width + 1))
    return views


def onevision_views(config, feature: MultiModalFeatureSpec) -> list[GridView]:
    """Of an image as above; of a video a grid for each frame, pooled by two, or one for all (`pruning_video_scope`)."""
    if feature.modality != "video":
        return any_resolution_views(config, feature)
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    frames = (feature.mm_position.get_num_embeds() - 1) // side**2
    return video_views(frames, side, side, config.pruning_video_scope)


def qwen_views(config, feature: MultiModalFeatureSpec) -> list[GridView]:
    """The merged grid of an image; of a video one for each temporal slice, or one for all (`pruning_video_scope`)."""
    frames, height, width = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
    merge = config.vision_config.spatial_merge_size
    return video_views(frames, height // merge, width // merge, config.pruning_video_scope)


FAMILIES = {
    architecture: Family(f"vlmpruner_vllm.models:{architecture}", grid_views)
    for architecture, grid_views in (
        ("VLMPrunerLlavaForConditionalGeneration", llava_views),
        ("VLMPrunerLlavaNextForConditionalGeneration", any_resolution_views),
        ("VLMPrunerLlavaOnevisionForConditionalGeneration", onevision_views),
        ("VLMPrunerQwen2VLForConditionalGeneration", qwen_views),
        ("VLMPrunerQwen2_5_VLForConditionalGeneration", qwen_views),
        ("VLMPrunerQwen3VLForConditionalGeneration", qwen_views),
    )
}


def family_of(config) -> Family:
    """The family of a config, by its architecture.

    Raises:
        ValueError: for a pruned architecture that the plugin does not serve, or a layout of videos that vLLM's class has not.
    """
    architecture = next(iter(config.architectures or ()), None)
    if architecture not in FAMILIES:
        raise ValueError(
            f"The vLLM plugin of VLM-Pruner does not serve {architecture!r}. It serves: {', '.join(FAMILIES)}. Use "
            "`transformers` for this model."
        )
    if not getattr(config, "has_stock_video_layout", True):
        raise ValueError(
            f"The vLLM plugin of VLM-Pruner serves no model with newline_position={config.newline_position!r}, "
            f"spatial_pool_mode={config.spatial_pool_mode!r} and spatial_pool_stride={config.spatial_pool_stride!r}: vLLM's "
            "class has the videos of LLaVA-OneVision, with 'one_token', 'bilinear' and 2. Use `transformers` for this model."
        )
    return FAMILIES[architecture]
