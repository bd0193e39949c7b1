"""What is InternVL's, Mistral3's, SmolVLM's and LLaVA-NeXT-Video's own: which tile is a grid of which image, what is structure,
and videos that come as images."""

import copy

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    assert_selected_alone,
    clip,
    load_processor,
    load_pruned,
    load_stock,
    make_inputs,
    picture,
    prompt,
    small_checkpoint,
    spread_weights,
)
from test_families import CLOSE, EXACT, forward_by_hand, generate, step_logits
from transformers import AutoConfig

from vlmpruner.processing import GAP, LEGEND_HEIGHT
from vlmpruner.pruned_cache import cache_of
from vlmpruner.token_pruning import num_tokens_to_keep


INTERNVL, MISTRAL3, SMOLVLM, NEXT_VIDEO = (FAMILIES[name] for name in ("internvl", "mistral3", "smolvlm", "llava_next_video"))
RATIO = 0.889
TILED = ("internvl", "smolvlm", "idefics3")


@pytest.fixture(params=TILED)
def tiled(request):
    return FAMILIES[request.param]


def record_of(family, inputs, **options):
    with torch.no_grad():
        return load_pruned(family)(**inputs, **options).pruning_record


def video_inputs(family, text="What happens?", images=None, videos=None):
    processor = load_processor(family)
    text = prompt(processor, len(images or []), text, num_videos=len(videos or []))
    videos = [videos] if family.nested else videos
    return processor(images=images, videos=videos, text=[text], return_tensors="pt", do_sample_frames=False)


def image_columns(family, inputs, row=0):
    return (inputs["input_ids"][row] == load_stock(family).config.image_token_id).nonzero()[:, 0]


# Tiles


TILES = {
    "internvl": {(320, 240): 7, (200, 300): 7, (120, 120): 1, (500, 200): 4},
    "smolvlm": {(320, 240): 5, (200, 300): 5, (120, 120): 5, (500, 200): 3},
    "idefics3": {(320, 240): 5, (200, 300): 5, (120, 120): 5, (500, 200): 3},
}


def test_each_tile_is_a_grid_of_its_image(tiled):
    sizes = TILES[tiled.name]
    rows = [
        ([picture(number, *size) for number, size in enumerate(sizes)], "Which one?"),
        ([], "Say something about nothing at all, please."),
        ([picture(7, 200, 300)] * 2, "Are these the same?"),
    ]
    inputs = make_inputs(tiled, rows)
    record = record_of(tiled, inputs)
    expected = [(0, number, count) for number, count in enumerate(sizes.values())]
    expected += [(2, len(sizes) + number, sizes[200, 300]) for number in (0, 1)]
    assert [(entry.row, entry.image, entry.view) for entry in record] == [
        (row, image, view) for row, image, count in expected for view in range(count)
    ]
    assert {(entry.grid, entry.num_kept) for entry in record} == {((4, 4), num_tokens_to_keep(16, RATIO))}
    for row in (0, 2):
        positions = torch.cat([entry.positions for entry in record if entry.row == row])
        assert torch.equal(positions, image_columns(tiled, inputs, row))
    with torch.no_grad():
        embeds = {name: value for name, value in inputs.items() if name != "input_ids"}
        embeds["inputs_embeds"] = load_pruned(tiled).get_input_embeddings()(inputs["input_ids"])
    again = record_of(tiled, embeds)
    assert [(entry.image, entry.view) for entry in again] == [(entry.image, entry.view) for entry in record]


def test_each_tile_is_selected_from_alone(tiled):
    inputs = make_inputs(tiled, [([picture(1), picture(2, 500, 200)], "What?")])
    assert_selected_alone(tiled, inputs, record_of(tiled, inputs))


def test_tokens_around_tiles_are_never_candidates(tiled):
    """Tags and line breaks stay: the pruned layers hold all that is no placeholder."""
    inputs = make_inputs(tiled, [([picture(1)], "What?")])
    with torch.no_grad():
        outputs = load_pruned(tiled)(**inputs, use_cache=True)
    num_text = inputs["input_ids"].shape[1] - len(image_columns(tiled, inputs))
    assert cache_of(outputs).layers[-1].keys.shape[2] == num_text + outputs.pruning_record.num_kept


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_one_budget_for_a_video_of_images_is_refused(name):
    model = copy.deepcopy(load_pruned(FAMILIES[name]))
    model.config.pruning_video_scope = "video"
    with pytest.raises(ValueError, match=rf"pruning_video_scope='video' .*a {name} model gets them as images"):
        model(**make_inputs(FAMILIES[name], [([picture(1)], "What?")]))
    model.config.pruning_ratio = 0.0
    model(**make_inputs(FAMILIES[name], [([picture(1, 96, 96)], "What?")]))


