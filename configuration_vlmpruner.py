"""Configuration of pruned vision-language models: the base model's config plus flat `pruning_*` keys.

Each class is a base class of transformers with `PruningConfig` in front, a `model_type` of its own (so that a checkpoint can
not be opened without its code, which would silently give an unpruned model), and the `auto_map` that the Hub reads.
"""

# ruff: noqa: E402 - the version is checked before anything is imported that an older one lacks

import transformers
from packaging.version import Version


# The one place that states the supported range; pyproject.toml and README.md repeat it, a test compares them.
OLDEST_TRANSFORMERS, FIRST_UNSUPPORTED_TRANSFORMERS = "5.17", "6"

if not Version(OLDEST_TRANSFORMERS) <= Version(transformers.__version__) < Version(FIRST_UNSUPPORTED_TRANSFORMERS):
    needed = f"transformers>={OLDEST_TRANSFORMERS},<{FIRST_UNSUPPORTED_TRANSFORMERS}"
    raise ImportError(f'This code needs {needed}, but {transformers.__version__} is installed. Run pip install "{needed}".')

import filecmp
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    Glm4vConfig,
    Glm4vMoeConfig,
    Glm46VConfig,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)
from transformers.dynamic_module_utils import get_cached_module_file, get_relative_import_files
from transformers.utils import HF_MODULES_CACHE, logging

from .pruning_contract import check_method
from .pruning_method import PruningMethod
from .pruning_methods import METHODS
from .stock_lookups import register_model_type


logger = logging.get_logger(__name__)

PRUNING_METHODS = (*METHODS, "none")
VIDEO_SCOPES = ("slice", "video")
POOL_MODES = ("average", "max", "bilinear")
NEWLINE_POSITIONS = ("one_token", "frame", "grid", "no_token")
POSITIONS = ("original", "packed")
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}  # and the key of its length


def methods_with() -> dict[str, dict]:
    """Name of each parameter of a method -> the methods that have it, with its dataclass field."""
    found = {}
    for name, method in METHODS.items():
        for parameter in fields(method.Parameters):
            found.setdefault(parameter.name, {})[name] = parameter
    return found


def method_keys() -> type:
    """A dataclass with an optional key `pruning_<name>` for each parameter. `None` is the default of the method."""
    keys = []
    for name, owners in METHODS_WITH.items():
        (kind,) = {parameter.type for parameter in owners.values()}
        keys.append((f"pruning_{name}", (float | int if kind is float else kind) | None, field(default=None)))
    return make_dataclass("MethodKeys", keys, kw_only=True)


METHODS_WITH = methods_with()


@dataclass(frozen=True)
class PruningSettings:
    """What one forward call prunes: `ratio` in (0, 1) of the visual tokens, at the input of decoder layer `layer` or where the
    method says; `positions` "original" or "packed"; and what the method `looks_at`. Made once for a call, where it begins."""

    ratio: float
    layer: int
    parameters: object
    method: str = "vlm_pruner"
    positions: str = "original"
    looks_at: frozenset[str] = frozenset()

    def method_for(self, num_layers: int) -> PruningMethod:
        """The method, for a decoder of `num_layers`."""
        return METHODS[self.method](self.parameters, self.layer, num_layers)


# The config and the settings of the call whose images are encoded in this thread.
_ENCODING: ContextVar[tuple[object, PruningSettings | None]] = ContextVar("encoding", default=(None, None))


