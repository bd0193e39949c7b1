"""Configs that public checkpoints do not have, and that the stock classes take: as these do, or refused by a sentence."""

import copy

import pytest
import torch
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture, spread_weights
from test_configuration import SMALL, config
from test_families import EXACT, generate, step_logits, supervised
from test_methods import load_method
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from vlmpruner.pruned_cache import CACHE_NAME, cache_of


LLAVA = FAMILIES["llava"]
FULL, SLIDING, LINEAR, CHUNKED = (f"{kind}_attention" for kind in ("full", "sliding", "linear", "chunked"))


# DeepStack in every decoder layer


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
@pytest.mark.parametrize("num_layers", [2, 3])
def test_deepstack_reaches_the_last_layer(name, num_layers):
    """Of as many DeepStack layers as decoder layers the last is added too, and gets its gradient."""
    family = FAMILIES[name]
    unusual = copy.deepcopy(load_pruned(family).config)
    unusual.text_config.num_hidden_layers, unusual.pruning_layer = num_layers, 1
    unusual.vision_config.deepstack_visual_indexes = [0, 1]
    torch.manual_seed(0)
    model = spread_weights(family.pruned_class(unusual)).train()
    inputs = make_inputs(family, [([picture(1, 120, 90)], "What is it?")])
    found = []
    for ratio in (0.0, 0.001):
        model.zero_grad()
        outputs = model(**inputs, labels=supervised(inputs), pruning_ratio=ratio, use_cache=False)
        outputs.loss.backward()
        gradients = [each.grad for each in model.model.visual.deepstack_merger_list.parameters()]
        found.append([outputs.logits, *gradients])
    record = outputs.pruning_record
    assert record.num_kept == record.num_visual > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


# Outputs without names


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "smolvlm"])
def test_a_config_without_names_of_outputs(name, monkeypatch):
    """`return_dict=False` in the config: tuples of the same values, also of the encoder; `generate` has names all the same."""
    family = FAMILIES[name]
    model, inputs = load_pruned(family), make_inputs(family, [([picture(1)], "What is it?")])
    named, generated = model(**inputs, use_cache=False), generate(model, inputs)
    pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw", "image_sizes") if key in inputs}
    for each in (model, load_stock(family)):
        monkeypatch.setattr(each.config, "return_dict", False)
    outputs = model(**inputs, use_cache=False)
    assert isinstance(outputs, tuple) and len(outputs) == len(named.to_tuple())
    torch.testing.assert_close(outputs[0], named.logits, **EXACT)
    with pytest.raises(ValueError, match="A tuple does not tell what was kept"):
        model.get_pruning_record(outputs)
    off = model(**inputs, use_cache=False, pruning_ratio=0.0)
    assert isinstance(off, tuple)
    again = generate(model, inputs)
    torch.testing.assert_close(step_logits(again), step_logits(generated), **EXACT)
    record = model.get_pruning_record(again)
    assert record.num_kept == model.get_pruning_record(generated).num_kept < record.num_visual
    encoded = [each.model.get_image_features(**pixels) for each in (model, load_stock(family))]
    assert [type(part) for part in encoded[0]] == [type(part) for part in encoded[1]] and isinstance(encoded[0], tuple)


# Keys that another model has left in the config


def llama(**keys):
    return LlamaConfig(**SMALL, num_hidden_layers=4, **keys)


@pytest.mark.once
@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        # What the cache goes by, whatever the model reads.
        (llama(sliding_window=16), r"layer 2 of this llama model uses sliding_attention \(window 16\)"),
        (llama(attention_chunk_size=8), r"layer 2 of this llama model uses chunked_attention \(window 8\)"),
        (llama(layer_types=[FULL, FULL, FULL, SLIDING], sliding_window=16), "layer 3 .* uses sliding_attention"),
        # What the model goes by, whatever the cache does.
        (
            MistralConfig(**SMALL, num_hidden_layers=4, sliding_window=16, layer_types=[FULL] * 4),
            "mistral model uses sliding",
        ),
        # Layers that there are not, also below the pruning layer.
        (llama(layer_types=[FULL, LINEAR, FULL, FULL]), r"has 'linear_attention' for decoder layer 1, but in this llama model"),
        (llama(layer_types=[FULL, FULL, FULL, "moe"]), r"has 'moe' for decoder layer 3, .* one of \('full_attention',\)"),
    ],
    ids=["window", "chunk", "types", "mistral", "linear", "moe"],
)
def test_a_decoder_that_is_not_what_its_config_says_is_refused(text_config, message):
    with pytest.raises(ValueError, match=message):
        config(text_config)
    assert config(text_config, pruning_ratio=0.0).pruning_settings() is None


