"""The model families that the shared test matrix runs over. A new family joins by one entry in `FAMILIES`."""

import atexit
import importlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, DynamicCache

from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL
from vlmpruner.pruned_cache import CACHE_NAME
from vlmpruner.pruned_model import stock_class
from vlmpruner.token_pruning import num_tokens_to_keep, select_tokens


DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, eq=False)
class Family:
    """One family, by its base model type: the name of its checkpoint in tests/data/checkpoints too. Its classes follow from its
    config class.

    Attributes:
        grids: (width, height) of two pictures -> the grids (height, width) that the model makes of each.
        options: what its image processor can be told in a call that changes the picture.
        nested: whether its processor wants the images of each row in a list of their own.
        like: the family whose code it shares, all but what its config decides. `test_families.py` says what that means.
        tile: side in pixels of the vision tower that the matrix runs with, where the checkpoint's own makes hundreds of tokens
            of an image, or thousands.
        layer: the pruning layer.
        is_hybrid: whether some layers have a recurrent state, not keys.
        tolerance: what float32 may leave between logits that are equal by right, more where layers are more.
    """

    name: str
    grids: dict[tuple[int, int], list[tuple[int, int]]]
    options: list[dict]
    like: str | None = None
    nested: bool = False
    tile: int | None = None
    layer: int = 2
    is_hybrid: bool = False
    tolerance: float = 1e-4

    @property
    def checkpoint(self) -> Path:
        return DATA / "checkpoints" / self.name

    @property
    def config_class(self):
        return CONFIG_OF_BASE_MODEL[self.name]

    @property
    def pruned_class(self):
        return _import(self.config_class.auto_map_targets["AutoModelForImageTextToText"])

    @property
    def processor_class(self):
        return _import(self.config_class.auto_map_targets["AutoProcessor"])

    @property
    def stock_class(self):
        return stock_class(self.pruned_class)

    @property
    def model_class(self):
        """The model without its head."""
        module = importlib.import_module(self.pruned_class.__module__)
        return getattr(module, self.pruned_class.__name__.replace("ForConditionalGeneration", "Model"))

    @property
    def has_videos(self) -> bool:
        return "video" in self.model_class.encoder_inputs

    @property
    def kind(self) -> tuple[bool, ...]:
        """Of its decoder: whether positions have three axes, features come in above layer 0, some layers are recurrent."""
        config = (self.checkpoint / "config.json").read_text()
        return tuple(word in config for word in ("mrope_section", "deepstack_visual_indexes", "linear_attention"))


QWEN_GRIDS = {(640, 480): [(13, 18)], (300, 500): [(18, 11)]}
QWEN_OPTIONS = [{"size": {"shortest_edge": 56 * 56, "longest_edge": 110 * 110}}, {"do_resize": False}]
QWEN3_GRIDS = {(640, 480): [(13, 18)], (300, 500): [(16, 9)]}
QWEN3_OPTIONS = [{"size": {"shortest_edge": 64 * 64, "longest_edge": 110 * 110}}, {"do_resize": False}]
GLM_GRIDS = {(640, 480): [(11, 15)], (300, 500): [(17, 10)]}
GLM_OPTIONS = [{"size": {"shortest_edge": 56 * 56, "longest_edge": 2 * 110 * 110}}, {"do_resize": False}]

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llava",
            grids={(640, 480): [(24, 24)], (300, 500): [(24, 24)]},
            options=[{"do_center_crop": False, "size": {"height": 84, "width": 84}}],
            tile=84,
        ),
        Family(
            name="llava_next",
            grids={(640, 480): [(24, 24), (36, 48)], (300, 500): [(24, 24), (40, 24)]},
            options=[{"size": {"shortest_edge": 84}, "do_center_crop": False, "do_resize": True, "resample": 0}],
            tile=84,
        ),
        Family(
            name="llava_onevision",
            grids={(640, 480): [(27, 27), (40, 54)], (300, 500): [(27, 27), (46, 27)]},
            options=[{"resample": 0}],
            tile=100,
        ),
        Family(name="qwen2_vl", grids=QWEN_GRIDS, options=QWEN_OPTIONS),
        Family(name="qwen2_5_vl", grids=QWEN_GRIDS, options=QWEN_OPTIONS, like="qwen2_vl"),
        Family(name="qwen3_vl", grids=QWEN3_GRIDS, options=QWEN3_OPTIONS),
        Family(name="qwen3_vl_moe", grids=QWEN3_GRIDS, options=QWEN3_OPTIONS, like="qwen3_vl"),
        Family(name="glm4v", grids=GLM_GRIDS, options=GLM_OPTIONS),
        Family(name="glm4v_moe", grids=GLM_GRIDS, options=GLM_OPTIONS, like="glm4v"),
        Family(name="glm46v", grids=GLM_GRIDS, options=GLM_OPTIONS, like="glm4v"),
        Family(name="qwen3_5", grids=QWEN3_GRIDS, options=QWEN3_OPTIONS, layer=4, is_hybrid=True, tolerance=1e-3),
        Family(
            name="qwen3_5_moe",
            grids=QWEN3_GRIDS,
            options=QWEN3_OPTIONS,
            like="qwen3_5",
            layer=4,
            is_hybrid=True,
            tolerance=2e-3,
        ),
        Family(
            name="internvl",
            grids={(640, 480): [(4, 4)] * 7, (300, 500): [(4, 4)] * 7},
            options=[{"max_patches": 3}],
        ),
        Family(
            name="mistral3",
            grids={(640, 480): [(18, 23)], (300, 500): [(18, 11)]},
            options=[{"size": {"longest_edge": 112}}],
        ),
        Family(
            name="smolvlm",
            grids={(640, 480): [(4, 4)] * 5, (300, 500): [(4, 4)] * 5},
            options=[{"do_image_splitting": False}, {"size": {"longest_edge": 192}}],
            nested=True,
        ),
        Family(
            name="idefics3",
            grids={(640, 480): [(4, 4)] * 5, (300, 500): [(4, 4)] * 5},
            options=[{"do_image_splitting": False}],
            nested=True,
            like="smolvlm",
        ),
        Family(
            name="llava_next_video",
            grids={(640, 480): [(6, 6), (10, 12)], (300, 500): [(6, 6), (12, 8)]},
            options=[{"size": {"shortest_edge": 84}, "do_center_crop": False, "do_resize": True, "resample": 0}],
            like="llava_next",
        ),
    )
}


