"""Towers whose patches are merged, padded or of several images in one sequence: InternVL's, Idefics3's and Pixtral."""

import copy
from functools import lru_cache

import method_oracles
import pytest
import torch
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture
from stock_towers import idefics3_tower, internvl_tower, mistral3_tower, pixtral_tower
from test_configuration import SMALL
from test_families import CLOSE, generate, step_logits
from test_methods import LOOKING_AT_TOWER, ROWS, array, load_method
from transformers import LlamaConfig, PixtralVisionConfig
from transformers.models.mlcd.configuration_mlcd import MLCDVisionConfig

from vlmpruner.configuration_vlmpruner import VLMPrunerLlavaConfig
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaForConditionalGeneration
from vlmpruner.pruned_cache import cache_of
from vlmpruner.pruned_model import features_of_images, stock_class
from vlmpruner.token_pruning import num_tokens_to_keep


MERGED = ("internvl", "mistral3", "smolvlm", "idefics3")
PADDED = ("smolvlm", "idefics3")
# Patches of Pixtral's pictures: several sizes, some of which leave patches that fill no token of Mistral3's.
GRIDS = [(6, 8), (5, 7), (2, 4), (4, 3)]


def assert_signals(found, expected):
    """Of `TowerSignals` and (attention, states, keys), lists of each tile or image."""
    for signals, *parts in zip(found, *expected, strict=True):
        for part, right in zip((signals.attention, signals.states, signals.keys), parts, strict=True):
            torch.testing.assert_close(part.double(), right.double(), rtol=1e-4, atol=1e-5 * float(right.abs().max()))


def in_float64(stock):
    """A copy of a stock eager model, without its head."""
    return copy.deepcopy(stock).double().model


def towers_of(model, **pixels):
    with torch.no_grad():
        return [features.tower for features in features_of_images(model.get_image_features(**pixels).pooler_output)]


# Pixtral


def llava_with(vision_config, **keys):
    torch.manual_seed(0)
    text_config = LlamaConfig(**SMALL, num_hidden_layers=4)
    config = VLMPrunerLlavaConfig(text_config=text_config, vision_config=vision_config, image_token_index=4, **keys)
    return VLMPrunerLlavaForConditionalGeneration(config).eval()


@lru_cache
def llava_with_pixtral(attn="sdpa"):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = PixtralVisionConfig(**sizes, image_size=128, patch_size=16, initializer_range=0.3)
    model = llava_with(tower, vision_feature_layer=-1, vision_feature_select_strategy="full", pruning_ratio=0.7)
    model.set_attn_implementation(attn)
    return model


def stock_of(model):
    """The stock model with the same weights, eager."""
    stock = stock_class(type(model))(model.config).eval()
    stock.load_state_dict(model.state_dict())
    stock.set_attn_implementation("eager")
    return stock


def pictures_of(grids, patch_size):
    """Noise of so many patches, padded to the largest, with the sizes without padding."""
    sizes = torch.tensor(grids) * patch_size
    pixels = torch.randn(len(grids), 3, *sizes.amax(0).tolist(), generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "image_sizes": sizes}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mistral3", "llava"])
def test_images_of_a_sequence_attend_to_themselves_alone(name, attn):
    """Of several sizes in one call: as the eager maps in float64, and as each image alone."""
    if name == "mistral3":
        model, tower = copy.deepcopy(load_pruned(FAMILIES[name], attn=attn)), mistral3_tower
        stock = load_stock(FAMILIES[name], attn="eager")
    else:
        model, tower = copy.deepcopy(llava_with_pixtral(attn)), pixtral_tower
        stock = stock_of(model)
    model.config.pruning_method = "visionzip"
    patch_size = model.config.vision_config.patch_size
    inputs = pictures_of(GRIDS, patch_size)
    found = towers_of(model, **inputs)
    with torch.no_grad():
        expected, _ = tower(in_float64(stock), inputs)
    assert_signals(found, expected)
    for number, size in enumerate(inputs["image_sizes"]):
        pixels = inputs["pixel_values"][number : number + 1, :, : size[0], : size[1]]
        (alone,) = towers_of(model, pixel_values=pixels, image_sizes=size[None])
        assert_signals([alone], [[part[number]] for part in expected])
    with torch.no_grad():
        features = model.get_image_features(**inputs).pooler_output
        for image, signals in zip(features, found, strict=True):
            torch.testing.assert_close(signals.project(signals.states), image, **CLOSE)


