"""What is refused by name before a model is loaded, and what the cache groups save. No engine is started."""

import importlib
import tomllib
from dataclasses import replace

import pytest
import torch
from transformers import PixtralVisionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.request import Request

import vlmpruner_vllm
from export import export_model
from tests.vllm_plugin.serving import ROOT
from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL, VLMPrunerLlavaConfig, VLMPrunerLlavaOnevisionConfig
from vlmpruner.token_pruning import num_tokens_to_keep
from vlmpruner_vllm import FIRST_UNSUPPORTED_VLLM, OLDEST_VLLM, check_vllm_version
from vlmpruner_vllm.engine import check_model
from vlmpruner_vllm.families import FAMILIES, family_of
from vlmpruner_vllm.kv_cache import DecoderLayerSpec, KeptTokensManager, check_groups
from vlmpruner_vllm.requests import PrunedGrid, PrunedMedium, RequestPruning


def engine_config(**settings):
    return EngineArgs(model=str(ROOT), trust_remote_code=True, max_model_len=2048, **settings).create_engine_config()


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"enable_lora": True}, "LoRA"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "a KV connector"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"enable_mm_embeds": True}, "image embeddings in place of pixels"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "a scheduler class of your own"),
        ({"disable_hybrid_kv_cache_manager": True}, "a disabled hybrid KV cache manager"),
        ({"hf_overrides": {"pruning_fill_budget": False}}, "pruning_fill_budget=False is not served"),
        ({"hf_overrides": {"pruning_positions": "packed"}}, "pruning_positions='packed' is not served"),
        ({"hf_overrides": {"pruning_method": "fastv"}}, "pruning_method 'fastv' is not served"),
        ({"hf_overrides": {"pruning_method": "random"}}, "pruning_method 'random' is not served"),
        ({"hf_overrides": {"pruning_layer": 6}}, "pruning_layer must be an integer from 1 to 5"),
        ({"hf_overrides": {"pruning_ratio": 1.5}}, "pruning_ratio must be a number"),
    ],
)
def test_what_does_not_work_is_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        engine_config(**settings)


def test_prefix_caching_is_off_and_the_rest_is_set():
    config = engine_config(enable_prefix_caching=True)
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.disable_chunked_mm_input
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is False
    assert not config.compilation_config.cudagraph_mode.has_full_cudagraphs()


def test_a_family_that_is_not_there_is_refused_by_name():
    class Config:
        architectures = ["VLMPrunerGlm4vForConditionalGeneration"]

    with pytest.raises(ValueError, match=r"does not serve 'VLMPrunerGlm4vFor.*'\. It serves: VLMPrunerLlava"):
        family_of(Config)


def test_videos_that_vllm_has_no_class_for_are_refused_by_name():
    config = VLMPrunerLlavaOnevisionConfig(architectures=["VLMPrunerLlavaOnevisionForConditionalGeneration"])
    assert family_of(config) is FAMILIES[config.architectures[0]]
    config.newline_position = "grid"
    with pytest.raises(ValueError, match=r"no model with newline_position='grid', spatial_pool_mode='bilinear'"):
        family_of(config)


def test_families_that_it_does_not_serve_are_refused_by_name(tmp_path):
    """vLLM asks our class in transformers whether its own backend may run it, and that asks the plugin."""
    not_served = {
        base: config.auto_map_targets["AutoModelForImageTextToText"].split(".")
        for base, config in CONFIG_OF_BASE_MODEL.items()
        if config.auto_map_targets["AutoModelForImageTextToText"].split(".")[1] not in FAMILIES
    }
    for module, name in not_served.values():
        with pytest.raises(ValueError, match=f"does not serve '{name}'. It serves: VLMPrunerLlava"):
            getattr(importlib.import_module(f"vlmpruner.{module}"), name).is_backend_compatible()
    base = next(iter(not_served))
    repo = export_model(ROOT / "tests/data/checkpoints" / base, tmp_path / "pruned", report=lambda line: None)
    with pytest.raises(ValueError, match=f"does not serve '{not_served[base][1]}'"):
        EngineArgs(model=str(repo), trust_remote_code=True).create_engine_config()


def test_a_pixtral_tower_is_refused_by_name():
    config = VLMPrunerLlavaConfig(vision_config=PixtralVisionConfig(), architectures=["VLMPrunerLlavaForConditionalGeneration"])
    with pytest.raises(ValueError, match="Pixtral vision tower is not served"):
        check_model(config)


def test_without_the_plugin_the_sentence_says_to_install_it(monkeypatch):
    """vLLM then asks our class in transformers whether its own backend may run it."""
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in FAMILIES:
        monkeypatch.delitem(ModelRegistry.models, architecture)
    with pytest.raises(ValueError, match=r'would run unpruned in this engine.*pip install "vlmpruner\[vllm\]"'):
        engine_config()


