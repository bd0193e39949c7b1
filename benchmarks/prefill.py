"""How much faster is a prefill with fewer visual tokens? Real models' geometry, random weights, unpruned and pruned.

    python benchmarks/prefill.py --model llava-1.5-7b qwen2-vl-7b --batch 1 8
    python benchmarks/prefill.py --input result.json --plot plot.png

For each model and batch it prints the theory, then a table of medians under each attention backend:
- vision tower: encoding the pictures, with the projector.
- prefill: the language model on encoded pictures, with finding and placing them, selection and merging, to the last logits.
- selection: what the prefill does at the input of the pruning layer: choosing, merging and packing.
- decode: a token of `generate` with a dynamic cache.
- KV: bytes of the cache after the prefill. Peak: of the device's memory in a prefill, with the weights.
Unpruned is the stock class of transformers. The ideal counts the multiplications of the decoder's layers alone; of those a
machine does fewer in a second where the sequence is short, and below some 150 tokens a GPU is bound by reading the weights.
Reachable is the same ratio in time: the stock decoder's on both lengths, weighted by the layers that have them, without
selection. The last line is one JSON object.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from geometries import Theory, add_model_arguments, workloads
from measurement import (
    argument_parser,
    decode_medians,
    draw_bars,
    encode,
    environment,
    fixed_features,
    interleaved_medians,
    run,
    table,
    timed,
)

from vlmpruner.pruned_cache import cache_of
from vlmpruner.pruned_decoder import PruningPlan


ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def prefill(model, inputs: dict):
    return model(**inputs, logits_to_keep=1, use_cache=True)


def decoder_calls(model, batch: int, lengths: dict[str, int]) -> dict[str, Callable]:
    """Calls of the decoder alone, on noise of so many tokens a row."""
    weights = model.get_input_embeddings().weight
    noise = {
        name: torch.randn(batch, length, weights.shape[1], dtype=weights.dtype, device=weights.device)
        for name, length in lengths.items()
    }
    return {name: partial(model.model.language_model, inputs_embeds=embeds, use_cache=True) for name, embeds in noise.items()}


def reachable_ratio(full: float, short: float, pruned_layers: float) -> float:
    """How much faster a decoder is that takes `full` for all layers, if in a part `pruned_layers` of them it takes `short`."""
    return full / ((1 - pruned_layers) * full + pruned_layers * short)


def selection_seconds(model, inputs: dict, repeats: int, device: str) -> float:
    """Median seconds that a prefill spends at the input of the pruning layer."""
    seconds, before_layer = [], PruningPlan.before_layer

    def timed_before_layer(plan, layer_idx, *args):
        result, duration = timed(partial(before_layer, plan, layer_idx, *args), device)
        if layer_idx == plan.layer:
            seconds.append(duration)
        return result

    with patch.object(PruningPlan, "before_layer", timed_before_layer):
        for _ in range(1 + repeats):
            prefill(model, inputs)
    return statistics.median(seconds[1:])


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def peak_bytes(model, inputs: dict, device: str) -> int | None:
    """Of the device's memory in a prefill; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    prefill(model, inputs)
    return torch.cuda.max_memory_allocated(device)