@dataclass(kw_only=True)
class PruningConfig(method_keys()):
    """The `pruning_*` keys, put in front of a transformers config class.

    Every key can be edited in `config.json`, passed to `from_pretrained`, or assigned on `model.config`; assigned values take
    effect on the next call and are checked there again.

    Args:
        pruning_method (`str`): a name of `METHODS` in `pruning_methods.py`, each documented in its class, or `"none"`, which
            leaves the stock model. The keys of a method's own parameters have its names with `pruning_` in front; they are
            `None` unless set, for the default of the method, and one that belongs to other methods alone must stay so.
        pruning_ratio (`float`): fraction of the visual tokens of each image that is removed, in [0, 1). 0 switches pruning off.
            Where a method prunes in several stages, it is the mean over the layers from its first stage on.
        pruning_layer (`int`): zero-based decoder layer at whose input tokens leave, from 1 (selection needs the keys of the
            layer before) to `num_hidden_layers - 1`, for a method that prunes at one layer inside the decoder. Others have
            layers of their own. In a hybrid decoder, of linear and full attention, the layer before must be one of full
            attention where the method looks at its keys; `None` is the first such layer, 4 in Qwen3.5.
        pruning_positions (`str`): `"original"`, kept tokens and what follows keep the positions of the full sequence; or
            `"packed"`, the layers that hold fewer tokens count these alone, as some authors do. Not for M-RoPE, whose positions
            are places on a grid.
        pruning_preset (`str`): where the keys of the method's parameters come from that are left at `None`. `"paper"` has
            exactly the paper's values. VLM-Pruner has another, `"fine"`, which judges candidates one by one
            (`pruning_token_batch` 1 in place of 16) and is the paper's otherwise: a token batch is a short cut for speed, and
            in the paper's ablation (LLaVA-1.5-7B, 64 tokens, average of six benchmarks) sizes 1, 2, 4, 8 and 16 reach 95.62,
            95.64, 95.38, 95.20 and 95.30. The same ablation has 95.66 and 95.68 for an aggregation weight of 0.5 and 0.6 (0.3:
            95.30), but no run changes both, so the preset leaves it. Of pivots, channels, threshold and layer, the paper's
            values are the best there.
        pruning_video_scope (`str`): `"slice"` prunes each temporal slice of a video as an image of its own; `"video"` gives all
            slices one budget and one selection, in which a step of one slice counts as far as a step of one token in the plane
            (as in the position ids of Qwen2-VL, where both advance by one). Models without video ignore it, and those refuse
            "video" that get the frames of a video as images.
    """

    _auto_class = "AutoConfig"
    base_model_type: ClassVar[str]
    auto_map_targets: ClassVar[dict[str, str]]
    frames_are_images: ClassVar[bool] = False  # whether the model gets videos as images, and can not tell them apart
    has_mrope: ClassVar[bool] = False  # whether positions have three axes
    is_hybrid: ClassVar[bool] = False  # whether layers of linear attention are among the decoder's

    pruning_method: str = "vlm_pruner"
    pruning_ratio: float | int = 0.889
    pruning_layer: int = 2
    pruning_preset: str = "paper"
    pruning_positions: str = "original"
    pruning_video_scope: str = "slice"

    def __post_init__(self, **kwargs):
        unknown = sorted(key for key in kwargs if key.startswith("pruning_"))
        if unknown:
            known = [field.name for field in fields(PruningConfig)]
            raise ValueError(f"Unknown config key {', '.join(unknown)}. The keys that start with `pruning_` are {known}.")
        super().__post_init__(**kwargs)
        if self.pruning_layer is None:
            self.pruning_layer = first_layer_above_keys(self.get_text_config(decoder=True))
        self.auto_map = dict(self.auto_map_targets)
        self.validate_pruning()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if found not in (cls.model_type, cls.base_model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {found!r}, but {cls.__name__} reads "
                f"{cls.base_model_type!r} (the base model) and {cls.model_type!r}."
            )
        return config_dict | {"model_type": cls.model_type}, kwargs

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """See `PreTrainedConfig.save_pretrained`, which copies the code of this class alone. Here the code of all classes that
        `auto_map` names comes along, so that `AutoModel.from_config` finds it."""
        super().save_pretrained(save_directory)
        modules = dict.fromkeys(reference.split(".")[0] for reference in self.auto_map_targets.values())
        files = {path.name: path for module in modules for path in self._code_of(module)}
        for name, path in files.items():
            copy = Path(save_directory) / name
            if not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
                shutil.copyfile(path, copy)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def _code_of(self, module: str) -> list[Path]:
        """The files of a module and of what it imports: from beside this file, or, where the library has loaded the code of the
        config alone, from the repo that it came from."""
        source = Path(__file__).parent
        if not (source / f"{module}.py").is_file():
            try:
                revision = getattr(self, "_commit_hash", None)
                cached = get_cached_module_file(self.name_or_path, f"{module}.py", revision=revision)
            except OSError as error:
                logger.warning(f"The saved config lacks {module}.py, which was not found in {self.name_or_path}: {error}")
                return []
            source = Path(HF_MODULES_CACHE, cached).parent
        return code_files({"": module}, source)

    def validate_pruning(self):
        """Check every `pruning_*` value. Also run by the library when the config is saved.

        Raises:
            ValueError: naming the key, its value and the legal range.
        """
        self.pruning_settings()

    def _check_values(self):
        """Raise a ValueError for a value outside its range, of the keys that belong to no method."""
        if self.pruning_method not in PRUNING_METHODS:
            raise ValueError(f"pruning_method must be one of {PRUNING_METHODS}, got {self.pruning_method!r}.")
        if self.pruning_positions not in POSITIONS:
            raise ValueError(f"pruning_positions must be one of {POSITIONS}, got {self.pruning_positions!r}.")
        if self.pruning_video_scope not in VIDEO_SCOPES:
            raise ValueError(f"pruning_video_scope must be one of {VIDEO_SCOPES}, got {self.pruning_video_scope!r}.")
        check_ratio(self.pruning_ratio)
        num_layers = self.get_text_config(decoder=True).num_hidden_layers
        if not is_count(self.pruning_layer) or not 1 <= self.pruning_layer < num_layers:
            raise ValueError(
                f"pruning_layer must be an integer from 1 to {num_layers - 1} (this model has {num_layers} decoder layers, "
                f"and layer 0 has no earlier keys), got {self.pruning_layer!r}."
            )

    def pruning_parameters(self):
        """The method's own parameters, without the `pruning_` in front: the keys that are set, else those of the preset.

        Raises:
            ValueError: for a value outside its range, an unknown preset, and a key that is set and belongs to other methods.
        """
        keys = {name: getattr(self, f"pruning_{name}") for name in METHODS_WITH}
        values = {name: value for name, value in keys.items() if value is not None}
        if self.pruning_method == "none":
            return None
        method = METHODS[self.pruning_method]
        for name in values:
            if self.pruning_method not in METHODS_WITH[name]:
                raise ValueError(
                    f"pruning_{name} is set to {values[name]!r}, but pruning_method is {self.pruning_method!r}, which has no "
                    f"such parameter: it belongs to {', '.join(METHODS_WITH[name])}. Set it to None."
                )
        if self.pruning_preset not in method.presets:
            raise ValueError(
                f"pruning_preset must be one of {tuple(method.presets)} with pruning_method {self.pruning_method!r}, got "
                f"{self.pruning_preset!r}."
            )
        try:
            defaults = method.defaults_for(self.base_model_type)
            return method.Parameters(**defaults | method.presets[self.pruning_preset] | values)
        except ValueError as error:
            raise ValueError(f"pruning_{error}") from None

    def to_dict(self) -> dict:
        """As in the stock class, without keys that are not set and belong to other methods."""
        content = super().to_dict()
        for name, owners in METHODS_WITH.items():
            if self.pruning_method not in owners and content.get(f"pruning_{name}") is None:
                content.pop(f"pruning_{name}", None)
        return content

    @contextmanager
    def encoding_for(self, settings: PruningSettings | None) -> Iterator[None]:
        """Let encoders, which stock code calls too, know what their call prunes: None for nothing."""
        token = None if torch.compiler.is_compiling() else _ENCODING.set((self, settings))
        try:
            yield
        finally:
            if token is not None:
                _ENCODING.reset(token)

    @property
    def looks_at_tower(self) -> bool:
        """Whether the vision tower is to note what it attends to: where its call prunes by a method that looks at it, and for
        features that are encoded by hand, whatever the call will be."""
        config, settings = _ENCODING.get()
        if config is self:
            return settings is not None and "tower" in settings.looks_at
        return self.pruning_method in METHODS and "tower" in self._method(self.pruning_parameters()).looks_at

    def refuse_question(self, settings: PruningSettings) -> None:
        """Raise a ValueError where the method does not look at the `pruning_question` that a call gives."""
        if "question" in settings.looks_at:
            return
        names = [repr(name) for name, method in METHODS.items() if "question" in method.looks_at]
        names += [
            f"{name!r} with pruning_{method.question_parameter} set"
            for name, method in METHODS.items()
            if method.question_parameter is not None
        ]
        raise ValueError(
            f"pruning_question is given, but pruning_method is {self.pruning_method!r}, which does not look at it here. Only "
            f"{', '.join(names)} does. Leave it out, or choose that."
        )

    def _method(self, parameters) -> PruningMethod:
        num_layers = self.get_text_config(decoder=True).num_hidden_layers
        return METHODS[self.pruning_method](parameters, self.pruning_layer, num_layers)

    def pruning_settings(self, pruning_ratio: float | None = None) -> PruningSettings | None:
        """What a call prunes with the values of this moment, or None when pruning is off.

        Args:
            pruning_ratio: replaces the config's ratio for this call, in [0, 1).

        Raises:
            ValueError: naming the key, its value and the legal range; for any key, whether the call prunes or not.
        """
        if pruning_ratio is not None:
            check_ratio(pruning_ratio)
        self._check_values()
        parameters = self.pruning_parameters()
        ratio = self.pruning_ratio if pruning_ratio is None else pruning_ratio
        if self.pruning_method == "none" or ratio == 0:
            return None
        method = self._method(parameters)
        check_method(method)
        self._refuse_what_can_not_be(method)
        name, positions, looks_at = self.pruning_method, self.pruning_positions, method.looks_at
        return PruningSettings(float(ratio), self.pruning_layer, parameters, name, positions, looks_at)

    def _refuse_what_can_not_be(self, method: PruningMethod):
        """Raise a ValueError where this decoder can not be pruned so."""
        text_config = self.get_text_config(decoder=True)
        if self.pruning_positions == "packed" and self.has_mrope:
            raise ValueError(
                f"pruning_positions='packed' counts tokens one by one, but positions of this {text_config.model_type} model "
                "have three axes (M-RoPE), whose steps on a grid can not be counted so. Set it to 'original'."
            )
        if self.pruning_video_scope == "video" and self.frames_are_images:
            raise ValueError(
                f"pruning_video_scope='video' gives the frames of a video one budget, but a {self.base_model_type} model gets "
                "them as images, and is not told which of them are of one video. Set it to 'slice'."
            )
        if method.counts_positions:
            self._refuse_positions_that_are_no_counts(method, text_config)
        layer_types = layer_types_of(text_config)
        self._refuse_layer_types(method.stage_layers()[0], layer_types, text_config)
        if self.is_hybrid:
            self._refuse_layers_of_a_hybrid(method, layer_types)

    def _refuse_layer_types(self, first: int, layer_types: list[str], text_config):
        """Raise a ValueError for windows from layer `first` on, and for layers that this model does not have."""
        known = ("full_attention", "linear_attention") if self.is_hybrid else ("full_attention",)
        for layer, layer_type in enumerate(layer_types):
            if layer_type in known or (layer < first and layer_type in WINDOWS):
                continue
            if layer_type in WINDOWS:
                window = getattr(text_config, WINDOWS[layer_type], None)
                raise ValueError(
                    f"Decoder layer {layer} of this {text_config.model_type} model uses {layer_type} (window {window}), but "
                    f"pruning with {self.pruning_method} at layer {first} needs full_attention in that layer and all "
                    "above: a window counts tokens that are no longer there. Set pruning_ratio to 0, or pruning_layer above "
                    "that layer."
                )
            raise ValueError(
                f"layer_types of the text config has {layer_type!r} for decoder layer {layer}, but in this "
                f"{text_config.model_type} model a layer can be one of {known}. Remove layer_types, which another model has "
                "left there, or set pruning_ratio to 0."
            )

    def _refuse_positions_that_are_no_counts(self, method: PruningMethod, text_config):
        """Raise a ValueError where positions do not count the full sequence's tokens, or their frequencies change with it."""
        rope = getattr(text_config, "rope_parameters", None) or {}
        if self.has_mrope:
            raise ValueError(
                f"pruning_method {self.pruning_method!r} puts merged tokens at the median of their positions, but those of "
                f"this {text_config.model_type} model have three axes (M-RoPE) and no median. Choose another pruning_method."
            )
        if self.pruning_positions != "original":
            raise ValueError(
                f"pruning_positions={self.pruning_positions!r} can not be with pruning_method {self.pruning_method!r}, which "
                "puts merged tokens at the median of their positions in the full sequence. Set it to 'original'."
            )
        if "distance" in method.corrections and rope.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(
                f"pruning_method {self.pruning_method!r} weighs distances by the frequencies of RoPE, but those of this "
                f"{text_config.model_type} model (rope_type {rope['rope_type']!r}) change with the length of the sequence. Set "
                "pruning_attention_correction to 'size' or 'none'."
            )

    def _refuse_layers_of_a_hybrid(self, method: PruningMethod, layer_types: list[str]):
        """Raise a ValueError where a method looks at what a layer of linear attention does not have."""
        layers = method.stage_layers()
        full = [layer for layer, layer_type in enumerate(layer_types) if layer_type == "full_attention"]

        def lacks(layer: int) -> str | None:
            if method.looks_at & {"keys", "attention"} and layer > 0 and layer - 1 not in full:
                return f"the keys of layer {layer - 1}"
            if "own_attention" in method.looks_at and layer not in full:
                return f"the attention of layer {layer}"
            return f"a layer with keys from layer {layer} on" if layer > max(full, default=-1) else None

        if lacking := next(filter(None, map(lacks, layers)), None):
            own = type(method).stage_layers is not PruningMethod.stage_layers
            where = f"layers {list(layers)}" if own else f"pruning_layer={layers[0]}"
            legal = [layer for layer in range(1, len(layer_types)) if lacks(layer) is None]
            decoder = self.get_text_config(decoder=True).model_type
            raise ValueError(
                f"pruning_method {self.pruning_method!r} prunes at {where} and needs {lacking}, but in this {decoder} model "
                f"layers of linear_attention have none. It could prune at {legal}. Choose another "
                f"{'pruning_method' if own else 'pruning_layer'}, or set pruning_ratio to 0."
            )


