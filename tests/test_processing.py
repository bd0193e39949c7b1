"""Our processors are the stock ones, and their pictures show what was kept where the model saw it."""

import copy
import gc
import math
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, clip, load_pruned, make_inputs, picture, prompt, small_checkpoint
from packaging.version import Version
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor
from transformers.models.pixtral.image_processing_pixtral import PixtralImageProcessor

from vlmpruner.processing import GAP, LEGEND_HEIGHT, DrawMixin, SeenImages, order_color, sides_of


LLAVA = FAMILIES["llava"]
SIDE, PATCH = 24, 28  # LLaVA's grid, and its 14 pixels drawn twice as large


@pytest.fixture(scope="module")
def processor():
    return LLAVA.processor_class.from_pretrained(LLAVA.checkpoint)


def entry(order, image=0, row=0, view=0, modality="image", grid=(SIDE, SIDE)):
    """What a `PruningRecord` holds of one grid."""
    order = torch.tensor(list(order))
    return SimpleNamespace(
        row=row,
        image=image,
        view=view,
        modality=modality,
        grid=grid,
        order=order,
        kept=order.sort().values,
        num_kept=len(order),
        num_visual=grid[0] * grid[1],
    )


def brightness_of_patches(drawn: Image.Image) -> np.ndarray:
    """Mean brightness within the frame of each patch. [SIDE, SIDE]"""
    pixels = np.asarray(drawn.convert("L"), dtype=np.float64)[: SIDE * PATCH]
    patches = pixels.reshape(SIDE, PATCH, SIDE, PATCH)
    return patches[:, 4:-4, :, 4:-4].mean((1, 3))


def frame_colors(drawn: Image.Image, order) -> np.ndarray:
    """Colour of the top left pixel of each patch of `order`. [len(order), 3]"""
    pixels = np.asarray(drawn)
    return np.stack([pixels[token // SIDE * PATCH, token % SIDE * PATCH] for token in order]).astype(float)


@pytest.mark.core
def test_same_inputs_as_the_stock_processor(family):
    stock, ours = (each.from_pretrained(family.checkpoint) for each in (AutoProcessor, family.processor_class))
    images, texts = [picture(1), picture(2, 200, 300)], [prompt(stock, 1), prompt(stock, 1, "And this?")]
    images = [[image] for image in images] if family.nested else images
    expected = stock(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
    inputs = ours(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
    assert inputs.keys() == expected.keys()
    for name in inputs:
        assert inputs[name].equal(expected[name]), name
    assert ours.model_input_names == stock.model_input_names
    assert ours.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]) == stock.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}]
    )


def test_is_a_stock_processor(processor):
    assert isinstance(processor, LlavaProcessor)
    assert isinstance(processor, DrawMixin)


def test_kept_patches_are_bright_and_dropped_ones_dim(processor):
    order = [0, 23, 300, 575, 17, 299]
    drawn = processor.draw_kept_tokens(Image.new("RGB", (640, 480), (200, 180, 160)), [entry(order)])[0]
    assert drawn.size == (SIDE * PATCH, SIDE * PATCH + LEGEND_HEIGHT)
    brightness = brightness_of_patches(drawn).flatten()
    dropped = np.setdiff1d(np.arange(SIDE * SIDE), order)
    np.testing.assert_allclose(brightness[order], 184, atol=2)
    np.testing.assert_allclose(brightness[dropped], 184 * 0.35, atol=2)


def test_kept_patches_show_the_picture_unchanged(processor):
    drawn = np.asarray(processor.draw_kept_tokens(Image.new("RGB", (336, 336), (10, 120, 250)), [entry([30])])[0])
    np.testing.assert_array_equal(drawn[PATCH + 14, 6 * PATCH + 14], (10, 120, 250))


def test_colours_tell_the_order(processor):
    order = np.random.default_rng(0).permutation(SIDE * SIDE)[:64].tolist()
    drawn = processor.draw_kept_tokens(picture(1), [entry(order)])[0]
    colors = frame_colors(drawn, order)
    lightness = colors @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) < 0).all()
    np.testing.assert_array_equal(colors[0], order_color(0, 64))
    np.testing.assert_array_equal(colors[-1], order_color(63, 64))


