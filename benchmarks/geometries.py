"""Real models' sizes: models of those sizes with random weights, inputs for them, and what theory says they cost.

The sizes are those of the public `config.json` of each model, but for `0.5b`: the language model of Qwen2-0.5B, with M-RoPE,
behind a tower of Qwen2-VL's kind that was made small enough for a CPU. Theory needs the sizes alone; a model that is measured
has to be of a family that can be pruned.

The unpruned model is the stock class of transformers and the pruned one is ours, on the same weights. Weights are made on the
device in the dtype, as the library initialises them.
"""

import argparse
import importlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import product
from math import prod

import torch
from measurement import copy_bandwidth, heading
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

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
# Qwen/Qwen3-VL-30B-A3B-Instruct: 30 B weights, of which 3 B work on a token. Its language model is that of Qwen3-30B-A3B.
QWEN3_30B_A3B = QWEN3_4B | {
    "model_type": "qwen3_vl_moe_text",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "tie_word_embeddings": False,
}
QWEN3_TOWER = {
    "model_type": "qwen3_vl_moe_vision",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
# Qwen/Qwen3.5-9B: three layers of linear attention to one of full attention.
QWEN3_5_9B = {
    "model_type": "qwen3_5_text",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
    "vocab_size": 248320,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
    },
}
QWEN3_5_TOWER = {name: size for name, size in QWEN3_TOWER.items() if name != "deepstack_visual_indexes"}
# OpenGVLab/InternVL3_5-8B, in the layout of its conversion InternVL3_5-8B-HF: Qwen3-8B behind InternViT-300M.
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
INTERNVIT_300M = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
# zai-org/GLM-4.1V-9B-Thinking; and zai-org/GLM-4.5V, 106 B weights of which 12 B work on a token.
GLM_ROPE = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
GLM_9B = {
    "model_type": "glm4v_text",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "vocab_size": 151552,
    "rope_parameters": GLM_ROPE,
}
GLM_106B_A12B = {
    "model_type": "glm4v_moe_text",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "vocab_size": 151552,
    "rope_parameters": GLM_ROPE,
}
GLM_TOWER = {"depth": 24, "hidden_size": 1536, "num_heads": 12, "patch_size": 14, "image_size": 336, "out_hidden_size": 4096}


@dataclass(frozen=True)
class Geometry:
    """A model's sizes and a picture for it.

    Attributes:
        base: the stock model type.
        config: what of its `config.json` decides its size.
        picture: (height, width) in pixels.
        grids: (height, width) in tokens of each grid that the picture makes.
        num_newlines: tokens of the picture that lie on no grid and are always kept.
        layer: the decoder layer at whose input tokens leave.
    """

    base: str
    config: dict
    picture: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    num_newlines: int = 0
    layer: int = 2

    @property
    def text_config(self) -> PreTrainedConfig:
        """Of the language model, in the stock class."""
        return AutoConfig.for_model(self.base, **deepcopy(self.config)).get_text_config(decoder=True)

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
    "qwen3-vl-30b-a3b": Geometry(
        "qwen3_vl_moe", {"text_config": QWEN3_30B_A3B, "vision_config": QWEN3_TOWER}, (960, 1152), ((30, 36),)
    ),
    # The first layer with keys, which selection needs, is layer 3.
    "qwen3.5-9b": Geometry(
        "qwen3_5",
        {"text_config": QWEN3_5_9B, "vision_config": QWEN3_5_TOWER | {"model_type": "qwen3_5_vision", "out_hidden_size": 4096}},
        (960, 1152),
        ((30, 36),),
        layer=4,
    ),
    # 2 x 3 tiles of 448 pixels, and the whole picture as one more.
    "internvl3.5-8b": Geometry(
        "internvl",
        {"text_config": QWEN3_8B, "vision_config": INTERNVIT_300M, "tie_word_embeddings": False},
        (896, 1344),
        ((16, 16),) * 7,
    ),
    "glm-4.1v-9b": Geometry(
        "glm4v",
        {"text_config": GLM_9B, "vision_config": GLM_TOWER | {"model_type": "glm4v_vision", "intermediate_size": 13696}},
        (840, 1008),
        ((30, 36),),
    ),
    "glm-4.5v": Geometry(
        "glm4v_moe",
        {
            "text_config": GLM_106B_A12B,
            "vision_config": GLM_TOWER | {"model_type": "glm4v_moe_vision", "intermediate_size": 10944},
        },
        (840, 1008),
        ((30, 36),),
    ),
    "0.5b": Geometry("qwen2_vl", {"text_config": QWEN2_05B, "vision_config": SMALL_TOWER}, (980, 1120), ((35, 40),)),
}


