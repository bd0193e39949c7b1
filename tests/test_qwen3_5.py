"""What is Qwen3.5's own: layers with a recurrent state between those with keys, where tokens can leave, and experts."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture
from test_families import later_turn, lengths_of, needs_crop, supervised
from test_methods import by_hand, load_method
from transformers import DynamicCache, StaticCache
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from vlmpruner import pruned_decoder
from vlmpruner.configuration_vlmpruner import VLMPrunerQwen3_5Config
from vlmpruner.modeling_vlmpruner_qwen3_5 import VLMPrunerQwen3_5ForConditionalGeneration
from vlmpruner.pruned_cache import CACHE_NAME, cache_of
from vlmpruner.recurrent_rows import row_runs


CLOSE = {"rtol": 0, "atol": 1e-4}
DENSE, EXPERTS = FAMILIES["qwen3_5"], FAMILIES["qwen3_5_moe"]
HYBRIDS = pytest.mark.parametrize("family", [DENSE, EXPERTS], ids=lambda family: family.name)
LINEAR, FULL = "linear_attention", "full_attention"


# In float64: the stock classes compute parts in float32 whatever they are given


def delta_rule(query, key, value, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True, **_):
    """The gated delta rule one token after another, as arXiv 2412.06464 has it (eq. 10), in the precision of its inputs."""
    assert use_qk_l2norm_in_kernel
    heads = value.shape[2] // key.shape[2]
    query, key = (each.repeat_interleave(heads, dim=2) for each in (query, key))
    query, key = (each * torch.rsqrt((each * each).sum(-1, keepdim=True) + 1e-6) for each in (query, key))
    batch, length, count, size = key.shape
    state = value.new_zeros(batch, count, size, value.shape[-1]) if initial_state is None else initial_state.to(value)
    outputs = []
    for step in range(length):
        k, v, rate = key[:, step, :, :, None], value[:, step, :, None], beta[:, step, :, None, None]
        state = g[:, step].exp()[..., None, None] * state
        state = state + rate * k * (v - (k * state).sum(2, keepdim=True))
        outputs.append((query[:, step, :, :, None] / math.sqrt(size) * state).sum(2))
    return torch.stack(outputs, 1), state if output_final_state else None


def gated_norm(module, hidden_states, gate=None):
    scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * hidden_states * scale * torch.nn.functional.silu(gate)


@pytest.fixture
def in_float64(monkeypatch):
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(modeling_qwen3_5, name, delta_rule)
    monkeypatch.setattr(modeling_qwen3_5.Qwen3_5RMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


EXACTLY = {"rtol": 0, "atol": 1e-9}


def double(model):
    return copy.deepcopy(model).double()


def in_double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


TURNS = [
    [
        ([picture(1)], "What?"),
        ([picture(2, 200, 160), picture(3, 120, 90)], "What is in these pictures, then?"),
        ([], "Hello."),
    ],
    [([picture(4, 160, 120)], "And in this one, what do you see?"), ([], "Why?"), ([picture(5, 100, 200)], "This?")],
    [([], "Tell me a good deal more about it, please."), ([], "Who?"), ([], "And where is it?")],
]


def play(model, turns, side="left"):
    """Logits of the tokens of every turn and of two decoded ones, for each row. The caller's mask has padding in all turns."""
    cache = DynamicCache(config=model.config)
    mask, found = torch.zeros(len(turns[0]), 0, dtype=torch.long), []
    for turn in turns:
        inputs = in_double(make_inputs(DENSE, turn, padding_side=side))
        mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
        logits = model(**{**inputs, "attention_mask": mask}, **{CACHE_NAME: cache}).logits
        found.append([row[is_token.bool()] for row, is_token in zip(logits, inputs["attention_mask"], strict=True)])
    for token in (9, 10):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
        tokens = torch.full((len(mask), 1), token)
        found.append(model(input_ids=tokens, attention_mask=mask, **{CACHE_NAME: cache}).logits)
    return [torch.cat(rows) for rows in zip(*found, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["vlm_pruner", "divprune"])
def test_turns_of_a_padded_batch_equal_single_rows(in_float64, side, method):
    """Rows of different length in every turn, padded by the caller on either side, and by packing."""
    model = double(load_pruned(DENSE))
    model.config.pruning_method = method
    together = play(model, TURNS, side)
    for row in range(3):
        (alone,) = play(model, [[turn[row]] for turn in TURNS])
        torch.testing.assert_close(together[row], alone, **EXACTLY)


@torch.no_grad()
def test_padding_between_tokens_does_change_a_state(in_float64, monkeypatch):
    """Why rows run on their tokens alone: with the stock class's masks, which zero inputs, rows are not as they are alone."""
    monkeypatch.setattr(pruned_decoder, "row_runs", lambda *args: None)
    model = double(load_pruned(DENSE))
    together = play(model, TURNS)
    (alone,) = play(model, [[turn[1]] for turn in TURNS])
    assert (together[1] - alone).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_padded_turn_in_a_cache_equals_one_piece(in_float64, kind):
    """Cached equals uncached, for a batch whose rows keep different numbers of tokens in both turns."""
    model = double(load_pruned(DENSE))
    first, second = (in_double(make_inputs(DENSE, turn[:2])) for turn in TURNS[:2])
    total = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=total + 2)
    )
    model(**first, **{CACHE_NAME: cache})
    turn = model(**later_turn(first, second), **{CACHE_NAME: cache})
    of_tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    whole = {name: torch.cat([first[name], second[name]], dim=1) for name in of_tokens}
    # Pictures in order of rows: that of the first row's second turn comes before those of the second row.
    grids = [*first["image_grid_thw"][:1], *second["image_grid_thw"], *first["image_grid_thw"][1:]]
    pixels = first["pixel_values"].split(first["image_grid_thw"].prod(1).tolist())
    whole["pixel_values"] = torch.cat([pixels[0], second["pixel_values"], *pixels[1:]])
    whole["image_grid_thw"] = torch.stack(grids)
    one_piece = model(**whole, use_cache=False)
    is_token = second["attention_mask"].bool()
    length = second["input_ids"].shape[1]
    torch.testing.assert_close(turn.logits[is_token], one_piece.logits[:, -length:][is_token], **EXACTLY)
    assert len(cache.pruning_record) == 4
    lengths = lengths_of(cache)
    if kind == "dynamic":
        assert set(lengths) == {3, 7} and lengths[3] == total > lengths[7]


