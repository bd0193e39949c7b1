"""Real models' sizes: models of those sizes with random weights, inputs for them, and what theory says they cost.

The sizes are those of the public `config.json` of each model, but for `0.5b`: the language model of Qwen2-0.5B, with M-RoPE,
behind a tower of Qwen2-VL's kind that was made small enough for a CPU.

The unpruned model is the stock class of transformers and the pruned one is ours, on the same weights. Weights are made on the
device in the dtype, as the library initialises them.
"""

import argparse
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod

import torch
from measurement import copy_bandwidth, heading
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL
from vlmpruner.token_pruning import num_tokens_to_keep


CLIP_LARGE_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAVA = {"vision_config": CLIP_LARGE_336, "image_token_index": 32000, "vision_feature_select_strategy": "default"}
TILINGS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
QWEN2_7B = {
    "model_type": "qwen2_vl_text",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN2_05B = QWEN2_7B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
QWEN2_TOWER = {"model_type": "qwen2_vl_vision", "depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584}
SMALL_TOWER = QWEN2_TOWER | {"depth": 4, "embed_dim": 320, "num_heads": 4, "hidden_size": 896}
QWEN3_4B = {
    "model_type": "qwen3_vl_text",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
}
QWEN3_4B_TOWER = {
    "model_type": "qwen3_vl_vision",
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "out_hidden_size": 2560,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}


@dataclass(frozen=True)
class Geometry:
    """A model's sizes and a picture for it.

    Attributes:
        base: the stock model type.
        config: what of its `config.json` decides its size.
        picture: (height, width) in pixels.
        grids: (height, width) in tokens of each grid that the picture makes.
        num_newlines: tokens of the picture that lie on no grid and are always kept.
    """

    base: str
    config: dict
    picture: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    num_newlines: int = 0

    @property
    def num_features(self) -> int:
        """Tokens of one picture."""
        return sum(map(prod, self.grids)) + self.num_newlines

    def num_kept(self, ratio: float) -> int:
        """Tokens of one picture after removing `ratio` of each grid."""
        return sum(num_tokens_to_keep(prod(grid), ratio) for grid in self.grids) + self.num_newlines


GEOMETRIES = {
    "llava-1.5-7b": Geometry("llava", LLAVA | {"text_config": VICUNA_7B}, (336, 336), ((24, 24),)),
    "llava-1.5-13b": Geometry("llava", LLAVA | {"text_config": VICUNA_13B}, (336, 336), ((24, 24),)),
    # 672 x 672 fills a grid of 2 x 2 tiles: 2,880 tokens on grids and a newline for each of the 48 rows.
    "llava-next-7b": Geometry(
        "llava_next", LLAVA | {"text_config": VICUNA_7B, "image_grid_pinpoints": TILINGS}, (672, 672), ((24, 24), (48, 48)), 48
    ),
    "qwen2-vl-7b": Geometry("qwen2_vl", {"text_config": QWEN2_7B, "vision_config": QWEN2_TOWER}, (840, 1316), ((30, 47),)),
    "qwen3-vl-4b": Geometry(
        "qwen3_vl",
        {"text_config": QWEN3_4B, "vision_config": QWEN3_4B_TOWER, "tie_word_embeddings": True},
        (960, 1152),
        ((30, 36),),
    ),
    "0.5b": Geometry("qwen2_vl", {"text_config": QWEN2_05B, "vision_config": SMALL_TOWER}, (980, 1120), ((35, 40),)),
}


@dataclass(frozen=True)
class Request:
    """What is run: `batch` rows, each of `images` pictures and `text` tokens, with `ratio` of the visual tokens removed at
    decoder layer `layer` in the pruned model."""

    geometry: Geometry
    batch: int = 1
    text: int = 60
    images: int = 1
    ratio: float = 0.889
    layer: int = 2

    def tokens(self, ratio: float = 0) -> int:
        """Tokens of a row, in the layers that hold the fewest."""
        return self.text + self.images * self.geometry.num_kept(ratio)

    def describe(self) -> str:
        height, width = self.geometry.picture
        pictures = f"{self.images} of {height} x {width} pixels"
        return f"batch {self.batch}; in each row {self.text} tokens of text, and pictures: {pictures}"


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a language model that its cost depends on, of a config of transformers."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    vocabulary: int

    @classmethod
    def of(cls, geometry: Geometry) -> "DecoderSizes":
        return cls.of_text_config(geometry.config["text_config"])

    @classmethod
    def of_text_config(cls, text: dict) -> "DecoderSizes":
        """Of the language model's part of a `config.json`."""
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        return cls(
            text["hidden_size"],
            text["intermediate_size"],
            text["num_hidden_layers"],
            text["num_attention_heads"] * head_dim,
            text["num_key_value_heads"] * head_dim,
            text["vocab_size"],
        )

    def flops(self, tokens: Sequence[float]) -> float:
        """Of a prefill of one row of which each layer sees so many `tokens`, in the layers alone: two for a multiplication."""
        return 2 * sum(map(self.layer_multiplications, tokens))

    def kv_bytes(self, tokens: Sequence[float], itemsize: int) -> float:
        """Of the cache that it leaves."""
        return 2 * self.key_value * itemsize * sum(tokens)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: queries and output, keys and values, gated MLP. 4 d^2 + 3 d m without groups."""
        return self.hidden * (2 * self.query + 2 * self.key_value + 3 * self.intermediate)

    def layer_multiplications(self, tokens: int) -> int:
        """Of one layer over `tokens` of one row: each weight once a token, and attention, 2 n^2 d."""
        return tokens * self.layer_weights + 2 * tokens**2 * self.query


@dataclass(frozen=True)
class Theory:
    """What a request costs at least. `ideal` counts the multiplications of the decoder's layers and nothing else."""

    tokens: int
    pruned_tokens: int
    tera_flop: float
    pruned_tera_flop: float
    ideal: float
    weight_bytes: int
    kv_bytes: int
    pruned_kv_bytes: int
    bandwidth: float

    @property
    def prefill_floor_s(self) -> float:
        """Seconds to read the weights."""
        return self.weight_bytes / self.bandwidth

    @property
    def decode_floor_s(self) -> float:
        """Seconds to read the weights and the whole cache."""
        return (self.weight_bytes + self.kv_bytes) / self.bandwidth

    @property
    def pruned_decode_floor_s(self) -> float:
        return (self.weight_bytes + self.pruned_kv_bytes) / self.bandwidth

    @classmethod
    def of(cls, request: Request, dtype: torch.dtype, bandwidth: float) -> "Theory":
        """Args: bandwidth: bytes that the device moves in a second."""
        sizes, layer = DecoderSizes.of(request.geometry), request.layer
        tokens, pruned_tokens = request.tokens(), request.tokens(request.ratio)
        full, pruned = sizes.layer_multiplications(tokens), sizes.layer_multiplications(pruned_tokens)
        unpruned_sum, pruned_sum = sizes.layers * full, layer * full + (sizes.layers - layer) * pruned
        weight_bytes = dtype.itemsize * (sizes.layers * sizes.layer_weights + sizes.hidden * sizes.vocabulary)
        kv_token = 2 * request.batch * sizes.key_value * dtype.itemsize  # bytes of one token's keys and values in one layer
        kv_bytes = kv_token * sizes.layers * tokens
        pruned_kv_bytes = kv_token * (layer * tokens + (sizes.layers - layer) * pruned_tokens)
        return cls(
            tokens=tokens,
            pruned_tokens=pruned_tokens,
            tera_flop=2e-12 * request.batch * unpruned_sum,
            pruned_tera_flop=2e-12 * request.batch * pruned_sum,
            ideal=unpruned_sum / pruned_sum,
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            pruned_kv_bytes=pruned_kv_bytes,
            bandwidth=bandwidth,
        )

    def describe(self) -> str:
        """Lines for people."""
        return (
            f"theory: {self.tokens} tokens a row, {self.pruned_tokens} in the pruned layers; "
            f"{self.tera_flop:.2f} TFLOP, {self.pruned_tera_flop:.2f} pruned: ideal ratio {self.ideal:.2f}\n"
            f"        weights of the language model {self.weight_bytes / 2**30:.2f} GiB, KV cache "
            f"{self.kv_bytes / 2**20:.1f} MiB, {self.pruned_kv_bytes / 2**20:.1f} MiB pruned\n"
            f"        at the {self.bandwidth / 1e9:.0f} GB/s that a copy reaches here, reading them takes "
            f"{1e3 * self.prefill_floor_s:.2f} ms for a prefill (weights) and {1e3 * self.decode_floor_s:.2f} ms, "
            f"{1e3 * self.pruned_decode_floor_s:.2f} ms pruned, for a decoded token (weights and cache)"
        )


def add_model_arguments(parser: argparse.ArgumentParser, batches_on_gpu: Sequence[int]) -> None:
    """What a benchmark of whole models takes. On a CPU it runs the smallest model at batch 1, unless told otherwise."""
    on_gpu = parser.get_default("device") == "cuda"
    parser.add_argument("--model", nargs="+", choices=GEOMETRIES, default=["llava-1.5-7b"] if on_gpu else ["0.5b"])
    parser.add_argument("--batch", type=int, nargs="+", default=list(batches_on_gpu) if on_gpu else [1])
    parser.add_argument("--images", type=int, nargs="+", default=[1], help="pictures in each row")
    parser.add_argument("--text", type=int, default=60, help="tokens of text in each row")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")


def make_models(geometry: Geometry, device: str, dtype: torch.dtype, **pruning) -> dict[str, PreTrainedModel]:
    """{"unpruned": the stock class, "pruned": ours} on one set of random weights. `pruning` are `pruning_*` keys."""
    pruned_config = CONFIG_OF_BASE_MODEL[geometry.base](**geometry.config, **pruning)
    module, name = pruned_config.auto_map["AutoModelForImageTextToText"].split(".")
    pruned_class = getattr(importlib.import_module(f"vlmpruner.{module}"), name)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pruned = pruned_class(pruned_config)
            stock = AutoModelForImageTextToText.from_config(AutoConfig.for_model(geometry.base, **geometry.config), dtype=dtype)
    finally:
        torch.set_default_dtype(default_dtype)
    stock.load_state_dict(pruned.state_dict(), assign=True)
    return {"unpruned": stock.eval().requires_grad_(False), "pruned": pruned.eval().requires_grad_(False)}


def make_inputs(request: Request, config, device: str, dtype: torch.dtype) -> dict:
    """Inputs of noise for a request: text, then each picture followed by a token of text, then the rest of the text."""
    geometry, num_pictures = request.geometry, request.batch * request.images
    height, width = geometry.picture
    ids = torch.randint(10, 1000, (request.batch, request.tokens()), device=device)
    for image in range(request.images):
        start = 4 + image * (geometry.num_features + 1)
        ids[:, start : start + geometry.num_features] = config.image_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = config.vision_config
    if geometry.base.startswith("qwen"):
        grid = (1, height // vision.patch_size, width // vision.patch_size)
        shape = (num_pictures * prod(grid), 3 * vision.temporal_patch_size * vision.patch_size**2)
        inputs["image_grid_thw"] = torch.tensor([grid] * num_pictures, device=device)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    elif geometry.base == "llava_next":
        num_tiles = 1 + (height // vision.image_size) * (width // vision.image_size)
        shape = (num_pictures, num_tiles, 3, vision.image_size, vision.image_size)
        inputs["image_sizes"] = torch.tensor([geometry.picture] * num_pictures, device=device)
    else:
        shape = (num_pictures, 3, height, width)
    inputs["pixel_values"] = torch.randn(shape, device=device, dtype=dtype)
    return inputs


def workloads(arguments: argparse.Namespace, result: dict) -> Iterator[tuple[dict, dict, dict, Theory]]:
    """For each model, batch and number of pictures of the arguments: what it is, both models, inputs, and the theory, which is
    also printed. `result` says where they run."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth(device)
    for name in arguments.model:
        models = None
        for batch, images in product(arguments.batch, arguments.images):
            request = Request(GEOMETRIES[name], batch, arguments.text, images, arguments.ratio)
            theory = Theory.of(request, dtype, bandwidth)
            print(f"\n{name}, {request.describe()}\n{theory.describe()}\n{heading(result)}\n", flush=True)
            models = models or make_models(request.geometry, device, dtype, pruning_ratio=request.ratio)
            inputs = make_inputs(request, models["pruned"].config, device, dtype)
            setting = {"model": name, "batch": batch, "images": images, "text": request.text, "ratio": request.ratio}
            yield setting | {"theory": asdict(theory)}, models, inputs, theory
