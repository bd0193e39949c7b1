"""Loads a pruned model for an evaluation, and makes sure that what is scored is what it is called.

The classes are those of the installed package `vlmpruner`, found by the `model_type`, so no code of the repo is run, and a base
checkpoint needs no export: `llava-hf/llava-1.5-7b-hf` and what export.py made of it give the same scores.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL, PruningConfig
from vlmpruner.processing import PROCESSOR_FILES, processor_class_of
from vlmpruner.pruned_cache import PruningRecord


PRUNING_KEYS = tuple(field.name for field in fields(PruningConfig))


def load(pretrained: str, revision: str | None = None, processor_options: dict | None = None, **options) -> tuple:
    """The pruned model in evaluation mode and its processor.

    Args:
        pretrained: folder or Hub id of a base checkpoint of a supported family, or of a pruned repo.
        revision: of the Hub id.
        processor_options: go to the processor's `from_pretrained`.
        options: go to the model's: `pruning_*` keys, dtype and so on.

    Raises:
        ValueError: for a model of another family, or with an unknown processor, and what the config says about a bad
            `pruning_*` key.
    """
    hub = {} if revision is None else {"revision": revision}
    model_type = PreTrainedConfig.get_config_dict(pretrained, **hub)[0].get("model_type")
    config_class = next((c for c in CONFIG_OF_BASE_MODEL.values() if model_type in (c.model_type, c.base_model_type)), None)
    if config_class is None:
        raise ValueError(
            f"{pretrained} holds a model of type {model_type!r}. Supported are {', '.join(CONFIG_OF_BASE_MODEL)}, as base "
            "models and as pruned ones."
        )
    processor_class = processor_class_of(config_class, _processor_files(pretrained, hub))
    module, name = config_class.auto_map_targets["AutoModelForImageTextToText"].split(".")
    model_class = getattr(import_module(f"vlmpruner.{module}"), name)
    model = model_class.from_pretrained(pretrained, **hub, **options).eval()
    # Else the library asks at the terminal whether to run the repo's code, to read the config that its tokenizer does not need.
    options = {"trust_remote_code": False} | (processor_options or {})
    return model, processor_class.from_pretrained(pretrained, **hub, **options)


def _processor_files(pretrained: str, hub: dict) -> Iterator[dict]:
    for name in PROCESSOR_FILES:
        try:
            yield json.loads(Path(cached_file(pretrained, name, **hub)).read_text(encoding="utf-8"))
        except OSError:  # there is none
            continue


def check_record(record: PruningRecord | None, num_of_modality: dict[str, int], should_prune: bool) -> None:
    """Raise a RuntimeError unless each image and video of a request was pruned, or none where none should be.

    Args:
        record: of the request.
        num_of_modality: "image" and "video" -> how many of them it has.
        should_prune: whether the settings prune at all.
    """
    given = {(modality, number) for modality, count in num_of_modality.items() for number in range(count)}
    pruned = set() if record is None else {(entry.modality, entry.image) for entry in record}
    expected = given if should_prune else set()
    if pruned != expected:
        what = "left unpruned" if should_prune else "pruned"
        named = ", ".join(f"{modality} {number}" for modality, number in sorted(pruned ^ expected))
        raise RuntimeError(f"{named} of a batch should not be {what}. A score of these answers would have the wrong name.")
    if pruned and record.num_kept >= record.num_visual:
        raise RuntimeError(
            f"All {record.num_visual} visual tokens of a batch were kept, so a score of it would not be of a pruned model."
        )


def tokens_kept(records: Sequence[PruningRecord], num_layers: int) -> dict[str, float]:
    """Means over the grids of the records: `visual_tokens` on a grid, and how many of them a decoder layer sees, `tokens_kept`
    over the layers from the first pruning layer on (the budget), `tokens_kept_all_layers` over all layers."""
    entries = [entry for record in records for entry in record]
    if not entries:
        return {}
    sums = {
        "visual_tokens": sum(entry.num_visual for entry in entries),
        "tokens_kept": sum(entry.mean_kept(num_layers) for entry in entries),
        "tokens_kept_all_layers": sum(entry.mean_kept(num_layers, first=0) for entry in entries),
    }
    return {name: total / len(entries) for name, total in sums.items()}
