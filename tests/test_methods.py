"""Every method of the registry: its maths against a restatement, and what holds for all of them in a model.

Not every method runs in every family and mode. Each is done by hand with each kind of decoder, and runs in each mode, each time
with another family.
"""

import copy
import importlib
import re
import shutil
import sys
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import method_oracles
import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    clip,
    load_processor,
    load_pruned,
    load_stock,
    make_inputs,
    one_of_each_kind,
    picture,
    prompt,
    small_checkpoint,
    spread_weights,
)
from stock_towers import idefics3_tower, internvl_tower, mistral3_tower
from test_families import (
    CLOSE,
    EXACT,
    CountOperations,
    decoder_inputs,
    generate,
    join_turns,
    later_turn,
    positions,
    step_logits,
)
from transformers import DynamicCache

from vlmpruner import pruning_methods, tower_signals
from vlmpruner.configuration_vlmpruner import PruningConfig
from vlmpruner.modeling_vlmpruner_qwen2vl import PrunedQwenModelMixin
from vlmpruner.pruned_cache import CACHE_NAME, PruningRecord, cache_of
from vlmpruner.pruned_model import PrunedModelMixin, features_of_images
from vlmpruner.pruning_methods import METHODS
from vlmpruner.token_pruning import Selection, select_tokens


# What a method is tested with in models: a ratio at which the tiny images keep enough, and keys that make it do something.
KEYS = {name: {"pruning_ratio": 0.8} for name in METHODS} | {
    "cdpruner": {"pruning_ratio": 0.96},  # fewer than the tiny models have channels, which is the rank of the kernel
    "saint": {"pruning_ratio": 0.8, "pruning_min_neighbours": 2, "pruning_similarity_threshold": 0.3},
}
CHOOSING = [name for name in METHODS if name != "random"]


@lru_cache
def shared_model(family):
    return copy.deepcopy(load_pruned(family))


def load_method(family, name, **keys):
    """One model of a family for all methods, whose config is set to this one."""
    model = shared_model(family)
    for field in fields(PruningConfig):
        setattr(model.config, field.name, family.layer if field.name == "pruning_layer" else field.default)
    for key, value in (KEYS[name] | {"pruning_method": name} | keys).items():
        setattr(model.config, key, value)
    return model


LOOKING_AT_TOWER = [name for name, method in METHODS.items() if "tower" in method.looks_at]


# Hybrid decoders have layers of another kind: test_qwen3_5.py.
WHOLE = [family for family in FAMILIES.values() if not family.is_hybrid]
WITH_TOWER = [each for each in FAMILIES.values() if each.model_class.tower_blocks is not PrunedModelMixin.tower_blocks]
WITH_THREE_AXES = [each for each in FAMILIES.values() if "mrope_section" in (each.checkpoint / "config.json").read_text()]
OF_KNOWN_TOWER = [family for family in WHOLE if family in WITH_TOWER]


def families_of(name):
    """Those that a method is defined for."""
    found = OF_KNOWN_TOWER if name in LOOKING_AT_TOWER else WHOLE
    return [family for family in found if family not in WITH_THREE_AXES or not METHODS[name].counts_positions]


def pairs(names, shift=0):
    """Each method with one family that has code of its own, another for each mode."""
    own = {name: [family for family in families_of(name) if family.like is None] for name in names}
    found = [(name, own[name][(number + shift) % len(own[name])]) for number, name in enumerate(names)]
    return [pytest.param(name, family, id=f"{name}-{family.name}") for name, family in found]


def with_each_kind(names):
    """Each method with a family of each kind of decoder that it is defined for."""
    found = [(name, family) for number, name in enumerate(names) for family in one_of_each_kind(number, families_of(name))]
    return [pytest.param(name, family, id=f"{name}-{family.name}") for name, family in found]


BY_HAND = with_each_kind(METHODS)


ROWS = [
    ([], "Say something about nothing at all, please."),
    ([picture(1)], "What is in the picture?"),
    ([picture(2), picture(3, 200, 300)], "Which one?"),
]


# One forward by hand


class Recorder:
    """Attention weights of the stock model's layers as they run, eagerly."""

    def __init__(self, decoder):
        self.weights = {}
        self.hooks = [
            layer.self_attn.register_forward_hook(
                lambda module, args, output, number=number: self.weights.update({number: output[1]})
            )
            for number, layer in enumerate(decoder.layers)
            if hasattr(layer, "self_attn")
        ]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        for hook in self.hooks:
            hook.remove()


