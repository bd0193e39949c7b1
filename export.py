"""Make a pruned model repo out of a base checkpoint: `python export.py BASE --ratio 0.889 --output DIR`.
And back: `python export.py PRUNED --to-base --output DIR`. A repo without weights, for the requests of any stock model:
`python export.py --custom-generate DIR`.

The repo holds the base's weights untouched (hard links where the file system allows, so they take no space), its config with
the `pruning_*` keys and an `auto_map` to our code, the Python files that this code needs, processor, tokenizer,
generation config and a model card. It is written next to DIR and renamed at the end, so DIR is a whole repo or not there.

Notable choices:
- The base's code is never run, and no file is read that lies outside of the base's folder and the Hub's cache. Our own code is
  loaded the way a user of the repo loads it, by transformers' loader of custom code.
- Tokenizer and processor are written anew, not copied: which tokenizer class the library takes depends on the `model_type`,
  which changes here, so the files name the class that the base was loaded with.
- An export can be exported again: keys that are not given keep the values that they have there.
- A checkpoint of LLaVA's own code (`original_llava.py`) is translated: its weights are renamed while they are copied.
- `--force` deletes nothing but what an export wrote: each lists its files, with size and time, in `.vlmpruner_export.json`.
"""

# ruff: noqa: E402 - an interruption is one line from here on, also during the imports, which take seconds

import os
import signal
import sys


def stop_imports(*_) -> None:
    print("export.py: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # nothing is written yet, and an exception would be caught and wrapped by some of what is imported


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_imports)

import argparse
import ctypes
import errno
import hashlib
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import cache
from glob import escape
from pathlib import Path

import torch
import transformers
import yaml
from huggingface_hub import (
    ModelCardData,
    constants,
    create_repo,
    metadata_load,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent

if __package__:
    from . import custom_generate, original_llava
else:
    sys.path += [] if str(ROOT) in sys.path else [str(ROOT)]  # isolated, Python leaves a script's folder out
    import custom_generate
    import original_llava

CONFIG, INDEX, SINGLE_SHARD = "config.json", "model.safetensors.index.json", "model.safetensors"
GENERATION_CONFIG, CARD = "generation_config.json", "README.md"
CHAT_TEMPLATES = "additional_chat_templates"
MANIFEST = ".vlmpruner_export.json"
REPLACED = "replaced"
LICENSE_KEYS = ("license", "license_name", "license_link")
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
]
IMAGE_FILES = ["preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"]
TEMPLATE_FILES = ["chat_template.jinja", "chat_template.json"]
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", CARD]
MOST_LAYERS = 1000  # more than any model has; a config can ask for a number that takes forever to build


@cache
def own(name: str):
    """`module.name` of this repo, loaded as `trust_remote_code` loads it; once, since the library reads all files each time."""
    return get_class_from_dynamic_module(name, str(ROOT))


def config_classes() -> dict[str, type]:
    """Base model type -> config class, for the families that can be pruned."""
    return own("configuration_vlmpruner.CONFIG_OF_BASE_MODEL")


def pruning_fields():
    """The dataclass fields of the `pruning_*` keys."""
    return fields(own("configuration_vlmpruner.PruningConfig"))


