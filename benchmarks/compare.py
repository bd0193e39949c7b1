"""Pruning methods beside each other: answers, time, memory and multiplications of every method at equal budgets.

`python benchmarks/compare.py` compares all methods that the model at the root of this repo can run, on the scenes of
training/scenes.py: the split "test", which is what accuracy.py asks about, "crowded_test" and "hard_test". `--model FOLDER`
takes another pruned model repo. A method is named `METHOD`, `METHOD:PRESET`, or with parameters of its own,
`METHOD:PRESET,NAME=VALUE,...`; random and the unpruned model are always among them. Each cell is written as soon as it is
known, and a second run goes on where the first stopped.

relative   answers right, in percent of the unpruned model's: mean over the question types of score / unpruned score
interval   95 % of that mean, by a paired bootstrap over the questions (2,000 draws)
against    the difference to the method of `--against`, with its interval from the same draws
tokens     visual tokens that a decoder layer sees, on average over all layers
KV         bytes of the cache after the prefill of one picture and a question, as counted from those tokens
FLOPs      of that prefill in the decoder's layers, in percent of the unpruned: attention and matrices, without selection
7B         the same where the method runs in LLaVA-1.5-7B's 32 layers, by its plan; none where the content decides how many stay
selection  what a prefill of one picture spends where tokens leave: finding what the method looks at in the decoder, choosing,
           merging, packing. What the vision tower notes for a method is not in it.
prefill    of the language model on encoded pictures, selection included; both are medians over calls in turns, on a CPU in CPU
           time of one thread, which other work on the machine changes little

`--match` says what is equal among methods of one budget of n tokens. "kept": n tokens stay at the pruning point, or where there
are several, n on average over the layers from the first on; this is what `pruning_ratio` means. "layers": as many tokens on
average over all layers, and "flops": as many FLOPs, as one pruning to n tokens at `pruning_layer` has. So a method that prunes
before the decoder keeps more there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from tqdm import tqdm


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from geometries import GEOMETRIES, DecoderSizes  # noqa: E402
from measurement import place_and_versions, synchronise, table  # noqa: E402

from benchmarks.accuracy import (  # noqa: E402
    Configuration,
    Results,
    answers_to,
    collect_questions,
    configured,
    defined_methods,
    fingerprint_of,
    is_right,
    load,
    model_inputs,
    relative,
    relative_draws,
)
from training.scenes import QUESTION_TYPES, SPLITS  # noqa: E402
from vlmpruner.pruned_cache import CACHE_NAME  # noqa: E402
from vlmpruner.pruning_method import PruningMethod  # noqa: E402


TOKENS = (64, 32, 16, 8)
COMPARED_SPLITS = ("test", "crowded_test", "hard_test")
MATCHES = ("kept", "layers", "flops")
LARGE = DecoderSizes.of(GEOMETRIES["llava-1.5-7b"])


def parse_method(spec: str) -> tuple[str, dict]:
    """`METHOD[:PRESET][,NAME=VALUE,...]` -> the method, and the config keys that it sets.

    Raises:
        ValueError: a part that is not NAME=VALUE with a JSON value.
    """
    head, *settings = spec.split(",")
    method, _, preset = head.partition(":")
    changes = {"pruning_preset": preset} if preset else {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            changes[f"pruning_{name}"] = json.loads(value)
        except ValueError:
            raise ValueError(
                f"{spec!r} must be METHOD[:PRESET][,NAME=VALUE,...] with JSON values, but has {setting!r}."
            ) from None
    return method, changes


def planned_tokens(method: PruningMethod, num_visual: int, num_keep: int) -> list[int]:
    """Of an image of `num_visual` tokens and a budget of `num_keep`: how many each decoder layer sees."""
    seen = [num_visual] * method.num_layers
    for layer, count in zip(method.stage_layers(), method.counts(num_visual, num_keep), strict=True):
        seen[layer:] = [count] * (method.num_layers - layer)
    return seen


def matched_budget(
    method: PruningMethod, num_visual: int, num_keep: int, match: str, sizes: DecoderSizes, num_text: int
) -> int:
    """The budget, in 1..num_visual - 1, at which a method costs what pruning to `num_keep` tokens at `method.layer` does.

    Args:
        match: one of `MATCHES`.
        sizes: of the decoder, and
        num_text: tokens of text in a row; both for "flops".
    """
    if match == "kept":
        return num_keep

    def cost(tokens: Sequence[float]) -> float:
        return sum(tokens) if match == "layers" else sizes.flops([num_text + count for count in tokens])

    target = cost([num_visual] * method.layer + [num_keep] * (method.num_layers - method.layer))
    return min(range(1, num_visual), key=lambda budget: abs(cost(planned_tokens(method, num_visual, budget)) - target))


class SharedPrompts:
    """What methods share of a batch is computed once: the tower's features (once more for methods that look at the tower), and
    what the decoder makes of the prompt below the layer where tokens leave. Answers are those without it, bit by bit."""

    def __init__(self, model):
        self.model, self.known = model, {}
        self.stock_layer = type(model.model.language_model.layers[0]).__bases__[1]

    @contextmanager
    def of(self, batch: Hashable, length: int, num_layers: int) -> Iterator[None]:
        """Within it the model is given this batch alone, of prompts of `length` tokens, and prunes in no layer below
        `num_layers`."""
        known, config = self.known, self.model.config
        encode, forward = self.model.model.get_image_features, self.stock_layer.forward

        @wraps(encode)
        def encoded(*args, **kwargs):
            key = batch, "features", config.looks_at_tower
            if key not in known:
                known[key] = encode(*args, **kwargs)
            return known[key]

        @wraps(forward)
        def shared(layer, hidden_states, *args, **kwargs):
            key = batch, layer.self_attn.layer_idx
            if key[1] >= num_layers or hidden_states.shape[1] != length:
                return forward(layer, hidden_states, *args, **kwargs)
            if key not in known:
                cache = RecordingCache(kwargs[CACHE_NAME])
                known[key] = forward(layer, hidden_states, *args, **kwargs | {CACHE_NAME: cache}), *cache.given
            else:
                kwargs[CACHE_NAME].update(*known[key][1:], key[1])
            return known[key][0]

        with patch.object(self.model.model, "get_image_features", encoded), patch.object(self.stock_layer, "forward", shared):
            yield


class RecordingCache:
    """A cache that notes the keys and values which it is given."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, keys, values, *args, **kwargs):
        self.given = keys, values
        return self.cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.cache, name)


