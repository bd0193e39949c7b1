"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision / LLaVA-Video with pruning: the difference to transformers' classes.

What is LLaVA's own is which grids an image or a video forms:
- LLaVA-1.5: one grid of the vision tower's patches; with the "full" feature strategy a class token before it.
- LLaVA-NeXT and OneVision: a base view, and a view of higher resolution that lost its padding and has a newline token at the
  end of each row. OneVision sees the images of a row that has several as a base view alone, with one newline at the end.
- OneVision's videos: a pooled grid for each frame, and one newline at the end. LLaVA-Video's: a newline after each row of each
  frame, and another pooling (`newline_position`, `spatial_pool_mode` and `spatial_pool_stride` of the config).
Class tokens and newlines are structure: never candidates, always kept. Everything else is in `pruned_decoder.py` and
`pruned_model.py`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PixtralVisionModel,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested

from .configuration_vlmpruner import VLMPrunerLlavaConfig, VLMPrunerLlavaNextConfig, VLMPrunerLlavaOnevisionConfig
from .pruned_decoder import PrunedLayerMixin
from .pruned_model import PrunedForConditionalGenerationMixin, PrunedModelMixin, pruned_forward
from .pruning_method import TowerSignals
from .tower_signals import attention_to_images, attention_to_patches, merged_patches, watch
from .visual_grids import GridView, video_views


class LlamaDecoderLayer(PrunedLayerMixin, modeling_llama.LlamaDecoderLayer):
    """Llama's layer, which follows a plan."""


class MistralDecoderLayer(PrunedLayerMixin, modeling_mistral.MistralDecoderLayer):
    """Mistral's layer, which follows a plan."""


class Qwen2DecoderLayer(PrunedLayerMixin, modeling_qwen2.Qwen2DecoderLayer):
    """Qwen2's layer, which follows a plan."""