def check_path(path: str | os.PathLike) -> None:
    """Raise a ValueError for a path that is no UTF-8, by which the tokenizers library reads and writes no file."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        name = os.fsencode(path)
        raise ValueError(f"The path {name!r} is no UTF-8, and tokenizers need one that is: choose another.") from None


@dataclass(frozen=True)
class Base:
    """A base checkpoint. `folder` holds its small files; the shards of a Hub model come with `fetch_shards`."""

    name: str
    folder: Path
    hub_id: str | None

    @classmethod
    def open(cls, base: str, revision: str | None = None) -> "Base":
        check_path(base)
        folder = Path(base).expanduser()
        if folder.is_dir():
            checkpoint = cls(folder.resolve().name, folder.resolve(), None)
        else:
            try:
                validate_repo_id(base)
            except HFValidationError:
                raise ValueError(f"{base} is neither a folder nor the id of a model on the Hub.") from None
            checkpoint = cls(base, Path(snapshot_download(base, revision=revision, allow_patterns=SMALL_FILES)).resolve(), base)
        checkpoint.check_small_files()
        return checkpoint

    def check_small_files(self) -> None:
        """Check what the library will read: where links lead, that JSON files hold objects, and that templates are text.

        Raises:
            ValueError: naming the file.
        """
        templates = self.folder / CHAT_TEMPLATES
        self.target(templates)
        for path in [*self.folder.iterdir(), *(templates.iterdir() if templates.is_dir() else [])]:
            if any(fnmatch(path.name, pattern) for pattern in SMALL_FILES):
                self.target(path)
            if path.suffix == ".jinja" and path.is_file():
                try:
                    path.read_text(encoding="utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path.name} of {self.name} can not be read as text: {error}.") from None
        for name in (CONFIG, GENERATION_CONFIG, INDEX, *TOKENIZER_FILES, *IMAGE_FILES, *TEMPLATE_FILES):
            if name.endswith(".json") and (self.folder / name).is_file():
                self.read_json(name)

    def target(self, path: Path) -> Path:
        """Where `path` in the folder lies when links are followed.

        Raises:
            ValueError: if that is neither in the folder nor among the files of the Hub's cache.
        """
        try:
            target = path.resolve()
        except (OSError, RuntimeError):
            raise ValueError(f"{path.name} of {self.name} is a link in a circle.") from None
        blobs = self.folder.parent.parent / "blobs"  # of this repo, if the folder is a snapshot in the Hub's cache
        in_snapshot = self.folder.parent.name == "snapshots" and target.is_relative_to(blobs)
        in_cache = target.parent.name == "blobs" and target.is_relative_to(Path(constants.HF_HUB_CACHE).resolve())
        if not (target.is_relative_to(self.folder) or in_snapshot or in_cache):
            raise ValueError(
                f"{path.name} of {self.name} is a link to {target}, which is neither in its folder nor in the Hub's cache. "
                "Copy the file there if it belongs to the model."
            )
        return target

    def read_json(self, name: str) -> dict:
        """The JSON object in the file `name`."""
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} of {self.name} can not be read as JSON: {error}.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{name} of {self.name} must hold a JSON object, but holds a {type(content).__name__}.")
        return content

    def config(self) -> dict:
        """The content of `config.json`, of which every layer count and dtype was checked."""
        if (self.folder / "adapter_config.json").is_file() and not (self.folder / CONFIG).is_file():
            raise ValueError(f"{self.name} is an adapter. Merge it (merge_and_unload of peft), save that model, and export it.")
        if not (self.folder / CONFIG).is_file():
            raise ValueError(f"{self.name} has no {CONFIG}, so it is no transformers checkpoint.")
        content = self.read_json(CONFIG)
        if not isinstance(content.get("quantization_config", {}), dict):
            raise ValueError(f"{CONFIG} of {self.name} must have an object as quantization_config.")
        for key, value in entries({key: value for key, value in content.items() if key != "quantization_config"}):
            if re.search("layer|depth", key) and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"{CONFIG} of {self.name} has {key}={value}, but no model has more than {MOST_LAYERS} layers.")
            if key in ("dtype", "torch_dtype") and value is not None and not is_dtype(value):
                raise ValueError(f"{CONFIG} of {self.name} has {key}={value!r}, which is no dtype of torch.")
        return content

    def card_data(self) -> dict:
        """What the front matter of the base's model card states; empty without a card or front matter."""
        path = self.folder / CARD
        if not path.is_file():
            return {}
        try:
            data = metadata_load(path) or {}
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"The front matter of {CARD} of {self.name} can not be read as YAML: {error}.") from None
        for key in ("base_model", *LICENSE_KEYS):
            values = data.get(key, "")
            if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
                raise ValueError(f"The front matter of {CARD} of {self.name} must have text as {key}, got {values!r:.80}.")
        return data

    def weight_map(self) -> dict[str, str] | None:
        """Weight -> shard, or None for a checkpoint of one shard, which has no index.

        Raises:
            ValueError: for an index that is none, or names anything else than safetensors files of its folder.
        """
        if not (self.folder / INDEX).is_file():
            return None
        weight_map = self.read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{INDEX} of {self.name} has no weight_map from the weights to the shards.")
        for name in weight_map.values():
            if not isinstance(name, str) or not re.fullmatch(r"\w[^/\\\0]*\.safetensors", name):
                raise ValueError(f"{INDEX} of {self.name} names the shard {name!r}, which is no *.safetensors of its folder.")
        return weight_map

    def shard_names(self) -> list[str]:
        weight_map = self.weight_map()
        return [SINGLE_SHARD] if weight_map is None else sorted(set(weight_map.values()))

    def shard_sizes(self) -> dict[str, int]:
        """Bytes of each shard, without downloading it.

        Raises:
            ValueError: if the checkpoint has no safetensors, or lacks a shard that its index names.
        """
        names = self.shard_names()
        sizes = {name: self.target(self.folder / name).stat().st_size for name in names if (self.folder / name).is_file()}
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
        return {name: self.target(self.folder / name) for name in names}


@dataclass(frozen=True)
class Translated(Base):
    """`source`, a checkpoint of LLaVA's own code, as one in transformers' layout.

    Its small files are written to a temporary `folder`; the shards stay where they are, and their weights get other names when
    they are placed.
    """

    source: Base
    names: dict[str, str]  # of each weight -> in transformers' layout

    @classmethod
    def of(cls, source: Base, folder: Path) -> "Translated":
        """Raises a ValueError, before anything is downloaded, for what is not understood and for weights that do not fit."""
        content = source.config()
        copied = (GENERATION_CONFIG, CARD, *TOKENIZER_FILES)
        original_llava.write_translated(source.name, content, source.folder, folder, copied)
        translated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = {name: renamed for name, (renamed, _) in original_llava.weights_of(translated).items()}
        if (weight_map := source.weight_map()) is not None:
            original_llava.check_names(source.name, translated, weight_map)
            index = {"metadata": {}, "weight_map": {names[name]: shard for name, shard in weight_map.items()}}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        return cls(source.name, folder, source.hub_id, source, names)

    def shard_sizes(self) -> dict[str, int]:
        return self.source.shard_sizes()

    def fetch_shards(self) -> dict[str, Path]:
        """Raises a ValueError for a shard whose weights are not those of the config, by name and shape."""
        paths = self.source.fetch_shards()
        try:
            original_llava.check_shapes(self.name, self.config(), paths.values())
        except SafetensorError as error:
            raise ValueError(f"A shard of {self.name} is no whole safetensors file: {error}.") from error
        return paths


