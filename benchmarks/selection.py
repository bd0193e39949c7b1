"""How long does choosing and merging take? Times it on random tokens of a LLaVA-1.5-7B-sized decoder.

    python benchmarks/selection.py --tokens 576 1296 2880 --images 1 8 --token-batch 16 1 --dtype float32

Prints what has to be read and computed at least, then a table of medians: choosing (`select_batch`), merging
(`aggregate_tokens`), and both as a prefill runs them. The tokens are noise around a few dozen prototypes, so that the rounds
accept as unevenly as on pictures. The last line is one JSON object.
"""

import argparse
import itertools
import math
from functools import partial

import torch
from measurement import argument_parser, draw_bars, environment, heading, interleaved_medians, run, table

from vlmpruner.token_pruning import PruningParameters, aggregate_tokens, num_tokens_to_keep, select_batch
from vlmpruner.token_pruning_device import GridBatch


WIDTH, HEADS, HEAD_DIM = 4096, 32, 128


def make_inputs(num_tokens: int, images: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [images * num_tokens, WIDTH] and keys [HEADS, images * num_tokens, HEAD_DIM]."""
    generator = torch.Generator().manual_seed(num_tokens)
    prototypes = torch.randn(48, WIDTH, generator=generator)
    which = torch.randint(0, 48, (images * num_tokens,), generator=generator)
    hidden_states = 0.5 + prototypes[which] + 0.7 * torch.randn(len(which), WIDTH, generator=generator)
    keys = torch.randn(HEADS, len(which), HEAD_DIM, generator=generator)
    return hidden_states.to(device, dtype), keys.to(device, dtype)


def nearly_square(num_tokens: int) -> tuple[int, int]:
    height = next(side for side in range(math.isqrt(num_tokens), 0, -1) if num_tokens % side == 0)
    return height, num_tokens // height


def theory(num_tokens: int, num_keep: int, images: int, parameters: PruningParameters, itemsize: int) -> tuple[float, float]:
    """Least work: MB read (hidden states to choose and to merge, keys per pivot, similarities of the kept) and MFLOP."""
    values = num_tokens * WIDTH  # of the hidden states of a picture, and of its keys
    megabytes = (itemsize * values * (2 + parameters.num_pivots) + 4 * num_tokens * num_keep) / 1e6
    cosines = 2 * num_tokens**2 * parameters.num_channels
    megaflop = (cosines + values * (3 + 3 * parameters.num_pivots + 2) + 10 * num_tokens * num_keep) / 1e6
    return images * megabytes, images * megaflop


def functions(hidden_states, keys, num_tokens: int, num_keep: int, images: int, parameters: PruningParameters) -> dict:
    """What is timed, by its name in a row."""

    def select():
        batch = GridBatch([nearly_square(num_tokens)] * images, [num_keep] * images, hidden_states.device)
        return select_batch(hidden_states, keys, batch, parameters)

    def merge(selection):
        return aggregate_tokens(hidden_states, selection, parameters.aggregation_weight)

    return {"total_s": lambda: merge(select()), "select_s": select, "aggregate_s": partial(merge, select())}


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict:
    device = arguments.device
    result = environment(device) | {"benchmark": "selection", "repeats": arguments.repeats, "rows": []}
    print(f"{heading(result)}; {WIDTH} channels, {HEADS} heads of {HEAD_DIM}")
    for num_tokens, images, dtype in itertools.product(arguments.tokens, arguments.images, arguments.dtype):
        num_keep = num_tokens_to_keep(num_tokens, arguments.ratio)
        inputs = make_inputs(num_tokens, images, getattr(torch, dtype), device)
        megabytes, megaflop = theory(num_tokens, num_keep, images, PruningParameters(), inputs[0].itemsize)
        work = f"{images} x {num_tokens} -> {num_keep} {dtype}: {megabytes:.0f} MB read, {megaflop:.0f} MFLOP"
        print(f"at least, {work}", flush=True)
        calls = {
            (token_batch, part): function
            for token_batch in arguments.token_batch
            for part, function in functions(
                *inputs, num_tokens, num_keep, images, PruningParameters(token_batch=token_batch)
            ).items()
        }
        seconds = interleaved_medians(calls, arguments.repeats, device, warmup=5)
        shape = {"tokens": num_tokens, "kept": num_keep, "images": images, "dtype": dtype}
        for token_batch in arguments.token_batch:
            parts = {part: value for (size, part), value in seconds.items() if size == token_batch}
            result["rows"].append(shape | {"token_batch": token_batch} | parts)
    print("\n" + table([shown(row) for row in result["rows"]]))
    return result


def shown(row: dict) -> dict:
    """A row as the table has it, in ms."""
    return {key.replace("_s", " ms"): f"{1e3 * value:.3f}" if key.endswith("_s") else value for key, value in row.items()}


def draw(result: dict, axes) -> None:
    labels = [f"{row['images']} x {row['tokens']}, {row['dtype']}, token batch {row['token_batch']}" for row in result["rows"]]
    draw_bars(axes, labels, {"choosing and merging": [1e3 * row["total_s"] for row in result["rows"]]}, "ms")


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    on_gpu = parser.get_default("device") == "cuda"
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 1296, 2880], help="visual tokens of a picture")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8] if on_gpu else [1], help="pictures selected together")
    parser.add_argument("--token-batch", type=int, nargs="+", default=[16, 1], help="candidates judged together")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    run(parser.parse_args(), measure, draw)


if __name__ == "__main__":
    main()