@pytest.mark.once
@pytest.mark.parametrize(
    "text_config",
    [
        llama(layer_types=[FULL] * 4, sliding_window=16),
        llama(layer_types=[SLIDING, CHUNKED, FULL, FULL], sliding_window=16),
        MistralConfig(**SMALL, num_hidden_layers=4, sliding_window=None, layer_types=[FULL] * 4),
        Qwen2Config(**SMALL, num_hidden_layers=4, use_sliding_window=True, sliding_window=16, max_window_layers=4),
    ],
    ids=["llama", "below", "mistral", "qwen2"],
)
def test_keys_that_change_no_layer_are_no_reason_to_refuse(text_config):
    assert config(text_config).pruning_settings().layer == 2


@pytest.mark.once
@pytest.mark.parametrize("keys", [{"pruning_method": "restore"}, {"pruning_positions": "packed"}], ids=["restore", "packed"])
def test_the_family_tells_whether_positions_have_three_axes(keys):
    """`mrope_section` can be left in a config whose model counts tokens, and be missing from another that has its default."""
    left = llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]})
    assert config(left, **keys).pruning_settings() is not None
    missing = copy.deepcopy(load_pruned(FAMILIES["qwen3_vl"]).config)
    del missing.text_config.rope_parameters["mrope_section"]
    for key, value in keys.items():
        setattr(missing, key, value)
    with pytest.raises(ValueError, match=r"have three axes \(M-RoPE\)"):
        missing.pruning_settings()


@pytest.mark.once
@torch.no_grad()
def test_a_tower_has_windows_where_it_has_them(monkeypatch):
    """Blocks of full attention are Qwen2.5-VL's; another tower reads no such key."""
    family = FAMILIES["qwen2_vl"]
    model, inputs = load_method(family, "scope"), make_inputs(family, [([picture(1)], "What is it?")])
    expected = model(**inputs)
    for key, value in (("fullatt_block_indexes", [0]), ("window_size", 28)):
        monkeypatch.setattr(model.config.vision_config, key, value, raising=False)
    torch.testing.assert_close(model(**inputs).logits, expected.logits, **EXACT)


# Settings of a call


@pytest.mark.once
@pytest.mark.parametrize("method", ["vlm_pruner", "visionzip"])
def test_a_call_checks_its_settings_once(method, monkeypatch):
    """A prefill makes the method's parameters once, `generate` once more before it; a decoded token and text alone never."""
    model, inputs = load_method(LLAVA, method), make_inputs(LLAVA, [([picture(1)], "What is it?")])
    config_class, counts = type(model.config), {"pruning_parameters": 0, "pruning_settings": 0}

    def count(name, function):
        def counted(self, *args):
            counts[name] += self is model.config  # the library makes others
            return function(self, *args)

        return counted

    for name in counts:
        monkeypatch.setattr(config_class, name, count(name, getattr(config_class, name)))
    with torch.no_grad():
        outputs = model(**inputs)
        assert set(counts.values()) == {1}
        tokens = outputs.logits[:, -1:].argmax(-1)
        model(input_ids=tokens, **{CACHE_NAME: cache_of(outputs)})
        model(input_ids=tokens)
        assert set(counts.values()) == {1}
        model(**inputs, pruning_ratio=0.0)
        assert set(counts.values()) == {2}
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert max(counts.values()) <= 4


@pytest.mark.once
@torch.no_grad()
def test_a_value_that_is_assigned_counts_in_the_next_call():
    model, inputs = load_method(LLAVA, "vlm_pruner"), make_inputs(LLAVA, [([picture(1)], "What is it?")])
    record = model(**inputs).pruning_record
    assert record.num_kept == round(record.num_visual * 0.2)
    model.config.pruning_ratio = 0.5
    assert model(**inputs).pruning_record.num_kept == record.num_visual // 2
    model.config.pruning_num_pivots = 0
    for call in (lambda: model(**inputs), lambda: model.generate(**inputs), lambda: model(**inputs, pruning_ratio=0.0)):
        with pytest.raises(ValueError, match=r"pruning_num_pivots must be .* >= 1, but is 0"):
            call()
