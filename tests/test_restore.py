"""RESTORE, and attention that counts: its vectors, its invariants, and the whole forward by hand in float64.

`test_methods.py` runs it beside the other methods: against its restatement, in every family and every mode.
"""

import copy

import method_oracles
import numpy as np
import pytest
import torch
from families import FAMILIES, load_pruned, make_inputs, picture
from method_oracles import rope_decay
from test_families import CLOSE, generate, later_turn, positions, step_logits
from test_method_maths import method, waves
from test_methods import ROWS, WITH_THREE_AXES, load_method
from transformers import CompileConfig

from vlmpruner.attention_correction import additive_masks, distance_term
from vlmpruner.configuration_vlmpruner import VLMPrunerLlavaConfig
from vlmpruner.method_holov import HoloV
from vlmpruner.method_restore import anchored
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaModel
from vlmpruner.pruned_cache import CACHE_NAME, cache_of
from vlmpruner.pruning_method import StageTokens, TowerSignals


LLAVA = FAMILIES["llava"]
KEPT_BY_HOLOV = [[1], [3], [12], [14]]


# The vectors that a second restatement prints, on inputs made of sines


def test_recorded_anchors():
    features = torch.from_numpy(waves(25, 16)[1:])
    owner = anchored(features, 5)
    groups = [(owner == number).nonzero()[:, 0].tolist() for number in range(5)]
    expected = {0: [8], 1: [13, 20], 10: [2, 5, 9, 17, 18], 11: [3, 4, 6, 12, 19], 22: [7, 14, 15, 16, 21, 23]}
    assert sorted(groups) == sorted(sorted([anchor, *joined]) for anchor, joined in expected.items())


def test_recorded_groups_positions_and_bias():
    features = waves(25, 16)[1:]
    attention = np.abs(np.sin(1.7 * np.arange(24) + 0.3)) + 0.05
    tower = TowerSignals(torch.from_numpy(attention / attention.sum()), *[torch.from_numpy(features)] * 2, None, True)
    restore = method("restore", selector="holov")
    restore.selector = HoloV(HoloV.Parameters(num_crops=4), 0, 32)
    tokens = stage_tokens([features], [8], [False], tower)
    selection = restore.select_batch(tokens)
    owner, sizes = restore._owner(selection, tokens)
    groups = [(owner == number).nonzero()[:, 0].tolist() for number in range(8)]
    merged = [[4, 8, 9, 13, 20], [2, 5, 6, 10, 11, 18, 19], [0, 15, 16, 17], [7, 21, 22, 23]]
    assert sorted(groups) == sorted(KEPT_BY_HOLOV + merged)
    assert selection.kept.tolist() == [1, 3, 9, 10, 12, 14, 15, 21] and sizes.tolist() == [1, 1, 5, 7, 1, 1, 4, 4]
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    places = torch.tensor([[0, 1, *(2 + selection.kept), 26, 27]])
    of_row = torch.ones(1, 12, 2)
    of_row[0, 2:10] = restore.sizes(selection, tokens)
    distance = distance_term(places, torch.ones(1, 12, dtype=torch.bool), None, 28, frequencies)
    own, above = additive_masks(torch.ones(12, 12).tril().bool()[None, None], of_row, torch.float32, distance)
    expected = [0.3601, 0.3512, 0.3444, 0.3464, 1.9313, 2.2589, 0.2927, 0.2915, 1.6722, 1.6021, 0.0294, 0.0]
    np.testing.assert_allclose(above[0, 0, -1], expected, atol=6e-5)
    np.testing.assert_allclose((own - above)[0, 0, -1, 2:10], np.log(3 / sizes.numpy()), atol=1e-6)
    far = torch.tensor([[0, 1, 10, 100, 575]])
    last = distance_term(far - far.max() + 575, torch.ones(1, 1, dtype=torch.bool), None, 576, frequencies)[0, 0]
    np.testing.assert_allclose(last, np.log(2 - rope_decay(575.0 - far[0].numpy())), atol=1e-6)
    np.testing.assert_allclose(rope_decay(far[0].numpy()), [1.0, 0.970214, 0.669063, 0.477241, 0.220736], atol=1e-6)


# What holds for all images


