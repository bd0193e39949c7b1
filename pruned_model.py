"""What every pruned model adds to its stock classes: from a call's inputs to a plan, and back to the caller's shapes."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import wraps

import torch
from transformers import Cache, GenerationMixin, modeling_outputs
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.utils import can_return_tuple

from .configuration_vlmpruner import check_ratio
from .pruned_cache import CACHE_NAME, PruningRecord, cache_of, continued_padding_mask, pruning_state, takes_cache
from .pruned_decoder import (
    PRUNED_MASK,
    GridView,
    PruningPlan,
    VisualTokens,
    check_mask,
    make_plan,
    prune_decoder,
    rows_of_images,
)


STOCK_MASK = "stock_attention"


@dataclass
class PruningRequest:
    """What the caller of `forward` asks for, and the plan that the model made of it (None when the stock code ran).

    `num_drafted` of the last tokens may be candidates of speculative decoding, which can copy placeholders from the prompt.
    """

    ratio: float | None = None
    num_drafted: int = 0
    plan: PruningPlan | None = None

    @property
    def record(self) -> PruningRecord | None:
        return None if self.plan is None else self.plan.record

    def without_drafted(self, input_ids: torch.Tensor | None, num_features_of: dict[int, int]) -> torch.Tensor | None:
        """`input_ids` to look for placeholders in. A drafted token is text: features came for the prompt's placeholders alone.

        Args:
            input_ids: the call's.
            num_features_of: placeholder id -> number of features that came for it.
        """
        if self.num_drafted < 1 or input_ids is None:
            return input_ids
        surplus = [id for id, num_features in num_features_of.items() if int((input_ids == id).sum()) != num_features]
        if not surplus:
            return input_ids
        drafted = input_ids[:, -self.num_drafted :]
        is_surplus = torch.isin(drafted, drafted.new_tensor(surplus))
        return torch.cat([input_ids[:, : -self.num_drafted], drafted.masked_fill(is_surplus, -1)], dim=1)

    def supervised_labels(self, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """See `PruningPlan.ignore_dropped`."""
        return labels if self.plan is None else self.plan.ignore_dropped(labels, **kwargs)


class PrunedModelMixin:
    """Put in front of a stock multimodal model: the part between its inputs and its decoder.

    A family says what comes with a call (`encoder_inputs`), what grids it forms (`grid_views`, set on each tensor of features
    by its `get_image_features` and `get_video_features`), and overrides the hooks below where it differs.
    """

    # modality -> the argument that holds the pixels, and what else its `get_<modality>_features` takes
    encoder_inputs: dict[str, tuple[str, tuple[str, ...]]]

    def __init__(self, config):
        config.validate_pruning()  # what `from_pretrained` was given is set after the config has checked itself
        super().__init__(config)
        self._no_split_modules |= prune_decoder(self.language_model)

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
        pruning_request: PruningRequest | None = None,
        **kwargs,
    ):
        """The stock class's `forward`, with `pruning_ratio` for this call. All but the first argument go by keyword."""
        request = pruning_request or PruningRequest(pruning_ratio)
        if request.ratio is not None:
            check_ratio(request.ratio)
        has_visuals = self.has_visuals(kwargs)
        settings = self.config.pruning_settings(request.ratio) if has_visuals else None  # compiled decoding skips this
        is_stock_call = pruning_state(cache) is None and settings is None
        if not is_stock_call:
            check_mask(attention_mask)
        position_ids = self.resolve_position_ids(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, has_visuals, kwargs
        )
        stock_inputs = {CACHE_NAME: cache, "return_dict": True}
        if is_stock_call:
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **stock_inputs,
                **kwargs,
            )
            if has_visuals or position_ids is None:
                self.note_positions(cache_of(outputs), position_ids, attention_mask)
            return outputs
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        # A decoded token leaves `kwargs` alone: compiled, to take from them means to compile again where one of them grows, as
        # `mm_token_type_ids` does from transformers 5.18 to 5.22.
        encoded = self._encode(kwargs) if has_visuals else {}
        visuals, inputs_embeds = self._merge(encoded, request, input_ids, inputs_embeds)
        plan = request.plan = make_plan(self.language_model.config, settings, cache, attention_mask, position_ids, visuals)
        plan.deepstack = self.deepstack(encoded, visuals)
        outputs = super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=stock_mask(attention_mask),
            position_ids=position_ids,
            pruning_plan=plan,
            **stock_inputs,
            **kwargs,
        )
        plan.unpack_outputs(outputs)
        if has_visuals:
            self.note_positions(cache_of(outputs), position_ids, attention_mask)
        fields = {field.name for field in dataclass_fields(outputs)}
        for visual in visuals:
            if f"{visual.modality}_outputs" in fields:  # from transformers 5.24 on
                outputs[f"{visual.modality}_outputs"] = encoded[visual.modality]
            elif f"{visual.modality}_hidden_states" in fields:
                outputs[f"{visual.modality}_hidden_states"] = torch.cat(list(visual.features))
        return outputs

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
        features_of = {modality: list(outputs.pooler_output) for modality, outputs in encoded.items()}
        num_features_of = {
            getattr(self.config, f"{modality}_token_id"): sum(map(len, features)) for modality, features in features_of.items()
        }
        input_ids = request.without_drafted(input_ids, num_features_of)
        visuals, placeholder_embeds = [], inputs_embeds
        for modality, features in features_of.items():
            flat = torch.cat(features).to(inputs_embeds.device, inputs_embeds.dtype)
            masks = self.get_placeholder_mask(input_ids, inputs_embeds=placeholder_embeds, **{f"{modality}_features": flat})
            mask = masks if isinstance(masks, torch.Tensor) else masks[("image", "video").index(modality)]
            inputs_embeds = inputs_embeds.masked_scatter(mask, flat)
            views = [self.grid_views_of(modality, image) for image in features]
            visuals.append(VisualTokens(modality, mask[..., 0], features, views))
        return visuals, inputs_embeds

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

    def resolve_position_ids(
        self, input_ids, inputs_embeds, attention_mask, position_ids, cache, has_visuals: bool, inputs: dict
    ) -> torch.LongTensor | None:
        """The position ids of a call, where a family does not leave them to its decoder."""
        return position_ids

    def note_positions(self, cache: Cache | None, position_ids, attention_mask) -> None:
        """Called after images or videos, and where the decoder made the positions, for a family whose later ones need them."""

    def deepstack(self, encoded: dict, visuals: Sequence[VisualTokens]) -> Sequence[Sequence[tuple]]:
        """See `PruningPlan.deepstack`."""
        return ()


