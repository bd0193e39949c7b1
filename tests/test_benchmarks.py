"""The benchmarks: theory against numbers worked out by hand and against real caches, and what they print, on shrunk models."""

# ruff: noqa: E402 - the benchmarks are scripts in a folder of their own, which has to be on the path first

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, DynamicCache
from transformers.models.qwen3_5 import modeling_qwen3_5


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decode
import gpu
import measurement
import prefill
import selection
import serving
from geometries import (
    GEOMETRIES,
    DecoderSizes,
    Geometry,
    LayerSizes,
    LinearAttention,
    Request,
    Theory,
    make_inputs,
    make_models,
    why_not_measured,
)
from measurement import fixed_features

from vlmpruner.pruned_cache import CACHE_NAME, cache_of


SMALL_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 1200,
}
SMALL_CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VISION = {
    "llava": SMALL_CLIP,
    "llava_next": SMALL_CLIP,
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}


def shrunk(name: str, num_layers: int = 4, **changes) -> Geometry:
    """A model with the pictures and the tokens of the real one, but narrow and shallow."""
    geometry = GEOMETRIES[name]
    text, vision = geometry.config["text_config"], geometry.config["vision_config"]
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    small_text = text | SMALL_TEXT | {"num_key_value_heads": 2 if grouped else 4, "num_hidden_layers": num_layers}
    ids = {"image_token_index": 1100}
    if "rope_parameters" in text:
        small_text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        small_text |= {"bos_token_id": 1, "eos_token_id": 2}
        ids = {"image_token_id": 1100, "video_token_id": 1101, "vision_start_token_id": 1102, "vision_end_token_id": 1103}
    config = geometry.config | ids | {"text_config": small_text, "vision_config": vision | SMALL_VISION[geometry.base]}
    return replace(geometry, config=config, **changes)


def tiny(num_layers: int = 4) -> Geometry:
    return shrunk("0.5b", num_layers, picture=(140, 168), grids=((5, 6),))


def run_main(module, monkeypatch, capsys, *arguments, num_layers: int = 4) -> tuple[str, dict]:
    """What a benchmark prints, and its last line as JSON. `0.5b` is tiny here."""
    monkeypatch.setitem(GEOMETRIES, "0.5b", tiny(num_layers))
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


# Theory


def test_multiplications_of_a_layer_by_hand():
    sizes = {"hidden": 2, "query": 2, "key_value": 1}
    # 10 tokens: queries 40, keys 20, values 20, output 40, scores and their sums over values 200 each, gated MLP 3 x 60
    assert LayerSizes(**sizes, intermediate=3).multiplications(10) == 40 + 20 + 20 + 40 + 200 + 200 + 180
    # 5 experts, of which 2 work on a token and 1 more on each: router 100, experts 3 x 10 x 2 x 2 x 7, shared one 3 x 60
    experts = LayerSizes(**sizes, intermediate=3, experts=5, expert=7, chosen=2, routing=5)
    assert experts.multiplications(10) == 40 + 20 + 20 + 40 + 200 + 200 + 100 + 840 + 180
    assert experts.weights(5) == 4 + 2 + 2 + 4 + 10 + 3 * 2 * 7 * 5 + 18
    assert experts.experts_read(1) == pytest.approx(2) and experts.experts_read(2) == pytest.approx(3.2)
    # A head of keys of 3, two of values of 5: queries and keys 2 x 2 x 3, values, their gate and the output 3 x 2 x 10, decay
    # and step 2 x 2 x 2, convolution 4 x 16; then four products for each of 2 x 15 entries of the states
    linear = LinearAttention(key=3, value_heads=2, key_dim=3, value_dim=5, kernel=4)
    layer = LayerSizes(hidden=2, query=0, key_value=0, intermediate=3, linear=linear)
    assert layer.multiplications(10) == 10 * (12 + 60 + 8 + 64 + 18 + 4 * 30)
    assert layer.multiplications(20) == 2 * layer.multiplications(10)


