"""What does a decoded token cost with a shorter cache? Real models' geometry, random weights, unpruned and pruned.

    python benchmarks/decode.py --model llava-1.5-7b --batch 1 8 32 --images 1 4

Tokens come from `generate`: with a dynamic cache, and with a static one and the library's compiled decoding (which it uses by
itself on a GPU and is told to here on a CPU). For each model, batch and number of pictures in a row it prints the theory, then
medians, their ratio beside the ratio of the bytes to read, and how often compiled decoding was compiled again after two
requests of the same shape, which must be 0. A static cache is allocated at full length in every layer, so only the dynamic one
can gain from pruning. The last line is one JSON object.
"""

import argparse
from contextlib import ExitStack

import torch
from geometries import Theory, add_model_arguments, workloads
from measurement import (
    argument_parser,
    decode_medians,
    draw_bars,
    environment,
    fixed_features,
    run,
    seconds_of_tokens,
    table,
)
from transformers import CompileConfig


CACHES = ("dynamic", "static")


def compiled_options(device: str, backend: str | None) -> dict:
    """Options of `generate` for a static cache and compiled decoding."""
    options = {"cache_implementation": "static"}
    if backend or not device.startswith("cuda"):
        compile_config = CompileConfig(mode=None, backend=backend or "inductor")
        compile_config._compile_all_devices = True
        options["compile_config"] = compile_config
    return options


def num_compilations() -> int:
    """Frames that torch has compiled so far in this process."""
    return torch._dynamo.utils.counters["frames"]["total"]


def measure_cache(models: dict, inputs: dict, cache: str, repeats: int, device: str, backend: str | None) -> dict:
    """Medians of both models with one kind of cache."""
    options, recompilations = {}, None
    if cache == "static":
        options = compiled_options(device, backend)
        torch._dynamo.reset()
        for model in models.values():
            for _ in range(2):
                seconds_of_tokens(model, inputs, 3, **options)
        compiled = num_compilations()
        if compiled == 0:
            raise RuntimeError("The library did not compile decoding, so there is nothing to measure with a static cache.")
    seconds = decode_medians(models, inputs, repeats, **options)
    if cache == "static":
        recompilations = num_compilations() - compiled
    return {
        "cache": cache,
        "unpruned_s": seconds["unpruned"],
        "pruned_s": seconds["pruned"],
        "ratio": seconds["pruned"] / seconds["unpruned"],
        "recompilations": recompilations,
    }


def shown(row: dict, theory: Theory) -> dict:
    """A row as the table has it."""
    reads = theory.pruned_decode_floor_s / theory.decode_floor_s if row["cache"] == "dynamic" else 1.0
    return {
        "cache": "static, compiled" if row["cache"] == "static" else "dynamic",
        "unpruned ms": f"{1e3 * row['unpruned_s']:.2f}",
        "pruned ms": f"{1e3 * row['pruned_s']:.2f}",
        "pruned / unpruned": f"{row['ratio']:.3f}",
        "of bytes to read": f"{reads:.3f}",
        "recompilations": "" if row["recompilations"] is None else row["recompilations"],
    }


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict:
    device, backend, repeats = arguments.device, arguments.compile_backend, arguments.repeats
    result = environment(device) | {"benchmark": "decode", "dtype": arguments.dtype, "repeats": repeats, "runs": []}
    for setting, models, inputs, theory in workloads(arguments, result):
        with ExitStack() as stack:
            for model in models.values():
                stack.enter_context(fixed_features(model, inputs))
            rows = [measure_cache(models, inputs, cache, repeats, device, backend) for cache in arguments.cache]
        print(table([shown(row, theory) for row in rows]))
        result["runs"].append(setting | {"rows": rows})
    return result


def draw(result: dict, axes) -> None:
    rows = [(run, row) for run in result["runs"] for row in run["rows"]]
    labels = [f"{run['model']} x {run['batch']}, {run['theory']['tokens']} tokens, {row['cache']} cache" for run, row in rows]
    draw_bars(axes, labels, {"pruned / unpruned": [row["ratio"] for _, row in rows]}, "time of a decoded token, unpruned = 1")
    axes.axvline(1, color="black")


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    add_model_arguments(parser, batches_on_gpu=[1, 8, 32])
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=CACHES)
    parser.add_argument("--compile-backend", help="of torch.compile; by default the library's")
    run(parser.parse_args(), measure, draw)


if __name__ == "__main__":
    main()
