"""What quantised weights change: which tokens are kept, and the answers, with pruning on and off.

`python benchmarks/quantization.py` loads the model at the root of this repo (or --model FOLDER) under each scheme and asks the
questions of benchmarks/accuracy.py. Needs torchao and bitsandbytes (the extra `quantization`). Answers are written as soon as
they are known, and a second run goes on where the first stopped.

unpruned, pruned  right answers in percent, mean over the question types
relative          pruned / unpruned of the same scheme, by type, with its 95 % interval (see benchmarks/accuracy.py)
kept as in float32  how many of a picture's kept tokens float32 weights keep too: mean, and the picture with the fewest
size              of the weights in memory
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accuracy import (  # noqa: E402
    QUESTION_TYPES,
    Configuration,
    RememberedFeatures,
    Results,
    answer_batch,
    collect_questions,
    configured,
    fingerprint_of,
    is_right,
    relative,
    scores,
)
from measurement import environment, place_and_versions  # noqa: E402


REFERENCE = "float32"


def _torchao(name: str, **options) -> Callable[[], dict]:
    def load_options() -> dict:
        from torchao import quantization
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(getattr(quantization, name)(**options)), "dtype": torch.bfloat16}

    return load_options


def _bitsandbytes(**options) -> Callable[[], dict]:
    def load_options() -> dict:
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**options), "dtype": torch.bfloat16}

    return load_options


# Name -> what `from_pretrained` gets. Modules that are not quantised are in bfloat16.
SCHEMES = {
    REFERENCE: lambda: {"dtype": torch.float32},
    "bfloat16": lambda: {"dtype": torch.bfloat16},
    "torchao int8 weights": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 weights and activations": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4 weights": _torchao("Int4WeightOnlyConfig"),
    "bitsandbytes 8-bit": _bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
}
# Only where the hardware can; AWQ has to be in the checkpoint, so it is the scheme "as it is" of --model.
GPU_SCHEMES = {
    "torchao fp8 weights and activations": _torchao("Float8DynamicActivationFloat8WeightConfig"),
    "as it is": dict,
}


def load(path: Path, scheme: str) -> tuple:
    """The model under a scheme and its processor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = (SCHEMES | GPU_SCHEMES)[scheme]()
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, device_map=device, **options).eval()
    RememberedFeatures(model)
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True)


@torch.inference_mode()
def evaluate(model, processor, questions: list, ratio: float, batch_size: int) -> tuple[dict[str, str], list[list[int]]]:
    """For each type a string of 0 and 1, and for each question the places of the kept tokens."""
    right, kept = dict.fromkeys(QUESTION_TYPES, ""), []
    with configured(model, Configuration("vlm_pruner" if ratio else "none", ratio)):
        for first in tqdm(range(0, len(questions), batch_size), leave=False):
            part = questions[first : first + batch_size]
            answers, record = answer_batch(model, processor, part)
            for (_, question), answer in zip(part, answers, strict=True):
                right[question.kind] += "01"[is_right(answer, question.answer)]
            if ratio:
                if record is None or len(record) != len(part):
                    raise RuntimeError(f"Not all of {len(part)} pictures were pruned.")
                kept += [image.kept.tolist() for image in record]
    return right, kept


def size_of(model) -> int:
    """Bytes of the weights as they lie in memory; a quantised tensor may say that it has the dtype that it stands for."""

    def size(tensor: torch.Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            return sum(map(size, parts))
        return tensor.nbytes

    return sum(map(size, (*model.parameters(), *model.buffers())))


def measure(path: Path, scheme: str, questions: list, ratio: float, batch_size: int) -> dict:
    """One entry of the results. Where a scheme can not be loaded or run, why."""
    try:
        model, processor = load(path, scheme)
        unpruned, _ = evaluate(model, processor, questions, 0, batch_size)
        pruned, kept = evaluate(model, processor, questions, ratio, batch_size)
    except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        return {"error": f"{type(error).__name__}: {reason}"}
    return {"unpruned": unpruned, "pruned": pruned, "kept": kept, "bytes": size_of(model)}


def overlap(kept: list[list[int]], reference: list[list[int]]) -> list[int]:
    """For each picture the number of tokens that both keep."""
    return [len(set(here) & set(there)) for here, there in zip(kept, reference, strict=True)]


def markdown(results: dict) -> str:
    reference = results[REFERENCE]["kept"]
    lines = [
        "| weights | size | unpruned | pruned | relative [95 %] | kept as in float32: mean, fewest |",
        "|---|---|---|---|---|---|",
    ]
    for scheme, entry in results.items():
        if "error" in entry:
            lines.append(f"| {scheme} | | | | | {entry['error']} |")
            continue
        means = (sum(scores(entry[name]).values()) / len(QUESTION_TYPES) for name in ("unpruned", "pruned"))
        same = overlap(entry["kept"], reference)
        cells = [
            scheme,
            f"{entry['bytes'] / 2**20:.1f} MiB",
            *(f"{mean:.1f}" for mean in means),
            "{:.1f} [{:.1f}, {:.1f}]".format(*relative(entry["pruned"], entry["unpruned"])),
            f"{sum(same) / len(same):.1f}, {min(same)} of {len(reference[0])}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


class SchemeResults(Results):
    def add(self, scheme: str, entry: dict):
        self.results[scheme] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of a pruned model repo, by default this one")
    parser.add_argument("--schemes", nargs="*", choices=[*SCHEMES, *GPU_SCHEMES], default=list(SCHEMES))
    parser.add_argument("--ratio", type=float, default=0.889)
    parser.add_argument("--per-type", type=int, default=50, help="questions of each type")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quantization.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    questions = collect_questions(options.per_type)
    settings = {"ratio": options.ratio}
    about = environment("cuda" if torch.cuda.is_available() else "cpu") | {"per_type": options.per_type}
    results = SchemeResults(options.output, fingerprint_of(options.model, questions) | settings, about)
    for scheme in dict.fromkeys([REFERENCE, *options.schemes]):
        if "error" in results.results.get(scheme, {"error": ""}):
            results.add(scheme, measure(options.model, scheme, questions, options.ratio, options.batch_size))
            gc.collect()
    measured = results.content["about"]
    heading = f"Questions of each type: {measured['per_type']}. {place_and_versions(measured)}."
    table = f"{heading}\n\n{markdown(results.results)}"
    options.output.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