def test_the_range_of_versions_is_checked(monkeypatch):
    check_vllm_version()
    for found in ("0.31.9", "0.33.0"):
        monkeypatch.setattr(vlmpruner_vllm, "version", lambda name, found=found: found)
        with pytest.raises(ImportError, match=rf"needs vllm>=0.32,<0.33, but vllm {found} is installed"):
            check_vllm_version()
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    assert stated == [f"vllm>={OLDEST_VLLM},<{FIRST_UNSUPPORTED_VLLM}"]
    assert f"vllm>={OLDEST_VLLM},<{FIRST_UNSUPPORTED_VLLM}" in (ROOT / "docs/serving.md").read_text()


LLAVA_7B = {"block_size": 16, "num_kv_heads": 32, "head_size": 128, "dtype": torch.bfloat16}


def specs_of_7b(is_pruned) -> dict:
    return {f"layers.{layer}": DecoderLayerSpec(**LLAVA_7B, is_pruned=is_pruned(layer)) for layer in range(32)}


def num_requests_that_fit(specs: dict, layout: str, num_dropped: int, num_tokens: int, memory: int) -> tuple[int, list]:
    """How many requests of `num_tokens`, whose picture ends at 590 and loses `num_dropped`, the block managers take."""
    config = engine_config()
    config.cache_config.kv_cache_layout = layout
    (cache,) = get_kv_cache_configs(config, [specs], [memory])
    manager = KVCacheManager(cache, 2048, scheduler_block_size=16, hash_block_size=16, enable_caching=False)
    pruning = {}
    for group in manager.coordinator.single_type_managers:
        group.pruning = pruning
    for number in range(10_000):
        request = Request(str(number), [5] * num_tokens, SamplingParams(max_tokens=1), None)
        grid = PrunedGrid("image", 0, (24, 24), torch.arange(14, 590), 576 - num_dropped, keeps_last=False)
        pruning[request.request_id] = RequestPruning((PrunedMedium(14, 590, (grid,)),))
        if manager.allocate_slots(request, num_tokens) is None:
            return number, cache.kv_cache_groups
    raise AssertionError("the cache has no end")


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLNHC"])  # of the CPU's attention, of others, of packed groups
def test_llava_7b_takes_three_times_as_many_requests(layout, capsys):
    """LLaVA-1.5-7B's geometry at 88.9 %, with 64 tokens of text: a prompt and a short answer. In 8 GiB of bfloat16."""
    num_tokens, memory = 640, 8 << 30
    num_dropped = 576 - num_tokens_to_keep(576, 0.889)
    unpruned, _ = num_requests_that_fit(specs_of_7b(lambda layer: False), layout, 0, num_tokens, memory)
    pruned, groups = num_requests_that_fit(specs_of_7b(lambda layer: layer >= 2), layout, num_dropped, num_tokens, memory)
    check_groups(groups)
    theory = 32 * num_tokens / (2 * num_tokens + 30 * (num_tokens - num_dropped))
    with capsys.disabled():
        print(f"\nLLaVA-1.5-7B, 8 GiB: {pruned} requests pruned, {unpruned} unpruned: {pruned / unpruned:.2f} of {theory:.2f}")
    assert pruned / unpruned >= 3 and abs(pruned / unpruned / theory - 1) < 0.05


def test_groups_that_do_not_save_stop_the_start():
    spec = DecoderLayerSpec(**LLAVA_7B, is_pruned=True)
    stock = FullAttentionSpec(**LLAVA_7B)
    below = replace(spec, is_pruned=False)
    check_groups([KVCacheGroupSpec(["0"], below), KVCacheGroupSpec(["1"], spec)])
    for merged in ([spec], [below], [stock], [below, spec, stock]):
        with pytest.raises(RuntimeError, match="must be groups apart"):
            check_groups([KVCacheGroupSpec(["0"], one) for one in merged])
    with pytest.raises(AssertionError):
        DecoderLayerSpec.merge([below, spec])
    assert not spec.is_uniform_with_collection({"0": below, "1": spec})


def test_a_manager_counts_what_a_layer_holds():
    grid = PrunedGrid("image", 0, (2, 5), torch.arange(4, 14), num_keep=3, keeps_last=False)
    manager = object.__new__(KeptTokensManager)
    manager.pruning = {"a": RequestPruning((PrunedMedium(4, 14, (grid,)),)), "b": RequestPruning()}
    manager.kv_cache_spec = DecoderLayerSpec(**LLAVA_7B, is_pruned=True)
    assert [manager.num_held("a", length) for length in (4, 13, 14, 20)] == [4, 13, 7, 13]
    assert manager.num_held("b", 20) == 20
    manager.kv_cache_spec = replace(manager.kv_cache_spec, is_pruned=False)
    assert manager.num_held("a", 20) == 20
