"""The accuracy benchmark: scoring, averages, intervals, and a run that goes on where it stopped."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from families import FAMILIES
from transformers import LlamaConfig

from benchmarks import accuracy
from benchmarks.accuracy import Configuration, Results, collect_questions, is_right, markdown, relative, scores
from training import scenes
from training.scenes import QUESTION_TYPES
from vlmpruner.configuration_vlmpruner import VLMPrunerLlavaConfig
from vlmpruner.pruning_methods import METHODS


@pytest.mark.parametrize("answer", ["CASTLE", " castle ", "Castle.", '"castle"', "CASTLE\n"])
def test_spelling_does_not_count_but_the_word_does(answer):
    assert is_right(answer, "CASTLE")


@pytest.mark.parametrize("answer", ["", " ", ".", "CASTLES", "CASTL", "the castle", "C A S T L E", "no"])
def test_everything_else_is_wrong(answer):
    assert not is_right(answer, "CASTLE")


def test_number_words_are_numbers():
    assert is_right("three", "3") and is_right("3.", "3")
    assert not is_right("thirteen", "3") and not is_right("33", "3")


def test_questions_are_the_same_number_of_each_type():
    questions = collect_questions(5)
    kinds = [question.kind for _, question in questions]
    assert {kind: kinds.count(kind) for kind in QUESTION_TYPES} == dict.fromkeys(QUESTION_TYPES, 5)
    assert questions[:20] == collect_questions(5)[:20]
    assert all(scene.split == "test" for scene, _ in questions)


@pytest.mark.parametrize(("signs", "missing"), [((2, 4), "read"), ((1, 1), "read_color"), ((0, 0), "read or read_color")])
def test_a_layout_that_never_allows_a_type_is_named(monkeypatch, signs, missing):
    monkeypatch.setitem(scenes.LAYOUTS, "hard_test", replace(scenes.HARD, num_signs=signs))
    monkeypatch.setattr(accuracy, "SCENES_WITHOUT", 60)
    with pytest.raises(
        ValueError, match=f"60 scenes of 'hard_test' in a row, up to seed [0-9]+, have no question of type {missing}:"
    ):
        collect_questions(2, "hard_test")


@pytest.mark.parametrize("number", [0, -1])
def test_no_questions_are_refused(number):
    with pytest.raises(ValueError, match=f"per_type.* >= 1, but is {number}"):
        collect_questions(number)


def test_relative_is_the_mean_of_the_ratios_and_its_interval_holds_it():
    unpruned = {"a": "1111111100", "b": "1111100000"}
    right = {"a": "1111000000", "b": "1111100000"}
    assert scores(right) == {"a": 40, "b": 50}
    middle, low, high = relative(right, unpruned)
    assert middle == pytest.approx((50 + 100) / 2)
    assert low < middle < high
    assert relative(unpruned, unpruned) == (100, 100, 100)  # paired: no difference has no interval


def test_types_that_the_unpruned_model_can_not_answer_are_left_out():
    unpruned = {"a": "1100", "b": "0000"}
    assert relative(unpruned, unpruned)[0] == 100
    assert relative({"a": "1000", "b": "1111"}, unpruned)[0] == 50
    with pytest.raises(ValueError, match="no question right"):
        relative(unpruned, {"a": "0000", "b": "0000"})


def entry(method="vlm_pruner", ratio=0.889, changes=None, blind=False, share="10"):
    counts = {"num_visual": 576.0, "num_kept": 64.0} if ratio else {}
    right = dict.fromkeys(QUESTION_TYPES, share)
    return {"method": method, "ratio": ratio, "changes": changes or {}, "blind": blind, "right": right, "seconds": 1.0} | counts


def test_tables_show_what_was_measured_beside_the_paper():
    results = {
        "unpruned": entry("none", 0, share="11"),
        "random 0.889": entry("random", share="00"),
        "vlm_pruner 0.889": entry(),
        "vlm_pruner 0.889 token_batch=1": entry(changes={"pruning_token_batch": 1}, share="11"),
        "vlm_pruner 0.944 token_batch=1": entry(ratio=0.944, changes={"pruning_token_batch": 1}),
        "vlm_pruner 0.889 num_channels=128": entry(changes={"pruning_num_channels": 128}, share="11"),
        "vlm_pruner 0.889 preset=fine": entry(changes={"pruning_preset": "fine"}, share="11"),
    }
    text = markdown(results, 4096)
    assert "| vlm_pruner | 88.9 % | 64 of 576 | 50.0 |" in text
    labels = [line.split(" | ")[0] for line in text.splitlines() if "64 of 576" in line]
    assert labels == ["| vlm_pruner", "| vlm_pruner, fine", "| random"]
    assert "| value | relative at 88.9 % [95 %] | relative at 94.4 % [95 %] | paper, 88.9 % |" in text
    at_both = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert at_both.startswith("| 1 | 100.0 [100.0, 100.0] | 50.0 [") and at_both.endswith("] | 95.62 |")
    assert "| 128 | 100.0 [100.0, 100.0] | - | 95.25 |" in text  # a 32nd of the channels, as in the paper
    assert "`pruning_num_channels` (128, 256, 512, 1,024 and all of the paper's 4,096, scaled to the 4096 of this" in text
    assert "| 2 | " not in text  # nothing is shown of a value that was not measured


def test_results_of_other_weights_are_refused(tmp_path):
    path = tmp_path / "accuracy.json"
    configuration = Configuration("vlm_pruner", 0.889)
    Results(path, {"weights": "a", "questions": "b"}, {}).add(configuration, {"right": {"read": "1"}})
    assert list(Results(path, {"weights": "a", "questions": "b"}, {}).results) == [configuration.name]
    with pytest.raises(ValueError, match="another weights"):
        Results(path, {"weights": "c", "questions": "b"}, {})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the benchmark with the given options and a model that answers half; returns the names of what all runs measured."""
    measured = []

    def evaluate(model, processor, questions, configuration, batch_size):
        measured.append(configuration.name)
        return {
            key: value for key, value in entry(ratio=configuration.ratio).items() if key in ("right", "num_kept", "num_visual")
        }

    config = VLMPrunerLlavaConfig(text_config=LlamaConfig(hidden_size=192, num_hidden_layers=6))
    model = SimpleNamespace(config=config, model=SimpleNamespace(refuse_unknown_tower=lambda settings: None))
    about = accuracy.environment("cpu") | {"dtype": "float32"}
    monkeypatch.setattr(accuracy, "load", lambda path, device: (model, None, about))
    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    (tmp_path / "config.json").write_text("{}")
    fixed = ["accuracy.py", "--model", str(tmp_path), "--per-type", "1", "--output", str(tmp_path / "accuracy.json")]

    def run_with(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [*fixed, *options])
        accuracy.main()
        return measured

    return run_with