def test_multiplications_are_the_papers_formula():
    n, d, m = 636, 4096, 11008
    first, *_ = DecoderSizes.of(GEOMETRIES["llava-1.5-7b"]).layers
    assert first.multiplications(n) == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    n, d, m, d_kv = 1470, 3584, 18944, 512
    first, *_ = DecoderSizes.of(GEOMETRIES["qwen2-vl-7b"]).layers
    assert first.multiplications(n) == 2 * n * d**2 + 2 * n * d * d_kv + 2 * n**2 * d + 3 * n * d * m


@pytest.mark.parametrize(
    ("name", "num_newlines", "ideal"),
    [
        ("llava-1.5-7b", 0, 4.1),
        ("llava-1.5-13b", 0, 4.3),
        ("qwen2-vl-7b", 0, 4.9),
        ("llava-next-7b", 0, 5.8),
        ("llava-next-7b", 48, 5.4),  # the newlines of 48 rows stay, which the 5.8 above does not count
    ],
)
def test_ideal_ratios(name, num_newlines, ideal):
    geometry = replace(GEOMETRIES[name], num_newlines=num_newlines)
    assert round(Theory.of(Request(geometry), torch.bfloat16, bandwidth=1.0).ideal, 1) == ideal


def test_bytes_and_floors_by_hand():
    theory = Theory.of(Request(GEOMETRIES["llava-1.5-7b"], batch=8), torch.bfloat16, bandwidth=2e12)
    assert (theory.tokens, theory.pruned_tokens) == (636, 124)
    assert theory.weight_bytes == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)
    assert theory.kv_bytes == 2 * 2 * 8 * 4096 * 32 * 636
    assert theory.pruned_kv_bytes == 2 * 2 * 8 * 4096 * (2 * 636 + 30 * 124)
    assert theory.prefill_floor_s == theory.weight_bytes / 2e12
    assert theory.pruned_decode_floor_s == (theory.weight_bytes + theory.pruned_kv_bytes) / 2e12


# What is public of each: weights of the language model in billions, and of those the ones that work on a token.
BILLIONS = {
    "qwen3-vl-30b-a3b": (30.5, 3.3),
    "qwen3.5-9b": (9.0, 9.0),
    "internvl3.5-8b": (8.2, 8.2),
    "glm-4.1v-9b": (9.4, 9.4),
    "glm-4.5v": (106, 12),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_the_sizes_make_the_models_that_they_are_named_after(name):
    """Within 3 percent of what is published, where some count embeddings and the head and some do not."""
    sizes = DecoderSizes.of(GEOMETRIES[name])
    embeddings = 2 * sizes.vocabulary * sizes.hidden
    for of, published in zip(("experts", "chosen"), BILLIONS[name], strict=True):
        layers = sum(layer.weights(getattr(layer, of)) for layer in sizes.layers)
        assert 0.97 * layers <= 1e9 * published <= 1.03 * (layers + embeddings)


# Narrow decoders of the kinds that the theory tells apart.
SMALL_KINDS = {
    "qwen3-vl-30b-a3b": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 2},
    "glm-4.5v": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
    },
    "glm-4.1v-9b": {"num_hidden_layers": 2},
    "internvl3.5-8b": {"num_hidden_layers": 2},
    "qwen3.5-9b": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
    },
}


def narrow(name: str) -> Geometry:
    geometry, text = GEOMETRIES[name], GEOMETRIES[name].config["text_config"]
    small = text | SMALL_TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2} | SMALL_KINDS[name]
    if "rope_parameters" in text:
        share = text["rope_parameters"].get("partial_rotary_factor", 1)
        sections = {1: [2, 3, 3], 0.5: [2, 1, 1], 0.25: [1, 1, 0]}[share]
        small["rope_parameters"] = text["rope_parameters"] | {"mrope_section": sections}
    return replace(geometry, config=geometry.config | {"text_config": small}, grids=((3, 4),))


class CountStateProducts(TorchDispatchMode):
    """Counts products that have an entry for each of `entries` of a state."""

    def __init__(self, entries: int):
        super().__init__()
        self.entries, self.count = entries, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_) and result.numel() == self.entries:
            self.count += result.numel()
        return result