def in_transformers_layout(source: Base) -> Base:
    """`source`, or its translation where it is of LLaVA's own code. That has a temporary folder for as long as it exists."""
    if not original_llava.is_original(source.config()):
        return source
    folder = Path(tempfile.mkdtemp(prefix="vlmpruner-"))
    try:
        checkpoint = Translated.of(source, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
    return checkpoint


def entries(content) -> Iterator[tuple[str, object]]:
    """Every key of nested JSON with its value."""
    for key, value in content.items() if isinstance(content, dict) else ((None, each) for each in content):
        if isinstance(value, dict | list):
            yield from entries(value)
        elif key is not None:
            yield key, value


def is_dtype(name) -> bool:
    return isinstance(name, str) and isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def export_model(
    base: str | os.PathLike,
    output: str | os.PathLike,
    *,
    to_base: bool = False,
    force: bool = False,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    results: str | os.PathLike | None = None,
    report: Callable[[str], None] = print,
    **pruning,
) -> Path:
    """Write the pruned model repo of `base` to the folder `output`, or with `to_base` the base's repo of a pruned one.

    Args:
        base: a folder, or the id of a model on the Hub. May be an export itself, or what `save_pretrained` wrote of one.
        output: the folder to make. May exist if it is empty.
        to_base: write the repo that the stock classes open: the same weights, processor and tokenizer, without pruning.
        force: replace `output` if it is an earlier export and holds nothing else, nor a file that was changed since.
        dry_run: report what would be written, and write nothing.
        push_to_hub: id of the model repo to upload `output` to; made where there is none.
        private: whether a repo made there is private.
        revision: branch, tag or commit of a Hub base.
        results: JSON that benchmarks/accuracy.py wrote of these weights, whose table goes into the card.
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
    if to_base and results is not None:
        raise ValueError(f"A base model is not pruned, so the results {results} are not of it.")
    for path in (base, output):
        check_path(path)
    report(f"reading {base}")
    source = Base.open(os.fspath(base), revision)
    output = Path(output).expanduser().resolve()
    if not dry_run:
        recover(output, report)
    found = check_output(output, source.folder, force)
    checkpoint = in_transformers_layout(source)
    config = stock_config(checkpoint, pruning) if to_base else pruned_config(checkpoint, pruning)
    sizes = checkpoint.shard_sizes()
    name = push_to_hub or output.name
    measured = "" if results is None else measured_section(Path(results), config)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            write_small_files(Path(folder), checkpoint, config, name, measured, report)
            how = "with other names for the weights" if checkpoint is not source else "weights are hard links where possible"
            report_plan(output, sizes | file_sizes(Path(folder)), how, report)
        return output
    with workspace(output) as beside:
        # Its own name within the temporary folder: the library names the module of custom code after it.
        staged = beside / output.name
        staged.mkdir()
        write_small_files(staged, checkpoint, config, name, measured, report)
        place_shards(staged, checkpoint, sizes, report)
        if results is not None:
            check_measured(Path(results), staged, checkpoint)
        check_shards(staged, checkpoint)
        check_loads(staged, checkpoint.name, config)
        written = write_manifest(staged)
        move_into_place(staged, output, found)
    report(f"wrote {output}: {'the base model, without pruning' if to_base else describe_pruning(config)}")
    if push_to_hub:
        upload(output, written, push_to_hub, private, report)
    return output


def config_class_of(checkpoint: Base) -> type:
    """Our config class for the checkpoint, which may be a base or pruned.

    Raises:
        ValueError: for a model that can not be pruned, or a `config.json` that its class does not read.
    """
    content = checkpoint.config()
    by_base_type = config_classes()
    by_type = by_base_type | {config_class.model_type: config_class for config_class in by_base_type.values()}
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        raise ValueError(
            f"{checkpoint.name} is a model of type {model_type!r} by its {CONFIG}. Supported are {', '.join(by_base_type)}."
        )
    if "vision_config" not in content:
        raise ValueError(
            f"{checkpoint.name} is not in transformers' layout: its {CONFIG} has no vision_config. Take a checkpoint made for "
            "transformers (their names often end in -hf)."
        )
    read_stock_config(checkpoint, by_type[model_type])
    return by_type[model_type]


def stock_class(our_class: type) -> type:
    """The class of transformers that one of ours extends."""
    return next(each for each in our_class.__mro__ if each.__module__.startswith("transformers."))


def read_stock_config(checkpoint: Base, config_class: type):
    """The checkpoint's config in the base's class, without our keys."""
    stock = stock_class(config_class)
    ours = {"auto_map"} | {field.name for field in fields(config_class)} - {field.name for field in fields(stock)}
    content = {key: value for key, value in checkpoint.config().items() if key not in ours and not key.startswith("pruning_")}
    try:
        return stock.from_dict(deepcopy(content) | {"model_type": config_class.base_model_type})
    except Exception as error:  # of any type: these are values of a file that anyone wrote
        base_type = config_class.base_model_type
        raise ValueError(f"{CONFIG} of {checkpoint.name} is no config of a {base_type} model: {describe(error)}") from error


def pruned_config(checkpoint: Base, pruning: dict):
    """The checkpoint's config in our class, with the keys of `pruning`."""
    config_class = config_class_of(checkpoint)
    known = [field.name for field in pruning_fields()]
    if unknown := sorted(set(pruning) - set(known)):
        raise ValueError(f"Unknown pruning key {', '.join(unknown)}. Known are {', '.join(known)}.")
    try:
        config = config_class.from_pretrained(checkpoint.folder, **pruning)
        config.validate_pruning()
    except StrictDataclassError as error:
        raise ValueError(describe(error)) from None
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{CONFIG} of {checkpoint.name} can not be read: {describe(error)}") from error
    config.architectures = [config.auto_map["AutoModelForImageTextToText"].split(".")[1]]
    config.auto_map["AutoProcessor"] = processor_reference(checkpoint, config_class)
    return config


def processor_reference(checkpoint: Base, config_class: type) -> str:
    """`module.Class` of our processor for the checkpoint.

    Raises:
        ValueError: for one with a processor that we do not have.
    """
    files = (name for name in own("processing.PROCESSOR_FILES") if (checkpoint.folder / name).is_file())
    try:
        processor_class = own("processing.processor_class_of")(config_class, map(checkpoint.read_json, files))
    except ValueError as error:
        raise ValueError(f"{checkpoint.name} can not be exported. {error}") from None
    return f"processing.{processor_class.__name__}"


def stock_config(checkpoint: Base, pruning: dict):
    """The config of the base model that a pruned checkpoint was made of."""
    config_class = config_class_of(checkpoint)
    if checkpoint.config()["model_type"] == config_class.base_model_type:
        raise ValueError(f"{checkpoint.name} is a base model already: its type is {config_class.base_model_type!r}.")
    if pruning:
        raise ValueError(f"A base model has no pruning keys, but got {', '.join(sorted(pruning))} for it.")
    for key in getattr(config_class, "processor_keys", ()):
        if (value := checkpoint.config().get(key)) not in (None, default := getattr(config_class, key)):
            raise ValueError(
                f"{checkpoint.name} has {key}={value!r}, but the stock class knows {default!r} alone and would run it wrongly. "
                "Set pruning_ratio to 0 for the base model."
            )
    config = read_stock_config(checkpoint, config_class)
    config.architectures = [stock_class(own(config_class.auto_map_targets["AutoModelForImageTextToText"])).__name__]
    return config


def is_pruned(config) -> bool:
    """Whether a config is one of ours, and not of a base model."""
    return hasattr(config, "pruning_ratio")


def describe(error: Exception) -> str:
    """What went wrong, for an exception of the library."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return str(cause) if isinstance(cause, ValueError | OSError) else f"{type(cause).__name__}: {cause}"


def check_output(output: Path, base: Path, force: bool) -> tuple[int, int] | None:
    """Raise a ValueError unless `output` may be written: new, empty, or with `force` an earlier export.

    Returns:
        The `identity` of the export that is to be replaced, None without one.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output {output} is a file.")
    for name, folder in {"base": base, "code that exports": ROOT}.items():
        if folder.is_relative_to(output):
            raise ValueError(f"The output {output} would overwrite the {name} in {folder}.")
    if not output.exists() or not any(output.iterdir()):
        return None
    if not force:
        raise ValueError(f"The output folder {output} is not empty. Use --force to replace an earlier export.")
    found = identity(output)
    check_replaceable(output, output)
    return found


def identity(folder: Path) -> tuple[int, int]:
    """Tells a folder from another one that takes its name."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def check_replaceable(folder: Path, output: Path) -> None:
    """Raise a ValueError, which calls it `output`, unless `folder` holds what an export wrote, unchanged, and nothing else."""
    written = files_of_export(folder)
    if written is None:
        raise ValueError(f"The output folder {output} holds something else than an export; --force replaces only exports.")
    kept = []
    for place, folders, files in os.walk(folder):
        names = [str(Path(place, each).relative_to(folder)) for each in files]
        kept += [name for name in names if not is_unchanged(folder / name, written.get(name, 0))]
        names = [str(Path(place, each).relative_to(folder)) for each in folders]
        kept += [name for name in names if name != CHAT_TEMPLATES or (folder / name).is_symlink()]
    if kept:
        first = ", ".join(sorted(kept)[:5]) + (", ..." if len(kept) > 5 else "")
        raise ValueError(
            f"The output folder {output} holds something else than an export wrote there, or it was changed since: {first}. "
            "--force would delete it; move it away, or choose another folder."
        )


def files_of_export(folder: Path) -> dict[str, list[int] | None] | None:
    """What an export wrote to `folder`: name -> size and time, None where that is not known. None if it was no export.

    Exports had no manifest once. They are known by our config and our card, and their files by name.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["files"] | {MANIFEST: None}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError):
        return None
    try:
        checkpoint = Base(folder.name, folder, None)
        content, tags = checkpoint.config(), checkpoint.card_data().get("tags", ())
        if "vlm-pruner" not in tags or content["model_type"] not in {each.model_type for each in config_classes().values()}:
            return None
        code = [path.name for path in own("configuration_vlmpruner.code_files")(content["auto_map"], folder)]
        names = [CONFIG, GENERATION_CONFIG, CARD, INDEX, *TOKENIZER_FILES, *IMAGE_FILES, *TEMPLATE_FILES, *code]
        templates = [f"{CHAT_TEMPLATES}/{path.name}" for path in (folder / CHAT_TEMPLATES).glob("*.jinja")]
        return dict.fromkeys([*names, *templates, *checkpoint.shard_names()])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def is_unchanged(path: Path, written: list[int] | int | None) -> bool:
    """Whether `path` is what an export wrote: `written` as in `files_of_export`, 0 for a file that it did not write."""
    return path.is_file() and not path.is_symlink() and written != 0 and (written is None or fingerprint(path) == written)