# Videos that come as images


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_frames_of_a_video_are_images(name):
    family = FAMILIES[name]
    images = [picture(1)] if name == "internvl" else None  # the stock processor of SmolVLM loses images beside videos
    inputs = video_inputs(family, images=images, videos=[clip(1, 3), clip(2, 3)])
    record = record_of(family, inputs)
    numbers = [*([0] * 7 if images else []), *range(len(images or []), len(images or []) + 6)]
    assert [entry.image for entry in record] == numbers and {entry.modality for entry in record} == {"image"}
    assert torch.equal(torch.cat([entry.positions for entry in record]), image_columns(family, inputs))
    assert_selected_alone(family, inputs, record)
    with torch.no_grad():
        ours, stock = load_pruned(family)(**inputs, pruning_ratio=0.0), load_stock(family)(**inputs)
    torch.testing.assert_close(ours.logits, stock.logits, **EXACT)


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_videos_of_images_are_drawn(name):
    """From the videos: one sheet for each; from the inputs: each frame as the image that it is to the model."""
    family = FAMILIES[name]
    videos = [np.full((3, 80, 120, 3), color, dtype=np.uint8) for color in ((200, 30, 40), (20, 190, 60))]
    inputs = video_inputs(family, videos=videos)
    record = record_of(family, inputs)
    processor = family.processor_class.from_pretrained(small_checkpoint(family))
    sheets = processor.draw_kept_tokens(record=record, videos=videos, do_sample_frames=False)
    assert len(sheets) == 2 and sheets[0].size == sheets[1].size
    for sheet, color in zip(sheets, ((200, 30, 40), (20, 190, 60)), strict=True):
        assert (np.abs(np.asarray(sheet, dtype=int) - color).max(-1) <= 2).any()
    frames = processor.draw_kept_tokens(record=record, inputs=inputs)
    side = frames[0].width
    assert len(frames) == 6 and sheets[0].width == 2 * side + GAP
    for frame, place in zip(frames, [(0, 0), (1, 0), (0, 1)], strict=False):
        left, top = (number * (side + GAP) for number in place)
        shown = np.asarray(sheets[0].crop((left, top, left + side, top + side)), dtype=int)
        assert np.abs(shown - np.asarray(frame, dtype=int)[:side]).max() <= 2
    with pytest.raises(ValueError, match="does not tell them from other images"):
        processor.draw_kept_tokens(picture(1), record, videos=videos)
    with pytest.raises(ValueError, match="Got 3 frames to draw on, but the record is of 6 grids"):
        processor.draw_kept_tokens(record=record, videos=videos[:1], do_sample_frames=False)


# Drawing


