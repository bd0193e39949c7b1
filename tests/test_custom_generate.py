"""A repo of `export.py --custom-generate`: a stock model's request is pruned in a fresh process, and the model is as before."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture
from fresh_python import FreshPython
from huggingface_hub import ModelCard

from vlmpruner import custom_generate, export
from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL, METHODS


NAME = "somebody/pruner"
COMMITS = ("1" * 40, "2" * 40)
# Loads the stock model of the first argument. The others are the repo and the request's keys.
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText

folder, repo, keys = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
inputs = torch.load(f"{folder}/inputs.pt", weights_only=False)
options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
kinds = [type(module) for module in model.modules()]
config = model.config.to_dict()
before = model.generate(**inputs, **options)
pruned = model.generate(**inputs, **options, custom_generate=repo, trust_remote_code=True, **keys)
assert kinds == [type(module) for module in model.modules()] and config == model.config.to_dict()
after = model.generate(**inputs, **options)
assert all(torch.equal(*both) for both in zip(before.logits, after.logits, strict=True))
assert before.keys() == pruned.keys() and not hasattr(model, "get_pruning_record") and "vlmpruner" not in sys.modules
options["return_dict_in_generate"] = options["output_logits"] = False
plain = model.generate(**inputs, **options, custom_generate=repo, trust_remote_code=True, **keys)
assert torch.equal(plain, pruned.sequences)
torch.save([torch.stack(pruned.logits), [image.kept for image in pruned.pruning_record]], f"{folder}/outputs.pt")
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return export.export_custom_generate(tmp_path_factory.mktemp("repos") / "pruner", report=lambda line: None)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Runs SCRIPT in a process of its own. Its Hub's cache holds the repo `NAME` where `hub_cache` put it."""
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    (home / "script.py").write_text(SCRIPT)
    with FreshPython(environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}) as python:

        def run(folder: Path, repo, **keys):
            done = python.run(home / "script.py", folder, repo, json.dumps(keys), cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr
            return torch.load(folder / "outputs.pt")

        run.home = home
        yield run


@pytest.fixture
def hub_cache(repo, fresh):
    """The repo in the Hub's cache at two commits. In the second, which is `main`, the code does not run."""
    cache = fresh.home / "hub" / f"models--{NAME.replace('/', '--')}"
    for commit in COMMITS:
        shutil.copytree(repo, cache / "snapshots" / commit)
    with (cache / "snapshots" / COMMITS[1] / "custom_generate" / "in_place.py").open("a") as file:
        file.write("\nraise RuntimeError('the second commit')\n")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMITS[1])
    return cache


def saved(family, folder: Path) -> dict:
    """A stock model and inputs in a folder, for SCRIPT. Returns the inputs."""
    inputs = make_inputs(family, [([picture(1)], "What is it?"), ([picture(2, 240, 320)], "And what is to be seen here?")])
    load_stock(family).save_pretrained(folder)
    torch.save(dict(inputs), folder / "inputs.pt")
    return inputs


@pytest.mark.parametrize(
    "name, keys",
    [
        ("llava", {"pruning_ratio": 0.75, "pruning_method": "divprune"}),
        ("qwen2_5_vl", {"pruning_ratio": 0.667, "pruning_layer": 3}),
    ],
)
def test_a_request_of_a_stock_model_is_pruned_as_by_our_class(name, keys, repo, fresh, tmp_path):
    family = FAMILIES[name]
    inputs = saved(family, tmp_path)
    logits, kept = fresh(tmp_path, repo, **keys)
    model = load_pruned(family, **keys)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(logits, torch.stack(expected.logits))
    record = model.get_pruning_record(expected)
    assert [each.tolist() for each in kept] == [image.kept.tolist() for image in record] and record.num_kept < record.num_visual


def test_a_commit_of_the_hub_is_pinned(hub_cache, fresh, tmp_path):
    saved(FAMILIES["llava"], tmp_path)
    fresh(tmp_path, NAME, revision=COMMITS[0], pruning_ratio=0.5)
    with pytest.raises(AssertionError, match="the second commit"):
        fresh(tmp_path, NAME, pruning_ratio=0.5)


@pytest.mark.parametrize(
    "keys, error",
    [
        ({"pruning_ratio": 1.5}, r"pruning_ratio must be a number in \[0, 1\).*got 1.5"),
        ({"pruning_lair": 3}, "Unknown key 'pruning_lair'"),
        ({"pruning_question": "What?"}, "pruning_question is given, but pruning_method is 'vlm_pruner'"),
    ],
)
@pytest.mark.once
def test_a_bad_key_is_named_and_leaves_the_stock_model(keys, error, repo):
    family = FAMILIES["llava"]
    model, inputs = load_stock(family), make_inputs(family, [([picture(1)], "What is it?")])
    with pytest.raises(ValueError, match=error):
        model.generate(**inputs, custom_generate=str(repo), trust_remote_code=True, max_new_tokens=2, **keys)
    assert type(model) is family.stock_class


@pytest.mark.once
def test_ratio_and_question_of_a_request(repo):
    """An argument goes before the generation config, a question to the method that looks at it, 0 prunes nothing."""
    family = FAMILIES["llava"]
    model, inputs = load_stock(family), make_inputs(family, [([picture(1)], "What is it?")])

    def record(**keys):
        options = {"custom_generate": str(repo), "trust_remote_code": True, "return_dict_in_generate": True}
        return model.generate(**inputs, **options, max_new_tokens=2, **keys).pruning_record

    assert record(pruning_ratio=0) is None
    assert record(pruning_ratio=0.5).num_kept > record().num_kept
    asks = [method for method, each in METHODS.items() if "question" in each.looks_at]
    for method in asks[:1]:
        assert record(pruning_method=method, pruning_question="What is it?").num_kept > 0


@pytest.mark.once
def test_the_files_are_those_that_imports_name(repo):
    folder = repo / "custom_generate"
    modeling = {each.split(".")[0] for config in CONFIG_OF_BASE_MODEL.values() for each in config.auto_map_targets.values()}
    names = {path.stem for path in folder.glob("*.py")}
    assert modeling <= names and "custom_generate" not in names and "export" not in names
    for path in folder.glob("*.py"):
        imported = re.findall(r"^\s*from \.(\w+) import", path.read_text(), re.MULTILINE)
        assert {*imported} <= names, path.name
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines[:2] == ["transformers>=5.17", "transformers<6"]


@pytest.mark.once
def test_the_card(repo):
    card = ModelCard.load(repo / "README.md")
    assert "custom_generate" in card.data.tags
    assert all(f"`{name}`" in card.text for name in [*CONFIG_OF_BASE_MODEL, *METHODS])
    assert 'revision="COMMIT"' in card.text


@pytest.mark.once
def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        return export.main()

    uploaded = []
    monkeypatch.setattr(export, "upload", lambda *arguments: uploaded.append(arguments))
    assert run("--custom-generate", tmp_path / "out", "--push-to-hub", NAME) == 0
    (folder, names, repo_id, *_) = uploaded[0]
    assert repo_id == NAME and f'custom_generate="{NAME}"' in (folder / "README.md").read_text()
    assert {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"} <= {*names}
    assert run("--custom-generate", tmp_path / "out") == 2 and "holds something already" in capsys.readouterr().err
    assert run("BASE", "--custom-generate", tmp_path / "other", "--ratio", "0.5") == 2
    assert "does not go with base, pruning_ratio" in capsys.readouterr().err
    assert not (tmp_path / "other").exists() and custom_generate.FUNCTION == "generate.py"