def fingerprint(path: Path) -> list[int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def write_manifest(folder: Path) -> list[str]:
    """List the files of `folder` in it, so that a later export knows what it may replace.

    Returns:
        The names.
    """
    files = {name: fingerprint(folder / name) for name in sorted(file_sizes(folder))}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    return list(files)


def write_small_files(folder: Path, checkpoint: Base, config, name: str, measured: str, report: Callable[[str], None]) -> None:
    """Everything but the shards."""
    config.name_or_path = str(ROOT)  # where a config of ours finds the code that it saves: not in the base
    config.save_pretrained(folder)
    write_processor(folder, checkpoint, config, report)
    for optional in (GENERATION_CONFIG, INDEX):
        if (checkpoint.folder / optional).is_file():
            shutil.copyfile(checkpoint.folder / optional, folder / optional)
    for path in folder.glob("*config.json"):
        content = with_own_code(json.loads(path.read_text(encoding="utf-8")), getattr(config, "auto_map", {}))
        if not is_pruned(config):  # a generation config may have such a key
            content = {key: value for key, value in content.items() if not key.startswith("pruning_")}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(checkpoint, config, name, measured), encoding="utf-8")


def with_own_code(content, auto_map: dict[str, str]):
    """Nested JSON of a config without the code that it names, which the library saves as it came, save that of `auto_map`."""
    if isinstance(content, list):
        return [with_own_code(each, auto_map) for each in content]
    if not isinstance(content, dict):
        return content
    kept = {key: with_own_code(value, auto_map) for key, value in content.items() if key != "auto_map"}
    named = content.get("auto_map")
    ours = {auto: name for auto, name in named.items() if auto_map.get(auto) == name} if isinstance(named, dict) else {}
    return kept | ({"auto_map": ours} if ours else {})


