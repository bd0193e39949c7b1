"""How long does choosing and merging take? Times `prune_tokens` on random tokens of a LLaVA-1.5-7B-sized decoder.

    python benchmarks/selection.py --tokens 576 1296 --token-batch 16 1 --dtype float32 --device cpu

Prints what has to be read and computed at least, warms up, and takes the best of five medians (the machine may be
shared). The tokens are noise around a few dozen prototypes, so that the rounds accept as unevenly as on images. The last
line is one JSON object.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from token_pruning import PruningParameters, aggregate_tokens, num_tokens_to_keep, prune_tokens, select_tokens


WIDTH, HEADS, HEAD_DIM = 4096, 32, 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 1296], help="visual tokens; squares")
    parser.add_argument("--token-batch", type=int, nargs="+", default=[16, 1], help="candidates per token batch")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="dtype of the inputs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ratio", type=float, default=0.889, help="fraction of tokens removed")
    parser.add_argument("--repeats", type=int, default=20, help="calls per median")
    return parser.parse_args()


def processor_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def make_inputs(num_tokens: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    prototypes = torch.randn(48, WIDTH, generator=generator)
    which = torch.randint(0, 48, (num_tokens,), generator=generator)
    hidden_states = 0.5 + prototypes[which] + 0.7 * torch.randn(num_tokens, WIDTH, generator=generator)
    keys = torch.randn(HEADS, num_tokens, HEAD_DIM, generator=generator)
    return hidden_states.to(device, dtype), keys.to(device, dtype)


def best_median_ms(function, device: str, repeats: int) -> float:
    def timed() -> float:
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    for _ in range(5):
        timed()
    return min(statistics.median(timed() for _ in range(repeats)) for _ in range(5))


def theory(num_tokens: int, num_keep: int, parameters: PruningParameters, itemsize: int) -> tuple[float, float]:
    """Least work: MB read (hidden states to choose and to merge, keys per pivot, similarities of the kept) and MFLOP."""
    values = num_tokens * WIDTH  # of the hidden states, and of the keys
    megabytes = (itemsize * values * (2 + parameters.num_pivots) + 4 * num_tokens * num_keep) / 1e6
    cosines = 2 * num_tokens**2 * parameters.num_channels
    return megabytes, (cosines + values * (3 + 3 * parameters.num_pivots + 2) + 10 * num_tokens * num_keep) / 1e6


def measure(inputs: tuple, device: str, repeats: int) -> dict[str, float]:
    hidden_states, parameters = inputs[0], inputs[-1]
    selection = select_tokens(*inputs)
    functions = {
        "total_ms": lambda: prune_tokens(*inputs),
        "select_ms": lambda: select_tokens(*inputs),
        "aggregate_ms": lambda: aggregate_tokens(hidden_states, selection, parameters.aggregation_weight),
    }
    return {name: round(best_median_ms(function, device, repeats), 3) for name, function in functions.items()}


def main():
    arguments = parse_arguments()
    environment = {
        "processor": processor_name(arguments.device),
        "device": arguments.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    rows = []
    for num_tokens, dtype in itertools.product(arguments.tokens, arguments.dtype):
        grid, num_keep = (math.isqrt(num_tokens),) * 2, num_tokens_to_keep(num_tokens, arguments.ratio)
        hidden_states, keys = make_inputs(num_tokens, getattr(torch, dtype), arguments.device)
        megabytes, megaflop = theory(num_tokens, num_keep, PruningParameters(), hidden_states.itemsize)
        print(f"at least, {num_tokens} -> {num_keep} {dtype}: {megabytes:.0f} MB read, {megaflop:.0f} MFLOP")
        for token_batch in arguments.token_batch:
            row = {"tokens": num_tokens, "kept": num_keep, "dtype": dtype, "token_batch": token_batch}
            inputs = hidden_states, keys, grid, num_keep, PruningParameters(token_batch=token_batch)
            rows.append(row | measure(inputs, arguments.device, arguments.repeats))
    print("".join(f"{column:>14}" for column in rows[0]))
    for row in rows:
        print("".join(f"{value:>14}" for value in row.values()))
    print(json.dumps(environment | {"rows": rows}))


if __name__ == "__main__":
    main()
