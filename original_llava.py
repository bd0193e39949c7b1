"""Checkpoints of LLaVA's own code as transformers' LLaVA-OneVision: `lmms-lab/LLaVA-Video-7B-Qwen2` and others of its layout.

The code is LLaVA-NeXT's (github.com/LLaVA-VL/LLaVA-NeXT), whose class is `LlavaQwenForCausalLM`. Such a checkpoint has a flat
config, a tokenizer, and weights under other names; of its vision tower it holds all but the last layer, and of its image
processor nothing, since both follow from the tower's name. Everything else is read from the config, and what is not understood
is refused by name. `export.py` is what calls this; not part of an exported repo.
"""

import ast
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
)


ARCHITECTURE = "LlavaQwenForCausalLM"
# Of architectures whose checkpoints are not read, one that was converted to transformers.
CONVERTED = {
    "LlavaLlamaForCausalLM": "llava-hf/llava-1.5-7b-hf for LLaVA-1.5-7B, llava-hf/llava-v1.6-vicuna-7b-hf for LLaVA-NeXT",
    "LlavaMistralForCausalLM": "llava-hf/llava-v1.6-mistral-7b-hf",
}
# What `mm_vision_tower` may name: the config of the whole tower, and the mean and deviation of its pixels in each channel.
# LLaVA's code has these values of its own, too, and reads none from the tower's repo.
TOWERS = {
    "google/siglip-so400m-patch14-384": (
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        (0.5, 0.5),
    )
}
# Keys that change what the model computes, and the values of which that is known; None also where the key is absent.
UNDERSTOOD = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_vision_select_feature": ("patch", None),
    "mm_vision_select_layer": (-2,),
    "mm_use_im_start_end": (False, None),
    "add_faster_video": (False, None),
}
# Other keys with `mm_` in front that are read here, or matter in training alone.
KNOWN = {
    *("mm_vision_tower", "mm_hidden_size", "mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride"),
    *("mm_tunable_parts", "mm_projector_lr", "mm_vision_tower_lr", "mm_use_im_patch_token"),
}
PROJECTOR = {"linear_1": 0, "linear_2": 2}  # places in LLaVA's `nn.Sequential`
# The conversation that these models were trained in, `qwen_1_5` in LLaVA's code: a picture, a line break, and text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'video') -%}
{{ '<' + part['type'] + '>\\n' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def is_original(content: dict) -> bool:
    """Whether `content`, of a `config.json`, is of LLaVA's own code."""
    return "mm_vision_tower" in content and "vision_config" not in content


def check_understood(name: str, content: dict) -> None:
    """Raise a ValueError, which names the key, unless everything that `content` states of the model `name` is understood."""
    architecture = next(iter(content.get("architectures") or ()), None)
    if architecture != ARCHITECTURE:
        converted = CONVERTED.get(architecture, "its name often ends in -hf")
        raise ValueError(
            f"{name} is not in transformers' layout, but in that of LLaVA's own code, with architecture {architecture!r}. Of "
            f"these {ARCHITECTURE} is read (LLaVA-Video, LLaVA-OneVision). Take a checkpoint that was converted: {converted}."
        )
    for key, values in UNDERSTOOD.items():
        if (value := content.get(key)) not in values:
            raise ValueError(f"config.json of {name} has {key}={value!r}, but only {values} are understood.")
    for key, value in content.items():
        if key.startswith("mm_") and value and key not in KNOWN and key not in UNDERSTOOD:
            raise ValueError(f"config.json of {name} has {key}={value!r}, which is not understood.")
    if (tower := content["mm_vision_tower"]) not in TOWERS:
        raise ValueError(f"config.json of {name} has mm_vision_tower={tower!r}, but only {tuple(TOWERS)} are known.")
    hidden_size = TOWERS[tower][0]["hidden_size"]
    if (found := content.get("mm_hidden_size")) != hidden_size:
        raise ValueError(f"config.json of {name} has mm_hidden_size={found!r}, but {tower} has {hidden_size}.")
    if not re.fullmatch(r"anyres_max_\d+", str(ratio := content.get("image_aspect_ratio"))):
        raise ValueError(f"config.json of {name} has image_aspect_ratio={ratio!r}, but only 'anyres_max_<n>' is understood.")
    if "mm_spatial_pool_mode" not in content:
        raise ValueError(f"config.json of {name} has no mm_spatial_pool_mode, so it does not tell how a video is pooled.")


def grid_pinpoints(name: str, stated, side: int) -> list[list[int]]:
    """The resolutions of images, as [height, width] in pixels; LLaVA's own are (width, height).

    Args:
        stated: a list of pairs in pixels, or a range of tiles of `side` pixels as in "(1x1),...,(6x6)".

    Raises:
        ValueError: for anything else.
    """
    if isinstance(stated, str) and (ends := re.fullmatch(r"\((\d+)x(\d+)\),\s*\.\.\.,\s*\((\d+)x(\d+)\)", stated.strip())):
        first, second, last, end = map(int, ends.groups())
        pairs = [(column * side, row * side) for column in range(first, last + 1) for row in range(second, end + 1)]
    else:
        try:
            pairs = ast.literal_eval(stated) if isinstance(stated, str) else stated
            pairs = [(int(width), int(height)) for width, height in pairs]
        except (ValueError, TypeError, SyntaxError):
            pairs = []
    if not pairs or any(length <= 0 or length % side for pair in pairs for length in pair):
        raise ValueError(
            f"config.json of {name} has image_grid_pinpoints={str(stated)[:80]!r}, but a list of (width, height) in pixels is "
            f"needed, multiples of {side}, or a range such as '(1x1),...,(6x6)'."
        )
    return [[height, width] for width, height in pairs]


def translated_config(name: str, content: dict, image_token_id: int, video_token_id: int) -> dict:
    """`config.json` of the model in transformers' layout, with our keys of a video's layout."""
    tower, _ = TOWERS[content["mm_vision_tower"]]
    text_keys = {key: content[key] for key in (*Qwen2Config().to_dict(), "rope_theta", "rope_scaling") if key in content}
    for key in ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "model_type"):
        text_keys.pop(key, None)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "dtype": content.get("dtype", content.get("torch_dtype", "bfloat16")),
        "text_config": {"model_type": "qwen2"} | text_keys,
        "vision_config": tower | {"num_hidden_layers": tower["num_hidden_layers"] - 1, "vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": content["image_aspect_ratio"],
        "image_grid_pinpoints": grid_pinpoints(name, content.get("image_grid_pinpoints"), tower["image_size"]),
        "image_token_index": image_token_id,
        "video_token_index": video_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": content.get("tie_word_embeddings", False),
        # What LLaVA's code takes where the config has no value.
        "newline_position": content.get("mm_newline_position", "one_token"),
        "spatial_pool_mode": content["mm_spatial_pool_mode"],
        "spatial_pool_stride": 2 if content.get("mm_spatial_pool_stride") is None else content["mm_spatial_pool_stride"],
    }


def write_translated(name: str, content: dict, source: Path, folder: Path, copied: Iterable[str]) -> None:
    """Write config, processor and tokenizer of the checkpoint in `source` to `folder`, in transformers' layout.

    Args:
        name: of the checkpoint, for errors.
        content: of its `config.json`.
        copied: names of files that are taken as they are, where they exist; of the tokenizer above all.

    Raises:
        ValueError: naming what is not understood.
    """
    check_understood(name, content)
    for file in copied:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    (folder / "config.json").write_text(json.dumps(translated_config(name, content, 0, 0)), encoding="utf-8")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any type: these are values of files that anyone wrote
        raise ValueError(f"The tokenizer of {name} can not be read: {error}") from error
    tokens = [AddedToken(token, special=True, normalized=False) for token in ("<image>", "<video>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.chat_template = None  # one for text alone; the processor has its own
    ids = tokenizer.convert_tokens_to_ids(list(map(str, tokens)))
    if max(ids) >= (vocab_size := content["vocab_size"]):
        raise ValueError(
            f"The tokenizer of {name} has no room for the placeholders <image> and <video>: they would get the ids {ids}, but "
            f"config.json has vocab_size={vocab_size}."
        )
    translated = translated_config(name, content, *ids)
    (folder / "config.json").write_text(json.dumps(translated), encoding="utf-8")
    vision, (_, (mean, deviation)) = translated["vision_config"], TOWERS[content["mm_vision_tower"]]
    pixels = {"image_mean": [mean] * 3, "image_std": [deviation] * 3}
    pixels["size"] = {"height": vision["image_size"], "width": vision["image_size"]}
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=translated["image_grid_pinpoints"]),
        tokenizer,
        LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_select_strategy=translated["vision_feature_select_strategy"],
        vision_aspect_ratio=translated["vision_aspect_ratio"],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def weights_of(translated: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each weight's name in LLaVA's own code -> its name in public checkpoints of transformers' layout, and its shape."""
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_dict(translated))
    weights = {}
    for name, weight in model.state_dict().items():
        part, _, rest = name.removeprefix("model.").partition(".")
        if part == "language_model":
            original, renamed = f"model.{rest}", f"language_model.model.{rest}"
        elif part == "lm_head":
            original, renamed = name, f"language_model.{name}"
        elif part == "vision_tower":
            rest = rest.removeprefix("vision_model.")
            original, renamed = f"model.vision_tower.vision_tower.vision_model.{rest}", f"vision_tower.vision_model.{rest}"
        elif part == "multi_modal_projector":
            layer, _, kind = rest.partition(".")
            original = f"model.mm_projector.{PROJECTOR[layer]}.{kind}"
            renamed = f"multi_modal_projector.{rest}"
        else:
            original, renamed = f"model.{part}", part
        weights[original] = renamed, tuple(weight.shape)
    return weights


def check_names(name: str, translated: dict, found: Iterable[str]) -> None:
    """Raise a ValueError, naming them, where `found` weights are left over by those of the config, or some are missing."""
    expected, found = weights_of(translated), set(found)
    left_over, missing = sorted(found - expected.keys()), sorted(expected.keys() - found)
    if translated["tie_word_embeddings"]:
        missing = [weight for weight in missing if weight != "lm_head.weight"]
    for what, weights in (("has weights that its config does not know", left_over), ("lacks weights", missing)):
        if weights:
            more = ", ..." if len(weights) > 5 else ""
            raise ValueError(f"{name} {what}, {len(weights)} of them: {', '.join(weights[:5])}{more}.")


def check_shapes(name: str, translated: dict, shards: Iterable[Path]) -> None:
    """Read the headers of `shards`. Raise a ValueError where their weights are not those of the config, by name and shape."""
    shapes = {}
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            shapes |= {weight: tuple(shard.get_slice(weight).get_shape()) for weight in shard.keys()}  # noqa: SIM118
    check_names(name, translated, shapes)
    for weight, (_, expected) in weights_of(translated).items():
        if shapes.get(weight, expected) != expected:
            raise ValueError(f"{name} has {weight} of shape {shapes[weight]}, but by its config that is {expected}.")


def copy_renamed(source: Path, target: Path, names: dict[str, str]) -> None:
    """Copy a safetensors file, whose weights get new `names`. Only the header is read; the rest is copied in pieces.

    The format: the header's length in 8 bytes, little-endian; the header, JSON with the place of each weight in the rest.
    """
    with open(source, "rb") as original, open(target, "xb") as renamed:
        header = json.loads(original.read(int.from_bytes(original.read(8), "little")))
        metadata = {"__metadata__": {"format": "pt"} | header.pop("__metadata__", {})}
        content = json.dumps(metadata | {names[name]: place for name, place in header.items()}).encode()
        content += b" " * (-len(content) % 8)  # so that weights lie aligned
        renamed.write(len(content).to_bytes(8, "little") + content)
        shutil.copyfileobj(original, renamed, 1 << 24)
