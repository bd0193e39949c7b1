"""The model and the task for lighteval. Skipped where it is not installed: `pip install -e ".[lighteval]"`."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from families import FAMILIES, picture, small_checkpoint


pytest.importorskip("lighteval.models", reason="lighteval is not installed")  # `lighteval` is a folder of benchmarks/, too
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """One of lighteval's own tasks downloads a file when it is imported, and all of them are."""
    monkeypatch.setattr(requests, "get", lambda url: SimpleNamespace(status_code=404))


def model_of(arguments: str):
    path = ROOT / "benchmarks" / "lighteval" / "model.py"
    spec = importlib.util.spec_from_file_location("custom_model_module", path)  # as lighteval does
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VLMPruner(SimpleNamespace(model_name=arguments))


def docs(number: int) -> list:
    from lighteval.tasks.requests import Doc

    pictures = [picture(seed, 140, 112) for seed in range(number)]
    questions = ("What is it?", "And here, what is there to be seen?", "Why?")
    return [
        Doc(query=text, choices=[""], gold_index=0, images=[image], generation_size=4, num_samples=1)
        for text, image in zip(questions, pictures, strict=False)
    ]


def test_the_page_s_command_scores_the_scenes(tmp_path, monkeypatch):
    from lighteval.__main__ import app
    from typer.testing import CliRunner

    page = (ROOT / "docs" / "evaluation.md").read_text()
    (command,) = re.findall(r"^lighteval custom .*?(?=^```)", page, re.MULTILINE | re.DOTALL)
    command = (
        command.replace("\\\n", " ").replace("results/lighteval", str(tmp_path)).replace("--max-samples 4", "--max-samples 1")
    )
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output[-3000:]
    (path,) = tmp_path.rglob("results_*.json")
    found = json.loads(path.read_text())
    assert len([name for name in found["results"] if name.startswith("vlmpruner_scenes:")]) == 8  # seven types, their average
    assert found["results"]["all"]["right"] >= 5 / 7
    settings = found["config_general"]["model_config"]
    assert settings["pruning_ratio"] == 0.889
    assert settings["kept"]["visual_tokens"] == 576 and settings["kept"]["tokens_kept"] == 64


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "smolvlm"])
def test_answers_in_batches_are_those_alone(name):
    arguments = f"model_name={small_checkpoint(FAMILIES[name])},pruning_ratio=0.889,pruning_method=dart,dtype=float32"
    alone, together = model_of(arguments), model_of(f"{arguments},batch_size=3")
    assert type(alone.model) is FAMILIES[name].pruned_class and alone.model.config.pruning_method == "dart"
    answers = [[response.text for response in model.greedy_until(docs(3))] for model in (alone, together)]
    assert answers[0] == answers[1]


def test_an_unpruned_answer_is_no_score():
    model = model_of(f"model_name={small_checkpoint(FAMILIES['llava'])},pruning_ratio=0.889,dtype=float32")
    generate = model.model.generate
    model.model.generate = lambda **inputs: generate(**inputs, pruning_ratio=0.0)
    with pytest.raises(RuntimeError, match="image 0 of a batch should not be left unpruned"):
        model.greedy_until(docs(1))


def test_bad_arguments_are_named():
    path = small_checkpoint(FAMILIES["llava"])
    for arguments, message in (
        ("", "pruning_ratio\n  Field required"),
        (",pruning_ratio=1", "Input should be less than 1"),
        (",pruning_ratio=0.5,prunning_method=fastv", "prunning_method\n  Extra inputs are not permitted"),
        (",pruning_ratio=0.5,pruning_method=fastvv", "pruning_method must be one of .* got 'fastvv'"),
    ):
        with pytest.raises(ValueError, match=message):
            model_of(f"model_name={path}{arguments}")
