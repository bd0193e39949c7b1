"""What every pruned model adds to its stock classes: from a call's inputs to a plan, and back to the caller's shapes."""

import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, cached_file, can_return_tuple, logging

from .attention_correction import additive_masks
from .configuration_vlmpruner import PruningConfig, PruningSettings, check_ratio
from .pruned_cache import (
    CACHE_NAME,
    PruningRecord,
    cache_of,
    continued_padding_mask,
    found_notes,
    mask_of_entries,
    note_positions,
    pruning_state,
    pruning_states,
    stage_mask,
    takes_cache,
)
from .pruned_decoder import OWN, PRUNED_MASK, PruningPlan, check_mask, has_pruned_mask, make_plan, prune_decoder
from .record_of_outputs import RecordKeptMixin, leave_record, record_of, record_of_call
from .stock_lookups import AskedAsStockMixin, register_model_type, stock_class
from .tensor_parallel import check_heads
from .visual_grids import GridView, VisualTokens, rows_of_images


STOCK_MASK = "stock_attention"
# A child of the library's logger: its verbosity holds here too, and so does `--log-level` of its server.
logger = logging.get_logger("transformers.vlmpruner")

LOSS_ELSEWHERE = (
    "Tokens were pruned in a training step that gave the model no labels. Outputs of dropped tokens come from a zero state, so "
    "a loss that is computed elsewhere must leave out the labels that they would predict, those of image placeholders above "
    "all. Pass labels to the model, or use Trainer(compute_loss_func=model.loss_of_kept_tokens), or train on answers alone."
)

# What TRL tags a model with in trainers that load a reference model from the path of the model's config.
REFERENCE_TAGS = frozenset({"dpo", "kto", "grpo", "gmpo", "a2po", "rloo"})


class PruningRequest:
    """What the caller of `forward` asks for, and the plan that the model made of it (None when the stock code ran).

    It is handed on as it is, so it is no dataclass, as `PruningPlan`.

    Args:
        ratio: of this call, or None for the config's.
        num_outputs: how many of the last outputs are asked for, or 0 where that is not said. All but the first may belong to
            candidates of speculative decoding, which can copy placeholders from the prompt.
        has_labels: whether the loss is computed here, where it is known what was dropped.
        question: the text of each row, or of the only one, for methods that look at it.
    """

    def __init__(
        self,
        ratio: float | None = None,
        num_outputs: int = 0,
        has_labels: bool = False,
        question: str | Sequence[str] | None = None,
    ):
        self.ratio, self.num_outputs, self.has_labels, self.question = ratio, num_outputs, has_labels, question
        self.plan: PruningPlan | None = None

    @property
    def record(self) -> PruningRecord | None:
        return None if self.plan is None else self.plan.record

    @property
    def dropped(self) -> torch.BoolTensor | None:
        """[batch, length], whether a token of the call was dropped; None where none was."""
        return None if self.plan is None or self.plan.packing is None else ~self.plan.packing.kept

    def without_drafted(self, input_ids: torch.Tensor | None, num_features_of: dict[int, int]) -> torch.Tensor | None:
        """`input_ids` to look for placeholders in. A drafted token is text: features came for the prompt's placeholders alone.

        Args:
            input_ids: the call's.
            num_features_of: placeholder id -> number of features that came for it.
        """
        num_drafted = self.num_outputs - 1
        if num_drafted < 1 or input_ids is None:
            return input_ids
        surplus = [id for id, num_features in num_features_of.items() if int((input_ids == id).sum()) != num_features]
        if not surplus:
            return input_ids
        drafted = input_ids[:, -num_drafted:]
        is_surplus = torch.isin(drafted, drafted.new_tensor(surplus))
        return torch.cat([input_ids[:, :-num_drafted], drafted.masked_fill(is_surplus, -1)], dim=1)


def named_arguments(names: Sequence[str], args: tuple, kwargs: dict) -> dict:
    """`kwargs` with `args` under their names, as Python would give them.

    Raises:
        TypeError: for more `args` than names, or one that is among `kwargs` too.
    """
    if len(args) > len(names):
        raise TypeError(f"forward() takes {len(names)} positional arguments but {len(args)} were given.")
    for name in names[: len(args)]:
        if name in kwargs:
            raise TypeError(f"forward() got multiple values for argument {name!r}.")
    return dict(zip(names, args, strict=False)) | kwargs


def positional_names(forward: Callable) -> list[str]:
    """The names of what a method `forward` takes by position, after `self`."""
    parameters = inspect.signature(forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][1:]


