"""GLM-4.1V, GLM-4.5V and GLM-4.6V with pruning: the difference to transformers' classes.

What is GLM's own, beside what `modeling_vlmpruner_qwen2vl.py` says of grids and M-RoPE positions, which are the same: slices of
a video stand between timestamps, and their placeholders are those of images. So a call with both images and videos is refused,
as by the stock class; a later turn may bring the other. What experts add, their router's logits
and loss, is in `pruned_model.py`.
"""

import torch
from torch import nn
from transformers import (
    Glm4vForConditionalGeneration,
    Glm4vModel,
    Glm4vMoeForConditionalGeneration,
    Glm4vMoeModel,
    Glm46VForConditionalGeneration,
    Glm46VModel,
)
from transformers.models.glm4v import modeling_glm4v
from transformers.models.glm4v_moe import modeling_glm4v_moe

from .configuration_vlmpruner import VLMPrunerGlm4vConfig, VLMPrunerGlm4vMoeConfig, VLMPrunerGlm46VConfig
from .modeling_vlmpruner_qwen2vl import PrunedQwenForConditionalGenerationMixin, PrunedQwenModelMixin
from .pruned_decoder import PrunedLayerMixin
from .pruned_model import pruned_forward


class Glm4vTextDecoderLayer(PrunedLayerMixin, modeling_glm4v.Glm4vTextDecoderLayer):
    """GLM-4.1V's layer, which follows a plan."""


class Glm4vMoeTextDecoderLayer(PrunedLayerMixin, modeling_glm4v_moe.Glm4vMoeTextDecoderLayer):
    """GLM-4.5V's layer, which follows a plan.

    `position_ids` end here. Attention does not need them, and the stock decoder hands on all three axes of M-RoPE.
    FlashAttention would take the axes of one row for three sequences, and read past its end.
    """

    def forward(self, hidden_states: torch.Tensor, *args, position_ids: torch.LongTensor | None = None, **kwargs):
        return super().forward(hidden_states, *args, **kwargs)


class PrunedGlmModelMixin(PrunedQwenModelMixin):
    """Put in front of a stock GLM model."""

    def placeholder_id(self, modality: str) -> int:
        """Of images, for videos too."""
        return self.config.image_token_id


class VLMPrunerGlm4vModel(PrunedGlmModelMixin, Glm4vModel):
    """`Glm4vModel` whose decoder drops visual tokens."""

    config: VLMPrunerGlm4vConfig
    decoder_layers = (Glm4vTextDecoderLayer,)


class VLMPrunerGlm4vForConditionalGeneration(PrunedQwenForConditionalGenerationMixin, Glm4vForConditionalGeneration):
    """`Glm4vForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerGlm4vConfig

    def __init__(self, config: VLMPrunerGlm4vConfig):
        super(Glm4vForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerGlm4vModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Glm4vForConditionalGeneration)


class VLMPrunerGlm4vMoeModel(PrunedGlmModelMixin, Glm4vMoeModel):
    """`Glm4vMoeModel` whose decoder drops visual tokens."""

    config: VLMPrunerGlm4vMoeConfig
    decoder_layers = (Glm4vMoeTextDecoderLayer,)


class VLMPrunerGlm4vMoeForConditionalGeneration(PrunedQwenForConditionalGenerationMixin, Glm4vMoeForConditionalGeneration):
    """`Glm4vMoeForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerGlm4vMoeConfig

    def __init__(self, config: VLMPrunerGlm4vMoeConfig):
        super(Glm4vMoeForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerGlm4vMoeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.num_experts = config.text_config.num_local_experts
        self.num_experts_per_tok = config.text_config.num_experts_per_tok
        self.post_init()

    forward = pruned_forward(Glm4vMoeForConditionalGeneration)


class VLMPrunerGlm46VModel(PrunedGlmModelMixin, Glm46VModel):
    """`Glm46VModel` whose decoder drops visual tokens."""

    config: VLMPrunerGlm46VConfig
    decoder_layers = (Glm4vTextDecoderLayer, Glm4vMoeTextDecoderLayer)


class VLMPrunerGlm46VForConditionalGeneration(PrunedQwenForConditionalGenerationMixin, Glm46VForConditionalGeneration):
    """`Glm46VForConditionalGeneration` that removes visual tokens inside the decoder."""

    config: VLMPrunerGlm46VConfig

    def __init__(self, config: VLMPrunerGlm46VConfig):
        super(Glm46VForConditionalGeneration, self).__init__(config)
        self.model = VLMPrunerGlm46VModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    forward = pruned_forward(Glm46VForConditionalGeneration)


__all__ = [
    "VLMPrunerGlm4vForConditionalGeneration",
    "VLMPrunerGlm4vModel",
    "VLMPrunerGlm4vMoeForConditionalGeneration",
    "VLMPrunerGlm4vMoeModel",
    "VLMPrunerGlm46VForConditionalGeneration",
    "VLMPrunerGlm46VModel",
]