def by_hand(family, name, inputs, model, record):
    """The pruned forward of one row on the stock model's layers, tokens chosen by the restatement.

    Returns:
        The logits, their columns, and for each stage what was kept of each image.
    """
    stock, given = load_stock(family, attn="eager"), decoder_inputs(family, inputs)
    settings = model.config.pruning_settings()
    decoder, hidden = stock.get_decoder(), given["inputs_embeds"]
    method = settings.method_for(len(decoder.layers))
    length = hidden.shape[1]
    places = given["position_ids"] if given["position_ids"] is not None else torch.arange(length)[None]
    cos, sin = decoder.rotary_emb(hidden, places[-3:] if places.ndim == 3 else places)
    is_visual = torch.isin(inputs["input_ids"][0], torch.tensor([model.config.image_token_id]))
    columns, cache = torch.arange(length), DynamicCache(config=decoder.config)
    sizes = np.ones((2, length))
    left = [torch.arange(image.num_visual) for image in record]
    kept_at = []

    def mask(number):
        if name == "restore":
            rope = {"dim": decoder.layers[0].self_attn.head_dim, "base": decoder.config.rope_parameters["rope_theta"]}
            bias = method_oracles.restore_bias(columns.numpy(), sizes[min(number, 1), columns], **rope)
            return torch.from_numpy(bias).float()[None, None]
        return torch.full((len(columns), len(columns)), float("-inf")).triu(1)[None, None]

    def run(layer, cache, number):
        causal = None if hasattr(layer, "linear_attn") else mask(number)
        return layer(hidden, attention_mask=causal, position_embeddings=(cos, sin), **{CACHE_NAME: cache})

    tower, project = tower_by_hand(family, inputs, record) if name in LOOKING_AT_TOWER else (None, None)

    with Recorder(decoder) as recorder:
        for number, layer in enumerate(decoder.layers):
            if number in method.stage_layers():
                stage = method.stage_layers().index(number)
                looked_at = number - 1
                if "own_attention" in method.looks_at:
                    run(layer, DynamicCache(config=decoder.config), number)
                    looked_at = number
                column_of = {int(column): place for place, column in enumerate(columns)}
                dropped, kept_now = set(), []
                for index, image in enumerate(record):
                    own = image.positions[left[index]]
                    at = torch.tensor([column_of[int(column)] for column in own])
                    text = torch.tensor([place for place, column in enumerate(columns) if not is_visual[column]])
                    facts = method_oracles.Image(
                        num_keep=min(method.counts(image.num_visual, budget(image, settings))[stage], len(at)),
                        hidden_states=array(hidden[0, at]),
                        grid=image.grid,
                        indices=left[index].numpy(),
                        stage=stage,
                        text_states=array(hidden[0, text]),
                        is_after=(columns[text] > image.positions[-1]).numpy(),
                        normed=array(decoder.norm(hidden[0, at])),
                        normed_text=array(decoder.norm(hidden[0, text])),
                    )
                    if tower is not None:
                        facts.tower_attention, facts.tower_states, facts.tower_keys = tower[index]
                        facts.tower_has_class_token = model.config.vision_config.model_type in WITH_CLASS_TOKEN
                    if number > 0:
                        keys = cache.layers[number - 1].keys[0]
                        facts.keys, facts.text_keys = array(keys[:, at]), array(keys[:, text])
                        row = recorder.weights[looked_at][0, :, -1, at].double().mean(0)
                        # A logit is the log of a weight, up to a constant for each head, which the mean over heads keeps one.
                        logits = recorder.weights[looked_at][0, :, -1, at].double().log().mean(0)
                        facts.attention, facts.logits = row.numpy(), logits.numpy()
                    if name == "vlm_pruner":
                        chosen = select_tokens(hidden[0, at], keys[:, at], image.grid, facts.num_keep).order.tolist()
                    elif name == "random":
                        chosen = [left[index].tolist().index(token) for token in image.stages[stage][1].tolist()]
                    else:
                        chosen = getattr(method_oracles, name)(facts, **asdict(settings.parameters))
                    if name == "visionzip":
                        _, _, joined = method_oracles.zipped(facts, max(1, round(facts.num_keep * 10 / 64)))
                        for target, others in joined.items():
                            if project is None:
                                states = facts.tower_states[[target, *others]].mean(0)
                                hidden[0, at[target]] = torch.from_numpy(states).float()
                                continue
                            states = facts.tower_states[target] + (facts.tower_states[others].mean(0) if others else 0)
                            hidden[0, at[target]] = project(torch.from_numpy(states).float()[None, None])[0, 0]
                    if name == "restore":
                        groups = method_oracles.restored(facts, settings.parameters.selector)
                        rows = np.stack([facts.hidden_states[group].mean(0) for group in groups])
                        hidden[0, at[chosen]] = torch.from_numpy(rows).float()
                        sizes[0, own[chosen]], sizes[1, own[chosen]] = len(at) / len(groups), list(map(len, groups))
                    kept_now.append(left[index][sorted(chosen)].tolist())
                    dropped |= set(own.tolist()) - set(own[chosen].tolist())
                    left[index] = left[index][sorted(chosen)]
                kept_at.append(kept_now)
                stays = torch.tensor([int(column) not in dropped for column in columns])
                hidden, cos, sin, columns = hidden[:, stays], cos[:, stays], sin[:, stays], columns[stays]
            hidden = run(layer, cache, number)
            deepstack = given.get("deepstack_visual_embeds") or []
            if number < len(deepstack):
                added = torch.zeros(length, hidden.shape[-1])
                added[given["visual_pos_masks"][0]] = deepstack[number]
                hidden = hidden + added[columns]
    return stock.lm_head(decoder.norm(hidden))[0], columns, kept_at


WITH_CLASS_TOKEN = ("clip_vision_model", "internvl_vision")