# Runs of rows


def runs(is_token, has_past):
    found = row_runs(torch.tensor(is_token, dtype=torch.bool), has_past, torch.device("cpu"))
    if found is None:
        return None
    return [tuple(None if part is None else part.int().tolist() for part in (run.rows, run.columns, run.mask)) for run in found]


def test_rows_run_as_they_are_where_no_padding_is_behind_a_token():
    assert row_runs(None, True, torch.device("cpu")) is None
    assert runs([[1, 1], [1, 1]], True) is None
    assert runs([[0, 1], [1, 1]], False) is None
    assert runs([[1, 0], [0, 1]], False) == [(None, [[0], [1]], [[1], [1]])]
    assert runs([[1, 0, 1], [0, 0, 1]], False) == [(None, [[0, 2], [1, 2]], [[1, 1], [0, 1]])]
    assert runs([[0, 1], [1, 0]], True) == [(None, [[1], [0]], None)]
    assert runs([[0, 1], [1, 1], [0, 0], [1, 0]], True) == [([0, 3], [[1], [0]], None), ([1], [[0, 1]], None)]


# Where tokens can leave


def config_of(layer_types, **keys):
    text = {"num_hidden_layers": len(layer_types), "layer_types": list(layer_types)}
    return VLMPrunerQwen3_5Config(text_config=text, **keys)


DEEP = ([LINEAR] * 3 + [FULL]) * 8


def test_the_default_layer_is_the_first_above_keys():
    assert config_of(DEEP).pruning_layer == 4 == VLMPrunerQwen3_5Config().pruning_layer
    assert config_of([LINEAR, FULL] * 4).pruning_layer == 2
    assert config_of([FULL] * 4).pruning_layer == 1
    assert config_of(DEEP, pruning_layer=8).pruning_settings().layer == 8
    with pytest.raises(ValueError, match=r"pruning_layer must be an integer from 1 to 31 .*got None"):
        late = config_of(DEEP)
        late.pruning_layer = None
        late.pruning_settings()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pruning_layer": 2}, r"'vlm_pruner' prunes at pruning_layer=2 .*keys of layer 1, .*could prune at \[4, 8, 12"),
        ({"pruning_layer": 5, "pruning_method": "fastv"}, r"'fastv' prunes at pruning_layer=5 .*keys of layer 4, .*\[4, 8, 12"),
        ({"pruning_layer": 3, "pruning_method": "dart"}, r"'dart' prunes at pruning_layer=3 .*layer 2, .*\[4, 8, 12"),
        (
            {"pruning_method": "saint"},
            r"'saint' prunes at layers \[8, 9.*keys of layer 8, .*\[4, 8, 12.*another pruning_method",
        ),
        (
            {"pruning_method": "pyramiddrop"},
            r"'pyramiddrop' prunes at layers \[8, 16, 24\] .*attention of layer 8, .*\[3, 7, 11",
        ),
    ],
    ids=str,
)
def test_a_layer_that_looks_at_keys_that_are_not_there_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        config_of(DEEP, **keys)
    assert config_of(DEEP, **keys, pruning_ratio=0.0).pruning_settings() is None


