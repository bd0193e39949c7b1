"""LLaVA-Video: its layout of videos, and exports straight from the layout of LLaVA's own code, against a forward by hand."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import DATA, FAMILIES, clip, load_processor, load_pruned, picture
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d, gelu, interpolate, layer_norm, linear, max_pool2d, silu
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution

from vlmpruner import export, original_llava
from vlmpruner.pruned_cache import cache_of
from vlmpruner.token_pruning import aggregate_tokens, num_tokens_to_keep, select_tokens


TOWER = "tiny/siglip"
SIDE, PATCH, GRID = 126, 14, 9  # pixels of a tile and of a patch, patches of a side
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_TOWER = {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH} | SIZES
CONFIG = {
    "_name_or_path": "Qwen/Qwen2-7B-Instruct",
    "add_faster_video": False,
    "add_time_instruction": True,
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "force_sample": True,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_aspect_ratio": "anyres_max_2",
    "image_crop_resolution": None,
    "image_grid_pinpoints": "(1x1),...,(3x3)",
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "max_window_layers": 4,
    "mm_hidden_size": 32,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": TOWER,
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pos_skipping_range": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 32768,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
    "vocab_size": 376,
}
POSITIONS = ["grid", "frame", "one_token"] + ["no_token"] * (Version(transformers.__version__) >= Version("5.18"))
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
CLOSE = {"rtol": 0, "atol": 2e-4}  # the library's norms and angles are float32 in any model


def shapes_of_weights() -> dict[str, tuple[int, ...]]:
    """The weights of LLaVA's own code, with the sizes above. The tower has all layers but the last."""
    width, mlp, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    tower, tower_mlp, cache = SIZES["hidden_size"], SIZES["intermediate_size"], width // 2
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,), "model.image_newline": (width,)}
    shapes["lm_head.weight"] = (vocabulary, width)
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.input_layernorm.weight": (width,), f"{name}.post_attention_layernorm.weight": (width,)}
        for kind, size in {"q": width, "k": cache, "v": cache}.items():
            shapes |= {f"{name}.self_attn.{kind}_proj.weight": (size, width), f"{name}.self_attn.{kind}_proj.bias": (size,)}
        shapes[f"{name}.self_attn.o_proj.weight"] = (width, width)
        shapes |= {f"{name}.mlp.{kind}_proj.weight": (mlp, width) for kind in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (width, mlp)
    vision = "model.vision_tower.vision_tower.vision_model"
    biased = {
        f"{vision}.post_layernorm": (tower,),
        "model.mm_projector.0": (width, tower),
        "model.mm_projector.2": (width, width),
    }
    for layer in range(SIZES["num_hidden_layers"] - 1):
        name = f"{vision}.encoder.layers.{layer}"
        biased |= {f"{name}.self_attn.{kind}_proj": (tower, tower) for kind in ("q", "k", "v", "out")}
        biased |= {f"{name}.mlp.fc1": (tower_mlp, tower), f"{name}.mlp.fc2": (tower, tower_mlp)}
        biased |= {f"{name}.layer_norm1": (tower,), f"{name}.layer_norm2": (tower,)}
    biased[f"{vision}.embeddings.patch_embedding"] = (tower, 3, PATCH, PATCH)
    shapes[f"{vision}.embeddings.position_embedding.weight"] = (GRID**2, tower)
    for name, shape in biased.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, shape in shapes_of_weights().items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1 and name.endswith("weight"):  # of a norm
            tensors[name] = 1 + 0.1 * noise
        elif "embed" in name or "newline" in name:
            tensors[name] = noise
        else:
            tensors[name] = noise * (0.1 if len(shape) == 1 else 1.2 / math.prod(shape[1:]) ** 0.5)
    return tensors


def write_checkpoint(folder: Path, tensors: dict, **changes) -> Path:
    """A checkpoint as `lmms-lab/LLaVA-Video-7B-Qwen2`: two shards with an index, a flat config, Qwen's tokenizer."""
    folder.mkdir()
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(DATA / "checkpoints" / "qwen2_vl" / name, folder / name)
    weight_map = {}
    for shard, names in zip(SHARDS, (sorted(tensors)[::2], sorted(tensors)[1::2]), strict=True):
        save_file({name: tensors[name].contiguous() for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(autouse=True)
def _tiny_tower(monkeypatch):
    monkeypatch.setitem(original_llava.TOWERS, TOWER, (TINY_TOWER, (0.5, 0.5)))


def quietly(*arguments, **kwargs) -> Path:
    return export.export_model(*arguments, report=lambda line: None, **kwargs)


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(original_llava.TOWERS, TOWER, (TINY_TOWER, (0.5, 0.5)))
        return quietly(write_checkpoint(folder / "LLaVA-Video", weights), folder / "pruned", pruning_ratio=0.5)


@pytest.fixture(scope="module")
def loaded(exported):
    """The exported model and processor, as a user loads them."""
    model = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True, dtype=torch.float64)
    return model.eval(), AutoProcessor.from_pretrained(exported, trust_remote_code=True)


@pytest.fixture
def laid_out(loaded):
    """Gives model and processor with another layout of videos, until the end of the test."""
    model, processor = loaded
    before = [(part, key, getattr(part, key)) for part in (model.config, processor) for key in model.config.processor_keys]

    def with_layout(mode: str, stride: int, newline_position: str):
        for part in (model.config, processor):
            part.spatial_pool_mode, part.spatial_pool_stride, part.newline_position = mode, stride, newline_position
        return model, processor

    yield with_layout
    for part, key, value in before:
        setattr(part, key, value)


# The model by hand


class Original:
    """LLaVA-Video with the weights of LLaVA's own code, in float64, one row at a time."""

    def __init__(self, tensors: dict, mode: str = "average", stride: int = 2, newline_position: str = "grid"):
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}
        self.newline = self.weights["model.image_newline"]
        self.mode, self.stride, self.newline_position = mode, stride, newline_position

    def apply(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.weights[f"{name}.weight"] * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, side, side] to [n, patches, hidden]: what leaves the last layer that is there, projected."""
        vision = "model.vision_tower.vision_tower.vision_model"
        n, patches = len(pixels), pixels.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(n, GRID**2, -1)
        kernel = self.weights[f"{vision}.embeddings.patch_embedding.weight"].flatten(1)
        x = linear(patches, kernel, self.weights[f"{vision}.embeddings.patch_embedding.bias"])
        x = x + self.weights[f"{vision}.embeddings.position_embedding.weight"]
        for layer in range(2):
            name = f"{vision}.encoder.layers.{layer}"
            normed = self.norm(f"{name}.layer_norm1", x)
            q, k, v = (self.apply(f"{name}.self_attn.{kind}_proj", normed).view(n, -1, 2, 16).transpose(1, 2) for kind in "qkv")
            mixed = ((q @ k.transpose(2, 3)) / 4).softmax(-1) @ v
            x = x + self.apply(f"{name}.self_attn.out_proj", mixed.transpose(1, 2).flatten(2))
            hidden = gelu(self.apply(f"{name}.mlp.fc1", self.norm(f"{name}.layer_norm2", x)), approximate="tanh")
            x = x + self.apply(f"{name}.mlp.fc2", hidden)
        return self.apply("model.mm_projector.2", gelu(self.apply("model.mm_projector.0", x)))

    def video(self, pixels: torch.Tensor) -> torch.Tensor:
        """[frames, 3, side, side] to [tokens, hidden], newlines included."""
        frames = self.encode(pixels).unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        if self.mode == "bilinear":
            frames = interpolate(frames, size=[math.ceil(GRID / self.stride)] * 2, mode="bilinear")
        else:
            frames = {"average": avg_pool2d, "max": max_pool2d}[self.mode](frames, self.stride)
        tokens = []
        for frame in frames.permute(0, 2, 3, 1):
            for row in frame:
                tokens += [*row, *([self.newline] if self.newline_position == "grid" else [])]
            tokens += [self.newline] if self.newline_position == "frame" else []
        return torch.stack(tokens + ([self.newline] if self.newline_position == "one_token" else []))

    def image(self, tiles: torch.Tensor, size: list[int], most: int) -> torch.Tensor:
        """[1 + tiles, 3, side, side] of an image of `size` (height, width) to [tokens, hidden]: the base view, then the larger
        one without its padding, made smaller where it has more than `most` tiles' patches."""
        features, (height, width) = self.encode(tiles), size
        pinpoints = [(column * SIDE, row * SIDE) for column in range(1, 4) for row in range(1, 4)]
        columns, rows = (side // SIDE for side in best_resolution((width, height), pinpoints))
        larger = features[1 : 1 + rows * columns].view(rows, columns, GRID, GRID, -1)
        larger = larger.permute(0, 2, 1, 3, 4).reshape(rows * GRID, columns * GRID, -1)
        if width / height > columns / rows:
            padding = (rows * GRID - int(height * columns * GRID / width)) // 2
            larger = larger[padding : rows * GRID - padding]
        else:
            padding = (columns * GRID - int(width * rows * GRID / height)) // 2
            larger = larger[:, padding : columns * GRID - padding]
        times = math.sqrt(larger.shape[0] * larger.shape[1] / (most * GRID**2))
        if times > 1.1:
            smaller = [int(larger.shape[0] // times), int(larger.shape[1] // times)]
            larger = interpolate(larger.permute(2, 0, 1)[None], smaller, mode="bilinear")[0].permute(1, 2, 0)
        rows_of_tokens = torch.cat([larger, self.newline.expand(len(larger), 1, -1)], dim=1)
        return torch.cat([features[0], rows_of_tokens.flatten(0, 1)])

    def embed(self, ids: torch.Tensor, visual: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """[length] to [length, hidden], with the tokens of each (placeholder, tokens) at its placeholders."""
        embedded = self.weights["model.embed_tokens.weight"][ids].clone()
        for placeholder, tokens in visual:
            embedded[ids == placeholder] = tokens
        return embedded

    def decode(self, x: torch.Tensor, prune=None) -> tuple[torch.Tensor, torch.Tensor]:
        """[length, hidden] to logits, and the columns that they are of. `prune(states, keys)` gives what layer 2 works on."""
        columns, keys = torch.arange(len(x)), None
        for number in range(4):
            if number == 2 and prune is not None:
                x, columns = prune(x, keys)
            name = f"model.layers.{number}"
            normed = self.rms(f"{name}.input_layernorm", x)
            q, k, v = (
                self.apply(f"{name}.self_attn.{kind}_proj", normed).view(len(x), -1, 16).transpose(0, 1) for kind in "qkv"
            )
            q, k = rotated(q, columns), rotated(k, columns)
            keys = k
            k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
            scores = (q @ k.transpose(1, 2)) / 4 + torch.full((len(x), len(x)), -torch.inf).triu(1)
            x = x + self.apply(f"{name}.self_attn.o_proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
            normed = self.rms(f"{name}.post_attention_layernorm", x)
            gated = silu(self.apply(f"{name}.mlp.gate_proj", normed)) * self.apply(f"{name}.mlp.up_proj", normed)
            x = x + self.apply(f"{name}.mlp.down_proj", gated)
        return self.apply("lm_head", self.rms("model.norm", x)), columns


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angles = positions[:, None] * CONFIG["rope_theta"] ** (-torch.arange(0, 16, 2).double() / 16)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def best_resolution(size: tuple[int, int], pinpoints: list[tuple[int, int]]) -> tuple[int, int]:
    """Of (width, height) in pixels, where most of an image's pixels are kept and then fewest wasted; the first among equals."""
    width, height = size

    def merit(pinpoint):
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def request(processor, content: list, text: str = "What happens?") -> dict:
    """Model inputs for one row, `content` being pictures and video arrays in the order of the prompt."""
    parts = [{"type": "video" if isinstance(part, np.ndarray) else "image"} for part in content]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    videos = [part for part in content if isinstance(part, np.ndarray)] or None
    images = [part for part in content if not isinstance(part, np.ndarray)] or None
    return dict(processor(images=images, videos=videos, text=prompt, return_tensors="pt"))


def by_hand(original: Original, model, inputs: dict, prune=None):
    visual = []
    if "pixel_values_videos" in inputs:
        tokens = torch.cat([original.video(video) for video in inputs["pixel_values_videos"]])
        visual.append((model.config.video_token_id, tokens))
    if "pixel_values" in inputs:
        ((tiles,), (size,)) = inputs["pixel_values"], inputs["image_sizes"].tolist()
        visual.append((model.config.image_token_id, original.image(tiles, size, most=2)))
    return original.decode(original.embed(inputs["input_ids"][0], visual), prune)


LAYOUTS = [("average", 2, "grid"), ("max", 4, "frame"), ("bilinear", 2, "one_token"), ("bilinear", 3, "no_token")]


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each[-1] in POSITIONS], ids=str)
def test_a_video_is_the_original_s(layout, laid_out, weights):
    model, processor = laid_out(*layout)
    inputs = request(processor, [clip(1, 3)])
    with torch.no_grad():
        outputs = model(**inputs, pruning_ratio=0.0)
        logits, _ = by_hand(Original(weights, *layout), model, inputs)
    torch.testing.assert_close(outputs.logits[0], logits, **CLOSE)


@pytest.mark.parametrize("size", [(320, 240), (120, 300), (1000, 990)], ids=str)
def test_an_image_is_the_original_s(size, loaded, weights):
    model, processor = loaded
    inputs = request(processor, [picture(1, *size), clip(1, 2)])
    with torch.no_grad():
        outputs = model(**inputs, pruning_ratio=0.0)
        logits, _ = by_hand(Original(weights), model, inputs)
    torch.testing.assert_close(outputs.logits[0], logits, **CLOSE)


@pytest.mark.parametrize("scope", ["slice", "video"])
@pytest.mark.parametrize("layout", [("average", 2, "grid"), ("bilinear", 2, "frame")], ids=lambda layout: layout[-1])
def test_a_pruned_video_is_one_by_hand(layout, scope, laid_out, weights):
    """Newlines are no candidates and stay; each frame, or all of them, is a grid of its own."""
    model, processor = laid_out(*layout)
    model.config.pruning_video_scope = scope
    inputs, frames, side = request(processor, [clip(1, 3)]), 3, 4 if layout[0] == "average" else 5
    first = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
    row_stride = side + (layout[-1] == "grid")
    frame_stride = side * row_stride + (layout[-1] == "frame")
    places = torch.tensor(
        [[[first + f * frame_stride + y * row_stride + x for x in range(side)] for y in range(side)] for f in range(frames)]
    )
    grids = list(places) if scope == "slice" else [places]
    chosen = []

    def prune(states, keys):
        kept, states = torch.ones(len(states), dtype=torch.bool), states.clone()
        for grid in grids:
            at = grid.flatten()
            selection = select_tokens(states[at], keys[:, at], tuple(grid.shape), num_tokens_to_keep(len(at), 0.5))
            merged = aggregate_tokens(states[at], selection, 0.3)
            kept[at] = False
            kept[at[selection.kept]] = True
            states[at[selection.kept]] = merged
            chosen.append(at[selection.kept].tolist())
        return states[kept], kept.nonzero()[:, 0]

    with torch.no_grad():
        outputs = model(**inputs)
        logits, columns = by_hand(Original(weights, *layout), model, inputs, prune)
    model.config.pruning_video_scope = "slice"
    assert [entry.positions[entry.kept].tolist() for entry in outputs.pruning_record] == chosen
    torch.testing.assert_close(outputs.logits[0, columns], logits, **CLOSE)


def test_generate_and_draw(loaded):
    model, processor = loaded
    inputs = request(processor, [clip(1, 3), picture(1)])
    how = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": None,
    }
    cached, uncached = model.generate(**inputs, **how), model.generate(**inputs, use_cache=False, **how)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=1e-5)
    record = model.get_pruning_record(cached)
    frames = [entry for entry in record if entry.modality == "video"]
    assert [(entry.grid, entry.num_kept) for entry in frames] == [((4, 4), 8)] * 3
    lengths = [layer.keys.shape[2] for layer in cache_of(cached).layers]
    num_dropped = record.num_visual - record.num_kept
    assert lengths == [lengths[0]] * 2 + [lengths[0] - num_dropped] * 2
    _, sheet = processor.draw_kept_tokens(record=record, inputs=inputs)
    # Two frames in the first row and one in the second, of 4 x 4 tokens that cover 28 pixels each: 14 are in no token.
    assert sheet.size == (2 * 112 + 8, 2 * 112 + 8 + 30)


def test_the_conversation_is_the_one_of_training(loaded):
    _, processor = loaded
    turns = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": "A door opens."},
        {"role": "user", "content": [{"type": "text", "text": "And then?"}]},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\nWhat happens?<|im_end|>\n"
        "<|im_start|>assistant\nA door opens.<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template([{"role": "system", "content": "Be brief."}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
    )


# The defaults


def test_the_stock_layout_has_the_stock_counts():
    shared = load_processor(FAMILIES["llava_onevision"])
    parts = {name: getattr(shared, name) for name in shared.get_attributes()}
    processor, ours = LlavaOnevisionProcessor(**parts), FAMILIES["llava_onevision"].processor_class(**parts)
    for side in (7, 26, 27):
        ours.num_image_tokens = processor.num_image_tokens = side**2
        for frames in (1, 5):
            video = {"pixel_values_videos": [torch.zeros(frames, 3, 8, 8)]}
            stock = LlavaOnevisionProcessor.replace_video_token(processor, video, 0)
            assert ours.replace_video_token(video, 0) == stock
            counts = [LlavaOnevisionProcessor._get_num_multimodal_tokens(processor, video_sizes=[(frames, 8, 8)])]
            counts.append(ours._get_num_multimodal_tokens(video_sizes=[(frames, 8, 8)]))
            assert counts[1].num_video_tokens == [stock.count("<video>")]
            assert counts[0].num_video_tokens in (None, counts[1].num_video_tokens)  # None before videos were counted


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("spatial_pool_mode", "mean", r"spatial_pool_mode must be one of \('average', 'max', 'bilinear'\), got 'mean'"),
        ("newline_position", "row", r"newline_position must be one of \('one_token', .*got 'row'"),
        ("spatial_pool_stride", 0, r"spatial_pool_stride must be an integer from 1 to 7, the patches of a side, got 0"),
    ],
)
def test_bad_layouts_are_named(key, value, message):
    family = FAMILIES["llava_onevision"]
    config = copy.deepcopy(load_pruned(family).config)
    setattr(config, key, value)
    with pytest.raises(ValueError, match=message):
        config.validate_pruning()
    processor = copy.deepcopy(load_processor(family))
    processor = family.processor_class(**{name: getattr(processor, name) for name in processor.get_attributes()})
    processor.num_image_tokens = 49
    setattr(processor, key, value)
    with pytest.raises(ValueError, match=message):
        processor.replace_video_token({"pixel_values_videos": [torch.zeros(1, 3, 8, 8)]}, 0)