def tower_by_hand(family, inputs, record):
    """What the eager tower attends to, its states and keys, [num_visual, ...] of each grid; and the projector, or None where
    the tower merges patches."""
    model = load_stock(family, attn="eager").model
    merges = issubclass(family.model_class, PrunedQwenModelMixin)
    own = {"internvl": internvl_tower, "smolvlm": idefics3_tower, "idefics3": idefics3_tower, "mistral3": mistral3_tower}
    with torch.no_grad():
        if family.name not in own:
            return (merging_tower_by_hand if merges else llava_tower_by_hand)(model, inputs, record)
        parts, project = own[family.name](model, inputs)
        assert [len(grid) for grid in parts[0]] == [image.num_visual for image in record]
        return list(zip(*([array(grid) for grid in part] for part in parts), strict=True)), project


def llava_tower_by_hand(model, inputs, record):
    pixels, layer = inputs["pixel_values"], model.config.vision_feature_layer
    num_tiles = [1] * len(pixels) if pixels.ndim == 4 else pixels.flatten(2).any(-1).sum(1).tolist()
    pixels = pixels if pixels.ndim == 4 else torch.cat([tiles[:count] for tiles, count in zip(pixels, num_tiles, strict=True)])
    seen = {}
    block = next(module for module in model.vision_tower.modules() if isinstance(module, torch.nn.ModuleList))[layer]
    hooks = [
        block.self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.update(keys=output)),
        block.self_attn.register_forward_hook(lambda module, args, output: seen.update(weights=output[1])),
    ]
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    for hook in hooks:
        hook.remove()
    keys = seen["keys"].unflatten(-1, (block.self_attn.num_heads, -1)).mean(2)
    if model.config.vision_config.model_type == "clip_vision_model":
        attention, states, keys = seen["weights"][:, :, 0, 1:].mean(1), states[:, 1:], keys[:, 1:]
    else:
        attention = seen["weights"].double().mean((1, 2))
    number = torch.arange(attention.numel(), dtype=torch.float32).view(*attention.shape, 1)  # of a patch among all
    rows = list(number)
    if hasattr(model, "pack_image_features"):
        newline = torch.full((1,), -1.0)
        options = {} if "onevision" in model.config.model_type else {"vision_feature_select_strategy": "default"}
        rows, _ = model.pack_image_features(number.split(num_tiles), inputs["image_sizes"], image_newline=newline, **options)
    found = []
    for image in record:
        first = min(int(other.positions[0]) for other in record if other.image == image.image)
        own = rows[image.image][image.positions - first][:, 0].long()
        found.append(tuple(array(part.flatten(0, 1)[own]) for part in (attention, states, keys)))
    return found, model.multi_modal_projector


def merging_tower_by_hand(model, inputs, record):
    seen, merged = [], []
    module = sys.modules[type(model.visual).__module__]
    stock, attention_module = module.eager_attention_forward, model.visual.blocks[-1].attn

    def keep(attention, query, key, *args, **kwargs):
        output, weights = stock(attention, query, key, *args, **kwargs)
        if attention is attention_module:
            seen.append((weights[0].double().mean((0, 1)), key[0].double().mean(0)))
        return output, weights

    hook = model.visual.merger.register_forward_hook(lambda module, args, output: merged.append(output))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", keep)
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output))
    hook.remove()
    order = (features[:, None] == merged[0]).all(-1).long().argmax(1)  # the merger has the tokens as the blocks have them
    assert torch.equal(merged[0][order], features) and len(order.unique()) == len(order)
    attention = torch.cat([part for part, _ in seen]).view(-1, 4).mean(1)[order]
    keys = torch.cat([part for _, part in seen]).unflatten(0, (-1, 4)).mean(1)[order]
    ends = torch.tensor([image.num_visual for image in record]).cumsum(0).tolist()
    places = [slice(end - image.num_visual, end) for image, end in zip(record, ends, strict=True)]
    return [tuple(array(part[place]) for part in (attention, features, keys)) for place in places], None


def array(tensor):
    return tensor.double().numpy()


def budget(image, settings):
    return max(1, round(round(image.num_visual * (1 - settings.ratio), 6)))


@pytest.mark.once
def test_each_method_and_each_family_is_done_by_hand():
    names, families = zip(*(pair.values for pair in BY_HAND), strict=True)
    assert set(names) == set(METHODS) and set(families) == set(WHOLE)


@pytest.mark.parametrize(("name", "family"), BY_HAND)
@pytest.mark.between
def test_a_forward_equals_one_by_hand(name, family):
    keys = {"pruning_aggregation_weight": 1.0} if name == "vlm_pruner" else {}
    model = load_method(family, name, **keys)
    inputs = make_inputs(family, [([picture(1), picture(2, 200, 300)], "What is in these pictures?")])
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        logits, columns, kept = by_hand(family, name, inputs, model, outputs.pruning_record)
    record = outputs.pruning_record
    assert record.num_kept < record.num_visual
    found = [[image.stages[stage][1].sort().values.tolist() for image in record] for stage in range(len(kept))]
    assert found == kept
    for image in record:
        assert set(image.stages[-1][1].tolist()) == set(image.order.tolist())
        for (_, before), (_, after) in zip(image.stages, image.stages[1:], strict=False):
            assert set(after.tolist()) <= set(before.tolist())
    torch.testing.assert_close(outputs.logits[0, columns], logits, **CLOSE)