def write_processor(folder: Path, checkpoint: Base, config, report: Callable[[str], None]) -> None:
    """Processor and tokenizer, of our class for one of our configs, else of the stock class.

    A tokenizer that the library warns of, and marks so, is mended here. It knows such a tokenizer by the model type and the
    version that `config.json` states, which are others from here on, so that `fix_mistral_regex=True` would do nothing.

    Raises:
        ValueError: naming the files that can not be read.
    """
    if is_pruned(config):
        processor_class = own(config.auto_map["AutoProcessor"])
    else:
        processor_class = stock_class(own(processor_reference(checkpoint, config_classes()[config.model_type])))
    try:
        processor = processor_class.from_pretrained(checkpoint.folder, trust_remote_code=False)
        if getattr(getattr(processor.tokenizer, "backend_tokenizer", None), "fix_mistral_regex", None) is False:
            processor = processor_class.from_pretrained(checkpoint.folder, trust_remote_code=False, fix_mistral_regex=True)
            report(f"the tokenizer of {checkpoint.name} splits words wrongly: mended, as fix_mistral_regex=True does")
        for key in getattr(config, "processor_keys", ()):
            setattr(processor, key, getattr(config, key))
        for key in ("is_local", "local_files_only"):  # how this machine found the base, which the library would save
            processor.tokenizer.init_kwargs.pop(key, None)
        if hasattr(processor.tokenizer, "legacy"):  # of Llama's tokenizer: the library reads it and does not save it
            processor.tokenizer.init_kwargs["legacy"] = processor.tokenizer.legacy
        processor.save_pretrained(folder)
        saved = processor_class.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of any type: these are values of files that anyone wrote
        names = ", ".join(unreadable_files(checkpoint)) or "The (absent) processor files"
        raise ValueError(f"{names} of {checkpoint.name} can not be read: {describe(error)}") from error
    check_tokens(saved.tokenizer, processor.tokenizer, checkpoint.name)


def check_tokens(saved, tokenizer, name: str) -> None:
    """Raise a ValueError where a tokenizer that was saved and read again makes other tokens than `tokenizer`, of `name`."""
    for token in ("", *tokenizer.get_added_vocab()):
        text = f" It's 12345{token} words{token}of\n\n{token}\nKöln,  {token}漢字\u3000{token}."
        ids, saved_ids = tokenizer(text).input_ids, saved(text).input_ids
        if saved_ids != ids:
            raise ValueError(
                f"The tokenizer of {name}, a {type(tokenizer).__name__}, makes {ids} of {text!r}, but {saved_ids} after it was "
                "saved and read again: the library loses one of its settings. Give tokenizer.json all that it does, and "
                "tokenizer_config.json the tokenizer_class 'PreTrainedTokenizerFast'."
            )