def refusal(models: dict, attention: str) -> str | None:
    """Set the attention backend of the models; why they refuse it, or None."""
    try:
        for model in models.values():
            model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def measure_attention(models: dict, inputs: dict, attention: str, theory: Theory, repeats: int, device: str) -> list[dict]:
    """A row for the unpruned and one for the pruned model, which are set to this attention backend."""
    tower = interleaved_medians({name: partial(encode, model, inputs) for name, model in models.items()}, repeats, device)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(fixed_features(model, inputs))
        calls = {name: partial(prefill, model, inputs) for name, model in models.items()}
        lengths = {"full": theory.tokens, "short": theory.pruned_tokens}
        calls |= decoder_calls(models["unpruned"], len(inputs["input_ids"]), lengths)
        seconds = interleaved_medians(calls, repeats, device)
        config = models["pruned"].config
        pruned_layers = 1 - config.pruning_layer / config.get_text_config().num_hidden_layers
        reachable = reachable_ratio(seconds["full"], seconds["short"], pruned_layers)
        rows = [
            {
                "attention": attention,
                "model": name,
                "tower_s": tower[name],
                "prefill_s": seconds[name],
                "times_faster": seconds["unpruned"] / seconds[name],
                "of_ideal": seconds["unpruned"] / seconds[name] / theory.ideal if name == "pruned" else None,
                "reachable": reachable if name == "pruned" else None,
                "selection_s": selection_seconds(model, inputs, repeats, device) if name == "pruned" else None,
                "kv_bytes": cache_bytes(cache_of(prefill(model, inputs))),
                "peak_bytes": peak_bytes(model, inputs, device),
            }
            for name, model in models.items()
        ]
        decode = decode_medians(models, inputs, repeats)
    return [row | {"decode_s": decode[row["model"]]} for row in rows]


def shown(row: dict) -> dict:
    """A row as the table has it."""

    def number(key: str, scale: float, digits: int) -> str:
        return "" if row[key] is None else f"{scale * row[key]:.{digits}f}"

    return {
        "attention": row["attention"],
        "model": row["model"],
        "vision tower ms": number("tower_s", 1e3, 1),
        "prefill ms": number("prefill_s", 1e3, 1),
        "times faster": number("times_faster", 1, 2),
        "reachable": number("reachable", 1, 2),
        "% of the ideal": number("of_ideal", 100, 0),
        "selection ms": number("selection_s", 1e3, 2),
        "decode ms": number("decode_s", 1e3, 2),
        "KV MiB": number("kv_bytes", 2**-20, 1),
        "peak MiB": number("peak_bytes", 2**-20, 0),
    }


def measure_attentions(models: dict, inputs: dict, theory: Theory, arguments: argparse.Namespace) -> tuple[list, dict]:
    """The rows under each backend, and the backends that have none with the reason."""
    rows, refused = [], {}
    for attention in arguments.attention:
        reason = refusal(models, attention)
        if reason is None:
            try:
                rows += measure_attention(models, inputs, attention, theory, arguments.repeats, arguments.device)
            except RuntimeError as error:  # out of memory, or a kernel that this device or dtype can not run
                reason = first_line(error)
        if reason is not None:
            refused[attention] = reason
    return rows, refused


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict:
    result = environment(arguments.device) | {"benchmark": "prefill", "dtype": arguments.dtype, "repeats": arguments.repeats}
    result["runs"] = []
    for setting, models, inputs, theory in workloads(arguments, result):
        rows, refused = measure_attentions(models, inputs, theory, arguments)
        print(table([shown(row) for row in rows]) if rows else "nothing measured")
        for attention, reason in refused.items():
            print(f"{attention} is not in the table: {reason}")
        result["runs"].append(setting | {"rows": rows, "refused": refused})
    return result


def draw(result: dict, axes) -> None:
    rows = [(run, row) for run in result["runs"] for row in run["rows"]]
    labels = [f"{run['model']} x {run['batch']}, {row['attention']}, {row['model']}" for run, row in rows]
    milliseconds = {part: [1e3 * (row[f"{part}_s"] or 0) for _, row in rows] for part in ("tower", "prefill", "selection")}
    rest = [prefill - selection for prefill, selection in zip(milliseconds["prefill"], milliseconds["selection"], strict=True)]
    stacks = {"vision tower": milliseconds["tower"], "selection": milliseconds["selection"], "rest of the prefill": rest}
    draw_bars(axes, labels, stacks, "ms to the first token")


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    add_model_arguments(parser, batches_on_gpu=[1, 8])
    parser.add_argument("--attention", nargs="+", default=ATTENTIONS)
    run(parser.parse_args(), measure, draw)


if __name__ == "__main__":
    main()