def test_a_second_run_measures_only_what_is_missing(run, tmp_path):
    chosen = ("--methods", "vlm_pruner", "vlm_pruner:fine")
    run(*chosen, "--ratios", "0.889")
    measured = run(*chosen, "--ratios", "0.889", "0.667")
    methods = ["vlm_pruner {}", "vlm_pruner {} preset=fine", "random {}"]
    pruned = [method.format(ratio) for ratio in (0.889, 0.667) for method in methods]
    assert measured == ["unpruned", "unpruned blind", *pruned]
    output = tmp_path / "accuracy.json"
    assert set(json.loads(output.read_text())["results"]) == set(measured)
    assert output.with_suffix(".md").read_text().startswith("Questions of each type: 1. ")
    assert output.with_suffix(".png").exists()


def test_every_method_of_the_registry_is_measured(run):
    measured = run("--ratios", "0.889")
    methods = [method.replace(":", " 0.889 preset=") if ":" in method else f"{method} 0.889" for method in accuracy.METHODS]
    assert measured == ["unpruned", "unpruned blind", *methods]
    assert set(METHODS) <= {method.partition(":")[0] for method in accuracy.METHODS} and methods[-1] == "random 0.889"


@pytest.mark.parametrize(("ratios", "expected"), [((), (0.889, 0.944)), (("0.778",), (0.778,))], ids=["default", "given"])
def test_ablations_are_run_at_the_ratios_asked_for(run, ratios, expected):
    measured = run("--methods", "vlm_pruner", "--ratios", "0.667", "--ablations", *ratios)
    ablated = [name for name in measured if "=" in name]
    values = sum(len(values) for values in accuracy.ABLATIONS.values())
    assert len(ablated) == len(set(ablated)) == len(expected) * values
    assert [name for name in ablated if name.endswith("token_batch=1")] == [
        f"vlm_pruner {ratio} token_batch=1" for ratio in expected
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "vlm_pruner:coarse"), "pruning_preset must be one of"),
        (("--methods", "vlm_pruned"), "pruning_method must be one of"),
        (("--ratios", "0.889", "1"), "pruning_ratio must be a number in [0, 1)"),
    ],
    ids=["preset", "method", "ratio"],
)
def test_a_bad_option_is_named_before_anything_is_measured(run, capsys, options, said):
    with pytest.raises(SystemExit):
        run(*options)
    assert said in capsys.readouterr().err
    assert run("--methods", "random", "--ratios", "0.5") == ["unpruned", "unpruned blind", "random 0.5"]


def test_a_method_is_not_defined_for_a_model_whose_tower_it_does_not_know(capsys, monkeypatch):
    family = FAMILIES["mistral3"]
    model = family.pruned_class.from_pretrained(family.checkpoint)
    assert accuracy.defined_methods(model) == list(accuracy.METHODS)
    monkeypatch.setattr(type(model.model), "tower_blocks", lambda self: None)
    defined, said = accuracy.defined_methods(model), capsys.readouterr().out
    refused = [name for name, method in METHODS.items() if "tower" in method.looks_at]
    assert {"visionzip", "vispruner", "scope", "holov"} <= set(refused)
    assert defined == [method for method in accuracy.METHODS if method.partition(":")[0] not in refused]
    for method in refused:
        assert f"{method} is left out: pruning_method '{method}' looks at the attention in the vision tower" in said
    before = model.config.pruning_method
    with pytest.raises(ValueError, match="tower of type 'pixtral'"), accuracy.configured(model, Configuration("scope", 0.5)):
        pass
    assert model.config.pruning_method == before


def test_a_model_that_wants_the_sizes_of_its_images_is_asked():
    family = FAMILIES["mistral3"]
    model, processor = (what.from_pretrained(family.checkpoint) for what in (family.pruned_class, family.processor_class))
    accuracy.RememberedFeatures(model)
    result = accuracy.evaluate(model.eval(), processor, collect_questions(1)[:2], Configuration("random", 0.5), 2)
    assert result["num_kept"] == pytest.approx(result["num_visual"] / 2, abs=1)


def test_a_folder_without_a_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert f"{tmp_path} holds no config.json" in capsys.readouterr().err
