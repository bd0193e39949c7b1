"""Functions of the task `vlmpruner_scenes`. Pictures are drawn when they are asked for; `python benchmarks/lmms_eval/scenes.py`
writes questions.jsonl, the questions of benchmarks/accuracy.py, 100 of each type."""

import json
import sys
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import collect_questions, is_right  # noqa: E402
from training.scenes import draw, make_scene  # noqa: E402


QUESTIONS = Path(__file__).with_name("questions.jsonl")


def questions(per_type: int = 100) -> list[dict]:
    """The documents of the task."""
    return [
        {"seed": scene.seed, "kind": question.kind, "question": question.text, "answer": question.answer}
        for scene, question in collect_questions(per_type)
    ]


def doc_to_visual(doc: dict) -> list:
    return [draw(make_scene("test", doc["seed"]))]


def process_results(doc: dict, results: list[str]) -> dict:
    right = float(is_right(results[0], doc["answer"]))
    return {doc["kind"]: right, "all_types": {"kind": doc["kind"], "right": right}}


def mean_over_types(results: list[dict]) -> float:
    """As the paper averages its benchmarks: each type counts the same."""
    by_kind = defaultdict(list)
    for result in results:
        by_kind[result["kind"]].append(result["right"])
    return sum(sum(right) / len(right) for right in by_kind.values()) / len(by_kind)


if __name__ == "__main__":
    QUESTIONS.write_text("".join(json.dumps(question) + "\n" for question in questions()))
