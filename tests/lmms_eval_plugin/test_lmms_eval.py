"""The plugin for lmms-eval: scores of the local task, every family, and no unpruned score under a pruned name."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, clip, picture, small_checkpoint
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.accuracy import answer_batch, collect_questions, is_right
from vlmpruner.export import export_model
from vlmpruner_lmms_eval import model as plugin
from vlmpruner_lmms_eval.model import VLMPruner


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command: str, folder: Path) -> dict:
    """What a command of the page writes, its output put into `folder`."""
    words = shlex.split(command.replace("\\\n", " ").replace("results/lmms-eval", str(folder)))
    module = {"lmms-eval": ["-m", "lmms_eval"], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *module[words[0]], *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (results,) = folder.rglob("*_results.json")
    return json.loads(results.read_text())


def command(start: str) -> str:
    (found,) = [each for each in COMMANDS if each.startswith(start)]
    return found


@lru_cache
def right_answers(number: int) -> dict[str, list[bool]]:
    """Of the first questions of the task, by type, those that the model of the repo answers right, pruned."""
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True, dtype="auto", pruning_ratio=0.889)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    questions, right = collect_questions(100)[:number], {}
    with torch.inference_mode():
        answers, _ = answer_batch(model.eval(), processor, questions)
    for (_, question), answer in zip(questions, answers, strict=True):
        right.setdefault(question.kind, []).append(is_right(answer, question.answer))
    return right


@pytest.mark.parametrize("start", ["lmms-eval", "torchrun"])
def test_the_commands_of_the_page_score_the_scenes(start, tmp_path):
    """In one process and in two: the score is the share of answers that the model alone gives right."""
    found = run(command(start), tmp_path)
    number = int(re.search(r"--limit (\d+)", command(start))[1])
    means = [sum(right) / len(right) for right in right_answers(number).values()]
    scores = found["results"]["vlmpruner_scenes"]
    assert scores["all_types,none"] == pytest.approx(sum(means) / len(means))
    assert found["n-samples"]["vlmpruner_scenes"]["effective"] == number
    kept = {name: found["throughput"][f"avg_{name}"] for name in ("pruning_ratio", "visual_tokens", "tokens_kept")}
    assert kept == {"pruning_ratio": 0.889, "visual_tokens": 576, "tokens_kept": 64}
    assert found["throughput"]["avg_tokens_kept_all_layers"] == pytest.approx((2 * 576 + 4 * 64) / 6)


def test_a_wrapper_of_lmms_eval_s_own_is_pruned_by_the_launcher(tmp_path):
    """The command of docs/any_model.md, with fewer questions."""
    page = (ROOT / "docs" / "any_model.md").read_text()
    (found,) = re.findall(r"^(python -m vlmpruner [^`]*-m lmms_eval [^`]*)```$", page, re.MULTILINE)
    base = export_model(ROOT, tmp_path / "base", to_base=True, report=lambda line: None)
    words = shlex.split(found.replace("\\\n", " ").replace("results/lmms-eval", str(tmp_path)))
    words = [word.replace("pretrained=base", f"pretrained={base}").replace("28", "7") for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    line = "vlmpruner: pruned 7 images in 7 calls of LlavaForConditionalGeneration: kept 448 of 4032 visual tokens."
    assert done.stderr.splitlines()[-1] == line
    (results,) = tmp_path.rglob("*_results.json")
    means = [sum(right) / len(right) for right in right_answers(7).values()]
    score = json.loads(results.read_text())["results"]["vlmpruner_scenes"]["all_types,none"]
    assert score == pytest.approx(sum(means) / len(means))


def test_reproduce_runs_resumes_and_prints_its_table(tmp_path):
    words = [sys.executable, "benchmarks/reproduce.py", "--models", str(ROOT), "--ratios", "0.889", "--tasks", "scenes"]
    words += ["--limit", "7", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for begins in ("2 runs, 0 done before, 2 to do", "2 runs, 2 done before, 0 to do"):
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(begins)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| unpruned", "| vlm_pruner"))]
    assert len(rows) == 2 and all(re.search(r"\d+\.\d\d", row) for row in rows) and "100.00" in rows[0]
    results = {path.parent.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("result.json")}
    assert results["vlm_pruner-0.889"]["kept"]["tokens_kept"] == 64 and results["unpruned"]["kept"] == {}


def instances(lm: VLMPruner, contents: list[list], **generation) -> list[Instance]:
    """Requests as a task makes them. `contents` are those of user messages."""
    lm.task_dict = {"task": {"test": contents}}
    options = {"max_new_tokens": 4, "temperature": 0.0, "until": ["\n\n"]} | generation

    def to_messages(content: list) -> list[dict]:
        return [{"role": "user", "content": content}]

    return [
        Instance(
            request_type="generate_until",
            arguments=("", to_messages, options, number, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(len(contents))
    ]


def question(text: str, *pictures) -> list[dict]:
    return [*({"type": "image", "url": each} for each in pictures), {"type": "text", "text": text}]


def lm_of(name: str, **options) -> VLMPruner:
    return VLMPruner(pretrained=str(small_checkpoint(FAMILIES[name])), dtype="float32", **{"pruning_ratio": 0.889} | options)


def texts(lm: VLMPruner, contents: list[list], **generation) -> list[str]:
    return [result.text for result in lm.generate_until(instances(lm, contents, **generation))]


CONTENTS = [
    question("What is it?", picture(1, 140, 112)),
    question("And here, what is there to be seen?", picture(2, 112, 140), picture(3, 140, 112)),
    question("Hello"),
    question("Why?", picture(4, 140, 140)),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_base_checkpoints_of_all_families_in_batches(name):
    alone, together = lm_of(name), lm_of(name, batch_size=4)
    assert type(alone.model) is FAMILIES[name].pruned_class
    assert texts(alone, CONTENTS) == texts(together, CONTENTS)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen3_vl"])
def test_videos_are_pruned_too(name, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for frame in clip(1, 6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    lm = lm_of(name, max_num_frames=4)
    seen = []
    generate = lm.model.generate
    lm.model.generate = lambda **inputs: seen.append(generate(**inputs)) or seen[-1]
    texts(lm, [[{"type": "video", "url": str(path)}, {"type": "text", "text": "What happens?"}]])
    record = lm.model.get_pruning_record(seen[0])
    assert {entry.modality for entry in record} == {"video"} and record.num_kept < record.num_visual


def test_an_unpruned_answer_is_no_score():
    lm = lm_of("llava")
    generate = lm.model.generate
    lm.model.generate = lambda **inputs: generate(**inputs, pruning_ratio=0.0)
    with pytest.raises(RuntimeError, match="image 0 of a batch should not be left unpruned"):
        texts(lm, CONTENTS[:1])
    lm = lm_of("llava", pruning_ratio=0)
    generate = lm.model.generate
    lm.model.generate = lambda **inputs: generate(**inputs, pruning_ratio=0.5)
    with pytest.raises(RuntimeError, match="image 0 of a batch should not be pruned"):
        texts(lm, CONTENTS[:1])


def test_what_was_kept_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(plugin, "log_metrics", lambda *args: told.append(args[-1]))
    lm = lm_of("llava", pruning_method="fastv", batch_size=2)
    texts(lm, CONTENTS)
    lm.model.config.pruning_ratio = 0
    texts(lm, CONTENTS)
    assert told[0]["pruning_ratio"] == 0.889 and 0 < told[0]["tokens_kept"] < told[0]["visual_tokens"]
    assert told[1] == {"pruning_ratio": 0.0, "num_requests": 4}


def test_options_of_the_task_are_used():
    lm = lm_of("llava")
    whole = texts(lm, CONTENTS[:1])[0]
    assert len(whole) > 1 and texts(lm, CONTENTS[:1], until=whole[1]) == [whole.split(whole[1])[0]]
    (result,) = lm.generate_until(instances(lm, CONTENTS[:1], max_new_tokens=2))
    assert result.token_counts.output_tokens <= 2


def test_bad_arguments_are_named():
    path = str(small_checkpoint(FAMILIES["llava"]))
    for options, message in (
        ({}, r"Give pruning_ratio in model_args, in \[0, 1\)"),
        ({"pruning_ratio": 1}, r"pruning_ratio must be a number in \[0, 1\)"),
        ({"pruning_ratio": 0.5, "pruning_method": "fastvv"}, "pruning_method must be one of .* got 'fastvv'"),
        ({"pruning_ratio": 0.5, "prunning_method": "fastv"}, "Unknown model_args prunning_method"),
        ({"pruning_ratio": 0.5, "batch_size": "auto"}, "batch_size must be an integer >= 1, got 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            VLMPruner(pretrained=path, **options)


def test_lmms_eval_finds_the_plugin():
    assert get_model("vlmpruner") is VLMPruner
