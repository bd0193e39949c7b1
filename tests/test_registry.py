"""A family is whole: what it lacks of what CONTRIBUTING.md lists is named here."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import DATA, FAMILIES

from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL, auto_map
from vlmpruner.processing import DrawMixin
from vlmpruner.pruned_decoder import PrunedLayerMixin
from vlmpruner.pruned_model import PrunedForConditionalGenerationMixin, PrunedModelMixin, stock_class


ROOT = Path(__file__).parents[1]
CHECKPOINT = ("config.json", "model.safetensors", "expected.safetensors", "tokenizer_config.json")


def missing_of(config_class) -> list[str]:
    """What the family of a config class lacks."""
    base, missing = config_class.base_model_type, []
    prefix = config_class.auto_map_targets["AutoConfig"].split(".")[1].removesuffix("Config")
    modeling = config_class.auto_map_targets["AutoModelForImageTextToText"].split(".")[0]
    parts = {
        f"{prefix}Config": ("configuration_vlmpruner", object),
        f"{prefix}Model": (modeling, PrunedModelMixin),
        f"{prefix}ForConditionalGeneration": (modeling, PrunedForConditionalGenerationMixin),
        f"{prefix}Processor": ("processing", DrawMixin),
    }
    found = {}
    for name, (module, mixin) in parts.items():
        try:
            part = importlib.import_module(f"vlmpruner.{module}")
        except ModuleNotFoundError:
            missing.append(f"{module}.py for {name}")
            continue
        found[name] = getattr(part, name, None)
        if found[name] is None or not issubclass(found[name], mixin):
            missing.append(f"a class {name} in {module}.py")
        elif name not in part.__all__:
            missing.append(f"{name} in __all__ of {module}.py")
        elif module == modeling and found[name].config_class is not config_class:
            missing.append(f"`config: {config_class.__name__}` in {name}")
        elif module == modeling and stock_class(found[name]).config_class.model_type != base:
            missing.append(f"a class of transformers for {base} as the base of {name}")
    if config_class.model_type != f"vlmpruner_{base}":
        missing.append(f"the model_type vlmpruner_{base}")
    if (model := found.get(f"{prefix}Model")) is not None:
        missing += [f"PrunedLayerMixin in {each}" for each in model.decoder_layers if not issubclass(each, PrunedLayerMixin)]
    if base not in FAMILIES:
        missing.append(f"an entry {base} in FAMILIES of tests/families.py")
    elif (like := FAMILIES[base].like) is not None and (like not in FAMILIES or FAMILIES[like].like is not None):
        missing.append(f"a family of its own as the one that {base} is like, which is {like}")
    missing += [
        f"tests/data/checkpoints/{base}/{name}" for name in CHECKPOINT if not (DATA / "checkpoints" / base / name).is_file()
    ]
    if f"`{prefix}...`" not in (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"):
        missing.append(f"`{prefix}...` in the table of docs/guarantees.md")
    return missing


@pytest.mark.once
@pytest.mark.parametrize("config_class", CONFIG_OF_BASE_MODEL.values(), ids=CONFIG_OF_BASE_MODEL)
def test_a_family_lacks_nothing(config_class):
    assert missing_of(config_class) == []


@pytest.mark.once
def test_what_a_family_lacks_is_named():
    absent = SimpleNamespace(
        base_model_type="absent", model_type="absent", auto_map_targets=auto_map("Absent", "modeling_vlmpruner_absent")
    )
    assert missing_of(absent) == [
        "a class VLMPrunerAbsentConfig in configuration_vlmpruner.py",
        "modeling_vlmpruner_absent.py for VLMPrunerAbsentModel",
        "modeling_vlmpruner_absent.py for VLMPrunerAbsentForConditionalGeneration",
        "a class VLMPrunerAbsentProcessor in processing.py",
        "the model_type vlmpruner_absent",
        "an entry absent in FAMILIES of tests/families.py",
        *(f"tests/data/checkpoints/absent/{name}" for name in CHECKPOINT),
        "`VLMPrunerAbsent...` in the table of docs/guarantees.md",
    ]


@pytest.mark.once
def test_every_entry_of_the_matrix_is_a_family():
    assert set(FAMILIES) <= set(CONFIG_OF_BASE_MODEL)