@pytest.mark.skipif("no_token" in POSITIONS, reason="the stock forward ends videos with a newline before transformers 5.18")
def test_no_newlines_are_refused_where_the_stock_class_adds_one():
    config = copy.deepcopy(load_pruned(FAMILIES["llava_onevision"]).config)
    config.newline_position = "no_token"
    with pytest.raises(ValueError, match=r"newline_position='no_token' needs transformers>=5\.18"):
        config.validate_pruning()


# The export


def test_what_the_checkpoint_states_is_in_the_export(exported, weights):
    config = json.loads((exported / "config.json").read_text())
    tokenizer_size = len(AutoProcessor.from_pretrained(exported, trust_remote_code=True).tokenizer)
    expected = {
        "newline_position": "grid",
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
        "vision_aspect_ratio": "anyres_max_2",
        "image_token_index": tokenizer_size - 2,
        "video_token_index": tokenizer_size - 1,
        "dtype": "float32",
        "pruning_ratio": 0.5,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["vision_config"]["num_hidden_layers"] == 2
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    processor = json.loads((exported / "processor_config.json").read_text())
    assert {key: processor[key] for key in ("newline_position", "spatial_pool_mode", "num_image_tokens")} == {
        "newline_position": "grid",
        "spatial_pool_mode": "average",
        "num_image_tokens": 81,
    }
    copies = {name: tensor for shard in SHARDS for name, tensor in load_file(exported / shard).items()}
    assert len(copies) == len(weights)
    assert torch.equal(copies["multi_modal_projector.linear_2.bias"], weights["model.mm_projector.2.bias"])
    assert torch.equal(copies["language_model.lm_head.weight"], weights["lm_head.weight"])
    assert not (exported / "original_llava.py").exists()


def test_an_export_of_the_export_keeps_the_layout_and_has_no_way_back(exported, tmp_path):
    again = quietly(exported, tmp_path / "again", pruning_ratio=0.25)
    config = json.loads((again / "config.json").read_text())
    assert (config["newline_position"], config["spatial_pool_mode"], config["pruning_ratio"]) == ("grid", "average", 0.25)
    with pytest.raises(ValueError, match=r"pruned has spatial_pool_mode='average', but the stock class knows 'bilinear' alone"):
        quietly(exported, tmp_path / "base", to_base=True)


def test_an_original_onevision_has_the_stock_layout(weights, tmp_path):
    changes = {"mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token", "mm_spatial_pool_stride": "absent"}
    repo = quietly(write_checkpoint(tmp_path / "onevision", weights, **changes), tmp_path / "pruned")
    config = json.loads((repo / "config.json").read_text())
    keys = ("spatial_pool_mode", "spatial_pool_stride", "newline_position")
    assert [config[key] for key in keys] == ["bilinear", 2, "one_token"]
    back = quietly(repo, tmp_path / "base", to_base=True)
    config = json.loads((back / "config.json").read_text())
    assert config["model_type"] == "llava_onevision" and "newline_position" not in config


NOT_UNDERSTOOD = {
    "LLaVA-1.5": (
        {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        r"not in transformers' layout.*'LlavaLlamaForCausalLM'.*llava-hf/llava-1\.5-7b-hf",
    ),
    "projector": ({"mm_projector_type": "linear"}, r"mm_projector_type='linear', but only \('mlp2x_gelu',\) are understood"),
    "resampler": ({"mm_resampler_type": "qformer"}, r"mm_resampler_type='qformer'"),
    "merge": ({"mm_patch_merge_type": "flat"}, r"mm_patch_merge_type='flat'"),
    "layer": ({"mm_vision_select_layer": -1}, r"mm_vision_select_layer=-1"),
    "faster": ({"add_faster_video": True}, r"add_faster_video=True"),
    "unknown": ({"mm_new_thing": 3}, r"mm_new_thing=3, which is not understood"),
    "tower": ({"mm_vision_tower": "a/b"}, r"mm_vision_tower='a/b', but only \('google/siglip-so400m-patch14-384'"),
    "tower's width": ({"mm_hidden_size": 1024}, r"mm_hidden_size=1024, but tiny/siglip has 32"),
    "aspect ratio": ({"image_aspect_ratio": "pad"}, r"image_aspect_ratio='pad'"),
    "pooling": ({"mm_spatial_pool_mode": "conv"}, r"spatial_pool_mode must be one of .* got 'conv'"),
    "no pooling": ({"mm_spatial_pool_mode": "absent"}, r"has no mm_spatial_pool_mode"),
    "newlines": ({"mm_newline_position": "column"}, r"newline_position must be one of .* got 'column'"),
    "pinpoints": ({"image_grid_pinpoints": [[126, 100]]}, r"image_grid_pinpoints='\[\[126, 100\]\]', but a list"),
    "no room": ({"vocab_size": 360}, r"no room for the placeholders <image> and <video>"),
    "layers": ({"num_hidden_layers": 3}, r"has weights that its config does not know, 12 of them: model\.layers\.3\."),
    "more layers": ({"num_hidden_layers": 5}, r"lacks weights, 12 of them: model\.layers\.4\."),
    "width": (
        {"intermediate_size": 97},
        r"has model\.layers\.0\.mlp\..*_proj\.weight of shape \(.*96.*\), but by its config that",
    ),
}


@pytest.mark.parametrize("damage", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused_by_name(damage, weights, tmp_path):
    changes, message = NOT_UNDERSTOOD[damage]
    base = write_checkpoint(tmp_path / "base", weights, **changes)
    with pytest.raises(ValueError, match=message):
        quietly(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_shard_that_is_none_is_refused(weights, tmp_path):
    base = write_checkpoint(tmp_path / "base", weights)
    (base / SHARDS[1]).write_bytes((base / SHARDS[1]).read_bytes()[:-8])
    with pytest.raises(ValueError, match="base is no whole safetensors file"):
        quietly(base, tmp_path / "out")


def test_no_temporary_folder_remains(weights, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    base = write_checkpoint(tmp_path / "base", weights)
    lines = []
    export.export_model(base, tmp_path / "out", dry_run=True, report=lines.append)
    assert lines[-1].endswith("with other names for the weights")
    (base / "tokenizer.json").write_text("{}")
    (base / "vocab.json").unlink()
    with pytest.raises(ValueError, match="The tokenizer of base can not be read"):
        quietly(base, tmp_path / "out")
    assert not any((tmp_path / "temporary").iterdir())


def test_resolutions_are_chosen_as_in_the_original():
    """LLaVA's are (width, height), transformers' [height, width]."""
    squares = [[384 * columns, 384 * rows] for columns in range(1, 7) for rows in range(1, 7)]
    assert original_llava.grid_pinpoints("base", "(1x1),...,(6x6)", 384) == original_llava.grid_pinpoints("base", squares, 384)
    sizes = np.random.default_rng(1).integers(50, 3000, (100, 2)).tolist()
    for stated in (squares, [[384, 384], [768, 384], [1152, 384], [768, 768]]):
        ours = original_llava.grid_pinpoints("base", str(stated), 384)
        for width, height in sizes:
            assert list(select_best_resolution((height, width), ours)) == best_resolution((width, height), stated)[::-1]
