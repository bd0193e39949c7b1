"""Loads an exported repo the way a user does, and prints what came of it as a last line of JSON. Run by test_export.py as by
`python -I load_repo.py REPO EXPECTED PICTURE`, in an empty folder, with an empty cache of custom code."""

import json
import sys

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)


CODE = (AutoConfig, AutoProcessor, AutoTokenizer, AutoImageProcessor)
MODELS = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def class_name(thing) -> str:
    return f"{type(thing).__module__.split('.')[0]}.{type(thing).__name__}"


def load_all(repo: str) -> dict:
    loaded = {auto.__name__: class_name(auto.from_pretrained(repo, trust_remote_code=True)) for auto in CODE}
    for auto in MODELS:
        model, info = auto.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
        loaded[auto.__name__] = class_name(model)
        loaded[f"{auto.__name__} keys"] = sorted([*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])
    return loaded


def refusals_without_trust(repo: str) -> dict:
    """Error of each way to load without the user's consent; the class where there was none."""
    refusals = {}
    for auto in (AutoConfig, AutoProcessor, *MODELS):
        for name, kwargs in {"unset": {}, "False": {"trust_remote_code": False}}.items():
            try:
                refusals[f"{auto.__name__} {name}"] = class_name(auto.from_pretrained(repo, **kwargs))
            except ValueError as error:
                refusals[f"{auto.__name__} {name}"] = "trust_remote_code" in str(error)
    return refusals


def unpruned(repo: str, expected: dict) -> dict:
    """How far the repo is, unpruned, from what the base model generated when the checkpoint was made."""
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, pruning_ratio=0.0, dtype=torch.float32)
    inputs = {name: value for name, value in expected.items() if name not in ("generated", "step_logits")}
    if "image_grid_thw" in inputs:  # a Qwen model also wants to know which tokens are of an image
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    outputs = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    logits = torch.cat(outputs.logits)
    return {
        "same_tokens": torch.equal(outputs.sequences, expected["generated"]),
        "logits_error": (logits - expected["step_logits"]).abs().max().item(),
        "record": model.get_pruning_record(outputs) is not None,
    }


def through_pipeline(repo: str, picture: str) -> dict:
    pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    content = [{"type": "image", "url": picture}, {"type": "text", "text": "What is this?"}]
    image_token = pipe.processor.image_token
    return {
        "model": class_name(pipe.model),
        "processor": class_name(pipe.processor),
        "chat": pipe(text=[{"role": "user", "content": content}], max_new_tokens=4)[0]["generated_text"][-1]["role"],
        "plain": isinstance(
            pipe(images=picture, text=f"{image_token} What is this?", max_new_tokens=4)[0]["generated_text"], str
        ),
    }


def after_saving(repo: str, picture: str) -> dict:
    """Save model and processor, load both, and compare."""
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    model.save_pretrained("saved")
    processor.save_pretrained("saved")
    saved_model, info = AutoModelForImageTextToText.from_pretrained("saved", trust_remote_code=True, output_loading_info=True)
    saved_processor = AutoProcessor.from_pretrained("saved", trust_remote_code=True)
    text = f"{processor.image_token} What is this?"
    inputs, saved_inputs = (each(Image.open(picture), text, return_tensors="pt") for each in (processor, saved_processor))
    with torch.no_grad():
        outputs, saved_outputs = model(**inputs), saved_model(**saved_inputs)
    return {
        "classes": [class_name(saved_model), class_name(saved_processor)],
        "keys": sorted([*info["missing_keys"], *info["unexpected_keys"]]),
        "ratio": saved_model.config.pruning_ratio,
        "same_logits": torch.allclose(outputs.logits, saved_outputs.logits, rtol=0, atol=1e-5),
        "kept": [(grid.num_kept, grid.num_visual) for grid in saved_outputs.pruning_record],
    }


def main(repo: str, expected: str, picture: str) -> None:
    result = {
        "first": load_all(repo),
        "second": load_all(repo),
        "without_trust": refusals_without_trust(repo),
        "unpruned": unpruned(repo, load_file(expected)),
        "pipeline": through_pipeline(repo, picture),
        "saved": after_saving(repo, picture),
        "project_was_imported": any(name.split(".")[0] == "vlmpruner" for name in sys.modules),
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
