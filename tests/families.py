"""The model families that the shared test matrix runs over. A new family joins by one entry in `FAMILIES`."""

import atexit
import importlib
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, DynamicCache

from vlmpruner.pruned_cache import CACHE_NAME
from vlmpruner.token_pruning import num_tokens_to_keep, select_tokens


DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Family:
    """One family: `checkpoint` in tests/data/checkpoints, the stock class, ours as `module.Name`, and its processor.

    `tile` is the side in pixels of the vision tower that the matrix runs with, where the checkpoint's own makes thousands of
    tokens of an image. `layer` is the pruning layer; `is_hybrid` says that some layers have a recurrent state, not keys.
    `tolerance` is what float32 may leave between logits that are equal by right, more where layers are more.
    """

    name: str
    stock: str
    pruned: str
    processor: str
    tile: int | None = None
    layer: int = 2
    is_hybrid: bool = False
    tolerance: float = 1e-4

    @property
    def checkpoint(self) -> Path:
        return DATA / "checkpoints" / self.name

    @property
    def stock_class(self):
        return getattr(transformers, self.stock)

    @property
    def pruned_class(self):
        return _import(self.pruned)

    @property
    def processor_class(self):
        return _import(self.processor)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llava",
            stock="LlavaForConditionalGeneration",
            pruned="modeling_vlmpruner_llava.VLMPrunerLlavaForConditionalGeneration",
            processor="processing.VLMPrunerLlavaProcessor",
        ),
        Family(
            name="llava_next",
            stock="LlavaNextForConditionalGeneration",
            pruned="modeling_vlmpruner_llava.VLMPrunerLlavaNextForConditionalGeneration",
            processor="processing.VLMPrunerLlavaNextProcessor",
            tile=84,
        ),
        Family(
            name="llava_onevision",
            stock="LlavaOnevisionForConditionalGeneration",
            pruned="modeling_vlmpruner_llava.VLMPrunerLlavaOnevisionForConditionalGeneration",
            processor="processing.VLMPrunerLlavaOnevisionProcessor",
            tile=100,
        ),
        Family(
            name="qwen2_vl",
            stock="Qwen2VLForConditionalGeneration",
            pruned="modeling_vlmpruner_qwen2vl.VLMPrunerQwen2VLForConditionalGeneration",
            processor="processing.VLMPrunerQwen2VLProcessor",
        ),
        Family(
            name="qwen2_5_vl",
            stock="Qwen2_5_VLForConditionalGeneration",
            pruned="modeling_vlmpruner_qwen2vl.VLMPrunerQwen2_5_VLForConditionalGeneration",
            processor="processing.VLMPrunerQwen2_5_VLProcessor",
        ),
        Family(
            name="qwen3_vl",
            stock="Qwen3VLForConditionalGeneration",
            pruned="modeling_vlmpruner_qwen3vl.VLMPrunerQwen3VLForConditionalGeneration",
            processor="processing.VLMPrunerQwen3VLProcessor",
        ),
        Family(
            name="qwen3_5",
            stock="Qwen3_5ForConditionalGeneration",
            pruned="modeling_vlmpruner_qwen3_5.VLMPrunerQwen3_5ForConditionalGeneration",
            processor="processing.VLMPrunerQwen3_5Processor",
            layer=4,
            is_hybrid=True,
            tolerance=1e-3,
        ),
        Family(
            name="qwen3_5_moe",
            stock="Qwen3_5MoeForConditionalGeneration",
            pruned="modeling_vlmpruner_qwen3_5.VLMPrunerQwen3_5MoeForConditionalGeneration",
            processor="processing.VLMPrunerQwen3_5MoeProcessor",
            layer=4,
            is_hybrid=True,
            tolerance=1e-3,
        ),
    )
}


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
    config.image_grid_pinpoints = [[round(side * scale) for side in sides] for sides in config.image_grid_pinpoints]
    small = family.stock_class(config)
    weights = model.state_dict()
    small.load_state_dict({name: weights[name][: len(weight)] for name, weight in small.state_dict().items()})
    processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
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


def spread_weights(model):
    """Make a tiny random model opinionated: with weights as initialised all hidden states are nearly the same, every answer is
    one token again and again, and no mistake in positions or masks would show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim != 2 or not ("language_model" in name or "lm_head" in name or "projector" in name):
                continue
            scale = 1.0 if "embed_tokens" in name else 1.2 / parameter.shape[1] ** 0.5
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
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True, padding_side=padding_side)


def clip(seed: int, num_frames: int, width: int = 160, height: int = 120) -> np.ndarray:
    """A video array in which one picture fades into another. [num_frames, height, width, 3] uint8"""
    first, last = (np.asarray(picture(seed + offset, width, height), dtype=np.float64) for offset in (0, 1))
    return np.stack([first + (last - first) * weight for weight in np.linspace(0, 1, num_frames)]).astype(np.uint8)


def states_before_pruning(family, inputs):
    """The input of the pruning layer, [length, hidden], and the keys of the layer below, [heads, length, dim], of a request of
    one row."""
    model, captured = load_stock(family), {}
    cache, layer = DynamicCache(config=model.config), model.model.language_model.layers[family.layer]
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