def layer_types_of(text_config) -> list[str]:
    """Of each decoder layer "full_attention", "linear_attention" (which has a recurrent state and no keys), or another.

    A cache goes by every key that says so, also by one that another model has left in the config. A model goes by the keys that
    its config class declares: one that declares a window, but no types of layers, has the window in each layer.
    """
    declared = type(text_config).__dataclass_fields__
    layer_types = getattr(text_config, "layer_types", None)
    windows = [layer_type for layer_type, key in WINDOWS.items() if getattr(text_config, key, None) is not None]
    has_one_window = "sliding_window" in declared and "layer_types" not in declared and "sliding_attention" in windows
    if layer_types is None or has_one_window:
        return [*windows, "full_attention"][:1] * text_config.num_hidden_layers
    return list(layer_types)


def first_layer_above_keys(text_config) -> int:
    """The first decoder layer, from 1 on, whose layer below has keys. 1 where there is none, which pruning then refuses."""
    layer_types = layer_types_of(text_config)
    return next((layer for layer in range(1, len(layer_types)) if layer_types[layer - 1] != "linear_attention"), 1)


def is_count(value) -> bool:
    """Whether `value` is an integer; a bool is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_ratio(ratio) -> None:
    """Raise a ValueError unless `ratio`, the fraction of visual tokens to remove, is a number in [0, 1)."""
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not is_number or not math.isfinite(ratio) or not 0 <= ratio < 1:
        raise ValueError(f"pruning_ratio must be a number in [0, 1), the fraction of visual tokens to remove, got {ratio!r}.")


def code_files(auto_map: dict[str, str], folder: Path) -> list[Path]:
    """The Python files in `folder` that the classes of `auto_map` need: their modules, and what those import."""
    modules = {folder / f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    imported = {Path(path) for module in modules for path in get_relative_import_files(module)}
    return sorted(modules | imported)


def auto_map(family: str, modeling_file: str) -> dict[str, str]:
    """The Hub's `auto_map` for the classes `VLMPruner<family>...`. Every generating auto class gets the generating model."""
    model = f"{modeling_file}.VLMPruner{family}ForConditionalGeneration"
    return {
        "AutoConfig": f"configuration_vlmpruner.VLMPruner{family}Config",
        "AutoModel": model,
        "AutoModelForImageTextToText": model,
        "AutoModelForMultimodalLM": model,
        "AutoProcessor": f"processing.VLMPruner{family}Processor",
    }


