"""What must hold for every family: one matrix, which a new family joins through `families.FAMILIES`.

Each family that has code of its own runs all of it. One that is `like` another runs the tests marked `core`: loading, off, the
pruned forward by hand, a ragged batch, decoding with and without a cache, a later turn. The code of both is the same, and what
its config decides shows there. `conftest.py` applies this to tests of other files too.
"""

import copy
import inspect
import re
import threading
import warnings

import pytest
import torch
import transformers
from families import load_processor, load_pruned, load_stock, make_inputs, picture
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer
from transformers.cache_utils import CacheLayerMixin, StaticLayer
from transformers.integrations import flex_attention

from vlmpruner.pruned_cache import CACHE_NAME, cache_of
from vlmpruner.pruned_decoder import projected
from vlmpruner.token_pruning import aggregate_tokens, select_tokens


RATIO = 0.889
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def family(request, monkeypatch):
    monkeypatch.setitem(CLOSE, "atol", request.param.tolerance)
    return request.param


@pytest.fixture
def one_image(family):
    return make_inputs(family, [([picture(1)], "What is in the picture?")])


@pytest.fixture
def rows():
    """Rows with 0, 1 and 3 images of different sizes and texts of different lengths."""
    return [
        ([], "Say something about nothing at all, please."),
        ([picture(1)], "What is in the picture?"),
        ([picture(2), picture(3, 200, 300), picture(4, 500, 200)], "Which one?"),
    ]


def needs_crop(family):
    if family.is_hybrid:
        pytest.skip("a recurrent state can not be cropped, nor its rows copied: test_qwen3_5.py has that refused")


def lengths_of(cache):
    """Number of tokens of each layer of a cache that counts them, by its number."""
    return {number: layer.get_seq_length() for number, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)}


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | kwargs
    return model.generate(**inputs, **kwargs)


def step_logits(outputs):
    return torch.stack(outputs.logits, dim=1)


def kept_sets(record):
    return [(image.row, image.grid, image.kept.tolist()) for image in record]


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


# Off is exact


@pytest.mark.core
@pytest.mark.parametrize("off", [{"pruning_ratio": 0.0}, {"pruning_method": "none"}], ids=["ratio", "method"])
def test_off_is_bit_equal_to_the_stock_class(family, off, rows):
    inputs = make_inputs(family, rows)
    with torch.no_grad():
        ours, stock = load_pruned(family, **off)(**inputs), load_stock(family)(**inputs)
    torch.testing.assert_close(ours.logits, stock.logits, **EXACT)
    assert ours.pruning_record is None
    generated = generate(load_pruned(family, **off), inputs)
    assert type(cache_of(generated)) is DynamicCache
    torch.testing.assert_close(step_logits(generated), step_logits(generate(load_stock(family), inputs)), **EXACT)


def test_text_alone_is_bit_equal_to_the_stock_class(family):
    inputs = make_inputs(family, [([], "Say something."), ([], "Say something else, and say more of it.")])
    ours, stock = generate(load_pruned(family), inputs), generate(load_stock(family), inputs)
    torch.testing.assert_close(step_logits(ours), step_logits(stock), **EXACT)
    assert load_pruned(family).get_pruning_record(ours) is None


def test_off_runs_no_operation_more_than_the_stock_class(family, one_image):
    counts = []
    for model in (load_stock(family), load_pruned(family, pruning_ratio=0.0)):
        with torch.no_grad(), CountOperations() as operations:
            model(**one_image)
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.spread
def test_a_stock_model_in_the_same_process_is_unchanged(family, one_image):
    before = generate(load_stock(family), one_image)
    generate(load_pruned(family), one_image)
    fresh_class = type(load_stock(family))
    assert fresh_class is family.stock_class
    torch.testing.assert_close(step_logits(generate(load_stock(family), one_image)), step_logits(before), **EXACT)