def one_of_each_kind(number: int, families: Iterable[Family]) -> list[Family]:
    """One family of each kind of decoder. From number to number, each family of a kind has its turn."""
    kinds = {}
    for family in families:
        kinds.setdefault(family.kind, []).append(family)
    return [members[number % len(members)] for members in kinds.values()]


def _import(path: str):
    module, name = path.split(".")
    return getattr(importlib.import_module(f"vlmpruner.{module}"), name)


@lru_cache
def small_checkpoint(family: Family) -> Path:
    """The family's checkpoint, with a vision tower for pictures of `family.tile` pixels where it has one."""
    if family.tile is None:
        return family.checkpoint
    model, processor = family.stock_class.from_pretrained(family.checkpoint), AutoProcessor.from_pretrained(family.checkpoint)
    config, scale = model.config, family.tile / model.config.vision_config.image_size
    config.vision_config.image_size = family.tile
    if hasattr(config, "image_grid_pinpoints"):
        pinpoints = [[round(side * scale) for side in sides] for sides in config.image_grid_pinpoints]
        config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = pinpoints
    small = family.stock_class(config)
    weights = model.state_dict()
    small.load_state_dict({name: weights[name][: len(weight)] for name, weight in small.state_dict().items()})
    processor.num_image_tokens = (family.tile // config.vision_config.patch_size) ** 2
    for part in (processor.image_processor, getattr(processor, "video_processor", None)):
        for name in ("size", "crop_size"):
            if getattr(part, name, None):
                setattr(part, name, dict.fromkeys(dict(getattr(part, name)), family.tile))
    folder = Path(tempfile.mkdtemp(prefix=f"{family.name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    small.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


SPREAD = ("language_model", "text_model", "lm_head", "projector", "connector")


def spread_weights(model):
    """Make a tiny random model opinionated: with weights as initialised all hidden states are nearly the same, every answer is
    one token again and again, and no mistake in positions or masks would show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 or "experts" in name
            if not is_matrix or not any(part in name for part in SPREAD):
                continue
            scale = 1.0 if "embed_tokens" in name else 1.2 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@lru_cache
def load_pruned(family: Family, attn: str = "sdpa", **config):
    kwargs = {"pruning_ratio": 0.889, "dtype": torch.float32, "attn_implementation": attn} | config
    return spread_weights(family.pruned_class.from_pretrained(small_checkpoint(family), **kwargs).eval())


@lru_cache
def load_stock(family: Family, attn: str = "sdpa"):
    model = family.stock_class.from_pretrained(small_checkpoint(family), dtype=torch.float32, attn_implementation=attn)
    return spread_weights(model.eval())


@lru_cache
def load_processor(family: Family):
    processor = AutoProcessor.from_pretrained(small_checkpoint(family))
    processor.tokenizer.padding_side = "left"
    return processor


def picture(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A smooth random picture with a few noisy squares, so that some patches are redundant and some are not."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(coarse)
    for _ in range(4):
        y, x = rng.integers(0, height - 60), rng.integers(0, width - 60)
        pixels[y : y + 60, x : x + 60] = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(processor, num_images: int, text: str = "What is in the picture?", num_videos: int = 0) -> str:
    content = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos + [{"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def make_inputs(family: Family, rows: list[tuple[list, str]], padding_side: str = "left"):
    """Model inputs for rows of (images, text)."""
    processor = load_processor(family)
    texts = [prompt(processor, len(images), text) for images, text in rows]
    images = [image for row, _ in rows for image in row]
    if family.nested and images:
        images = [row for row, _ in rows]
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True, padding_side=padding_side)


def clip(seed: int, num_frames: int, width: int = 160, height: int = 120) -> np.ndarray:
    """A video array in which one picture fades into another. [num_frames, height, width, 3] uint8"""
    first, last = (np.asarray(picture(seed + offset, width, height), dtype=np.float64) for offset in (0, 1))
    return np.stack([first + (last - first) * weight for weight in np.linspace(0, 1, num_frames)]).astype(np.uint8)


def states_before_pruning(family, inputs):
    """The input of the pruning layer, [length, hidden], and the keys of the layer below, [heads, length, dim], of a request of
    one row."""
    model, captured = load_stock(family), {}
    cache, layer = DynamicCache(config=model.config), model.get_decoder().layers[family.layer]
    hook = layer.register_forward_pre_hook(lambda module, args: captured.update(states=args[0]))
    with torch.no_grad():
        model(**inputs, **{CACHE_NAME: cache})
    hook.remove()
    return captured["states"][0], cache.layers[family.layer - 1].keys[0]


def assert_selected_alone(family, inputs, record):
    """Each grid of a record was selected as from its own hidden states and keys alone."""
    states, keys = states_before_pruning(family, inputs)
    for entry in record:
        num_keep = num_tokens_to_keep(entry.num_visual, 0.889)
        alone = select_tokens(states[entry.positions], keys[:, entry.positions], entry.grid, num_keep)
        assert torch.equal(alone.order, entry.order)
