"""The paper's tables, measured anew: public benchmarks through lmms-eval, for models, methods and ratios, where there are GPUs
and a network.

`python benchmarks/reproduce.py --models llava-hf/llava-1.5-7b-hf --methods vlm_pruner divprune --ratios 0.889 --dry-run`

Needs the extra `lmms-eval` (docs/evaluation.md). Says first what it will run and for how long. Each task of each setting is a
run of its own, so an interrupted call goes on where it stopped, and more models, methods or tasks can be added later. A base
checkpoint needs no export. Unpruned is the same code with pruning_ratio 0, in the same environment. A run whose record of kept
tokens does not fit its name is an error and not a score.

score     as the paper gives it: percent, points for MME (perception and cognition) and OCRBench
relative  mean over tasks of score / unpruned score, in percent, as the paper averages; over the paper's tasks for the model
          where all of them are there, else over what is there
(number)  the paper's, from its tables; with ~ read off a figure
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
RESULT = "result.json"


@dataclass(frozen=True)
class Task:
    """A benchmark of the paper: its name in lmms-eval, about how many questions it has, and its score from that."""

    lmms_eval: str
    questions: int
    metrics: tuple[str, ...]
    scale: float = 100.0
    is_video: bool = False

    def score(self, metrics: dict) -> float:
        """The sum of the metrics, on the paper's scale."""
        return self.scale * sum(_metric(metrics, name) for name in self.metrics)


def _metric(metrics: dict, name: str) -> float:
    """A metric under the name that lmms-eval gives it, "name,filter"."""
    found = [value for key, value in metrics.items() if key.split(",")[0] == name and isinstance(value, int | float)]
    if len(found) != 1:
        raise ValueError(f"Expected one metric {name!r} among {sorted(metrics)}.")
    return found[0]


TASKS = {
    "GQA": Task("gqa", 12578, ("exact_match",)),
    "MMBench": Task("mmbench_en_dev_static", 4329, ("gpt_eval_score",), 1.0),
    "MME": Task("mme", 2374, ("mme_perception_score", "mme_cognition_score"), 1.0),
    "POPE": Task("pope", 9000, ("pope_f1_score",)),
    "ScienceQA": Task("scienceqa_img", 2017, ("exact_match",)),
    "TextVQA": Task("textvqa_val", 5000, ("exact_match",)),
    "OCRBench": Task("ocrbench", 1000, ("ocrbench_accuracy",), 1000.0),
    "SEED-I": Task("seedbench", 17990, ("seed_image",)),
    "OK-VQA": Task("ok_vqa_val2014", 5046, ("exact_match",)),
    "EgoSchema": Task("egoschema_subset", 500, ("score",), is_video=True),
    "NExT-QA": Task("nextqa_mc_test", 8564, ("exact_match",), is_video=True),
    "Video-MME": Task("videomme", 2700, ("videomme_perception_score",), 1.0, is_video=True),
    "EgoPlan": Task("egoplan", 3355, ("egoplan_mcq_accuracy",), is_video=True),
    "scenes": Task("vlmpruner_scenes", 700, ("all_types",)),  # of this repository, offline
}
GROUPS = {
    "pictures": [name for name, task in TASKS.items() if not task.is_video and name != "scenes"],
    "videos": [name for name, task in TASKS.items() if task.is_video],
}
# Seconds that a question takes until runs in the output folder say how long theirs took: a guess, for a 7 B model on one GPU.
GUESS = {False: 0.25, True: 3.0}