@contextmanager
def explained_to_later_turns(cache: Cache | None) -> Iterator[None]:
    """Where the tokens of a later turn do not match its pixels, say that those of earlier turns are not to come again."""
    try:
        yield
    except ValueError as error:
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if past_length == 0:
            raise
        raise ValueError(
            f"{error}. The cache holds the {past_length} tokens of earlier turns: pass the pixels of new images alone."
        ) from None


def takes_stock_positions(forward: Callable) -> Callable:
    """Let the `forward` of `PrunedModelMixin` take arguments by position in the order of the stock class's, and give a
    generating class outputs with names, also where the config says `return_dict=False`."""

    @wraps(forward)
    def named(self, *args, **kwargs):
        if args:
            kwargs = named_arguments(self.stock_positions, args, kwargs)
        if kwargs.get("pruning_request") is not None:
            kwargs["return_dict"] = True
        return forward(self, **kwargs)

    return named


def refuse_unsupported(attention_mask, kwargs: dict) -> None:
    """Raise a ValueError for a call that no plan can be made for: packed rows, a mask that is not 2-D, `torch.export`."""
    check_mask(attention_mask)
    if packed := sorted(name for name, value in kwargs.items() if name.startswith("cu_seq") and value is not None):
        raise ValueError(
            f"{', '.join(packed)} says that several sequences are packed into one row. Pruning does not support that: give "
            "each sequence a row of its own, or set pruning_ratio=0."
        )
    if torch.compiler.is_exporting():
        raise ValueError(
            "torch.export can not trace which tokens stay, because their values decide. Export with pruning_ratio=0."
        )


def add_encoded(outputs, encoded: dict, visuals: Sequence[VisualTokens]) -> None:
    """Give outputs the fields of the stock class's that hold what the encoder made, in place."""
    names = {field.name for field in fields(outputs)}
    for visual in visuals:
        if f"{visual.modality}_outputs" in names:  # from transformers 5.24 on
            outputs[f"{visual.modality}_outputs"] = encoded[visual.modality]
        elif f"{visual.modality}_hidden_states" in names:
            outputs[f"{visual.modality}_hidden_states"] = torch.cat(list(visual.features))