@pytest.mark.between
def test_no_name_that_the_library_deprecates_is_used(family, one_image, monkeypatch):
    """transformers 5.24 calls a cache `cache`, and warns where it comes or is asked for as `past_key_values`."""

    def fail(message):
        raise AssertionError(message)

    monkeypatch.setattr(transformers.utils.generic.logger, "warning_once", fail)
    model = load_pruned(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        outputs = generate(model, one_image, cache_implementation="static")
        assert model.get_pruning_record(outputs) is not None
        outputs = model(**one_image, use_cache=True, labels=one_image["input_ids"])
        model(**later_turn(one_image, one_image), **{CACHE_NAME: cache_of(outputs)})


@pytest.mark.spread
def test_a_cache_may_come_under_its_old_name(family, one_image):
    """`past_key_values`, which is the only name before transformers 5.24."""
    model = load_pruned(family)
    with torch.no_grad():
        for part, tokens in ((model, one_image), (model.model, one_image)):
            cache = DynamicCache(config=model.config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                part(**tokens, past_key_values=cache)
            lengths = lengths_of(cache)
            assert cache.get_seq_length() == tokens["input_ids"].shape[1] > lengths[max(lengths)]
            if CACHE_NAME != "cache":  # as the stock class takes anything, it would be lost without a word
                with pytest.raises(ValueError, match="Pass a cache as `past_key_values`"):
                    part(**tokens, cache=cache)


# What pruning does


def test_pruning_shortens_the_cache_from_its_layer_on(family, one_image):
    model = load_pruned(family)
    with torch.no_grad():
        outputs = model(**one_image, use_cache=True)
    record = outputs.pruning_record
    for image in record:
        assert image.num_kept == max(1, round(image.num_visual * (1 - RATIO))) == len(set(image.kept.tolist()))
        assert sorted(image.order.tolist()) == image.kept.tolist()
    full = one_image["input_ids"].shape[1]
    pruned = full - record.num_visual + record.num_kept
    lengths = lengths_of(cache_of(outputs))
    assert lengths == {number: full if number < family.layer else pruned for number in lengths}
    assert set(lengths.values()) == {full, pruned}
    assert kept_sets(cache_of(outputs).pruning_record) == kept_sets(record)
    assert outputs.logits.shape[:2] == one_image["input_ids"].shape


def test_dropped_tokens_are_zero_and_kept_ones_are_in_place(family, one_image):
    model = load_pruned(family)
    with torch.no_grad():
        outputs = model(**one_image, output_hidden_states=True)
    kept = torch.ones(one_image["input_ids"].shape[1], dtype=torch.bool)
    for image in outputs.pruning_record:
        kept[image.positions] = False
        kept[image.positions[image.kept]] = True
    assert len(outputs.hidden_states) == model.config.get_text_config().num_hidden_layers + 1
    for number, states in enumerate(outputs.hidden_states):
        is_zero = (states[0] == 0).all(-1)
        assert states.shape[:2] == one_image["input_ids"].shape
        assert torch.equal(is_zero, ~kept if number > family.layer else torch.zeros_like(kept))


@pytest.mark.spread
def test_logits_to_keep(family, one_image):
    model = load_pruned(family)
    with torch.no_grad():
        full, last = model(**one_image).logits, model(**one_image, logits_to_keep=3).logits
    torch.testing.assert_close(last, full[:, -3:], **CLOSE)


@pytest.mark.spread
def test_attentions_have_the_length_of_their_layer(family, one_image):
    model = load_pruned(family, attn="eager")
    with torch.no_grad():
        outputs = model(**one_image, output_attentions=True)
    pruned = one_image["input_ids"].shape[1] - outputs.pruning_record.num_visual + outputs.pruning_record.num_kept
    layers = lengths_of(cache_of(outputs))
    for layer, attentions in zip(layers, outputs.attentions, strict=True):
        length = one_image["input_ids"].shape[1] if layer < family.layer else pruned
        assert attentions.shape[-2:] == (length, length)


def test_eager_and_sdpa_agree(family, rows):
    inputs = make_inputs(family, rows)
    reference, outputs = generate(load_pruned(family), inputs), generate(load_pruned(family, attn="eager"), inputs)
    assert kept_sets(cache_of(outputs).pruning_record) == kept_sets(cache_of(reference).pruning_record)
    torch.testing.assert_close(step_logits(outputs), step_logits(reference), **CLOSE)


def test_flex_attention_agrees(family, rows, monkeypatch):
    """In torch's own maths for it. What torch compiles takes half a minute on a CPU, and does not decode there, with the stock
    model either; test_gpu.py runs it."""
    if not family.stock_class._supports_flex_attn:
        with pytest.raises(ValueError, match=r"does not support .*flex_attention"):
            load_pruned(family, attn="flex_attention")
        return
    monkeypatch.setattr(flex_attention, "WrappedFlexAttention", lambda training: lambda: flex_attention.flex_attention)
    inputs = make_inputs(family, rows)
    flex, sdpa = generate(load_pruned(family, attn="flex_attention"), inputs), generate(load_pruned(family), inputs)
    assert kept_sets(cache_of(flex).pruning_record) == kept_sets(cache_of(sdpa).pruning_record)
    torch.testing.assert_close(step_logits(flex), step_logits(sdpa), **CLOSE)


@pytest.mark.core
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_ragged_batch_equals_single_rows(family, rows, attn):
    model = load_pruned(family, attn=attn)
    batch = generate(model, make_inputs(family, rows))
    record = cache_of(batch).pruning_record
    for number, row in enumerate(rows):
        single = generate(model, make_inputs(family, [row]))
        torch.testing.assert_close(step_logits(batch)[number], step_logits(single)[0], **CLOSE)
        single_record = model.get_pruning_record(single) or []
        assert [image.kept.tolist() for image in record if image.row == number] == [i.kept.tolist() for i in single_record]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_forward_of_a_padded_batch_equals_single_rows(family, rows, padding_side):
    model = load_pruned(family)
    inputs = make_inputs(family, rows, padding_side=padding_side)
    with torch.no_grad():
        # With positions as `generate` makes them: rotated keys, and so the first pivot, depend on where a row begins.
        batch = model(**inputs, **positions(inputs, inputs["attention_mask"]))
        for number, row in enumerate(rows):
            single = model(**make_inputs(family, [row])).logits[0]
            is_token = inputs["attention_mask"][number].bool()
            torch.testing.assert_close(batch.logits[number][is_token], single, **CLOSE)


# A prompt that ends with its image


def ends_with_image(family, images):
    """Inputs of one row whose last token belongs to its last image."""
    inputs = make_inputs(family, [(images, "What?")])
    end = int((inputs["input_ids"][0] == load_stock(family).config.image_token_id).nonzero()[-1]) + 1
    per_token = {"input_ids", "attention_mask", "mm_token_type_ids"}
    return {name: value[:, :end] if name in per_token else value for name, value in inputs.items()}


@pytest.mark.parametrize("config", [{}, {"pruning_method": "random"}, {"pruning_fill_budget": False}], ids=str)
def test_the_last_token_of_a_row_stays(family, config):
    """Its output is the answer's first token: dropped, it came from a zero state, whose logits are all equal."""
    inputs, model = ends_with_image(family, [picture(1), picture(2, 200, 300)]), load_pruned(family, **config)
    with torch.no_grad():
        outputs = model(**inputs)
    for image in outputs.pruning_record:
        assert 1 <= image.num_kept <= max(1, round(image.num_visual * (1 - RATIO)))
    last = outputs.pruning_record.images[-1]
    if last.positions[-1] == inputs["input_ids"].shape[1] - 1:  # else a newline token ends the image
        assert last.num_visual - 1 in last.order
        assert last.num_visual - 1 not in load_pruned(family)(**ends_with_text(family)).pruning_record.images[-1].order
    assert outputs.logits[0, -1].std() > 0.1
    if not config:
        with torch.no_grad():
            logits, columns = forward_by_hand(family, inputs, outputs.pruning_record)
        torch.testing.assert_close(outputs.logits[0, columns], logits, **CLOSE)


def ends_with_text(family):
    return make_inputs(family, [([picture(1), picture(2, 200, 300)], "What?")])


def test_rows_that_end_with_an_image_equal_single_rows(family):
    model, rows = (
        load_pruned(family),
        [ends_with_image(family, [picture(1)]), ends_with_image(family, [picture(2), picture(3)])],
    )
    length = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for name in rows[0]:
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            padded = [torch.nn.functional.pad(row[name], (length - row[name].shape[1], 0)) for row in rows]
            batch[name] = torch.cat(padded)
        elif name == "pixel_attention_mask" or (name == "pixel_values" and rows[0][name].ndim == 5):
            tiles = max(row[name].shape[1] for row in rows)
            inner = (0, 0) * (rows[0][name].ndim - 2)
            batch[name] = torch.cat(
                [torch.nn.functional.pad(row[name], (*inner, 0, tiles - row[name].shape[1])) for row in rows]
            )
        else:
            batch[name] = torch.cat([row[name] for row in rows])
    together = generate(model, batch)
    for number, row in enumerate(rows):
        alone = generate(model, row)
        torch.testing.assert_close(step_logits(together)[number], step_logits(alone)[0], **CLOSE)
        torch.testing.assert_close(step_logits(alone), step_logits(generate(model, row, use_cache=False)), **CLOSE)


@pytest.mark.spread
def test_speculative_decoding_after_an_image_equals_greedy(family):
    """The first forward has drafted text behind the prompt: the output at the prompt's end decides on it."""
    needs_crop(family)
    model, inputs = load_pruned(family), ends_with_image(family, [picture(1)])
    greedy = generate(model, inputs, max_new_tokens=8).sequences
    drafted = generate(model, inputs, max_new_tokens=8, assistant_model=load_stock(family)).sequences
    assert torch.equal(drafted, greedy)


# The whole path once more, by hand


def decoder_inputs(family, inputs, stock=None):
    """What the stock model hands to its decoder."""
    captured = {}
    stock = stock or load_stock(family)

    def keep(module, args, kwargs):
        captured.update(kwargs)

    hook = stock.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        stock(**inputs)
    hook.remove()
    return captured


def forward_by_hand(family, inputs, record, stock=None):
    """The pruned forward of one row, layer by layer on the stock model's layers: the logits and the kept columns."""
    stock, given = stock or load_stock(family), decoder_inputs(family, inputs, stock)
    decoder, hidden = stock.get_decoder(), given["inputs_embeds"]
    length = hidden.shape[1]
    positions = given["position_ids"] if given["position_ids"] is not None else torch.arange(length)[None]
    cos, sin = decoder.rotary_emb(hidden, positions[-3:] if positions.ndim == 3 else positions)
    columns, cache = torch.arange(length), DynamicCache(config=decoder.config)
    for number, layer in enumerate(decoder.layers):
        if number == family.layer:
            kept = torch.ones(length, dtype=torch.bool)
            merged_at = []
            for image in record:
                keys = cache.layers[number - 1].keys[0][:, image.positions]
                states = hidden[0, image.positions]
                required = image.num_visual - 1 if image.positions[-1] == length - 1 else None
                selection = select_tokens(states, keys, image.grid, image.num_kept, required=required)
                chosen, merged = selection.kept, aggregate_tokens(states, selection, 0.3)
                assert selection.order.tolist() == image.order.tolist()
                kept[image.positions] = False
                kept[image.positions[chosen]] = True
                merged_at.append((image.positions[chosen], merged))
            for places, merged in merged_at:
                hidden[0, places] = merged
            columns = kept.nonzero()[:, 0]
            hidden, cos, sin = hidden[:, columns], cos[:, columns], sin[:, columns]
        mask = torch.full((len(columns), len(columns)), float("-inf")).triu(1)[None, None]
        if getattr(layer, "block_type", None) == "linear_attention":
            mask = None  # one row has no padding
        hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), **{CACHE_NAME: cache})
        deepstack = given.get("deepstack_visual_embeds") or []
        if number < len(deepstack):
            added = torch.zeros(length, hidden.shape[-1])
            added[given["visual_pos_masks"][0]] = deepstack[number]
            hidden = hidden + added[columns]
    return stock.lm_head(decoder.norm(hidden))[0], columns


