"""The settings of vLLM that a pruned model needs, so that a user passes none, and what is refused by name at start."""

import os

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .families import family_of
from .requests import RequestArguments


logger = init_logger("vllm.vlmpruner")

RUNNER_VERSION = "VLLM_USE_V2_MODEL_RUNNER"


class PrunedEngineConfig(VerifyAndUpdateConfig):
    """What vLLM asks about the config of a pruned architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check_model(vllm_config.model_config.hf_config)
        refuse_unsupported(vllm_config)
        vllm_config.scheduler_config.scheduler_cls = "vlmpruner_vllm.scheduler.make_scheduler"
        vllm_config.scheduler_config.disable_chunked_mm_input = True  # refuses at start what can not hold an image
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = False  # else there is one group for all layers
        worker = "worker_cpu.PruningCPUWorker" if current_platform.is_cpu() else "worker.PruningWorker"
        vllm_config.parallel_config.worker_cls = f"vlmpruner_vllm.{worker}"
        checks = f"{RequestArguments.__module__}:{RequestArguments.__name__}"
        vllm_config.model_config.logits_processors = [*(vllm_config.model_config.logits_processors or ()), checks]
        os.environ[RUNNER_VERSION] = "0"
        switch_off_prefix_caching(vllm_config)
        limit_cuda_graphs(vllm_config)


def check_model(config) -> None:
    """Raise a ValueError unless `config` is one of the project's and prunes in a way that the plugin can serve."""
    family_of(config)
    if not hasattr(config, "pruning_settings"):
        raise ValueError(
            f"{type(config).__name__} has no pruning settings. Serve a repo that `export.py` wrote, with --trust-remote-code."
        )
    if config.pruning_method not in ("vlm_pruner", "none"):
        raise ValueError(f"pruning_method {config.pruning_method!r} is not served by vLLM. Served: 'vlm_pruner', 'none'.")
    if getattr(config.vision_config, "model_type", None) == "pixtral":
        raise ValueError("LLaVA with a Pixtral vision tower is not served by vLLM: each picture has rows of its own.")
    config.pruning_settings()
    if config.pruning_positions != "original":
        raise ValueError(
            f"pruning_positions={config.pruning_positions!r} is not served by vLLM, which counts a whole request's tokens. "
            "Set it to 'original'."
        )
    if not getattr(config.pruning_parameters(), "fill_budget", True):
        raise ValueError(
            "pruning_fill_budget=False is not served by vLLM: memory for the kept tokens is reserved before it is known how "
            "many they would be. Set it to true."
        )


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise a ValueError that names the first setting with which a pruned model can not run."""
    model, parallel, scheduler = vllm_config.model_config, vllm_config.parallel_config, vllm_config.scheduler_config
    multimodal, cache = model.multimodal_config, vllm_config.cache_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "an encoder cache connector": vllm_config.ec_transfer_config is not None,
        "fast prefill by KV sharing": cache.kv_sharing_fast_prefill,
        "a runner other than 'generate'": model.runner_type != "generate",
        "prompt embeddings": model.enable_prompt_embeds,
        "image embeddings in place of pixels": multimodal is not None and multimodal.enable_mm_embeds,
        "vLLM's own pruning of videos": multimodal is not None and bool(multimodal.video_pruning_rate),
        "a scheduler class of your own": scheduler.scheduler_cls is not None,
        "a worker class of your own": parallel.worker_cls != "auto",
        "a disabled hybrid KV cache manager": bool(scheduler.disable_hybrid_kv_cache_manager),
        f"{RUNNER_VERSION}=1": os.environ.get(RUNNER_VERSION) == "1",
    }
    for setting, is_on in refused.items():
        if is_on:
            raise ValueError(
                f"VLM-Pruner does not support {setting} in vLLM. Leave it off, or serve the base model, which is not pruned."
            )


def switch_off_prefix_caching(vllm_config: VllmConfig) -> None:
    """A cached block of a pruned layer would have to be found by the picture and by all that decides what was kept of it."""
    if vllm_config.cache_config.enable_prefix_caching:
        logger.info("Prefix caching is switched off: VLM-Pruner does not support it.")
    vllm_config.cache_config.enable_prefix_caching = False


def limit_cuda_graphs(vllm_config: VllmConfig) -> None:
    """Attention stays outside of CUDA graphs: the pruned layers' lengths are tensors of their own each step."""
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        logger.info("CUDA graphs are piecewise: VLM-Pruner does not support full ones.")
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
