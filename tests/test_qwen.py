"""What is Qwen's own: grids in time, M-RoPE positions that stay with the cache, images and videos in one prompt."""

import copy
import re

import pytest
import torch
from families import FAMILIES, assert_selected_alone, clip, load_processor, load_pruned, load_stock, make_inputs, picture
from transformers import DynamicCache

from vlmpruner.modeling_vlmpruner_qwen2vl import PrunedQwenModelMixin
from vlmpruner.pruned_cache import CACHE_NAME, cache_of


CLIP = clip(11, 8, 140, 112)
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(
    params=[family for family in FAMILIES.values() if issubclass(family.model_class, PrunedQwenModelMixin)],
    ids=lambda family: family.name,
)
def family(request):
    return request.param


def video_inputs(family, content, **media):
    processor = load_processor(family)
    content = [{"type": kind} for kind in content] + [{"type": "text", "text": "What happens?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text], return_tensors="pt", do_sample_frames=False, **media)


def test_each_slice_of_a_video_is_pruned_as_an_image(family):
    inputs = video_inputs(family, ["video"], videos=[CLIP])
    frames, height, width = (inputs["video_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    with torch.no_grad():
        record = load_pruned(family)(**inputs).pruning_record
    assert [(image.modality, image.image, image.view, image.grid) for image in record] == [
        ("video", 0, frame, (height, width)) for frame in range(frames)
    ]
    is_video = inputs["input_ids"][0] == load_pruned(family).model.placeholder_id("video")
    assert torch.equal(torch.cat([image.positions for image in record]), is_video.nonzero()[:, 0])
    assert_selected_alone(family, inputs, record)
    assert record.num_kept == frames * round(height * width * (1 - 0.889))


def test_a_video_can_share_one_budget(family):
    inputs = video_inputs(family, ["video"], videos=[CLIP])
    model = copy.deepcopy(load_pruned(family))
    model.config.pruning_video_scope = "video"
    with torch.no_grad():
        (video,) = model(**inputs).pruning_record
    frames, height, width = (inputs["video_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    assert video.grid == (frames, height, width)
    assert video.num_kept == round(frames * height * width * (1 - 0.889))
    assert_selected_alone(family, inputs, [video])
    model.config.pruning_video_scope = "frames"
    with pytest.raises(ValueError, match=r"pruning_video_scope must be one of .*'frames'"):
        model(**inputs)


@pytest.mark.parametrize("content", [["image", "video"], ["video", "image"]], ids="-".join)
def test_images_and_videos_in_one_prompt(family, content):
    inputs = video_inputs(family, content, images=[picture(1)], videos=[CLIP[:4]])
    model = load_pruned(family)
    if model.model.placeholder_id("image") == model.model.placeholder_id("video"):
        for each in (load_stock(family), model):
            with pytest.raises(ValueError, match="Image features and image tokens do not match"):
                each(**inputs)
        return
    cached = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    uncached = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, use_cache=False, return_dict_in_generate=True, output_logits=True
    )
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)
    record = cache_of(cached).pruning_record
    assert {image.modality for image in record} == {"image", "video"}
    grids = [inputs["image_grid_thw"], inputs["video_grid_thw"]]
    assert record.num_visual == sum(int(grid.prod()) // 4 for grid in grids)
    assert_selected_alone(family, inputs, record)


def test_generate_on_a_later_turn_places_a_new_image_by_mrope(family):
    """The second turn through generate, with only its own tokens and image, equals both turns in one forward."""
    model = load_pruned(family)
    first = make_inputs(family, [([picture(1)], "What is it?")])
    second = make_inputs(family, [([picture(2, 200, 300)], "And now?")])
    joined = {
        name: torch.cat(
            [first[name], second[name]],
            dim=1 if first[name].ndim == 2 and len(first[name]) == 1 and name not in ("pixel_values", "image_grid_thw") else 0,
        )
        for name in first
    }
    with torch.no_grad():
        whole = model(**joined)
        cache = cache_of(model(**first, use_cache=True))
    mask = torch.ones_like(joined["input_ids"])
    outputs = model.generate(
        **{**second, "attention_mask": mask},
        **{CACHE_NAME: cache},
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(outputs.logits[0], whole.logits[:, -1], **CLOSE)


@pytest.mark.parametrize("kinds", [("image", "video"), ("video", "image")], ids="-".join)
def test_a_later_turn_may_bring_another_kind(family, kinds):
    """An image after a video, or a video after an image, which are refused in one call where they have one placeholder."""
    model, media = load_pruned(family), {"image": {"images": [picture(1)]}, "video": {"videos": [CLIP[:4]]}}
    turns = [video_inputs(family, [kind], **media[kind]) for kind in kinds]
    with torch.no_grad():
        cache, mask = DynamicCache(config=model.config.get_text_config()), torch.zeros(1, 0, dtype=torch.long)
        positions = []
        for turn in turns:
            mask = torch.cat([mask, turn["attention_mask"]], dim=1)
            grids = {name: turn[name] for name in ("image_grid_thw", "video_grid_thw") if name in turn}
            types = turn["mm_token_type_ids"]
            positions.append(model.model.mrope_position_ids(turn["input_ids"], types, mask, cache, grids))
            model(**turn | {"attention_mask": mask}, **{CACHE_NAME: cache})
    assert [image.modality for image in cache.pruning_record] == sorted(
        (image.modality for image in cache.pruning_record), key=kinds.index
    )
    assert {image.modality for image in cache.pruning_record} == set(kinds)
    assert positions[1].min() == positions[0].max() + 1


def test_an_image_after_a_turn_of_text_follows_its_positions(family):
    """Also where the decoder made those of the text itself, which then count padding."""
    model = load_pruned(family)
    text, image = make_inputs(family, [([], "Hello."), ([], "Hello there, this is longer.")]), [([picture(1)], "What?")] * 2
    second = make_inputs(family, image)
    mask = torch.cat([text["attention_mask"], second["attention_mask"]], dim=1)
    with torch.no_grad():
        cache = cache_of(model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], use_cache=True))
        length = cache.get_seq_length()
        types = second["mm_token_type_ids"]
        grids = {"image_grid_thw": second["image_grid_thw"]}
        found = model.model.mrope_position_ids(second["input_ids"], types, mask, cache, grids)
        alone = model.model.mrope_position_ids(second["input_ids"], types, second["attention_mask"], None, grids)
    assert torch.equal(found, alone + length)


def test_positions_of_a_request_do_not_depend_on_another(family):
    """The stock model keeps the offset of M-RoPE on the module; a larger picture in between must not move later tokens."""
    model = load_pruned(family)
    small, large = (make_inputs(family, [([picture(1, *size)], "What?")]) for size in ((120, 90), (420, 380)))
    tokens = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        for ratio in (0.889, 0.0):
            alone = cache_of(model(**small, use_cache=True, pruning_ratio=ratio))
            expected = model(input_ids=tokens, **{CACHE_NAME: alone}).logits
            cache = cache_of(model(**small, use_cache=True, pruning_ratio=ratio))
            model(**large, pruning_ratio=ratio)
            torch.testing.assert_close(model(input_ids=tokens, **{CACHE_NAME: cache}).logits, expected, rtol=0, atol=0)


def test_cropping_an_image_away_restores_the_positions(family):
    if family.is_hybrid:
        pytest.skip("a recurrent state can not be cropped")
    model = load_pruned(family)
    first, second = (
        make_inputs(family, [([picture(seed, *size)], "What?")]) for seed, size in ((1, (120, 90)), (2, (420, 380)))
    )
    tokens = torch.tensor([[9, 10, 11]])
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        expected = model(input_ids=tokens, **{CACHE_NAME: copy.deepcopy(cache)}).logits
        length = cache.get_seq_length()
        mask = torch.ones(1, length + second["input_ids"].shape[1], dtype=torch.long)
        model(**{**second, "attention_mask": mask}, **{CACHE_NAME: cache})
        cache.crop(length - cache.get_seq_length())
        torch.testing.assert_close(model(input_ids=tokens, **{CACHE_NAME: cache}).logits, expected, **CLOSE)


def test_a_tiny_picture_and_one_repeated(family):
    model = load_pruned(family)
    tiny = make_inputs(family, [([picture(1, 66, 66)], "What?")])
    tiny_grid = (tiny["image_grid_thw"][0, 1:] // 2).prod()
    with torch.no_grad():
        (image,) = model(**tiny).pruning_record
        assert image.num_visual == tiny_grid and image.num_kept == max(1, round(int(tiny_grid) * (1 - 0.889)))
        twice = model(**make_inputs(family, [([picture(2), picture(2)], "Same?")])).pruning_record
    assert len(twice) == 2 and twice.images[0].grid == twice.images[1].grid


@torch.no_grad()
def test_off_without_types_of_tokens_is_the_stock_class(family):
    """Which raises, or counts all tokens as text. Pruned, a forward is refused: an image's positions would be another's."""
    model, stock = load_pruned(family), load_stock(family)
    inputs = dict(make_inputs(family, [([picture(1)], "What?")]))
    del inputs["mm_token_type_ids"]
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = stock.get_input_embeddings()(inputs["input_ids"])
    calls = [
        lambda model, **off: model(**inputs, **off),
        lambda model, **off: model(**embedded, **off),
        lambda model, **off: model.generate(**inputs, **off, max_new_tokens=2, do_sample=False),
    ]
    for call in calls:
        stock.model.rope_deltas = None  # of an earlier request
        try:
            expected = call(stock)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                call(model, pruning_ratio=0.0)
            continue
        found = call(model, pruning_ratio=0.0)
        found, expected = (each if isinstance(each, torch.Tensor) else each.logits for each in (found, expected))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for given in (inputs, embedded):
        with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
            model(**given)


@torch.no_grad()
def test_a_later_turn_without_types_of_tokens_is_generated_as_by_the_stock_class(family):
    first, later = (dict(make_inputs(family, [([picture(number)], "What?")])) for number in (1, 2))
    found = []
    for model in (load_pruned(family, pruning_ratio=0.0), load_stock(family)):
        options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        turn = model.generate(**first, **options)
        ids = torch.cat([turn.sequences, later["input_ids"]], dim=1)
        given = {name: later[name] for name in ("pixel_values", "image_grid_thw")} | {CACHE_NAME: cache_of(turn)}
        found.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given, **options).logits)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@torch.no_grad()
def test_no_request_leaves_its_positions_to_the_next(family):
    """What is embedded by hand gets its positions from the decoder, which has no offset of a request before it."""
    model = copy.deepcopy(load_pruned(family))
    text = model.get_input_embeddings()(make_inputs(family, [([], "Say something nice about nothing.")])["input_ids"])

    def play():
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=text[:, :-3], **{CACHE_NAME: cache})
        return model(inputs_embeds=text[:, -3:], **{CACHE_NAME: cache}).logits

    before = play()
    model.generate(**make_inputs(family, [([picture(1)], "What?")]), max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(play(), before, rtol=0, atol=0)


def test_wrong_grids_are_named(family):
    model = load_pruned(family)
    inputs = make_inputs(family, [([picture(1)], "What?")])
    without_types = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
        model(**without_types)
    with pytest.raises(ValueError, match="image_grid_thw is missing"):
        model.model.get_image_features(inputs["pixel_values"])
    wrong = inputs["image_grid_thw"] + torch.tensor([[0, 2, 0]])
    with pytest.raises(ValueError, match=rf"makes {int(wrong.prod())} patches, but pixels of {len(inputs['pixel_values'])}"):
        model(**(inputs | {"image_grid_thw": wrong}))
