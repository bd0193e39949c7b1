"""VLM-Pruner for transformers: vision-language models that drop redundant visual tokens inside the decoder."""

from . import export
from .configuration_vlmpruner import (
    PruningConfig,
    VLMPrunerGlm4vConfig,
    VLMPrunerGlm4vMoeConfig,
    VLMPrunerGlm46VConfig,
    VLMPrunerIdefics3Config,
    VLMPrunerInternVLConfig,
    VLMPrunerLlavaConfig,
    VLMPrunerLlavaNextConfig,
    VLMPrunerLlavaNextVideoConfig,
    VLMPrunerLlavaOnevisionConfig,
    VLMPrunerMistral3Config,
    VLMPrunerQwen2_5_VLConfig,
    VLMPrunerQwen2VLConfig,
    VLMPrunerQwen3_5Config,
    VLMPrunerQwen3_5MoeConfig,
    VLMPrunerQwen3VLConfig,
    VLMPrunerQwen3VLMoeConfig,
    VLMPrunerSmolVLMConfig,
)
from .in_place import prune, pruning, unprune
from .pruned_cache import PrunedImage, PruningRecord


__all__ = [
    "PrunedImage",
    "PruningConfig",
    "PruningRecord",
    "VLMPrunerGlm4vConfig",
    "VLMPrunerGlm4vMoeConfig",
    "VLMPrunerGlm46VConfig",
    "VLMPrunerIdefics3Config",
    "VLMPrunerInternVLConfig",
    "VLMPrunerLlavaConfig",
    "VLMPrunerLlavaNextConfig",
    "VLMPrunerLlavaNextVideoConfig",
    "VLMPrunerLlavaOnevisionConfig",
    "VLMPrunerMistral3Config",
    "VLMPrunerQwen2VLConfig",
    "VLMPrunerQwen2_5_VLConfig",
    "VLMPrunerQwen3VLConfig",
    "VLMPrunerQwen3VLMoeConfig",
    "VLMPrunerQwen3_5Config",
    "VLMPrunerQwen3_5MoeConfig",
    "VLMPrunerSmolVLMConfig",
    "export",
    "prune",
    "pruning",
    "unprune",
]