@strict
class VLMPrunerLlavaConfig(PruningConfig, LlavaConfig):
    """LLaVA-1.5 with pruning. See `PruningConfig` for the keys that this adds to `LlavaConfig`."""

    model_type = "vlmpruner_llava"
    base_model_type = "llava"
    auto_map_targets = auto_map("Llava", "modeling_vlmpruner_llava")


@strict
class VLMPrunerLlavaNextConfig(PruningConfig, LlavaNextConfig):
    """LLaVA-NeXT with pruning. See `PruningConfig` for the keys that this adds to `LlavaNextConfig`."""

    model_type = "vlmpruner_llava_next"
    base_model_type = "llava_next"
    auto_map_targets = auto_map("LlavaNext", "modeling_vlmpruner_llava")


@dataclass(frozen=True)
class VideoLayout:
    """Where the tokens of a video of LLaVA's kind lie among its features.

    Each frame is a grid of `height` x `width` tokens, `frame_stride` features after the one before it, and each row of it is
    `row_stride` after the one above. What lies between and after them are newlines. `pool_stride` is the side in patches of
    what a token covers, or None where tokens cover the whole frame evenly.
    """

    height: int
    width: int
    row_stride: int
    frame_stride: int
    num_at_end: int
    pool_stride: int | None

    @classmethod
    def of(cls, side: int, mode: str, stride: int, newline_position: str) -> "VideoLayout":
        """Of frames of `side` x `side` patches. The others are the config's `spatial_pool_mode`, `spatial_pool_stride` and
        `newline_position`.

        Raises:
            ValueError: naming the key, its value and the legal range.
        """
        if mode not in POOL_MODES:
            raise ValueError(f"spatial_pool_mode must be one of {POOL_MODES}, got {mode!r}.")
        if newline_position not in NEWLINE_POSITIONS:
            raise ValueError(f"newline_position must be one of {NEWLINE_POSITIONS}, got {newline_position!r}.")
        if not is_count(stride) or stride < 1 or (mode != "bilinear" and stride > side):
            raise ValueError(f"spatial_pool_stride must be an integer from 1 to {side}, the patches of a side, got {stride!r}.")
        pooled = math.ceil(side / stride) if mode == "bilinear" else side // stride
        row_stride = pooled + (newline_position == "grid")
        return cls(
            height=pooled,
            width=pooled,
            row_stride=row_stride,
            frame_stride=pooled * row_stride + (newline_position == "frame"),
            num_at_end=int(newline_position == "one_token"),
            pool_stride=None if mode == "bilinear" else stride,
        )

    def num_features(self, frames: int) -> int:
        """Of a video of `frames`, newlines included."""
        return frames * self.frame_stride + self.num_at_end