def test_tiles_are_drawn_where_they_lie(tiled):
    """A picture of four quarters of one colour each, cut into four tiles and a view of the whole."""
    colors = np.array([[[200, 20, 30], [20, 180, 40]], [[30, 40, 210], [190, 180, 20]]])
    image = np.kron(colors, np.ones((60, 60, 1))).astype(np.uint8)
    processor = family_processor(tiled)
    if tiled is INTERNVL:
        processor.image_processor.max_patches, processor.image_processor.min_patches = 4, 4
    text = [prompt(processor, 1)]
    inputs = processor(images=[image], text=text, return_tensors="pt")
    record = record_of(tiled, inputs, pruning_ratio=0.01)
    assert [entry.num_kept for entry in record] == [16] * 5
    for drawn in (processor.draw_kept_tokens(record=record, inputs=inputs), processor.draw_kept_tokens(image, record)):
        (sheet,) = drawn
        side = (sheet.width - 2 * GAP) // 3
        assert sheet.height == 2 * side + GAP + LEGEND_HEIGHT
        pixels = np.asarray(sheet, dtype=int)
        for number, color in enumerate(colors.reshape(4, 3)):
            row, column = divmod(number, 3)
            y, x = (place * (side + GAP) + side // 8 for place in (row, column))
            assert np.abs(pixels[y, x] - color).max() <= 4
        for row, column in np.ndindex(2, 2):
            y, x = (side + GAP + side * (2 * place + 1) // 4 + side // 8 for place in (row, column))
            assert np.abs(pixels[y, x] - colors[row, column]).max() <= 4


def family_processor(family):
    return family.processor_class.from_pretrained(small_checkpoint(family))


def test_inputs_of_another_prompt_are_named(tiled):
    inputs = make_inputs(tiled, [([picture(1), picture(2)], "Which?")])
    record = record_of(tiled, inputs)
    one = make_inputs(tiled, [([picture(1)], "Which?")])
    with pytest.raises(ValueError, match=r"tiles in pixel_values, but placeholders of"):
        family_processor(tiled).draw_kept_tokens(record=record, inputs=inputs | {"input_ids": one["input_ids"]})
    del inputs["input_ids"]
    with pytest.raises(ValueError, match="The inputs have pixel_values, but not 'input_ids'"):
        family_processor(tiled).draw_kept_tokens(record=record, inputs=inputs)


# Decoders


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("internvl", "qwen2"), ("internvl", "qwen3_moe"), ("internvl", "llama"), ("mistral3", "llama")],
)
def test_other_decoders_are_pruned(name, decoder):
    """Against the whole path by hand, on weights of the stock class."""
    family = FAMILIES[name]
    content = AutoConfig.from_pretrained(small_checkpoint(family)).to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    text = {key: content["text_config"][key] for key in kept} | {"model_type": decoder, "head_dim": 16}
    if decoder == "qwen3_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    content |= {"text_config": text, "tie_word_embeddings": False}
    config = type(load_stock(family).config)(**{key: value for key, value in content.items() if key != "model_type"})
    torch.manual_seed(0)
    stock = spread_weights(family.stock_class(config).eval())
    pruned_config = type(load_pruned(family).config)(**config.to_dict() | {"model_type": f"vlmpruner_{name}"})
    model = family.pruned_class(pruned_config).eval()
    model.load_state_dict(stock.state_dict())
    inputs = make_inputs(family, [([picture(1), picture(2, 200, 300)], "What is in these pictures?")])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, pruning_ratio=0.0).logits, stock(**inputs).logits, **EXACT)
        outputs = model(**inputs)
        logits, columns = forward_by_hand(family, inputs, outputs.pruning_record, stock=stock)
    torch.testing.assert_close(outputs.logits[0, columns], logits, **CLOSE)


def test_a_decoder_that_reads_positions_in_its_attention_is_refused_by_name():
    """Ministral 3's scales queries by their positions, which the pruned layers do not get."""
    pytest.importorskip("transformers.models.ministral3")
    content = load_pruned(MISTRAL3).config.to_dict()
    content["text_config"] |= {"model_type": "ministral3"}
    config = type(load_pruned(MISTRAL3).config)(**content)
    with pytest.raises(ValueError, match=r"'ministral3' are not supported: decoder layer 0 .*\. Supported: llama, mistral"):
        MISTRAL3.pruned_class(config)


# Mistral3


def test_break_and_end_tokens_are_structure():
    """Each row of a grid is followed by one, on no grid, and in every layer."""
    inputs = make_inputs(MISTRAL3, [([picture(1), picture(2, 200, 300)], "Which one?")])
    with torch.no_grad():
        outputs = load_pruned(MISTRAL3)(**inputs, use_cache=True)
    record, ids = outputs.pruning_record, inputs["input_ids"][0]
    assert [entry.grid for entry in record] == [(9, 12), (11, 8)]
    processor = load_processor(MISTRAL3)
    for entry in record:
        rows = entry.positions.view(entry.grid)
        assert (rows.diff(dim=1) == 1).all() and (rows[1:, 0] - rows[:-1, -1] == 2).all()
        ends = ids[rows[:, -1] + 1].tolist()
        assert ends == [processor.image_break_token_id] * (len(rows) - 1) + [processor.image_end_token_id]
    num_text = len(ids) - record.num_visual
    assert cache_of(outputs).layers[-1].keys.shape[2] == num_text + record.num_kept
    assert_selected_alone(MISTRAL3, inputs, record)