@pytest.mark.core
def test_pruned_forward_equals_one_by_hand(family):
    inputs = make_inputs(family, [([picture(1), picture(2, 200, 300)], "What is in these pictures?")])
    with torch.no_grad():
        outputs = load_pruned(family)(**inputs)
        logits, columns = forward_by_hand(family, inputs, outputs.pruning_record)
    torch.testing.assert_close(outputs.logits[0, columns], logits, **CLOSE)


def test_keys_that_methods_look_at_are_those_of_the_cache(family, one_image):
    """Each family rotates heads in its own way: halves or pairs, whole or in part."""
    stock, seen = load_stock(family), {}
    cache, layers = DynamicCache(config=stock.config), stock.get_decoder().layers
    number = next(number for number, layer in enumerate(layers) if hasattr(layer, "self_attn"))
    hook = layers[number].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(states=args[0], embeddings=kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        stock(**one_image, **{CACHE_NAME: cache})
        hook.remove()
        found = projected(layers[number], "k", seen["states"], seen["embeddings"])
    torch.testing.assert_close(found, cache.layers[number].keys, **CLOSE)


# Cache


@pytest.mark.core
def test_cached_decoding_equals_a_full_forward_at_every_step(family, rows):
    model = load_pruned(family)
    inputs = make_inputs(family, rows)
    cached = generate(model, inputs)
    uncached = generate(model, inputs, use_cache=False)
    torch.testing.assert_close(step_logits(cached), step_logits(uncached), **CLOSE)


@pytest.mark.core
def test_static_cache_equals_dynamic_cache(family, rows):
    model = load_pruned(family)
    inputs = make_inputs(family, rows)
    static = generate(model, inputs, cache_implementation="static")
    assert isinstance(cache_of(static), StaticCache)
    torch.testing.assert_close(step_logits(static), step_logits(generate(model, inputs)), **CLOSE)


@pytest.mark.between
@pytest.mark.spread
def test_compiled_decoding_is_one_graph_for_all_steps_and_requests(family, rows):
    """The library compiles decoding with a static cache; `backend="eager"` traces and guards without a compiler."""
    model = load_pruned(family)
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="eager")
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in (0, 5):
        inputs = make_inputs(family, [*rows[:2], ([picture(seed), picture(3, 200, 300), picture(4, 500, 200)], "Which one?")])
        compiled = generate(model, inputs, **options)
        torch.testing.assert_close(step_logits(compiled), step_logits(generate(model, inputs)), **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.spread
def test_a_prefilled_cache_can_be_copied_and_used_twice(family, one_image):
    needs_crop(family)
    model = load_pruned(family)
    reference = generate(model, one_image)
    with torch.no_grad():
        cache = cache_of(model(**one_image, use_cache=True))
    cache.crop(-1)  # generate feeds the last token of the prompt itself
    text = {"input_ids": one_image["input_ids"], "attention_mask": one_image["attention_mask"]}
    for _ in range(2):
        outputs = generate(model, text | extra_inputs(one_image), **{CACHE_NAME: copy.deepcopy(cache)})
        torch.testing.assert_close(step_logits(outputs), step_logits(reference), **CLOSE)


def extra_inputs(inputs):
    """What a family needs on every call beside ids, mask and pixels."""
    return {name: inputs[name] for name in ("mm_token_type_ids",) if name in inputs}


@pytest.mark.parametrize("ratio", [RATIO, 0.0])
@pytest.mark.parametrize("change", ["select", "reorder", "repeat"])
@pytest.mark.spread
def test_rows_of_a_cache_take_their_state_along(family, rows, change, ratio):
    """Pruned or not: the M-RoPE positions of Qwen models are with the cache in either case."""
    if change != "reorder":
        needs_crop(family)
    model = load_pruned(family, pruning_ratio=ratio)
    inputs = make_inputs(family, rows)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)

    def step(cache, order):
        places = {} if "mm_token_type_ids" in inputs else {"position_ids": mask[order].sum(1, keepdim=True) - 1}
        tokens = torch.full((len(order), 1), 9)
        return model(input_ids=tokens, attention_mask=mask[order], **{CACHE_NAME: cache}, **places).logits

    with torch.no_grad():
        cache = cache_of(model(**inputs, **positions(inputs, inputs["attention_mask"]), use_cache=True))
        expected, record = step(copy.deepcopy(cache), [0, 1, 2]), getattr(cache, "pruning_record", ())
        if change == "select":
            order = [2, 0]
            cache.batch_select_indices(torch.tensor(order))
        elif change == "reorder":
            order = [1, 2, 0]
            cache.reorder_cache(torch.tensor(order))
        else:
            order = [0, 0, 1, 1, 2, 2]
            cache.batch_repeat_interleave(2)
        torch.testing.assert_close(step(cache, order), expected[order], **CLOSE)
    assert bool(record) == (ratio > 0)
    record_after = cache.pruning_record if record else ()
    moved = [[image.kept.tolist() for image in record_after if image.row == row] for row in range(len(order))]
    assert moved == [[image.kept.tolist() for image in record if image.row == row] for row in order]


