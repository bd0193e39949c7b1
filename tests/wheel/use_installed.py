"""What a user does with the installed package, in an empty folder: prune a stock model, export it, load the export."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import vlmpruner


BASE, EXPORT = "base", "exported"
WORDS = ["<unk>", "<pad>", "<image>", "what", "is", "this"]


def save_base() -> LlavaForConditionalGeneration:
    """A stock LLaVA with random weights and a processor, in the folder BASE."""
    size = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, num_hidden_layers=2, image_size=56, patch_size=14, projection_dim=32),
        text_config=LlamaConfig(**size, num_hidden_layers=4, vocab_size=len(WORDS), pad_token_id=1),
        image_token_index=WORDS.index("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(BASE)
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    sides = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    LlavaProcessor(
        CLIPImageProcessor(**sides),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(BASE)
    return model


def inputs_of(name: str, **options):
    processor = AutoProcessor.from_pretrained(name, **options)
    picture = Image.effect_mandelbrot((56, 56), (-2, -1.5, 1, 1.5), 90).convert("RGB")
    return processor(images=picture, text="<image> what is this", return_tensors="pt")


@torch.no_grad()
def main() -> None:
    assert Path(vlmpruner.__file__).is_relative_to(sys.prefix), vlmpruner.__file__
    for name in vlmpruner.__all__:
        getattr(vlmpruner, name)

    model, inputs = save_base(), inputs_of(BASE)
    unpruned = model(**inputs).logits
    vlmpruner.prune(model, ratio=0.75)
    outputs = model(**inputs)
    record = model.get_pruning_record(outputs)
    assert (record.num_visual, record.num_kept) == (16, 4), record
    vlmpruner.unprune(model)
    assert torch.equal(model(**inputs).logits, unpruned)

    command = ["-W", "error::RuntimeWarning", "-m", "vlmpruner.export", BASE, "--ratio", "0.75", "--output", EXPORT]
    subprocess.run([sys.executable, *command], check=True)
    exported = AutoModelForImageTextToText.from_pretrained(EXPORT, trust_remote_code=True).eval()
    assert torch.equal(exported(**inputs_of(EXPORT, trust_remote_code=True)).logits, outputs.logits)

    for group in ("vllm.general_plugins", "lmms_eval.models"):
        (point,) = entry_points(group=group, name="vlmpruner")
        assert Path(sys.modules[point.load().__module__].__file__).is_relative_to(sys.prefix), point


main()