# Modes


class Replayed:
    """Chooses what a record says."""

    record = None

    @torch.no_grad()
    def select_batch(self, tokens):
        orders, start = [], 0
        for image, size in zip(self.record, tokens.sizes, strict=True):
            indices = tokens.indices[start : start + size]
            orders.append(torch.searchsorted(indices, image.stages[tokens.stage][1]) + start)
            start += size
        order = torch.cat(orders)
        return Selection(tuple(map(len, orders)), order, order.sort().values)


@pytest.mark.parametrize(("name", "family"), pairs(METHODS))
def test_cached_decoding_equals_a_full_forward_at_every_step(name, family, monkeypatch):
    """Without a cache each step is a prefill of its own, which looks at the prompt's last token as the first one did."""
    model, inputs = load_method(family, name), make_inputs(family, ROWS)
    cached = generate(model, inputs)
    if name == "random":
        replayed = {"record": cache_of(cached).pruning_record}
        monkeypatch.setitem(METHODS, name, type("Replay", (Replayed, METHODS[name]), replayed))
    uncached = generate(model, inputs, use_cache=False)
    torch.testing.assert_close(step_logits(cached), step_logits(uncached), **CLOSE)


@pytest.mark.parametrize(("name", "family"), pairs(CHOOSING, 1))
def test_ragged_batch_equals_single_rows(name, family):
    model, steps = load_method(family, name), {"min_new_tokens": 6}  # a row alone would stop where it ends
    batch = generate(model, make_inputs(family, ROWS), **steps)
    record = cache_of(batch).pruning_record
    for number, row in enumerate(ROWS):
        single = generate(model, make_inputs(family, [row]), **steps)
        torch.testing.assert_close(step_logits(batch)[number], step_logits(single)[0], **CLOSE)
        single_record = model.get_pruning_record(single) or []
        assert [image.order.tolist() for image in record if image.row == number] == [i.order.tolist() for i in single_record]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("name", "family"), pairs(CHOOSING, 2))
def test_later_turns_of_a_padded_batch_equal_single_rows(name, family, padding_side):
    model = load_method(family, name)
    firsts = [([picture(1)], "What?"), ([picture(2), picture(3)], "What is in these pictures, then?")]
    seconds = [([picture(4)], "And in this one, what do you see?"), ([], "Why?")]
    with torch.no_grad():
        first, second = (make_inputs(family, rows, padding_side=padding_side) for rows in (firsts, seconds))
        cache = cache_of(model(**first, **positions(first, first["attention_mask"])))
        turn = later_turn(first, second)
        batch = model(**turn, **{CACHE_NAME: cache})
        step = torch.full((2, 1), 9)
        mask = torch.cat([turn["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        places = {} if "mm_token_type_ids" in first else {"position_ids": mask.sum(1, keepdim=True) - 1}
        batch_step = model(input_ids=step, attention_mask=mask, **{CACHE_NAME: cache}, **places)
        for row in range(2):
            one_first, one_second = make_inputs(family, [firsts[row]]), make_inputs(family, [seconds[row]])
            one_cache = cache_of(model(**one_first, use_cache=True))
            single = model(**later_turn(one_first, one_second), **{CACHE_NAME: one_cache})
            is_token = second["attention_mask"][row].bool()
            torch.testing.assert_close(batch.logits[row][is_token], single.logits[0], **CLOSE)
            single_step = model(input_ids=step[:1], **{CACHE_NAME: one_cache})
            torch.testing.assert_close(batch_step.logits[row], single_step.logits[0], **CLOSE)


@pytest.mark.parametrize(("name", "family"), pairs(CHOOSING, 3))
def test_static_cache_moved_rows_and_crop(name, family):
    model, inputs = load_method(family, name), make_inputs(family, ROWS[1:])
    reference = generate(model, inputs)
    static = generate(model, inputs, cache_implementation="static")
    torch.testing.assert_close(step_logits(static), step_logits(reference), **CLOSE)
    with torch.no_grad():
        cache = cache_of(model(**inputs, **positions(inputs, inputs["attention_mask"]), use_cache=True))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        places = {} if "mm_token_type_ids" in inputs else {"position_ids": mask.sum(1, keepdim=True) - 1}
        step = {"input_ids": torch.full((2, 1), 9), "attention_mask": mask} | places
        expected = model(**step, **{CACHE_NAME: copy.deepcopy(cache)}).logits
        cache.reorder_cache(torch.tensor([1, 0]))
        moved = {key: value.flip(0) for key, value in step.items()}
        for _ in range(2):
            torch.testing.assert_close(model(**moved, **{CACHE_NAME: cache}).logits.flip(0), expected, **CLOSE)
            cache.crop(-1)
        assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]
        image = cache.pruning_record.images[0]
        with pytest.raises(ValueError, match="through image 0"):
            cache.crop(int(image.positions[3]) - int(cache.get_seq_length()))
        torch.testing.assert_close(model(**moved, **{CACHE_NAME: cache}).logits.flip(0), expected, **CLOSE)


@pytest.mark.parametrize(("name", "family"), pairs(CHOOSING, 4))
def test_beams_and_speculation_equal_decoding_without_them(name, family):
    model, inputs = load_method(family, name), make_inputs(family, ROWS[1:])
    kwargs = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**inputs, **kwargs)
    assert torch.equal(cached, model.generate(**inputs, **kwargs, use_cache=False))
    one_row = make_inputs(family, ROWS[1:2])
    greedy = generate(model, one_row, max_new_tokens=12)
    drafted = generate(model, one_row, max_new_tokens=12, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted.sequences, greedy.sequences)


@pytest.mark.parametrize(("name", "family"), pairs(METHODS, 5))
def test_drawing_training_and_off(name, family):
    model, inputs = load_method(family, name), make_inputs(family, [([picture(1)], "What is it?")])
    with torch.no_grad():
        record = model(**inputs).pruning_record
        processor = family.processor_class.from_pretrained(small_checkpoint(family))
        drawn = processor.draw_kept_tokens(picture(1), record)
        assert len(drawn) == 1
        off = model(**inputs, pruning_ratio=0.0)
        torch.testing.assert_close(off.logits, load_stock(family)(**inputs).logits, **EXACT)
        assert off.pruning_record is None
    if name != "random":
        assert_equal_gradients(model, inputs)


def assert_equal_gradients(model, inputs):
    """With checkpointing of either kind as without. Re-entrant, layers run without a graph at first, and with one later."""
    gradients = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        trained = copy.deepcopy(model).train()
        trained.enable_input_require_grads()
        if checkpointing is not None:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        outputs = trained(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        gradients.append({key: parameter.grad for key, parameter in trained.named_parameters() if parameter.grad is not None})
    assert any(gradient.abs().max() > 0 for key, gradient in gradients[0].items() if "vis" in key)
    for others in gradients[1:]:
        assert others.keys() == gradients[0].keys()
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "mistral3"])
def test_what_is_merged_of_the_tower_gets_its_gradient(name):
    family = FAMILIES[name]
    inputs = make_inputs(family, [([picture(1)], "What is it?"), ([picture(2, 200, 300)], "And what is this one?")])
    assert_equal_gradients(load_method(family, "visionzip"), inputs)