@dataclass(frozen=True)
class Request:
    """What is run: `batch` rows, each of `images` pictures and `text` tokens, with `ratio` of the visual tokens removed at
    decoder layer `layer` in the pruned model, by default the geometry's."""

    geometry: Geometry
    batch: int = 1
    text: int = 60
    images: int = 1
    ratio: float = 0.889
    layer: int | None = None

    def __post_init__(self):
        if self.layer is None:
            object.__setattr__(self, "layer", self.geometry.layer)

    def tokens(self, ratio: float = 0) -> int:
        """Tokens of a row, in the layers that hold the fewest."""
        return self.text + self.images * self.geometry.num_kept(ratio)

    def describe(self) -> str:
        height, width = self.geometry.picture
        pictures = f"{self.images} of {height} x {width} pixels"
        return f"batch {self.batch}; in each row {self.text} tokens of text, and pictures: {pictures}"


@dataclass(frozen=True)
class LinearAttention:
    """The sizes of a GatedDeltaNet (arXiv 2412.06464), which has a state of constant size in place of keys and values.

    Attributes:
        key: of all key heads together, and as much for queries.
        value_heads, key_dim, value_dim: each value head has a state of `key_dim` x `value_dim`.
        kernel: of the convolution over queries, keys and values.
    """

    key: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def convolved(self) -> int:
        return 2 * self.key + self.value_heads * self.value_dim

    def weights(self, hidden: int) -> int:
        """Projections of queries, keys, values, the output gate, decay and step size, and back; and the convolution."""
        value = self.value_heads * self.value_dim
        return hidden * (2 * self.key + 3 * value + 2 * self.value_heads) + self.kernel * self.convolved

    def multiplications(self) -> int:
        """For one token: its state decays, is read, is written, and is read once more, each a product for every entry."""
        return 4 * self.value_heads * self.key_dim * self.value_dim

    def state_bytes(self, itemsize: int) -> int:
        """Of one row: the state, which is float32, and the latest inputs of the convolution."""
        return 4 * self.value_heads * self.key_dim * self.value_dim + itemsize * self.kernel * self.convolved


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a decoder layer that its cost depends on.

    Attributes:
        hidden: of a token's state.
        query, key_value: of all heads together; 0 with linear attention.
        gate: of the projection that gates what attention gives, 0 without one.
        linear: the linear attention, or None for full attention.
        intermediate: of the MLP that each token goes through: the only one, or shared experts.
        experts, expert, chosen: how many there are beside that, the intermediate size of each, how many a token goes through.
        routing: outputs of the projections that choose experts and weigh the shared one.
    """

    hidden: int
    query: int
    key_value: int
    intermediate: int
    gate: int = 0
    linear: LinearAttention | None = None
    experts: int = 0
    expert: int = 0
    chosen: int = 0
    routing: int = 0

    def weights(self, experts: float) -> float:
        """Of the layer's matrices, with `experts` of its experts. 4 d^2 + 3 d m without groups, gate and experts."""
        attention = (
            self.linear.weights(self.hidden) if self.linear else self.hidden * (2 * (self.query + self.key_value) + self.gate)
        )
        return attention + self.hidden * (self.routing + 3 * (self.intermediate + experts * self.expert))

    def experts_read(self, tokens: int) -> float:
        """How many experts `tokens` go through, on average if each token chose among all with the same probability."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** tokens) if self.experts else 0

    def multiplications(self, tokens: int) -> int:
        """Over `tokens` of one row: each weight once for every token that it works on, and attention: 2 n^2 d, or n steps."""
        attention = tokens * self.linear.multiplications() if self.linear else 2 * tokens**2 * self.query
        return tokens * self.weights(self.chosen) + attention

    @classmethod
    def of(cls, text: PreTrainedConfig, layer: int) -> "LayerSizes":
        """Of layer number `layer` of a language model with the config `text`."""
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query, key_value = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
        is_linear = (getattr(text, "layer_types", None) or ["full_attention"] * (layer + 1))[layer] == "linear_attention"
        sizes = {"hidden": text.hidden_size, "query": query, "key_value": key_value, "intermediate": text.intermediate_size}
        if is_linear:
            linear = LinearAttention(
                key=text.linear_num_key_heads * text.linear_key_head_dim,
                value_heads=text.linear_num_value_heads,
                key_dim=text.linear_key_head_dim,
                value_dim=text.linear_value_head_dim,
                kernel=text.linear_conv_kernel_dim,
            )
            sizes |= {"query": 0, "key_value": 0, "linear": linear}
        elif text.model_type.startswith("qwen3_5"):
            sizes["gate"] = query
        if has_experts(text, layer):
            num_experts, expert = getattr(text, "n_routed_experts", None) or text.num_experts, text.moe_intermediate_size
            shared = getattr(text, "shared_expert_intermediate_size", 0)  # Qwen's, which a token weighs
            sizes |= {"experts": num_experts, "expert": expert, "chosen": text.num_experts_per_tok}
            sizes["routing"] = num_experts + bool(shared)
            sizes["intermediate"] = shared or expert * getattr(text, "n_shared_experts", 0)
        return cls(**sizes)


def has_experts(text: PreTrainedConfig, layer: int) -> bool:
    if not hasattr(text, "moe_intermediate_size"):
        return False
    is_dense = layer < getattr(text, "first_k_dense_replace", 0) or layer in (getattr(text, "mlp_only_layers", None) or ())
    return not is_dense and (layer + 1) % getattr(text, "decoder_sparse_step", 1) == 0


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes of a language model that its cost depends on."""

    hidden: int
    vocabulary: int
    layers: tuple[LayerSizes, ...]

    @classmethod
    def of(cls, geometry: Geometry) -> "DecoderSizes":
        return cls.of_text_config(geometry.text_config)

    @classmethod
    def of_text_config(cls, text: PreTrainedConfig) -> "DecoderSizes":
        layers = tuple(LayerSizes.of(text, layer) for layer in range(text.num_hidden_layers))
        return cls(text.hidden_size, text.vocab_size, layers)

    def flops(self, tokens: Sequence[float]) -> float:
        """Of a prefill of one row of which each layer sees so many `tokens`, in the layers alone: two for a multiplication."""
        return 2 * sum(layer.multiplications(number) for layer, number in zip(self.layers, tokens, strict=True))

    def kv_bytes(self, tokens: Sequence[float], itemsize: int) -> float:
        """Of the cache that it leaves."""
        return 2 * itemsize * sum(layer.key_value * number for layer, number in zip(self.layers, tokens, strict=True))

    @property
    def key_value(self) -> int:
        """Numbers that a cache holds of a token's keys, and as many of its values, in all layers together."""
        return sum(layer.key_value for layer in self.layers)


