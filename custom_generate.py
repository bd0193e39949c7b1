"""Make a repo that prunes the requests of any stock model: `python export.py --custom-generate OUT`.

The Hub has repos of decoding code, which `generate(custom_generate=REPO, trust_remote_code=True)` runs. Relative imports of
such code see one folder alone, so all files lie flat in `custom_generate/`: `generate.py`, and what that imports.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCardData


ROOT = Path(__file__).resolve().parent
FOLDER, FUNCTION, REQUIREMENTS, CARD = "custom_generate", "generate.py", "requirements.txt", "README.md"


def write_custom_generate(output: Path, name: str, own: Callable[[str], object]) -> list[str]:
    """Write the repo.

    Args:
        output: the folder to make. It may be there if it is empty.
        name: of the repo on the Hub, or the path of the folder, for the card.
        own: gives `module.name` of this project.

    Returns:
        The names of the files, with the folder that they are in.

    Raises:
        OSError: if `output` holds something already.
    """
    if output.is_dir() and any(output.iterdir()):
        raise OSError(f"{output} holds something already. Name a folder that is not there yet.")
    folder = output / FOLDER
    folder.mkdir(parents=True)
    code = own("configuration_vlmpruner.code_files")({"": FUNCTION.removesuffix(".py")}, ROOT)
    for path in code:
        shutil.copyfile(path, folder / path.name)
    oldest, newest = (own(f"configuration_vlmpruner.{bound}_TRANSFORMERS") for bound in ("OLDEST", "FIRST_UNSUPPORTED"))
    # transformers reads one bound of each line, before it imports the code.
    lines = [f"transformers>={oldest}", f"transformers<{newest}", "torch>=2.7", "torchvision", "pillow>=11"]
    (folder / REQUIREMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    card = ModelCardData(library_name="transformers", license="apache-2.0", tags=["custom_generate", "vlm-pruner"])
    text = CARD_TEXT.format(
        name=name,
        title=name.split("/")[-1],
        families=", ".join(f"`{model_type}`" for model_type in sorted(own("configuration_vlmpruner.CONFIG_OF_BASE_MODEL"))),
        methods=", ".join(f"`{method}`" for method in own("configuration_vlmpruner.METHODS")),
        transformers=f"transformers>={oldest},<{newest}",
        code=", ".join(f"`{path.name}`" for path in code),
    )
    (output / CARD).write_text(f"---\n{card.to_yaml()}\n---\n{text}", encoding="utf-8")
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())


CARD_TEXT = """
# {title}

Decoding code that prunes visual tokens: VLM-Pruner ([arXiv 2512.02700](https://arxiv.org/abs/2512.02700)) and other methods,
for any model of transformers of the families below. There are no weights here, and nothing has to be exported.

## Usage

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

base = "llava-hf/llava-1.5-7b-hf"
model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(base)
content = [{{"type": "image", "url": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)

outputs = model.generate(
    **inputs,
    custom_generate="{name}",
    trust_remote_code=True,
    pruning_ratio=0.889,
    max_new_tokens=50,
    return_dict_in_generate=True,
)
print(processor.decode(outputs.sequences[0], skip_special_tokens=True))
record = outputs.pruning_record
print(f"kept {{record.num_kept}} of {{record.num_visual}} visual tokens")
```

The model is a pruned one during this call alone. Before and after it, it is the stock model, so it has no
`get_pruning_record`; the record is an attribute of the outputs, which needs `return_dict_in_generate=True`. It is None where
nothing was pruned. To go on with the cache of such outputs, pass `custom_generate` again: the stock model can not read a cache
whose layers hold different numbers of tokens. Two threads need a model each.

## What can be set

`pruning_ratio` is the fraction of the visual tokens of each image that is removed, in [0, 1); by default 0.889, and 0 removes
none. `pruning_method` is one of {methods}. Other keys are those of VLM-Pruner's `config.json`, as `pruning_layer=3`, and
`pruning_question`, the text of each row for methods that look at it. A key that is not given has its default.

Supported are the models of transformers with the `model_type` {families}; others are refused by name.
It needs `{transformers}`, as `custom_generate/requirements.txt` says, which the library reads first.

## Code that runs

`trust_remote_code=True` runs these Python files of `custom_generate/`: {code}. They open no connection and evaluate no strings.
Read them, and pin what you have read: `generate` takes `revision`, a commit of this repo.

```python
outputs = model.generate(**inputs, custom_generate="{name}", revision="COMMIT", trust_remote_code=True, pruning_ratio=0.889)
```
"""