@pytest.mark.parametrize("ratio", [RATIO, 0.0])
@pytest.mark.spread
def test_beams_on_a_repeated_prefilled_cache(family, one_image, ratio):
    needs_crop(family)
    model = load_pruned(family, pruning_ratio=ratio)
    with torch.no_grad():
        cache = cache_of(model(**one_image, use_cache=True))
    cache.crop(-1)
    cache.batch_repeat_interleave(3)
    text = {"input_ids": one_image["input_ids"], "attention_mask": one_image["attention_mask"]} | extra_inputs(one_image)
    beams = {"num_beams": 3, "num_return_sequences": 3, "pad_token_id": 0}
    prefilled = generate(model, text, **{CACHE_NAME: cache}, **beams)
    assert torch.equal(prefilled.sequences, generate(model, one_image, **beams).sequences)


@pytest.mark.parametrize("ratio", [RATIO, 0.0])
@pytest.mark.spread
def test_a_reset_cache_is_as_a_new_one(family, one_image, ratio):
    num_rows = 1 if family.is_hybrid else 2  # an emptied recurrent state keeps its size
    rows = [([picture(5, 300, 200)], "Who?")] * num_rows
    model, other = load_pruned(family, pruning_ratio=ratio), make_inputs(family, rows)
    token = {"input_ids": torch.full((num_rows, 1), 9)}
    with torch.no_grad():
        cache = cache_of(model(**one_image, use_cache=True))
        cache.reset()
        if cache.get_seq_length() > 0:
            pytest.skip("in the oldest versions, a dynamic cache keeps its length when it is reset")
        fresh = cache_of(model(**other, use_cache=True))
        model(**other, **{CACHE_NAME: cache})
        results = [model(**token, **{CACHE_NAME: each}).logits for each in (cache, fresh)]
    torch.testing.assert_close(*results, **EXACT)


# Decoding modes


@pytest.mark.spread
def test_sampling_with_a_seed_repeats_itself(family, one_image):
    model = load_pruned(family)
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(generate(model, one_image, do_sample=True, num_return_sequences=3).sequences)
    assert torch.equal(*samples)


@pytest.mark.between
@pytest.mark.spread
def test_beam_search_equals_beam_search_without_cache(family, rows):
    model = load_pruned(family)
    inputs = make_inputs(family, rows[1:])
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **kwargs), model.generate(**inputs, **kwargs, use_cache=False))


@pytest.mark.spread
def test_one_beam_of_many_is_no_other_request(family, rows):
    """The record of a beam search names the rows as they stand at the end, two beams for each row of the input."""
    model = load_pruned(family)
    inputs = make_inputs(family, rows[1:])
    beams = cache_of(generate(model, inputs, num_beams=2, num_return_sequences=1)).pruning_record
    greedy = cache_of(generate(model, inputs)).pruning_record
    of_row = {row: [image.kept.tolist() for image in greedy if image.row == row] for row in (0, 1)}
    assert [[image.kept.tolist() for image in beams if image.row == row] for row in range(4)] == [
        of_row[0],
        of_row[0],
        of_row[1],
        of_row[1],
    ]