def test_one_token_has_the_first_colour():
    assert order_color(0, 1) == order_color(0, 64)


def test_draws_on_the_crop_that_the_model_saw(processor):
    """The left and right quarters of a picture twice as wide as high are cut off before the vision tower sees it."""
    wide = Image.new("RGB", (800, 400), (255, 0, 0))
    wide.paste((0, 0, 255), (200, 0, 600, 400))
    everything = list(range(SIDE * SIDE))
    drawn = np.asarray(processor.draw_kept_tokens(wide, [entry(everything)])[0])[: SIDE * PATCH]
    centres = drawn[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH][:, 1:-1]
    assert (centres == (0, 0, 255)).all()


def test_follows_the_image_processor(processor):
    """The picture comes from the image processor itself, so its settings hold here too."""
    squashing = LLAVA.processor_class.from_pretrained(LLAVA.checkpoint)
    squashing.image_processor.size = {"height": 336, "width": 336}
    wide = Image.new("RGB", (800, 400), (255, 0, 0))
    wide.paste((0, 0, 255), (400, 0, 800, 400))
    drawn = np.asarray(squashing.draw_kept_tokens(wide, [entry(list(range(SIDE * SIDE)))])[0])
    np.testing.assert_array_equal(drawn[PATCH // 2, PATCH // 2], (255, 0, 0))
    np.testing.assert_array_equal(drawn[PATCH // 2, 23 * PATCH + PATCH // 2], (0, 0, 255))


def ramps(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, so that a colour tells a place."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 / width, y * 255 / height, 0 * x], -1).round().astype(np.uint8))


def views_of(drawn: Image.Image, grids) -> list[np.ndarray]:
    """The parts of a drawn picture that show each grid, as [height, width, 3]."""
    in_row = math.ceil(math.sqrt(len(grids)))
    sheet = [grids[first : first + in_row] for first in range(0, len(grids), in_row)]
    height = drawn.height - LEGEND_HEIGHT - GAP * (len(sheet) - 1)
    patch = height // sum(max(rows for rows, _ in row) for row in sheet)
    pixels, views, top = np.asarray(drawn).astype(int), [], 0
    for row in sheet:
        lefts = np.cumsum([0, *(columns * patch + GAP for _, columns in row)])
        assert drawn.width == lefts[-1] - GAP or row is not sheet[0]
        views += [
            pixels[top : top + rows * patch, left : left + columns * patch]
            for (rows, columns), left in zip(row, lefts, strict=False)
        ]
        top += max(rows for rows, _ in row) * patch + GAP
    return views


def draw_everything(family, image: Image.Image) -> list[np.ndarray]:
    """The views of `image` as drawn when every token is kept."""
    grids = family.grids[image.size]
    processor = family.processor_class.from_pretrained(family.checkpoint)
    record = [entry(range(math.prod(grid)), view=view, grid=grid) for view, grid in enumerate(grids)]
    return views_of(processor.draw_kept_tokens(image, record)[0], grids)


@pytest.mark.parametrize("size", [(640, 480), (300, 500)])
@pytest.mark.core
def test_patches_lie_where_they_are_in_the_picture(family, size):
    views = draw_everything(family, ramps(*size))
    for number, view in enumerate(views if len(views) <= 2 else views[-1:]):  # of tiles: test_tiles.py
        height, width = view.shape[:2]
        y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
        if family.name == "llava":  # which cuts a square out of the middle
            x, y = ((0.5 + (place - 0.5) * min(size) / side) for place, side in zip((x, y), size, strict=True))
        if family.name == "llava_onevision":  # 27 patches of 14 pixels leave 6 of 384 unseen
            x, y = x * 378 / 384, y * 378 / 384
        shown = view[..., 2] < 20
        if number == 1:  # the outermost patches may show padding
            shown[:PATCH] = shown[-PATCH:] = shown[:, :PATCH] = shown[:, -PATCH:] = False
        assert shown.mean() > 0.3
        error = np.abs(view[..., :2] - 255 * np.stack([x, y], -1))[shown].max()
        assert error < (3 if number == 0 else max(5, 128 / min(family.grids[size][number])))  # half a patch


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_the_second_view_is_the_sharper_one(name):
    stripes = Image.fromarray(np.tile(np.array([0, 0, 255, 255], dtype=np.uint8), (480, 160))).convert("RGB")
    base, larger = draw_everything(FAMILIES[name], stripes)
    assert larger.std() > 1.2 * base.std()


def test_videos_are_left_out(processor):
    record = [entry([1], image=0, modality="video"), entry([2], image=1)]
    assert len(processor.draw_kept_tokens(picture(1), record)) == 1


@pytest.mark.parametrize("nest", [lambda a, b: [a, b], lambda a, b: [[a], [b]], lambda a, b: ([], [a, b])])
def test_one_picture_per_image_in_prompt_order(processor, nest):
    images = nest(Image.new("RGB", (50, 50), (250, 0, 0)), Image.new("RGB", (90, 50), (0, 250, 0)))
    record = [entry([5], image=0), entry([5, 6], image=1, row=1)]
    drawn = processor.draw_kept_tokens(images, record)
    patch = (slice(5, 20), slice(5 * PATCH + 5, 5 * PATCH + 20))
    assert [tuple(np.asarray(each)[patch].mean((0, 1))) for each in drawn] == [(250, 0, 0), (0, 250, 0)]


def test_several_grids_of_an_image_stand_side_by_side():
    family = FAMILIES["llava_next"]
    processor = family.processor_class.from_pretrained(family.checkpoint)
    record = [entry([0], view=0), entry([1, 2], view=1, grid=(36, 48))]
    drawn = processor.draw_kept_tokens(picture(1, 640, 480), record)
    assert [each.size for each in drawn] == [((24 + 48) * PATCH + GAP, 36 * PATCH + LEGEND_HEIGHT)]


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # torchvision's, which opens the file
def test_takes_a_path(processor, tmp_path):
    picture(1).save(tmp_path / "picture.png")
    path = str(tmp_path / "picture.png")
    from_path, from_image = (processor.draw_kept_tokens(each, [entry([3])])[0] for each in (path, picture(1)))
    np.testing.assert_array_equal(np.asarray(from_path), np.asarray(from_image))


def test_refuses_another_number_of_images(processor):
    with pytest.raises(ValueError, match=r"Got 3 images to draw on, but the record is of 2 images"):
        processor.draw_kept_tokens([picture(1)] * 3, [entry([1], image=0), entry([1], image=1)])


def test_refuses_a_request_that_pruned_nothing(processor):
    with pytest.raises(ValueError, match="nothing was pruned in this request"):
        processor.draw_kept_tokens(picture(1), None)


# The picture that the model saw


def whole_llava_processor():
    """LLaVA's, for pictures of the public size."""
    return LLAVA.processor_class.from_pretrained(LLAVA.checkpoint)


def fresh_processor(family):
    return family.processor_class.from_pretrained(small_checkpoint(family))


def record_of(family, inputs):
    with torch.no_grad():
        return load_pruned(family)(**inputs).pruning_record


def all_kept(record):
    return [entry(range(each.num_visual), each.image, each.row, each.view, each.modality, each.grid) for each in record]


def assert_same(drawn: list, expected: list, levels: float = 0):
    assert [each.size for each in drawn] == [each.size for each in expected]
    for one, other in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).max() <= levels


@pytest.mark.core
def test_inputs_are_drawn_as_the_pictures_they_were_made_of(family):
    """Rows of one image and of two; also where the pixels are no longer in full precision."""
    rows = [([picture(1)], "What?"), ([picture(2, 300, 200), picture(3, 90, 150)], "Which?")]
    inputs, images = make_inputs(family, rows), [images for images, _ in rows]
    record, processor = record_of(family, inputs), fresh_processor(family)
    drawn = processor.draw_kept_tokens(record=record, inputs=inputs)
    assert len(drawn) == 3
    assert_same(drawn, processor.draw_kept_tokens(images, record), levels=1)
    assert_same(processor.draw_kept_tokens(record=record, inputs=inputs.to(torch.bfloat16)), drawn, levels=2)


def test_several_images_of_a_row_of_onevision_are_drawn_with_their_padding():
    family = FAMILIES["llava_onevision"]
    processor, images = fresh_processor(family), [[Image.new("RGB", (200, 100), (250, 0, 0)), picture(1)]]
    inputs = processor(images=images, text=[prompt(processor, 2)], return_tensors="pt")
    record = all_kept(record_of(family, inputs))
    from_inputs, from_images = (
        fresh_processor(family).draw_kept_tokens(pictures, record, inputs=given)
        for pictures, given in [(None, inputs), (images, None)]
    )
    assert_same(from_inputs, from_images, levels=1)
    middle = np.asarray(from_inputs[0])[:-LEGEND_HEIGHT, from_inputs[0].width // 2].astype(int)
    assert 0.35 < (middle[:, 0] - middle[:, 1] > 150).mean() < 0.6


def test_a_second_view_of_many_patches_has_a_smaller_grid():
    """42 x 35 patches are more than 9 views of 7 x 7, by a factor of 1.826 on each side."""
    processor = fresh_processor(FAMILIES["llava_onevision"])
    assert processor.vision_aspect_ratio == "anyres_max_9"
    assert processor.pooled_grid((42, 35), (7, 7)) == (23, 19)
    assert processor.pooled_grid((21, 21), (7, 7)) == (21, 21)


@pytest.fixture
def photo(tmp_path):
    """A file whose pixels lie on their side: upright, and as its EXIF orientation says, the upper half is red."""
    upright = Image.new("RGB", (320, 480), (0, 0, 200))
    upright.paste((220, 0, 0), (0, 0, 320, 240))
    path, exif = str(tmp_path / "photo.jpg"), Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(path, exif=exif, quality=95)
    return path


def is_upright(drawn: Image.Image, record) -> bool:
    """Whether each view is red above, and not at the left."""
    answers = set()
    views = views_of(drawn, [each.grid[-2:] for each in record])
    for view in views if len(views) <= 2 else views[-1:]:  # the last of several tiles shows the whole
        redness = view[..., 0] - view[..., 2]
        above, left = redness[: len(redness) // 4].mean(), redness[:, : redness.shape[1] // 4].mean()
        assert max(above, left) > 50 + min(above, left)
        answers.add(bool(above > left))
    return answers == {True}


# How a photo comes to the model -> what is given to the processor.
WAYS = {
    "a path": lambda path: path,
    "an opened file": Image.open,
    "turned before": lambda path: Image.open(path).transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.between
@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by_template", [False, True])
def test_a_photo_is_drawn_as_the_model_saw_it(family, photo, way, by_template):
    """Image processors turn a file by its EXIF orientation (from transformers 5.21 on), but not a picture that was opened."""
    processor, image = fresh_processor(family), WAYS[way](photo)
    if by_template:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = processor(images=image, text=prompt(processor, 1), return_tensors="pt")
    record = all_kept(record_of(family, inputs))
    seen = processor.draw_kept_tokens(record=record, inputs=inputs)
    files_are_turned = Version(transformers.__version__) >= Version("5.21")
    assert is_upright(seen[0], record) == {"a path": files_are_turned, "an opened file": False, "turned before": True}[way]
    assert_same(processor.draw_kept_tokens(image, record), seen, levels=1)
    if way == "a path":
        opened = processor.draw_kept_tokens(Image.open(photo), record)
        assert_same(opened, seen, levels=8)  # two decoders of JPEG


@pytest.mark.parametrize(
    "common", [{}, {"do_normalize": False}, {"do_rescale": False}, {"image_mean": [0.1] * 3, "image_std": [2.0] * 3}]
)
def test_options_of_one_call(family, common):
    """From the pixels; from the picture with the options; and from a picture whose options the processor was told."""
    image = picture(3, 448, 224)
    for options in family.options:
        options, processor = options | common, fresh_processor(family)
        inputs = processor(images=image, text=prompt(processor, 1), return_tensors="pt", **options)
        record = record_of(family, inputs)
        seen = fresh_processor(family).draw_kept_tokens(record=record, inputs=inputs, **options)
        assert np.asarray(seen[0])[:-LEGEND_HEIGHT].std() > 20
        assert_same(fresh_processor(family).draw_kept_tokens(image, record, **options), seen, levels=2)
        assert_same(fresh_processor(family).draw_kept_tokens(image, record, images_kwargs=options), seen, levels=2)
        assert_same(processor.draw_kept_tokens(image, record), seen, levels=2)
        told = copy.deepcopy(processor)
        for name, value in options.items():
            setattr(told.image_processor, name, value)
        assert_same(told.draw_kept_tokens(image, record), seen, levels=2)


def test_a_picture_of_another_grid_is_named(family):
    images = [picture(1, 320, 240), picture(2, 240, 320)]
    record = record_of(family, make_inputs(family, [(images, "Which?")]))
    if family.name == "llava":
        record = [entry([1], image=0, grid=(6, 6)), entry([1], image=1, grid=(12, 12))]
    grids = {number: [each.grid for each in record if each.image == number] for number in (0, 1)}
    images = images if family.name == "llava" else [images[0], picture(3, 800, 200)]
    right = re.escape(sides_of(grids[1]))
    with pytest.raises(
        ValueError, match=rf"Image 1 \(counted from 0\) makes a grid of .+ tokens, but the record has {right}\."
    ):
        fresh_processor(family).draw_kept_tokens(images, record)


@pytest.mark.parametrize(("name", "missing"), [("llava_next", "image_sizes"), ("qwen2_vl", "image_grid_thw")])
def test_pixels_without_their_sizes_are_named(name, missing):
    inputs = make_inputs(FAMILIES[name], [([picture(1)], "What?")])
    record = record_of(FAMILIES[name], inputs)
    del inputs[missing]
    with pytest.raises(ValueError, match=f"The inputs have pixel_values, but not '{missing}', which comes with it"):
        fresh_processor(FAMILIES[name]).draw_kept_tokens(record=record, inputs=inputs)


FORMS = {
    "array of several": np.stack,
    "tensor of several": lambda arrays: torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2),
    "arrays, channels first": lambda arrays: [array.transpose(2, 0, 1) for array in arrays],
    "tensors": lambda arrays: [torch.from_numpy(array) for array in arrays],
    "rows of arrays": lambda arrays: [[array] for array in arrays],
    "tuple of pictures": lambda arrays: tuple(map(Image.fromarray, arrays)),
    "arrays of one row each": lambda arrays: [array[None] for array in arrays],
}


def test_every_form_of_several_pictures(family):
    pictures = [picture(seed, 160, 120) for seed in (1, 2)]
    record = record_of(family, make_inputs(family, [([each], "What?") for each in pictures]))
    processor, arrays = fresh_processor(family), [np.array(each) for each in pictures]
    expected = processor.draw_kept_tokens(pictures, record)
    assert len(expected) == 2
    for form in FORMS.values():
        assert_same(processor.draw_kept_tokens(form(arrays), record), expected, levels=1)


@pytest.mark.parametrize("family", [each for each in FAMILIES.values() if each.has_videos], ids=lambda family: family.name)
@pytest.mark.parametrize("options", [{}, {"do_normalize": False}])
def test_images_and_videos_from_inputs(family, options):
    """Videos alone, where the model refuses both in one call."""
    processor, image, videos = fresh_processor(family), picture(1), [clip(1, 4), clip(5, 4)]
    model = load_pruned(family).model
    image = None if model.placeholder_id("image") == model.placeholder_id("video") else image
    told = options | {"do_sample_frames": False}
    text = prompt(processor, int(image is not None), num_videos=2)
    inputs = processor(images=image, videos=videos, text=text, return_tensors="pt", **told)
    record = record_of(family, inputs)
    drawn = fresh_processor(family).draw_kept_tokens(record=record, inputs=inputs, **options)
    assert len(drawn) == 2 + (image is not None)
    assert_same(drawn, fresh_processor(family).draw_kept_tokens(image, record, videos=videos, **told), levels=1)
    if image is not None:
        del inputs["pixel_values"]
        with pytest.raises(ValueError, match="Got 0 images to draw on, but the record is of 1 images"):
            processor.draw_kept_tokens(record=record, inputs=inputs)


def test_images_of_a_tower_that_takes_any_size():
    """Pixtral's image processor pads the images of a batch to the largest; the padding is no part of a grid."""
    image_processor = PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = LLAVA.processor_class.from_pretrained(LLAVA.checkpoint)
    processor.image_processor = image_processor
    images = [ramps(112, 56), ramps(56, 112)]
    inputs = image_processor(images, return_tensors="pt")
    record = [entry(range(32), image=0, grid=(4, 8)), entry(range(32), image=1, grid=(8, 4))]
    drawn = processor.draw_kept_tokens(record=record, inputs=inputs)
    assert_same(drawn, processor.draw_kept_tokens(images, record), levels=1)
    assert [tuple(np.asarray(each)[13, 13, :2] > 100) for each in drawn] == [(False, False)] * 2
    assert np.asarray(drawn[0])[14, 8 * PATCH - 14, 0] > 220 and np.asarray(drawn[1])[8 * PATCH - 14, 14, 1] > 220


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": picture(1), "inputs": {}}, "takes either inputs or the images and videos"),
        ({}, "takes either inputs or the images and videos"),
        ({"images": picture(1), "max_pixel": 3}, "has an option 'max_pixel'"),
        ({"images": picture(1), "images_kwargs": {"sizes": 3}}, "has an option 'sizes'"),
    ],
)
def test_refuses_bad_arguments(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor.draw_kept_tokens(record=[entry([1])], **arguments)


def test_an_image_given_with_several_options_is_not_guessed():
    """The grid does not tell the calls apart. Options that change nothing of the picture do not count."""
    processor, image, size = whole_llava_processor(), picture(1), {"height": 336, "width": 336}
    text, record = prompt(processor, 1), [entry([1])]
    processor(images=[image, image], text=[text] * 2)
    processor(images=image, text=text, do_center_crop=True, do_normalize=False)
    expected = whole_llava_processor().draw_kept_tokens(image, record)
    assert_same(processor.draw_kept_tokens(image, record), expected, levels=1)
    inputs = processor(images=image, text=text, size=size, return_tensors="pt")
    size["width"] = 400
    message = r"Image 0 .+ \{\} and then .+ and then \{'size': .+'width': 336\}\}, and the record fits more than one"
    with pytest.raises(ValueError, match=message):
        processor.draw_kept_tokens(image, record)
    seen = processor.draw_kept_tokens(record=record, inputs=inputs)
    assert_same(processor.draw_kept_tokens(image, record, size={"height": 336, "width": 336}), seen, levels=1)


def test_an_opened_photo_is_read_as_in_its_call_also_with_options(photo):
    processor, image = whole_llava_processor(), Image.open(photo)
    inputs = processor(images=image, text=prompt(processor, 1), return_tensors="pt", do_normalize=False)
    seen = processor.draw_kept_tokens(record=[entry([1])], inputs=inputs, do_normalize=False)
    assert_same(processor.draw_kept_tokens(image, [entry([1])], do_normalize=False), seen, levels=1)


@pytest.mark.parametrize("form", [np.copy, np.asarray, torch.from_numpy])
def test_arrays_are_remembered_too(form):
    processor, given = fresh_processor(LLAVA), form(np.array(picture(1))[1:])
    processor(images=[given], text=prompt(processor, 1), do_center_crop=False)
    assert processor.seen_images.options_of(given) == [{"do_center_crop": False}]
    assert processor.seen_images.options_of(given[:]) == []


def test_what_is_remembered_of_images_ends_with_them(tmp_path):
    processor, image = fresh_processor(LLAVA), picture(1)
    processor(images=image, text=prompt(processor, 1), do_center_crop=False)
    seen = processor.seen_images
    assert seen.options_of(image) == [{"do_center_crop": False}]
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert other.seen_images.options_of(image) == []
    processor.save_pretrained(tmp_path)
    assert "seen_images" not in (tmp_path / "processor_config.json").read_text()
    del image
    gc.collect()
    assert not seen._calls


def test_an_image_with_the_id_of_another_is_not_taken_for_it():
    seen, ids = SeenImages(), set()
    for _ in range(20):
        image = Image.new("RGB", (2, 2))
        assert seen.options_of(image) == []
        seen.add(image, {"do_center_crop": False})
        ids.add(id(image))
        del image
    assert len(ids) < 20
    for image in ("photo.jpg", b"", None):  # without weak references
        seen.add(image, {"do_center_crop": False})
        assert seen.options_of(image) == []