@torch.no_grad()
@pytest.mark.parametrize("family", OF_KNOWN_TOWER, ids=lambda family: family.name)
def test_off_looks_at_no_tower(family):
    """Not one operation more runs, whoever encodes."""
    model, stock = load_method(family, "scope", pruning_ratio=0.5), load_stock(family)
    inputs, off = make_inputs(family, [([picture(1)], "What is it?")]), {"pruning_ratio": 0.0}
    counts = []
    for each, keys in ((stock, {}), (model, off)):
        with CountOperations() as forward:
            each(**inputs, **keys)
        with CountOperations() as generation:
            each.generate(**inputs, **keys, max_new_tokens=1, do_sample=False)
        counts.append((forward.count, generation.count))
    assert counts[0] == counts[1]


@torch.no_grad()
def test_off_takes_features_that_a_method_can_not_look_behind():
    family = FAMILIES["llava"]
    model, inputs = load_method(family, "scope"), make_inputs(family, [([picture(1)], "What is it?")])
    inputs["vision_feature_layer"] = [-2]
    with pytest.raises(ValueError, match=r"they are of several with vision_feature_layer=\[-2\]"):
        model(**inputs)
    off, stock = model(**inputs, pruning_ratio=0.0), load_stock(family)(**inputs)
    torch.testing.assert_close(off.logits, stock.logits, **EXACT)


@torch.no_grad()
def test_features_encoded_by_hand_can_be_pruned():
    """Whatever the config's ratio is while they are encoded."""
    family = FAMILIES["llava"]
    model, inputs = load_method(family, "scope", pruning_ratio=0.0), make_inputs(family, [([picture(1)], "What is it?")])
    pixels = inputs.pop("pixel_values")
    encoded = {"image": model.get_image_features(pixels, return_dict=True)}
    found = model(**inputs, mm_encoder_outputs=encoded, pruning_ratio=0.8)
    expected = model(**inputs, pixel_values=pixels, pruning_ratio=0.8)
    torch.testing.assert_close(found.logits, expected.logits, **EXACT)


# Stages and positions


def deep_llava():
    """A tiny LLaVA whose decoder has as many layers as BTP has use for."""
    config = copy.deepcopy(load_pruned(FAMILIES["llava"]).config)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 8, None
    torch.manual_seed(0)
    return spread_weights(type(load_pruned(FAMILIES["llava"]))(config).eval())


