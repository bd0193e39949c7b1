"""Evaluation by other harnesses: what can be tested without them. The plugin for lmms-eval: tests/lmms_eval_plugin."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, reproduce
from benchmarks.reproduce import Run
from vlmpruner.pruned_cache import PrunedImage, PruningRecord
from vlmpruner_lmms_eval.loading import check_record, load, tokens_kept


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()


def image(number: int, kept: int, modality: str = "image") -> PrunedImage:
    order = torch.arange(kept)
    return PrunedImage(0, number, 0, modality, (2, 4), torch.arange(8), order, stages=((2, order),))


def test_a_record_that_does_not_fit_its_name_is_an_error():
    record = PruningRecord((image(0, 3), image(1, 3), image(0, 5, "video")))
    given = {"image": 2, "video": 1}
    check_record(record, given, should_prune=True)
    check_record(None, given, should_prune=False)
    check_record(None, {"image": 0, "video": 0}, should_prune=True)
    for found, number, should_prune, message in (
        (None, given, True, "image 0, image 1, video 0 of a batch should not be left unpruned"),
        (record, given | {"image": 3}, True, "image 2 of a batch should not be left unpruned"),
        (record, given, False, "image 0, image 1, video 0 of a batch should not be pruned"),
        (PruningRecord((image(0, 8),)), {"image": 1}, True, "All 8 visual tokens of a batch were kept"),
    ):
        with pytest.raises(RuntimeError, match=message):
            check_record(found, number, should_prune)


def test_tokens_kept_are_means_over_the_grids():
    records = [PruningRecord((image(0, 2),)), PruningRecord((image(0, 4), image(1, 3)))]
    assert tokens_kept(records, num_layers=4) == {"visual_tokens": 8, "tokens_kept": 3, "tokens_kept_all_layers": 5.5}
    assert tokens_kept([], 4) == {}


def test_another_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(ValueError, match=r"holds a model of type 'blip-2'. Supported are llava, "):
        load(str(tmp_path), pruning_ratio=0.5)


def test_the_repo_s_code_is_not_asked_for(monkeypatch):
    """At a terminal the library would, and wait for an answer."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")
    model, processor = load(str(ROOT), pruning_ratio=0.5)
    assert not asked and {type(each).__module__.split(".")[0] for each in (model, processor)} == {"vlmpruner"}


@pytest.mark.once
def test_the_questions_of_the_task_are_those_of_the_accuracy_benchmark():
    lines = (ROOT / "benchmarks" / "lmms_eval" / "questions.jsonl").read_text().splitlines()
    expected = [
        {"seed": scene.seed, "kind": question.kind, "question": question.text, "answer": question.answer}
        for scene, question in accuracy.collect_questions(100)
    ]
    assert [json.loads(line) for line in lines] == expected


# reproduce.py


def write_result(run: Run, output: Path, score: float, seconds: float = 60.0):
    folder = run.folder(output)
    folder.mkdir(parents=True)
    content = {"score": score, "model_args": run.all_model_args(), "limit": run.limit, "seconds": seconds}
    (folder / reproduce.RESULT).write_text(json.dumps(content))


