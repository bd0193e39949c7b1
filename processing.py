"""Processors that behave as the base model's and can also draw which visual tokens were kept.

`draw_kept_tokens` draws on the picture as the vision tower saw it, so that patches line up: for LLaVA the resized and
centre-cropped square, not the file that was opened. It is made of the pixels that the model was given; where the caller has the
pictures alone, they go through the image processor once more.
"""

import base64
import copy
import io
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, islice
from math import ceil, isqrt, sqrt

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import (
    Glm4vProcessor,
    Glm46VProcessor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PixtralProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.video_utils import make_batched_videos

from .configuration_vlmpruner import VideoLayout
from .stock_lookups import stock_class


# First to last selected: plasma's yellow to purple, along which lightness only falls.
ORDER_COLORS = ((240, 249, 33), (248, 149, 64), (204, 71, 120), (140, 30, 190))
SMALLEST_PATCH = 24  # pixels; smaller patches are enlarged until frames are legible
FRAME = 3
GAP = 8  # between the grids of one image or video
DROPPED_BRIGHTNESS = 0.35
LEGEND_HEIGHT = 30
BACKGROUND, FOREGROUND = (24, 24, 24), (235, 235, 235)
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
NESTED = ("images_kwargs", "videos_kwargs")
# Of a checkpoint, where the library looks for the name of its processor's class, in this order.
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer_config.json", "config.json"),
)
# What an image or a video processor can be told that changes how its pixels are read.
SETTINGS = (
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("image_grid_pinpoints", "patch_size", "merge_size", "temporal_patch_size"),
)


def order_color(place: int, num_kept: int) -> tuple[int, int, int]:
    """The colour of the token selected as number `place` (from 0) of `num_kept`."""
    position = place / max(num_kept - 1, 1) * (len(ORDER_COLORS) - 1)
    lower = min(int(position), len(ORDER_COLORS) - 2)
    weight = position - lower
    pair = zip(ORDER_COLORS[lower], ORDER_COLORS[lower + 1], strict=True)
    return tuple(round(first * (1 - weight) + second * weight) for first, second in pair)