def test_a_decoder_without_keys_above_is_refused():
    assert config_of([LINEAR, FULL, LINEAR, LINEAR], pruning_ratio=0.0).pruning_layer == 2
    with pytest.raises(ValueError, match=r"prunes at pruning_layer=2 and needs a layer with keys from layer 2 on"):
        config_of([LINEAR, FULL, LINEAR, LINEAR])
    with pytest.raises(ValueError, match=r"needs the keys of layer 0, .*could prune at \[\]"):
        config_of([LINEAR] * 4)


def test_other_layers_of_another_hybrid():
    """Full attention in every second layer, pruned at the second layer that can be."""
    config = copy.deepcopy(load_pruned(DENSE).config)
    config.text_config.layer_types, config.pruning_layer = [LINEAR, FULL] * 4, 4
    torch.manual_seed(0)
    model, inputs = VLMPrunerQwen3_5ForConditionalGeneration(config).eval(), make_inputs(DENSE, TURNS[0])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached, uncached = model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)
    lengths = lengths_of(cache_of(cached))
    assert lengths[1] == lengths[3] > lengths[5] == lengths[7]


@torch.no_grad()
def test_keys_in_layer_0_alone(in_float64):
    """Tokens can leave before it; the only layer that counts tokens is then a pruned one."""
    config = copy.deepcopy(load_pruned(DENSE).config)
    config.text_config.layer_types, config.pruning_layer = [FULL, *[LINEAR] * 7], 1
    with pytest.raises(
        ValueError, match=r"pruning_layer=1 and needs a layer with keys from layer 1 on, .* could prune at \[\]"
    ):
        config.pruning_settings()
    config.pruning_method = "divprune"
    torch.manual_seed(0)
    model = double(VLMPrunerQwen3_5ForConditionalGeneration(config))
    together = play(model, TURNS)
    for row in range(3):
        (alone,) = play(model, [[turn[row]] for turn in TURNS])
        torch.testing.assert_close(together[row], alone, **EXACTLY)
    inputs = in_double(make_inputs(DENSE, TURNS[0]))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached, *others = (
        model.generate(**inputs, **options, **keys) for keys in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    )
    for other in others:
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(cached.logits), **EXACTLY)
    assert int(cache_of(cached).get_seq_length()) == inputs["input_ids"].shape[1] + 2 > lengths_of(cache_of(cached))[0]


# Methods


@pytest.mark.parametrize("name", ["fastv", "dart", "divprune", "cdpruner", "visionzip"])
def test_a_method_equals_its_restatement(name):
    """Attention with a gated query and partly rotated heads, keys, text, embeddings: what methods look at is right here too."""
    model = load_method(DENSE, name)
    inputs = make_inputs(DENSE, [([picture(1), picture(2, 200, 300)], "What is in these pictures?")])
    with torch.no_grad():
        outputs = model(**inputs)
        logits, columns, kept_at = by_hand(DENSE, name, inputs, model, outputs.pruning_record)
    assert kept_at == [[image.kept.tolist() for image in outputs.pruning_record]]
    torch.testing.assert_close(outputs.logits[0, columns], logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3, 6])
def test_tokens_can_leave_at_any_layer_by_a_method_that_looks_at_no_keys(layer):
    """Also below all keys, where the first layer that counts tokens is a pruned one. With left padding, and in a later turn."""
    model = load_method(DENSE, "random", pruning_layer=layer)
    first, second = (make_inputs(DENSE, [([picture(1)] * number, text)]) for number, text in ((1, "What?"), (0, "Why?")))
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        first[name] = torch.nn.functional.pad(first[name], (2, 0))
    found = []
    for is_whole in (True, False):
        torch.manual_seed(3)
        turn = later_turn(first, second)
        length = turn["input_ids"].shape[1]
        if is_whole:
            joined = {name: torch.cat([first[name], second[name]], dim=1) for name in second}
            found.append(model(**(dict(first) | joined)).logits[:, -length:])
        else:
            cache = cache_of(model(**first, use_cache=True))
            found.append(model(**turn, **{CACHE_NAME: cache}).logits)
            assert cache.get_seq_length() == turn["attention_mask"].shape[1]
            lengths = lengths_of(cache)
            assert {number: length < cache.get_seq_length() for number, length in lengths.items()} == {3: layer <= 3, 7: True}
    torch.testing.assert_close(*found, **CLOSE)