@strict
class VLMPrunerLlavaOnevisionConfig(PruningConfig, LlavaOnevisionConfig):
    """LLaVA-OneVision and LLaVA-Video with pruning. See `PruningConfig` for the keys that this adds to `LlavaOnevisionConfig`,
    but for three that say how the features of a video lie. Their defaults are what the stock class does.

    Args:
        spatial_pool_mode (`str`): how the patches of a frame are pooled: `"average"` or `"max"` over squares of
            `spatial_pool_stride` patches, of which a rest at the right and bottom is left out, or `"bilinear"`, to the side
            divided by the stride and rounded up. `mm_spatial_pool_mode` of LLaVA's own configs.
        spatial_pool_stride (`int`): from 1 to the number of patches of a side. `mm_spatial_pool_stride` there.
        newline_position (`str`): where the newlines of a video stand: `"one_token"` at its end, `"frame"` at the end of each
            frame, `"grid"` at the end of each row of each frame, or `"no_token"`. `mm_newline_position` there.
    """

    model_type = "vlmpruner_llava_onevision"
    base_model_type = "llava_onevision"
    auto_map_targets = auto_map("LlavaOnevision", "modeling_vlmpruner_llava")

    spatial_pool_mode: str = "bilinear"
    spatial_pool_stride: int = 2
    newline_position: str = "one_token"
    processor_keys: ClassVar[tuple[str, ...]] = ("spatial_pool_mode", "spatial_pool_stride", "newline_position")

    @property
    def video_layout(self) -> VideoLayout:
        side = self.vision_config.image_size // self.vision_config.patch_size
        return VideoLayout.of(side, self.spatial_pool_mode, self.spatial_pool_stride, self.newline_position)

    @property
    def has_stock_video_layout(self) -> bool:
        """Whether a video's features lie as in the stock class, which knows no other way."""
        return (self.spatial_pool_mode, self.spatial_pool_stride, self.newline_position) == ("bilinear", 2, "one_token")

    def _check_values(self):
        super()._check_values()
        if not self.has_stock_video_layout:
            _ = self.video_layout
        if self.newline_position == "no_token" and Version(transformers.__version__) < Version("5.18"):
            raise ValueError(
                "newline_position='no_token' needs transformers>=5.18: an older one's stock model ends videos with a newline."
            )