class Comparison:
    """One model, its questions, and what is compared.

    Args:
        questions: split -> its questions, of one type after another in batches.
        num_visual: tokens of a picture.
    """

    def __init__(self, model, processor, questions: dict[str, list], batch_size: int, match: str):
        self.model, self.match = model, match
        self.text_config = model.config.get_text_config(decoder=True)
        self.sizes = DecoderSizes.of_text_config(self.text_config)
        self.batches = {}
        for split, asked in questions.items():
            of_type = [[pair for pair in asked if pair[1].kind == kind] for kind in QUESTION_TYPES]
            parts = [pairs[first : first + batch_size] for pairs in of_type for first in range(0, len(pairs), batch_size)]
            self.batches[split] = [(part, model_inputs(model, processor, part)) for part in parts]
        self.processor, self.prompts = processor, SharedPrompts(model)
        _, inputs = next(iter(self.batches.values()))[0]
        is_image = inputs["input_ids"] == model.config.image_token_id
        self.num_visual = int(is_image[0].sum())
        self.num_text = round(((inputs["attention_mask"] == 1) & ~is_image).sum(1).double().mean().item())

    def configuration(self, spec: str, num_keep: int) -> Configuration:
        """Of a method as `parse_method` reads it. A bad one raises the config's ValueError."""
        method, changes = parse_method(spec)
        unmatched = Configuration(method, 1 - num_keep / self.num_visual, changes)
        with configured(self.model, unmatched):
            plan = self.method_for(self.text_config.num_hidden_layers)
        budget = matched_budget(plan, self.num_visual, num_keep, self.match, self.sizes, self.num_text)
        return Configuration(method, 1 - budget / self.num_visual, changes)

    def method_for(self, num_layers: int) -> PruningMethod:
        return self.model.config.pruning_settings().method_for(num_layers)

    def evaluate(self, split: str, configuration: Configuration) -> dict:
        """right: for each type a string of 0 and 1; tokens: mean over the pictures of what each layer sees; seconds."""
        torch.manual_seed(0)
        num_layers, start = self.text_config.num_hidden_layers, time.perf_counter()
        right, tokens, num_pictures = dict.fromkeys(QUESTION_TYPES, ""), np.zeros(num_layers), 0
        with configured(self.model, configuration), torch.inference_mode():
            shared = 0
            if configuration.ratio > 0:
                shared = min(self.model.config.pruning_layer, self.method_for(num_layers).stage_layers()[0])
            for number, (part, inputs) in enumerate(self.batches[split]):
                with self.prompts.of((split, number), inputs["input_ids"].shape[1], shared):
                    answers, record = answers_to(self.model, self.processor, inputs)
                for (_, question), answer in zip(part, answers, strict=True):
                    right[question.kind] += "01"[is_right(answer, question.answer)]
                num_pictures += len(part)
                for image in record or ():
                    seen = np.full(num_layers, image.num_visual)
                    for layer, order in image.stages:
                        seen[layer:] = len(order)
                    tokens += seen
        if configuration.ratio == 0:
            tokens += num_pictures * self.num_visual
        elif record is None:
            raise RuntimeError(f"{configuration.name}: nothing was pruned.")
        seconds = round(time.perf_counter() - start, 1)
        return {"right": right, "tokens": (tokens / num_pictures).tolist(), "seconds": seconds}

    def large_flops(self, configuration: Configuration) -> float | None:
        """FLOPs of LLaVA-1.5-7B where a configuration runs in it, over the unpruned; None where the content decides."""
        if configuration.ratio == 0:
            return 1.0
        with configured(self.model, configuration):
            method = self.method_for(len(LARGE.layers))
        if not method.counts_are_known:
            return None
        planned = planned_tokens(method, 576, round(576 * (1 - configuration.ratio)))
        return LARGE.flops([60 + count for count in planned]) / LARGE.flops([60 + 576] * len(LARGE.layers))

    def costs(self, tokens: Sequence[float]) -> dict[str, float]:
        """Of a prefill of which each layer sees so many visual tokens."""
        seen, full = ([self.num_text + count for count in counts] for counts in (tokens, [self.num_visual] * len(tokens)))
        return {
            "mean_tokens": float(np.mean(tokens)),
            "kv_bytes": self.sizes.kv_bytes(seen, self.model.dtype.itemsize),
            "flops": self.sizes.flops(seen) / self.sizes.flops(full),
        }

    def times(self, configurations: dict[str, Configuration], repeats: int) -> dict[str, dict[str, float]]:
        """Median seconds of the prefill of one picture and of the selection in it. The configurations take turns."""
        _, inputs = next(iter(self.batches.values()))[0]
        inputs = {name: values[:1] for name, values in inputs.items()}
        device, threads = str(self.model.device), torch.get_num_threads()
        seconds = {name: {"prefill_s": [], "selection_s": []} for name in configurations}
        if device == "cpu":
            torch.set_num_threads(1)
        try:
            with encoded_once(self.model), torch.inference_mode():
                for counts in (False, *[True] * repeats):
                    for name, configuration in configurations.items():
                        with configured(self.model, configuration), timed_selection(self.model, device) as selection:
                            start = clock(device)
                            self.model(**inputs, logits_to_keep=1, use_cache=True)
                            prefill = clock(device) - start
                        if counts:
                            seconds[name]["prefill_s"].append(prefill)
                            seconds[name]["selection_s"].append(sum(selection))
        finally:
            torch.set_num_threads(threads)
        return {name: {key: statistics.median(values) for key, values in found.items()} for name, found in seconds.items()}


