"""Processors that behave as the base model's and can also draw which visual tokens were kept.

`draw_kept_tokens` draws on the picture as the vision tower saw it, so that patches line up: for LLaVA the resized and
centre-cropped square, not the file that was opened.
"""

from math import ceil, isqrt, sqrt

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import (
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.video_utils import make_batched_videos


# First to last selected: plasma's yellow to purple, along which lightness only falls.
ORDER_COLORS = ((240, 249, 33), (248, 149, 64), (204, 71, 120), (140, 30, 190))
SMALLEST_PATCH = 24  # pixels; smaller patches are enlarged until frames are legible
FRAME = 3
GAP = 8  # between the grids of one image or video
DROPPED_BRIGHTNESS = 0.35
LEGEND_HEIGHT = 30
BACKGROUND, FOREGROUND = (24, 24, 24), (235, 235, 235)


def order_color(place: int, num_kept: int) -> tuple[int, int, int]:
    """The colour of the token selected as number `place` (from 0) of `num_kept`."""
    position = place / max(num_kept - 1, 1) * (len(ORDER_COLORS) - 1)
    lower = min(int(position), len(ORDER_COLORS) - 2)
    weight = position - lower
    pair = zip(ORDER_COLORS[lower], ORDER_COLORS[lower + 1], strict=True)
    return tuple(round(first * (1 - weight) + second * weight) for first, second in pair)


def flatten_images(images) -> list:
    """A picture, a list of them, or a list per row, as one flat list in prompt order."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for part in images for image in flatten_images(part)]


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """A picture of `pixels` [3, height, width] in 0 to 1."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


class DrawMixin:
    """Adds `draw_kept_tokens` to a processor. A family tells in `seen_pictures` and `seen_frames` what its grids cover."""

    def draw_kept_tokens(self, images, record, videos=None, **videos_kwargs) -> list[Image.Image]:
        """Draw what a request kept: kept patches bright and framed, dropped ones grey and dim.

        The colour of a frame tells when its token was selected: yellow first, purple last, as in the strip below the picture.

        Args:
            images: the pictures given to the processor: one, a list, or a list per row. None leaves them out.
            record: the `PruningRecord` of the request that saw them.
            videos: the videos given to the processor, likewise. None leaves them out.
            videos_kwargs: what else the processor was told about the videos, such as `do_sample_frames`.

        Returns:
            One RGB picture per image, then one per video, in prompt order. An image with several grids has them side by side; a
            video is a contact sheet of its temporal slices, in rows from left to right.

        Raises:
            ValueError: if nothing was pruned in the request, or it had another number of images, videos or slices.
        """
        if record is None:
            raise ValueError("There is no record to draw: nothing was pruned in this request.")
        drawn = []
        for image, entries in [] if images is None else pair_with_entries(flatten_images(images), record, "image"):
            grids = draw_grids(self.seen_pictures(image, entries), entries)
            drawn.append(with_legend(grids, entries, columns=len(grids)))
        for video, entries in [] if videos is None else pair_with_entries(make_batched_videos(videos), record, "video"):
            grids = draw_grids(self.seen_frames(video, entries, **videos_kwargs), entries)
            drawn.append(with_legend(grids, entries, columns=ceil(sqrt(len(grids)))))
        return drawn

    def seen_pictures(self, image, entries) -> list[Image.Image]:
        """What the grids of `entries`, all of one image, cover of it, as the vision tower saw it."""
        raise NotImplementedError

    def seen_frames(self, video, entries, **videos_kwargs) -> list[Image.Image]:
        """What the grids of `entries`, all of one video, cover of each of its temporal slices, as the vision tower saw it."""
        raise NotImplementedError


def pair_with_entries(media: list, record, modality: str) -> list[tuple]:
    """Each image, or each video, with its entries in the record."""
    entries_of = {}
    for entry in record:
        if entry.modality == modality:
            entries_of.setdefault(entry.image, []).append(entry)
    if len(media) != len(entries_of):
        raise ValueError(f"Got {len(media)} {modality}s to draw on, but the record is of {len(entries_of)} {modality}s.")
    return [(each, entries) for each, (_, entries) in zip(media, sorted(entries_of.items()), strict=True)]


def draw_grids(pictures: list[Image.Image], entries) -> list[Image.Image]:
    """`pictures` with `entries` drawn on them: one picture for a grid (height, width), several for (frames, height, width)."""
    slices = [(entry, frame) for entry in entries for frame in range(entry.num_visual // (entry.grid[-2] * entry.grid[-1]))]
    if len(pictures) != len(slices):
        raise ValueError(f"Got {len(pictures)} slices to draw on, but the record is of {len(slices)} slices.")
    drawn = []
    for picture, (entry, frame) in zip(pictures, slices, strict=True):
        rows, columns = entry.grid[-2:]
        tokens = (entry.order - frame * rows * columns).tolist()
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


def with_legend(pictures: list[Image.Image], entries, columns: int) -> Image.Image:
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
    strip = legend(width, sum(entry.num_kept for entry in entries), sum(entry.num_visual for entry in entries))
    canvas.paste(strip, (0, height))
    return canvas


def legend(width: int, num_kept: int, num_visual: int) -> Image.Image:
    """A strip of `width` pixels: the counts at the left and, where there is room, the colour bar at the right."""
    strip = Image.new("RGB", (width, LEGEND_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=15)
    middle = LEGEND_HEIGHT // 2
    counts = f"{num_kept} of {num_visual} visual tokens kept"
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

    _auto_class = "AutoProcessor"

    def seen_pictures(self, image, entries) -> list[Image.Image]:
        pixel_values = self.image_processor(images=image, do_normalize=False, return_tensors="pt")["pixel_values"]
        return [to_picture(whole_patches(pixel_values[0], entry.grid)) for entry in entries]


class AnyResolutionDrawMixin(DrawMixin):
    """For image processors that give a picture squeezed into a square (view 0), then tiles of a larger, padded one (view 1)."""

    _auto_class = "AutoProcessor"

    def seen_pictures(self, image, entries) -> list[Image.Image]:
        inputs = self.image_processor(images=image, do_normalize=False, return_tensors="pt")
        squares, image_size = inputs["pixel_values"][0], inputs["image_sizes"][0].tolist()
        if len(entries) == 1:  # of a very thin image unpadding leaves no second view
            return [to_picture(whole_patches(squares[0], entries[0].grid))]
        best = select_best_resolution(image_size, self.image_processor.image_grid_pinpoints)
        rows, columns = (length // side for length, side in zip(best, squares.shape[-2:], strict=True))
        base_grid = entries[0].grid
        squares = whole_patches(squares, base_grid)
        tiles = squares[1 : 1 + rows * columns].unflatten(0, (rows, columns))
        larger = without_padding(
            tiles.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2), (rows * base_grid[0], columns * base_grid[1]), image_size
        )
        return [to_picture(squares[0]), to_picture(larger)]


def without_padding(pixels: torch.Tensor, grid: tuple[int, int], image_size: list[int]) -> torch.Tensor:
    """`pixels` [3, height, width] without the patches of `grid` that the model drops as padding."""
    places = unpad_image(torch.arange(grid[0] * grid[1]).view(1, *grid), image_size)[0]
    patch = pixels.shape[1] // grid[0]
    (top, left), (bottom, right) = (divmod(int(place), grid[1]) for place in (places[0, 0], places[-1, -1]))
    return pixels[:, top * patch : (bottom + 1) * patch, left * patch : (right + 1) * patch]


class VLMPrunerLlavaNextProcessor(AnyResolutionDrawMixin, LlavaNextProcessor):
    """The processor of LLaVA-NeXT with `draw_kept_tokens`."""


class VLMPrunerLlavaOnevisionProcessor(AnyResolutionDrawMixin, LlavaOnevisionProcessor):
    """The processor of LLaVA-OneVision with `draw_kept_tokens`."""

    def seen_pictures(self, image, entries) -> list[Image.Image]:
        if len(entries) > 1:
            return super().seen_pictures(image, entries)
        # One of several images of a row, which is padded to a square and not cut into tiles.
        inputs = self.image_processor(images=[[image, image]], do_normalize=False, return_tensors="pt")
        return [to_picture(whole_patches(inputs["pixel_values"][0, 0], entries[0].grid))]

    def seen_frames(self, video, entries, **videos_kwargs) -> list[Image.Image]:
        inputs = self.video_processor(videos=[video], do_normalize=False, return_tensors="pt", **videos_kwargs)
        side = isqrt(self.num_image_tokens)  # patches before pooling
        return [to_picture(whole_patches(frame, (side, side))) for frame in inputs["pixel_values_videos"][0]]


class QwenDrawMixin(DrawMixin):
    """For Qwen's image and video processors, which give merged patches in a row. Of a slice's two frames the first is shown."""

    _auto_class = "AutoProcessor"

    def seen_pictures(self, image, entries) -> list[Image.Image]:
        inputs = self.image_processor(images=image, do_normalize=False, return_tensors="pt")
        return join_merged_patches(inputs["pixel_values"], entries[0].grid, self.image_processor)

    def seen_frames(self, video, entries, **videos_kwargs) -> list[Image.Image]:
        inputs = self.video_processor(videos=[video], do_normalize=False, return_tensors="pt", **videos_kwargs)
        return join_merged_patches(inputs["pixel_values_videos"], entries[0].grid[-2:], self.video_processor)


def join_merged_patches(pixel_values: torch.Tensor, grid: tuple[int, int], processor) -> list[Image.Image]:
    """A picture for each slice of [slices * patches, 3 * frames * patch_size^2], on whose merged patches `grid` lies."""
    merge, patch = processor.merge_size, processor.patch_size
    slices = pixel_values.view(-1, *grid, merge, merge, 3, processor.temporal_patch_size, patch, patch)[..., 0, :, :]
    return [to_picture(patches.permute(4, 0, 2, 5, 1, 3, 6).flatten(1, 3).flatten(2)) for patches in slices]


class VLMPrunerQwen2VLProcessor(QwenDrawMixin, Qwen2VLProcessor):
    """The processor of Qwen2-VL with `draw_kept_tokens`."""


class VLMPrunerQwen2_5_VLProcessor(QwenDrawMixin, Qwen2_5_VLProcessor):
    """The processor of Qwen2.5-VL with `draw_kept_tokens`."""


class VLMPrunerQwen3VLProcessor(QwenDrawMixin, Qwen3VLProcessor):
    """The processor of Qwen3-VL with `draw_kept_tokens`."""


__all__ = [
    "VLMPrunerLlavaNextProcessor",
    "VLMPrunerLlavaOnevisionProcessor",
    "VLMPrunerLlavaProcessor",
    "VLMPrunerQwen2VLProcessor",
    "VLMPrunerQwen2_5_VLProcessor",
    "VLMPrunerQwen3VLProcessor",
]