@strict
class VLMPrunerQwen2VLConfig(PruningConfig, Qwen2VLConfig):
    """Qwen2-VL with pruning. See `PruningConfig` for the keys that this adds to `Qwen2VLConfig`."""

    model_type = "vlmpruner_qwen2_vl"
    base_model_type = "qwen2_vl"
    auto_map_targets = auto_map("Qwen2VL", "modeling_vlmpruner_qwen2vl")
    has_mrope = True


@strict
class VLMPrunerQwen2_5_VLConfig(PruningConfig, Qwen2_5_VLConfig):
    """Qwen2.5-VL with pruning. See `PruningConfig` for the keys that this adds to `Qwen2_5_VLConfig`."""

    model_type = "vlmpruner_qwen2_5_vl"
    base_model_type = "qwen2_5_vl"
    auto_map_targets = auto_map("Qwen2_5_VL", "modeling_vlmpruner_qwen2vl")
    has_mrope = True


@strict
class VLMPrunerQwen3VLConfig(PruningConfig, Qwen3VLConfig):
    """Qwen3-VL with pruning. See `PruningConfig` for the keys that this adds to `Qwen3VLConfig`."""

    model_type = "vlmpruner_qwen3_vl"
    base_model_type = "qwen3_vl"
    auto_map_targets = auto_map("Qwen3VL", "modeling_vlmpruner_qwen3vl")
    has_mrope = True