def clock(device: str) -> float:
    """Seconds: on a CPU those that this process has run, so that they hold on a machine with other work."""
    if device == "cpu":
        return time.process_time()
    synchronise(device)
    return time.perf_counter()


@contextmanager
def encoded_once(model) -> Iterator[None]:
    """Within it the first picture's features stand for all: once with and once without what a method sees of the tower."""
    encode, known = model.model.get_image_features, {}

    def encoded(*args, **kwargs):
        key = model.config.looks_at_tower
        if key not in known:
            known[key] = encode(*args, **kwargs)
        return known[key]

    with patch.object(model.model, "get_image_features", encoded):
        yield


@contextmanager
def timed_selection(model, device: str) -> Iterator[list[float]]:
    """Gives a list of the seconds of each stage at which tokens leave."""
    package = type(model).__module__.rpartition(".")[0]
    plan = sys.modules[f"{package}.pruned_decoder"].PruningPlan
    enter, seconds = plan._enter, []

    @wraps(enter)
    def timed(*args, **kwargs):
        start = clock(device)
        result = enter(*args, **kwargs)
        seconds.append(clock(device) - start)
        return result

    with patch.object(plan, "_enter", timed):
        yield seconds


def note_questions(results: Results, questions: dict[str, str]) -> None:
    """Note for each split a hash of what is asked. Splits can be measured one after another.

    Raises:
        ValueError: a split has results of other questions.
    """
    noted = results.content.setdefault("questions", {})
    if different := [split for split, asked in questions.items() if noted.get(split, asked) != asked]:
        raise ValueError(
            f"{results.path} has other questions of {' and '.join(different)}. Give the same --per-type, remove it, or give "
            "another --output."
        )
    noted |= questions


