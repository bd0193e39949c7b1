"""VLM-Pruner for transformers: vision-language models that drop redundant visual tokens inside the decoder."""

from importlib import import_module

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


def __getattr__(name: str):
    """The module `export`, imported when it is first used: so `python -m vlmpruner.export` runs it once."""
    if name == "export":
        return import_module(".export", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