@pytest.mark.once
@pytest.mark.parametrize("name", SMALL_KINDS)
@torch.no_grad()
def test_theory_counts_what_the_stock_decoder_multiplies_reads_and_keeps(name, monkeypatch):
    """Matrix products and convolutions by torch's own counter; products of the recurrence, step by step, one by one."""
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", modeling_qwen3_5.torch_recurrent_gated_delta_rule)
    geometry, dtype = narrow(name), torch.float32
    sizes, config = DecoderSizes.of(geometry), geometry.text_config
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModel.from_config(config, dtype=dtype).eval()
    request = Request(geometry, text=6, ratio=0.0, layer=1)
    theory, hidden = Theory.of(request, dtype, bandwidth=1.0), torch.randn(1, request.tokens(), config.hidden_size)
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim > 1 and "embed_tokens" not in name]
    assert theory.weight_bytes == sum(weight.nbytes for weight in matrices) + 4 * sizes.hidden * sizes.vocabulary

    cache, linear = DynamicCache(config=config), [layer.linear for layer in sizes.layers if layer.linear]
    entries = linear[0].value_heads * linear[0].key_dim * linear[0].value_dim if linear else 1
    with FlopCounterMode(display=False) as flops, CountStateProducts(entries) as products:
        model(inputs_embeds=hidden, use_cache=True, **{CACHE_NAME: cache})
    by_module = flops.get_flop_counts().items()
    in_layers = sum(sum(counts.values()) for module, counts in by_module if re.fullmatch(r"\w+\.layers\.\d+", module))
    counted = in_layers // 2 + (products.count if linear else 0)
    padding = sum(layer.kernel * layer.convolved * (layer.kernel - 1) for layer in linear)  # places before the first token
    assert counted == padding + sum(layer.multiplications(request.tokens()) for layer in sizes.layers)
    keys_and_values = [part for layer in cache.layers if hasattr(layer, "keys") for part in (layer.keys, layer.values)]
    states = [
        state
        for layer in cache.layers
        if hasattr(layer, "conv_states")
        for state in (layer.conv_states[0], layer.recurrent_states[0])
    ]
    assert theory.kv_bytes == sum(part.nbytes for part in keys_and_values)
    assert theory.state_bytes == sum(state.nbytes for state in states)


NARROW_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
GLM_IDS = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id", "video_start_token_id")
QWEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in SMALL_KINDS if name.startswith(("qwen3-vl", "glm"))])
def test_caches_of_models_with_experts_and_of_glm_are_as_the_theory_says(name):
    geometry = GEOMETRIES[name]
    if (reason := why_not_measured(geometry)) is not None:
        pytest.skip(reason)
    tower = geometry.config["vision_config"] | NARROW_TOWER
    parts = {"text_config": narrow(name).config["text_config"] | {"num_hidden_layers": 4}, "vision_config": tower}
    if "deepstack_visual_indexes" in tower:
        tower["deepstack_visual_indexes"] = [0, 1]
    ids = QWEN_IDS if name.startswith("qwen") else (*GLM_IDS, "video_end_token_id")
    request = Request(replace(geometry, config=geometry.config | parts | {key: 1100 + place for place, key in enumerate(ids)}))
    models = make_models(request.geometry, "cpu", torch.float32, pruning_ratio=request.ratio)
    inputs = make_inputs(request, models["pruned"].config, "cpu", torch.float32)
    theory = Theory.of(request, torch.float32, bandwidth=1.0)
    found = {model: prefill.cache_bytes(cache_of(prefill.prefill(models[model], inputs))) for model in models}
    assert found == {"unpruned": theory.kv_bytes, "pruned": theory.pruned_kv_bytes}