class PrunedLlavaModelMixin(PrunedModelMixin):
    """Put in front of a stock LLaVA model, of whichever language model."""

    decoder_layers = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)

    def tower_blocks(self):
        blocks = next((module for module in self.vision_tower.modules() if isinstance(module, nn.ModuleList)), None)
        if blocks is None or not hasattr(blocks[0], "layer_norm1"):  # of CLIP's and SigLIP's kind
            return None
        has_rope = "position_embeddings" in inspect.signature(type(blocks[0]).forward).parameters  # MLCD's
        return None if has_rope else blocks

    def with_tower_signals(self, encode: Callable, feature_layer: int | list[int] | None):
        """The outputs of `encode`; each tensor of its `pooler_output` gets an attribute `tower` if the method asks for it."""
        if not self.config.looks_at_tower or self.tower_blocks() is None:
            return encode()
        block = self.block_of_features(feature_layer)
        with watch(block) as seen:
            outputs = encode()
        has_class_token = any(name.endswith("class_embedding") for name, _ in self.vision_tower.named_parameters())
        attention, keys = attention_to_patches(block, seen["hidden_states"].detach(), has_class_token)
        channels = torch.cat([attention[..., None], keys, seen["output"][:, int(has_class_token) :].float()], dim=-1)
        for features in outputs.pooler_output:
            num_tiles = features.packed_tiles.num_tiles if hasattr(features, "packed_tiles") else 1
            rows, channels = self.pack_channels(channels[:num_tiles], features), channels[num_tiles:]
            parts = rows.split([1, keys.shape[-1], rows.shape[-1] - 1 - keys.shape[-1]], dim=-1)
            features.tower = TowerSignals(
                parts[0][:, 0],
                parts[2],
                parts[1],
                self.project_states,
                has_class_token,
                is_clip=self.config.vision_config.model_type == "clip_vision_model",
            )
        return outputs

    def project_states(self, states: torch.Tensor) -> torch.Tensor:
        """Of the vision tower, [n, tower_size] to [n, hidden_size]."""
        return self.multi_modal_projector(states.to(self.dtype)[None])[0]

    def pack_channels(self, channels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[tiles, patches, c], what is known of an image's patches -> [num_features, c], in the order of its features."""
        return nn.functional.pad(channels[0], (0, 0, len(features) - channels.shape[1], 0))


class VLMPrunerLlavaModel(PrunedLlavaModelMixin, LlavaModel):
    """`LlavaModel` whose decoder drops visual tokens. `last_hidden_state` keeps the caller's length, with zeros where a token
    was dropped."""

    config: VLMPrunerLlavaConfig
    encoder_inputs = {"image": ("pixel_values", ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"))}

    def tower_blocks(self):
        return pixtral_blocks(self.vision_tower) or super().tower_blocks()

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
        because the features travel through `generate` without the arguments that would tell.

        Raises:
            ValueError: what `refuse_old_pixtral` raises.
        """
        refuse_old_pixtral(self.vision_tower)
        encode = partial(
            super().get_image_features,
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            **(kwargs | {"return_dict": True}),
        )
        if self.config.looks_at_tower and pixtral_blocks(self.vision_tower) is not None:
            sizes = [pixel_values.shape[-2:]] * len(pixel_values) if image_sizes is None else image_sizes
            outputs = with_pixtral_signals(self, encode, vision_feature_layer, sizes)
        else:
            outputs = self.with_tower_signals(encode, vision_feature_layer)
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


def pixtral_blocks(vision_tower: nn.Module) -> nn.ModuleList | None:
    """The blocks of a tower of Pixtral's kind; None for another."""
    return vision_tower.transformer.layers if isinstance(vision_tower, PixtralVisionModel) else None


def refuse_old_pixtral(vision_tower: nn.Module) -> None:
    """Raise a ValueError for FlashAttention in a tower of Pixtral's kind before transformers 5.20.

    There the stock tower hands on positions of two axes. FlashAttention would take them for packed rows, and read past its end.
    """
    if not isinstance(vision_tower, PixtralVisionModel) or Version(transformers.__version__) >= Version("5.20"):
        return
    if is_flash_attention_requested(vision_tower.config):
        raise ValueError(
            f"transformers {transformers.__version__} computes a Pixtral vision tower wrongly with attn_implementation "
            f'{vision_tower.config._attn_implementation!r}. Load the model with attn_implementation={{"text_config": '
            '"flash_attention_2", "vision_config": "sdpa"}, or install transformers>=5.20.'
        )


def with_pixtral_signals(
    model: PrunedModelMixin,
    encode: Callable,
    feature_layer: int | list[int] | None,
    sizes: torch.Tensor | Sequence[Sequence[int]],
    merge: int = 1,
):
    """The outputs of `encode`; each tensor of its `pooler_output` gets an attribute `tower`.

    Args:
        model: one with a `vision_tower` of Pixtral's kind, a `multi_modal_projector` and `project_states`.
        feature_layer: of `block_of_features`.
        sizes: (height, width) in pixels of each image.
        merge: the projector makes a token of `merge` x `merge` patches.
    """
    block, patch_size = model.block_of_features(feature_layer), model.config.vision_config.patch_size
    grids = [tuple(int(length) // patch_size for length in size) for size in sizes]
    lengths = [height * width for height, width in grids]
    with watch(block) as seen, watch(model.multi_modal_projector) as projected:
        outputs = encode()
    attention, keys = attention_to_images(block, seen, lengths)
    states = projected["hidden_states"].flatten(0, -2).float()
    parts = (part.split(lengths) for part in (attention[:, None], keys, states))
    for features, grid, *image in zip(outputs.pooler_output, grids, *parts, strict=True):
        received, own_keys, own_states = (merged_patches(part[None], grid, merge)[0] for part in image)
        features.tower = TowerSignals(
            received.mean(1)[:, 0], own_states.flatten(1), own_keys.mean(1), model.project_states, has_class_token=False
        )
    return outputs


@dataclass(frozen=True)
class PackedTiles:
    """How the features of an image were packed: `num_tiles` tiles of `tile_length` features, of image `image` of
    `image_sizes` [num_images, 2] (height, width in pixels), with `options` for the stock `pack_image_features`."""

    num_tiles: int
    tile_length: int
    image: int
    image_sizes: torch.Tensor | Sequence
    options: dict


class AnyResolutionMixin(PrunedLlavaModelMixin):
    """Put in front of a stock model whose images are a base view and tiles of a larger one."""

    def pack_image_features(self, image_features, image_sizes, **options):
        """As in the stock class. Each tensor of features gets an attribute `packed_tiles`, of which `grid_views_of` makes its
        grids, because the features travel through `generate` without the arguments that would tell."""
        packed, lengths = super().pack_image_features(image_features, image_sizes, **options)
        for image, (features, tiles) in enumerate(zip(packed, image_features, strict=True)):
            features.packed_tiles = PackedTiles(*tiles.shape[:2], image, image_sizes, options)
        return packed, lengths

    def pack_channels(self, channels, features):
        tiles = features.packed_tiles
        channels = nn.functional.pad(channels, (0, 0, tiles.tile_length - channels.shape[1], 0))  # a class token's row
        options = tiles.options | {"image_newline": channels.new_zeros(channels.shape[-1])}
        return super().pack_image_features([channels], [tiles.image_sizes[tiles.image]], **options)[0][0]

    def grid_views_of(self, modality: str, features: torch.Tensor) -> Sequence[GridView]:
        if not hasattr(features, "packed_tiles"):
            return super().grid_views_of(modality, features)
        return self._any_resolution_views(features.packed_tiles, len(features))

    def _any_resolution_views(self, tiles: PackedTiles, num_features: int) -> list[GridView]:
        """The grids of an image, found by packing tiles of zeros and looking where the newlines went.

        Raises:
            ValueError: if an image of this size has another number of features.
        """
        size = tiles.image_sizes[tiles.image]
        zeros = torch.zeros(tiles.num_tiles, tiles.tile_length, 1, device="cpu")
        options = tiles.options | {"image_newline": torch.ones(1, device="cpu")}
        (packed,), _ = super().pack_image_features([zeros], [size], **options)
        height, width = self._tower_grid()
        class_tokens = tiles.tile_length - height * width
        if len(packed) != num_features or class_tokens not in (0, 1):
            raise ValueError(
                f"An image of {int(size[0])} x {int(size[1])} pixels makes {len(packed)} features with a base view of "
                f"{height} x {width} = {height * width}, but it has {num_features} features and a base view of "
                f"{tiles.tile_length}."
            )
        views = [GridView(height, width, start=class_tokens)]
        newlines = packed[:, 0].nonzero()[:, 0].tolist()
        row_stride = (num_features - tiles.tile_length) // max(len(newlines), 1)
        if row_stride > 1:  # else a single tile, or a very thin image, of which unpadding leaves nothing
            views.append(GridView(len(newlines), row_stride - 1, start=tiles.tile_length, row_stride=row_stride))
        return views

    def _tower_grid(self) -> tuple[int, int]:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side


def with_image_sizes(get_image_features: Callable) -> Callable:
    """The stock method, which raises a ValueError where `image_sizes` are missing."""

    @can_return_tuple
    @wraps(get_image_features)
    def checked(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, *args, **kwargs):
        if image_sizes is None:
            raise ValueError(
                f"{type(self).__name__} got pixel_values but no image_sizes, the (height, width) of each image before it was "
                "cut into tiles. Pass what the processor returned for the same images."
            )
        encode = partial(get_image_features, self, pixel_values, image_sizes, *args, **kwargs | {"return_dict": True})
        return self.with_tower_signals(encode, args[0] if args else kwargs.get("vision_feature_layer"))

    return checked


class VLMPrunerLlavaNextModel(AnyResolutionMixin, LlavaNextModel):
    """`LlavaNextModel` whose decoder drops visual tokens."""

    config: VLMPrunerLlavaNextConfig
    encoder_inputs = {"image": ("pixel_values", ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy"))}
    get_image_features = with_image_sizes(LlavaNextModel.get_image_features)


def with_newlines(get_video_features: Callable) -> Callable:
    """The stock method, with newlines where the config has them."""

    @can_return_tuple
    @wraps(get_video_features)
    def laid_out(self, *args, **kwargs):
        outputs = get_video_features(self, *args, **kwargs | {"return_dict": True})
        if self.config.newline_position != "one_token":
            pixels = args[0] if args else kwargs.get("pixel_values_videos", kwargs.get("pixel_values"))
            outputs.pooler_output = self._with_newlines(outputs.pooler_output, frames=pixels.shape[1])
        return outputs

    return laid_out


class VLMPrunerLlavaOnevisionModel(AnyResolutionMixin, LlavaOnevisionModel):
    """`LlavaOnevisionModel` whose decoder drops visual tokens.

    As in the stock class, `forward` takes `vision_aspect_ratio` from the config; the argument counts in `generate` alone (and
    nowhere in transformers 5.17).
    """

    config: VLMPrunerLlavaOnevisionConfig
    encoder_inputs = {
        "image": (
            "pixel_values",
            ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy", "batch_num_images"),
        ),
        "video": ("pixel_values_videos", ("vision_feature_layer", "vision_feature_select_strategy")),
    }
    get_image_features = with_image_sizes(LlavaOnevisionModel.get_image_features)
    get_video_features = with_newlines(LlavaOnevisionModel.get_video_features)

    def apply_pooling(self, image_features: torch.Tensor) -> torch.Tensor:
        """As in the stock class, with the pooling of the config. [frames, patches, c] to [frames, tokens, c]"""
        mode, stride = self.config.spatial_pool_mode, self.config.spatial_pool_stride
        if (mode, stride) == ("bilinear", 2):
            return super().apply_pooling(image_features)
        layout = self.config.video_layout
        frames = image_features.unflatten(1, self._tower_grid()).permute(0, 3, 1, 2)
        if mode == "bilinear":
            pooled = nn.functional.interpolate(frames, size=(layout.height, layout.width), mode="bilinear")
        else:
            pool = {"average": nn.functional.avg_pool2d, "max": nn.functional.max_pool2d}[mode]
            pooled = pool(frames, stride)
        return pooled.flatten(2).transpose(1, 2)

    def _with_newlines(self, features: torch.Tensor, frames: int) -> torch.Tensor:
        """The stock features of videos of `frames`, with the newlines of the config.

        Args:
            features: [videos, frames * height * width, c], and one newline more where the stock method ends a video with it.

        Returns:
            [videos, num_features, c], without the last newline where `features` had none: `forward` adds it then.
        """
        layout = self.config.video_layout
        num_tokens = frames * layout.height * layout.width
        grids = features[:, :num_tokens].unflatten(1, (frames, layout.height, layout.width))
        newline = self.image_newline.to(features)
        if self.config.newline_position == "grid":
            grids = torch.cat([grids, newline.expand(*grids.shape[:3], 1, -1)], dim=3)
        rows = grids.flatten(2, 3)
        if self.config.newline_position == "frame":
            rows = torch.cat([rows, newline.expand(*rows.shape[:2], 1, -1)], dim=2)
        laid_out = rows.flatten(1, 2)
        return laid_out if features.shape[1] > num_tokens else laid_out[:, :-1]

    def grid_views_of(self, modality: str, features: torch.Tensor) -> Sequence[GridView]:
        if modality != "video":
            return super().grid_views_of(modality, features)
        layout, scope = self.config.video_layout, self.config.pruning_video_scope
        frames = (len(features) - layout.num_at_end) // layout.frame_stride
        if len(features) != layout.num_features(frames):
            raise ValueError(
                f"A video has {len(features)} features, which is no number of frames of {layout.height} x {layout.width} = "
                f"{layout.height * layout.width} with newlines as in newline_position={self.config.newline_position!r}. "
                "(A prompt prefilled in chunks cuts them: set prefill_chunk_size=None.)"
            )
        return video_views(frames, layout.height, layout.width, scope, layout.row_stride, layout.frame_stride)

    def _encode(self, inputs: dict) -> dict:
        """Ends each video with a newline. From transformers 5.18 on `get_video_features` does so; 5.17 does it in `forward`."""
        pixels = inputs.get("pixel_values_videos")
        encoded = super()._encode(inputs)
        if pixels is None:
            return encoded
        num_features = self.config.video_layout.num_features(frames=pixels.shape[1])
        if (videos := encoded["video"]).pooler_output.shape[1] == num_features - 1:
            newlines = self.image_newline.to(videos.pooler_output).expand(len(videos.pooler_output), 1, -1)
            videos.pooler_output = torch.cat([videos.pooler_output, newlines], dim=1)
        return encoded


class LlavaGenerationMixin(PrunedForConditionalGenerationMixin):
    """Put in front of a stock generating LLaVA model. Also repeats pixels by rows for beams and samples.

    transformers 5.17 gives pixels to the model, and repeats each image on its own: of a row with images A and B, one beam gets
    A, A, the next B, B.
    """

    def repeat_visuals(self, repeats: int, input_ids: torch.LongTensor | None, inputs: dict) -> dict:
        """Also of pixels. Only the encoder tells how many tokens an image has, so they are encoded once for that."""
        visuals = super().repeat_visuals(repeats, input_ids, inputs)
        pixels = {name: value for name, value in inputs.items() if name != "mm_encoder_outputs"}
        for modality, outputs in self.model._encode(pixels).items():
            order = self.repeated_order(modality, outputs.pooler_output, repeats, input_ids, inputs)
            visuals |= self._repeat_pixels(modality, inputs, len(outputs.pooler_output), order)
        return visuals

    def _repeat_pixels(self, modality: str, inputs: dict, num_images: int, order: list[int]) -> dict:
        pixels, others = self.model.encoder_inputs[modality]
        if len(inputs[pixels]) != num_images:
            raise ValueError(
                f"Several sequences for each row need {pixels} with one entry for each {modality}, but there are "
                f"{len(inputs[pixels])} entries for {num_images} {modality}s."
            )
        values = {name: inputs.get(name) for name in (pixels, *others)}
        # Counts of images for each row are repeated like the rows, by the stock code.
        return {
            name: value[order] for name, value in values.items() if isinstance(value, torch.Tensor) and len(value) == num_images
        }


class VLMPrunerLlavaForConditionalGeneration(LlavaGenerationMixin, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` that removes visual tokens inside the decoder (VLM-Pruner, arXiv 2512.02700).

    `forward` and `generate` take everything that the stock class takes, and `pruning_ratio` (`float` in [0, 1), *optional*),
    which replaces `config.pruning_ratio` for one call. Logits keep the caller's length; those of dropped tokens come from a
    zero hidden state, and labels that a dropped token would predict do not count in the loss. What was kept is in
    `outputs.pruning_record`, with the cache, and given by `get_pruning_record(outputs)`.
    """

    config: VLMPrunerLlavaConfig

    def __init__(self, config: VLMPrunerLlavaConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)  # not LLaVA's own, which would build the stock model
        self.model = VLMPrunerLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(LlavaForConditionalGeneration)


class VLMPrunerLlavaNextForConditionalGeneration(LlavaGenerationMixin, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` that removes visual tokens inside the decoder, as the LLaVA-1.5 class above."""

    config: VLMPrunerLlavaNextConfig

    def __init__(self, config: VLMPrunerLlavaNextConfig):
        super(LlavaNextForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerLlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(LlavaNextForConditionalGeneration)


class VLMPrunerLlavaOnevisionForConditionalGeneration(LlavaGenerationMixin, LlavaOnevisionForConditionalGeneration):
    """`LlavaOnevisionForConditionalGeneration` that removes visual tokens inside the decoder, as the LLaVA-1.5 class above."""

    config: VLMPrunerLlavaOnevisionConfig

    def __init__(self, config: VLMPrunerLlavaOnevisionConfig):
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerLlavaOnevisionModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(LlavaOnevisionForConditionalGeneration)


__all__ = [
    "VLMPrunerLlavaForConditionalGeneration",
    "VLMPrunerLlavaModel",
    "VLMPrunerLlavaNextForConditionalGeneration",
    "VLMPrunerLlavaNextModel",
    "VLMPrunerLlavaOnevisionForConditionalGeneration",
    "VLMPrunerLlavaOnevisionModel",
]