def test_stages_that_end_without_the_image():
    """BTP drops all in the end: counts of each layer, its mean, and decoding on what is left."""
    model, rows = deep_llava(), [([], "Hi."), *ROWS[1:]]
    model.config.pruning_method, model.config.pruning_ratio = "btp", 0.856
    inputs = make_inputs(FAMILIES["llava"], rows)
    cached = generate(model, inputs)
    record = cache_of(cached).pruning_record
    num_visual, counts = 36, [[layer for layer, _ in image.stages] for image in record]
    assert counts == [[1, 2, 4, 6]] * 3
    lengths = [layer.keys.shape[2] for layer in cache_of(cached).layers]
    text = lengths[7]
    for image in record:
        kept = [len(order) for _, order in image.stages]
        assert kept[-1] == 0 == image.num_kept and kept == sorted(kept, reverse=True)
        assert image.mean_kept(8) == (kept[0] + 2 * kept[1] + 2 * kept[2]) / 7
        assert image.mean_kept(8, first=0) == (num_visual + kept[0] + 2 * kept[1] + 2 * kept[2]) / 8
        assert abs(image.mean_kept(8) - 0.144 * num_visual) < 1
        assert len(load_processor_of("llava").draw_kept_tokens(picture(1), PruningRecord((replace(image, image=0),)))) == 1
    num_new = cached.sequences.shape[1] - inputs["input_ids"].shape[1] - 1  # the last has not been fed
    images_of = [[image for image in record if image.row == row] for row in range(len(rows))]
    text_of = inputs["attention_mask"].sum(1) - num_visual * torch.tensor([len(images) for images in images_of]) + num_new

    def longest_row(stage):
        kept = [sum(len(image.stages[stage][1]) for image in images) for images in images_of]
        return int((text_of + torch.tensor(kept)).max())

    first, second, third = map(longest_row, range(3))
    assert lengths[1:] == [first, second, second, third, third, text, text] and text == text_of.max()
    assert first > second > text  # the row of two images is the longest there
    uncached = generate(model, inputs, use_cache=False)
    torch.testing.assert_close(step_logits(cached), step_logits(uncached), **CLOSE)


def test_a_calibration_is_that_of_the_family_unless_it_is_set():
    for family, schedule in (("qwen2_5_vl", "qwen2_5_vl"), ("llava_onevision", "llava")):
        assert load_method(FAMILIES[family], "btp").config.pruning_settings().parameters.schedule == schedule
    config = load_method(FAMILIES["qwen2_5_vl"], "btp", pruning_schedule="llava").config
    assert config.pruning_settings().parameters.schedule == "llava"
    assert "pruning_schedule" not in load_method(FAMILIES["qwen2_5_vl"], "fastv").config.to_dict()


def load_processor_of(name):
    family = FAMILIES[name]
    return family.processor_class.from_pretrained(small_checkpoint(family))


@pytest.mark.parametrize("name", ["divprune", "fastv", "pyramiddrop"])
def test_packed_positions_count_kept_tokens_alone(name):
    """The layers from a stage on see what they would of a prompt that never had the dropped tokens; also when decoding."""
    family = FAMILIES["llava"]
    model = load_method(family, name, pruning_positions="packed")
    inputs = make_inputs(family, ROWS)
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module.layer_idx, kwargs["position_embeddings"])), with_kwargs=True
        )
        for layer in model.get_decoder().layers
    ]
    packed = generate(model, inputs, max_new_tokens=3)
    for hook in hooks:
        hook.remove()
    record, rotary = cache_of(packed).pruning_record, model.get_decoder().rotary_emb
    calls = [seen[start : start + 4] for start in range(0, len(seen), 4)]
    length = inputs["attention_mask"].sum(1)
    for layer in range(4):
        dropped = torch.tensor(
            [sum(image.num_visual - dict_at(image, layer) for image in record if image.row == row) for row in range(len(ROWS))]
        )
        for step, call in enumerate(calls):
            number, (cos, sin) = call[layer]
            assert number == layer
            last = (length - dropped - 1 + step)[:, None]
            expected = rotary(torch.zeros(1), last)
            torch.testing.assert_close(cos[:, -1:].expand(len(ROWS), -1, -1), expected[0])
            torch.testing.assert_close(sin[:, -1:].expand(len(ROWS), -1, -1), expected[1])
        count = int((length - dropped)[1])
        cos = calls[0][layer][1][0]
        if count < int(length[1]):  # all positions of a row, one after another
            torch.testing.assert_close(cos[1, -count:], rotary(torch.zeros(1), torch.arange(count)[None])[0][0])
    for number, row in enumerate(ROWS):
        single = generate(model, make_inputs(family, [row]), max_new_tokens=3)
        torch.testing.assert_close(step_logits(packed)[number], step_logits(single)[0], **CLOSE)
    original = generate(load_method(family, name), inputs, max_new_tokens=3)
    assert not torch.allclose(step_logits(original), step_logits(packed), atol=1e-2)


def dict_at(image, layer):
    """How many tokens of an image a layer sees."""
    return ([image.num_visual] + [len(order) for at, order in image.stages if at <= layer])[-1]


def test_packed_positions_are_refused_with_three_axes():
    model = load_method(FAMILIES["qwen2_vl"], "fastv", pruning_positions="packed")
    with pytest.raises(ValueError, match=r"pruning_positions='packed'.*M-RoPE"):
        model.config.pruning_settings()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", WITH_TOWER, ids=lambda family: family.name)