class PrunedForConditionalGenerationMixin:
    """What every generating model of ours adds to its stock class, apart from `forward`."""

    _auto_class = "AutoModelForImageTextToText"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """See `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if the checkpoint lacks a weight, where the library would initialise it at random and go on.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} of the weights of {cls.__name__}: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}."
            )
        return (model, info) if output_loading_info else model

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        options = kwargs.get("generation_config") or self.generation_config
        chunk_size = kwargs.get("prefill_chunk_size", getattr(options, "prefill_chunk_size", None))
        if (
            chunk_size is not None
            and self.model.has_visuals(kwargs)
            and self.config.pruning_settings(kwargs.get("pruning_ratio"))
        ):
            raise ValueError(
                f"prefill_chunk_size={chunk_size} cuts images into pieces, but pruning chooses among all tokens of an image. "
                "Set prefill_chunk_size=None, or pruning_ratio=0."
            )
        return super().generate(*args, **kwargs)

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
        token = torch.tensor(getattr(self.config, f"{modality}_token_id"), device=self.device)
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
            outputs: of `forward`, or of `generate(..., return_dict_in_generate=True)`.
        """
        record = getattr(outputs, "pruning_record", None)
        if record is None and (state := pruning_state(cache_of(outputs))) is not None:
            record = state.record
        return record

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
        state = pruning_state(cache)
        if state is None:
            return masks
        pruned_mask = create_causal_mask(
            config=config.get_text_config(decoder=True),
            inputs_embeds=inputs_embeds,
            attention_mask=continued_padding_mask(cache, attention_mask, inputs_embeds.shape[1]),
            position_ids=None,
            layer_idx=state.layer,
            **{CACHE_NAME: cache},
        )
        return (masks if isinstance(masks, dict) else {STOCK_MASK: masks}) | {PRUNED_MASK: pruned_mask}


