"""What the benchmarks share: clocks, the hardware's name, tables, results and plots."""

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from math import ceil
from pathlib import Path
from unittest.mock import patch

import torch
import transformers


ENOUGH = 20  # calls that a median takes unless told otherwise


def timed(function: Callable, device: str) -> tuple:
    """What `function` returns, and the seconds that it takes, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    result = function()
    synchronise(device)
    return result, time.perf_counter() - start


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def interleaved_medians(functions: dict[Hashable, Callable], repeats: int, device: str, warmup: int = 1) -> dict:
    """The median seconds of each function, after `warmup` calls that do not count. The functions take turns, so that a machine
    that gets slower does so for all of them."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function, device)[1])
    return {name: statistics.median(values) for name, values in seconds.items()}


def encode(model, inputs: dict):
    """What the vision tower and the projector make of the pictures."""
    names = ("pixel_values", "image_grid_thw", "image_sizes")
    return model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs}, return_dict=True)


@contextmanager
def fixed_features(model, inputs: dict):
    """Within it the model's pictures are encoded already: calls cost what the language model does."""
    features = encode(model, inputs)

    @wraps(model.model.get_image_features)  # `generate` reads from the signature what it need not pass on
    def encoded(*args, **kwargs):
        return features

    with patch.object(model.model, "get_image_features", encoded):
        yield


class Ticker:
    """A streamer that notes when each token has reached the host."""

    def __init__(self):
        self.times = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def seconds_of_tokens(model, inputs: dict, steps: int, **options) -> list[float]:
    """Seconds of each of `steps` tokens decoded by `generate`, without the prefill and the first step after it."""
    ticker = Ticker()
    model.generate(
        **inputs, max_new_tokens=steps + 2, do_sample=False, eos_token_id=None, pad_token_id=0, streamer=ticker, **options
    )
    since_first = ticker.times[2:]  # before them: the prompt, and the token that the prefill gives
    return [later - earlier for earlier, later in pairwise(since_first)]


def decode_medians(models: dict, inputs: dict, repeats: int, rounds: int = 4, **options) -> dict[str, float]:
    """The median seconds of a decoded token of each model; they take turns, after `generate` once without counting."""
    steps, seconds = ceil(repeats / rounds), {name: [] for name in models}
    for counts in (False, *[True] * rounds):
        for name, model in models.items():
            found = seconds_of_tokens(model, inputs, steps, **options)
            seconds[name] += found if counts else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def copy_bandwidth(device: str) -> float:
    """Bytes that the device reads and writes in a second, copying 1 GiB (256 MiB on a CPU)."""
    source = torch.ones(2**30 if device.startswith("cuda") else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved_medians({"copy": lambda: target.copy_(source)}, 10, device)["copy"]


def environment(device: str) -> dict:
    """Where a result was measured."""
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        hardware = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "hardware": hardware,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def hardware_slug(place: dict) -> str:
    """The hardware of an `environment` as it stands in the names of result files."""
    name = place["hardware"]
    if not place["device"].startswith("cuda"):
        name = f"cpu {name} {place['threads']} threads"
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def place_and_versions(result: dict) -> str:
    """Where and with what, of a result that has `environment` and perhaps a dtype in it."""
    place = ", ".join(str(result[key]) for key in ("hardware", "dtype") if key in result)
    return f"{place}, {result['threads']} CPU threads, torch {result['torch']}, transformers {result['transformers']}"


def heading(result: dict) -> str:
    """A line that says where, with what, and over how many calls."""
    few = "" if result["repeats"] >= ENOUGH else f", fewer than the {ENOUGH} that a result needs"
    return f"{place_and_versions(result)}; medians of {result['repeats']}{few}"


def table(rows: Sequence[dict]) -> str:
    """A Markdown table; the keys of the first row are its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default=device)
    parser.add_argument("--repeats", type=int, default=ENOUGH, help="calls that a median takes")
    parser.add_argument("--ratio", type=float, default=0.889, help="fraction of visual tokens that is removed")
    parser.add_argument("--output", type=Path, help="file, or folder, for the result as JSON")
    parser.add_argument("--plot", type=Path, help="file for a plot of the result")
    parser.add_argument("--input", type=Path, help="an earlier result to plot instead of measuring")
    return parser


def run(arguments: argparse.Namespace, measure: Callable[[argparse.Namespace], dict], draw: Callable) -> None:
    """Measure, or read an earlier result; write, plot, and print it as the last line.

    Args:
        measure: makes the result of the arguments.
        draw: draws a result on matplotlib axes.
    """
    result = json.loads(arguments.input.read_text()) if arguments.input else measure(arguments)
    if output := arguments.output:
        if output.is_dir():
            output /= "_".join([result["benchmark"], *getattr(arguments, "model", []), hardware_slug(result)]) + ".json"
        output.write_text(json.dumps(result) + "\n")
    if arguments.plot:
        plot(result, draw, arguments.plot)
    print(json.dumps(result))


def plot(result: dict, draw: Callable, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(
            "--plot needs matplotlib, which is not installed. Run it elsewhere on the JSON: --input FILE --plot FILE."
        ) from None
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    draw(result, axes)
    axes.set_title(heading(result), fontsize="small")
    figure.savefig(path)


def draw_bars(axes, labels: Sequence[str], stacks: dict[str, Sequence[float]], unit: str) -> None:
    """Horizontal bars, each a stack of parts."""
    left = [0.0] * len(labels)
    for name, values in stacks.items():
        axes.barh(labels, values, left=left, label=name)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend()