def test_what_the_tower_attends_to_equals_its_eager_maps(family, attn, monkeypatch):
    """Of one picture in tiles and of two; and with no more than a few rows of a map at a time."""
    model = copy.deepcopy(load_pruned(family, attn=attn))
    model.config.pruning_method = LOOKING_AT_TOWER[0]
    for pictures in ([picture(1)], [picture(1), picture(2, 200, 300)]):
        inputs = make_inputs(family, [(pictures, "What?")])
        names = [name for name in inputs if name.startswith(("pixel", "image_", "batch_num"))]
        with torch.no_grad():
            record = model(**inputs).pruning_record
            expected, _ = tower_by_hand(family, inputs, record)
            for weights in (2**25, 1000):
                monkeypatch.setattr(tower_signals, "WEIGHTS_AT_ONCE", weights)
                encoded = model.model._encode({name: inputs[name] for name in names})["image"].pooler_output
                grids = [
                    features.tower.of(view.token_indices())
                    for features in features_of_images(encoded)
                    for view in model.model.grid_views_of("image", features)
                ]
                for signals, parts in zip(grids, expected, strict=True):
                    found = signals.attention, signals.states, signals.keys
                    for part, of_tower in zip(parts, found, strict=True):
                        np.testing.assert_allclose(array(of_tower), part, rtol=1e-4, atol=1e-5 * np.abs(part).max())
                    assert signals.attention.std() > 0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_frame_of_a_video_attends_to_itself(family):
    """Twice the same frame: each looks as the picture does alone."""
    family = FAMILIES[family]
    model = load_method(family, LOOKING_AT_TOWER[0])
    inputs = make_inputs(family, [([picture(1)], "What?")])
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        (alone,) = model.get_image_features(pixels, grid).pooler_output
        twice = torch.cat([pixels, pixels]), grid * torch.tensor([2, 1, 1])
        (video,) = model.get_video_features(*twice).pooler_output
    torch.testing.assert_close(video.tower.attention.view(2, -1), alone.tower.attention.expand(2, -1))
    torch.testing.assert_close(video.tower.keys, alone.tower.keys.repeat(2, 1))
    torch.testing.assert_close(video.tower.states, alone.tower.states.repeat(2, 1))


def test_a_tower_that_nobody_describes_is_refused(monkeypatch):
    family = FAMILIES["llava_onevision"]
    model, processor = load_method(family, "scope"), load_processor(family)
    video = processor(videos=[clip(1, 4)], text=[prompt(processor, 0, num_videos=1)], return_tensors="pt")
    with pytest.raises(ValueError, match=r"The video features of shape .* Videos of LLaVA never tell"):
        model(**video)
    model, inputs = load_method(FAMILIES["llava"], "scope"), make_inputs(FAMILIES["llava"], ROWS[1:2])
    monkeypatch.setattr(type(model.model), "tower_blocks", PrunedModelMixin.tower_blocks)
    with pytest.raises(
        ValueError, match=r"pruning_method 'scope' .*vlmpruner_llava model with a tower of type 'clip_vision_model'"
    ):
        model(**inputs)
    with pytest.raises(ValueError, match="pruning_method 'scope' looks at the attention in the vision tower"):
        type(model)(model.config)
    assert model(**inputs, pruning_ratio=0.0).pruning_record is None


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_that_ends_with_an_image_keeps_its_last_token(name):
    """Generation goes on from there."""
    family = FAMILIES["llava"]
    model = load_method(family, name)
    inputs = make_inputs(family, [([picture(1)], "What?"), ([picture(2)], "What is in this picture?")])
    ends = (inputs["input_ids"] == model.config.image_token_id).nonzero()[:, 1].view(2, -1)[:, -1]
    cut = {key: inputs[key].clone() for key in ("input_ids", "attention_mask")}
    for row, end in enumerate(ends.tolist()):
        cut["attention_mask"][row, end + 1 :] = 0
    with torch.no_grad():
        record = model(**cut, pixel_values=inputs["pixel_values"]).pruning_record
    for image in record:
        assert image.num_visual - 1 in image.order.tolist()
        assert len(image.order) < image.num_visual


# docs/methods.md


DOCUMENT = Path(pruning_methods.__file__).parent / "docs" / "methods.md"


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """This repo's code with the example that the document adds, as a package of its own."""
    code, imported, line, oracle = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    folder = tmp_path / "with_example"
    folder.mkdir()
    for path in DOCUMENT.parent.parent.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "method_outliers.py").write_text(code)
    registry = folder / "pruning_methods.py"
    first, rest = registry.read_text().split("from .method_prunesid", 1)
    rest, last = rest.split('    "random"', 1)
    registry.write_text(f'{first}{imported}from .method_prunesid{rest}{line}    "random"{last}')
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("with_example.modeling_vlmpruner_llava"), oracle
    for name in [name for name in sys.modules if name.startswith("with_example")]:
        del sys.modules[name]


def test_the_documented_example_works(documented):
    module, oracle = documented
    namespace = vars(method_oracles).copy()
    exec(oracle, namespace)
    family = FAMILIES["llava"]
    keys = {"pruning_method": "outliers", "pruning_center_weight": 0.5, "pruning_ratio": 0.9}
    model = module.VLMPrunerLlavaForConditionalGeneration.from_pretrained(small_checkpoint(family), **keys).eval()
    inputs = make_inputs(family, [([picture(1)], "What is it?")])
    with torch.no_grad():
        (image,) = model(**inputs).pruning_record
        features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    facts = method_oracles.Image(num_keep=4, hidden_states=array(features))
    assert image.order.tolist() == namespace["outliers"](facts, 0.5)
    with pytest.raises(ValueError, match=r"pruning_center_weight is set to 0.5, but .*belongs to outliers"):
        model.config.pruning_method = "fastv"
        model.config.pruning_settings()


