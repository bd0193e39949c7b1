"""The whole path against logits that the authors' own model produced (tests/data/golden/e2e_*.safetensors)."""

import json

import pytest
import torch
from families import DATA
from safetensors import safe_open
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmpruner.configuration_vlmpruner import VLMPrunerLlavaConfig
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaForConditionalGeneration
from vlmpruner.pruned_decoder import GridView


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
        outputs = step(token.view(1, 1), outputs.past_key_values)
        rows.append(outputs.logits[0, -1])
    return torch.stack(rows), outputs


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_llava_equals_the_authors_model(attn):
    case, tensors = load_case("e2e_llava")
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    text_config = LlamaConfig(
        **{name: case[name] for name in names},
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
        pruning_ratio=case["ratio"],
        pruning_layer=case["layer"],
        pruning_num_pivots=case["pivots"],
        pruning_threshold=case["threshold"],
        pruning_token_batch=case["token_batch"],
    )
    config._attn_implementation = attn
    model = VLMPrunerLlavaForConditionalGeneration(config).eval()
    load_decoder(model, tensors)

    # The vector records image features, so they take the place of what the vision tower would give.
    is_image = tensors["input_ids"] == case["image_token_id"]
    inputs_embeds = model.get_input_embeddings()(tensors["input_ids"])
    features = tensors["image_features"].float()
    model.model.get_image_features = lambda *args, **kwargs: _features(features, (case["height"], case["width"]))
    placeholder = model.get_input_embeddings().weight[case["image_token_id"]]
    inputs_embeds = torch.where(is_image[..., None], placeholder, inputs_embeds)

    with torch.no_grad():
        logits, outputs = decode_steps(
            case,
            tensors,
            lambda: model(inputs_embeds=inputs_embeds, pixel_values=torch.zeros(1, 3, 336, 336), use_cache=True),
            lambda token, cache: model(input_ids=token, past_key_values=cache),
        )
        unpruned = model(
            inputs_embeds=inputs_embeds, pixel_values=torch.zeros(1, 3, 336, 336), pruning_ratio=0.0, logits_to_keep=1
        )
    (image,) = outputs.past_key_values.pruning_record
    assert image.kept.tolist() == tensors["kept"].tolist()
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-3)
    torch.testing.assert_close(unpruned.logits[0, -1], tensors["logits_unpruned"], rtol=0, atol=1e-3)
    lengths = [outputs.past_key_values.get_seq_length(layer) for layer in range(case["num_hidden_layers"])]
    assert lengths == case["kv_lengths_after_generation"]


def _features(features, grid):
    features = features.clone()
    features.grid_views = [GridView(*grid)]
    return BaseModelOutputWithPooling(pooler_output=[features])