@strict
class VLMPrunerQwen3VLMoeConfig(PruningConfig, Qwen3VLMoeConfig):
    """Qwen3-VL with experts, with pruning. See `PruningConfig` for the keys that this adds to `Qwen3VLMoeConfig`."""

    model_type = "vlmpruner_qwen3_vl_moe"
    base_model_type = "qwen3_vl_moe"
    auto_map_targets = auto_map("Qwen3VLMoe", "modeling_vlmpruner_qwen3vl")
    has_mrope = True


@strict
class VLMPrunerGlm4vConfig(PruningConfig, Glm4vConfig):
    """GLM-4.1V and GLM-4.6V-Flash with pruning. See `PruningConfig` for the keys that this adds to `Glm4vConfig`."""

    model_type = "vlmpruner_glm4v"
    base_model_type = "glm4v"
    auto_map_targets = auto_map("Glm4v", "modeling_vlmpruner_glm4v")
    has_mrope = True


@strict
class VLMPrunerGlm4vMoeConfig(PruningConfig, Glm4vMoeConfig):
    """GLM-4.5V and GLM-4.6V with pruning. See `PruningConfig` for the keys that this adds to `Glm4vMoeConfig`."""

    model_type = "vlmpruner_glm4v_moe"
    base_model_type = "glm4v_moe"
    auto_map_targets = auto_map("Glm4vMoe", "modeling_vlmpruner_glm4v")
    has_mrope = True