def stage_tokens(features, num_keep, keeps_last, tower=None):
    """Several grids of one row each, before the decoder."""
    sizes = list(map(len, features))
    return StageTokens(
        stage=0,
        hidden_states=torch.from_numpy(np.concatenate(features)),
        keys=None,
        indices=torch.cat([torch.arange(size) for size in sizes]),
        grids=[(1, size) for size in sizes],
        sizes=sizes,
        num_keep=num_keep,
        keeps_last=keeps_last,
        batch=None,
        signals={} if tower is None else {"tower": lambda image: tower},
    )


def test_groups_are_a_partition_and_rows_their_means():
    rng = np.random.default_rng(0)
    for _ in range(100):
        features = [rng.standard_normal((rng.choice([1, *range(5, 30)]), 12)) for _ in range(3)]  # of two, densities tie
        num_keep = [int(rng.integers(1, len(image) + 1)) for image in features]
        keeps_last = [bool(rng.random() < 0.5) for _ in features]
        tokens, restore = stage_tokens(features, num_keep, keeps_last), method("restore")
        selection = restore.select_batch(tokens)
        assert selection.counts == tuple(num_keep)
        assert torch.equal(selection.kept, selection.order.sort().values) and (selection.kept.diff() > 0).all()
        merged, sizes = restore.merge(tokens.hidden_states, selection, tokens), restore.sizes(selection, tokens)
        kept, start = selection.kept.tolist(), 0
        for image, number, last in zip(features, num_keep, keeps_last, strict=True):
            facts = method_oracles.Image(num_keep=number, hidden_states=image, keeps_last=last)
            groups = method_oracles.restored(facts)
            assert sorted(token for group in groups for token in group) == list(range(len(image)))
            assert not last or start + len(image) - 1 in kept
            for group in groups:
                row = kept.index(start + method_oracles.place_of(group, facts))
                np.testing.assert_allclose(merged[row], image[group].mean(0), atol=1e-6)
                assert sizes[row, 1] == len(group) and sizes[row, 0] == torch.tensor(len(image)) / number
            rows = [row for row, token in enumerate(kept) if start <= token < start + len(image)]
            torch.testing.assert_close(sizes[rows].sum(0), torch.full((2,), float(len(image))))
            start += len(image)


def test_a_budget_of_all_tokens_changes_none():
    features = [waves(20, 8).astype(np.float32)]
    tokens, restore = stage_tokens(features, [20], [False]), method("restore")
    selection = restore.select_batch(tokens)
    assert selection.kept.tolist() == list(range(20))
    assert torch.equal(restore.merge(tokens.hidden_states, selection, tokens), tokens.hidden_states)
    assert torch.equal(restore.sizes(selection, tokens), torch.ones(20, 2))


def test_a_row_of_n_equal_tokens_gets_what_they_got():
    """Without positions, merging duplicates is exact when their number is added."""
    rng = np.random.default_rng(1)
    keys, values, query = rng.standard_normal((6, 4)), rng.standard_normal((6, 4)), rng.standard_normal(4)
    counts = np.array([1, 5, 2, 1, 1, 3])
    weights = np.exp(np.repeat(keys, counts, axis=0) @ query)
    expected = weights @ np.repeat(values, counts, axis=0) / weights.sum()
    sizes = torch.from_numpy(counts).float()[None, :, None].expand(1, 6, 2)
    _, mask = additive_masks(torch.ones(1, 1, 1, 6, dtype=torch.bool), sizes, torch.float32)
    weights = np.exp(keys @ query + mask[0, 0, 0].double().numpy())
    np.testing.assert_allclose(weights @ values / weights.sum(), expected, atol=1e-6)


# The whole forward by hand


def groups_of(features, selector="divprune", ratio=0.8, keeps_last=False):
    """Groups of one image of LLaVA, each with the place where it stands."""
    array = lambda tensor: tensor.detach().double().numpy()  # noqa: E731
    facts = method_oracles.Image(round(len(features) * (1 - ratio)), array(features), keeps_last=keeps_last)
    if hasattr(features, "tower"):
        facts.tower_attention, facts.tower_states = array(features.tower.attention), array(features.tower.states)
    return {method_oracles.place_of(group, facts): group for group in method_oracles.restored(facts, selector)}