# What a recurrent state makes impossible, as in the stock class


def same_refusal(family, action, ours: bool):
    model = load_pruned(family) if ours else load_stock(family)
    with pytest.raises(Exception) as refused:
        action(model)
    return type(refused.value), str(refused.value).replace("VLMPruner", "")


@HYBRIDS
@pytest.mark.parametrize("what", ["crop", "select", "repeat", "lookup", "assistant"])
def test_what_a_state_can_not_do_is_refused_as_by_the_stock_class(family, what):
    inputs = make_inputs(family, [([picture(1)], "What is it?")])

    def action(model):
        if what in ("lookup", "assistant"):
            drafted = {"prompt_lookup_num_tokens": 3} if what == "lookup" else {"assistant_model": load_stock(family)}
            return model.generate(**inputs, max_new_tokens=4, **drafted)
        with torch.no_grad():
            cache = cache_of(model(**inputs, use_cache=True))
        before = [int(cache.get_seq_length(layer)) for layer in (3, 7)], getattr(cache, "pruning_record", None)
        try:
            if what == "crop":
                cache.crop(-int(cache.get_seq_length()))
            elif what == "select":
                cache.batch_select_indices(torch.tensor([0]))
            else:
                cache.batch_repeat_interleave(2)
        finally:
            after = [int(cache.get_seq_length(layer)) for layer in (3, 7)], getattr(cache, "pruning_record", None)
            assert before[0] == after[0] and (before[1] is None or len(before[1]) == len(after[1]))

    assert same_refusal(family, action, ours=True) == same_refusal(family, action, ours=False)
    with pytest.raises(pytest.skip.Exception):
        needs_crop(family)


def test_vllm_is_refused_by_name():
    with pytest.raises(ValueError, match=r"VLMPrunerQwen3_5.*does not serve it"):
        DENSE.pruned_class.is_backend_compatible()


# Experts


def test_router_logits_have_the_length_of_the_call_and_the_loss_counts_what_was_routed():
    """`router_logits` are zero where a token was dropped; the balancing loss is over what each layer routed, by hand here."""
    model, stock = load_pruned(EXPERTS), load_stock(EXPERTS)
    inputs = make_inputs(EXPERTS, TURNS[0])
    labels, config = supervised(inputs), model.config.text_config
    with torch.no_grad():
        outputs = model(**inputs, labels=labels, output_router_logits=True)
        plain = model(**inputs, labels=labels)
        off = model(**inputs, labels=labels, output_router_logits=True, pruning_ratio=0.0)
        expected_off = stock(**inputs, labels=labels, output_router_logits=True)
    torch.testing.assert_close(off.aux_loss, expected_off.aux_loss, rtol=0, atol=0)
    torch.testing.assert_close(off.loss, expected_off.loss)
    is_token = inputs["attention_mask"].bool()
    kept = is_token.clone()
    for image in outputs.pruning_record:
        kept[image.row, image.positions] = False
        kept[image.row, image.positions[image.kept]] = True
    counts, probabilities, total = torch.zeros(config.num_experts), torch.zeros(config.num_experts), 0
    assert len(outputs.router_logits) == config.num_hidden_layers
    for layer, logits in enumerate(outputs.router_logits):
        assert logits.shape == (is_token.numel(), config.num_experts) == expected_off.router_logits[layer].shape
        routed = (kept if layer >= 4 else is_token).flatten()
        if layer >= 4:
            assert torch.equal((logits == 0).all(-1), ~routed)
        share = logits[routed].softmax(-1)
        counts += torch.zeros_like(share).scatter(1, share.topk(config.num_experts_per_tok).indices, 1.0).sum(0)
        probabilities += share.sum(0)
        total += int(routed.sum())
    balance = config.num_experts * (counts / total * probabilities / total).sum()
    torch.testing.assert_close(outputs.aux_loss, balance)
    torch.testing.assert_close(outputs.loss, plain.loss + config.router_aux_loss_coef * balance)
    assert plain.aux_loss is None and plain.router_logits is None
    in_stock_s = modeling_qwen3_5_moe.load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, inputs["attention_mask"]
    )
    assert (in_stock_s - balance).abs() > 1e-3  # which takes zeros for tokens without a preference


def test_the_weights_of_the_draft_head_are_left_out():
    """Public checkpoints hold a multi-token predictor, `mtp.*`, that no class of transformers loads."""
    _, info = DENSE.pruned_class.from_pretrained(DENSE.checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert SimpleNamespace(**info).mismatched_keys in (set(), [])
