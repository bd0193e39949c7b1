"""Everything that wants a GPU, in one command: the GPU tests, then all measurements, one result file each.

    python benchmarks/gpu.py --minutes 9 --output benchmarks/results

The package need not be installed: torch, transformers, accelerate, pillow and pytest are enough. A part whose result is there
is not run again, and no part goes on longer than the minutes that are left, so where a machine is lent for a few minutes at a
time, call it again with the results of the call before in place. `--parts` runs only those named. Plots are made anywhere:
`python benchmarks/prefill.py --input FILE --plot FILE`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from math import inf
from pathlib import Path

import torch
from measurement import environment, hardware_slug


LEAST_SECONDS = 20  # a part that has less is not started
ROOT = Path(__file__).resolve().parents[1]
MODELS = ("llava-1.5-7b", "qwen2-vl-7b", "llava-next-7b", "qwen3-vl-4b", "llava-1.5-13b")
DECODED = ("llava-1.5-7b", "qwen2-vl-7b")
CONTEXTS = ["--cache", "dynamic", "--batch", "1", "8", "32", "--images", "1", "4"]
COMPILED = ["--cache", "static", "--batch", "1", "8"]  # compiling takes minutes
PARTS = {
    "tests": ["-m", "pytest", "-m", "gpu", "-q", "tests"],
    "selection": ["benchmarks/selection.py"],
    **{f"prefill_{model}": ["benchmarks/prefill.py", "--model", model] for model in MODELS},
    **{f"decode_{model}": ["benchmarks/decode.py", "--model", model, *CONTEXTS] for model in DECODED},
    **{f"decode_static_{model}": ["benchmarks/decode.py", "--model", model, *COMPILED] for model in DECODED},
}


def run_part(name: str, output: Path, variables: dict, seconds: float, options: list[str]) -> tuple[bool, str]:
    """Run one part; whether its result is there now, and what came of it in words."""
    command = [sys.executable, *PARTS[name]]
    if name != "tests":
        result = output / f"{name}_{hardware_slug(environment('cuda'))}.json"
        if result.exists():
            return True, f"{result.name} is there already"
        command += ["--output", str(result), *options]
    if seconds < LEAST_SECONDS:
        return False, "not started, no time left"
    start = time.monotonic()
    try:
        status = subprocess.run(command, cwd=ROOT, env=variables, timeout=None if seconds == inf else seconds).returncode
    except subprocess.TimeoutExpired:
        return False, f"stopped after {seconds:.0f} s"
    return status == 0, f"{'done' if status == 0 else f'failed with status {status}'} after {time.monotonic() - start:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=inf, help="time for all parts together")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("options", nargs="*", help="after --, for every measurement, as in: -- --repeats 5")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: error: torch sees no CUDA device here", file=sys.stderr)
        return 2
    deadline, outcomes = time.monotonic() + 60 * arguments.minutes, {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vlmpruner").symlink_to(ROOT)  # what `pip install -e .` does
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
        for name in arguments.parts:
            print(f"\n=== {name}", flush=True)
            outcomes[name] = run_part(name, arguments.output, variables, deadline - time.monotonic(), arguments.options)
    print("\n" + "\n".join(f"{name}: {words}" for name, (_, words) in outcomes.items()))
    return 0 if all(is_there for is_there, _ in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