def pixtral_inputs(rows, model):
    """A padded batch: of each row the grids of its pictures, of which each row of patches ends with a token of text."""
    parts = [
        [5, *(token for height, width in grids for _ in range(height) for token in [4] * width + [9]), *range(6, 20)]
        for grids in rows
    ]
    length = max(map(len, parts))
    ids = torch.tensor([[0] * (length - len(part)) + part for part in parts])
    pictures = pictures_of([grid for grids in rows for grid in grids], model.config.vision_config.patch_size)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **pictures}


@pytest.mark.parametrize("name", LOOKING_AT_TOWER)
def test_llava_with_pixtral_chooses_by_the_maps_of_each_image(name):
    """As the restatement does, and in a batch as in each row alone."""
    model = copy.deepcopy(llava_with_pixtral())
    model.config.pruning_method = name
    rows = [[(6, 8), (5, 7)], [(4, 6)]]
    batch = pixtral_inputs(rows, model)
    with torch.no_grad():
        outputs = model(**batch)
        (attention, states, keys), project = pixtral_tower(stock_of(model).model, batch)
    assert [image.grid for image in outputs.pruning_record] == [grid for grids in rows for grid in grids]
    for image, *tower in zip(outputs.pruning_record, attention, states, keys, strict=True):
        with torch.no_grad():
            features = array(project(tower[1]))
        facts = method_oracles.Image(image.num_kept, features, grid=image.grid, tower_has_class_token=False)
        facts.tower_attention, facts.tower_states, facts.tower_keys = map(array, tower)
        assert sorted(image.order.tolist()) == sorted(getattr(method_oracles, name)(facts))
    first = 0
    for row, grids in enumerate(rows):
        own = {name: batch[name][first : first + len(grids)] for name in ("pixel_values", "image_sizes")}
        (height, width), first = own["image_sizes"].amax(0).tolist(), first + len(grids)
        own["pixel_values"] = own["pixel_values"][..., :height, :width]
        is_token = batch["attention_mask"][row].bool()
        with torch.no_grad():
            single = model(batch["input_ids"][row : row + 1, is_token], **own)
        torch.testing.assert_close(outputs.logits[row, is_token], single.logits[0], **CLOSE)
        orders = [image.order.tolist() for image in outputs.pruning_record if image.row == row]
        assert orders == [image.order.tolist() for image in single.pruning_record]


# Padding inside a tile


def padded_inputs(family, height, width):
    """Of two pictures, with padding below `height` and right of `width` (in patches) of each second tile."""
    inputs = make_inputs(family, [([picture(1), picture(2, 500, 200)], "What?")])
    side = load_pruned(family).config.vision_config.patch_size
    mask = torch.ones_like(inputs["pixel_values"][:, :, 0], dtype=torch.long)
    mask[:, ::2, height * side :] = 0
    mask[:, ::2, :, width * side :] = 0
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(2))
    inputs["pixel_values"] = torch.where(mask[:, :, None] > 0, inputs["pixel_values"], noise)
    inputs["pixel_attention_mask"] = mask
    return inputs


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_of_a_tile_counts_nowhere(name, attn):
    """7 x 5 patches are 4 x 3 tokens of 2 x 2, of which the last row and the last column are half padding."""
    family = FAMILIES[name]
    model = copy.deepcopy(load_pruned(family, attn=attn))
    model.config.pruning_method = "visionzip"
    inputs = padded_inputs(family, 7, 5)
    pixels = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
    found = [tower.of(tokens) for tower in towers_of(model, **pixels) for tokens in torch.arange(len(tower.states)).split(16)]
    assert len(found) == 8
    with torch.no_grad():
        expected, _ = idefics3_tower(in_float64(load_stock(family, attn="eager")), inputs)
    assert_signals(found, expected)
    is_seen = torch.zeros(4, 4, dtype=torch.bool)
    is_seen[:4, :3] = True
    for number, signals in enumerate(found):
        own = is_seen.flatten() if number % 2 == 0 else torch.ones(16, dtype=torch.bool)
        assert torch.equal(signals.is_seen, own) and torch.equal(signals.attention > 0, own)


