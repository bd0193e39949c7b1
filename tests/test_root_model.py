"""The trained model at the repo's root: it reads, counts and names what it sees, and pruning costs it what was measured."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from benchmarks import accuracy
from benchmarks.accuracy import answer_batch, is_right
from training.scenes import QUESTION_TYPES, ask, draw, make_scene


ROOT = Path(__file__).parents[1]
DOZEN = (
    (0, "What does the sign say?"),
    (0, "How many stars are there?"),
    (0, "Is the green cross left of the red circle?"),
    (2, "What is written on the black sign?"),
    (2, "What color is the star?"),
    (7, "What is written on the black sign?"),
    (7, "Is there a white triangle?"),
    (7, "Is there a blue triangle?"),
    (9, "What shape is the yellow object?"),
    (9, "How many triangles are there?"),
    (12, "What does the sign say?"),
    (23, "What is written on the yellow sign?"),
)
BATCH = 20
# Measured on 200 scenes, one question each: percent right.
UNPRUNED, PRUNED, MARGIN = 92.5, 92.5, 4.0


@pytest.fixture(scope="module")
def root():
    model, processor, _ = accuracy.load(ROOT)
    return model, processor


@pytest.fixture(scope="module")
def questions():
    """One question about each of 200 scenes, half of them about signs, where a lost token shows most."""
    chosen = []
    for seed in range(200):
        asked = sorted(ask(make_scene("test", seed)), key=lambda question: not question.kind.startswith("read"))
        chosen.append((make_scene("test", seed), asked[0 if seed % 2 else -1]))
    return chosen


@contextmanager
def configured(model, **config):
    before = {key: getattr(model.config, key) for key in config}
    torch.manual_seed(0)
    try:
        for key, value in config.items():
            setattr(model.config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)


def score(root, questions, **config) -> float:
    """Percent right, with these values in the config."""
    model, processor = root
    right = 0
    with configured(model, **config):
        for first in range(0, len(questions), BATCH):
            part = questions[first : first + BATCH]
            answers, _ = answer_batch(model, processor, part)
            right += sum(is_right(answer, question.answer) for answer, (_, question) in zip(answers, part, strict=True))
    return 100 * right / len(questions)


def plan_class(model) -> type:
    """`PruningPlan` of the code that `trust_remote_code` loaded."""
    package = type(model).__module__.rpartition(".")[0]
    return sys.modules[f"{package}.pruned_decoder"].PruningPlan


@pytest.mark.between
@pytest.mark.parametrize("ratio", [0.0, 0.889])
def test_a_dozen_questions_are_answered(root, ratio):
    chosen = [
        (make_scene("test", seed), next(item for item in ask(make_scene("test", seed)) if item.text == text))
        for seed, text in DOZEN
    ]
    assert len(chosen) == 12 and {question.kind for _, question in chosen} == set(QUESTION_TYPES)
    assert score(root, chosen, pruning_ratio=ratio) == 100


@pytest.mark.once
def test_pruning_costs_what_was_measured(root, questions):
    assert Counter(question.kind.startswith("read") for _, question in questions)[True] == 100
    assert score(root, questions, pruning_ratio=0.0) >= UNPRUNED - MARGIN
    assert score(root, questions) >= PRUNED - MARGIN


@pytest.mark.once
def test_random_tokens_fall_below_the_margin(root, questions):
    """What makes the test above able to fail: tokens chosen badly."""
    assert score(root, questions[:100], pruning_method="random") < PRUNED - MARGIN


@pytest.mark.once
@pytest.mark.parametrize("fault", ["shuffled", "renumbered"])
def test_wrong_positions_fall_below_the_margin(root, questions, monkeypatch, fault):
    """The right tokens, with the positions of all that is kept in disorder, or counted anew from 0."""
    plan = plan_class(root[0])
    enter = plan._enter

    def faulty(self, stage, hidden_states, inputs, *args):
        packed = enter(self, stage, hidden_states, inputs, *args)
        if self.grids:
            embeddings = stage.inputs.values["position_embeddings"]
            order = torch.randperm(packed.shape[1])
            stage.inputs.values["position_embeddings"] = tuple(
                part[:, order] if fault == "shuffled" else whole[:, : packed.shape[1]]
                for part, whole in zip(embeddings, inputs["position_embeddings"], strict=True)
            )
        return packed

    monkeypatch.setattr(plan, "_enter", faulty)
    assert score(root, questions[:100]) < PRUNED - MARGIN


@pytest.mark.between
def test_the_root_is_small_and_works_in_a_pipeline():
    files = [path for path in ROOT.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert (ROOT / "model.safetensors").stat().st_size < 25e6
    seed, text = DOZEN[0]
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": draw(make_scene("test", seed))}, {"type": "text", "text": text}],
        }
    ]
    answer = next(item.answer for item in ask(make_scene("test", seed)) if item.text == text)
    pipe = pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True)
    assert pipe.model.config.pruning_settings() is not None
    assert is_right(pipe(text=messages, return_full_text=False, max_new_tokens=12)[0]["generated_text"], answer)