@strict
class VLMPrunerGlm46VConfig(PruningConfig, Glm46VConfig):
    """A `glm46v` model with pruning. See `PruningConfig` for the keys that this adds to `Glm46VConfig`."""

    model_type = "vlmpruner_glm46v"
    base_model_type = "glm46v"
    auto_map_targets = auto_map("Glm46V", "modeling_vlmpruner_glm4v")
    has_mrope = True


@strict
class VLMPrunerQwen3_5Config(PruningConfig, Qwen3_5Config):
    """Qwen3.5 with pruning. See `PruningConfig` for the keys that this adds to `Qwen3_5Config`."""

    pruning_layer: int | None = None
    model_type = "vlmpruner_qwen3_5"
    base_model_type = "qwen3_5"
    auto_map_targets = auto_map("Qwen3_5", "modeling_vlmpruner_qwen3_5")
    has_mrope = True
    is_hybrid = True


@strict
class VLMPrunerQwen3_5MoeConfig(PruningConfig, Qwen3_5MoeConfig):
    """Qwen3.5 with experts, with pruning. See `PruningConfig` for the keys that this adds to `Qwen3_5MoeConfig`."""

    pruning_layer: int | None = None
    model_type = "vlmpruner_qwen3_5_moe"
    base_model_type = "qwen3_5_moe"
    auto_map_targets = auto_map("Qwen3_5Moe", "modeling_vlmpruner_qwen3_5")
    has_mrope = True
    is_hybrid = True


@strict
class VLMPrunerInternVLConfig(PruningConfig, InternVLConfig):
    """InternVL3 and InternVL3.5 with pruning. See `PruningConfig` for the keys that this adds to `InternVLConfig`."""

    model_type = "vlmpruner_internvl"
    base_model_type = "internvl"
    auto_map_targets = auto_map("InternVL", "modeling_vlmpruner_internvl")
    frames_are_images = True


@strict
class VLMPrunerMistral3Config(PruningConfig, Mistral3Config):
    """Mistral Small 3.1 and 3.2 with pruning. See `PruningConfig` for the keys that this adds to `Mistral3Config`."""

    model_type = "vlmpruner_mistral3"
    base_model_type = "mistral3"
    auto_map_targets = auto_map("Mistral3", "modeling_vlmpruner_mistral3")


@strict
class VLMPrunerSmolVLMConfig(PruningConfig, SmolVLMConfig):
    """SmolVLM with pruning. See `PruningConfig` for the keys that this adds to `SmolVLMConfig`."""

    model_type = "vlmpruner_smolvlm"
    base_model_type = "smolvlm"
    auto_map_targets = auto_map("SmolVLM", "modeling_vlmpruner_idefics3")
    frames_are_images = True


@strict
class VLMPrunerIdefics3Config(PruningConfig, Idefics3Config):
    """Idefics3 with pruning. See `PruningConfig` for the keys that this adds to `Idefics3Config`."""

    model_type = "vlmpruner_idefics3"
    base_model_type = "idefics3"
    auto_map_targets = auto_map("Idefics3", "modeling_vlmpruner_idefics3")


@strict
class VLMPrunerLlavaNextVideoConfig(PruningConfig, LlavaNextVideoConfig):
    """LLaVA-NeXT-Video with pruning. See `PruningConfig` for the keys that this adds to `LlavaNextVideoConfig`."""

    model_type = "vlmpruner_llava_next_video"
    base_model_type = "llava_next_video"
    auto_map_targets = auto_map("LlavaNextVideo", "modeling_vlmpruner_llava_next_video")


# Base model type -> config class, of every class above: what a family is to `export.py`, the servers and the tests.
CONFIG_OF_BASE_MODEL = {config.base_model_type: config for config in PruningConfig.__subclasses__()}

for config in CONFIG_OF_BASE_MODEL.values():
    register_model_type(config)

__all__ = [config.__name__ for config in CONFIG_OF_BASE_MODEL.values()]
