"""What pruning costs in answers: exact match on synthetic scenes, by method, ratio and question type.

`python benchmarks/accuracy.py --model FOLDER` measures a pruned model repo (see export.py); without one, the model at the root
of this repo (see training/README.md). Scenes are those of training/scenes.py, split "test". Each configuration's answers are
written as soon as they are known, and a second run goes on where the first stopped; results of other weights or questions are
refused, not mixed. `torchrun --nproc-per-node 8 benchmarks/accuracy.py` shares the questions among GPUs; only `random` then
draws other tokens.

score      exact match, in percent, for each question type; greedy decoding, at most 12 tokens
relative   mean over the types of score / unpruned score, as the paper averages its benchmarks, in percent
interval   95 % of that mean, by a paired bootstrap over the questions (2,000 draws)
kept       visual tokens that a decoder layer sees, on average over the layers from the first pruning layer on: the budget that
           `pruning_ratio` gives every method, and the number kept at the pruning point where there is one
all layers the same over all layers of the decoder, which is what the visual tokens cost
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, update_wrapper
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measurement import environment, place_and_versions  # noqa: E402

from training.scenes import QUESTION_TYPES, Question, Scene, ask, draw, make_scene  # noqa: E402
from vlmpruner.pruning_methods import METHODS as REGISTRY  # noqa: E402


RATIOS = (0.667, 0.778, 0.889, 0.944)
ABLATION_RATIOS = (0.889, 0.944)  # the paper's, and one at which the small model loses enough to tell values apart
# Each pruning_method, and with :PRESET each other pruning_preset of it; the control comes last.
METHODS = tuple(
    name if preset == "paper" else f"{name}:{preset}"
    for name, method in sorted(REGISTRY.items(), key=lambda item: item[0] == "random")
    for preset in method.presets
)
MAX_NEW_TOKENS = 12
SCENES_WITHOUT = 1000  # scenes in a row without a question of a type, after which there will be none
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)}

# The ablations of the paper's supplement: each value of a key with the paper's average (LLaVA-1.5-7B, 64 tokens). Channels are
# parts of the hidden size.
ABLATIONS = {
    "pruning_num_pivots": dict(zip(range(1, 9), (94.36, 94.46, 94.41, 95.30, 94.68, 95.25, 94.55, 94.40), strict=True)),
    "pruning_num_channels": {1 / 32: 95.25, 1 / 16: 95.30, 1 / 8: 94.42, 1 / 4: 94.26, 1: 95.14},
    "pruning_threshold": dict(zip((0.6, 0.7, 0.8, 0.9, 1.0), (94.64, 94.60, 95.30, 92.99, 91.00), strict=True)),
    "pruning_token_batch": dict(zip((1, 2, 4, 8, 16), (95.62, 95.64, 95.38, 95.20, 95.30), strict=True)),
    "pruning_aggregation_weight": {
        0.2: 94.98,
        0.3: 95.30,
        0.4: 95.34,
        0.5: 95.66,
        0.6: 95.68,
        0.7: 95.60,
        0.8: 95.47,
        1.0: 95.07,
    },
    "pruning_layer": dict(zip((1, 2, 3, 4), (93.65, 95.30, 94.86, 94.91), strict=True)),
    "pruning_spatial_weight": {0.0: None, 0.5: 95.30},
}
# What a reader of their tables has to know.
ABLATION_NOTES = {
    "pruning_num_channels": "128, 256, 512, 1,024 and all of the paper's 4,096, scaled to the {} of this decoder; "
    "of fewer than the default's 256 the default takes all",
    "pruning_aggregation_weight": "1 is no aggregation",
    "pruning_spatial_weight": "0 is no spatial term",
}


@dataclass(frozen=True)
class Configuration:
    """One row: a method, the fraction removed, config keys that differ from the model's, and whether pictures are noise."""

    method: str
    ratio: float
    changes: dict = field(default_factory=dict)
    blind: bool = False

    @classmethod
    def of(cls, method: str, ratio: float) -> "Configuration":
        """Of a method as in `METHODS`."""
        method, _, preset = method.partition(":")
        return cls(method, ratio, {"pruning_preset": preset} if preset else {})

    @property
    def name(self) -> str:
        words = ["unpruned" if self.ratio == 0 else f"{self.method} {self.ratio}"]
        words += [f"{key.removeprefix('pruning_')}={value}" for key, value in self.changes.items()]
        return " ".join([*words, "blind"] if self.blind else words)