SIX = ("MME", "POPE", "TextVQA", "OCRBench", "SEED-I", "OK-VQA")
EIGHT = ("GQA", "MMBench", "MME", "POPE", "ScienceQA", "TextVQA", "OCRBench", "OK-VQA")
# Hub id -> the model's name in the paper; a folder is given as FOLDER=NAME.
PAPER_NAME = {
    "llava-hf/llava-1.5-7b-hf": "LLaVA-1.5-7B",
    "llava-hf/llava-1.5-13b-hf": "LLaVA-1.5-13B",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "LLaVA-NeXT-7B",
    "Qwen/Qwen2-VL-7B-Instruct": "Qwen2-VL-7B",
    "Qwen/Qwen3-VL-4B-Instruct": "Qwen3-VL-4B",
}
PAPER_TASKS = {"LLaVA-1.5-7B": SIX, "Qwen2-VL-7B": SIX, "Qwen3-VL-4B": EIGHT}
# The paper's averages: model -> (method, ratio) -> percent of unpruned; text where it was read off a figure.
PAPER_RELATIVE = {
    "LLaVA-1.5-7B": {
        ("fastv", 0.667): 96.45,
        ("dart", 0.667): 98.40,
        ("divprune", 0.667): 97.80,
        ("vlm_pruner", 0.667): 98.85,
        ("fastv", 0.778): 92.95,
        ("dart", 0.778): 97.00,
        ("divprune", 0.778): 96.40,
        ("vlm_pruner", 0.778): 98.07,
        ("fastv", 0.889): 84.60,
        ("dart", 0.889): 92.71,
        ("divprune", 0.889): 93.68,
        ("vlm_pruner", 0.889): 95.61,
    },
    "LLaVA-1.5-13B": {
        ("fastv", 0.889): 84.75,
        ("dart", 0.889): 88.12,
        ("divprune", 0.889): 90.20,
        ("vlm_pruner", 0.889): 92.68,
    },
    "LLaVA-NeXT-7B": {
        ("fastv", 0.889): 84.02,
        ("dart", 0.889): 90.35,
        ("divprune", 0.889): 89.02,
        ("vlm_pruner", 0.889): 91.60,
    },
    "Qwen2-VL-7B": {
        ("fastv", 0.667): "~96.0",
        ("dart", 0.667): "~94.9",
        ("divprune", 0.667): "~96.6",
        ("vlm_pruner", 0.667): "~98.0",
        ("fastv", 0.778): "~93.4",
        ("dart", 0.778): "~91.5",
        ("divprune", 0.778): "~94.1",
        ("vlm_pruner", 0.778): "~96.6",
        ("fastv", 0.889): "~86.8",
        ("dart", 0.889): "~85.6",
        ("divprune", 0.889): 88.93,
        ("vlm_pruner", 0.889): 92.58,
    },
    "LLaVA-Video-7B-Qwen2": {
        ("fastv", 0.889): "~85.0",
        ("dart", 0.889): "~89.9",
        ("divprune", 0.889): "~88.5",
        ("vlm_pruner", 0.889): 90.55,
    },
    "Qwen3-VL-4B": {
        ("saint", 0.889): 87.38,
        ("btp", 0.889): 62.06,
        ("cdpruner", 0.889): 84.31,
        ("vlm_pruner", 0.889): 89.53,
    },
}
# The paper's scores: model -> (method, ratio) -> those of PAPER_TASKS, in that order.
PAPER_SCORES = {
    "LLaVA-1.5-7B": {
        ("none", 0): (1862, 85.9, 58.17, 297, 66.18, 57.98),
        ("vlm_pruner", 0.889): (1752, 82.2, 56.05, 279, 62.24, 56.63),
    },
    "Qwen2-VL-7B": {
        ("none", 0): (2321, 88.55, 82.73, 796, 76.65, 50.21),
        ("fastv", 0.889): (2174, 81.6, 72.86, 454, 64.79, 46.59),
        ("dart", 0.889): (2087, 81.6, 65.10, 481, 65.02, 46.59),
        ("divprune", 0.889): (2059, 86.5, 71.65, 472, 70.75, 47.29),
        ("vlm_pruner", 0.889): (2158, 87.4, 76.15, 581, 72.14, 48.35),
    },
    "Qwen3-VL-4B": {
        ("none", 0): (62.97, 84.02, 2327, 90.10, 92.56, 77.94, 835, 47.42),
        ("saint", 0.889): (58.64, 81.11, 2025, 83.13, 85.87, 63.75, 566, 41.59),
        ("btp", 0.889): (42.03, 56.22, 1424, 61.00, 76.95, 55.45, 431, 13.27),
        ("cdpruner", 0.889): (57.24, 78.08, 2042, 86.59, 86.12, 63.39, 486, 35.18),
        ("vlm_pruner", 0.889): (59.72, 78.48, 2129, 88.51, 85.23, 68.37, 573, 42.60),
    },
}