def by_hand(model, ids, images, is_prompt, is_corrected=True):
    """Logits of one row's tokens in float64, in plain matrices, and their columns.

    Args:
        ids: all tokens of the row, without padding.
        images: for each in order its features, the groups {place: members}, and whether they count.
        is_prompt: for each token, whether it adds the distance term.
        is_corrected: whether sizes count at all.
    """
    decoder, config = model.get_decoder(), model.config.text_config
    ids, length = torch.tensor(ids), len(ids)
    weight = lambda module: module.weight.detach().double().numpy()  # noqa: E731
    hidden = weight(decoder.embed_tokens)[ids]
    visual, is_kept, sizes = (
        (ids == model.config.image_token_id).nonzero()[:, 0].numpy(),
        np.ones(length, bool),
        np.ones((2, length)),
    )
    for (features, groups, counts), columns in zip(images, np.split(visual, max(len(images), 1))[: len(images)], strict=True):
        is_kept[columns] = False
        for place, members in groups.items():
            hidden[columns[place]] = features.detach().double().numpy()[members].mean(0)
            is_kept[columns[place]] = True
            if counts and is_corrected:
                sizes[:, columns[place]] = len(columns) / len(groups), len(members)
    columns = np.flatnonzero(is_kept)
    hidden, dim = hidden[columns], decoder.layers[0].self_attn.head_dim
    base = config.rope_parameters["rope_theta"]
    angles = np.outer(columns, base ** (-np.arange(0, dim, 2) / dim))
    angles = np.concatenate([angles, angles], axis=1)

    def norm(module, states):
        return states / np.sqrt((states**2).mean(-1, keepdims=True) + module.variance_epsilon) * weight(module)

    def heads(module, states, rotate=True):
        states = (states @ weight(module).T).reshape(len(states), -1, dim).transpose(1, 0, 2)
        turned = np.concatenate([-states[..., dim // 2 :], states[..., : dim // 2]], axis=-1)
        return states * np.cos(angles) + turned * np.sin(angles) if rotate else states

    for number, layer in enumerate(decoder.layers):
        attention, mlp, normed = layer.self_attn, layer.mlp, norm(layer.input_layernorm, hidden)
        query, key, value = (
            heads(attention.q_proj, normed),
            heads(attention.k_proj, normed),
            heads(attention.v_proj, normed, False),
        )
        key, value = (np.repeat(part, len(query) // len(part), axis=0) for part in (key, value))
        bias = method_oracles.restore_bias(columns, sizes[min(number, 1), columns], np.asarray(is_prompt)[columns], dim, base)
        weights = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(dim) + bias)
        output = (weights / weights.sum(-1, keepdims=True)) @ value
        hidden = hidden + output.transpose(1, 0, 2).reshape(len(hidden), -1) @ weight(attention.o_proj).T
        normed = norm(layer.post_attention_layernorm, hidden)
        gate = normed @ weight(mlp.gate_proj).T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (normed @ weight(mlp.up_proj).T)) @ weight(mlp.down_proj).T
    return norm(decoder.norm, hidden) @ weight(model.lm_head).T, columns


def features_of(model, pictures):
    if not pictures:
        return []
    with torch.no_grad():
        return list(model.get_image_features(make_inputs(LLAVA, [(pictures, "")])["pixel_values"]).pooler_output)


def tokens_of(inputs, row):
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


def assert_near(found, expected):
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), **CLOSE)


@pytest.mark.parametrize(
    ("selector", "correction", "attn"),
    [
        ("divprune", "full", "sdpa"),
        ("divprune", "full", "eager"),
        ("vispruner", "size", "eager"),
        ("holov", "full", "eager"),
        ("holov", "none", "sdpa"),
    ],
)
def test_a_padded_batch_and_its_decoding_equal_a_forward_by_hand(selector, correction, attn):
    keys = {"pruning_method": "restore", "pruning_selector": selector, "pruning_attention_correction": correction}
    model, rows = load_pruned(LLAVA, attn=attn, pruning_ratio=0.8, **keys), ROWS
    if selector == "vispruner":
        rows = ROWS[:2]  # its restatement is slow
    inputs = make_inputs(LLAVA, rows)
    outputs = generate(model, inputs, max_new_tokens=4, min_new_tokens=4)
    with torch.no_grad():
        prefill = model(**make_inputs(LLAVA, rows, padding_side="right")).logits
    for row, (pictures, _) in enumerate(rows):
        images = [(features, groups_of(features, selector), True) for features in features_of(model, pictures)]
        prompt = tokens_of(inputs, row)
        ids = prompt + outputs.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        is_prompt = (np.arange(len(ids)) < len(prompt)) & (correction == "full") & bool(pictures)
        logits, columns = by_hand(model, ids, images, is_prompt, correction != "none")
        of_column = dict(zip(columns.tolist(), logits, strict=True))
        assert_near(step_logits(outputs)[row], np.stack([of_column[len(prompt) - 1 + step] for step in range(4)]))
        of_prompt = columns[columns < len(prompt)]
        assert_near(prefill[row, of_prompt], np.stack([of_column[column] for column in of_prompt.tolist()]))


def play(model, turns, moved_after=()):
    """A conversation of two rows on one cache, padded in each turn.

    Args:
        turns: for each, what `make_inputs` takes, or the ids of one token for each row.
        moved_after: after which turns the rows of the cache change places, and with them the rows of what follows.

    Returns:
        For each row its tokens, and the logits at those; whether a turn brought it an image is told for each token.
    """
    cache, mask = None, torch.zeros(2, 0, dtype=torch.long)
    ids, logits, has_image, order = ([[], []] for _ in range(4))
    order = [0, 1]
    for number, turn in enumerate(turns):
        if isinstance(turn[0], int):
            inputs = {"input_ids": torch.tensor(turn)[order][:, None], "attention_mask": torch.ones(2, 1, dtype=torch.long)}
        else:
            inputs = make_inputs(LLAVA, [turn[row] for row in order])
        mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
        outputs = model(**inputs | {"attention_mask": mask} | positions(inputs, mask), **{CACHE_NAME: cache}, use_cache=True)
        cache = cache_of(outputs)
        for place, row in enumerate(order):
            is_token = inputs["attention_mask"][place].bool()
            ids[row] += tokens_of(inputs, place)
            logits[row].append(outputs.logits[place][is_token])
            has_image[row] += [not isinstance(turn[0], int) and bool(turn[row][0])] * int(is_token.sum())
        if number in moved_after:
            cache.reorder_cache(torch.tensor([1, 0]))
            mask, order = mask.flip(0), order[::-1]
    return ids, [torch.cat(parts) for parts in logits], has_image


CONVERSATION = [
    [([picture(1)], "What?"), ([picture(2), picture(3)], "What is in these pictures, then?")],
    [9, 11],
    [10, 12],
    [([], "Why?"), ([], "Tell me a good deal more about it, please.")],
    [([picture(4)], "And in this one, what do you see?"), ([], "Is that so?")],
    [13, 14],
]


@pytest.mark.parametrize(
    ("correction", "moved_after"), [("full", ()), ("full", (0, 3, 4)), ("size", ())], ids=["full", "full-moved", "size"]
)
def test_a_conversation_equals_one_by_hand(correction, moved_after):
    """Distances are added in prompts that bring an image, sizes by all that follows; across padding of every turn."""
    model = load_method(LLAVA, "restore", pruning_attention_correction=correction)
    with torch.no_grad():
        ids, found, has_image = play(model, CONVERSATION, moved_after)
    for row, pictures in enumerate(([picture(1), picture(4)], [picture(2), picture(3)])):
        images = [(features, groups_of(features), True) for features in features_of(model, pictures)]
        is_prompt = np.array(has_image[row]) & (correction == "full")
        logits, columns = by_hand(model, ids[row], images, is_prompt)
        assert_near(found[row][columns], logits)
        assert 0 < sum(has_image[row]) < len(ids[row])


@pytest.mark.parametrize("names", [("restore", "divprune"), ("divprune", "restore")], ids="-then-".join)
def test_rows_of_an_earlier_method_count_as_they_did(names):
    """Each turn by another method, on one cache: sizes are the rows', whatever comes after them."""
    model, ids, found, is_prompt, images, cache = load_method(LLAVA, "restore"), [], [], [], [], None
    with torch.no_grad():
        for number, name in enumerate(names):
            model = load_method(LLAVA, name)
            inputs = make_inputs(LLAVA, [([picture(number)], "What is it?")])
            outputs = model(
                input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], **{CACHE_NAME: cache}, use_cache=True
            )
            cache = cache_of(outputs)
            step = model(input_ids=torch.tensor([[9]]), **{CACHE_NAME: cache})
            ids += [*inputs["input_ids"][0].tolist(), 9]
            found += [outputs.logits[0], step.logits[0]]
            is_prompt += [name == "restore"] * inputs["input_ids"].shape[1] + [False]
            (features,) = features_of(model, [picture(number)])
            groups = groups_of(features)
            if name == "divprune":
                facts = method_oracles.Image(round(0.2 * len(features)), features.double().numpy())
                groups = {token: [token] for token in method_oracles.divprune(facts)}
            images.append((features, groups, name == "restore"))
    logits, columns = by_hand(model, ids, images, is_prompt)
    assert_near(torch.cat(found)[columns], logits)