def cell_name(split: str, spec: str, num_keep: int | None) -> str:
    return f"{split} unpruned" if num_keep is None else f"{split} {num_keep} {spec}"


def difference(right: dict[str, str], other: dict[str, str], unpruned: dict[str, str]) -> tuple[float, float, float]:
    """Of two relative scores, in points, with the ends of its 95 % interval; the same questions are drawn for both."""
    draws = relative_draws(right, unpruned) - relative_draws(other, unpruned)
    return draws[0], *np.percentile(draws[1:], (2.5, 97.5))


def shown(values: tuple[float, float, float], sign: str = "") -> str:
    return "{:{sign}.1f} [{:{sign}.1f}, {:{sign}.1f}]".format(*values, sign=sign)


def per_type(content: dict, split: str) -> int:
    """How many questions of each type a split was asked."""
    return len(next(iter(content["results"][cell_name(split, "", None)]["right"].values())))


def decides_itself(content: dict, spec: str) -> bool:
    """Whether the content of a picture decides how many tokens a method keeps, so that a budget is a limit at most."""
    return any(name.endswith(f" {spec}") and cell["large_flops"] is None for name, cell in content["results"].items())


def label(content: dict, spec: str) -> str:
    return f"{spec} (own number)" if decides_itself(content, spec) else spec


def rows_of(content: dict, specs: Sequence[str], against: str) -> list[dict]:
    """The table: for each budget the methods that have been measured on the last split, by their scores there; "-" for another
    split where that is still to come. The unpruned model first."""
    results, times = content["results"], content["times"]
    splits = content["about"]["splits"]
    unpruned = {split: results[cell_name(split, "", None)] for split in splits}
    rows = [_row("all", "unpruned", unpruned, unpruned, None, times.get("unpruned"))]
    for num_keep in content["about"]["tokens"]:
        measured = [spec for spec in specs if cell_name(splits[-1], spec, num_keep) in results]
        entries = {spec: {split: results.get(cell_name(split, spec, num_keep)) for split in splits} for spec in measured}
        scores = {
            spec: relative(entry[splits[-1]]["right"], unpruned[splits[-1]]["right"])[0] for spec, entry in entries.items()
        }
        for spec in sorted(measured, key=scores.get, reverse=True):
            other = entries.get(against) if spec != against else None
            rows.append(_row(num_keep, label(content, spec), entries[spec], unpruned, other, times.get(f"{num_keep} {spec}")))
    return rows


def _row(num_keep, method: str, entry: dict, unpruned: dict, against: dict | None, times: dict | None) -> dict:
    row = {"budget": num_keep, "method": method}
    for split, cell in entry.items():
        there = unpruned[split]["right"]
        row[f"{split} [95 %]"] = shown(relative(cell["right"], there)) if cell else "-"
    other = None if against is None else against[split]["right"]
    row["against"] = "" if other is None else shown(difference(cell["right"], other, there), "+")
    large, times = cell["large_flops"], times or {}
    return row | {
        "tokens": f"{cell['mean_tokens']:.0f}",
        "KV MB": f"{cell['kv_bytes'] / 1e6:.2f}",
        "FLOPs": f"{100 * cell['flops']:.0f} %",
        "7B": "-" if large is None else f"{100 * large:.0f} %",
        "selection ms": f"{1e3 * times['selection_s']:.1f}" if times else "-",
        "prefill ms": f"{1e3 * times['prefill_s']:.1f}" if times else "-",
    }