@dataclass(frozen=True)
class Run:
    """One task of one setting. `method` may be METHOD:PRESET, as in benchmarks/accuracy.py."""

    model: str
    method: str
    ratio: float
    task: str
    limit: int | None = None
    model_args: str = ""

    def folder(self, output: Path) -> Path:
        setting = "unpruned" if self.ratio == 0 else f"{self.method.replace(':', '-')}-{self.ratio}"
        return output / self.model.strip("/").replace("/", "--") / setting / self.task

    @property
    def num_questions(self) -> int:
        return TASKS[self.task].questions if self.limit is None else min(self.limit, TASKS[self.task].questions)

    def all_model_args(self) -> str:
        """As lmms-eval takes them."""
        method, _, preset = self.method.partition(":")
        keys = {"pretrained": self.model, "pruning_ratio": self.ratio}
        if self.ratio:
            keys["pruning_method"] = method
            if preset:
                keys["pruning_preset"] = preset
        named = ",".join(f"{key}={value}" for key, value in keys.items())
        return f"{named},{self.model_args}" if self.model_args else named

    def command(self, output: Path, batch_size: int, processes: int) -> list[str]:
        launch = [sys.executable, "-m"]
        if processes > 1:
            launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        options = ["--model", "vlmpruner", "--model_args", self.all_model_args(), "--tasks", TASKS[self.task].lmms_eval]
        options += ["--batch_size", str(batch_size), "--output_path", str(self.folder(output).resolve())]
        options += ["--include_path", str(ROOT / "benchmarks" / "lmms_eval")]
        return [*launch, "lmms_eval", *options, *([] if self.limit is None else ["--limit", str(self.limit)])]

    def result(self, output: Path) -> dict | None:
        """What it gave, if it is done.

        Raises:
            ValueError: if it was done with another limit or other model arguments.
        """
        file = self.folder(output) / RESULT
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        for name, value in (("model_args", self.all_model_args()), ("limit", self.limit)):
            if found[name] != value:
                raise ValueError(f"{file} has {name}={found[name]!r}, but this call {value!r}. Give another --output.")
        return found


def plan(models: Sequence[str], methods: Sequence[str], ratios: Sequence[float], tasks: Sequence[str], **options) -> list[Run]:
    """All runs, task after task, so that the first tables are whole."""
    settings = [("none", 0), *((method, ratio) for method in methods for ratio in ratios if ratio > 0)]
    return [Run(model, *setting, task, **options) for model in models for task in tasks for setting in settings]


def seconds_of(runs: Sequence[Run], output: Path) -> Callable[[Run], float]:
    """How long a run will take: as long a question as those of its model and kind took that are done, else a guess."""
    taken = {}
    for run in runs:
        if (found := run.result(output)) is not None:
            key = run.model, TASKS[run.task].is_video
            seconds, questions = taken.get(key, (0.0, 0))
            taken[key] = seconds + found["seconds"], questions + run.num_questions

    def expected(run: Run) -> float:
        is_video = TASKS[run.task].is_video
        seconds, questions = taken.get((run.model, is_video), (GUESS[is_video], 1))
        return run.num_questions * seconds / questions

    return expected


def check(run: Run, throughput: dict) -> None:
    """Raise a RuntimeError unless what was kept fits the run's name."""
    ratio, visual, kept = (throughput.get(f"avg_{name}") for name in ("pruning_ratio", "visual_tokens", "tokens_kept"))
    is_unpruned = ratio == 0 and kept is None
    is_pruned = ratio == run.ratio and visual is not None and kept < visual
    if not (is_pruned if run.ratio else is_unpruned):
        raise RuntimeError(
            f"{run.all_model_args()}, {run.task}, reports pruning_ratio {ratio} and {kept} of {visual} tokens kept. Not stored."
        )


def execute(run: Run, output: Path, batch_size: int, processes: int) -> dict:
    """Run it, check what it says, and write its result.

    Raises:
        RuntimeError: if lmms-eval fails, writes no result, or one that does not fit.
    """
    folder, command = run.folder(output), run.command(output, batch_size, processes)
    folder.mkdir(parents=True, exist_ok=True)
    before, start = set(folder.rglob("*_results.json")), time.time()
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    written = sorted(set(folder.rglob("*_results.json")) - before)
    if code != 0 or len(written) != 1:
        raise RuntimeError(
            f"lmms-eval ended with code {code} and {len(written)} results for {run.task}; see {folder / 'log.txt'}"
        )
    content = json.loads(written[0].read_text())
    metrics = content["results"][TASKS[run.task].lmms_eval]
    check(run, content.get("throughput", {}))
    result = {
        "score": TASKS[run.task].score(metrics),
        "model_args": run.all_model_args(),
        "limit": run.limit,
        "seconds": time.time() - start,
        "kept": {key.removeprefix("avg_"): value for key, value in content["throughput"].items() if "tokens_kept" in key},
        "versions": {name: _version(name) for name in ("lmms_eval", "transformers", "torch", "vlmpruner")},
        "results_file": str(written[0].relative_to(folder)),
    }
    staged = folder / f"{RESULT}.new"
    staged.write_text(json.dumps(result, indent=1) + "\n")
    staged.replace(folder / RESULT)
    return result


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def relative(scores: dict[str, float], unpruned: dict[str, float], tasks: Sequence[str]) -> float | None:
    """Mean over the tasks of score / unpruned score, in percent. None where a task is missing on one side."""
    if not tasks or any(scores.get(task) is None or not unpruned.get(task) for task in tasks):
        return None
    return sum(100 * scores[task] / unpruned[task] for task in tasks) / len(tasks)