@pytest.mark.parametrize("name", LOOKING_AT_TOWER)
def test_tokens_of_padding_alone_are_no_choice(name):
    """The others are chosen from as if there were no more, and what the padding holds changes nothing. It stays where there is
    room."""
    family = FAMILIES["smolvlm"]
    model, inputs = load_method(family, name), padded_inputs(family, 6, 4)
    seen = torch.arange(16).view(4, 4)[:3, :2].flatten()
    with torch.no_grad():
        outputs = model(**inputs)
        (attention, states, keys), project = idefics3_tower(load_stock(family, attn="eager").model, inputs)
    for number, (image, *tower) in enumerate(zip(outputs.pruning_record, attention, states, keys, strict=True)):
        own = seen if number % 2 == 0 else torch.arange(16)
        with torch.no_grad():
            features = array(project(tower[1][own]))
        facts = method_oracles.Image(num_tokens_to_keep(16, 0.8), features, grid=image.grid, tower_has_class_token=False)
        facts.tower_attention, facts.tower_states, facts.tower_keys = (array(part[own]) for part in tower)
        chosen = own[getattr(method_oracles, name)(facts)]
        assert sorted(image.order.tolist()) == sorted(chosen.tolist())
    noisy = inputs["pixel_values"] * 3 - 1
    other = dict(inputs) | {
        "pixel_values": torch.where(inputs["pixel_attention_mask"][:, :, None] > 0, inputs["pixel_values"], noisy)
    }
    model.config.pruning_ratio = 0.4
    with torch.no_grad():
        again = model(**other).pruning_record
        for image in again.images[::2]:  # 10 of 16 are kept, 6 are seen
            assert image.num_kept == 10 and set(seen.tolist()) < set(image.order.tolist())
            assert image.order[6:].tolist() == [2, 3, 6, 7]
        model.config.pruning_ratio = 0.8
        torch.testing.assert_close(model(**other).logits, outputs.logits, **CLOSE)


def test_a_tile_of_padding_alone_is_chosen_from_as_it_is():
    family = FAMILIES["smolvlm"]
    inputs = padded_inputs(family, 0, 0)
    for name in LOOKING_AT_TOWER:
        with torch.no_grad():
            record = load_method(family, name, pruning_ratio=0.5)(**inputs).pruning_record
        assert [image.num_kept for image in record] == [8] * 8


# InternVL