@pytest.mark.between
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant"])
@pytest.mark.spread
def test_speculative_decoding_equals_greedy(family, one_image, mode, cache):
    needs_crop(family)
    if cache == "static" and not StaticLayer.is_croppable:
        pytest.skip("before transformers 5.24, speculative decoding refuses a static cache")
    model = load_pruned(family)
    greedy = generate(model, one_image, max_new_tokens=12).sequences
    speculative = {"prompt_lookup_num_tokens": 4} if mode == "prompt_lookup" else {"assistant_model": load_stock(family)}
    if cache == "static":  # with room for what is drafted at the end, which 5.24 forgets in prompt lookup
        room = one_image["input_ids"].shape[1] + 12 + 4
        speculative |= {"cache_implementation": "static", "max_cache_len": room}
    outputs = generate(model, one_image, max_new_tokens=12, **speculative)
    assert torch.equal(outputs.sequences, greedy)
    assert isinstance(cache_of(outputs), StaticCache) == (cache == "static")


@pytest.mark.spread
def test_streaming(family, one_image):
    model, processor = load_pruned(family), load_processor(family)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=generate, args=(model, one_image), kwargs={"streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    new_tokens = generate(model, one_image).sequences[0, one_image["input_ids"].shape[1] :]
    assert streamed == processor.tokenizer.decode(new_tokens)


def test_inputs_embeds_instead_of_ids(family, one_image):
    model = load_pruned(family)
    inputs = {name: value for name, value in one_image.items() if name != "input_ids"}
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(one_image["input_ids"])
        embeds, ids = model(**inputs), model(**one_image)
    assert kept_sets(embeds.pruning_record) == kept_sets(ids.pruning_record)
    torch.testing.assert_close(embeds.logits, ids.logits, **CLOSE)


# Chat over turns


def chat_turn(family, images, text):
    """A later turn: the tokens of a prompt of its own, as they follow an earlier answer."""
    return make_inputs(family, [(images, text)])


@pytest.mark.core
@pytest.mark.parametrize("new_images", [0, 1], ids=["text", "image"])
def test_a_later_turn_equals_one_piece(family, new_images):
    """A second turn on the cache equals both turns in one forward: visual tokens attend only backwards, so later tokens change
    no selection, and each image is pruned from the states that its own forward gave."""
    model = load_pruned(family)
    first, second = chat_turn(family, [picture(1)], "What is it?"), chat_turn(family, [picture(2)] * new_images, "And now?")
    joined = join_turns(first, second)
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        turn = later_turn(first, second)
        outputs = model(**turn, **{CACHE_NAME: cache})
        whole = model(**joined)
    assert len(cache.pruning_record) == len(first_record(model, first)) * (1 + new_images)
    assert kept_sets(cache.pruning_record)[0] == kept_sets(whole.pruning_record)[0]
    if new_images:
        assert outputs.pruning_record.images[0].positions[0] >= first["input_ids"].shape[1]
        # Layers above the pruning layer saw the first image whole in one piece as well, so the selections agree.
        assert kept_sets(cache.pruning_record) == kept_sets(whole.pruning_record)
    torch.testing.assert_close(outputs.logits, whole.logits[:, first["input_ids"].shape[1] :], **CLOSE)


def first_record(model, inputs):
    with torch.no_grad():
        return model(**inputs).pruning_record


def join_turns(first, second):
    names = {"input_ids": 1, "attention_mask": 1, "mm_token_type_ids": 1}
    joined = {}
    for name in {**first, **second}:
        parts = [turn[name] for turn in (first, second) if name in turn]
        joined[name] = torch.cat(parts, dim=names.get(name, 0))
    return joined


def later_turn(first, second):
    """The second turn's inputs with the mask of both."""
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    return {**second, "attention_mask": mask, **positions(second, mask)}


def positions(inputs, mask):
    """Positions that count no padding, as `generate` makes them; a model with M-RoPE makes its own."""
    if "mm_token_type_ids" in inputs:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs["input_ids"].shape[1] :]}


def test_later_turns_of_a_padded_batch_equal_single_rows(family):
    model = load_pruned(family)
    firsts = [([picture(1)], "What?"), ([picture(2), picture(3)], "What is in these pictures, then?")]
    seconds = [([picture(4)], "And in this one, what do you see?"), ([], "Why?")]
    with torch.no_grad():
        first, second = make_inputs(family, firsts), make_inputs(family, seconds)
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


@pytest.mark.spread
def test_padding_of_every_turn_stays_masked(family):
    """Text before the first image, images, and text after them, with padding in every turn: each row equals the row alone."""
    model = load_pruned(family)
    turns = [
        [([], "Hello there, I will show you something in a moment."), ([], "Hi.")],
        [([picture(1)], "What?"), ([picture(2), picture(3)], "What is in these pictures, then?")],
        [([], "Tell me a good deal more about it, please."), ([], "Why?")],
    ]

    def play(turns):
        cache, mask = DynamicCache(config=model.config.get_text_config()), torch.zeros(len(turns[0]), 0, dtype=torch.long)
        for turn in turns:
            inputs = make_inputs(family, turn)
            mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
            places = positions(inputs, mask)
            if cache.get_seq_length() == 0:  # text alone: as `generate` would, for M-RoPE as well
                places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            model(**{**inputs, "attention_mask": mask, **places}, **{CACHE_NAME: cache})
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
        places = {} if "mm_token_type_ids" in inputs else {"position_ids": mask.sum(1, keepdim=True) - 1}
        step = torch.full((len(mask), 1), 9)
        return model(input_ids=step, attention_mask=mask, **{CACHE_NAME: cache}, **places).logits

    with torch.no_grad():
        batch = play(turns)
        for row in range(2):
            torch.testing.assert_close(batch[row], play([[turn[row]] for turn in turns])[0], **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.spread
def test_crop_back_into_generated_text_and_over_an_image(family, kind):
    needs_crop(family)
    if kind == "static" and not StaticLayer.is_croppable:
        pytest.skip("before transformers 5.24, a static cache can not be cropped")
    model = load_pruned(family)
    first, second = chat_turn(family, [picture(1)], "What is it?"), chat_turn(family, [picture(2)], "And now?")
    tokens = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        room = first["input_ids"].shape[1] + second["input_ids"].shape[1] + 10
        config = model.config
        cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=room)
        model(**first, **{CACHE_NAME: cache})
        reference = model(input_ids=tokens, **{CACHE_NAME: copy.deepcopy(cache)}).logits
        model(input_ids=tokens, **{CACHE_NAME: cache})
        cache.crop(-3)  # into generated text
        torch.testing.assert_close(model(input_ids=tokens[:, 2:], **{CACHE_NAME: cache}).logits, reference[:, 2:], **CLOSE)
        length = int(cache.get_seq_length())
        turn = {**second, "attention_mask": torch.ones(1, length + second["input_ids"].shape[1], dtype=torch.long)}
        model(**turn, **{CACHE_NAME: cache})
        cache.crop(length - cache.get_seq_length())  # over the whole second turn, image included
        cache.crop(-5)
        assert len(cache.pruning_record) == len(first_record(model, first))
        torch.testing.assert_close(model(input_ids=tokens, **{CACHE_NAME: cache}).logits, reference, **CLOSE)
        with pytest.raises(ValueError, match="through image 0"):
            cache.crop(-cache.get_seq_length() + int(cache.pruning_record.images[0].positions[3]))