def table(runs: Sequence[Run], output: Path, paper_name: dict[str, str]) -> str:
    """For each model a table: what was measured, and in brackets what the paper has."""
    lines = []
    for model in dict.fromkeys(run.model for run in runs):
        own, name = [run for run in runs if run.model == model], paper_name.get(model)
        tasks, settings = (
            list(dict.fromkeys(getter(run) for run in own)) for getter in (lambda r: r.task, lambda r: (r.method, r.ratio))
        )
        results = {(run.method, run.ratio, run.task): run.result(output) for run in own}
        scores = {
            setting: {task: found["score"] for task in tasks if (found := results[(*setting, task)]) is not None}
            for setting in settings
        }
        unpruned = scores[settings[0]]
        averaged = [task for task in PAPER_TASKS.get(name, ()) if task in tasks]
        is_paper_s = bool(averaged) and len(averaged) == len(PAPER_TASKS[name])
        averaged = averaged if is_paper_s else tasks
        lines += [f"## {model}" + (f", in the paper {name}" if name else ""), ""]
        lines += [f"Relative: mean over {', '.join(averaged)}" + (", as in the paper." if is_paper_s else "."), ""]
        lines += [f"| method | removed | {' | '.join(tasks)} | relative |", "|---" * (len(tasks) + 3) + "|"]
        for method, ratio in settings:
            published = dict(zip(PAPER_TASKS.get(name, ()), PAPER_SCORES.get(name, {}).get((method, ratio), ()), strict=False))
            cells = [_cell(scores[method, ratio].get(task), published.get(task)) for task in tasks]
            here = relative(scores[method, ratio], unpruned, averaged)
            there = PAPER_RELATIVE.get(name, {}).get((method, ratio))
            shown = "unpruned" if ratio == 0 else method
            lines.append(
                f"| {shown} | {f'{100 * ratio:.1f} %' if ratio else '-'} | {' | '.join(cells)} | {_cell(here, there)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _cell(here: float | None, there) -> str:
    return ("-" if here is None else f"{here:.2f}") + (f" ({there})" if there is not None else "")


def readable(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(PAPER_NAME),
        metavar="ID",
        help="Hub ids or folders; FOLDER=NAME names it as the paper does",
    )
    parser.add_argument("--methods", nargs="+", default=["vlm_pruner"], help="METHOD or METHOD:PRESET")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.667, 0.778, 0.889])
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["pictures"],
        choices=[*GROUPS, *TASKS],
        metavar="TASK",
        help=f"of {', '.join(TASKS)}; `pictures` and `videos` are the paper's",
    )
    parser.add_argument("--limit", type=int, help="questions of each task, for a trial")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1, help="GPUs, each with a model of its own")
    parser.add_argument("--model-args", default="", help="more arguments of the model, as dtype=bfloat16,max_num_frames=64")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "reproduce")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and print the table of what is there")
    options = parser.parse_args()
    given = dict(each.split("=", 1) if "=" in each else (each, PAPER_NAME.get(each)) for each in options.models)
    tasks = list(dict.fromkeys(task for each in options.tasks for task in GROUPS.get(each, [each])))
    for ratio in options.ratios:
        if not 0 <= ratio < 1:
            parser.error(f"--ratios must be in [0, 1), got {ratio}.")
    runs = plan(given, options.methods, options.ratios, tasks, limit=options.limit, model_args=options.model_args)
    try:
        todo = [run for run in runs if run.result(options.output) is None]
        expected = seconds_of(runs, options.output)
    except ValueError as error:
        parser.error(str(error))
    total = sum(map(expected, todo)) / options.processes
    print(f"{len(runs)} runs, {len(runs) - len(todo)} done before, {len(todo)} to do, about {readable(total)}")
    if options.dry_run:
        for run in todo:
            command = shlex.join(run.command(options.output, options.batch_size, options.processes))
            print(f"{readable(expected(run) / options.processes):>8}  {command}")
    failed = 0
    for number, run in enumerate([] if options.dry_run else todo, start=1):
        print(f"[{number}/{len(todo)}] {run.all_model_args()} {run.task}", flush=True)
        try:
            print(f"  {execute(run, options.output, options.batch_size, options.processes)['score']:.2f}", flush=True)
        except (RuntimeError, ValueError) as error:
            failed += 1
            print(f"  {error}", file=sys.stderr, flush=True)
    text = table(runs, options.output, {model: name for model, name in given.items() if name})
    if not options.dry_run:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "table.md").write_text(text)
    print(f"\n{text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
