"""The `pruning_*` keys: checked at the door, kept through config.json, refused by name."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from families import DATA
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, PhiConfig, PixtralVisionConfig, Qwen2Config
from transformers.dynamic_module_utils import get_relative_import_files

from vlmpruner import configuration_vlmpruner
from vlmpruner.configuration_vlmpruner import METHODS_WITH, VLMPrunerLlavaConfig
from vlmpruner.modeling_vlmpruner_llava import VLMPrunerLlavaForConditionalGeneration
from vlmpruner.pruned_cache import cache_of
from vlmpruner.pruning_methods import METHODS
from vlmpruner.token_pruning import PruningParameters


ROOT = Path(configuration_vlmpruner.__file__).parent
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}


def config(text_config=None, **keys):
    vision_config = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text_config = text_config or LlamaConfig(**SMALL, num_hidden_layers=4)
    return VLMPrunerLlavaConfig(text_config=text_config, vision_config=vision_config, image_token_index=4, **keys)


def test_defaults_are_the_papers():
    settings = config().pruning_settings()
    assert (settings.ratio, settings.layer, settings.parameters) == (0.889, 2, PruningParameters())


@pytest.mark.parametrize(
    ("key", "value", "legal"),
    [
        ("pruning_ratio", 1.0, r"in \[0, 1\)"),
        ("pruning_ratio", -0.1, r"in \[0, 1\)"),
        ("pruning_ratio", float("nan"), r"in \[0, 1\)"),
        ("pruning_layer", 0, "from 1 to 3"),
        ("pruning_layer", 4, "from 1 to 3"),
        ("pruning_method", "magic", "one of"),
        ("pruning_preset", "best", r"one of \('paper', 'fine'\)"),
        ("pruning_video_scope", "frame", "one of"),
        ("pruning_num_pivots", 0, ">= 1"),
        ("pruning_num_channels", -1, ">= 1"),
        ("pruning_token_batch", 0, ">= 1"),
        ("pruning_threshold", float("inf"), "finite"),
        ("pruning_threshold_step", 0.0, "> 0"),
        ("pruning_spatial_weight", -1.0, ">= 0"),
        ("pruning_aggregation_weight", 1.5, r"in \[0, 1\]"),
    ],
)
def test_a_bad_value_is_named_with_its_range(key, value, legal):
    with pytest.raises(ValueError, match=rf"{key} must be .*{legal}.*{re.escape(repr(value))}"):
        config(**{key: value})
    late = config()
    setattr(late, key, value)
    with pytest.raises(ValueError, match=key):
        late.pruning_settings()
    with pytest.raises(ValueError, match=key):
        VLMPrunerLlavaForConditionalGeneration(late)


def test_a_value_of_the_wrong_type_is_named():
    for key, value in {"pruning_ratio": "half", "pruning_layer": 2.5, "pruning_fill_budget": "yes"}.items():
        with pytest.raises(Exception, match=rf"(?s){key}.*{value}"):
            config(**{key: value})


def test_presets():
    assert config().pruning_preset == "paper" and config(pruning_preset="paper").pruning_parameters() == PruningParameters()
    assert config(pruning_preset="fine").pruning_parameters() == PruningParameters(token_batch=1)


def test_a_key_that_is_set_wins_over_the_preset():
    both = config(pruning_preset="fine", pruning_token_batch=16, pruning_fill_budget=False, pruning_aggregation_weight=0)
    assert both.pruning_parameters() == PruningParameters(fill_budget=False, aggregation_weight=0)
    both.pruning_token_batch = None
    assert both.pruning_parameters().token_batch == 1


def test_an_assigned_preset_counts_from_the_next_call():
    late = config()
    late.pruning_preset = "fine"
    assert late.pruning_settings().parameters.token_batch == 1


def test_a_preset_round_trips_and_can_be_changed_on_loading(tmp_path):
    config(pruning_preset="fine", pruning_num_pivots=6).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["pruning_preset"], written["pruning_num_pivots"], written["pruning_token_batch"]) == ("fine", 6, None)
    reloaded = VLMPrunerLlavaConfig.from_pretrained(tmp_path)
    assert reloaded.pruning_parameters() == PruningParameters(num_pivots=6, token_batch=1)
    changed = VLMPrunerLlavaConfig.from_pretrained(tmp_path, pruning_preset="paper")
    assert changed.pruning_parameters() == PruningParameters(num_pivots=6)


def test_a_file_from_before_the_presets_keeps_its_values(tmp_path):
    config(pruning_token_batch=8, pruning_threshold=0.7).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    del old["pruning_preset"]
    path.write_text(json.dumps(old))
    expected = PruningParameters(token_batch=8, threshold=0.7)
    assert VLMPrunerLlavaConfig.from_pretrained(tmp_path).pruning_parameters() == expected
    assert VLMPrunerLlavaConfig.from_pretrained(tmp_path, pruning_preset="fine").pruning_parameters() == expected


def test_a_key_of_another_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"pruning_num_image_pivots is set to 3, but .*'vlm_pruner'.*belongs to dart"):
        config(pruning_num_image_pivots=3)
    with pytest.raises(ValueError, match=r"pruning_token_batch is set to 1, but .*'fastv'.*belongs to vlm_pruner"):
        config(pruning_method="fastv", pruning_token_batch=1)
    with pytest.raises(ValueError, match=r"pruning_preset must be one of \('paper',\) with pruning_method 'dart'"):
        config(pruning_method="dart", pruning_preset="fine")
    with pytest.raises(ValueError, match=r"pruning_num_image_pivots must be an integer >= 1, but is 0"):
        config(pruning_method="dart", pruning_num_image_pivots=0)
    with pytest.raises(ValueError, match=r"pruning_positions must be one of .*'moved'"):
        config(pruning_positions="moved")
    assert config(pruning_method="none", pruning_num_image_pivots=3).pruning_settings() is None
    assert config(pruning_method="dart", pruning_num_image_pivots=3).pruning_parameters().num_image_pivots == 3


def test_every_method_round_trips_with_its_keys_alone(tmp_path):
    for name, method in METHODS.items():
        own = {f"pruning_{field.name}": field.default for field in fields(method.Parameters)}
        config(pruning_method=name, **own).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert {key: written[key] for key in own} == own
        others = {f"pruning_{field.name}" for other in METHODS.values() for field in fields(other.Parameters)} - set(own)
        assert not others & set(written)
        assert VLMPrunerLlavaConfig.from_pretrained(tmp_path).pruning_settings().parameters == method.Parameters()


def test_methods_that_share_a_key_agree_on_its_type():
    for name, owners in METHODS_WITH.items():
        assert len({field.type for field in owners.values()}) == 1, name


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match=r"pruning_rato.*pruning_ratio"):
        config(pruning_rato=0.5)


@pytest.mark.core
def test_round_trip_through_a_file(family, tmp_path):
    config_class = family.config_class
    config_class.from_pretrained(family.checkpoint, pruning_ratio=0.5, pruning_token_batch=3).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == config_class.model_type == f"vlmpruner_{family.name}"
    assert written["pruning_ratio"] == 0.5 and written["pruning_token_batch"] == 3
    assert set(written["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
    }
    reloaded = config_class.from_pretrained(tmp_path)
    assert reloaded.pruning_settings() == config_class(**written).pruning_settings()
    assert reloaded.pruning_settings().parameters.token_batch == 3


@pytest.mark.once
def test_a_saved_config_copies_each_file_of_its_code_once(tmp_path, monkeypatch):
    copied, copyfile = [], shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda source, copy: copied.append(Path(copy)) or copyfile(source, copy))
    config().save_pretrained(tmp_path)
    by_library = [Path(path).name for path in get_relative_import_files(configuration_vlmpruner.__file__)]  # some of them twice
    assert len(copied) - len(by_library) == len({path.name for path in tmp_path.glob("*.py")} - set(by_library))


def test_another_models_config_is_refused():
    with pytest.raises(ValueError, match=r"'qwen2_vl'.*'llava'"):
        VLMPrunerLlavaConfig.from_pretrained(DATA / "checkpoints" / "qwen2_vl")


@pytest.mark.parametrize(
    "text_config",
    [
        MistralConfig(**SMALL, num_hidden_layers=4, sliding_window=16),
        Qwen2Config(**SMALL, num_hidden_layers=4, use_sliding_window=True, sliding_window=16, max_window_layers=3),
    ],
    ids=["mistral", "qwen2"],
)
def test_a_sliding_window_above_the_pruning_layer_is_refused(text_config):
    with pytest.raises(ValueError, match=r"layer [23] .*sliding_attention \(window 16\)"):
        config(text_config)
    unpruned = config(text_config, pruning_ratio=0.0)
    assert unpruned.pruning_settings() is None
    with pytest.raises(ValueError, match="sliding_attention"):
        unpruned.pruning_settings(pruning_ratio=0.5)


@pytest.mark.parametrize(
    "text_config",
    [
        MistralConfig(**SMALL, num_hidden_layers=4, sliding_window=None),
        Qwen2Config(**SMALL, num_hidden_layers=4),
    ],
    ids=["mistral", "qwen2"],
)
def test_other_language_models_are_pruned(text_config):
    torch.manual_seed(0)
    model = VLMPrunerLlavaForConditionalGeneration(config(text_config)).eval()
    ids = torch.tensor([[5, *[4] * 49, 6, 7]])
    size = model.config.vision_config.image_size
    outputs = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(1, 3, size, size),
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    assert cache_of(outputs).pruning_record.num_kept == round(49 * 0.111)


def test_an_untried_language_model_is_refused():
    with pytest.raises(ValueError, match=r"'phi' are not supported.*llama"):
        VLMPrunerLlavaForConditionalGeneration(config(PhiConfig(**SMALL, num_hidden_layers=4)))


@pytest.mark.parametrize("version", ["5.16.2", "6.0.0"])
def test_another_transformers_is_refused(version, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=rf"transformers>=5.17,<6, but {version}"):
        importlib.reload(configuration_vlmpruner)


def test_the_supported_range_is_stated_the_same_everywhere():
    stated = f">={configuration_vlmpruner.OLDEST_TRANSFORMERS},<{configuration_vlmpruner.FIRST_UNSUPPORTED_TRANSFORMERS}"
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers{stated}" in dependencies
    assert f"transformers{stated}" in (ROOT / "README.md").read_text()
    make = ["make", "--dry-run", "--always-make", "test-oldest"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    recipe = subprocess.run(make, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert f'"transformers=={configuration_vlmpruner.OLDEST_TRANSFORMERS}.*"' in recipe


@pytest.mark.once
def test_a_copied_environment_is_made_anew(tmp_path):
    """In a copied clone it imports the code of the original, and so its tests tested that."""
    for name in ("Makefile", "pyproject.toml", "__init__.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("data", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTEST"))}
    for folder in (".venv", ".venv-5.17"):
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / ".installed").touch()
        python = tmp_path / folder / "bin" / "python"
        for known, is_made in {tmp_path: False, ROOT: True}.items():
            packages = tmp_path / f"packages-{folder}-{is_made}"
            packages.mkdir()
            (packages / "vlmpruner").symlink_to(known)
            python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} -S "$@"\n')
            python.chmod(0o755)
            make = ["make", "--dry-run", f"{folder}/.installed"]
            recipe = subprocess.run(make, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
            assert (f"-m venv --clear {folder}" in recipe) == is_made
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_configuration.py"]
    outcome = subprocess.run(tests, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"These tests are of {tmp_path}, but this Python imports vlmpruner from {ROOT}" in outcome.stderr


def test_a_tower_of_any_picture_size_is_pruned_on_its_own_grids():
    """LLaVA with a Pixtral tower: each picture has its own grid, and a text token ends each of its rows."""
    torch.manual_seed(0)
    vision_config = PixtralVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=128, patch_size=16
    )
    model = VLMPrunerLlavaForConditionalGeneration(
        VLMPrunerLlavaConfig(
            text_config=LlamaConfig(**SMALL, num_hidden_layers=4),
            vision_config=vision_config,
            image_token_index=4,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    ).eval()
    sizes = [(96, 128), (64, 48)]
    rows = [token for height, width in sizes for _ in range(height // 16) for token in [4] * (width // 16) + [9]]
    ids = torch.tensor([[5, *rows, 6]])
    inputs = {"pixel_values": torch.randn(2, 3, 96, 128), "image_sizes": torch.tensor(sizes)}
    with torch.no_grad():
        record = model(ids, **inputs).pruning_record
    assert [(image.grid, image.num_kept) for image in record] == [((6, 8), 5), ((4, 3), 1)]
    assert torch.equal(torch.cat([image.positions for image in record]), (ids[0] == 4).nonzero()[:, 0])