@pytest.mark.parametrize("layer", [-1, 1, 2])
@pytest.mark.parametrize("norms", [{}, {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False}])
def test_the_class_token_of_any_internvit(norms, layer):
    """With normed queries and keys as the 6B tower has them, a last norm, and features of an earlier block."""
    torch.manual_seed(0)
    config = copy.deepcopy(load_pruned(FAMILIES["internvl"]).config)
    config.vision_config.initializer_range, config.vision_feature_layer = 0.3, layer
    for name, value in norms.items():
        setattr(config.vision_config, name, value)
    config.pruning_method = "scope"
    model = type(load_pruned(FAMILIES["internvl"]))(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "cls_token" in name:
                parameter.uniform_(0.5, 2)
    inputs = make_inputs(FAMILIES["internvl"], [([picture(1)], "What?")])
    found = towers_of(model, pixel_values=inputs["pixel_values"])
    with torch.no_grad():
        expected, _ = internvl_tower(in_float64(stock_of(model)), inputs, layer)
    assert_signals(found, expected)
    assert all(signals.has_class_token and not signals.is_clip for signals in found)
    assert min(signals.attention.std() / signals.attention.mean() for signals in found) > 1e-3
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    for tile, signals in zip(features, found, strict=True):
        torch.testing.assert_close(signals.project(signals.states), tile, **CLOSE)


# Requests


@pytest.mark.parametrize("name", MERGED)
def test_a_batch_and_its_beams_equal_single_rows(name):
    family = FAMILIES[name]
    model = load_method(family, "visionzip")
    inputs = make_inputs(family, ROWS)
    batch = generate(model, inputs, min_new_tokens=3, max_new_tokens=3)
    beams = generate(model, inputs, max_new_tokens=1, num_beams=2, num_return_sequences=2)
    record, of_beams = (cache_of(outputs).pruning_record for outputs in (batch, beams))
    torch.testing.assert_close(beams.logits[0], batch.logits[0].repeat_interleave(2, dim=0), **CLOSE)
    for number, row in enumerate(ROWS):
        single = generate(model, make_inputs(family, [row]), min_new_tokens=3, max_new_tokens=3)
        torch.testing.assert_close(step_logits(batch)[number], step_logits(single)[0], **CLOSE)
        orders = [image.order.tolist() for image in model.get_pruning_record(single) or []]
        assert [image.order.tolist() for image in record if image.row == number] == orders
        for beam in (2 * number, 2 * number + 1):
            assert [image.order.tolist() for image in of_beams if image.row == beam] == orders


@pytest.mark.parametrize("name", MERGED)
def test_off_is_exact_where_the_tower_is_looked_at(name):
    """Also with beams, which get the features of each tile again, for a stock call."""
    family, off = FAMILIES[name], {"pruning_ratio": 0.0, "max_new_tokens": 3, "do_sample": False}
    inputs = make_inputs(family, ROWS[1:])
    with torch.no_grad():
        ours = load_method(family, "scope")(**inputs, pruning_ratio=0.0)
        assert torch.equal(ours.logits, load_stock(family)(**inputs).logits)
    found = [load_method(family, method).generate(**inputs, **off, num_beams=2) for method in ("scope", "vlm_pruner")]
    assert torch.equal(*found)


# Refusals


def test_a_tower_of_which_nobody_says_how_is_refused_by_name():
    """MLCD's blocks look like CLIP's, but rotate queries and keys."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = MLCDVisionConfig(**sizes, image_size=64, patch_size=16)
    model = llava_with(tower)
    inputs = {"input_ids": torch.tensor([[5, *[4] * 16, 6, 7]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    with torch.no_grad():
        assert model(**inputs).pruning_record.num_visual == 16
        for name in LOOKING_AT_TOWER:
            model.config.pruning_method = name
            with pytest.raises(ValueError, match=f"'{name}' looks at the attention in .* tower of type 'mlcd_vision_model'"):
                model(**inputs)


@pytest.mark.parametrize("name", ["llava", "internvl", "mistral3"])
def test_features_that_no_single_block_makes_are_refused(name):
    family = FAMILIES[name]
    model, inputs = load_method(family, "scope"), make_inputs(family, ROWS[1:2])
    with pytest.raises(ValueError, match=r"they are of several with vision_feature_layer=\[-2, -1\]"):
        model(**inputs, vision_feature_layer=[-2, -1])
    num_blocks = model.config.vision_config.num_hidden_layers
    for layer in (0, -num_blocks - 1, num_blocks + 1):
        legal = rf"\[1, {num_blocks}\] or \[-{num_blocks}, -1\], but is {layer}\."
        with pytest.raises(ValueError, match=f"'scope' .* so vision_feature_layer must be in {legal}"):
            model(**inputs, vision_feature_layer=layer)