def ablations(hidden_size: int) -> dict[str, dict]:
    """For each key its values, for a decoder of this width, with the paper's average."""
    channels = {round(part * hidden_size): paper for part, paper in ABLATIONS["pruning_num_channels"].items()}
    return ABLATIONS | {"pruning_num_channels": channels}


def normalised(answer: str) -> str:
    """Lower case, without surrounding space, final punctuation and quotes; number words as digits."""
    text = re.sub(r"\s+", " ", answer).strip().strip("\"'.,!?: ").lower()
    return NUMBER_WORDS.get(text, text)


def is_right(answer: str, expected: str) -> bool:
    """Exact match after normalisation. An empty answer is wrong."""
    return bool(normalised(answer)) and normalised(answer) == normalised(expected)


def collect_questions(per_type: int, split: str = "test") -> list[tuple[Scene, Question]]:
    """The first `per_type` questions of every type, scene after scene from seed 0.

    Raises:
        ValueError: no question of each type is asked for, or `SCENES_WITHOUT` scenes in a row have none of a type, as where a
            layout has two signs at least, so that "the sign" is never one.
    """
    if per_type < 1:
        raise ValueError(f"per_type, the questions of each type, must be an integer >= 1, but is {per_type!r}.")
    missing, chosen, seed = dict.fromkeys(QUESTION_TYPES, per_type), [], 0
    last = dict.fromkeys(QUESTION_TYPES, -1)  # seed of the last scene that has one
    while any(missing.values()):
        scene = make_scene(split, seed)
        for question in ask(scene):
            last[question.kind] = seed
            if missing[question.kind]:
                missing[question.kind] -= 1
                chosen.append((scene, question))
        if never := [kind for kind, number in missing.items() if number and seed - last[kind] >= SCENES_WITHOUT]:
            raise ValueError(
                f"{SCENES_WITHOUT} scenes of {split!r} in a row, up to seed {seed}, have no question of type "
                f"{' or '.join(never)}: the layout of the split does not allow it."
            )
        seed += 1
    return chosen


class RememberedFeatures:
    """Image features by picture: no configuration changes them, so each batch of pictures is encoded once, and once more for
    methods that look at the vision tower."""

    def __init__(self, model):
        self.encode, self.known, self.config = model.model.get_image_features, {}, model.config
        update_wrapper(self, self.encode)  # `generate` gives an encoder what its signature names, such as sizes of images
        model.model.get_image_features = self

    def __call__(self, pixel_values, *args, **kwargs):
        pixels = hashlib.sha256(pixel_values.detach().float().cpu().contiguous().numpy()).digest()
        key = pixels, self.config.looks_at_tower
        if key not in self.known:
            self.known[key] = self.encode(pixel_values, *args, **kwargs)
            self.known[key]["hidden_states"] = None
        return self.known[key]


picture_of = lru_cache(maxsize=1000)(draw)


def noise_picture(size: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype(np.uint8))


@contextmanager
def configured(model, configuration: Configuration):
    """The model's config holds the values of a configuration.

    Raises:
        ValueError: the config's, of a bad value; the model's, of a method that looks at a vision tower it does not know.
    """
    keys = {"pruning_method": configuration.method, "pruning_ratio": configuration.ratio} | configuration.changes
    before = {key: getattr(model.config, key) for key in keys}
    try:
        for key, value in keys.items():
            setattr(model.config, key, value)
        if (settings := model.config.pruning_settings()) is not None:
            model.model.refuse_unknown_tower(settings)
        yield
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)


@torch.inference_mode()
def evaluate(model, processor, questions: list, configuration: Configuration, batch_size: int, progress=tqdm) -> dict:
    """Answer all questions.

    Returns:
        right: for each type a string of 0 and 1; num_visual, num_kept, num_kept_all_layers: means over the pictures; seconds.

    Raises:
        RuntimeError: a configuration that should prune left a picture unpruned.
    """
    torch.manual_seed(0)
    right, counts, start = dict.fromkeys(QUESTION_TYPES, ""), [], time.perf_counter()
    with configured(model, configuration):
        for first in progress(range(0, len(questions), batch_size), desc=configuration.name, unit="batch", leave=False):
            part = questions[first : first + batch_size]
            answers, record = answer_batch(model, processor, part, configuration.blind)
            for (_, question), answer in zip(part, answers, strict=True):
                right[question.kind] += "01"[is_right(answer, question.answer)]
            if record is not None:
                layers = model.config.get_text_config(decoder=True).num_hidden_layers
                counts += [
                    (image.num_visual, image.mean_kept(layers), image.mean_kept(layers, first=0)) for image in record.images
                ]
    result = {"right": right, "seconds": round(time.perf_counter() - start, 1)}
    if configuration.ratio > 0 and len(counts) < len(questions):
        raise RuntimeError(f"{configuration.name}: only {len(counts)} of {len(questions)} pictures were pruned.")
    if counts:
        names = ("num_visual", "num_kept", "num_kept_all_layers")
        result |= dict(zip(names, np.mean(counts, axis=0).tolist(), strict=True))
    return result