def test_missing_sizes_are_named():
    inputs = make_inputs(MISTRAL3, [([picture(1)], "What?")])
    del inputs["image_sizes"]
    for ratio in (RATIO, 0.0):
        with pytest.raises(ValueError, match="got pixel_values but no image_sizes"):
            load_pruned(MISTRAL3)(**inputs, pruning_ratio=ratio)


# SmolVLM and Idefics3


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_images_encoded_before_are_refused_by_name(name):
    """What some versions take in place of pixels."""
    model, inputs = load_pruned(FAMILIES[name]), make_inputs(FAMILIES[name], [([picture(1)], "What?")])
    for argument in ("image_hidden_states", "mm_encoder_outputs"):
        with pytest.raises(ValueError, match=f"{argument} is a tensor, which does not tell what grids it forms"):
            model.model(inputs["input_ids"], **{argument: torch.zeros(5, 16, 64)})


# LLaVA-NeXT-Video


def test_pooled_frames_are_pruned_as_images():
    inputs = video_inputs(NEXT_VIDEO, videos=[clip(1, 5)])
    record = record_of(NEXT_VIDEO, inputs)
    assert [(entry.modality, entry.view, entry.grid) for entry in record] == [("video", frame, (3, 3)) for frame in range(5)]
    columns = (inputs["input_ids"][0] == load_pruned(NEXT_VIDEO).config.video_token_id).nonzero()[:, 0]
    assert torch.equal(torch.cat([entry.positions for entry in record]), columns)
    assert_selected_alone(NEXT_VIDEO, inputs, record)
    model = copy.deepcopy(load_pruned(NEXT_VIDEO))
    model.config.pruning_video_scope = "video"
    with torch.no_grad():
        (entry,) = model(**inputs).pruning_record
    assert entry.grid == (5, 3, 3) and entry.num_kept == num_tokens_to_keep(45, RATIO)
    assert_selected_alone(NEXT_VIDEO, inputs, [entry])
    model.config.pruning_method = "visionzip"
    with pytest.raises(
        ValueError, match="'visionzip' looks at the vision tower's patches, but a video's tokens are patches pooled"
    ):
        model(**inputs)


def test_images_and_videos_in_one_prompt_of_llava_next_video():
    inputs = video_inputs(NEXT_VIDEO, images=[picture(1)], videos=[clip(1, 3)])
    model = load_pruned(NEXT_VIDEO)
    cached, uncached = generate(model, inputs), generate(model, inputs, use_cache=False)
    torch.testing.assert_close(step_logits(cached), step_logits(uncached), **CLOSE)
    record = cache_of(cached).pruning_record
    assert {entry.modality for entry in record} == {"image", "video"}
    assert_selected_alone(NEXT_VIDEO, inputs, record)
    with torch.no_grad():
        ours, stock = model(**inputs, pruning_ratio=0.0), load_stock(NEXT_VIDEO)(**inputs)
    torch.testing.assert_close(ours.logits, stock.logits, **EXACT)
    one = generate(model, inputs, max_new_tokens=1)
    several = generate(model, inputs, max_new_tokens=1, num_return_sequences=2, num_beams=2)
    torch.testing.assert_close(several.logits[0], one.logits[0].repeat_interleave(2, dim=0), **CLOSE)


def test_frames_of_llava_next_video_are_drawn():
    colors = np.array([[200, 10 * number, 40] for number in range(3)])
    video = np.broadcast_to(colors[:, None, None].astype(np.uint8), (3, 120, 160, 3)).copy()
    inputs = video_inputs(NEXT_VIDEO, videos=[video])
    record = record_of(NEXT_VIDEO, inputs, pruning_ratio=0.01)
    processor = family_processor(NEXT_VIDEO)
    drawn = [
        processor.draw_kept_tokens(record=record, inputs=inputs)[0],
        processor.draw_kept_tokens(record=record, videos=[video], do_sample_frames=False)[0],
    ]
    for sheet in drawn:
        side = (sheet.width - GAP) // 2
        for number, color in enumerate(colors):
            row, column = divmod(number, 2)
            shown = np.asarray(sheet, dtype=int)[row * (side + GAP) + side // 6, column * (side + GAP) + side // 6]
            assert np.abs(shown - color).max() <= 3