def test_a_model_that_can_not_be_pruned_has_a_theory_alone(monkeypatch, capsys):
    monkeypatch.setitem(GEOMETRIES, "0.5b", replace(tiny(), base="internvl", config=narrow("internvl3.5-8b").config))
    monkeypatch.setattr("geometries.CONFIG_OF_BASE_MODEL", {"llava": None})
    assert why_not_measured(GEOMETRIES["llava-1.5-7b"]) is None
    monkeypatch.setattr(sys, "argv", ["prefill.py", "--repeats", "1"])
    prefill.main()
    printed = capsys.readouterr().out
    assert "ideal ratio" in printed
    assert "0.5b is not measured: no class prunes models of type 'internvl' here, only llava." in printed


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name not in ("llava-1.5-13b", *SMALL_KINDS)])
def test_theory_counts_the_bytes_of_real_caches_and_weights(name):
    request = Request(shrunk(name))
    models = make_models(request.geometry, "cpu", torch.float32, pruning_ratio=request.ratio)
    inputs = make_inputs(request, models["pruned"].config, "cpu", torch.float32)
    theory = Theory.of(request, torch.float32, bandwidth=1.0)
    found = {model: prefill.cache_bytes(cache_of(prefill.prefill(models[model], inputs))) for model in models}
    assert found == {"unpruned": theory.kv_bytes, "pruned": theory.pruned_kv_bytes}
    matrices = [*models["pruned"].model.language_model.layers.parameters(), models["pruned"].lm_head.weight]
    assert theory.weight_bytes == sum(weight.nbytes for weight in matrices if weight.ndim == 2)
    calls = prefill.decoder_calls(models["unpruned"], 2, {"full": theory.tokens, "short": theory.pruned_tokens})
    shapes = {name: tuple(call().last_hidden_state.shape) for name, call in calls.items()}
    assert shapes == {"full": (2, theory.tokens, 64), "short": (2, theory.pruned_tokens, 64)}


def test_reachable_ratio_by_hand(monkeypatch, capsys):
    assert prefill.reachable_ratio(full=8.0, short=1.0, pruned_layers=0.75) == 8.0 / (2.0 + 0.75)
    seconds = {"unpruned": 9.0, "pruned": 3.0, "full": 8.0, "short": 1.0}
    monkeypatch.setattr(prefill, "interleaved_medians", lambda calls, *_: {name: seconds[name] for name in calls})
    printed, result = run_main(prefill, monkeypatch, capsys, "--repeats", 1, "--attention", "sdpa", num_layers=8)
    assert result["runs"][0]["rows"][1]["reachable"] == 8.0 / (2.0 + 0.75)  # from layer 2 of 8 on
    assert "| 3.00 | 2.91 |" in printed


def test_both_models_have_the_same_weights():
    models = make_models(tiny(), "cpu", torch.float32, pruning_ratio=0.889)
    unpruned, pruned = (dict(model.named_parameters(remove_duplicate=False)) for model in models.values())
    assert type(models["unpruned"]).__module__.startswith("transformers.")
    assert unpruned.keys() == pruned.keys()
    assert all(unpruned[name].data_ptr() == pruned[name].data_ptr() for name in unpruned)


# What is printed


def test_prefill(monkeypatch, capsys, tmp_path):
    printed, result = run_main(prefill, monkeypatch, capsys, "--repeats", 2, "--output", tmp_path)
    assert printed.index("theory: ") < printed.index("| attention |")
    assert "medians of 2, fewer than the 20 that a result needs" in printed
    (run,) = result["runs"]
    assert [(row["attention"], row["model"]) for row in run["rows"]] == [
        ("eager", "unpruned"),
        ("eager", "pruned"),
        ("sdpa", "unpruned"),
        ("sdpa", "pruned"),
    ]
    assert "FlashAttention2" in run["refused"]["flash_attention_2"]
    assert f"flash_attention_2 is not in the table: {run['refused']['flash_attention_2']}" in printed
    for row in run["rows"]:
        assert row["kv_bytes"] == run["theory"]["kv_bytes" if row["model"] == "unpruned" else "pruned_kv_bytes"]
        assert row["peak_bytes"] is None
        assert min(row["tower_s"], row["prefill_s"], row["decode_s"]) > 0
        for of_pruned in ("selection_s", "of_ideal", "reachable"):
            assert (row[of_pruned] is not None) == (row["model"] == "pruned")
    (path,) = tmp_path.iterdir()
    assert path.name == f"prefill_0.5b_{measurement.hardware_slug(result)}.json"
    assert json.loads(path.read_text()) == result


