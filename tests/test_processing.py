"""Our processors are the stock ones, and their pictures show what was kept where the model saw it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, picture, prompt
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from vlmpruner.processing import GAP, LEGEND_HEIGHT, DrawMixin, order_color


LLAVA = FAMILIES["llava"]
SIDE, PATCH = 24, 28  # LLaVA's grid, and its 14 pixels drawn twice as large


@pytest.fixture(params=FAMILIES.values(), ids=lambda family: family.name)
def family(request):
    return request.param


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


def test_same_inputs_as_the_stock_processor(family):
    stock, ours = (each.from_pretrained(family.checkpoint) for each in (AutoProcessor, family.processor_class))
    images, texts = [picture(1), picture(2, 200, 300)], [prompt(stock, 1), prompt(stock, 1, "And this?")]
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


# (width, height) of a picture -> the grids that each family's model makes of it.
GRIDS = {
    "llava": {(640, 480): [(24, 24)], (300, 500): [(24, 24)]},
    "llava_next": {(640, 480): [(24, 24), (36, 48)], (300, 500): [(24, 24), (40, 24)]},
    "llava_onevision": {(640, 480): [(27, 27), (40, 54)], (300, 500): [(27, 27), (46, 27)]},
    "qwen2_vl": {(640, 480): [(13, 18)], (300, 500): [(18, 11)]},
    "qwen2_5_vl": {(640, 480): [(13, 18)], (300, 500): [(18, 11)]},
    "qwen3_vl": {(640, 480): [(13, 18)], (300, 500): [(16, 9)]},
}


def ramps(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, so that a colour tells a place."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 / width, y * 255 / height, 0 * x], -1).round().astype(np.uint8))


def views_of(drawn: Image.Image, grids) -> list[np.ndarray]:
    """The parts of a drawn picture that show each grid, as [height, width, 3]."""
    height = drawn.height - LEGEND_HEIGHT
    patch = height // max(rows for rows, _ in grids)
    lefts = np.cumsum([0, *(columns * patch + GAP for _, columns in grids)])
    assert drawn.width == lefts[-1] - GAP
    pixels = np.asarray(drawn).astype(int)
    return [pixels[: rows * patch, left : left + columns * patch] for (rows, columns), left in zip(grids, lefts, strict=False)]


def draw_everything(family, image: Image.Image) -> list[np.ndarray]:
    """The views of `image` as drawn when every token is kept."""
    grids = GRIDS[family.name][image.size]
    processor = family.processor_class.from_pretrained(family.checkpoint)
    record = [entry(range(math.prod(grid)), view=view, grid=grid) for view, grid in enumerate(grids)]
    return views_of(processor.draw_kept_tokens(image, record)[0], grids)


@pytest.mark.parametrize("size", [(640, 480), (300, 500)])
def test_patches_lie_where_they_are_in_the_picture(family, size):
    for number, view in enumerate(draw_everything(family, ramps(*size))):
        height, width = view.shape[:2]
        y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
        if family.name == "llava":  # which cuts a square out of the middle
            x, y = ((0.5 + (place - 0.5) * min(size) / side) for place, side in zip((x, y), size, strict=True))
        if family.name == "llava_onevision":  # 27 patches of 14 pixels leave 6 of 384 unseen
            x, y = x * 378 / 384, y * 378 / 384
        shown = view[..., 2] < 20
        if number == 1:  # the outermost patches may show padding
            shown[:PATCH] = shown[-PATCH:] = shown[:, :PATCH] = shown[:, -PATCH:] = False
        assert shown.mean() > 0.4
        error = np.abs(view[..., :2] - 255 * np.stack([x, y], -1))[shown].max()
        assert error < (3 if number == 0 else 5)


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


def test_several_grids_of_an_image_stand_side_by_side(processor):
    record = [entry([0], view=0), entry([1, 2], view=1)]
    drawn = processor.draw_kept_tokens(picture(1), record)
    assert [each.size for each in drawn] == [(2 * SIDE * PATCH + GAP, SIDE * PATCH + LEGEND_HEIGHT)]


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
