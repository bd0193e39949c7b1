"""Questions about drawn scenes, those of benchmarks/accuracy.py, as tasks of lighteval: one for each type of question, all of
them under the name `vlmpruner_scenes`. docs/evaluation.md has the commands."""

import sys
from pathlib import Path

import numpy as np
from lighteval.metrics.metrics_sample import SampleLevelComputation
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod


ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import MAX_NEW_TOKENS, is_right  # noqa: E402
from training.scenes import QUESTION_TYPES, draw, make_scene  # noqa: E402


class IsRight(SampleLevelComputation):
    """1 where the answer is the expected one, as benchmarks/accuracy.py compares them, else 0."""

    def compute(self, doc: Doc, model_response, **kwargs) -> float:
        return float(is_right(model_response.final_text[0], doc.choices[0]))


def prompt_of(kind: str):
    """From a line of benchmarks/lmms_eval/questions.jsonl to the question with its picture; None for another type."""

    def to_doc(line: dict, task_name: str) -> Doc | None:
        if line["kind"] != kind:
            return None
        picture = draw(make_scene("test", line["seed"]))
        return Doc(task_name=task_name, query=line["question"], choices=[line["answer"]], gold_index=0, images=[picture])

    return to_doc


def task(kind: str) -> LightevalTaskConfig:
    return LightevalTaskConfig(
        name=f"vlmpruner_scenes:{kind}",
        prompt_function=prompt_of(kind),
        hf_repo=str(ROOT / "benchmarks" / "lmms_eval"),
        hf_subset="default",
        hf_avail_splits=["train"],
        evaluation_splits=["train"],  # as a file without a split's name is called
        generation_size=MAX_NEW_TOKENS,
        metrics=[
            SampleLevelMetric(
                metric_name="right",
                higher_is_better=True,
                category=SamplingMethod.GENERATIVE,
                sample_level_fn=IsRight(),
                corpus_level_fn=np.mean,
            )
        ],
    )


TASKS_TABLE = [task(kind) for kind in QUESTION_TYPES]