def _with_record(output_class: type) -> type:
    """The stock output class with one field more: `pruning_record` (`PruningRecord`, *optional*)."""
    fields = {"__annotations__": {"pruning_record": PruningRecord | None}, "pruning_record": None, "__module__": __name__}
    return dataclass(type(f"Pruned{output_class.__name__}", (output_class,), fields))


def _holds_pixels(pixels) -> bool:
    return pixels is not None and len(pixels) > 0


def _reorder(features, order: list[int]):
    return features[order] if isinstance(features, torch.Tensor) else [features[image] for image in order]


def _output_class(stock_class: type) -> type:
    """What a stock generating class returns: its own output class, or (later than transformers 5.17) a shared one."""
    name = stock_class.__name__.replace("ForConditionalGeneration", "CausalLMOutputWithPast")
    plain = modeling_outputs.CausalLMOutputWithPast
    shared = getattr(modeling_outputs, "MultimodalCausalLMOutputWithPast", plain)  # from transformers 5.24 on
    return getattr(sys.modules[stock_class.__module__], name, shared)


def pruned_forward(stock_class: type) -> Callable:
    """The `forward` of a stock generating class that also takes `pruning_ratio` and whose outputs have a `pruning_record`.

    Labels that a dropped token would have to predict do not count in the loss.
    """
    stock_forward = stock_class.forward
    parameters = list(inspect.signature(stock_forward).parameters.values())
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    ratio = inspect.Parameter("pruning_ratio", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None)

    output_class = _with_record(_output_class(stock_class))

    @can_return_tuple
    def forward(self, *args, labels: torch.Tensor | None = None, pruning_ratio: float | None = None, **kwargs):
        if args:
            kwargs |= dict(zip(names[1:], args, strict=False))
            labels = kwargs.pop("labels", labels)
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        request = PruningRequest(pruning_ratio, num_drafted=logits_to_keep - 1 if isinstance(logits_to_keep, int) else 0)
        outputs = stock_forward(self, **kwargs, pruning_request=request, return_dict=True)
        loss = None
        if labels is not None:
            loss = _supervised_loss(self, outputs.logits, labels, request, {k: v for k, v in kwargs.items() if k not in names})
        return output_class(loss=loss, **outputs, pruning_record=request.record)

    forward.__signature__ = inspect.Signature([*parameters[:-1], ratio, parameters[-1]])
    forward.__doc__ = stock_forward.__doc__
    return forward


def _supervised_loss(model, logits: torch.Tensor, labels: torch.Tensor, request: PruningRequest, options: dict) -> torch.Tensor:
    if (shift_labels := options.get("shift_labels")) is not None:
        options["shift_labels"] = request.supervised_labels(shift_labels, is_shifted=True)
    labels = request.supervised_labels(labels)
    return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.get_text_config().vocab_size, **options)


def stock_mask(attention_mask: torch.Tensor | dict | None) -> torch.Tensor | dict | None:
    """Of masks made by `create_masks_for_generate`, those of the stock decoder; any other mask as it is."""
    if not isinstance(attention_mask, dict) or PRUNED_MASK not in attention_mask:
        return attention_mask
    masks = {name: mask for name, mask in attention_mask.items() if name != PRUNED_MASK}
    return masks.get(STOCK_MASK, masks)


def register_weight_renaming(**base_class_of: str) -> None:
    """Let checkpoints of the base classes load into ours: the library renames old parameters by class, and skips custom code.

    Args:
        base_class_of: name of our class -> class name or model type that the library knows a renaming for.
    """
    for name, base in base_class_of.items():
        renaming = get_checkpoint_conversion_mapping(base)
        if renaming is not None:
            register_checkpoint_conversion_mapping(name, renaming, overwrite=True)
