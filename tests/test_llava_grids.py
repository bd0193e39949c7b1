"""What is LLaVA's own: views of any resolution with newlines, frames of videos, images that stay with their row for beams."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from families import FAMILIES, assert_selected_alone, clip, load_processor, load_pruned, load_stock, picture
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from vlmpruner.processing import GAP, LEGEND_HEIGHT
from vlmpruner.pruned_cache import CACHE_NAME, PrunedImage, PruningRecord, cache_of
from vlmpruner.token_pruning import num_tokens_to_keep


ONEVISION = FAMILIES["llava_onevision"]
FRAME = (4, 4)  # grid of a frame: the 7 x 7 patches of the small tower, pooled by two
RATIO = 0.889
CLOSE = {"rtol": 0, "atol": 1e-4}
# The resolutions of the public checkpoints: (height, width) in pixels.
PINPOINTS = {
    "llava_next": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "llava_onevision": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
}


@pytest.fixture(params=["llava_next", "llava_onevision"])
def family(request):
    return FAMILIES[request.param]


def record_of(family, inputs):
    with torch.no_grad():
        return load_pruned(family)(**inputs).pruning_record


def media_inputs(family, *rows):
    """Model inputs for rows of (content, text), content being pictures and video arrays in the order of the prompt."""
    processor, texts = load_processor(family), []
    for content, text in rows:
        kinds = ["image" if isinstance(part, Image.Image) else "video" for part in content]
        message = {"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}
        texts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    images = [[part for part in content if isinstance(part, Image.Image)] for content, _ in rows]
    videos = [part for content, _ in rows for part in content if not isinstance(part, Image.Image)]
    media = ({"images": images} if any(images) else {}) | ({"videos": videos} if videos else {})
    return processor(**media, text=texts, return_tensors="pt", padding=True, padding_side="left")


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | kwargs
    return model.generate(**inputs, **kwargs)


def step_logits(outputs):
    return torch.stack(outputs.logits, dim=1)


def grids_of(record, row=None):
    return [(entry.modality, entry.grid) for entry in record if row in (None, entry.row)]


# Grids of images


def model_of_public_size(family):
    """The family's model with the grids of the public checkpoints, for what reads the config alone."""
    model = copy.deepcopy(load_pruned(family).model)
    model.config.image_grid_pinpoints = PINPOINTS[family.name]
    model.config.vision_config.image_size = 336 if family.name == "llava_next" else 384
    return model


def places_of_tiles(config, image_size) -> torch.Tensor:
    """(y, x) of each patch: in the base view, then in the canvas of all tiles. [num_tiles, side * side, 2]"""
    image_side = config.vision_config.image_size
    side = image_side // config.vision_config.patch_size
    rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, image_side)
    base = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).flatten(0, 1)
    tiles = [base + torch.tensor([row, column]) * side for row in range(rows) for column in range(columns)]
    return torch.stack([base, *tiles]).double()


def random_sizes(count: int) -> list[tuple[int, int]]:
    sides = np.exp(np.random.default_rng(5).uniform(np.log(4), np.log(4000), (count, 2))).astype(int)
    return [(1, 1), (1, 2000), (2000, 1), (40, 3000), (1000, 1000), (336, 672), *map(tuple, sides.tolist())]


@pytest.mark.parametrize("vision_aspect_ratio", ["anyres_max_9", "anyres_max_4"])
def test_grids_are_where_the_stock_class_packs_them(family, vision_aspect_ratio):
    """The stock class packs patches that say where they are: the grids hold all of them, row by row, and no newline."""
    model = model_of_public_size(family)
    strategy = {"vision_feature_select_strategy": "default"} if family.name == "llava_next" else {}
    options = strategy or {"vision_aspect_ratio": vision_aspect_ratio}
    newline = torch.full((2,), torch.nan, dtype=torch.float64)
    num_downscaled = 0
    for size in random_sizes(300):
        tiles = places_of_tiles(model.config, size)
        for image in (tiles, tiles[:1]):
            (places,), _ = model.pack_image_features([image], [size], image_newline=newline, **options)
            views = model.grid_views_of("image", places)
            is_newline = places.isnan().any(-1)
            covered = torch.cat([view.token_indices() for view in views])
            assert torch.equal(covered, (~is_newline).nonzero()[:, 0]), size
            for view in views:
                grid = places[view.token_indices()].view(*view.grid, 2)
                y, x = grid.unbind(-1)
                assert y.allclose(y[:, :1]) and x.allclose(x[:1]), size
                assert (y.diff(dim=0) > 0.9).all() and (x.diff(dim=1) > 0.9).all(), size
                if view.row_stride is not None:
                    assert is_newline[view.start + view.width :: view.row_stride].all(), size
                    num_downscaled += bool((y.diff(dim=0) > 1.01).any())
    assert (num_downscaled > 0) == (family.name == "llava_onevision")