def flatten_images(images) -> list[tuple]:
    """A picture, an array of several, a list of them, or a list per row: each, in prompt order, and the object it is of."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [image for part in images for image in flatten_images(part)]
    return [(image, images) for image in (images if getattr(images, "ndim", 0) == 4 else [images])]


class SeenImages:
    """The different options that a processor was called with for each image object that still exists. A copy begins empty.

    Paths and urls are not remembered: no weak reference can follow a string.
    """

    def __init__(self):
        self._calls = {}  # id of an image -> a reference that drops this item when the image ends, and the options

    def add(self, image, options: dict):
        key, earlier = id(image), self.options_of(image)
        try:
            reference = weakref.ref(image, lambda _: self._calls.pop(key, None))
        except TypeError:
            return
        self._calls[key] = reference, [each for each in earlier if each != options] + [copy.deepcopy(options)]

    def options_of(self, image) -> list[dict]:
        """The latest last; empty for an image that was not given to the processor."""
        reference, options = self._calls.get(id(image), (lambda: None, []))
        return options if reference() is image else []

    def __reduce__(self):
        return SeenImages, ()


class DrawMixin:
    """Adds `draw_kept_tokens` to a processor. A family tells in `image_views` and `video_slices` what its grids cover."""

    _auto_class = "AutoProcessor"
    images_by_row = False  # whether a batch's images come as a list for each row, and not one after another

    @classmethod
    def _get_arguments_from_pretrained(cls, *args, **kwargs):
        """As the stock class, because the library goes by its name: Pixtral's tokenizer is read in a way of its own."""
        return stock_class(cls)._get_arguments_from_pretrained(*args, **kwargs)

    def __call__(self, images=None, *args, **kwargs):
        """As in the stock class. How each image object was read is remembered for `draw_kept_tokens`, as long as it exists."""
        inputs = super().__call__(images, *args, **kwargs)
        seen = self.__dict__.setdefault("seen_images", SeenImages())
        options = self.options_for("image", kwargs)
        for given in {id(given): given for _, given in flatten_images(images)}.values():
            seen.add(given, options)
        return inputs

    def draw_kept_tokens(
        self, images=None, record=None, videos=None, inputs=None, first: int | None = None, **kwargs
    ) -> list[Image.Image]:
        """Draw what a request kept: kept patches bright and framed, dropped ones grey and dim.

        The colour of a frame tells when its token was selected: yellow first, purple last, as in the strip below the picture.
        Give `inputs` where you have them: they are what the model saw, whatever the pictures went through before.

        Args:
            images: the pictures given to the processor, in any form that it takes: one, a list, a list per row, an array of
                several. None leaves them out. An image object that this processor was called with is read as in that call, also
                without `kwargs`. Any other, and a path, is read with `kwargs` alone; of a file that the caller has opened, it
                is turned upright by its EXIF orientation if the processor turns files so, or if it fits the record only so.
            record: the `PruningRecord` of the request that saw them.
            videos: the videos given to the processor, likewise. None leaves them out.
            inputs: what the processor made of images and videos, instead of these: `pixel_values`, `pixel_values_videos` and
                what came with them (`image_sizes`, `image_grid_thw`, ...), as given to the model.
            first: draw only so many of the tokens that each grid kept, the first in the order of selection; None is all.
            kwargs: what else the processor was told in that call, such as `size`, `do_center_crop` or `do_sample_frames`, also
                as `images_kwargs` and `videos_kwargs`. Of `inputs` only those count that normalize, or that cut into patches.

        Returns:
            One RGB picture per image, then one per video, in prompt order. An image with several grids is a contact sheet of
            them, in rows from left to right; a video likewise one of its temporal slices.

        Raises:
            ValueError: if nothing was pruned in the request; if it had another number of images, videos or slices; if an image
                or a video makes another grid than the record has; if the processor was called with an image several times,
                with different options, and the record fits more than one of these calls; if `first` is no count.
        """
        if first is not None and (not isinstance(first, int) or first < 0):
            raise ValueError(
                f"first must be None or an integer >= 0, the number of tokens to draw of each grid, got {first!r}."
            )
        if record is None:
            raise ValueError("There is no record to draw: nothing was pruned in this request.")
        if (inputs is None) == (images is None and videos is None):
            raise ValueError("draw_kept_tokens takes either inputs or the images and videos that they were made of.")
        for name in (name for names in (kwargs, *map(kwargs.get, NESTED)) for name in names or ()):
            if name not in {*NESTED, *self.option_names("image"), *self.option_names("video")}:
                raise ValueError(f"Neither the image processor nor the video processor has an option {name!r}.")
        drawn = []
        for pictures, entries in self.seen_media("image", images, record, inputs, kwargs):
            drawn.append(with_legend(draw_grids(pictures, entries, first), entries, ceil(sqrt(len(pictures))), first))
        for pictures, entries in self.seen_media("video", videos, record, inputs, kwargs):
            drawn.append(with_legend(draw_grids(pictures, entries, first), entries, ceil(sqrt(len(pictures))), first))
        return drawn

    def seen_media(self, modality: str, media, record, inputs, kwargs: dict) -> Iterator[tuple[list[Image.Image], list]]:
        """For each image (or video) a picture of what each of its grids covers, as the model saw it, and its entries."""
        options = self.options_for(modality, kwargs)
        if inputs is None and media is None:
            return
        if inputs is None and modality == "image":
            for number, ((image, given), entries) in enumerate(pair_with_entries(flatten_images(media), record, modality)):
                yield self.pictures_of_image(image, given, options, entries, number), entries
            return
        if inputs is None:
            options = {"do_normalize": False} | options
            inputs = self.read_videos(make_batched_videos(media), options)
        has_pixels = inputs.get(PIXELS[modality]) is not None
        views_of_all = self.views_of(modality, inputs, options) if has_pixels else []
        record = self.entries_of(modality, record, views_of_all)
        for number, (views, entries) in enumerate(pair_with_entries(views_of_all, record, modality)):
            check_grids(modality, number, views, entries)
            yield [picture for picture, _ in views], entries

    def pictures_of_image(self, image, given, options: dict, entries, number: int) -> list[Image.Image]:
        """What the grids of `entries` cover of `image`, a part of the object `given`, as the processor was called with it.

        Where it was not, the likeliest reading that has these grids.
        """
        remembered = self.__dict__.get("seen_images", SeenImages()).options_of(given)
        if not remembered:
            readings = [(reading, options) for reading in self.orientations(image)]
        else:
            readings = [(image, each) for each in ([options] if options else remembered)]
        found, mismatch = [], None
        for reading, each in readings:
            try:
                found.append(self.read_as(reading, each, entries, number))
            except ValueError as error:
                mismatch = mismatch or error
            if found and not remembered:
                break
        if not found:
            raise mismatch
        if any(pictures != found[0] for pictures in found[1:]):
            raise ValueError(
                f"Image {number} (counted from 0) was given to the processor with the options "
                f"{' and then '.join(map(str, remembered))}, and the record fits more than one of these calls. Give "
                "draw_kept_tokens the inputs of the request instead."
            )
        return found[0]

    def read_as(self, image, options: dict, entries, number: int) -> list[Image.Image]:
        """What the grids of `entries` cover of an image that is given to the image processor as it is, with `options`."""
        options, mismatch = {"do_normalize": False} | options, None
        for images in self.groups_with(image):
            views = self.views_of("image", self.read_images(images, options), options)[0]
            try:
                check_grids("image", number, views, entries)
                return [picture for picture, _ in views]
            except ValueError as error:
                mismatch = mismatch or error
        raise mismatch

    def orientations(self, image) -> list:
        """How the model may have seen `image`: the likeliest first."""
        if not isinstance(image, Image.Image) or image.getexif().get(ORIENTATION, 1) == 1:
            return [image]
        upright = ImageOps.exif_transpose(image)
        return [upright, image] if turns_files_upright(self.image_processor) else [image, upright]

    def groups_with(self, image) -> list[list]:
        """What to call the image processor with, to get what it made of `image`: the likeliest first."""
        return [[image]]

    def read_images(self, images: list, options: dict):
        """What the image processor makes of `images` when this processor calls it."""
        return self.image_processor(images=images, **options, return_tensors="pt")

    def read_videos(self, videos: list, options: dict):
        """What the video processor makes of `videos` when this processor calls it."""
        return self.video_processor(videos=videos, **options, return_tensors="pt")

    def entries_of(self, modality: str, record, views_of_all: list[list]):
        """The entries of a record, in which those of this modality are to be found."""
        return record

    def options_for(self, modality: str, kwargs: dict) -> dict:
        """Those of a call's `kwargs` that are for the image or the video processor."""
        names = self.option_names(modality)
        given = kwargs | (kwargs.get(f"{modality}s_kwargs") or {})
        return {name: value for name, value in given.items() if name in names}

    def option_names(self, modality: str) -> set[str]:
        part = getattr(self, f"{modality}_processor", None)
        return set() if part is None else set(part.valid_kwargs.__annotations__) - {"return_tensors"}

    def views_of(self, modality: str, inputs, options: dict) -> list[list[tuple[Image.Image, tuple[int, int]]]]:
        """For each image (or video): pictures of what its grids cover, and the grids (height, width)."""
        part = self.image_processor if modality == "image" else self.video_processor
        settings = {name: options.get(name, getattr(part, name, None)) for name in (*SETTINGS, *options)}
        inputs = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        try:
            views = (self.image_views if modality == "image" else self.video_slices)(inputs, settings)
        except KeyError as error:
            raise ValueError(f"The inputs have {PIXELS[modality]}, but not {error}, which comes with it.") from error
        restored = [[(restore(pixels, settings), grid) for pixels, grid in each] for each in views]
        peak = max((pixels.max().item() for each in restored for pixels, _ in each), default=1)
        scale = 1 / 255 if peak > 2 else 1  # do_rescale=False with pictures of 0 to 255
        return [[(to_picture(pixels * scale), grid) for pixels, grid in each] for each in restored]

    def image_views(self, inputs: dict, settings: dict) -> list[list[tuple[torch.Tensor, tuple[int, int]]]]:
        """For each image its views: the pixels [3, height, width] that a grid covers, and the grid (height, width)."""
        raise NotImplementedError

    def video_slices(self, inputs: dict, settings: dict) -> list[list[tuple[torch.Tensor, tuple[int, int]]]]:
        """For each video, likewise its temporal slices."""
        raise NotImplementedError


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of `pixels` [3, height, width] in 0 to 1."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def restore(pixels: torch.Tensor, settings: dict) -> torch.Tensor:
    """`pixels` [3, height, width] as they were before they were normalized, in 0 to 1 if they were rescaled."""
    pixels = pixels.float()
    if settings["do_normalize"]:
        mean, std = (torch.tensor(settings[name]).float().view(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels * std + mean
    return pixels / (255 * settings["rescale_factor"]) if settings["do_rescale"] else pixels


@lru_cache(maxsize=1)
def sideways_file() -> str:
    """A JPEG of 16 x 8 pixels, as a data url, that is 8 x 16 upright."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (16, 8)).save(file, "JPEG", exif=exif)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def turns_files_upright(image_processor) -> bool:
    """Whether a file is turned by its EXIF orientation: with torchvision not before transformers 5.21."""
    image = image_processor.fetch_images(sideways_file())
    return (image.size if isinstance(image, Image.Image) else tuple(image.shape[:0:-1])) == (8, 16)


def pair_with_entries(media: list, record, modality: str) -> list[tuple]:
    """Each image, or each video, with its entries in the record."""
    entries_of = {}
    for entry in record:
        if entry.modality == modality:
            entries_of.setdefault(entry.image, []).append(entry)
    if len(media) != len(entries_of):
        raise ValueError(f"Got {len(media)} {modality}s to draw on, but the record is of {len(entries_of)} {modality}s.")
    return [(each, entries) for each, (_, entries) in zip(media, sorted(entries_of.items()), strict=True)]


def slices_of(entries) -> list[tuple]:
    """`entries` with the number of each of their slices: one of a grid (height, width), or as many as a video's has frames."""
    return [(entry, frame) for entry in entries for frame in range(entry.num_visual // (entry.grid[-2] * entry.grid[-1]))]


def check_grids(modality: str, number: int, views: list[tuple], entries):
    """Raises a ValueError where the grids of an image's or a video's views are not those of its entries."""
    found, expected = [tuple(grid) for _, grid in views], [tuple(entry.grid[-2:]) for entry, _ in slices_of(entries)]
    if modality == "video" and len(found) != len(expected):
        raise ValueError(f"Got {len(found)} slices to draw on, but the record is of {len(expected)} slices in video {number}.")
    if found != expected:
        raise ValueError(
            f"{modality.capitalize()} {number} (counted from 0) makes a grid of {sides_of(found)} tokens, but the record has "
            f"{sides_of(expected)}. Give draw_kept_tokens what the model was given: the inputs, or the same pictures with the "
            "same options."
        )


def sides_of(grids: list[tuple[int, int]]) -> str:
    counts = Counter(grids)
    return " and ".join(f"{rows} x {columns}" + f" ({count} times)" * (count > 1) for (rows, columns), count in counts.items())


def draw_grids(pictures: list[Image.Image], entries, first: int | None) -> list[Image.Image]:
    """`pictures` with the `first` tokens of `entries` drawn on them: one picture for a grid (height, width), several for
    (frames, height, width)."""
    drawn = []
    for picture, (entry, frame) in zip(pictures, slices_of(entries), strict=True):
        rows, columns = entry.grid[-2:]
        tokens = (entry.order[:first] - frame * rows * columns).tolist()
        places = {token: place for place, token in enumerate(tokens) if 0 <= token < rows * columns}
        drawn.append(draw_grid(picture, (rows, columns), places, entry.num_kept))
    return drawn


def draw_grid(picture: Image.Image, grid: tuple[int, int], places: dict[int, int], num_kept: int) -> Image.Image:
    """`picture` with the kept patches framed and the others dimmed.

    Args:
        picture: what the grid covers.
        grid: (height, width) in patches.
        places: kept patch, counted row by row -> its place in the order of selection, from 0.
        num_kept: how many were selected in that order.
    """
    rows, columns = grid
    patch = picture.width // columns
    patch *= ceil(SMALLEST_PATCH / patch)
    bright = picture.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    drawn = ImageOps.grayscale(bright).point(lambda value: round(value * DROPPED_BRIGHTNESS)).convert("RGB")
    draw = ImageDraw.Draw(drawn)
    for token, place in places.items():
        left, top = token % columns * patch, token // columns * patch
        box = (left, top, left + patch, top + patch)
        drawn.paste(bright.crop(box), box)
        draw.rectangle((left, top, left + patch - 1, top + patch - 1), outline=order_color(place, num_kept), width=FRAME)
    return drawn


def with_legend(pictures: list[Image.Image], entries, columns: int, first: int | None) -> Image.Image:
    """`pictures` in rows of `columns`, above a strip that states the counts and the colours of the order."""
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    width = max(sum(picture.width for picture in row) + GAP * (len(row) - 1) for row in rows)
    heights = [max(picture.height for picture in row) for row in rows]
    height = sum(heights) + GAP * (len(rows) - 1)
    canvas = Image.new("RGB", (width, height + LEGEND_HEIGHT), BACKGROUND)
    for number, row in enumerate(rows):
        left, top = 0, sum(heights[:number]) + GAP * number
        for picture in row:
            canvas.paste(picture, (left, top))
            left += picture.width + GAP
    shown = sum(len(entry.order[:first]) for entry in entries)
    strip = legend(width, shown, sum(entry.num_kept for entry in entries), sum(entry.num_visual for entry in entries))
    canvas.paste(strip, (0, height))
    return canvas


def legend(width: int, shown: int, num_kept: int, num_visual: int) -> Image.Image:
    """A strip of `width` pixels: the counts at the left and, where there is room, the colour bar at the right."""
    strip = Image.new("RGB", (width, LEGEND_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=15)
    middle = LEGEND_HEIGHT // 2
    counts = f"{num_kept} of {num_visual} visual tokens kept"
    if shown < num_kept:
        counts = f"the first {shown} of {num_kept} kept of {num_visual} visual tokens"
    draw.text((8, middle), counts, fill=FOREGROUND, font=font, anchor="lm")
    bar = 140
    right = width - 8
    bar_right = right - draw.textlength("last", font=font) - 6
    bar_left = round(bar_right - bar)
    if bar_left - 6 - draw.textlength("selected first", font=font) < 8 + draw.textlength(counts, font=font) + 16:
        return strip
    draw.text((right, middle), "last", fill=FOREGROUND, font=font, anchor="rm")
    draw.text((bar_left - 6, middle), "selected first", fill=FOREGROUND, font=font, anchor="rm")
    for offset in range(bar):
        draw.line((bar_left + offset, 8, bar_left + offset, LEGEND_HEIGHT - 9), fill=order_color(offset, bar))
    return strip


def whole_patches(pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """`pixels` [..., height, width] without the rest at the right and bottom that makes no patch of `grid`."""
    height, width = (side // patches * patches for side, patches in zip(pixels.shape[-2:], grid, strict=True))
    return pixels[..., :height, :width]


class VLMPrunerLlavaProcessor(DrawMixin, LlavaProcessor):
    """The processor of LLaVA-1.5 with `draw_kept_tokens`."""

    def image_views(self, inputs, settings):
        pixel_values = inputs["pixel_values"]
        sizes = inputs.get("image_sizes", [pixels.shape[-2:] for pixels in pixel_values])  # without padding to a larger one
        grids = [tuple(int(side) // self.patch_size for side in size) for size in sizes]
        return [
            [(pixels[:, : rows * self.patch_size, : columns * self.patch_size], (rows, columns))]
            for pixels, (rows, columns) in zip(pixel_values, grids, strict=True)
        ]


class AnyResolutionDrawMixin(DrawMixin):
    """For image processors that give a picture squeezed into a square (view 0), then tiles of a larger, padded one (view 1)."""

    def base_grid(self, squares: torch.Tensor) -> tuple[int, int]:
        """(height, width) of `squares` [..., height, width in pixels] in patches."""
        height, width = (side // self.patch_size for side in squares.shape[-2:])
        return height, width

    def image_views(self, inputs, settings):
        sizes = [[int(side) for side in size] for size in inputs["image_sizes"]]
        images = zip(inputs["pixel_values"], sizes, self.are_tiled(inputs), strict=True)
        return [self.views_of_squares(*image, settings) for image in images]

    def are_tiled(self, inputs) -> list[bool]:
        """Of each image, whether it has tiles."""
        return [True] * len(inputs["pixel_values"])

    def views_of_squares(self, squares: torch.Tensor, image_size: list[int], is_tiled: bool, settings: dict) -> list[tuple]:
        """The views of an image of `image_size` (height, width in pixels) in its `squares` [1 + tiles, 3, side, side]."""
        base_grid = self.base_grid(squares)
        best = select_best_resolution(image_size, settings["image_grid_pinpoints"])
        rows, columns = (length // side for length, side in zip(best, squares.shape[-2:], strict=True))
        squares = whole_patches(squares, base_grid)
        if not is_tiled:
            return [(squares[0], base_grid)]
        tiles = squares[1 : 1 + rows * columns].unflatten(0, (rows, columns))
        larger = tiles.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
        larger, grid = without_padding(larger, (rows * base_grid[0], columns * base_grid[1]), image_size)
        views = [(squares[0], base_grid), (larger, self.pooled_grid(grid, base_grid))]
        return views if larger.numel() else views[:1]  # of a very thin image unpadding leaves no second view

    def pooled_grid(self, grid: tuple[int, int], base_grid: tuple[int, int]) -> tuple[int, int]:
        """What the model makes of the patches of the second view."""
        return grid


def without_padding(pixels: torch.Tensor, grid: tuple[int, int], image_size: list[int]) -> tuple[torch.Tensor, tuple[int, int]]:
    """`pixels` [3, height, width] without the patches of `grid` that the model drops as padding, and the grid that remains."""
    places = unpad_image(torch.arange(grid[0] * grid[1]).view(1, *grid), image_size)[0]
    if not places.numel():
        return pixels[:, :0], tuple(places.shape)
    patch = pixels.shape[1] // grid[0]
    (top, left), (bottom, right) = (divmod(int(place), grid[1]) for place in (places[0, 0], places[-1, -1]))
    return pixels[:, top * patch : (bottom + 1) * patch, left * patch : (right + 1) * patch], tuple(places.shape)


class VLMPrunerLlavaNextProcessor(AnyResolutionDrawMixin, LlavaNextProcessor):
    """The processor of LLaVA-NeXT with `draw_kept_tokens`."""


class VLMPrunerLlavaOnevisionProcessor(AnyResolutionDrawMixin, LlavaOnevisionProcessor):
    """The processor of LLaVA-OneVision and LLaVA-Video with `draw_kept_tokens`.

    It takes `spatial_pool_mode`, `spatial_pool_stride` and `newline_position` of the model's config, which say how many tokens
    a video has.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        num_image_tokens=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        vision_aspect_ratio="anyres_max_9",
        spatial_pool_mode="bilinear",
        spatial_pool_stride=2,
        newline_position="one_token",
        **kwargs,
    ):
        self.spatial_pool_mode, self.spatial_pool_stride = spatial_pool_mode, spatial_pool_stride
        self.newline_position = newline_position
        super().__init__(
            image_processor,
            tokenizer,
            video_processor,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    @property
    def video_layout(self) -> VideoLayout:
        """Raises a ValueError for a key that is out of range."""
        side = isqrt(self.num_image_tokens)
        return VideoLayout.of(side, self.spatial_pool_mode, self.spatial_pool_stride, self.newline_position)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        num_frames = len(video_inputs["pixel_values_videos"][video_idx])
        return self.video_token * self.video_layout.num_features(num_frames)

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs):
        counts = super()._get_num_multimodal_tokens(image_sizes, video_sizes, **kwargs)
        if video_sizes is not None:
            counts.num_video_tokens = [self.video_layout.num_features(num_frames) for num_frames, *_ in video_sizes]
        return counts

    def base_grid(self, squares: torch.Tensor) -> tuple[int, int]:
        side = isqrt(self.num_image_tokens)
        return side, side

    def pooled_grid(self, grid: tuple[int, int], base_grid: tuple[int, int]) -> tuple[int, int]:
        """Of more patches than `vision_aspect_ratio` allows, fewer."""
        most = int(self.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = sqrt(grid[0] * grid[1] / (most * base_grid[0] ** 2))
        return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid

    def are_tiled(self, inputs) -> list[bool]:
        """Several images of a row are not: each is one square, padded."""
        counts = inputs.get("batch_num_images")
        return super().are_tiled(inputs) if counts is None else [count == 1 for count in counts for _ in range(count)]

    def groups_with(self, image) -> list[list]:
        return [[image], [[image, image]]]

    def video_slices(self, inputs, settings):
        side, layout = isqrt(self.num_image_tokens), self.video_layout
        pooled, videos = (layout.height, layout.width), []
        for video in inputs["pixel_values_videos"]:
            frames = [whole_patches(frame, (side, side)) for frame in video]
            if layout.pool_stride is not None:  # tokens of whole squares, which leave a rest unseen
                seen = frames[0].shape[-1] // side * layout.pool_stride * layout.height
                frames = [frame[..., :seen, :seen] for frame in frames]
            videos.append([(frame, pooled) for frame in frames])
        return videos


class QwenDrawMixin(DrawMixin):
    """For Qwen's and GLM's image and video processors, which give merged patches in a row. Of a slice's two frames the first is
    shown."""

    def image_views(self, inputs, settings):
        return join_merged_patches(inputs["pixel_values"], inputs["image_grid_thw"], settings)

    def video_slices(self, inputs, settings):
        return join_merged_patches(inputs["pixel_values_videos"], inputs["video_grid_thw"], settings)


def join_merged_patches(pixel_values: torch.Tensor, grids: torch.Tensor, settings: dict) -> list[list[tuple]]:
    """For each image or video its slices as pixels [3, height, width], each with its grid of merged patches.

    Args:
        pixel_values: [all patches, 3 * frames of a slice * patch_size^2], by rows of merged patches.
        grids: [n, 3] (slices, height, width in patches).
        settings: the sizes of patches.
    """
    merge, patch, frames = (settings[name] for name in ("merge_size", "patch_size", "temporal_patch_size"))
    views, grids = [], [[int(side) for side in grid] for grid in grids]
    parts = pixel_values.split([slices * rows * columns for slices, rows, columns in grids])
    for part, (slices, rows, columns) in zip(parts, grids, strict=True):
        grid = rows // merge, columns // merge
        part = part.view(slices, *grid, merge, merge, 3, frames, patch, patch)[..., 0, :, :]
        views.append([(patches.permute(4, 0, 2, 5, 1, 3, 6).flatten(1, 3).flatten(2), grid) for patches in part])
    return views


class VLMPrunerQwen2VLProcessor(QwenDrawMixin, Qwen2VLProcessor):
    """The processor of Qwen2-VL with `draw_kept_tokens`."""


class VLMPrunerQwen2_5_VLProcessor(QwenDrawMixin, Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL with `draw_kept_tokens`."""


class VLMPrunerQwen3VLProcessor(QwenDrawMixin, Qwen3VLProcessor):
    """The processor of Qwen3-VL with `draw_kept_tokens`."""


class VLMPrunerQwen3VLMoeProcessor(VLMPrunerQwen3VLProcessor):
    """The processor of Qwen3-VL with experts, which is that of Qwen3-VL."""


class VLMPrunerGlm4vProcessor(QwenDrawMixin, Glm4vProcessor):
    """The processor of GLM-4.1V with `draw_kept_tokens`."""


class VLMPrunerGlm4vMoeProcessor(VLMPrunerGlm4vProcessor):
    """The processor of GLM-4.5V, which is that of GLM-4.1V."""


class VLMPrunerGlm46VProcessor(QwenDrawMixin, Glm46VProcessor):
    """The processor of the GLM-4.6V models, of whichever model type, with `draw_kept_tokens`."""


class VLMPrunerQwen3_5Processor(QwenDrawMixin, Qwen3VLProcessor):
    """The processor of Qwen3.5, which is Qwen3-VL's, with `draw_kept_tokens`."""


class VLMPrunerQwen3_5MoeProcessor(QwenDrawMixin, Qwen3VLProcessor):
    """The processor of Qwen3.5 with experts, which is Qwen3-VL's, with `draw_kept_tokens`."""


class VLMPrunerLlavaNextVideoProcessor(AnyResolutionDrawMixin, LlavaNextVideoProcessor):
    """The processor of LLaVA-NeXT-Video with `draw_kept_tokens`."""

    def video_slices(self, inputs, settings):
        return [[self.pooled_frame(frame) for frame in video] for video in inputs["pixel_values_videos"]]

    def pooled_frame(self, frame: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The part of a frame [3, height, width] that two by two of its patches cover, and their grid."""
        side = 2 * self.patch_size
        rows, columns = (length // side for length in frame.shape[-2:])
        return frame[:, : rows * side, : columns * side], (rows, columns)


class VLMPrunerMistral3Processor(DrawMixin, PixtralProcessor):
    """The processor of Mistral3, and of LLaVA with a Pixtral tower, with `draw_kept_tokens`."""

    def read_images(self, images, options):
        return super().read_images(images, options | {"patch_size": self.patch_size * self.spatial_merge_size})

    def image_views(self, inputs, settings):
        side, views = self.patch_size * self.spatial_merge_size, []
        for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
            rows, columns = (int(length) // side for length in size)  # without padding to the largest image
            views.append([(pixels[:, : rows * side, : columns * side], (rows, columns))])
        return views


class TilesDrawMixin(DrawMixin):
    """For processors that cut an image into square tiles, each of which is a grid, and that make a video images of one tile.

    A family tells in `tiles` what tiles there are, and in `tiles_of_images` how many are of each image.
    """

    def draw_kept_tokens(self, images=None, record=None, videos=None, inputs=None, **kwargs) -> list[Image.Image]:
        """See `DrawMixin.draw_kept_tokens`. With `inputs`, each frame of a video is drawn as the image that the model takes it
        for.

        Raises:
            ValueError: also for images and videos together, because the record does not tell them apart.
        """
        if images is not None and videos is not None:
            raise ValueError(
                "The frames of a video are images to this model, so the record does not tell them from other images. Give "
                "draw_kept_tokens the inputs of the request instead of images and videos."
            )
        return super().draw_kept_tokens(images, record, videos, inputs, **kwargs)

    def entries_of(self, modality, record, views_of_all):
        """The frames of all videos are the images of the record."""
        if modality == "image" or record is None:
            return record
        frames = [(number, view) for number, views in enumerate(views_of_all) for view in range(len(views))]
        if frames and len(frames) != len(record):
            raise ValueError(f"Got {len(frames)} frames to draw on, but the record is of {len(record)} grids.")
        pairs = zip(record, frames, strict=False)
        return [replace(entry, modality="video", image=number, view=view) for entry, (number, view) in pairs]

    def read_images(self, images, options):
        inputs = dict(super().read_images(images, options))
        return inputs | {"num_tiles": [len(self.tiles(inputs))]}  # of one image

    def image_views(self, inputs, settings):
        tiles = self.tiles(inputs)
        counts = inputs["num_tiles"] if "num_tiles" in inputs else self.tiles_of_images(inputs["input_ids"].tolist())
        if sum(counts) != len(tiles):
            raise ValueError(
                f"The inputs have {len(tiles)} tiles in pixel_values, but placeholders of {sum(counts)} in input_ids."
            )
        views = map(self.view_of_tile, tiles)
        return [list(islice(views, count)) for count in counts]

    def view_of_tile(self, tile: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The part of a tile [3, side, side] that its tokens cover, and their grid."""
        grid = (isqrt(self.tile_length),) * 2
        return whole_patches(tile, grid), grid

    def runs(self, row: list[int]) -> list[tuple[int, int]]:
        """(first place, number of tiles) of each run of placeholders in the ids of a row."""
        found, place = [], 0
        for is_placeholder, run in groupby(row, key=lambda token: token == self.image_token_id):
            length = len(list(run))
            if is_placeholder:
                found.append((place, length // self.tile_length))
            place += length
        return found

    @property
    def tile_length(self) -> int:
        """Number of tokens of a tile."""
        raise NotImplementedError

    def tiles(self, inputs: dict) -> Sequence[torch.Tensor]:
        """The tiles [3, height, width] of all images in prompt order."""
        raise NotImplementedError

    def tiles_of_images(self, input_ids: list[list[int]]) -> list[int]:
        """Number of tiles of each image, by the placeholders in the prompts."""
        raise NotImplementedError


class VLMPrunerInternVLProcessor(TilesDrawMixin, InternVLProcessor):
    """The processor of InternVL with `draw_kept_tokens`."""

    @property
    def tile_length(self):
        return self.image_seq_length

    def read_images(self, images, options):
        return super().read_images(images, {"crop_to_patches": True} | options)

    def tiles(self, inputs):
        return inputs["pixel_values"]

    def tiles_of_images(self, input_ids):
        return [count for row in input_ids for _, count in self.runs(row)]

    def video_slices(self, inputs, settings):
        return [list(map(self.view_of_tile, video)) for video in inputs["pixel_values_videos"]]


class GlobalViewDrawMixin(TilesDrawMixin):
    """For Idefics3's image processor, whose tiles are padded to the same number in each row, and end with a global view."""

    images_by_row = True

    @property
    def tile_length(self):
        return self.image_seq_len

    def tiles(self, inputs):
        tiles, mask = inputs["pixel_values"].flatten(0, 1), inputs.get("pixel_attention_mask")
        return tiles if mask is None else tiles[mask.flatten(0, 1).flatten(1).any(1)]

    def tiles_of_images(self, input_ids):
        """An image ends with its global view: a tile behind the tag that the last tile of all has. The last two tokens in
        front of a tile tell tags apart, whether the tokenizer makes one token of a tag or several."""
        runs = [(row[max(place - 2, 0) : place], count) for row in input_ids for place, count in self.runs(row)]
        counts = [0]
        for tag, count in runs:
            counts[-1] += count
            if tag == runs[-1][0]:
                counts.append(0)
        return counts[:-1]


class VLMPrunerIdefics3Processor(GlobalViewDrawMixin, Idefics3Processor):
    """The processor of Idefics3 with `draw_kept_tokens`."""


class VLMPrunerSmolVLMProcessor(GlobalViewDrawMixin, SmolVLMProcessor):
    """The processor of SmolVLM with `draw_kept_tokens`."""

    def read_videos(self, videos, options):
        inputs = super().read_videos(videos, options)
        return {"pixel_values_videos": inputs["pixel_values"], "pixel_attention_mask": inputs.get("pixel_attention_mask")}

    def video_slices(self, inputs, settings):
        videos, masks = inputs["pixel_values_videos"], inputs["pixel_attention_mask"]
        if masks is not None:
            videos = [video[mask.flatten(1).any(1)] for video, mask in zip(videos, masks, strict=True)]
        return [list(map(self.view_of_tile, video)) for video in videos]


__all__ = [name for name in globals() if name.startswith("VLMPruner")]


def processor_class_of(config_class: type, contents: Iterable[dict]) -> type:
    """The processor class of ours for a checkpoint: of the one that its files name, as the library goes by these, else of the
    family's. Pixtral-12B is a `llava` model with Pixtral's processor, GLM-4.6V-Flash a `glm4v` model with that of GLM-4.6V.

    Args:
        config_class: of ours, for the checkpoint.
        contents: of those of its `PROCESSOR_FILES` that exist, in this order.

    Raises:
        ValueError: if they name a processor of which there is none here, because the family's might make other prompts.
    """
    ours = {name: globals()[name] for name in __all__}
    default = ours[config_class.auto_map_targets["AutoProcessor"].split(".")[1]]
    named = next(filter(None, (content.get("processor_class") for content in contents)), None)
    if named in (None, stock_class(default).__name__):
        return default
    same = {stock_class(each).__name__: each for each in reversed(ours.values())} | ours
    found = same.get(f"VLMPruner{named}", same.get(str(named)))
    if found is None:
        raise ValueError(
            f"The files of this {config_class.base_model_type} model name the processor {named!r}, which is refused: there is "
            "none here that draws what was kept of it, and another would make other prompts. Known are "
            f"{', '.join(sorted(same.keys() - ours.keys()))}."
        )
    return found