def share(questions: list, batch_size: int, index: int, number: int) -> list:
    """The questions of process `index` of `number`: batches that follow each other, cut as one process would cut them."""
    batches = -(-len(questions) // batch_size)
    first, end = (batches * place // number for place in (index, index + 1))
    return questions[first * batch_size : end * batch_size]


def joined(parts: list[dict]) -> dict:
    """What `evaluate` found in shares of the questions, as one. `seconds` are those of the slowest."""
    if len(parts) == 1:
        return parts[0]
    answered = [sum(map(len, part["right"].values())) for part in parts]
    right = {kind: "".join(part["right"][kind] for part in parts) for kind in QUESTION_TYPES}
    whole = {"right": right, "seconds": max(part["seconds"] for part in parts)}
    for name in dict.fromkeys(name for part in parts for name in part if name.startswith("num_")):
        total = sum(part.get(name, 0) * number for part, number in zip(parts, answered, strict=True))
        whole[name] = total / sum(answered)
    return whole


def answer_batch(model, processor, questions: list, blind: bool = False) -> tuple[list[str], object]:
    """Greedy answers to questions about scenes, and the record of what was kept (None when nothing was pruned)."""
    return answers_to(model, processor, model_inputs(model, processor, questions, blind))


def model_inputs(model, processor, questions: list, blind: bool = False) -> dict:
    """A batch of questions about scenes, padded on the left."""
    pictures = {scene: noise_picture(scene.size, scene.seed) if blind else picture_of(scene) for scene, _ in questions}
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        for _, question in questions
    ]
    return processor(
        images=[pictures[scene] for scene, _ in questions], text=prompts, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device, model.dtype)


def answers_to(model, processor, inputs: dict) -> tuple[list[str], object]:
    """As `answer_batch`, of `model_inputs`."""
    outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    new_tokens = outputs.sequences[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new_tokens, skip_special_tokens=True), model.get_pruning_record(outputs)


def scores(right: dict[str, str]) -> dict[str, float]:
    """Percent right for each type."""
    return {kind: 100 * outcome.count("1") / len(outcome) for kind, outcome in right.items()}


def relative(right: dict[str, str], unpruned: dict[str, str], draws: int = 2000) -> tuple[float, float, float]:
    """Mean over the types of score / unpruned score in percent, and the ends of its 95 % interval.

    Paired bootstrap: questions are drawn with replacement within each type, the same for both. A type of which the unpruned
    model answers nothing has no such ratio and is left out.

    Raises:
        ValueError: the unpruned model answers nothing at all.
    """
    means = relative_draws(right, unpruned, draws)
    return means[0], *np.percentile(means[1:], (2.5, 97.5))


def relative_draws(right: dict[str, str], unpruned: dict[str, str], draws: int = 2000) -> np.ndarray:
    """[1 + draws] the mean that `relative` speaks of, as observed and in each draw; draws are the same for equal questions."""
    answered = {kind: outcome for kind, outcome in right.items() if "1" in unpruned[kind]}
    if not answered:
        raise ValueError("The unpruned model answered no question right, so nothing can be relative to it.")
    means = np.zeros(draws + 1)
    for (kind, outcome), times in zip(answered.items(), times_drawn(tuple(map(len, answered.values())), draws), strict=True):
        here, there = (times @ np.array(list(map(int, each)), dtype=times.dtype) for each in (outcome, unpruned[kind]))
        means += 100 * here.astype(float) / np.maximum(there, 1) / len(answered)
    return means


@lru_cache(maxsize=4)  # hundreds of intervals are of as many questions
def times_drawn(sizes: tuple[int, ...], draws: int) -> list[np.ndarray]:
    """For each type of `sizes` questions, how often each of them is drawn. [1 + draws, size] each, first each once"""
    rng, times = np.random.RandomState(0), []
    for size in sizes:
        chosen = rng.randint(0, size, size=(draws + 1, size))
        chosen[0] = np.arange(size)
        places = np.arange(draws + 1)[:, None] * size + chosen
        times.append(np.bincount(places.ravel(), minlength=(draws + 1) * size).reshape(-1, size).astype(np.float32))
    return times


class Results:
    """The JSON file: what was measured with, and one entry for each configuration, written after every one."""

    def __init__(self, path: Path, fingerprint: dict, about: dict):
        self.path, self.content = path, fingerprint | {"about": about, "results": {}}
        if path.exists():
            found = json.loads(path.read_text())
            different = [key for key, value in fingerprint.items() if found.get(key) != value]
            if different:
                raise ValueError(f"{path} was measured with another {' and '.join(different)}. Remove it, or give --output.")
            self.content = found
        self.results = self.content["results"]

    def add(self, configuration: Configuration, result: dict):
        self.results[configuration.name] = asdict(configuration) | result
        self.write()

    def write(self):
        text = json.dumps(self.content, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".new").write_text(text + "\n")
        os.replace(self.path.with_suffix(".new"), self.path)


def markdown(results: dict, hidden_size: int) -> str:
    """Main table, blind row included, and one table for each ablation."""
    unpruned = results["unpruned"]["right"]
    ablated = {name: entry for name, entry in results.items() if not _is_main(entry)}
    lines = ["| method | removed | tokens kept | " + " | ".join(QUESTION_TYPES) + " | relative [95 %] | all layers |"]
    lines.append("|---" * (len(QUESTION_TYPES) + 5) + "|")
    lines += [_row(entry, unpruned) for entry in sorted(filter(_is_main, results.values()), key=_place)]
    ratios = sorted({entry["ratio"] for entry in ablated.values()})
    for key, values in ablations(hidden_size).items() if ratios else ():
        heads = ["value", *(f"relative at {_percent(ratio)} [95 %]" for ratio in ratios), "paper, 88.9 %"]
        note = f" ({ABLATION_NOTES[key].format(hidden_size)})" if key in ABLATION_NOTES else ""
        lines += ["", f"`{key}`{note}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for value, paper in values.items():
            entries = [ablated.get(Configuration("vlm_pruner", ratio, {key: value}).name) for ratio in ratios]
            if any(entries):
                cells = [_interval(relative(entry["right"], unpruned)) if entry else "-" for entry in entries]
                lines.append(f"| {' | '.join([str(value), *cells, f'{paper:.2f}' if paper else '-'])} |")
    return "\n".join(lines) + "\n"


def _interval(found: tuple[float, float, float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*found)


def _is_main(entry: dict) -> bool:
    """Whether a result belongs to the main table: a method as it comes, or a preset of it."""
    return set(entry["changes"]) <= {"pruning_preset"}


def _place(entry: dict) -> int:
    """Where a result stands in the main table: unpruned rows, presets after their method, random last."""
    return (entry["ratio"] > 0) + (entry["method"] == "random")


def _label(entry: dict) -> str:
    return ", ".join([entry["method"], *map(str, entry["changes"].values())])


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _row(entry: dict, unpruned: dict) -> str:
    by_type = scores(entry["right"])
    name = "blind (noise for the picture)" if entry["blind"] else "unpruned" if entry["ratio"] == 0 else _label(entry)
    removed = _percent(entry["ratio"]) if entry["ratio"] else "-"
    kept = f"{entry['num_kept']:.0f} of {entry['num_visual']:.0f}" if "num_kept" in entry else "all"
    cells = [
        name,
        removed,
        kept,
        *(f"{by_type[kind]:.1f}" for kind in QUESTION_TYPES),
        _interval(relative(entry["right"], unpruned)),
        f"{entry['num_kept_all_layers']:.0f}" if "num_kept_all_layers" in entry else "-" if entry["ratio"] else "all",
    ]
    return "| " + " | ".join(cells) + " |"


def plot(results: dict, path: Path):
    """Relative score over tokens kept, one line for each method, with 95 % intervals."""
    from matplotlib import pyplot

    unpruned = results["unpruned"]["right"]
    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=150)
    entries = [entry for entry in sorted(filter(_is_main, results.values()), key=_place) if entry["ratio"]]
    for label in dict.fromkeys(map(_label, entries)):
        points = sorted((entry["num_kept"], *relative(entry["right"], unpruned)) for entry in entries if _label(entry) == label)
        kept, middle, low, high = np.array(points).T
        axes.errorbar(kept, middle, yerr=(middle - low, high - middle), marker="o", capsize=3, label=label)
    axes.axhline(100, color="grey", linewidth=0.8, linestyle="--", label="unpruned")
    axes.set(xlabel="visual tokens kept", ylabel="score, % of unpruned", xscale="log")
    ticks = sorted({round(entry["num_kept"]) for entry in entries})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def fingerprint_of(model_path: Path, questions: list) -> dict:
    """What results depend on: the weights, and the questions with the pictures they are about (the first ten, by pixel)."""
    weights = hashlib.sha256()
    for file in sorted(model_path.glob("*.safetensors")):
        weights.update(file.read_bytes())
    asked = hashlib.sha256(repr([asdict(question) for _, question in questions]).encode())
    for scene, _ in questions[:10]:
        asked.update(draw(scene).tobytes())
    return {"weights": weights.hexdigest()[:16], "questions": asked.hexdigest()[:16]}


def load(path: Path, device: str | None = None) -> tuple:
    """The model, its processor, and what they run on: `device`, by default a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype=dtype).to(device).eval()
    RememberedFeatures(model)
    about = environment(device) | {"dtype": str(dtype).removeprefix("torch.")}
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True), about


def defined_methods(model) -> list[str]:
    """Those of `METHODS` that neither the model's config nor the model refuses."""
    defined = []
    for method in METHODS:
        try:
            with configured(model, Configuration.of(method, RATIOS[0])):
                defined.append(method)
        except ValueError as error:
            print(f"{method} is left out: {error}")
    return defined


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of a pruned model repo, by default this one")
    parser.add_argument(
        "--methods",
        nargs="*",
        help="by default every method that is defined for the model; also METHOD:PRESET; random is always among them",
    )
    parser.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    parser.add_argument("--per-type", type=int, default=100, help="questions of each type")
    parser.add_argument(
        "--ablations",
        nargs="*",
        type=float,
        metavar="RATIO",
        help="also the ablations of the paper's supplement, at these ratios, by default {} and {}".format(*ABLATION_RATIOS),
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.json")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model} holds no config.json. Give a pruned model repo, such as export.py makes.")
    try:
        questions = collect_questions(options.per_type)
    except ValueError as error:
        parser.error(str(error))
    transformers.logging.set_verbosity_error()

    state = PartialState(cpu=not torch.cuda.is_available())  # else, on CPUs, each process takes itself for the only one
    with state.main_process_first():  # the repo's code is in the cache before others read it
        model, processor, about = load(options.model, str(state.device))
    width = model.config.get_text_config().hidden_size
    results = Results(options.output, fingerprint_of(options.model, questions), about | {"per_type": options.per_type})
    configurations = [Configuration("none", 0), Configuration("none", 0, blind=True)]
    configurations += [
        Configuration.of(method, ratio)
        for method in dict.fromkeys([*(options.methods or defined_methods(model)), "random"])
        for ratio in options.ratios
        if ratio > 0
    ]
    if options.ablations is not None:
        configurations += [
            Configuration("vlm_pruner", ratio, {key: value})
            for ratio in options.ablations or ABLATION_RATIOS
            for key, values in ablations(width).items()
            for value in values
        ]
    try:
        for configuration in configurations:  # before any of them is measured
            with configured(model, configuration):
                pass
    except ValueError as error:
        parser.error(str(error))
    todo = [configuration for configuration in configurations if configuration.name not in results.results]
    (todo,) = broadcast_object_list([todo])  # the first process may write a result before another has looked
    part = share(questions, options.batch_size, state.process_index, state.num_processes)
    for configuration in tqdm(todo, desc=f"on process 1 of {state.num_processes}", disable=not state.is_main_process):
        found = joined(gather_object([evaluate(model, processor, part, configuration, options.batch_size)]))
        if state.is_main_process:
            results.add(configuration, found)
    if not state.is_main_process:
        return
    measured = results.content["about"]
    heading = f"Questions of each type: {measured['per_type']}. {place_and_versions(measured)}."
    table = f"{heading}\n\n{markdown(results.results, width)}"
    options.output.with_suffix(".md").write_text(table)
    plot(results.results, options.output.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
