"""Tiny models of the other families, in a size that vLLM's attention on a CPU takes (heads of 32)."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig

from export import export_model
from tests.families import FAMILIES, small_checkpoint, spread_weights
from vlmpruner_vllm.families import FAMILIES as SERVED


HEAD = 32


def tiny_repo(name: str, folder: Path) -> Path:
    """A pruned repo of a family, or of `family-decoder`: the checkpoint in tests/data with wider heads and random weights,
    exported."""
    name, _, decoder = name.partition("-")
    family, base = FAMILIES[name], folder / "base"
    shutil.copytree(small_checkpoint(family), base, ignore=shutil.ignore_patterns("*.safetensors"))
    path = base / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    width = text["num_attention_heads"] * HEAD
    text |= {"hidden_size": width, "head_dim": HEAD, "max_position_embeddings": 4096}
    if decoder:
        text |= {"model_type": decoder, "sliding_window": None}
    if name.startswith("qwen"):  # whose tower ends in the decoder's width
        vision = config["vision_config"]
        vision["out_hidden_size" if "out_hidden_size" in vision else "hidden_size"] = width
    for key in ("rope_scaling", "rope_parameters"):
        if "mrope_section" in (text.get(key) or {}):
            text[key]["mrope_section"] = [HEAD // 2 - 2 * (HEAD // 6), HEAD // 6, HEAD // 6]
    path.write_text(json.dumps(config))
    if (base / "video_preprocessor_config.json").exists():
        # vLLM normalises pictures and videos with the pictures' values, which are the same in the public checkpoints.
        pictures = json.loads((base / "preprocessor_config.json").read_text())
        videos = json.loads((base / "video_preprocessor_config.json").read_text())
        same = {key: videos[key] for key in ("image_mean", "image_std")}
        (base / "preprocessor_config.json").write_text(json.dumps(pictures | same))
    torch.manual_seed(0)
    stock = spread_weights(family.stock_class(AutoConfig.from_pretrained(base)).float())
    stock.save_pretrained(base)
    export_model(str(base), folder / "pruned", pruning_ratio=0.75)
    return folder / "pruned"


# LLaVA-1.5 is the root model, which the other tests serve.
NAMES = [name for name, family in FAMILIES.items() if family.pruned_class.__name__ in SERVED and name != "llava"]
NAMES.append("llava_next-mistral")