def matrix(content: dict, specs: Sequence[str], split: str) -> list[dict]:
    """Methods by those budgets of which the split has a score: the relative scores, "-" where there is none yet. Ordered by
    those of the last budget."""
    results = content["results"]
    budgets = [
        num_keep
        for num_keep in content["about"]["tokens"]
        if any(cell_name(split, spec, num_keep) in results for spec in specs)
    ]
    unpruned = results[cell_name(split, "", None)]["right"]
    found = {spec: [results.get(cell_name(split, spec, num_keep)) for num_keep in budgets] for spec in specs}
    found = {spec: [cell and relative(cell["right"], unpruned) for cell in cells] for spec, cells in found.items()}
    order = sorted(specs, key=lambda spec: [values or (-1,) for values in reversed(found[spec])], reverse=True)
    heads = [f"{num_keep} tokens" for num_keep in budgets]
    cells = {spec: [shown(values) if values else "-" for values in found[spec]] for spec in order}
    measured = [spec for spec in order if set(cells[spec]) != {"-"}]
    return [{split: label(content, spec)} | dict(zip(heads, cells[spec], strict=True)) for spec in measured]


def plot(content: dict, specs: Sequence[str], path: Path) -> None:
    """For each split the relative score over the budget, and for the last one over FLOPs at each budget: two panels a row."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    results, about = content["results"], content["about"]
    splits, budgets = about["splits"], about["tokens"]
    colors, marks = colormaps["tab20"].colors, "osD^vPX<>*"
    num_rows = -(-(len(splits) + 1) // 2)
    figure = Figure(figsize=(13, 5.5 * num_rows), dpi=110, layout="constrained")
    panels = figure.subplots(num_rows, 2, sharey=True).ravel()
    for panel in panels[len(splits) + 1 :]:
        panel.remove()
    panels = panels[: len(splits) + 1]
    for panel, split in zip(panels, (*splits, splits[-1]), strict=True):
        unpruned = results[cell_name(split, "", None)]["right"]
        over_flops = panel is panels[-1]
        for number, spec in enumerate(specs):
            measured = [num_keep for num_keep in budgets if cell_name(split, spec, num_keep) in results]
            if not measured:
                continue
            cells = [results[cell_name(split, spec, num_keep)] for num_keep in measured]
            middle, low, high = np.array([relative(cell["right"], unpruned) for cell in cells]).T
            places = 100 * np.array([cell["flops"] for cell in cells])
            if not over_flops:  # a little apart, so that intervals can be seen
                places = np.array(measured) * 1.012 ** (number - len(specs) / 2)
            ours = spec.startswith("vlm_pruner")
            panel.errorbar(
                places,
                middle,
                yerr=None if over_flops else (middle - low, high - middle),
                color="grey" if spec == "random" else colors[number % 20],
                marker=marks[number % len(marks)],
                markersize=5,
                linewidth=2.4 if ours else 1,
                elinewidth=0.6,
                linestyle=":" if spec == "random" else "-",
                zorder=3 if ours else 2,
                label=label(content, spec),
            )
        panel.axhline(100, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(f"{split}, {per_type(content, split)} questions of each type")
        panel.set_ylabel("answers right, % of unpruned")
        panel.grid(alpha=0.3)
        if over_flops:
            panel.set_xlabel("FLOPs of the prefill, % of unpruned")
        else:
            panel.set_xscale("log", base=2)
            panel.set_xticks(budgets, list(map(str, budgets)))
            panel.minorticks_off()
            panel.set_xlabel("budget, tokens")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(f"Equal: {about['match']}. Intervals of 95 %. {place_and_versions(about)}", fontsize="small")
    figure.savefig(path)


def measure(comparison: Comparison, results: Results, specs: Sequence[str], budgets: Sequence[int], progress: Callable = tqdm):
    """Fill in the cells of the results that are missing. The unpruned model first; then budget by budget, so that a run that is
    stopped has compared all methods at the first ones."""
    cells = [(split, "", None) for split in comparison.batches]
    cells += [(split, spec, num_keep) for num_keep in budgets for split in comparison.batches for spec in specs]
    for split, spec, num_keep in progress(cells, desc="cells"):
        if (name := cell_name(split, spec, num_keep)) not in results.results:
            configuration = Configuration("none", 0) if num_keep is None else comparison.configuration(spec, num_keep)
            found = comparison.evaluate(split, configuration)
            costs = comparison.costs(found["tokens"]) | {"large_flops": comparison.large_flops(configuration)}
            results.results[name] = {"ratio": configuration.ratio} | found | costs
            results.write()


def write_report(content: dict, specs: Sequence[str], against: str, path: Path) -> str:
    """Write tables and plot beside the JSON file `path`; return the tables."""
    about = content["about"]
    times = f" Times are medians of {about['repeats']} calls." if "repeats" in about else ""
    questions = ", ".join(f"{per_type(content, split)} of {split}" for split in about["splits"])
    own = [spec for spec in specs if decides_itself(content, spec)]
    note = f" How many tokens {' and '.join(own)} keeps is decided by the picture, whatever the budget." if own else ""
    heading = (
        f"Questions of each type: {questions}. Equal among methods: {about['match']}.{note} "
        f"The differences, of {about['splits'][-1]}, are to {against}.{times} {place_and_versions(about)}."
    )
    parts = [heading, *(table(matrix(content, specs, split)) for split in about["splits"])]
    text = "\n\n".join([*parts, table(rows_of(content, specs, against))]) + "\n"
    path.with_suffix(".md").write_text(text)
    plot(content, specs, path.with_suffix(".png"))
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of a pruned model repo, by default this one")
    parser.add_argument("--methods", nargs="*", help="by default every method and preset that is defined for the model")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="budgets: visual tokens of a picture")
    parser.add_argument("--match", choices=MATCHES, default="kept", help="what is equal among methods of one budget")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=COMPARED_SPLITS)
    parser.add_argument(
        "--per-type",
        nargs="+",
        type=int,
        default=[100],
        metavar="N",
        help="questions of each type, or one number for each split",
    )
    parser.add_argument("--against", default="vlm_pruner", help="the method that the others are compared with")
    parser.add_argument("--repeats", type=int, default=20, help="calls that a median takes; 0 leaves times out")
    parser.add_argument("--report", action="store_true", help="measure nothing; tables and plot of what has been measured")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/compare.json, with the match if not kept")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model} holds no config.json. Give a pruned model repo, such as export.py makes.")
    if len(options.per_type) not in (1, len(options.splits)):
        parser.error(f"--per-type must be one number, or one for each of {options.splits}, but is {options.per_type}.")
    numbers = options.per_type * (len(options.splits) // len(options.per_type))
    suffix = "" if options.match == "kept" else f"_{options.match}"
    output = options.output or ROOT / "benchmarks" / "results" / f"compare{suffix}.json"
    transformers.logging.set_verbosity_error()

    try:
        questions = {split: collect_questions(each, split) for split, each in zip(options.splits, numbers, strict=True)}
    except ValueError as error:
        parser.error(str(error))
    model, processor, about = load(options.model)
    about["match"] = options.match
    comparison = Comparison(model, processor, questions, options.batch_size, options.match)
    specs = list(dict.fromkeys([*(options.methods or defined_methods(model)), "random"]))
    if bad := [num_keep for num_keep in options.tokens if not 1 <= num_keep < comparison.num_visual]:
        parser.error(f"--tokens must be from 1 to {comparison.num_visual - 1} for this model, but has {bad}.")
    try:
        configurations = {"unpruned": Configuration("none", 0)} | {
            f"{num_keep} {spec}": comparison.configuration(spec, num_keep) for num_keep in options.tokens for spec in specs
        }
    except ValueError as error:
        parser.error(str(error))
    prints = {split: fingerprint_of(options.model, asked) for split, asked in questions.items()}
    fingerprint = {"weights": next(iter(prints.values()))["weights"], "match": options.match}
    try:
        results = Results(output, fingerprint, about)
        note_questions(results, {split: found["questions"] for split, found in prints.items()})
    except ValueError as error:
        parser.error(str(error))
    content = results.content
    content["about"] |= {name: list(getattr(options, name)) for name in ("splits", "tokens")}
    content.setdefault("times", {})
    if not options.report:
        measure(comparison, results, specs, options.tokens)
    if options.repeats and not options.report and not set(configurations) <= set(content["times"]):
        content["times"] |= comparison.times(configurations, options.repeats)
        content["about"]["repeats"] = options.repeats
    results.write()
    print(write_report(content, specs, options.against, output))


if __name__ == "__main__":
    main()
