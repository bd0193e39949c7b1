"""Qwen3.5 (and 3.6), dense and with experts, with pruning: the difference to transformers' classes.

What is Qwen3.5's own, beside what `modeling_vlmpruner_qwen2vl.py` says: three layers of linear attention (GatedDeltaNet) stand
before each one of full attention. They have a recurrent state and no keys, so tokens can leave at the layers that follow one of
full attention: 4, by default, with the keys of layer 3, then 8, 12 and so on. The layers of linear attention above run on the
kept tokens as on a shorter text: convolution and state go from one kept token to the next. A state can not be cropped or turned
back, so what the stock class refuses for that is refused here too: `crop`, speculative decoding, and copying rows of a cache.

Timestamps stand between the temporal slices of a video, as in Qwen3-VL; there is no DeepStack.
"""

from torch import nn
from transformers import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Model,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeModel,
)
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import VLMPrunerQwen3_5Config, VLMPrunerQwen3_5MoeConfig
from .modeling_vlmpruner_qwen2vl import PrunedQwenForConditionalGenerationMixin, PrunedQwenModelMixin
from .pruned_decoder import PrunedLayerMixin
from .pruned_model import pruned_forward
from .recurrent_rows import RecurrentRowsMixin


class Qwen3_5GatedDeltaNet(RecurrentRowsMixin, modeling_qwen3_5.Qwen3_5GatedDeltaNet):
    """Qwen3.5's linear attention, whose states see no padding."""


class Qwen3_5DecoderLayer(PrunedLayerMixin, modeling_qwen3_5.Qwen3_5DecoderLayer):
    """Qwen3.5's layer, which follows a plan."""

    linear_attention_class = Qwen3_5GatedDeltaNet


class Qwen3_5MoeGatedDeltaNet(RecurrentRowsMixin, modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet):
    """The linear attention of Qwen3.5 with experts, whose states see no padding."""


class Qwen3_5MoeDecoderLayer(PrunedLayerMixin, modeling_qwen3_5_moe.Qwen3_5MoeDecoderLayer):
    """The layer of Qwen3.5 with experts, which follows a plan."""

    linear_attention_class = Qwen3_5MoeGatedDeltaNet


class PrunedQwen3_5ModelMixin(PrunedQwenModelMixin):
    """Put in front of a stock Qwen3.5 model."""

    @can_return_tuple
    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        """As in the stock class, which takes videos for images, with `grid_views` as in `get_image_features`."""
        self._grid_views("video_grid_thw", video_grid_thw, pixel_values_videos)
        return self.get_image_features(pixel_values_videos, video_grid_thw, **(kwargs | {"return_dict": True}))


class PrunedQwen3_5ForConditionalGenerationMixin(PrunedQwenForConditionalGenerationMixin):
    """Put in front of a stock generating Qwen3.5 model."""

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Asked by engines that run a decoder's layers in a loop of their own, where nothing would be pruned.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{cls.__name__} would run unpruned in this engine, and the vLLM plugin of this project does not serve it: the "
            "plugin prunes keys and values, and most layers of this model have a recurrent state. Use transformers."
        )


class VLMPrunerQwen3_5Model(PrunedQwen3_5ModelMixin, Qwen3_5Model):
    """`Qwen3_5Model` whose decoder drops visual tokens."""

    config: VLMPrunerQwen3_5Config
    decoder_layers = (Qwen3_5DecoderLayer,)


class VLMPrunerQwen3_5ForConditionalGeneration(PrunedQwen3_5ForConditionalGenerationMixin, Qwen3_5ForConditionalGeneration):
    """`Qwen3_5ForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerQwen3_5Config

    def __init__(self, config: VLMPrunerQwen3_5Config):
        super(Qwen3_5ForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerQwen3_5Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Qwen3_5ForConditionalGeneration)


class VLMPrunerQwen3_5MoeModel(PrunedQwen3_5ModelMixin, Qwen3_5MoeModel):
    """`Qwen3_5MoeModel` whose decoder drops visual tokens."""

    config: VLMPrunerQwen3_5MoeConfig
    decoder_layers = (Qwen3_5MoeDecoderLayer,)


class VLMPrunerQwen3_5MoeForConditionalGeneration(
    PrunedQwen3_5ForConditionalGenerationMixin, Qwen3_5MoeForConditionalGeneration
):
    """`Qwen3_5MoeForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerQwen3_5MoeConfig

    def __init__(self, config: VLMPrunerQwen3_5MoeConfig):
        super(Qwen3_5MoeForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerQwen3_5MoeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Qwen3_5MoeForConditionalGeneration)


__all__ = [
    "VLMPrunerQwen3_5ForConditionalGeneration",
    "VLMPrunerQwen3_5Model",
    "VLMPrunerQwen3_5MoeForConditionalGeneration",
    "VLMPrunerQwen3_5MoeModel",
]