def test_decoding_is_not_compiled_again_after_warming_up(monkeypatch, capsys):
    """With the backend that only traces: what makes torch compile again is the same for all backends."""
    printed, result = run_main(decode, monkeypatch, capsys, "--repeats", 4, "--images", 1, 2, "--compile-backend", "eager")
    torch._dynamo.reset()
    assert [run["images"] for run in result["runs"]] == [1, 2]
    for run in result["runs"]:
        dynamic, static = run["rows"]
        assert (dynamic["cache"], dynamic["recompilations"]) == ("dynamic", None)
        assert (static["cache"], static["recompilations"]) == ("static", 0)
    assert "| static, compiled |" in printed


def test_selection(monkeypatch, capsys):
    arguments = "--tokens", 20, "--images", 1, 2, "--dtype", "float32", "--repeats", 1
    printed, result = run_main(selection, monkeypatch, capsys, *arguments)
    assert [(row["images"], row["token_batch"], row["kept"]) for row in result["rows"]] == [
        (1, 16, 2),
        (1, 1, 2),
        (2, 16, 2),
        (2, 1, 2),
    ]
    assert "| tokens | kept |" in printed


@pytest.mark.parametrize("module", [prefill, decode, selection, serving], ids=lambda module: module.__name__)
def test_a_result_is_plotted_later(module, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    row = {"attention": "sdpa", "model": "pruned", "cache": "static", "ratio": 0.9, "tower_s": 1, "prefill_s": 2}
    row |= {"selection_s": None, "images": 1, "tokens": 9, "dtype": "float32", "token_batch": 1, "total_s": 1}
    row |= {"clients": 1, "server": "pruned", "requests_per_s": 1}
    run = {"model": "0.5b", "batch": 1, "theory": {"tokens": 9}, "rows": [row]}
    result = measurement.environment("cpu") | {"repeats": 20, "runs": [run], "rows": [row]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    arguments = "--input", tmp_path / "result.json", "--plot", tmp_path / "plot.png"
    assert run_main(module, monkeypatch, capsys, *arguments)[1] == result
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"--plot needs matplotlib.*--input"):
        module.main()


WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = ("torchvision", "matplotlib")
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest))
sys.path.insert(0, "tests")
import test_benchmarks, geometries, decode, prefill
geometries.GEOMETRIES["0.5b"] = test_benchmarks.tiny()
sys.argv = ["prefill.py", "--repeats", "1", "--attention", "sdpa"]
prefill.main()
"""


@pytest.mark.once
def test_no_more_is_needed_than_a_gpu_machine_has():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["runs"][0]["rows"]) == 2


# Serving with vLLM: what can be tried without it


def test_requests_that_fit_by_hand():
    # LLaVA-1.5-7B with 4 tokens of answer: 640 tokens are 20 blocks of 32, the 128 that stay are 4; 16 groups of 2 layers
    request = Request(GEOMETRIES["llava-1.5-7b"])
    assert serving.blocks_of_request(640, 128, groups=16, block_size=32) == 20 + 15 * 4
    for server, blocks, fit in (("pruned", 80, 3), ("unpruned", 16 * 20, 3), ("stock", 20, 3)):
        assert serving.requests_that_fit(server, request, 4, 1 + fit * blocks, 32) == fit
        assert serving.requests_that_fit(server, request, 4, fit * blocks, 32) == fit - 1


def test_a_cache_for_so_many_requests_holds_them():
    # 636 tokens and 4 of answer are 5 blocks of 128, so 3 requests and vLLM's block are 16; 4096 keys and values, 32 layers
    request = Request(GEOMETRIES["llava-1.5-7b"])
    assert serving.cache_bytes_for(3, request, 4, torch.bfloat16) == 2 * 2 * 4096 * 32 * 16 * 128
    assert serving.requests_that_fit("stock", request, 4, 16, 128) == 3


def test_a_row_of_the_serving_table_by_hand():
    bursts = [
        serving.Burst(4.0, [1.0, 2.0], [70, 72], [10, 10], in_use=0.25, preempted=1, others=0.5),
        serving.Burst(1.0, [3.0, 9.0], [70, 72], [10, 15], in_use=0.5, preempted=2, others=1.0),
    ]
    row = serving.summary(bursts)
    assert row == {
        "requests": 4,
        "requests_per_s": 4 / 5,
        "tokens_per_s": 45 / 5,
        "ttft_median_s": 2.5,
        "ttft_p99_s": 9.0,
        "prompt_tokens": 71,
        "cache_in_use": 0.5,
        "preempted": 3,
        "others_cpu": 3 / 5,
    }
    assert serving.percentile(range(1, 101), 99) == 99
    unpruned, pruned = {"clients": 8, "server": "unpruned"} | row, {"clients": 8, "server": "pruned"} | row
    rows = serving.compare([unpruned, pruned | {"requests_per_s": 2.0}, unpruned | {"clients": 1, "requests_per_s": 0.1}])
    assert [row["times_more"] for row in rows] == [1, 2.5, 1]
    table = serving.shown(rows[1] | {"fit": 17})
    assert (table["times"], table["fit"], table["cache"], table["TTFT 99 % s"]) == ("2.50", 17, "50.0 %", "9")


METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage.
vllm:kv_cache_usage_perc{engine="0",model_name="repo"} 0.245
vllm:num_preemptions_total{engine="0",model_name="repo"} 3.0
vllm:cache_config_info{block_size="128",enable_prefix_caching="False",num_gpu_blocks="588"} 1.0
"""