def test_a_grid_that_does_not_fit_its_features_is_named(family):
    model = model_of_public_size(family)
    tiles = places_of_tiles(model.config, (300, 500))
    options = {"vision_feature_select_strategy": "default"} if family.name == "llava_next" else {}
    (features,), _ = model.pack_image_features([tiles], [(300, 500)], image_newline=torch.zeros(2), **options)
    fewer = features[:-1]
    fewer.packed_tiles = features.packed_tiles
    with pytest.raises(ValueError, match=rf"300 x 500 pixels makes {len(features)} features.*has {len(fewer)} features"):
        model.grid_views_of("image", fewer)
    with pytest.raises(ValueError, match=r"grid of image features of shape .* is not known"):
        model.grid_views_of("image", features[:-1])


def test_missing_image_sizes_are_named(family):
    inputs = media_inputs(family, ([picture(1)], "What?"))
    del inputs["image_sizes"]
    for ratio in (RATIO, 0.0):
        with pytest.raises(ValueError, match="got pixel_values but no image_sizes"):
            load_pruned(family)(**inputs, pruning_ratio=ratio)
        with pytest.raises(ValueError, match="got pixel_values but no image_sizes"):
            generate(load_pruned(family), inputs, pruning_ratio=ratio)


def test_newlines_are_structure(family):
    """Exactly the features that are no newline are on a grid."""
    model, inputs = load_pruned(family), media_inputs(family, ([picture(1, 500, 200)], "What?"))
    with torch.no_grad():
        outputs = model(**inputs)
    if hasattr(outputs, "image_outputs"):  # from transformers 5.24 on
        features = torch.cat(list(outputs.image_outputs.pooler_output))
    else:
        features = outputs.image_hidden_states
    is_newline = (features == model.model.image_newline).all(-1)
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    base, view = outputs.pruning_record
    assert torch.equal(torch.cat([base.positions, view.positions]), columns[~is_newline])
    assert is_newline.sum() == view.grid[0]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 700), (700, 9), (1200, 900)], ids=str)
def test_sizes_small_and_large_and_an_image_repeated(family, size):
    image = picture(1).resize(size)
    once, twice = (record_of(family, media_inputs(family, ([image] * count, "What?"))) for count in (1, 2))
    assert all(entry.num_kept == num_tokens_to_keep(entry.num_visual, RATIO) for entry in once)
    views_of_two = 1 if family is ONEVISION else len(once)
    assert grids_of(twice) == grids_of(once.images[:views_of_two]) * 2
    assert [entry.image for entry in twice] == [0] * views_of_two + [1] * views_of_two


def test_of_a_very_thin_image_the_base_view_remains():
    """Unpadding takes the same number of rows above and below, so of an even number of rows none is left."""
    llava_next = FAMILIES["llava_next"]
    record = record_of(llava_next, media_inputs(llava_next, ([picture(1).resize((900, 2))], "What?")))
    assert grids_of(record) == [("image", (6, 6))]


def test_onevision_sees_several_images_of_a_row_in_a_base_view_each():
    rows = [([picture(1), picture(2)], "Which one?"), ([], "Say something."), ([picture(3, 200, 300)], "What?")]
    batch = record_of(ONEVISION, media_inputs(ONEVISION, *rows))
    assert grids_of(batch, 0) == [("image", (7, 7))] * 2
    assert grids_of(batch, 1) == []
    assert grids_of(batch, 2) == [("image", (7, 7)), ("image", (14, 10))]