@pytest.mark.once
def test_the_dry_run_of_the_page_plans_all_runs(tmp_path):
    command = next(code for code in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) if "reproduce.py" in code)
    words = [sys.executable, *shlex.split(command)[1:], "--output", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("27 runs, 0 done before, 27 to do, about 12.4 h")
    assert "pretrained=llava-hf/llava-1.5-7b-hf,pruning_ratio=0.889,pruning_method=divprune --tasks mme " in done.stdout
    assert "| vlm_pruner | 88.9 % | - | - | - (1752) | - (82.2) |" in done.stdout and "- (95.61) |" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_plan_goes_on_and_learns_how_long_runs_take(tmp_path):
    runs = reproduce.plan(["a/b"], ["vlm_pruner:fine"], [0.889], ["POPE", "MME", "EgoSchema"], limit=100)
    assert [run.method for run in runs] == ["none", "vlm_pruner:fine"] * 3
    assert runs[1].all_model_args() == "pretrained=a/b,pruning_ratio=0.889,pruning_method=vlm_pruner,pruning_preset=fine"
    write_result(runs[0], tmp_path, 80.0, seconds=50.0)
    expected = reproduce.seconds_of(runs, tmp_path)
    assert runs[0].result(tmp_path)["score"] == 80 and runs[1].result(tmp_path) is None
    assert expected(runs[1]) == expected(runs[2]) == pytest.approx(50)
    assert expected(runs[4]) == 100 * reproduce.GUESS[True]
    other = Run("a/b", "none", 0, "POPE", limit=50)
    with pytest.raises(ValueError, match=r"result\.json has limit=100, but this call 50"):
        other.result(tmp_path)


def test_the_table_stands_beside_the_paper_s(tmp_path):
    runs = reproduce.plan(["local"], ["vlm_pruner"], [0.889], reproduce.SIX)
    half = reproduce.plan(["local"], ["vlm_pruner"], [0.889], ["MME", "GQA"])
    for number, run in enumerate(runs):
        write_result(run, tmp_path, 100.0 if run.ratio == 0 else 90.0 + number)
    names = {"local": "LLaVA-1.5-7B"}
    text = reproduce.table(runs, tmp_path, names)
    assert "Relative: mean over MME, POPE, TextVQA, OCRBench, SEED-I, OK-VQA, as in the paper." in text
    assert "| unpruned | - | 100.00 (1862) | 100.00 (85.9) |" in text and "| 96.00 (95.61) |" in text
    text = reproduce.table(half, tmp_path, names)
    assert "Relative: mean over MME, GQA." in text and "| 91.00 (1752) | - | - (95.61) |" in text


def test_a_run_that_was_not_what_it_is_called_is_not_stored():
    pruned, unpruned = (Run("m", *setting, "POPE") for setting in (("fastv", 0.889), ("none", 0)))
    kept = {"avg_pruning_ratio": 0.889, "avg_visual_tokens": 576, "avg_tokens_kept": 64}
    reproduce.check(pruned, kept)
    reproduce.check(unpruned, {"avg_pruning_ratio": 0.0})
    wrong = [(pruned, {}), (pruned, kept | {"avg_tokens_kept": 576}), (pruned, kept | {"avg_pruning_ratio": 0.5})]
    for run, throughput in [*wrong, (pruned, {"avg_pruning_ratio": 0.0}), (unpruned, kept)]:
        with pytest.raises(RuntimeError, match=r"tokens kept\. Not stored"):
            reproduce.check(run, throughput)


def test_scores_have_the_paper_s_scale():
    metrics = {
        "mme_perception_score,none": 1500.5,
        "mme_cognition_score,none": 300.0,
        "mme_perception_score_stderr,none": "N/A",
    }
    assert reproduce.TASKS["MME"].score(metrics) == 1800.5
    assert reproduce.TASKS["OCRBench"].score({"ocrbench_accuracy,none": 0.297}) == pytest.approx(297)
    with pytest.raises(ValueError, match="Expected one metric 'exact_match'"):
        reproduce.TASKS["GQA"].score({"other,none": 1.0})


# Data parallel


@pytest.mark.once
def test_two_processes_give_the_scores_of_one(fresh_python, tmp_path):
    """Started with the variables that `torchrun` sets, and by accelerate's launcher, which starts them through `torchrun`."""
    options = ["--methods", "fastv", "--ratios", "0.889", "--per-type", "1", "--batch-size", "2"]
    ways, results = {"alone": 1, "ranks": 2, "accelerate": 2}, []
    for way, number in ways.items():
        words = ["benchmarks/accuracy.py", *options, "--output", tmp_path / f"{way}.json"]
        if way == "accelerate":
            launch = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
            done = [fresh_python.run("-m", "accelerate.commands.launch", *launch, *words, cwd=ROOT)]
        else:
            done = fresh_python.run_ranks(number, *words, cwd=ROOT, path=[ROOT / "benchmarks"])
        assert not any(each.returncode for each in done), done[0].stderr[-3000:]
        assert f"on process 1 of {number}" in done[0].stderr
        found = json.loads((tmp_path / f"{way}.json").read_text())["results"]
        results.append({name: {k: v for k, v in each.items() if k != "seconds"} for name, each in found.items()})
    for result in results:  # its draws differ from process to process
        assert result.pop("random 0.889")["num_kept"] == 64
        for each in result.values():  # a mean of means
            each |= {name: round(value, 9) for name, value in each.items() if name.startswith("num_")}
    assert results[0] == results[1] == results[2] and set(results[0]) == {"unpruned", "unpruned blind", "fastv 0.889"}


def test_shares_are_whole_batches_in_order():
    questions = list(range(21))
    for number in (1, 2, 3, 8):
        shares = [accuracy.share(questions, 4, index, number) for index in range(number)]
        assert [question for part in shares for question in part] == questions
        assert all(len(part) % 4 == 0 or part[-1] == 20 for part in shares if part)