def test_metrics_of_a_server():
    assert serving.gauge(METRICS, "kv_cache_usage_perc") == 0.245
    assert serving.gauge(METRICS, "num_preemptions_total") == 3
    assert serving.cache_blocks(METRICS) == (588, 128)
    with pytest.raises(RuntimeError, match="no vllm:num_requests_running"):
        serving.gauge(METRICS, "num_requests_running")


def test_options_of_the_servers(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["serving.py", "--model", "llava-1.5-7b", "--servers", "unpruned", "pruned", "stock", "--", "-x"]
    )
    parsed = []
    monkeypatch.setattr(serving, "run", lambda arguments, *_: parsed.append(arguments))
    serving.main()
    request = Request(GEOMETRIES["llava-1.5-7b"])
    options = {server: serving.server_options(server, request, 5, parsed[0]) for server in serving.SERVERS}
    assert "--hf-overrides" not in options["pruned"] and options["pruned"][-1] == "-x"
    overrides = {
        name: json.loads(given[given.index("--hf-overrides") + 1]) for name, given in options.items() if name != "pruned"
    }
    assert overrides == {"unpruned": {"pruning_ratio": 0.0}, "stock": {"architectures": ["LlavaForConditionalGeneration"]}}


def test_a_server_that_does_not_start_says_why_and_is_gone(monkeypatch, tmp_path):
    started, log = [], tmp_path / "log"
    popen = subprocess.Popen
    script = "print('no such model', flush=True); raise SystemExit(1)"

    def fake(command, **options):
        started.append(popen([sys.executable, "-S", "-c", script], **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", fake)
    with pytest.raises(RuntimeError, match=r"did not start(.|\n)*no such model"), serving.serving(tmp_path, [], log):
        pass
    assert started[0].poll() is not None


def test_a_server_ends_with_an_error_in_the_benchmark(monkeypatch, tmp_path):
    started, popen = [], subprocess.Popen

    def fake(command, **options):
        started.append(popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", fake)
    monkeypatch.setattr(serving, "wait_for", lambda *_: None)
    with pytest.raises(KeyError), serving.serving(tmp_path, [], tmp_path / "log"):
        raise KeyError
    assert started[0].poll() is not None


# One command for a GPU machine


def test_the_gpu_command_says_where_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part != "tests"])
def test_the_parts_of_the_gpu_command_are_legal(part, monkeypatch):
    script, *options = gpu.PARTS[part]
    module = {"selection": selection, "prefill": prefill, "decode": decode}[Path(script).stem]
    parsed = []
    monkeypatch.setattr(module, "run", lambda arguments, *_: parsed.append(arguments))
    monkeypatch.setattr(sys, "argv", [script, *options, "--output", "x.json"])
    module.main()
    assert (ROOT / script).exists() and parsed[0].output == Path("x.json")


def test_the_gpu_command_runs_what_is_not_there_yet(monkeypatch, capsys, tmp_path):
    commands = []

    def fake_run(command, **options):
        commands.append(command)
        assert (Path(options["env"]["PYTHONPATH"].split(":")[0]) / "vlmpruner" / "pruned_model.py").exists()
        if "benchmarks/selection.py" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: {"hardware": "NVIDIA H200", "device": device})
    monkeypatch.setattr(subprocess, "run", fake_run)
    (tmp_path / "prefill_qwen2-vl-7b_nvidia_h200.json").write_text("{}")
    parts = "tests", "selection", "prefill_qwen2-vl-7b", "prefill_qwen3-vl-4b"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "9", "--output", str(tmp_path), "--parts", *parts])
    assert gpu.main() == 1
    assert [command[1] for command in commands] == ["-m", "benchmarks/selection.py", "benchmarks/prefill.py"]
    assert commands[2][-1] == str(tmp_path / "prefill_qwen3-vl-4b_nvidia_h200.json")
    printed = capsys.readouterr().out
    assert "selection: stopped after" in printed
    assert "prefill_qwen2-vl-7b: prefill_qwen2-vl-7b_nvidia_h200.json is there already" in printed
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "0.1", "--output", str(tmp_path), "--parts", parts[-1]])
    assert gpu.main() == 1
    assert "not started, no time left" in capsys.readouterr().out