@dataclass(frozen=True)
class Theory:
    """What a request costs at least. `ideal` counts the multiplications of the decoder's layers and nothing else.

    `weight_bytes` are of the language model, and `read_bytes` those of them that a decoded token of each row needs: all, but
    for experts that no row chooses. `state_bytes` are of linear attention; they depend on no length.
    """

    tokens: int
    pruned_tokens: int
    tera_flop: float
    pruned_tera_flop: float
    ideal: float
    weight_bytes: int
    read_bytes: int
    kv_bytes: int
    pruned_kv_bytes: int
    state_bytes: int
    bandwidth: float

    @property
    def prefill_floor_s(self) -> float:
        """Seconds to read the weights."""
        return self.weight_bytes / self.bandwidth

    @property
    def decode_floor_s(self) -> float:
        """Seconds to read the weights that are needed and the whole cache."""
        return (self.read_bytes + self.kv_bytes + self.state_bytes) / self.bandwidth

    @property
    def pruned_decode_floor_s(self) -> float:
        return (self.read_bytes + self.pruned_kv_bytes + self.state_bytes) / self.bandwidth

    @classmethod
    def of(cls, request: Request, dtype: torch.dtype, bandwidth: float) -> "Theory":
        """Args: bandwidth: bytes that the device moves in a second."""
        sizes, batch = DecoderSizes.of(request.geometry), request.batch
        tokens, pruned_tokens = request.tokens(), request.tokens(request.ratio)
        before, after = sizes.layers[: request.layer], sizes.layers[request.layer :]
        held = [(layer, tokens) for layer in before] + [(layer, pruned_tokens) for layer in after]
        unpruned_sum = sum(layer.multiplications(tokens) for layer in sizes.layers)
        pruned_sum = sum(layer.multiplications(number) for layer, number in held)
        head = sizes.hidden * sizes.vocabulary
        kv_item = 2 * batch * dtype.itemsize
        states = [layer.linear.state_bytes(dtype.itemsize) for layer in sizes.layers if layer.linear]
        return cls(
            tokens=tokens,
            pruned_tokens=pruned_tokens,
            tera_flop=2e-12 * batch * unpruned_sum,
            pruned_tera_flop=2e-12 * batch * pruned_sum,
            ideal=unpruned_sum / pruned_sum,
            weight_bytes=dtype.itemsize * (head + sum(layer.weights(layer.experts) for layer in sizes.layers)),
            read_bytes=round(dtype.itemsize * (head + sum(layer.weights(layer.experts_read(batch)) for layer in sizes.layers))),
            kv_bytes=kv_item * tokens * sizes.key_value,
            pruned_kv_bytes=kv_item * sum(layer.key_value * number for layer, number in held),
            state_bytes=batch * sum(states),
            bandwidth=bandwidth,
        )

    def describe(self) -> str:
        """Lines for people."""
        read, state = "", ""
        if self.read_bytes < self.weight_bytes:
            read = f" ({self.read_bytes / 2**30:.2f} GiB for a decoded token)"
        if self.state_bytes:
            state = f", states of linear attention {self.state_bytes / 2**20:.1f} MiB"
        return (
            f"theory: {self.tokens} tokens a row, {self.pruned_tokens} in the pruned layers; "
            f"{self.tera_flop:.2f} TFLOP, {self.pruned_tera_flop:.2f} pruned: ideal ratio {self.ideal:.2f}\n"
            f"        weights of the language model {self.weight_bytes / 2**30:.2f} GiB{read}, KV cache "
            f"{self.kv_bytes / 2**20:.1f} MiB, {self.pruned_kv_bytes / 2**20:.1f} MiB pruned{state}\n"
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


def why_not_measured(geometry: Geometry) -> str | None:
    """Why a model has a theory alone; None where it can be measured."""
    if geometry.base in CONFIG_OF_BASE_MODEL:
        return None
    return f"no class prunes models of type {geometry.base!r} here, only {', '.join(CONFIG_OF_BASE_MODEL)}"


def make_models(geometry: Geometry, device: str, dtype: torch.dtype, **pruning) -> dict[str, PreTrainedModel]:
    """{"unpruned": the stock class, "pruned": ours} on one set of random weights. `pruning` are `pruning_*` keys.

    Raises:
        ValueError: for a family that can not be pruned.
    """
    if (reason := why_not_measured(geometry)) is not None:
        raise ValueError(reason)
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
    if hasattr(vision, "temporal_patch_size"):
        grid = (1, height // vision.patch_size, width // vision.patch_size)
        shape = (num_pictures * prod(grid), 3 * vision.temporal_patch_size * vision.patch_size**2)
        inputs["image_grid_thw"] = torch.tensor([grid] * num_pictures, device=device)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    elif geometry.base == "llava_next":
        num_tiles = 1 + (height // vision.image_size) * (width // vision.image_size)
        shape = (num_pictures, num_tiles, 3, vision.image_size, vision.image_size)
        inputs["image_sizes"] = torch.tensor([geometry.picture] * num_pictures, device=device)
    elif geometry.base == "internvl":
        shape = (num_pictures * len(geometry.grids), 3, *vision.image_size)
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
            if (reason := why_not_measured(request.geometry)) is not None:
                print(f"{name} is not measured: {reason}.", flush=True)
                continue
            models = models or make_models(request.geometry, device, dtype, pruning_ratio=request.ratio)
            inputs = make_inputs(request, models["pruned"].config, device, dtype)
            setting = {"model": name, "batch": batch, "images": images, "text": request.text, "ratio": request.ratio}
            yield setting | {"theory": asdict(theory)}, models, inputs, theory
