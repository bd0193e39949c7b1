"""Make a pruned model repo out of a base checkpoint: `python export.py BASE --ratio 0.889 --output DIR`.

The repo holds the base's weights untouched (hard links where the file system allows, so they take no space), its config with
the `pruning_*` keys and an `auto_map` to our code, the Python files that this code needs, processor, tokenizer,
generation config and a model card. It is written next to DIR and renamed at the end, so DIR is a whole repo or not there.

Notable choices:
- The base's code is never run. Our own is loaded the way a user of the repo loads it, by transformers' loader of custom code.
- Tokenizer and processor are written anew, not copied: which tokenizer class the library takes depends on the `model_type`,
  which changes here, so the files name the class that the base was loaded with.
- An export can be exported again: keys that are not given keep the values that they have there.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import transformers
from huggingface_hub import ModelCard, ModelCardData, create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files


ROOT = Path(__file__).resolve().parent
CONFIG, INDEX, SINGLE_SHARD = "config.json", "model.safetensors.index.json", "model.safetensors"
GENERATION_CONFIG, CARD = "generation_config.json", "README.md"
CHAT_TEMPLATES = "additional_chat_templates"
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", CARD]


def own(name: str):
    """`module.name` of this repo, loaded as `trust_remote_code` loads it."""
    return get_class_from_dynamic_module(name, str(ROOT))


def config_classes() -> dict[str, type]:
    """Base model type -> config class, for the families that can be pruned."""
    return own("configuration_vlmpruner.CONFIG_OF_BASE_MODEL")


def pruning_fields():
    """The dataclass fields of the `pruning_*` keys."""
    return fields(own("configuration_vlmpruner.PruningConfig"))


@dataclass(frozen=True)
class Base:
    """A base checkpoint. `folder` holds its small files; the shards of a Hub model come with `fetch_shards`."""

    name: str
    folder: Path
    hub_id: str | None

    @classmethod
    def open(cls, base: str, revision: str | None = None) -> "Base":
        folder = Path(base).expanduser()
        if folder.is_dir():
            return cls(folder.resolve().name, folder.resolve(), None)
        try:
            validate_repo_id(base)
        except HFValidationError:
            raise ValueError(f"{base} is neither a folder nor the id of a model on the Hub.") from None
        return cls(base, Path(snapshot_download(base, revision=revision, allow_patterns=SMALL_FILES)), base)

    def config(self) -> dict:
        path = self.folder / CONFIG
        if not path.is_file():
            raise ValueError(f"{self.name} has no {CONFIG}, so it is no transformers checkpoint.")
        return json.loads(path.read_text(encoding="utf-8"))

    def card_data(self) -> dict:
        """What the front matter of the base's model card states; empty without a card, or with one that can not be read."""
        path = self.folder / CARD
        if not path.is_file():
            return {}
        try:
            return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
        except ValueError:
            return {}

    def shard_names(self) -> list[str]:
        if not (self.folder / INDEX).is_file():
            return [SINGLE_SHARD]
        names = sorted(set(json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{INDEX} of {self.name} names the shard {name!r}, which is not in its folder.")
        return names

    def shard_sizes(self) -> dict[str, int]:
        """Bytes of each shard, without downloading it.

        Raises:
            ValueError: if the checkpoint has no safetensors, or lacks a shard that its index names.
        """
        names = self.shard_names()
        sizes = {name: (self.folder / name).stat().st_size for name in names if (self.folder / name).is_file()}
        if self.hub_id is not None and len(sizes) < len(names):
            files = snapshot_download(self.hub_id, revision=self.folder.name, allow_patterns=names, dry_run=True)
            sizes = {file.filename: file.file_size for file in files}
        missing = [name for name in names if name not in sizes]
        if missing and (self.folder / INDEX).is_file():
            raise ValueError(f"{INDEX} of {self.name} names {len(names)} shards, but {', '.join(missing)} is missing.")
        if missing:
            raise ValueError(f"{self.name} has no safetensors weights (neither {SINGLE_SHARD} nor {INDEX}).")
        return sizes

    def fetch_shards(self) -> dict[str, Path]:
        """Where the file of each shard lies; links, as in the Hub's cache, are followed."""
        names = self.shard_names()
        absent = [name for name in names if not (self.folder / name).is_file()]
        if absent:
            snapshot_download(self.hub_id, revision=self.folder.name, allow_patterns=absent)
        return {name: (self.folder / name).resolve() for name in names}


def export_model(
    base: str | os.PathLike,
    output: str | os.PathLike,
    *,
    force: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    report: Callable[[str], None] = print,
    **pruning,
) -> Path:
    """Write the pruned model repo of `base` to the folder `output`.

    Args:
        base: a folder, or the id of a model on the Hub. May be an export itself.
        output: the folder to make. May exist if it is empty.
        force: replace `output` if it is an earlier export.
        dry_run: report what would be written, and write nothing.
        push_to_hub: id of the model repo to upload `output` to; made where there is none.
        private: whether a repo made there is private.
        revision: branch, tag or commit of a Hub base.
        report: called with each line of progress.
        pruning: `pruning_*` keys of the config, such as `pruning_ratio=0.778`.

    Returns:
        The absolute path of `output`.

    Raises:
        ValueError: for a base that can not be pruned, parameters out of range, or an output that may not be written. Nothing
            is written then.
    """
    if push_to_hub:
        validate_repo_id(push_to_hub)
    report(f"reading {base}")
    checkpoint = Base.open(os.fspath(base), revision)
    output = Path(output).expanduser().resolve()
    check_output(output, checkpoint.folder, force)
    config = pruned_config(checkpoint, pruning)
    sizes = checkpoint.shard_sizes()
    name = push_to_hub or output.name
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            write_small_files(Path(folder), checkpoint, config, name)
            report_plan(output, sizes | file_sizes(Path(folder)), report)
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        # Its own name within the temporary folder: the library names the module of custom code after it.
        staged = Path(beside) / output.name
        staged.mkdir()
        write_small_files(staged, checkpoint, config, name)
        place_shards(staged, checkpoint, sizes, report)
        check_loads(staged, checkpoint.name)
        move_into_place(staged, output, Path(beside) / "replaced")
    report(f"wrote {output}: {describe_pruning(config)}")
    if push_to_hub:
        upload(output, push_to_hub, private, report)
    return output


def pruned_config(checkpoint: Base, pruning: dict):
    """The checkpoint's config in our class, with the keys of `pruning`."""
    content = checkpoint.config()
    by_base_type = config_classes()
    by_type = by_base_type | {config_class.model_type: config_class for config_class in by_base_type.values()}
    model_type = content.get("model_type")
    if model_type not in by_type:
        raise ValueError(f"{checkpoint.name} is a model of type {model_type!r}. Supported are {', '.join(by_base_type)}.")
    if "vision_config" not in content:
        raise ValueError(
            f"{checkpoint.name} is not in transformers' layout: its {CONFIG} has no vision_config. Take a checkpoint made for "
            "transformers (their names often end in -hf)."
        )
    known = [field.name for field in pruning_fields()]
    if unknown := sorted(set(pruning) - set(known)):
        raise ValueError(f"Unknown pruning key {', '.join(unknown)}. Known are {', '.join(known)}.")
    try:
        config = by_type[model_type].from_pretrained(checkpoint.folder, **pruning)
        config.validate_pruning()
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None
    config.architectures = [config.auto_map["AutoModelForImageTextToText"].split(".")[1]]
    return config


def check_output(output: Path, base: Path, force: bool) -> None:
    """Raise a ValueError unless `output` may be written: new, empty, or with `force` an earlier export."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output {output} is a file.")
    for name, folder in {"base": base, "code that exports": ROOT}.items():
        if folder.is_relative_to(output):
            raise ValueError(f"The output {output} would overwrite the {name} in {folder}.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise ValueError(f"The output folder {output} is not empty. Use --force to replace an earlier export.")
    if not is_export(output):
        raise ValueError(f"The output folder {output} holds something else than an export; --force replaces only exports.")


def is_export(folder: Path) -> bool:
    """Whether `folder` holds nothing that an export would not have: our config, and no folders of its own."""
    if not (folder / CONFIG).is_file() or any(path.is_dir() and path.name != CHAT_TEMPLATES for path in folder.iterdir()):
        return False
    try:
        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except ValueError:
        return False
    return model_type in {config_class.model_type for config_class in config_classes().values()}


def write_small_files(folder: Path, checkpoint: Base, config, name: str) -> None:
    """Everything but the shards."""
    config.save_pretrained(folder)
    processor = own(config.auto_map["AutoProcessor"]).from_pretrained(checkpoint.folder, trust_remote_code=False)
    for key in ("is_local", "local_files_only"):  # how this machine found the base, which the library would save
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(folder)
    for path in code_files(config.auto_map):
        shutil.copyfile(path, folder / path.name)
    for optional in (GENERATION_CONFIG, INDEX):
        if (checkpoint.folder / optional).is_file():
            shutil.copyfile(checkpoint.folder / optional, folder / optional)
    (folder / CARD).write_text(model_card(checkpoint, config, name), encoding="utf-8")


def code_files(auto_map: dict[str, str]) -> list[Path]:
    """Our Python files that the classes of `auto_map` need."""
    modules = {ROOT / f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    imported = {Path(path) for module in modules for path in get_relative_import_files(module)}
    return sorted(modules | imported)


def place_shards(folder: Path, checkpoint: Base, sizes: dict[str, int], report: Callable[[str], None]) -> None:
    """Hard-link the shards into `folder`, or copy them where that is not possible."""
    paths = checkpoint.fetch_shards()
    for number, (name, path) in enumerate(paths.items(), start=1):
        progress = f"[{number}/{len(paths)}] {name}, {readable(sizes[name])}"
        try:
            os.link(path, folder / name)
        except OSError:
            report(f"{progress}: copying")
            shutil.copyfile(path, folder / name)
        else:
            report(f"{progress}: linked")


def check_loads(folder: Path, name: str) -> None:
    """Open the repo as a user will, with the model on the meta device, so that only the headers of the shards are read.

    Raises:
        ValueError: if a weight is missing or of another shape, or a shard can not be read.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    if hasattr(config, "quantization_config"):  # opens only with its own package, and some only on a GPU
        return
    try:
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, device_map="meta")
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of {name} do not load: {str(error).replace(str(folder), name)}") from error


def move_into_place(staged: Path, output: Path, replaced: Path) -> None:
    """Rename `staged` to `output`; what was there becomes `replaced`, and comes back if the renaming fails."""
    try:
        if output.exists():
            output.rename(replaced)
        staged.rename(output)
    except BaseException:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise


def upload(folder: Path, repo_id: str, private: bool | None, report: Callable[[str], None]) -> None:
    """Upload an export to the Hub."""
    report(f"uploading {folder} to {repo_id}")
    try:
        address = create_repo(repo_id, private=private, exist_ok=True)
        upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload pruned model")
    except (OSError, ValueError) as error:
        raise OSError(f"{folder} is complete, but uploading it to {repo_id} failed: {error}") from error
    report(f"uploaded {address}")


def model_card(checkpoint: Base, config, name: str) -> str:
    """The text of the model card of a repo called `name`."""
    base_card = checkpoint.card_data()
    base_model = checkpoint.hub_id
    if checkpoint.config()["model_type"] == config.model_type:  # an export: its card tells what it was made of
        base_model = base_card.get("base_model")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model,
        tags=["custom_code", "vlm-pruner"],
        **{key: base_card[key] for key in ("license", "license_name", "license_link") if key in base_card},
    )
    code = own("configuration_vlmpruner.OLDEST_TRANSFORMERS"), own("configuration_vlmpruner.FIRST_UNSUPPORTED_TRANSFORMERS")
    text = CARD_TEXT.format(
        title=name.split("/")[-1],
        base=base_model or checkpoint.name,
        pruning=describe_pruning(config),
        transformers=f"transformers>={code[0]},<{code[1]}",
        name=name,
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def describe_pruning(config) -> str:
    """One clause on what the config prunes."""
    if config.pruning_settings() is None:
        return "pruning is switched off"
    return (
        f"{config.pruning_ratio:.1%} of each image's visual tokens leave at the input of decoder layer {config.pruning_layer}"
    )


# The first two snippets are those that the Hub shows for such a repo.
CARD_TEXT = """
# {title}

{base} with VLM-Pruner ([arXiv 2512.02700](https://arxiv.org/abs/2512.02700)): {pruning}.
The weights are those of the base model. It needs `{transformers}`, `torch`, `torchvision`, `pillow` and `accelerate`.

## Usage

```python
# Use a pipeline as a high-level helper
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{name}", trust_remote_code=True)
messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "image", "url": "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/p-blog/candy.JPG"}},
            {{"type": "text", "text": "What animal is on the candy?"}}
        ]
    }},
]
pipe(text=messages)
```

```python
# Load model directly
from transformers import AutoProcessor, AutoModelForImageTextToText

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
messages = [
    {{
        "role": "user",
        "content": [
            {{"type": "image", "url": "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/p-blog/candy.JPG"}},
            {{"type": "text", "text": "What animal is on the candy?"}}
        ]
    }},
]
inputs = processor.apply_chat_template(
    messages,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)

outputs = model.generate(**inputs, max_new_tokens=40)
print(processor.decode(outputs[0][inputs["input_ids"].shape[-1]:]))
```

## Pruning

All `pruning_*` keys of `config.json` can be edited there, passed to `from_pretrained`, or set on `model.config`. The ratio is
the fraction of visual tokens that is removed; it can be given for one request, and 0 is the base model.

```python
outputs = model.generate(**inputs, max_new_tokens=40, pruning_ratio=0.667, return_dict_in_generate=True)
record = model.get_pruning_record(outputs)
print(f"kept {{record.num_kept}} of {{record.num_visual}} visual tokens")
processor.draw_kept_tokens(messages[0]["content"][0]["url"], record)[0].save("kept.png")
```
"""


def file_sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def report_plan(output: Path, sizes: dict[str, int], report: Callable[[str], None]) -> None:
    report(f"would write {output}:")
    for name, size in sorted(sizes.items()):
        report(f"  {name:40} {readable(size):>9}")
    report(f"  {len(sizes)} files, {readable(sum(sizes.values()))}; weights are hard links where possible")


def readable(size: float) -> str:
    """A number of bytes with a decimal unit."""
    if size < 1000:
        return f"{size} B"
    units = ["kB", "MB", "GB"]
    while (size := size / 1000) >= 1000 and len(units) > 1:
        units.pop(0)
    return f"{size:.1f} {units[0]}"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("base", help="folder, or id of a model on the Hub")
    add("--output", required=True, help="folder to make")
    add("--force", action="store_true", help="replace the output folder if it is an earlier export")
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")
    add("--push-to-hub", metavar="NAME", help="upload the result to this model repo")
    add("--private", action="store_true", default=None, help="make that repo a private one")
    add("--revision", help="branch, tag or commit of a base on the Hub")
    keys = parser.add_argument_group("pruning", "Keys of the config. Those not given keep the base's value, or the default.")
    paper = own("configuration_vlmpruner.PRUNING_PRESETS")["paper"]
    for field in pruning_fields():
        name, default = field.name.removeprefix("pruning_"), field.default
        preset = " with the preset paper" if default is None else ""
        default = getattr(paper, name) if default is None else default
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        flag = "--" + name.replace("_", "-")
        keys.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=f"default: {default}{preset}", **kind)
    return parser


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception, so that it cleans up
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        export_model(**vars(argument_parser().parse_args()))
    except KeyboardInterrupt:
        print("export.py: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"export.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