# Videos


def test_slices_of_a_video_are_pruned_as_images():
    inputs = media_inputs(ONEVISION, ([clip(1, 5)], "What happens?"))
    record = record_of(ONEVISION, inputs)
    assert grids_of(record) == [("video", FRAME)] * 5
    assert [entry.view for entry in record] == [0, 1, 2, 3, 4]
    columns = (inputs["input_ids"][0] == load_pruned(ONEVISION).config.video_token_id).nonzero()[:, 0]
    assert torch.equal(torch.cat([entry.positions for entry in record]), columns[:-1])  # the last one is the newline
    assert_selected_alone(ONEVISION, inputs, record)


LONG_VIDEO = """
import resource, sys
import torch
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaOnevisionForConditionalGeneration as Model

model = Model.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
size, placeholder = model.config.vision_config.image_size, model.config.video_token_id
ids = torch.tensor([[10, *[placeholder] * (64 * 196 + 1), 11]])
video = torch.randn(1, 64, 3, size, size)
for ratio in (0.0, 0.889):
    with torch.no_grad():
        record = model(ids, pixel_values_videos=video, logits_to_keep=1, pruning_ratio=ratio).pruning_record
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(len(record), record.num_visual, record.num_kept)
"""


@pytest.mark.once
def test_a_long_video_needs_no_square_of_its_length():
    """64 frames of 196 tokens, as in LLaVA-Video: what pruning adds to the peak of the unpruned forward, in MiB.

    One 12,544 x 12,544 matrix of float32 alone would be 600.
    """
    command = [sys.executable, "-c", LONG_VIDEO, str(ONEVISION.checkpoint)]
    unpruned, pruned, counts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert counts == f"64 12544 {64 * 22}"
    assert int(pruned) - int(unpruned) < 200


def test_a_video_under_one_budget():
    model = copy.deepcopy(load_pruned(ONEVISION))
    model.config.pruning_video_scope = "video"
    inputs = media_inputs(ONEVISION, ([clip(1, 5)], "What happens?"))
    with torch.no_grad():
        record = model(**inputs).pruning_record
    assert grids_of(record) == [("video", (5, *FRAME))]
    assert record.num_kept == num_tokens_to_keep(5 * 4 * 4, RATIO)
    assert_selected_alone(ONEVISION, inputs, record)


@pytest.mark.parametrize("order", [["image", "video"], ["video", "image"], ["video", "image", "video", "image"]], ids="-".join)
def test_images_and_videos_in_one_prompt(order):
    media = {"image": [picture(1), picture(2, 300, 200)], "video": [clip(3, 2), clip(4, 2)]}
    content = [media[kind][order[:number].count(kind)] for number, kind in enumerate(order)]
    inputs = media_inputs(ONEVISION, (content, "What happens?"))
    record = record_of(ONEVISION, inputs)
    views = {"image": 2 if order.count("image") == 1 else 1, "video": 2}
    by_position = sorted(record, key=lambda entry: int(entry.positions[0]))
    assert [entry.modality for entry in by_position] == [kind for kind in order for _ in range(views[kind])]
    assert_selected_alone(ONEVISION, inputs, record)


MIXED_ROWS = [
    ([picture(1), picture(2, 300, 200)], "Which one?"),
    ([clip(3, 3)], "What happens?"),
    ([], "Say something about nothing at all, please."),
    ([clip(4, 3), picture(5, 200, 300), clip(6, 3)], "And now?"),
]


def test_rows_of_images_and_videos_equal_single_rows():
    model = load_pruned(ONEVISION)
    batch = generate(model, media_inputs(ONEVISION, *MIXED_ROWS))
    for number, row in enumerate(MIXED_ROWS):
        single = generate(model, media_inputs(ONEVISION, row))
        torch.testing.assert_close(step_logits(batch)[number], step_logits(single)[0], **CLOSE)
        single_record = model.get_pruning_record(single) or []
        kept = [entry.kept.tolist() for entry in cache_of(batch).pruning_record if entry.row == number]
        assert kept == [entry.kept.tolist() for entry in single_record]