def test_a_prompt_that_ends_with_an_image_stands_there():
    model = load_method(LLAVA, "restore")
    inputs = make_inputs(LLAVA, [([picture(1)], "What?")])
    end = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero().max()) + 1
    ids = inputs["input_ids"][0, :end].tolist()
    with torch.no_grad():
        found = model(input_ids=inputs["input_ids"][:, :end], pixel_values=inputs["pixel_values"]).logits[0]
    (features,) = features_of(model, [picture(1)])
    logits, columns = by_hand(model, ids, [(features, groups_of(features, keeps_last=True), True)], [True] * end)
    assert columns[-1] == end - 1
    assert_near(found[columns], logits)


def test_a_crop_takes_sizes_along():
    """Back into the prompt's text, and over an image of a later turn."""
    model = load_method(LLAVA, "restore")
    first, second = (make_inputs(LLAVA, [([picture(seed)], "What is it?")]) for seed in (1, 2))
    tokens = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        length = int(cache.get_seq_length())
        expected = model(input_ids=tokens, **{CACHE_NAME: copy.deepcopy(cache)}).logits
        model(**later_turn(first, second), **{CACHE_NAME: cache})
        cache.crop(length - int(cache.get_seq_length()))
        torch.testing.assert_close(model(input_ids=tokens, **{CACHE_NAME: cache}).logits, expected, **CLOSE)
        cache.crop(-5)
        last = first["input_ids"][:, -2:]
        again = model(input_ids=torch.cat([last, tokens], dim=1), **{CACHE_NAME: cache}).logits[:, 2:]
        assert torch.isfinite(again).all() and cache.pruning_states[0].sizes.shape[1] == cache.pruning_states[0].num_entries


