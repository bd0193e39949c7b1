"""The whole path against logits that the authors' own model produced (tests/data/golden/e2e_*.safetensors)."""

import json

import pytest
import torch
from families import DATA
from safetensors import safe_open
from test_device_selection import select_in_torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmpruner.configuration_vlmpruner import VLMPrunerLlavaConfig, VLMPrunerQwen2VLConfig
from vlmpruner.method_vlm_pruner import VLMPruner
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaForConditionalGeneration
from vlmpruner.modeling_vlmpruner_qwen2vl import VLMPrunerQwen2VLForConditionalGeneration
from vlmpruner.pruned_cache import CACHE_NAME, cache_of
from vlmpruner.visual_grids import GridView


@pytest.fixture(params=["cpu", "device"], autouse=True)
def path(request, monkeypatch):
    """Selection on a CPU, and as on a GPU."""
    if request.param == "device":
        monkeypatch.setattr(VLMPruner, "choose", staticmethod(select_in_torch))


def load_case(name):
    with safe_open(DATA / "golden" / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return case, tensors


def load_decoder(model, tensors):
    """The weights of the authors' language model into ours; the vision tower stays random and unused."""
    weights = {key.removeprefix("weights."): value.float() for key, value in tensors.items() if key.startswith("weights.")}
    model.lm_head.weight.data.copy_(weights.pop("lm_head.weight"))
    weights = {key.removeprefix("model."): value for key, value in weights.items()}
    missing, unexpected = model.model.language_model.load_state_dict(weights, strict=False)
    assert not unexpected and all("rotary" in key for key in missing)


def decode_steps(case, tensors, prefill, step):
    """Logits of the prefill's last token and of each recorded token fed back, and the last outputs."""
    outputs = prefill()
    rows = [outputs.logits[0, -1]]
    for token in tensors["generated"]:
        outputs = step(token.view(1, 1), cache_of(outputs))
        rows.append(outputs.logits[0, -1])
    return torch.stack(rows), outputs


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def pruning_keys(case):
    return {
        "pruning_ratio": case["ratio"],
        "pruning_layer": case["layer"],
        "pruning_num_pivots": case["pivots"],
        "pruning_threshold": case["threshold"],
        "pruning_token_batch": case["token_batch"],
    }


def check(model, case, tensors, **inputs):
    """The kept set, nine rows of logits, the unpruned logits and the cache lengths, against the recorded ones."""
    load_decoder(model, tensors)
    # The vector records image features, so they take the place of what the vision tower would give.
    features = tensors["image_features"].float()
    model.model.get_image_features = lambda *args, **kwargs: _features(features, (case["height"], case["width"]))
    inputs = {"input_ids": tensors["input_ids"]} | inputs
    with torch.no_grad():
        logits, outputs = decode_steps(
            case,
            tensors,
            lambda: model(**inputs, use_cache=True),
            lambda token, cache: model(input_ids=token, **{CACHE_NAME: cache}),
        )
    (image,) = cache_of(outputs).pruning_record
    assert image.kept.tolist() == tensors["kept"].tolist()
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-3)
    lengths = [cache_of(outputs).get_seq_length(layer) for layer in range(case["num_hidden_layers"])]
    assert lengths == case["kv_lengths_after_generation"]
    with torch.no_grad():
        unpruned = model(**inputs, pruning_ratio=0.0, logits_to_keep=1).logits
    torch.testing.assert_close(unpruned[0, -1], tensors["logits_unpruned"], rtol=0, atol=1e-3)
    return image


def _features(features, grid):
    features = features.clone()
    features.grid_views = [GridView(*grid)]
    return BaseModelOutputWithPooling(pooler_output=[features])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_llava_equals_the_authors_model(attn):
    case, tensors = load_case("e2e_llava")
    text_config = LlamaConfig(
        **{name: case[name] for name in SIZES},
        rms_norm_eps=case["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": case["rope_theta"]},
    )
    vision_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = VLMPrunerLlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=case["image_token_id"],
        **pruning_keys(case),
    )
    config._attn_implementation = attn
    model = VLMPrunerLlavaForConditionalGeneration(config).eval()
    check(model, case, tensors, pixel_values=torch.zeros(1, 3, 336, 336))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_qwen2_vl_equals_the_authors_model(attn):
    case, tensors = load_case("e2e_qwen2_vl")
    text_config = {name: case[name] for name in SIZES} | {
        "rms_norm_eps": case["rms_norm_eps"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": case["rope_theta"],
            "mrope_section": case["mrope_section"],
        },
    }
    vision_config = {"depth": 1, "embed_dim": 32, "hidden_size": case["hidden_size"], "mlp_ratio": 1, "num_heads": 2}
    config = VLMPrunerQwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        **{name: case[name] for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")},
        **pruning_keys(case),
    )
    config._attn_implementation = attn
    model = VLMPrunerQwen2VLForConditionalGeneration(config).eval()
    grid = torch.tensor([case["image_grid_thw"]])
    types = (tensors["input_ids"] == case["image_token_id"]).int()
    positions = model.model.mrope_position_ids(tensors["input_ids"], types, None, None, {"image_grid_thw": grid})
    assert torch.equal(positions, tensors["position_ids"])
    pixels = torch.zeros(int(grid.prod()), 3)
    image = check(model, case, tensors, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=types)
    assert image.num_kept == case["budget"] == case["kept"]