def unreadable_files(checkpoint: Base) -> list[str]:
    """The files of that part of the processor that does not load; all of its files if each part loads alone."""
    parts = {AutoTokenizer: TOKENIZER_FILES, AutoImageProcessor: IMAGE_FILES}
    names = []
    for auto, files in parts.items():
        try:
            auto.from_pretrained(checkpoint.folder, trust_remote_code=False)
        except Exception:
            names += files
    return [name for name in names or [*TOKENIZER_FILES, *IMAGE_FILES, *TEMPLATE_FILES] if (checkpoint.folder / name).is_file()]


def place_shards(folder: Path, checkpoint: Base, sizes: dict[str, int], report: Callable[[str], None]) -> None:
    """Hard-link the shards into `folder`, or copy them where that is not possible, or where their weights get other names.
    Nothing in it is overwritten."""
    paths = checkpoint.fetch_shards()
    for number, (name, path) in enumerate(paths.items(), start=1):
        progress = f"[{number}/{len(paths)}] {name}, {readable(sizes[name])}"
        try:
            if isinstance(checkpoint, Translated):
                report(f"{progress}: copying, with other names for the weights")
                original_llava.copy_renamed(path, folder / name, checkpoint.names)
                continue
            os.link(path, folder / name)
        except FileExistsError:
            raise ValueError(f"The shard {name} of {checkpoint.name} has the name of another file of the export.") from None
        except OSError:
            report(f"{progress}: copying")
            with open(path, "rb") as source, open(folder / name, "xb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
        else:
            report(f"{progress}: linked")


def check_shards(folder: Path, checkpoint: Base) -> None:
    """Read the header of each shard, also of a quantized model, which `check_loads` does not open.

    Raises:
        ValueError: for a file that is not safetensors, or lacks a weight that the index places there.
    """
    weight_map = checkpoint.weight_map() or {}
    for name in checkpoint.shard_names():
        try:
            with safe_open(folder / name, framework="pt") as shard:
                found = set(shard.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} of {checkpoint.name} is no whole safetensors file: {error}.") from error
        if absent := sorted(weight for weight, place in weight_map.items() if place == name and weight not in found):
            raise ValueError(f"{INDEX} of {checkpoint.name} places {absent[0]} in {name}, which does not hold it.")


def check_loads(folder: Path, name: str, config) -> None:
    """Open the repo as a user will, with the model on the meta device, so that only the headers of the shards are read.

    Raises:
        ValueError: if a weight is missing or of another shape, or a file does not load.
    """
    trust = {"trust_remote_code": is_pruned(config)}
    files = GENERATION_CONFIG
    try:
        if (folder / GENERATION_CONFIG).is_file():
            GenerationConfig.from_pretrained(folder)
        files = CONFIG
        AutoConfig.from_pretrained(folder, **trust)
        files = f"{CONFIG} and processor files"
        AutoProcessor.from_pretrained(folder, **trust)
        if getattr(config, "quantization_config", None):  # opens only with its own package, and some only on a GPU
            return
        files = f"{CONFIG} and weights"
        _, info = AutoModelForImageTextToText.from_pretrained(folder, device_map="meta", output_loading_info=True, **trust)
    except Exception as error:  # of any type: these are values of files that anyone wrote
        raise ValueError(f"{files} of {name} do not load: {describe(error).replace(str(folder), name)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{files} of {name} do not load: {len(missing)} of the weights are missing, the first is {missing[0]}."
        )


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A folder beside `output` that is removed at the end; made with those above it, of which empty ones are removed again.

    It stays if `output` is gone, because the export that was there may be in it (`recover`).
    """
    made = [each for each in output.parents if not each.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        yield beside
    finally:
        if output.exists() or not (beside / REPLACED).exists():
            shutil.rmtree(beside)
        for each in made:
            with suppress(OSError):
                each.rmdir()


def move_into_place(staged: Path, output: Path, found: tuple[int, int] | None) -> None:
    """Give `staged` the name `output`, and what was there the name REPLACED beside `staged`.

    Args:
        found: the `identity` of the export at `output` that is to be replaced, None if nothing was there.

    Raises:
        ValueError: if what is there is not `found`, or holds anything that no export wrote. It stays then, or comes back.
    """
    if found is None:
        try:
            staged.rename(output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise ValueError(f"Something else has come to {output} during the export; it stays as it is.") from None
        return
    replaced, new = staged.parent / REPLACED, identity(staged)
    with locked(output.parent):
        try:
            if exchange(staged, output):
                staged.rename(replaced)
            else:
                output.rename(replaced)
                staged.rename(output)
            if identity(replaced) != found:
                raise ValueError(f"Another export to {output} has come first; its result stays.")
            check_replaceable(replaced, output)
        except BaseException:
            put_back(next((each for each in (replaced, staged) if each.exists() and identity(each) != new), None), output)
            raise


def put_back(replaced: Path | None, output: Path) -> None:
    """Give what was at `output` its name again, if it lost it."""
    if replaced is None:
        return
    if output.exists() and not exchange(replaced, output):
        output.rename(replaced.with_name("refused"))
    if not output.exists():
        replaced.rename(output)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, so that a kill leaves one or the other. False where the system has no such call."""
    at_cwd, rename_exchange = -100, 2  # of Linux, <fcntl.h> and <linux/fs.h>
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not on this file system, or not in this kernel
        return False
    raise OSError(number, os.strerror(number), str(second))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other exports from renaming in `folder`, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def recover(output: Path, report: Callable[[str], None]) -> None:
    """Put back the export that a killed one had moved away, which can happen where `exchange` is not possible."""
    for beside in sorted(output.parent.glob(f".{escape(output.name)}-*")):
        if (beside / REPLACED).is_dir() and not output.exists():
            (beside / REPLACED).rename(output)
            report(f"put back {output}, which an export that was killed had left in {beside}")
        report(f"{beside} belongs to an export that is running, or was left by one that was killed")


def export_custom_generate(
    output: str | os.PathLike,
    *,
    push_to_hub: str | None = None,
    private: bool | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Write the repo of `custom_generate.py` to the folder `output`. The other arguments and errors are as in `export_model`.

    Returns:
        The absolute path of `output`.
    """
    if push_to_hub:
        validate_repo_id(push_to_hub)
    output = Path(output).expanduser().resolve()
    written = custom_generate.write_custom_generate(output, push_to_hub or str(output), own)
    report(f"wrote {output}: {len(written)} files, for generate(custom_generate=..., trust_remote_code=True)")
    if push_to_hub:
        upload(output, written, push_to_hub, private, report)
    return output


def upload(folder: Path, names: list[str], repo_id: str, private: bool | None, report: Callable[[str], None]) -> None:
    """Upload the files `names` of an export to the Hub."""
    report(f"uploading {folder} to {repo_id}")
    try:
        address = create_repo(repo_id, private=private, exist_ok=True)
        upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            allow_patterns=[escape(name) for name in names],
            commit_message="Upload model",
        )
    except (OSError, ValueError) as error:
        raise OSError(f"{folder} is complete, but uploading it to {repo_id} failed: {error}") from error
    report(f"uploaded {address}")


def measured_section(results: Path, config) -> str:
    """A section of the card: of a table by benchmarks/accuracy.py what is unpruned, of the config's method, and random.

    Raises:
        ValueError: naming the file that is none.
    """
    table = results.with_suffix(".md")
    try:
        heading, _, *lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{table}, the table of the results {results}, can not be read: {error}.") from None
    lines = lines[: lines.index("")] if "" in lines else lines
    if not lines or not lines[0].startswith("| method |"):
        raise ValueError(f"{table} is no table that benchmarks/accuracy.py wrote beside {results}.")
    shown = ("unpruned", config.pruning_method, "random")
    rows = lines[:2] + [line for line in lines[2:] if re.split(r"[|,]", line)[1].strip() in shown]
    return MEASURED_TEXT.format(heading=heading, rows="\n".join(rows))


def check_measured(results: Path, folder: Path, checkpoint: Base) -> None:
    """Raise a ValueError unless `results` were measured with the weights in `folder`."""
    digest = hashlib.sha256()
    for name in checkpoint.shard_names():
        with open(folder / name, "rb") as shard:
            while part := shard.read(1 << 24):
                digest.update(part)
    try:
        measured = json.loads(results.read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{results} is no JSON that benchmarks/accuracy.py wrote: {describe(error)}") from None
    if measured != digest.hexdigest()[:16]:
        raise ValueError(f"The results {results} were measured with other weights than those of {checkpoint.name}.")


def model_card(checkpoint: Base, config, name: str, measured: str = "") -> str:
    """The text of the model card of a repo called `name`, with a section on what was `measured`, if anything was."""
    base_card = checkpoint.card_data()
    base_model = checkpoint.hub_id
    if checkpoint.config()["model_type"].startswith("vlmpruner_"):  # an export: its card tells what it was made of
        base_model = base_card.get("base_model")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model,
        tags=["custom_code", "vlm-pruner"] if is_pruned(config) else None,
        **{key: base_card[key] for key in LICENSE_KEYS if key in base_card},
    )
    title, base = name.split("/")[-1], base_model or checkpoint.name
    if is_pruned(config):
        code = (own(f"configuration_vlmpruner.{bound}_TRANSFORMERS") for bound in ("OLDEST", "FIRST_UNSUPPORTED"))
        text = CARD_TEXT.format(
            title=title,
            base=base,
            pruning=describe_pruning(config),
            transformers="transformers>={},<{}".format(*code),
            stock_class=stock_class(own(config.auto_map["AutoModelForImageTextToText"])).__name__,
            model_type=config.model_type,
            name=name,
            back=(CARD_BACK if getattr(config, "has_stock_video_layout", True) else CARD_NO_WAY_BACK).format(name=name),
            measured=measured,
            code=", ".join(f"`{path.name}`" for path in own("configuration_vlmpruner.code_files")(config.auto_map, ROOT)),
        )
    else:
        text = BASE_CARD_TEXT.format(title=title, source=checkpoint.name, stock_class=config.architectures[0])
    return f"---\n{data.to_yaml()}\n---\n{text}"


def describe_pruning(config) -> str:
    """One clause on what the config prunes."""
    settings = config.pruning_settings()
    if settings is None:
        return "pruning is switched off"
    layers = settings.method_for(config.get_text_config(decoder=True).num_hidden_layers).stage_layers()
    where = f"decoder layer {layers[0]}" if len(layers) == 1 else f"decoder layers {', '.join(map(str, layers))}"
    return f"{config.pruning_ratio:.1%} of each image's visual tokens leave at the input of {where}"


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
processor.draw_kept_tokens(record=record, inputs=inputs)[0].save("kept.png")  # on the pixels that the model saw
```

{measured}## Code that runs

`trust_remote_code=True` runs these Python files of this repo: {code}. They open no connection and evaluate no strings; what is
fetched from the Hub, transformers fetches, as for any model. Read them, and pin what you have read: `revision` takes a commit
of this repo, in `from_pretrained("{name}", trust_remote_code=True, revision="COMMIT")` of model and processor,
and in `pipeline`.

## Without pruning

A stock class, named in code, opens this repo unpruned: `{stock_class}.from_pretrained("{name}")` runs none of
the code here, ignores the `pruning_*` keys, and starts with random weights where the files name them differently, all with a
warning at most. To check what you have: `type(model)` is a `VLMPruner...` class, and the record of a request with an image, as
above, is not None. `model.config.model_type` is `"{model_type}"` in both cases. vLLM serves this repo pruned with the plugin
of VLM-Pruner and refuses it without; `--hf-overrides` with the architecture `{stock_class}` serves the base model, unpruned.
{back}"""

CARD_BACK = """\
For stock classes and other tools, turn this repo back into one of the base model, with the `export.py` of VLM-Pruner:

```bash
python export.py {name} --to-base --output unpruned
```
"""

CARD_NO_WAY_BACK = """\
The stock class also pools videos or places their newlines otherwise than this model was trained with, so there is no repo for
stock classes to turn this one into: set `pruning_ratio` to 0.
"""

MEASURED_TEXT = """## Measured

{heading} Scores in percent on drawn scenes, `benchmarks/accuracy.py` of VLM-Pruner; `relative` is the mean over the types of
score / unpruned score with its 95 % interval, and `random` keeps as many tokens drawn at random.

{rows}

"""

BASE_CARD_TEXT = """
# {title}

The weights, processor and tokenizer of {source}, without VLM-Pruner, as `{stock_class}` of transformers opens them. No custom
code is needed, and nothing is pruned.
"""


def file_sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def report_plan(output: Path, sizes: dict[str, int], how: str, report: Callable[[str], None]) -> None:
    report(f"would write {output}:")
    for name, size in sorted(sizes.items()):
        report(f"  {name:40} {readable(size):>9}")
    report(f"  {len(sizes)} files, {readable(sum(sizes.values()))}; {how}")


def readable(size: float) -> str:
    """A number of bytes with a decimal unit."""
    if size < 1000:
        return f"{size} B"
    units = ["kB", "MB", "GB"]
    while (size := size / 1000) >= 1000 and len(units) > 1:
        units.pop(0)
    return f"{size:.1f} {units[0]}"


def add_pruning_keys(parser, config_class: type, methods_with: dict[str, dict]) -> None:
    """Give a parser, or a group of its arguments, an option for each `pruning_` key, without a default.

    Args:
        config_class: `PruningConfig`.
        methods_with: `METHODS_WITH` beside it.
    """
    for field in fields(config_class):
        name, default = field.name.removeprefix("pruning_"), field.default
        owners = methods_with[name] if default is None else {}
        preset = f" with {', '.join(owners)} and the preset paper" if owners else ""
        default = next(iter(owners.values())).default if owners else default
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=f"default: {default}{preset}", **kind)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("base", nargs="?", help="folder, or id of a model on the Hub")
    add("--output", help="folder to make")
    add("--custom-generate", metavar="OUTPUT", help="instead of a model, make a repo for generate(custom_generate=...)")
    add("--to-base", action="store_true", help="make the base's repo, for the stock classes, of a pruned one")
    add("--force", action="store_true", help="replace the output folder if it is an earlier export and holds nothing else")
    add("--dry-run", action="store_true", help="print what would be written, and write nothing")
    add("--push-to-hub", metavar="NAME", help="upload the result to this model repo")
    add("--private", action="store_true", default=None, help="make that repo a private one")
    add("--revision", help="branch, tag or commit of a base on the Hub")
    add("--results", metavar="FILE", help="put the table of this JSON of benchmarks/accuracy.py into the card")
    keys = parser.add_argument_group("pruning", "Keys of the config. Those not given keep the base's value, or the default.")
    add_pruning_keys(keys, own("configuration_vlmpruner.PruningConfig"), own("configuration_vlmpruner.METHODS_WITH"))
    return parser


def run(parser: argparse.ArgumentParser) -> None:
    """Do what the command line says."""
    arguments = vars(parser.parse_args())
    output = arguments.pop("custom_generate")
    if output is None:
        if missing := [name for name in ("base", "output") if arguments[name] is None]:
            parser.error(f"the following arguments are required: {', '.join(missing).replace('output', '--output')}")
        export_model(**arguments)
        return
    allowed = {"push_to_hub", "private"}
    if others := sorted(key for key, value in arguments.items() if key not in allowed and value not in (None, False)):
        raise ValueError(
            f"--custom-generate makes a repo without weights and keys, so it does not go with {', '.join(others)}."
        )
    export_custom_generate(output, **{key: arguments[key] for key in allowed})


def main() -> int:
    try:
        if signal.getsignal(signal.SIGINT) is stop_imports:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception, so that it cleans up
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        run(argument_parser())
    except KeyboardInterrupt:
        print("export.py: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"export.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
