"""Where the images and videos of a call lie: which of its tokens are on which grid, how many of each are to stay.

Everything here is known before the decoder runs, and on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .pruning_method import TowerSignals
from .token_pruning import num_tokens_to_keep


@dataclass(frozen=True)
class GridView:
    """The visual tokens of an image or video that lie on one (height, width) or (frames, height, width) grid.

    Token (f, y, x) of the grid is row `start + f * frame_stride + y * row_stride + x` of the features. Rows of the features
    that no view covers (a class token, newlines) are structure: never candidates, always kept.
    """

    height: int
    width: int
    start: int = 0
    row_stride: int | None = None  # None: width
    frames: int = 1
    frame_stride: int | None = None  # None: height * row_stride

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.height, self.width) if self.frames == 1 else (self.frames, self.height, self.width)

    def token_indices(self) -> torch.LongTensor:
        """Rows of the features, in row-major order of the grid. [frames * height * width]"""
        row_stride = self.row_stride or self.width
        f = torch.arange(self.frames)[:, None, None] * (self.frame_stride or self.height * row_stride)
        y = torch.arange(self.height)[:, None] * row_stride
        return (self.start + f + y + torch.arange(self.width)).flatten()


def video_views(
    frames: int, height: int, width: int, scope: str, row_stride: int | None = None, frame_stride: int | None = None
) -> list[GridView]:
    """The grids of a video of `frames` slices: one each with scope "slice", one for all with "video". See `GridView`."""
    if scope == "video":
        return [GridView(height, width, row_stride=row_stride, frames=frames, frame_stride=frame_stride)]
    step = frame_stride or height * (row_stride or width)
    return [GridView(height, width, start=frame * step, row_stride=row_stride) for frame in range(frames)]


@dataclass(frozen=True)
class VisualTokens:
    """The images, or the videos, that come with a call.

    Attributes:
        modality: "image" or "video".
        mask: [batch, length] bool, True at the tokens that hold the features, which fill them in row-major order.
        features: for each image in prompt order, [num_features, hidden_size].
        views: for each image, its grids.
        image_ends: [batch, length] bool, True at the last token of an image's last grid, where `features` are of tiles, or of
            rows of the batch; None where they are of images.
    """

    modality: str
    mask: torch.BoolTensor
    features: Sequence[torch.Tensor]
    views: Sequence[Sequence[GridView]]
    image_ends: torch.BoolTensor | None = None


@dataclass(frozen=True)
class VisualGrid:
    """One grid to prune: which row of the batch, which `columns` [num_visual] of this call's tokens, how many to keep.

    `columns` is ascending and on the host. `keeps_last` says that the last of them must stay, because its output is needed.
    `features` are those of the image, of which the grid's are `tokens` [num_visual].
    """

    row: int
    image: int
    view: int
    modality: str
    grid: tuple[int, ...]
    columns: torch.LongTensor
    num_keep: int
    keeps_last: bool = False
    features: torch.Tensor | None = None
    tokens: torch.LongTensor | None = None

    def tower(self) -> TowerSignals:
        """What the vision tower knows of the grid's tokens.

        Raises:
            ValueError: for features that came without it.
        """
        if not hasattr(self.features, "tower"):
            raise ValueError(
                f"The {self.modality} features of shape {tuple(self.features.shape)} do not tell what the vision tower "
                "attended to, which pruning_method looks at. Encode the pixels after pruning_method is set. Videos of LLaVA "
                "never tell: they are pooled behind the projector, for which no author says what to look at."
            )
        return self.features.tower.of(self.tokens)


def visual_grids(visual: VisualTokens, ratio: float) -> list[VisualGrid]:
    """Place the grids of a call in its tokens. `ratio` is the fraction of each grid to remove; the masks are on the host.

    Raises:
        ValueError: if the images do not fill the rows one after another.
    """
    columns = visual.mask.nonzero()[:, 1]
    lengths = [len(features) for features in visual.features]
    rows = rows_of_images(visual.mask.sum(1).tolist(), lengths, visual.modality)
    grids, offset, image, number = [], 0, 0, 0
    for row, features, views in zip(rows, visual.features, visual.views, strict=True):
        image_columns = columns[offset : offset + len(features)]
        offset += len(features)
        for view in views:
            tokens = view.token_indices()
            num_keep = num_tokens_to_keep(len(tokens), ratio)
            place = (row, image, number, visual.modality, view.grid, image_columns[tokens], num_keep)
            grids.append(VisualGrid(*place, features=features, tokens=tokens))
            number += 1
            if visual.image_ends is not None and visual.image_ends[row, grids[-1].columns[-1]]:
                image, number = image + 1, 0
        if visual.image_ends is None:
            image, number = image + 1, 0
    return grids


def keep_needed_outputs(
    grids: Sequence[VisualGrid], attention_mask: torch.BoolTensor | None, length: int, num_outputs: int
) -> list[VisualGrid]:
    """`grids`, of which those keep their last token that end where an output is needed.

    It is needed at the last real token of each row, from which generation goes on, and at the first of the last `num_outputs`
    tokens of the call: where text was drafted behind a prompt that ends with an image, that is the end of the prompt.

    Args:
        attention_mask: [batch, length or more] bool on the host, or None.
        length: number of tokens of the call.
        num_outputs: number of outputs that are asked for, or 0 where it is not said.
    """
    last_candidate = {}
    for grid in grids:
        last_candidate[grid.row] = max(last_candidate.get(grid.row, -1), int(grid.columns[-1]))

    def is_needed(grid: VisualGrid) -> bool:
        last = int(grid.columns[-1])
        is_end = last == length - 1 or (attention_mask is not None and not attention_mask[grid.row, last - length + 1 :].any())
        return last == last_candidate[grid.row] and (is_end or last == length - num_outputs)

    return [replace(grid, keeps_last=is_needed(grid)) for grid in grids]


def ends_of_prompts(is_token: torch.BoolTensor, is_visual: torch.BoolTensor, num_outputs: int) -> torch.LongTensor:
    """The column of the last token of each row's prompt: where the first of `num_outputs` is, but not before an image's end.

    So a method that looks at the prompt's last token sees the same one when decoding runs the whole sequence again, without a
    cache, and when text was drafted behind the prompt.

    Args:
        is_token: [batch, length] bool, False at padding.
        is_visual: [batch, length] bool.
        num_outputs: number of outputs that are asked for, or 0 where it is not said, and the prompt is the whole row.
    """
    columns = torch.arange(is_token.shape[1])
    limit = torch.where(is_visual, columns, -1).amax(1).clamp_min(is_token.shape[1] - max(num_outputs, 1))
    return torch.where(is_token & (columns <= limit[:, None]), columns, 0).amax(1)


def rows_of_images(tokens_of_rows: list[int], features_of_images: list[int], modality: str) -> list[int]:
    """The row of each image, given the number of placeholders of each row and of features of each image.

    Raises:
        ValueError: if the images do not fill the rows one after another.
    """
    rows, row, free = [], 0, tokens_of_rows[0] if tokens_of_rows else 0
    for image, num_features in enumerate(features_of_images):
        while free == 0 and row + 1 < len(tokens_of_rows):
            row += 1
            free = tokens_of_rows[row]
        if num_features > free:
            raise ValueError(
                f"{modality.capitalize()} {image} has {num_features} features, but row {row} of the batch has only {free} of "
                f"its {tokens_of_rows[row]} placeholders left. Each row needs the placeholders of its own {modality}s."
            )
        rows.append(row)
        free -= num_features
    return rows