# Masks


def masks_of(model, calls):
    """The attention_mask of each layer, for each of some calls on one cache."""
    seen, cache = [], None
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in model.get_decoder().layers
    ]
    with torch.no_grad():
        for call in calls:
            cache = cache_of(model(**call, **{CACHE_NAME: cache}, use_cache=True))
    for hook in hooks:
        hook.remove()
    number = len(hooks)
    return [seen[start : start + number] for start in range(0, len(seen), number)]


def test_other_methods_have_no_mask_that_they_had_not():
    """Also RESTORE without the correction: the fused causal kernel stays theirs."""
    calls = [make_inputs(LLAVA, ROWS[1:2]), {"input_ids": torch.tensor([[9]])}]
    for name, keys in (("divprune", {}), ("visionzip", {}), ("restore", {"pruning_attention_correction": "none"})):
        model = load_method(LLAVA, name, **keys)
        assert all(mask is None for masks in masks_of(model, calls) for mask in masks), name
    prefill, step = masks_of(load_method(LLAVA, "restore"), calls)
    for masks in (prefill, step):
        assert not torch.equal(masks[0], masks[1]) and all(mask is masks[1] for mask in masks[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_half_precision(dtype, attn):
    """Masks have the type of the queries and no infinity; so rows of padding have no NaN that would reach others."""
    model = copy.deepcopy(load_pruned(LLAVA, attn=attn, pruning_method="restore", pruning_ratio=0.8)).to(dtype)
    inputs = make_inputs(LLAVA, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for masks in masks_of(model, [inputs]):
        for mask in masks:
            assert mask.dtype == dtype and torch.isfinite(mask).all()
    outputs = generate(model, inputs)
    assert torch.isfinite(step_logits(outputs)).all()
    assert len(cache_of(outputs).pruning_record) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype):
    """The mask of a model in float32 is rounded to the type of autocast by torch, where the least float32 is infinite."""
    model, inputs = copy.deepcopy(load_pruned(LLAVA, pruning_method="restore", pruning_ratio=0.8)), make_inputs(LLAVA, ROWS)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    assert torch.isfinite(outputs.logits).all()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)
    (mask, *_), *_ = masks_of(model, [inputs])
    assert torch.isfinite(mask.to(dtype)).all()


def test_compiled_decoding_is_one_graph_for_all_steps_and_requests():
    """Masks of compiled decoding are made in advance, those of attention that counts too."""
    model = load_method(LLAVA, "restore")
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="eager")
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config, "min_new_tokens": 6}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in (1, 5):
        inputs = make_inputs(LLAVA, [*ROWS[:2], ([picture(seed), picture(3, 200, 300)], "Which one?")])
        compiled, plain = generate(model, inputs, **options), generate(model, inputs, min_new_tokens=6)
        torch.testing.assert_close(step_logits(compiled), step_logits(plain), **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# What is refused by name


@pytest.mark.parametrize("family", WITH_THREE_AXES, ids=lambda family: family.name)
def test_three_axes_are_refused(family):
    with pytest.raises(ValueError, match=r"pruning_method 'restore' puts merged tokens at the median .*M-RoPE"):
        family.config_class.from_pretrained(family.checkpoint, pruning_method="restore").pruning_settings()


def test_positions_that_are_no_counts_are_refused():
    with pytest.raises(ValueError, match=r"pruning_positions='packed' can not be with pruning_method 'restore'"):
        VLMPrunerLlavaConfig(pruning_method="restore", pruning_positions="packed")
    for kind in ("dynamic", "longrope"):
        config = VLMPrunerLlavaConfig(pruning_method="restore")
        config.text_config.rope_parameters["rope_type"] = kind
        with pytest.raises(ValueError, match=rf"rope_type '{kind}'\) change with the length"):
            config.pruning_settings()
        config.pruning_attention_correction = "size"
        assert config.pruning_settings().method == "restore"


def test_bad_parameters_are_named():
    with pytest.raises(
        ValueError, match=r"pruning_selector must be one of \('divprune', 'vispruner', 'holov'\), but is 'scope'"
    ):
        VLMPrunerLlavaConfig(pruning_method="restore", pruning_selector="scope")
    with pytest.raises(
        ValueError, match=r"pruning_attention_correction must be one of \('full', 'size', 'none'\), but is 'log'"
    ):
        VLMPrunerLlavaConfig(pruning_method="restore", pruning_attention_correction="log")
    with pytest.raises(ValueError, match="pruning_selector is set to 'holov', but pruning_method is 'divprune'"):
        VLMPrunerLlavaConfig(pruning_method="divprune", pruning_selector="holov")


@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_additive_mask_is_refused(backend):
    """In a prefill, and where a cache comes from a model that could."""
    model = copy.deepcopy(load_pruned(LLAVA, pruning_method="restore", pruning_ratio=0.8))
    inputs, step = make_inputs(LLAVA, ROWS[1:2]), {"input_ids": torch.tensor([[9]])}
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        model.config.text_config._attn_implementation = backend
        for call in (inputs, step | {CACHE_NAME: cache}):
            with pytest.raises(ValueError, match=rf"attn_implementation '{backend}' does not take.*\('sdpa', 'eager'\)"):
                model(**call)
        assert model.config.pruning_settings().method == "restore"


def test_a_tower_that_tells_nothing_is_refused_as_for_the_selector(monkeypatch):
    """That of features of several layers, say."""
    monkeypatch.setattr(VLMPrunerLlavaModel, "tower_blocks", lambda self: None)
    inputs = make_inputs(LLAVA, ROWS[1:2])
    with pytest.raises(ValueError, match=r"pruning_method 'restore' looks at the attention in the vision tower"):
        load_method(LLAVA, "restore", pruning_selector="holov")(**inputs)
    assert load_method(LLAVA, "restore")(**inputs).pruning_record is not None