def test_videos_off_are_bit_equal_to_the_stock_class():
    inputs = media_inputs(ONEVISION, *MIXED_ROWS)
    stock = generate(load_stock(ONEVISION), inputs)
    ours = generate(load_pruned(ONEVISION), inputs, pruning_ratio=0.0)
    torch.testing.assert_close(step_logits(ours), step_logits(stock), rtol=0, atol=0)


def test_a_video_in_a_later_turn_equals_one_piece():
    model = load_pruned(ONEVISION)
    first, second = media_inputs(ONEVISION, ([picture(1)], "What?")), media_inputs(ONEVISION, ([clip(2, 3)], "And now?"))
    joined = {name: torch.cat([first[name], second[name]], dim=1) for name in ("input_ids", "attention_mask")}
    images = {name: first[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    video = {"pixel_values_videos": second["pixel_values_videos"]}
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        turn = {"input_ids": second["input_ids"], "attention_mask": joined["attention_mask"]}
        outputs = model(**turn, **video, **{CACHE_NAME: cache})
        whole = model(**joined, **images, **video)
    assert grids_of(cache.pruning_record) == grids_of(whole.pruning_record)
    torch.testing.assert_close(outputs.logits, whole.logits[:, first["input_ids"].shape[1] :], **CLOSE)


def test_video_features_that_are_no_frames_are_named():
    features = torch.zeros(3 * 16 + 3, 8)
    with pytest.raises(ValueError, match="has 51 features, which is no number of frames of 4 x 4 = 16"):
        load_pruned(ONEVISION).model.grid_views_of("video", features)


# Several sequences for each row


@pytest.mark.parametrize("ratio", [RATIO, 0.0], ids=["pruned", "off"])
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": True, "top_k": 1}], ids=["beams", "samples"])
def test_sequences_of_a_row_see_its_images_and_videos(how, ratio):
    """transformers 5.17 repeats each image on its own: one beam of a row with two images saw the first twice."""
    model, inputs = load_pruned(ONEVISION), media_inputs(ONEVISION, *MIXED_ROWS)
    one = generate(model, inputs, pruning_ratio=ratio, max_new_tokens=1)
    several = generate(model, inputs, pruning_ratio=ratio, max_new_tokens=1, num_return_sequences=2, **how)
    torch.testing.assert_close(several.logits[0], one.logits[0].repeat_interleave(2, dim=0), **CLOSE)


def test_sequences_of_rows_given_as_embeddings():
    model, inputs = load_pruned(ONEVISION), media_inputs(ONEVISION, *MIXED_ROWS)
    several = generate(model, inputs, max_new_tokens=1, num_return_sequences=2, num_beams=2)
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(
        generate(model, inputs, max_new_tokens=1, num_return_sequences=2, num_beams=2).logits[0], several.logits[0], **CLOSE
    )


def test_pixels_that_are_not_one_entry_for_each_image_are_not_repeated():
    model, inputs = load_pruned(FAMILIES["llava_next"]), media_inputs(FAMILIES["llava_next"], ([picture(1)], "What?"))
    tiles = inputs | {"pixel_values": inputs["pixel_values"][0]}
    with torch.no_grad():
        torch.testing.assert_close(model(**tiles).logits, model(**inputs).logits, **CLOSE)
    with pytest.raises(ValueError, match=f"there are {len(tiles['pixel_values'])} entries for 1 images"):
        model._expand_inputs_for_generation(expand_size=2, **tiles)


def test_models_without_head_load_like_the_stock_ones(family):
    stock, ours = load_stock(family).model, load_pruned(family).model
    infos = [type(each).from_pretrained(family.checkpoint, output_loading_info=True)[1] for each in (stock, ours)]
    assert infos[0] == infos[1] and not infos[1]["missing_keys"]


# Pictures of what was kept


def entry(grid, order, view=0, modality="video"):
    return PrunedImage(0, 0, view, modality, tuple(grid), torch.arange(int(np.prod(grid))), torch.tensor(order))


def shown_colors(sheet, grid, num_slices, token):
    """The colours at the middle of patch `token` of each slice of a contact sheet. [num_slices, 3]"""
    columns = int(np.ceil(np.sqrt(num_slices)))
    patch = (sheet.width - GAP * (columns - 1)) // columns // grid[1]
    row, column = np.divmod(np.arange(num_slices), columns)
    top, left = row * (grid[0] * patch + GAP), column * (grid[1] * patch + GAP)
    assert sheet.height == top[-1] + grid[0] * patch + LEGEND_HEIGHT
    y, x = (place * patch + patch // 2 for place in divmod(token, grid[1]))
    return np.asarray(sheet)[top + y, left + x].astype(int)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("scope", ["slice", "video"])
def test_a_contact_sheet_shows_each_slice(name, scope):
    """Frames of one colour each, of which one patch is kept: it shows the colour of the slice's first frame."""
    family, colors = FAMILIES[name], np.array([[200, 10 * number, 40] for number in range(10)])
    video = np.broadcast_to(colors[:, None, None].astype(np.uint8), (10, 120, 160, 3)).copy()
    processor = family.processor_class.from_pretrained(family.checkpoint)
    inputs = processor.video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
    grid = (14, 14) if name == "llava_onevision" else tuple(int(side) // 2 for side in inputs["video_grid_thw"][0, 1:])
    num_slices, num_patches = 10 if name == "llava_onevision" else 5, grid[0] * grid[1]
    if scope == "slice":
        record = PruningRecord(tuple(entry(grid, [17], view=number) for number in range(num_slices)))
    else:
        record = PruningRecord((entry((num_slices, *grid), [17 + num_patches * number for number in range(num_slices)]),))
    (sheet,) = processor.draw_kept_tokens(None, record, videos=[video], do_sample_frames=False)
    np.testing.assert_allclose(shown_colors(sheet, grid, num_slices, 17), colors[:: 10 // num_slices], atol=2)
    assert (shown_colors(sheet, grid, num_slices, 18).std(axis=1) == 0).all()
    with pytest.raises(ValueError, match=r"Got 2 videos to draw on, but the record is of 1 videos"):
        processor.draw_kept_tokens(None, record, videos=[video, video])
    with pytest.raises(ValueError, match=rf"Got {num_slices} slices to draw on, but the record is of {num_slices + 1} slices"):
        processor.draw_kept_tokens(
            None, PruningRecord((*record, entry(grid, [0], view=num_slices))), videos=[video], do_sample_frames=False
        )


def test_images_come_before_videos_and_none_is_left_out():
    processor = ONEVISION.processor_class.from_pretrained(ONEVISION.checkpoint)
    image, video = picture(1, 640, 480), np.zeros((2, 60, 80, 3), dtype=np.uint8)
    image_entries = [entry((27, 27), [1], modality="image"), entry((40, 54), [1], view=1, modality="image")]
    record = PruningRecord((*image_entries, entry((14, 14), [1]), entry((14, 14), [2], view=1)))
    both = processor.draw_kept_tokens(image, record, videos=video)
    assert len(both) == 2 and both[0].width > both[0].height > both[1].height
    assert [each.size for each in processor.draw_kept_tokens(image, record)] == [both[0].size]


def test_a_very_thin_image_is_drawn_without_a_second_view():
    family = FAMILIES["llava_next"]
    processor = family.processor_class.from_pretrained(family.checkpoint)
    drawn = processor.draw_kept_tokens(picture(1).resize((900, 2)), PruningRecord((entry((24, 24), [1], modality="image"),)))
    assert drawn[0].size == (24 * 28, 24 * 28 + LEGEND_HEIGHT)


def test_one_of_several_images_of_a_row_is_drawn_with_its_padding():
    processor = ONEVISION.processor_class.from_pretrained(ONEVISION.checkpoint)
    record = PruningRecord((entry((27, 27), list(range(27 * 27)), modality="image"),))
    pixels = np.asarray(processor.draw_kept_tokens(Image.new("RGB", (500, 250), (250, 0, 0)), record)[0])[: 27 * 28]
    rows = pixels[14::28, 27 * 14]
    assert ((rows == (250, 0, 0)).all(-1) == (abs(np.arange(27) - 13) < 7)).all()