class SavedAndLoadedMixin(AskedAsStockMixin):
    """Put in front of a stock model, with or without a head: its checkpoints."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """See `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if the checkpoint lacks a weight, where the library would initialise it at random and go on; not where
                `output_loading_info` asks for the list of them. And what `check_heads` raises.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing and not output_loading_info:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of the weights of {cls.__name__}: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}."
            )
        check_heads(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """See `PreTrainedModel.save_pretrained`. Weights get the names of the modules, not those of the first checkpoints: the
        stock class reads them under our `model_type` too, for which the library alone renames none."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class PrunedModelMixin(RecordKeptMixin, SavedAndLoadedMixin):
    """Put in front of a stock multimodal model: the part between its inputs and its decoder.

    A family says which layers its decoder has (`decoder_layers`), what comes with a call (`encoder_inputs`), what grids it
    forms (`grid_views`, set on each tensor of features by its `get_image_features` and `get_video_features`), and overrides
    the hooks below where it differs.
    """

    decoder_layers: Sequence[type]  # for `prune_decoder`
    # modality -> the argument that holds the pixels, and what else its `get_<modality>_features` takes
    encoder_inputs: dict[str, tuple[str, tuple[str, ...]]]
    stock_positions: Sequence[str]  # what the stock `forward` takes by position, in order
    observers: ClassVar[list[Callable[[PruningRecord], None]]] = []  # each is called with the record of each call that prunes

    def __init_subclass__(cls):
        super().__init_subclass__()
        if stock := stock_class(cls):  # else a mixin of a family
            cls.stock_positions = positional_names(stock.forward)

    def __init__(self, config):
        register_model_type(type(config))  # again, for libraries that came after the config class
        settings = config.pruning_settings()  # what `from_pretrained` was given is set after the config has checked itself
        super().__init__(config)
        prune_decoder(self.get_decoder(), self.decoder_layers)
        if settings is not None:
            self.refuse_unknown_tower(settings)

    @takes_stock_positions
    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pruning_ratio: float | None = None,
        pruning_question: str | Sequence[str] | None = None,
        pruning_request: PruningRequest | None = None,
        **kwargs,
    ):
        """The stock class's `forward`, with `pruning_ratio` and `pruning_question` for this call."""
        request = pruning_request or PruningRequest(pruning_ratio, question=pruning_question)
        if request.ratio is not None:
            check_ratio(request.ratio)
        has_visuals = self.has_visuals(kwargs)
        settings = self.config.pruning_settings(request.ratio) if has_visuals else None  # compiled decoding skips this
        if settings is not None:
            self.refuse_unknown_tower(settings)
            if request.question is not None:
                self.config.refuse_question(settings)
        is_stock_call = pruning_state(cache) is None and settings is None
        if not is_stock_call:
            refuse_unsupported(attention_mask, kwargs)
        has_positions = position_ids is not None
        position_ids = self.resolve_position_ids(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, has_visuals, is_stock_call, kwargs
        )
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            CACHE_NAME: cache,
            "return_dict": True,
        }
        if is_stock_call:
            with self.config.encoding_for(None) if has_visuals else nullcontext():
                outputs = super().forward(input_ids=input_ids, **inputs, **kwargs)
            if self.config.has_mrope and (has_visuals or position_ids is None or position_ids.shape[-1] > 1):
                note_positions(cache_of(outputs), position_ids, attention_mask)
        else:
            request.has_positions = has_positions
            outputs = self._forward_by_plan(request, settings, input_ids, inputs, kwargs)
        leave_record(outputs, request.record)
        return outputs

    def _forward_by_plan(
        self,
        request: PruningRequest,
        settings: PruningSettings | None,
        input_ids: torch.LongTensor | None,
        inputs: dict,
        kwargs: dict,
    ):
        """`forward` where tokens leave, or have left the cache.

        Args:
            settings: what the call prunes, None where it brings nothing to prune.
            inputs: what the stock `forward` takes beside `input_ids`, as the caller gave it.
            kwargs: the rest, with what `encoder_inputs` names. What is used here is taken out.
        """
        inputs_embeds, attention_mask, cache = inputs["inputs_embeds"], inputs["attention_mask"], inputs[CACHE_NAME]
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if not isinstance(attention_mask, dict):
            attention_mask = mask_of_entries(self.get_decoder().config, inputs_embeds, attention_mask, cache, 0)
        # A decoded token leaves `kwargs` alone: compiled, to take from them means to compile again where one of them grows, as
        # `mm_token_type_ids` does from transformers 5.18 to 5.22.
        encoded = {}
        if self.has_visuals(kwargs):
            with self.config.encoding_for(settings):
                encoded = self._encode(kwargs)
        with explained_to_later_turns(cache):
            visuals, inputs_embeds = self._merge(encoded, request, input_ids, inputs_embeds)
        plan = request.plan = make_plan(
            self.get_decoder(),
            settings,
            cache,
            attention_mask,
            inputs["position_ids"],
            visuals,
            request.num_outputs,
            inputs_embeds.shape[1],
            may_count_padding=not request.has_positions and self.may_count_padding(cache),
        )
        if inputs["position_ids"] is None:
            inputs["position_ids"] = plan.positions_without_padding(cache, inputs_embeds)
        plan.deepstack, plan.question = self.deepstack(encoded, visuals), request.question
        of_plan = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": None if plan.is_below_all_keys else stock_mask(attention_mask),
            "pruning_plan": plan,
        }
        outputs = super().forward(**(inputs | of_plan), **kwargs)
        if plan.grids and plan.record is None:
            raise plan.skipped()
        plan.unpack_outputs(outputs)
        if encoded and inputs["position_ids"] is not None:
            note_positions(cache_of(outputs), inputs["position_ids"], attention_mask)
        if self.training and torch.is_grad_enabled() and request.dropped is not None and not request.has_labels:
            logger.warning_once(LOSS_ELSEWHERE)
        if settings is not None and plan.record is not None:
            kept, visual = plan.record.num_kept, plan.record.num_visual
            logger.info(f"{settings.method} kept {kept} of {visual} visual tokens from decoder layer {plan.layer} on.")
            for observe in self.observers:
                observe(plan.record)
        add_encoded(outputs, encoded, visuals)
        return outputs

    def tower_blocks(self) -> nn.ModuleList | None:
        """The blocks of the vision tower, where the family knows what methods look at in them, and its features come with a
        `TowerSignals` each where `config.looks_at_tower`: as attribute `tower`, or `towers` of a tensor of all features."""
        return None

    def block_of_features(self, feature_layer: int | list[int] | None) -> nn.Module:
        """The block of the vision tower that makes the features.

        Args:
            feature_layer: the call's `vision_feature_layer`, None for the config's.

        Raises:
            ValueError: for several layers, and one that no block makes.
        """
        blocks, method = self.tower_blocks(), f"pruning_method {self.config.pruning_method!r}"
        feature_layer = self.config.vision_feature_layer if feature_layer is None else feature_layer
        if not isinstance(feature_layer, int):
            raise ValueError(
                f"{method} looks at the block of the tower that makes the features, but they are of several with "
                f"vision_feature_layer={feature_layer}. Choose one layer, or another method."
            )
        number = len(blocks) + feature_layer if feature_layer < 0 else feature_layer - 1
        if not 0 <= number < len(blocks):
            raise ValueError(
                f"{method} looks at the block of the tower that makes the features, so vision_feature_layer must be in "
                f"[1, {len(blocks)}] or [-{len(blocks)}, -1], but is {feature_layer}."
            )
        return blocks[number]

    def refuse_unknown_tower(self, settings: PruningSettings) -> None:
        """Raise a ValueError where a method looks at a vision tower of which nobody says how."""
        if "tower" in settings.looks_at and self.tower_blocks() is None:
            raise ValueError(
                f"pruning_method {settings.method!r} looks at the attention in the vision tower, but what that is "
                f"in a {self.config.model_type} model with a tower of type {self.config.vision_config.model_type!r} is not "
                "known. Choose a method that does not look at the tower."
            )

    def has_visuals(self, inputs: dict) -> bool:
        """Whether images or videos come with a call, as pixels or encoded."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        return any(
            _holds_pixels(inputs.get(pixels)) or encoded.get(modality) is not None
            for modality, (pixels, _) in self.encoder_inputs.items()
        )

    def _encode(self, inputs: dict) -> dict:
        """The encoder's outputs by modality. Takes what it uses out of `inputs`.

        Raises:
            ValueError: if a modality comes both as pixels and encoded.
        """
        given = inputs.pop("mm_encoder_outputs", None) or {}
        arguments = {
            name: inputs.pop(name)
            for pixels, others in self.encoder_inputs.values()
            for name in (pixels, *others)
            if name in inputs
        }
        outputs = {}
        for modality, (pixels, others) in self.encoder_inputs.items():
            if given.get(modality) is not None and _holds_pixels(arguments.get(pixels)):
                raise ValueError(f"Got both {pixels} and mm_encoder_outputs[{modality!r}]; pass one of them.")
            if given.get(modality) is not None:
                outputs[modality] = given[modality]
            elif _holds_pixels(arguments.get(pixels)):
                others = {name: arguments[name] for name in others if name in arguments}
                outputs[modality] = getattr(self, f"get_{modality}_features")(arguments[pixels], **others, return_dict=True)
        return outputs

    def _merge(
        self, encoded: dict, request: PruningRequest, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> tuple[list[VisualTokens], torch.Tensor]:
        """Put the features at their placeholders."""
        features_of = {modality: features_of_images(outputs.pooler_output) for modality, outputs in encoded.items()}
        num_features_of = {self.placeholder_id(modality): sum(map(len, features)) for modality, features in features_of.items()}
        input_ids = request.without_drafted(input_ids, num_features_of)
        visuals, placeholder_embeds = [], inputs_embeds
        for modality, features in features_of.items():
            flat = torch.cat(features).to(inputs_embeds.device, inputs_embeds.dtype)
            masks = self.get_placeholder_mask(input_ids, inputs_embeds=placeholder_embeds, **{f"{modality}_features": flat})
            mask = masks if isinstance(masks, torch.Tensor) else masks[("image", "video").index(modality)]
            inputs_embeds = inputs_embeds.masked_scatter(mask, flat)
            views = [self.grid_views_of(modality, image) for image in features]
            tokens = placeholder_embeds if input_ids is None else input_ids
            ends = self.ends_of_images(mask[..., 0], views, tokens)
            visuals.append(VisualTokens(modality, mask[..., 0], features, views, ends))
        return visuals, inputs_embeds

    def placeholder_id(self, modality: str) -> int:
        """The token id that holds the place of a modality's features."""
        return getattr(self.config, f"{modality}_token_id")

    def grid_views_of(self, modality: str, features: torch.Tensor) -> Sequence[GridView]:
        """The grids of one image or video, as its encoder noted them.

        Raises:
            ValueError: for features that were not made by `get_image_features` or `get_video_features` of this model.
        """
        if not hasattr(features, "grid_views"):
            raise ValueError(
                f"The grid of {modality} features of shape {tuple(features.shape)} is not known: this model's "
                f"get_{modality}_features did not make them as they are. Pass pixels, or set pruning_ratio=0."
            )
        return features.grid_views

    def ends_of_images(
        self, mask: torch.BoolTensor, views: Sequence[Sequence[GridView]], tokens: torch.Tensor
    ) -> torch.BoolTensor | None:
        """Where images end, for a family whose encoder is not told which images its tiles are of. See `VisualTokens`.

        Args:
            mask: [batch, length], the placeholders.
            views: for each of the encoder's features, its grids.
            tokens: [batch, length] ids or, where there are none, [batch, length, hidden_size] embeddings of the call's tokens.
        """
        return None

    def resolve_position_ids(
        self, input_ids, inputs_embeds, attention_mask, position_ids, cache, has_visuals, is_stock_call, inputs: dict
    ) -> torch.LongTensor | None:
        """The position ids of a call, where a family does not leave them to its decoder."""
        return position_ids

    def may_count_padding(self, cache: Cache | None) -> bool:
        """Whether the positions of a cache's tokens may count padding, as the decoder's own do."""
        notes = found_notes(cache)
        return not self.config.has_mrope if notes is None else notes.count_padding

    def deepstack(self, encoded: dict, visuals: Sequence[VisualTokens]) -> Sequence[Sequence[tuple]]:
        """See `PruningPlan.deepstack`."""
        return ()


class PrunedForConditionalGenerationMixin(RecordKeptMixin, SavedAndLoadedMixin):
    """What every generating model of ours adds to its stock class, apart from `forward`."""

    _auto_class = "AutoModelForImageTextToText"

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Asked by engines that run a decoder's layers in a loop of their own, where nothing would be pruned.

        Raises:
            ValueError: always. It says how to serve the model pruned, or that the plugin for vLLM does not serve this family.
        """
        try:
            from vlmpruner_vllm.families import family_of
        except ImportError:
            pass
        else:
            family_of(SimpleNamespace(architectures=[cls.__name__]))
        raise ValueError(
            f"{cls.__name__} would run unpruned in this engine. vLLM serves LLaVA and Qwen-VL models pruned with the plugin of "
            'this project: run pip install "vlmpruner[vllm]" (in a clone of the repository, pip install ".[vllm]"), and start '
            "vLLM again. Others are served by `transformers serve` alone."
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """See `SavedAndLoadedMixin.from_pretrained`."""
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=output_loading_info, **kwargs
        )
        model = loaded[0] if output_loading_info else loaded
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        for name, value in pruning_keys_of_generation(pretrained_model_name_or_path, hub).items():
            setattr(model.generation_config, name, value)
        return loaded

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        with record_of_call() as found:
            outputs = super().generate(*args, **kwargs)
        if found and isinstance(outputs, ModelOutput) and cache_of(outputs) is None:
            leave_record(outputs, found[0])
        return outputs

    def add_model_tags(self, tags: list[str] | str) -> None:
        """See `PreTrainedModel.add_model_tags`. TRL's trainers call it once they have their models, and some have loaded a
        reference model from the path of the config: a warning tells where that is not pruned as this model."""
        super().add_model_tags(tags)
        # With adapters the reference is this model without them.
        if not REFERENCE_TAGS.isdisjoint([tags] if isinstance(tags, str) else tags) and not hasattr(self, "peft_config"):
            warn_of_other_reference(self)

    def _prepare_generation_config(self, generation_config, *args, **kwargs):
        """The stock method, which also takes `pruning_ratio`: as an argument, else from the generation config of the call, else
        from the model's. There it would be lost, and the argument with it.

        Raises:
            ValueError: for a bad ratio, another `pruning_` key in a generation config, and a prefill in chunks that would cut
                images which are to be pruned.
        """
        if kwargs.get("pruning_ratio", 0) is None:
            del kwargs["pruning_ratio"]
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        keys = sorted(key for key in vars(generation_config) if key.startswith("pruning_"))
        if others := [key for key in keys if key != "pruning_ratio"]:
            raise ValueError(f"A generation config holds pruning_ratio alone, but this one has {', '.join(others)} too.")
        if keys and (ratio := vars(generation_config).pop("pruning_ratio")) is not None:
            model_kwargs["pruning_ratio"] = ratio
        if (ratio := model_kwargs.get("pruning_ratio")) is not None:
            check_ratio(ratio)
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is not None and self._settings_of_generation(model_kwargs) is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk_size} cuts images into pieces, but pruning chooses among all tokens of an image. "
                "Set prefill_chunk_size=None, or pruning_ratio=0."
            )
        return generation_config, model_kwargs

    def _settings_of_generation(self, model_kwargs: dict) -> PruningSettings | None:
        """What the prefill of `generate` prunes; None for nothing."""
        has_visuals = self.model.has_visuals(model_kwargs)
        return self.config.pruning_settings(model_kwargs.get("pruning_ratio")) if has_visuals else None

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs):
        """The stock method, which some versions have: images and videos are encoded before the prefill."""
        with self.model.config.encoding_for(self._settings_of_generation(model_kwargs)):
            return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, num_new_tokens: int = 1, **kwargs):
        """The stock method. Without a cache, each step runs the whole sequence again and must keep what the first one kept: the
        end of the prompt, whose output is as good as asked for."""
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("pruning_question", None)  # looked at with the images; compiled decoding would compile it in
        else:
            model_kwargs["num_needed_outputs"] = model_kwargs.get("num_needed_outputs", 1) + num_new_tokens
        return model_kwargs

    @wraps(GenerationMixin.generate_batch)
    def generate_batch(self, inputs, *args, **kwargs):
        for number, tokens in enumerate(inputs):
            self._refuse_placeholders(tokens, f"Request {number}")
        return super().generate_batch(inputs, *args, **kwargs)

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args, **kwargs):
        manager = super().init_continuous_batching(*args, **kwargs)
        stock_add_request = manager.add_request

        def add_request(input_ids, *args, **kwargs):
            self._refuse_placeholders(input_ids, "A request")
            return stock_add_request(input_ids, *args, **kwargs)

        manager.add_request = add_request
        return manager

    def _refuse_placeholders(self, tokens: Sequence[int], request: str) -> None:
        for name in ("image_token_id", "video_token_id"):
            token = getattr(self.config, name, None)
            if token is not None and token in tokens:
                raise ValueError(
                    f"{request} holds {name}={token}, but continuous batching takes text alone: it hands no pixels to the "
                    "model. Call generate for requests with images or videos."
                )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs,
    ):
        """The stock method, but images and videos are repeated by rows: versions up to 5.18 pair them with the wrong beams."""
        visuals = {} if expand_size == 1 else self.repeat_visuals(expand_size, input_ids, model_kwargs)
        others = {name: value for name, value in model_kwargs.items() if name not in visuals}
        input_ids, others = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **others
        )
        if (question := others.get("pruning_question")) is not None:
            questions = [question] if isinstance(question, str) else question
            others["pruning_question"] = [text for text in questions for _ in range(expand_size)]
        return input_ids, others | visuals

    def repeat_visuals(self, repeats: int, input_ids: torch.LongTensor | None, inputs: dict) -> dict:
        """The encoded images and videos among `inputs`, `repeats` times: [A, B] of a row becomes [A, B, A, B]."""
        encoded = inputs.get("mm_encoder_outputs")
        if not encoded:
            return {}
        repeated = {}
        for modality, outputs in encoded.items():
            pooled, deepstack = outputs.pooler_output, outputs.get("deepstack_features")
            order = self.repeated_order(modality, pooled, repeats, input_ids, inputs)
            changes = {"pooler_output": _reorder(pooled, order)}
            if deepstack is not None:
                changes["deepstack_features"] = [_reorder(layer, order) for layer in deepstack]
            repeated[modality] = replace(outputs, **changes)
        return {"mm_encoder_outputs": repeated}

    def repeated_order(self, modality: str, features, repeats: int, input_ids, inputs: dict) -> list[int]:
        """Which image or video stands at each place when rows are repeated one after another."""
        token = torch.tensor(self.model.placeholder_id(modality), device=self.device)
        if input_ids is not None and input_ids.numel() > 0:
            is_placeholder = input_ids == token
        else:
            is_placeholder = (inputs["inputs_embeds"] == self.get_input_embeddings()(token)).all(-1)
        placeholders = is_placeholder.sum(1).tolist()
        rows = rows_of_images(placeholders, [len(image) for image in features], modality)
        images_of_rows = [[image for image, of in enumerate(rows) if of == row] for row in range(len(placeholders))]
        return [image for images in images_of_rows for image in images * repeats]

    def get_pruning_record(self, outputs) -> PruningRecord | None:
        """What was kept, or None if nothing was pruned.

        Args:
            outputs: of `forward`, also through a wrapper, or of `generate(..., return_dict_in_generate=True)`.

        Raises:
            ValueError: for a tensor or a tuple, which hold no record, and where a wrapper has lost it.
        """
        if isinstance(outputs, torch.Tensor | tuple | list):
            raise ValueError(
                f"A {type(outputs).__name__} does not tell what was kept. Call generate with return_dict_in_generate=True, or "
                "forward with return_dict=True, and pass what they return."
            )
        return record_of(outputs)

    def loss_of_kept_tokens(self, outputs, labels: torch.Tensor, num_items_in_batch=None, label_smoothing: float = 0.0):
        """The loss of a training step whose labels were not given to the model: `Trainer(compute_loss_func=...)`.

        Labels that a dropped token would have to predict do not count; its logits, of a zero state, are all 0. See
        `supervised_loss` for `num_items_in_batch`.

        Args:
            outputs: of `forward`.
            labels: [batch, length], not shifted; -100 where there is nothing to predict.
            num_items_in_batch: number of labels of an optimizer step, or None for the mean over those of this call.
            label_smoothing: in [0, 1], the share of a target that is spread over the vocabulary evenly: what
                `label_smoothing_factor` sets, which can not be used together with it.
        """
        logits = outputs["logits"].float()
        dropped = (logits == 0).all(-1)
        labels, options = without_dropped(labels.to(logits.device), dropped, {"num_items_in_batch": num_items_in_batch})
        count = options["num_items_in_batch"]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1),
            options["shift_labels"].flatten(),
            label_smoothing=label_smoothing,
            reduction="mean" if count is None else "sum",
        )
        return loss if count is None else loss / count

    @takes_cache
    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, cache, **kwargs):
        """The masks that `generate` prepares for compiled decoding, with one more for the pruned layers."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask  # a prefill: the model makes its masks itself, once it knows what stays
        masks = create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        states = pruning_states(cache)
        if not states:
            return masks
        pruned_masks = {}
        for state in states:
            name = f"{PRUNED_MASK}{state.layer}"
            padding_mask = continued_padding_mask(cache, state, attention_mask, inputs_embeds.shape[1])
            text_config = config.get_text_config(decoder=True)
            pruned_masks[name] = stage_mask(text_config, inputs_embeds, padding_mask, cache, state.layer)
            if (sizes := state.sizes_of_rows()) is not None:
                masks_of_stage = additive_masks(pruned_masks[name], sizes, inputs_embeds.dtype)
                pruned_masks[f"{name}{OWN}"], pruned_masks[name] = masks_of_stage
        return (masks if isinstance(masks, dict) else {STOCK_MASK: masks}) | pruned_masks


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def pruning_keys_of_generation(name: str | os.PathLike | None, hub: dict) -> dict:
    """The `pruning_` keys of a repo's generation config, which the library drops where that was made from a model's config."""
    try:
        file = None if name is None else cached_file(name, GENERATION_CONFIG_NAME, **hub)
    except OSError:  # there is none
        return {}
    content = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key.startswith("pruning_")}


def warn_of_other_reference(model) -> None:
    """Warn where a model from the same path, as a trainer's reference model is, is not pruned as this one."""
    gc.collect()  # what nothing holds any more
    path, here = model.config.name_or_path, settings_in_words(model.config)
    models = [each for each in gc.get_objects() if issubclass(type(each), PreTrainedModel) and each.can_generate()]
    there = [settings_in_words(each.config) for each in models if each.config.name_or_path == path]
    if other := next((each for each in there if each != here), None):
        logger.warning(
            f"The model in training is {here}. Another from {path} is {other}. If it is the reference model, as of a trainer "
            "that was given none, the loss compares models that see other tokens. Train what is loaded from a folder to which "
            "save_pretrained wrote it, or give the trainer a reference model that is pruned alike. See docs/training.md."
        )


def settings_in_words(config) -> str:
    """How a model is pruned, by a config of ours or of a stock class."""
    if not hasattr(config, "pruning_settings") or config.pruning_settings() is None:
        return "unpruned"
    values = {field.name: getattr(config, field.name) for field in fields(PruningConfig)}
    return "pruned with " + ", ".join(f"{key}={value!r}" for key, value in values.items() if value is not None)


def _holds_pixels(pixels) -> bool:
    return pixels is not None and len(pixels) > 0


def features_of_images(pooled: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The features of each image or tile. Where they come as one tensor, what the tower tells of each is its `towers`."""
    images = list(pooled)
    if hasattr(pooled, "towers"):
        for features, tower in zip(images, pooled.towers, strict=True):
            features.tower = tower
    return images


def _reorder(features, order: list[int]):
    if not isinstance(features, torch.Tensor):
        return [features[image] for image in order]
    reordered = features[order]
    if hasattr(features, "towers"):
        reordered.towers = [features.towers[image] for image in order]
    return reordered


def pruned_forward(stock_class: type) -> Callable:
    """The `forward` of a stock generating class that also takes `pruning_ratio` and `pruning_question`.

    What was kept is an attribute `pruning_record` of the outputs and none of their items, which are tensors as the stock
    class's. Labels that a dropped token would have to predict do not count in the loss.

    Of models with experts, `router_logits` are one tensor [batch * length, num_experts] for each layer with a router, as in the
    stock class, zero where a token was dropped before that layer; `aux_loss` counts the tokens that each layer has routed.
    """
    stock_forward = stock_class.forward
    parameters = list(inspect.signature(stock_forward).parameters.values())
    names = positional_names(stock_forward)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in (("pruning_ratio", float | None), ("pruning_question", str | Sequence[str] | None))
    ]

    @can_return_tuple
    def forward(self, *args, pruning_ratio: float | None = None, pruning_question=None, **kwargs):
        if args:
            kwargs = named_arguments(names, args, kwargs)
        labels, logits_to_keep = kwargs.pop("labels", None), kwargs.get("logits_to_keep", 0)
        num_outputs = kwargs.pop("num_needed_outputs", logits_to_keep if isinstance(logits_to_keep, int) else 0)
        request = PruningRequest(pruning_ratio, num_outputs, labels is not None, pruning_question)
        outputs = stock_forward(self, **kwargs, pruning_request=request, return_dict=True)
        aux_loss = outputs.get("aux_loss")
        if aux_loss is not None and request.dropped is not None:
            aux_loss = outputs["aux_loss"] = load_balancing_loss(self, outputs.router_logits, request.plan)
        if labels is not None:
            options = {name: value for name, value in kwargs.items() if name not in names}
            loss = supervised_loss(self, outputs.logits, labels, request.dropped, logits_to_keep, options)
            if aux_loss is not None:
                loss = loss + self.config.get_text_config().router_aux_loss_coef * aux_loss.to(loss.device)
            outputs = type(outputs)(loss=loss, **{name: value for name, value in outputs.items() if name != "loss"})
        leave_record(outputs, request.record)
        return outputs

    forward.__signature__ = inspect.Signature([*parameters[:-1], *added, parameters[-1]])
    forward.__doc__ = stock_forward.__doc__
    return forward


def load_balancing_loss(model, router_logits: Sequence[torch.Tensor], plan: PruningPlan) -> torch.Tensor:
    """The stock class's (arXiv 2101.03961, equations 4 to 6, over all layers at once), of the tokens that were routed: in each
    layer those that it ran on, without what was dropped before it and without padding."""
    routed = plan.routed(router_logits)
    stock_loss = sys.modules[stock_class(type(model)).__module__].load_balancing_loss_func
    return stock_loss(routed, routed[0].shape[-1], model.config.get_text_config().num_experts_per_tok)


def supervised_loss(
    model, logits: torch.Tensor, labels: torch.Tensor, dropped: torch.BoolTensor | None, logits_to_keep, options: dict
) -> torch.Tensor:
    """The stock loss of a call, without the labels that a dropped token would have to predict.

    Where the sum is divided by `num_items_in_batch`, a count of labels that was taken before they were left out (by `Trainer`,
    over the batches of an optimizer step), that is scaled by the share of this call's labels that remains. For a step of one
    call the loss is the mean over the labels that remain.

    Args:
        labels: [batch, n], as long as the logits.
        dropped: [batch, length], whether a token of the call was dropped; None where none was.
        logits_to_keep: which of the tokens have logits: the last n, or places. 0 for all.
        options: more arguments of the loss function.
    """
    if dropped is not None:
        dropped = dropped[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else dropped[:, logits_to_keep]
        labels, options = without_dropped(labels, dropped, options)
    return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size, **options)


def without_dropped(labels: torch.Tensor, dropped: torch.BoolTensor, options: dict) -> tuple[torch.Tensor, dict]:
    """`labels` and the options of a loss, with nothing left for the tokens that are `dropped` [batch, n] to predict."""
    if labels.shape != dropped.shape:
        return labels, options  # the loss says what it misses
    ignore_index, options = options.get("ignore_index", -100), dict(options)
    shifted = options.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    supervised = shifted.masked_fill(dropped.to(shifted.device), ignore_index)
    if (num_items := options.get("num_items_in_batch")) is not None:
        counts = [(each != ignore_index).sum() for each in (supervised, shifted)]
        options["num_items_in_batch"] = num_items * counts[0].clamp_min(1) / counts[1].clamp_min(1)
    return labels, options | {"shift_labels": supervised}


def stock_mask(attention_mask: torch.Tensor | dict | None) -> torch.Tensor | dict | None:
    """Of masks made by `create_masks_for_generate`, those of the stock decoder; any other mask as it is."""
    if not isinstance(attention_mask, dict) or not has_pruned_mask(attention_mask):
        return attention_mask
    masks = {name: mask for name, mask in attention_mask.items() if not name.startswith(PRUNED_MASK)}
    return masks.get(STOCK_MASK, masks)