# Requests do not meet


@pytest.mark.spread
def test_interleaved_requests_do_not_meet(family, one_image):
    model = load_pruned(family)
    other = make_inputs(family, [([picture(5)], "Something else?"), ([], "And that?")])
    token = torch.tensor([[9]])
    with torch.no_grad():
        alone = [cache_of(model(**one_image, use_cache=True))]
        expected = model(input_ids=token, **{CACHE_NAME: alone[0]}).logits
        first = cache_of(model(**one_image, use_cache=True))
        second = cache_of(model(**other, use_cache=True))
        mask = torch.cat([other["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        model(input_ids=token.expand(2, 1), attention_mask=mask, **{CACHE_NAME: second})
        torch.testing.assert_close(model(input_ids=token, **{CACHE_NAME: first}).logits, expected, **EXACT)


@pytest.mark.spread
def test_two_threads_do_not_meet(family):
    model = load_pruned(family)
    inputs = [make_inputs(family, [([picture(seed)], f"Question {seed}?")]) for seed in (1, 2)]
    expected = [generate(model, each).sequences for each in inputs]
    results = {}

    def work(number):
        for _ in range(3):
            results.setdefault(number, []).append(generate(model, inputs[number]).sequences)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(results[number]) == 3 and all(torch.equal(result, expected[number]) for result in results[number])


# Ratio and config


@pytest.mark.spread
def test_ratio_of_one_request_and_changed_config(family, one_image):
    model = copy.deepcopy(load_pruned(family))
    with torch.no_grad():
        assert model(**one_image, pruning_ratio=0.0).pruning_record is None
        half = model(**one_image, pruning_ratio=0.5).pruning_record
        assert half.num_kept == sum(round(image.num_visual * 0.5) for image in half)
        assert kept_sets(cache_of(generate(model, one_image, pruning_ratio=0.5)).pruning_record) == kept_sets(half)
        model.config.pruning_ratio = 0.5
        assert kept_sets(model(**one_image).pruning_record) == kept_sets(half)
        model.config.pruning_method, model.config.pruning_layer = "random", 1
        lengths = lengths_of(cache_of(model(**one_image, use_cache=True)))
        full = one_image["input_ids"].shape[1]
        assert all((length == full) == (number < 1) for number, length in lengths.items())
        model.config.pruning_method, model.config.pruning_layer = "vlm_pruner", family.layer
        for bad in (1.0, -0.1, float("nan"), "0.5", True):
            with pytest.raises(ValueError, match=r"pruning_ratio must be a number in \[0, 1\)"):
                model(**one_image, pruning_ratio=bad)
        with pytest.raises(ValueError, match="pruning_ratio"):
            generate(model, one_image, pruning_ratio=2.0)
        model.config.pruning_token_batch = 0
        with pytest.raises(ValueError, match="pruning_token_batch"):
            model(**one_image)


@pytest.mark.between
@pytest.mark.spread
def test_ratio_of_a_generation_config(family, one_image, tmp_path):
    """Argument before the call's generation config before the model's before the config; also where it comes by position."""
    model = copy.deepcopy(load_pruned(family))

    def ratio(*args, **kwargs):
        inputs = {name: value for name, value in one_image.items() if not args or name != "input_ids"}
        outputs = model.generate(*args, **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **kwargs)
        record = model.get_pruning_record(outputs)
        return pytest.approx(0 if record is None else 1 - record.num_kept / record.num_visual, abs=0.02)

    quarter = GenerationConfig(pruning_ratio=0.75)
    assert ratio() == RATIO
    assert ratio(generation_config=quarter) == 0.75 and ratio(one_image["input_ids"], quarter) == 0.75
    assert ratio(generation_config=quarter, pruning_ratio=0.5) == 0.5
    assert ratio(generation_config=quarter, pruning_ratio=None) == 0.75
    assert ratio(generation_config=GenerationConfig(pruning_ratio=0.0)) == 0
    model.generation_config.pruning_ratio = 0.3
    assert ratio() == 0.3 and ratio(pruning_ratio=0.5) == 0.5 and ratio(generation_config=quarter) == 0.75
    assert quarter.pruning_ratio == 0.75 and model.generation_config.pruning_ratio == 0.3
    model.save_pretrained(tmp_path)  # the library drops the key of such a file when it reads it
    (tmp_path / "generation_config.json").write_text('{"_from_model_config": true, "pruning_ratio": 0.3}')
    model = family.pruned_class.from_pretrained(tmp_path).eval()
    assert ratio() == 0.3 and ratio(pruning_ratio=0.5) == 0.5
    for bad in (7, "half"):
        with pytest.raises(ValueError, match=rf"pruning_ratio must be a number in \[0, 1\).*{bad}"):
            ratio(generation_config=GenerationConfig(pruning_ratio=bad))
    with pytest.raises(ValueError, match="holds pruning_ratio alone, but this one has pruning_preset"):
        ratio(generation_config=GenerationConfig(pruning_preset="fine"))


# Training


def supervised(inputs):
    """Labels for everything that is no image and no padding."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels.masked_fill(labels == load_image_id(inputs), -100)


def load_image_id(inputs):
    return inputs["input_ids"].flatten().mode().values


def test_loss_and_gradient_with_and_without_checkpointing(family, rows):
    inputs = make_inputs(family, rows[1:])
    labels = supervised(inputs)
    gradients = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = copy.deepcopy(load_pruned(family)).train()
        model.enable_input_require_grads()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        outputs = model(**inputs, labels=labels)
        outputs.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
        assert outputs.loss.isfinite()
    tower = [name for name in gradients[0] if "vis" in name]
    assert any(gradients[0][name].abs().max() > 0 for name in tower)
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(
                other[name], gradient, rtol=1e-4, atol=family.tolerance / 100, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_loss_ignores_what_a_dropped_token_would_predict(family, one_image):
    """Placeholders have labels too: where text alone has, it may be that the token before each of them stays."""
    model, labels = load_pruned(family), one_image["input_ids"].clone()
    labels[:, :3] = -100
    with torch.no_grad():
        outputs = model(**one_image, labels=labels)
    kept = torch.ones_like(labels, dtype=torch.bool)
    for image in outputs.pruning_record:
        kept[0, image.positions] = False
        kept[0, image.positions[image.kept]] = True
    counted = kept[:, :-1] & (labels[:, 1:] != -100)
    assert 0 < counted.sum() < (labels[:, 1:] != -100).sum()
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1][counted].float(), labels[:, 1:][counted])
    torch.testing.assert_close(outputs.loss, expected)
    # `Trainer` counts the labels before the model leaves some out; so does who computes the loss elsewhere.
    num_items = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        loss = model(**one_image, labels=labels, num_items_in_batch=num_items).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(model(**one_image, labels=labels, num_items_in_batch=2 * num_items).loss, expected / 2)
    torch.testing.assert_close(model.loss_of_kept_tokens(outputs, labels), expected)
    torch.testing.assert_close(model.loss_of_kept_tokens(outputs, labels, num_items_in_batch=num_items), expected)
    logits, targets = outputs.logits[:, :-1][counted].float(), labels[:, 1:][counted]
    smoothed = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(model.loss_of_kept_tokens(outputs, labels, label_smoothing=0.1), smoothed)


@pytest.mark.parametrize("places", ["last", "indices"])
@pytest.mark.spread
def test_labels_as_long_as_the_logits_that_are_kept(family, one_image, places):
    model, length = load_pruned(family), one_image["input_ids"].shape[1]
    with torch.no_grad():
        whole = model(**one_image)
    image = whole.pruning_record.images[-1]
    first = int(image.positions[-1]) - 3  # some of the image, some text after it
    keep = length - first if places == "last" else torch.arange(first, length)
    labels = one_image["input_ids"][:, first:]
    with torch.no_grad():
        outputs = model(**one_image, labels=labels, logits_to_keep=keep)
    kept = (outputs.logits != 0).any(-1)
    assert outputs.logits.shape[1] == length - first and not kept.all()
    counted = kept[:, :-1]
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1][counted].float(), labels[:, 1:][counted])
    torch.testing.assert_close(outputs.loss, expected)


# Precision, devices, files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_finite(family, rows, dtype):
    model = copy.deepcopy(load_pruned(family)).to(dtype)
    with torch.no_grad():
        outputs = model(**make_inputs(family, rows).to(dtype))
    assert outputs.logits.isfinite().all() and outputs.logits.dtype == dtype


@pytest.mark.parametrize("device", ["cpu", "disk"])
@pytest.mark.spread
def test_offload_by_accelerate_gives_the_same_tokens(family, one_image, tmp_path, device):
    load_pruned(family).save_pretrained(tmp_path / "model")
    decoder = load_pruned(family).get_decoder()
    layers = next(name for name, module in load_pruned(family).named_modules() if module is decoder.layers)
    device_map = {
        name.removesuffix(".weight").removesuffix(".bias"): "cpu" for name, _ in load_pruned(family).named_parameters()
    }
    device_map = {name: place for name, place in device_map.items() if not name.startswith(f"{layers}.")}
    num_layers = load_pruned(family).config.get_text_config().num_hidden_layers
    device_map |= {f"{layers}.{layer}": "cpu" if layer < family.layer else device for layer in range(num_layers)}
    model = family.pruned_class.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    assert torch.equal(generate(model, one_image).sequences, generate(load_pruned(family), one_image).sequences)


def test_layers_are_found_by_the_name_of_the_stock_layer(family):
    """`device_map` and FSDP go by these names: a layer is never split, and wrapping needs no name of ours."""
    model, stock = load_pruned(family), load_stock(family)
    layer, stock_layer = (type(each.get_decoder().layers[0]) for each in (model, stock))
    assert layer is not stock_layer and issubclass(layer, stock_layer) and layer.__name__ == stock_layer.__name__
    assert set(model._no_split_modules) == set(stock._no_split_modules) and layer.__name__ in model._no_split_modules


@pytest.mark.spread
def test_save_and_reload(family, one_image, tmp_path):
    model = load_pruned(family)
    model.save_pretrained(tmp_path)
    reloaded, info = family.pruned_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert reloaded.config.pruning_ratio == RATIO
    assert torch.equal(generate(reloaded.eval(), one_image).sequences, generate(model, one_image).sequences)
    with_code = {"configuration_vlmpruner.py", "token_pruning.py", "pruned_decoder.py"}
    assert with_code <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.core
def test_loading_the_base_checkpoint_reproduces_it_unpruned(family):
    from safetensors.torch import load_file

    expected = load_file(family.checkpoint / "expected.safetensors")
    model, info = family.pruned_class.from_pretrained(family.checkpoint, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    generated, logits = expected.pop("generated"), expected.pop("step_logits")
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in expected.items()}
    with_types = add_token_types(model, inputs)
    outputs = generate(model.eval(), with_types, max_new_tokens=8, min_new_tokens=8, pruning_ratio=0.0)
    assert torch.equal(outputs.sequences, generated)
    torch.testing.assert_close(step_logits(outputs)[0], logits.float(), rtol=0, atol=1e-3)


def add_token_types(model, inputs):
    if "image_grid_thw" not in inputs:
        return inputs
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).int()}


def test_a_missing_weight_fails(family, tmp_path):
    load_pruned(family).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    lacking = f"layers.{family.layer - 1}.self_attn.q_proj.weight"
    dropped = next(name for name in weights if lacking in name)
    del weights[dropped]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 of the weights.*{re.escape(lacking)}"):
        family.pruned_class.from_pretrained(tmp_path)
    _, info = family.pruned_class.from_pretrained(tmp_path, output_loading_info=True)
    (missing,) = info["missing_keys"]
    assert missing.endswith(lacking)


# Wrong input


def test_wrong_input_is_named(family, one_image):
    model = load_pruned(family)
    mask = torch.ones(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"2-D attention_mask.*\(1, 1, 8, 8\)"):
        model(**(one_image | {"attention_mask": mask}))
    with pytest.raises(ValueError, match=r"both pixel_values and mm_encoder_outputs\['image'\]"):
        model.model(**one_image, mm_encoder_outputs={"image": object()})
    fewer = one_image["input_ids"].clone()
    is_image = fewer == model.config.image_token_id
    fewer[0, is_image[0].nonzero()[0]] = 9
    with pytest.raises(ValueError, match="do not match"):
        model(**(one_image | {"input_ids": fewer}))
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        model.get_pruning_record(model.generate(**one_image, max_new_tokens=1))


@pytest.mark.parametrize("ratio", [RATIO, 0.0])
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_placeholders_that_do_not_match_are_named(family, one_image, ratio, way):
    """One too many, one too few, and a stray placeholder of a video: the stock forward's ValueError, whatever comes first."""
    model, ids, config = load_pruned(family, pruning_ratio=ratio), one_image["input_ids"], load_stock(family).config
    is_image = ids[0] == config.image_token_id
    changes = [("Image features", -3, config.image_token_id), ("Image features", int(is_image.nonzero()[0]), 9)]
    if "mm_token_type_ids" in one_image:
        changes.append(("Video features", -3, config.video_token_id))
    for what, place, token in changes:
        inputs = dict(one_image) | {"input_ids": ids.clone()}
        inputs["input_ids"][0, place] = token
        if "mm_token_type_ids" in one_image:
            types = (inputs["input_ids"] == config.image_token_id).int() + 2 * (
                inputs["input_ids"] == config.video_token_id
            ).int()
            inputs["mm_token_type_ids"] = types
        sentence = f"{what} and {what.split()[0].lower()} tokens do not match"
        if family.name == "smolvlm" and ratio == 0:  # the stock class's own, before transformers 5.24
            sentence += "|<image> tokens not divisible by patch_size"
        with pytest.raises(ValueError, match=sentence):
            model(**inputs) if way == "forward" else generate(model, inputs)


def test_pixels_of_an_earlier_turn_are_named(family, one_image):
    model = load_pruned(family)
    with torch.no_grad():
        cache = cache_of(model(**one_image, use_cache=True))
    second = make_inputs(family, [([picture(2)], "And now?")])
    turn = later_turn(one_image, second)
    of_images = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "batch_num_images")
    pixels = {name: value for name, value in one_image.items() if name in of_images}
    both = turn | {name: torch.cat([value, turn[name]]) for name, value in pixels.items()}
    past_length = one_image["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"holds the {past_length} tokens of earlier turns: pass the pixels of new images"):
        model(**both, **{CACHE_NAME: cache})


def test_arguments_by_position_are_the_stock_class_s(family, one_image):
    model, stock = load_pruned(family, pruning_ratio=0.0), load_stock(family)
    for ours, theirs in ((model, stock), (model.model, stock.model)):
        names = list(inspect.signature(theirs.forward).parameters)
        last = min(max(names.index(each) for each in one_image if each in names), 5)
        args = [one_image.get(name) for name in names[: last + 1]]
        rest = {name: value for name, value in one_image.items() if name not in names[: last + 1]}
        with torch.no_grad():
            found, expected = ours(*args, **rest), theirs(*args, **rest)
        torch.testing.assert_close(found[0], expected[0], **EXACT)
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            ours(one_image["input_ids"], input_ids=one_image["input_ids"])


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.spread
def test_packed_sequences_are_refused(family, one_image, with_mask):
    """By positions that restart, beside a mask or without one, and by the lengths that FlashAttention takes."""
    model, length = load_pruned(family), one_image["input_ids"].shape[1]
    inputs = {name: value for name, value in one_image.items() if with_mask or name != "attention_mask"}
    restarting = torch.cat([torch.arange(length - 4), torch.arange(4)])[None]
    if "mm_token_type_ids" in inputs:
        restarting = restarting.expand(4, 1, -1)
    with pytest.raises(ValueError, match="position_ids restart within a row"):
        model(**inputs, position_ids=restarting)
    with pytest.raises(ValueError, match="cu_seq_lens_q says that several sequences are packed"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, length - 4, length], dtype=torch.int32))


@pytest.mark.spread
def test_a_prefill_in_chunks_is_refused_with_images_alone(family, one_image):
    model = load_pruned(family)
    with pytest.raises(ValueError, match="prefill_chunk_size=7 cuts images"):
        generate(model, one_image, prefill_chunk_size=7)


@pytest.mark.spread
def test_a_cache_pruned_at_another_layer_is_refused(family, one_image):
    model = copy.deepcopy(load_pruned(family))
    with torch.no_grad():
        cache = cache_of(model(**one_image, use_cache=True))
        model.config.pruning_method, model.config.pruning_layer = "random", 1
        with pytest.raises(ValueError, match=rf"pruning_layer={family.layer}.*pruning_layer=1"):
            model(**later_turn(one_image, one_image), **{CACHE_NAME: cache})
