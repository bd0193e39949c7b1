"""From a request's images and its ratio to how many tokens leave, and where. The scheduler and the workers share it.

How many tokens stay is known before anything is computed (`pruning_fill_budget` is on). So the place of a token in the shorter
cache follows from the prompt alone: nothing is remembered from step to step, and a request that is preempted, or whose batch is
reordered, is where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from vlmpruner.configuration_vlmpruner import check_ratio
from vlmpruner.token_pruning import num_tokens_to_keep

from .families import family_of


# What a request may say, in `SamplingParams.extra_args` or, over HTTP, in `vllm_xargs`.
RATIO, RECORD = "pruning_ratio", "pruning_record"


class RequestArguments(LogitsProcessor):
    """Checks what a request says about pruning. It processes no logits: vLLM asks logits processors alone about a request's own
    arguments, before the request reaches the engine, and answers 400 with the sentence of the error."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        arguments = params.extra_args or {}
        unknown = sorted(name for name in arguments if name.startswith("pruning_") and name not in (RATIO, RECORD))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} can not be set for one request. A request may set {RATIO} and {RECORD}; everything else "
                "is in the config of the model that is served."
            )
        if arguments.get(RATIO) is not None:
            check_ratio(arguments[RATIO])
        if arguments.get(RECORD) not in (None, 0, 1):
            raise ValueError(f"{RECORD} must be 1, to get the places of the kept tokens, or 0, got {arguments[RECORD]!r}.")

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        pass


@dataclass(frozen=True)
class PrunedGrid:
    """One grid of an image or a video: its sides, the `places` [num_visual] of its tokens in the prompt, how many to keep, and
    whether its last token must stay, because the prompt ends with it and its output is needed."""

    modality: str
    medium: int
    sides: tuple[int, ...]
    places: torch.LongTensor
    num_keep: int
    keeps_last: bool

    @property
    def num_dropped(self) -> int:
        return len(self.places) - self.num_keep


@dataclass(frozen=True)
class PrunedMedium:
    """An image or a video: its placeholders, and what stands between them, are the tokens `start` to `end` of the prompt."""

    start: int
    end: int
    grids: tuple[PrunedGrid, ...]

    @cached_property
    def num_dropped(self) -> int:
        return sum(grid.num_dropped for grid in self.grids)


@dataclass(frozen=True)
class RequestPruning:
    """What a request loses, medium by medium in the order of the prompt; nothing where it is not pruned."""

    media: tuple[PrunedMedium, ...] = ()
    wants_record: bool = False

    def num_dropped(self, num_tokens: int) -> int:
        """How many of the request's first `num_tokens` are not in the shorter cache. A medium that is not wholly among them has
        lost none."""
        return sum(medium.num_dropped for medium in self.media if medium.end <= num_tokens)

    def media_between(self, start: int, end: int) -> list[PrunedMedium]:
        """The media among the tokens from `start` to `end`.

        Raises:
            RuntimeError: if one is there in part: selection needs all its tokens in one step.
        """
        inside = [medium for medium in self.media if medium.start < end and start < medium.end]
        for medium in inside:
            if medium.start < start or medium.end > end:
                raise RuntimeError(
                    f"A step has the tokens {start} to {end} of a request, which cut an image or a video at {medium.start} to "
                    f"{medium.end}. Pruning chooses among all its tokens, so the plugin's scheduler keeps them in one step."
                )
        return inside


def request_pruning(
    config, features: Sequence[MultiModalFeatureSpec], params: SamplingParams | None, num_prompt_tokens: int
) -> RequestPruning:
    """What a request loses.

    Args:
        config: the model's config, of one of the project's classes.
        features: the images and videos of the request.
        params: how it is sampled, with its own ratio among the `extra_args` if it has one.
        num_prompt_tokens: length of its prompt.
    """
    arguments = (params.extra_args if params is not None else None) or {}
    settings = config.pruning_settings(arguments.get(RATIO))
    if settings is None:
        return RequestPruning()
    grid_views, media = family_of(config).grid_views, []
    number_of = dict.fromkeys((feature.modality for feature in features), 0)
    for feature in features:
        position = feature.mm_position
        embeds = torch.arange(position.length) if position.is_embed is None else position.is_embed.nonzero()[:, 0]
        places = position.offset + embeds
        grids = []
        for view in grid_views(config, feature):
            grid_places = places[view.token_indices()]
            is_last = int(grid_places[-1]) == num_prompt_tokens - 1
            num_keep = num_tokens_to_keep(len(grid_places), settings.ratio)
            grids.append(PrunedGrid(feature.modality, number_of[feature.modality], view.grid, grid_places, num_keep, is_last))
        number_of[feature.modality] += 1
        media.append(PrunedMedium(position.offset, position.offset + position.length, tuple(grids)))
    media.sort(key=lambda medium: medium.start)
    return RequestPruning(tuple(media), bool(arguments.get(RECORD)))