# What a column says of a method -> what of the method says so
LOOKS_AT = {
    "keys": "keys",
    "attention": "last token's attention(?!.*itself)",
    "own_attention": "last token's attention in the pruned layer itself",
    "text": "text",
    "tower": "vision tower",
}


def tables_of_methods():
    """Each table of the document whose first column is the method: the cells behind it, by method."""
    tables = []
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "`pruning_method`":
            tables.append({})
        elif line.startswith("| `"):
            tables[-1][cells[0].strip("`")] = cells[1:]
    return tables


@pytest.mark.once
def test_the_tables_of_the_document_are_what_the_registry_says():
    first, choice = tables_of_methods()
    assert [*first] == [*METHODS, "none"] and [*choice] == [*METHODS]
    for name, method in METHODS.items():
        made = method(method.Parameters(), 2, 32)
        _, prunes_at, looks_at, merges, own_keys = first[name]
        layers = made.stage_layers()
        if len(layers) == 1:
            assert prunes_at == {0: "layer 0", 2: "`pruning_layer`"}[layers[0]]
        else:
            numbers = [int(number) for number in re.findall(r"\d+", prunes_at)]
            assert numbers == ([layers[0], layers[-1]] if " to " in prunes_at else [*layers])
        found = {signal for signal, pattern in LOOKS_AT.items() if re.search(pattern, looks_at)}
        assert found == made.looks_at, name
        assert (merges == "yes") == made.has_merge
        if name != "vlm_pruner":
            assert re.findall(r"`(\w+)`", own_keys) == [field.name for field in fields(method.Parameters)]

        tokens, depends, _, later = choice[name]
        ends = (*layers[1:], 32)
        held = sum((end - start) * kept for start, end, kept in zip(layers, ends, made.counts(576, 64), strict=True))
        assert int(tokens.split()[0]) == round((layers[0] * 576 + held) / 32)
        assert ("or more" in tokens) == (not made.counts_are_known)
        sees_text = bool(made.looks_at & {"text", "attention", "own_attention"})
        assert (depends, later) == (("yes", "answers the earlier question") if sees_text else ("no", "stays as it is"))


@pytest.mark.once
def test_the_documented_ratio_has_the_mean_that_it_is_for():
    for name, first_layer, mean in (("divprune", 0, 96), ("fastv", 2, 96), ("btp", 3, 150), ("pyramiddrop", 8, 200)):
        method = METHODS[name](METHODS[name].Parameters(), 2, 32)
        ratio = 1 - (mean * 32 - first_layer * 576) / ((32 - first_layer) * 576)
        layers = method.stage_layers()
        counts = method.counts(576, round(576 * (1 - ratio)))
        widths = np.diff((*layers, 32))
        assert layers[0] == first_layer and abs((first_layer * 576 + np.dot(widths, counts)) / 32 - mean) < 1


def test_packed_positions_go_on_in_a_later_turn():
    """A second image on a cache is where it would be with both turns in one piece."""
    family = FAMILIES["llava"]
    model = load_method(family, "divprune", pruning_positions="packed")
    first, second = (make_inputs(family, [([picture(seed)], "What is it?")]) for seed in (1, 2))
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        turn = model(**later_turn(first, second), **{CACHE_NAME: cache})
        whole = model(**join_turns(first, second))
        step = [model(input_ids=torch.tensor([[9]]), **{CACHE_NAME: cache_of(outputs)}) for outputs in (turn, whole)]
    torch.testing.assert_close(turn.logits, whole.logits[:, first["input_ids"].shape[1] :], **CLOSE)
    torch.testing.assert_close(step[0].logits, step[1].logits, **CLOSE)


def test_crop_where_no_layer_holds_all_tokens():
    """M-RoPE positions go by the full sequence, which a cache pruned at layer 0 has in no layer."""
    family = FAMILIES["qwen2_vl"]
    model, tokens = load_method(family, "divprune"), torch.tensor([[7, 8, 9, 10, 11]])
    first, second = (make_inputs(family, [([picture(seed)], "What is it?")]) for seed in (1, 2))
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        reference = model(input_ids=tokens, **{CACHE_NAME: copy.deepcopy(cache)}).logits
        length = int(cache.get_seq_length())
        model(**later_turn(first, second), **{CACHE_NAME: cache})
        assert int(cache.get_seq_length()) == length + second["input_ids"].shape[1]
        cache.crop(length - int(cache.get_seq_length()))
        assert int(cache.get_seq_length()) == length > cache.layers[0].get_seq_length()
        torch.testing.assert_close(model(input_ids=tokens, **{CACHE_NAME: cache}).logits, reference, **CLOSE)
        cache.crop(-3)
        torch.testing.assert_close(model(input_ids=tokens[:, 2:], **{CACHE_NAME: cache}).logits, reference[:, 2:], **CLOSE)