# Operations of a decoded token, which show a slower one without a clock


class CountOperations(TorchDispatchMode):
    """A streamer that notes how many operations torch has run when each token comes."""

    def __init__(self):
        super().__init__()
        self.count, self.counts = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))

    def put(self, tokens):
        self.counts.append(self.count)

    def end(self):
        pass


def operations_of_a_token(model, inputs: dict, **options) -> int:
    with CountOperations() as operations, fixed_features(model, inputs):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, streamer=operations, **options)
    return operations.counts[-1] - operations.counts[-2]


def operations_added(name: str, num_layers: int, padding: int, attention: str = "sdpa", **options) -> int:
    """How many more operations the pruned model runs for a token than the stock one."""
    request = Request(shrunk(name, num_layers), batch=2)
    models = make_models(request.geometry, "cpu", torch.float32, pruning_ratio=request.ratio)
    for model in models.values():
        model.set_attn_implementation(attention)
    inputs = make_inputs(request, models["pruned"].config, "cpu", torch.float32)
    inputs["attention_mask"][0, :padding] = 0
    counts = {model: operations_of_a_token(models[model], inputs, **options) for model in models}
    return counts["pruned"] - counts["unpruned"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2-vl-7b", "qwen3-vl-4b"])
def test_a_decoded_token_costs_no_operation_more(name, attention):
    # `generate` of 5.17 hands a mask of ones to every step. It is looked at to find that none is needed; for eager attention
    # the stock model makes one of it all the same, and the pruned one a second.
    of_5_17 = {"sdpa": 7, "eager": 31}[attention]
    assert operations_added(name, 4, padding=0, attention=attention) <= (
        of_5_17 if transformers.__version__.startswith("5.17.") else 0
    )


@pytest.mark.parametrize("num_layers", [4, 6])
@pytest.mark.parametrize(("padding", "cache"), [(3, None), (0, "static"), (3, "static")])
def test_a_decoded_token_costs_at_most_one_mask_more(padding, cache, num_layers):
    """Where the stock model makes a mask, the pruned one makes a second, shorter one: once a token, not once a layer."""
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    assert 0 < operations_added("llava-1.5-7b", num_layers, padding, **options) <= 31
