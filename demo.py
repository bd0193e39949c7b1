"""Answer a question about a picture without and with pruning, and show what the pruning saved and kept.

`python demo.py [--model FOLDER_OR_ID] [--image FILE] [--question TEXT] [--ratio FRACTION]`; `make demo` sets up an environment
first. The model is a repo made by export.py, or a base checkpoint of a supported family, which is exported to a temporary
folder. Without one it is this repo, whose small model was trained on drawn scenes (training/README.md); the picture is one of
them that it was not trained on.

Times are medians of a few runs after one that is not counted. Decoding is greedy.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

from export import ROOT, Base, config_classes, export_model, own, readable


SCENE = ROOT / "docs" / "scene.png"
SCENE_QUESTION = "What is written on the black sign?"
PICTURE = Path("demo_output") / "kept.png"


@dataclass(frozen=True)
class Run:
    """What `measure` saw of one ratio. Times in seconds; `record` is None when nothing was pruned."""

    answer: str
    prompt_tokens: int
    new_tokens: int
    cache_bytes: int
    first_token: float
    total: float
    record: object


def load_pruned(checkpoint: Base, model: str):
    """The processor and the pruned model of a repo, or of a base checkpoint by way of an export that does not stay."""
    model_type = checkpoint.config().get("model_type")
    if model_type in {config_class.model_type for config_class in config_classes().values()}:
        return load(model)
    with tempfile.TemporaryDirectory(dir=place_for_export(checkpoint), prefix=".demo-") as folder:
        return load(str(export_model(model, Path(folder) / "model", report=lambda line: None)))


def place_for_export(checkpoint: Base) -> Path | None:
    """A folder on the file system of the weights, so that they can be linked; None for the system's temporary folder."""
    beside = checkpoint.folder.parent
    return beside if os.access(beside, os.W_OK) else None


def load(repo: str):
    """The processor and the model, which is in float32 on a CPU and as saved on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=dtype)
    return processor, model.eval().to(device)


def inputs_of(processor, image: Image.Image, question: str):
    """What the model is given of a question about a picture."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def measure(processor, model, inputs, ratio: float, max_new_tokens: int, repeats: int) -> Run:
    """Generate once to warm up, then `repeats` times."""

    def generate(num_tokens: int):
        start = time.perf_counter()
        outputs = model.generate(
            **inputs, pruning_ratio=ratio, max_new_tokens=num_tokens, do_sample=False, return_dict_in_generate=True
        )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, outputs

    cache_of = own("pruned_cache.cache_of")
    _, outputs = generate(max_new_tokens)
    first_token = statistics.median(generate(1)[0] for _ in range(repeats))
    total = statistics.median(generate(max_new_tokens)[0] for _ in range(repeats))
    prompt_tokens = inputs["input_ids"].shape[1]
    new_tokens = outputs.sequences[0, prompt_tokens:]
    return Run(
        answer=processor.decode(new_tokens, skip_special_tokens=True).strip(),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new_tokens),
        cache_bytes=sum(states.nbytes for layer in cache_of(outputs).layers for states in (layer.keys, layer.values)),
        first_token=first_token,
        total=total,
        record=model.get_pruning_record(outputs),
    )


def costs(unpruned: Run, pruned: Run) -> list[tuple[str, str, str, str]]:
    """What was measured, by line: its name, unpruned, pruned, and the change."""
    num_visual, num_kept = pruned.record.num_visual, pruned.record.num_kept
    prompt_length, layer = unpruned.prompt_tokens, pruned.record.images[0].stages[-1][0]
    return [
        compare("visual tokens", num_visual, num_kept, str),
        compare(f"prompt tokens from layer {layer} on", prompt_length, prompt_length - num_visual + num_kept, str),
        compare("KV cache at the end", unpruned.cache_bytes, pruned.cache_bytes, readable),
        compare("time to the first token", unpruned.first_token, pruned.first_token, milliseconds),
        compare("time in all", unpruned.total, pruned.total, milliseconds),
        ("answer's tokens", str(unpruned.new_tokens), str(pruned.new_tokens), ""),
    ]


def table(rows: list[tuple[str, str, str, str]]) -> str:
    rows = [("", "unpruned", "pruned", ""), *rows]
    return "\n".join(f"{name:30} {before:>10} {after:>10} {change:>8}".rstrip() for name, before, after, change in rows)


def compare(name: str, before: float, after: float, text) -> tuple[str, str, str, str]:
    return name, text(before), text(after), f"{after / before - 1:+.0%}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def open_picture(path, most_pixels: int | None = None) -> Image.Image:
    """The picture in a file, upright, in RGB: the first of several, and on white where it is transparent.

    Raises:
        ValueError: if the file holds no picture that can be read, or one of more than `most_pixels`, which is not read.
        OSError: if it cannot be opened.
    """
    try:
        with Image.open(path) as file:
            if most_pixels is not None and file.width * file.height > most_pixels:
                raise ValueError(f"it has {file.width} x {file.height} pixels, and {most_pixels / 1e6:g} million are the most")
            picture = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # of decoders
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    if picture.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def run_demo(arguments: argparse.Namespace) -> None:
    image = open_picture(arguments.image or SCENE)
    model_name = arguments.model or str(ROOT)
    checkpoint = Base.open(model_name)
    print(f"model     {model_name}")
    processor, model = load_pruned(checkpoint, model_name)
    inputs = inputs_of(processor, image, arguments.question).to(model.device)
    ratio = model.config.pruning_ratio if arguments.ratio is None else arguments.ratio
    if model.config.pruning_settings(ratio) is None:
        raise ValueError(f"Nothing would be pruned with pruning_method={model.config.pruning_method!r} and a ratio of {ratio}.")
    unpruned, pruned = (
        measure(processor, model, inputs, each, arguments.max_new_tokens, arguments.repeats) for each in (0.0, ratio)
    )
    print(f"question  {arguments.question}")
    print(f"unpruned  {unpruned.answer or '(no text)'}")
    print(f"pruned    {pruned.answer or '(no text)'}\n")
    print(table(costs(unpruned, pruned)))
    PICTURE.parent.mkdir(exist_ok=True)
    processor.draw_kept_tokens(record=pruned.record, inputs=inputs)[0].save(PICTURE)
    print(f"\nThe tokens that were kept: {PICTURE}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="pruned model repo or base checkpoint, folder or id on the Hub")
    parser.add_argument("--image", help=f"picture file, by default {SCENE.relative_to(ROOT)}")
    parser.add_argument("--question", default=SCENE_QUESTION, help="by default %(default)r")
    parser.add_argument("--ratio", type=float, help="fraction of visual tokens to remove, above 0 and below 1")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        run_demo(arguments)
    except KeyboardInterrupt:
        print("demo.py: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"demo.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
