"""Breaks one guarantee at a time on purpose, and says which tests of the matrix notice: `python tests/mutants.py`.

Each mutant is a change of one line in a copy of the repository. The matrix (`test_families.py`) runs on it one family at a
time, each test whatever its mark, up to the first failure. (`make test` runs a test that is marked `spread` with some of the
families.) The table says for each mutant in how many families a test failed, and which was the first. The status is 1 where a
mutant goes unnoticed in a family that it concerns.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fresh_python import FreshPython


ROOT = Path(__file__).resolve().parents[1]
# One of each code path: two LLaVA kinds, M-RoPE, timestamps, DeepStack, a hybrid, tiles, tiles as rows, several encoders.
FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "glm4v", "qwen3_vl", "qwen3_5", "internvl", "mistral3", "smolvlm")
CROPPED = tuple(family for family in FAMILIES if family != "qwen3_5")  # whose state has no past


@dataclass(frozen=True)
class Mutant:
    """A change that breaks a guarantee.

    Attributes:
        guarantee: what no longer holds.
        file: where, and
        old, new: what is changed into what; `old` is there once.
        families: those that it concerns, by default all.
    """

    guarantee: str
    file: str
    old: str
    new: str
    families: tuple[str, ...] = FAMILIES


MUTANTS = {
    "neighbour's keys": Mutant(
        "a method looks at each token's own keys",
        "pruned_decoder.py",
        "keys = tokens.take(below.keys.to(hidden_states.device).transpose(1, 2))",
        "keys = tokens.take(below.keys.to(hidden_states.device).transpose(1, 2).roll(1, 1))",
    ),
    "grid on its side": Mutant(
        "a method knows height and width of a grid",
        "stage_packing.py",
        "GridBatch([grid.grid for grid in grids], num_keep",
        "GridBatch([grid.grid[::-1] for grid in grids], num_keep",
        ("llava_onevision", "qwen2_vl", "glm4v", "qwen3_vl", "qwen3_5", "mistral3"),  # the others' grids are square
    ),
    "nothing merged": Mutant(
        "dropped tokens are merged into kept ones",
        "pruned_decoder.py",
        "return packed.index_put_(choice.packing.merged_places, merged)",
        "return packed",
    ),
    "counted anew": Mutant(
        "kept tokens keep their positions",
        "pruned_decoder.py",
        "embeddings = tuple(choice.packing.pack(part.to(packed.device)) for part in embeddings)",
        "embeddings = tuple(part[:, : packed.shape[1]] for part in embeddings)",
    ),
    "padding is seen": Mutant(
        "a row of a batch equals the row alone",
        "stage_packing.py",
        "        if longest == shortest:\n            return None",
        "        if True:\n            return None",
    ),
    "padding is seen later": Mutant(
        "cached decoding of a ragged batch equals a full forward",
        "pruned_cache.py",
        "        described = self.positions >= 0\n",
        "        described = self.positions >= -1\n",
    ),
    "rows left behind": Mutant(
        "reordered rows of a cache take their state along",
        "pruned_cache.py",
        "            state.move_rows(beam_idx)",
        "            pass",
    ),
    "cut at the full length": Mutant(
        "a cache can be cropped",
        "pruned_cache.py",
        "cache_layer.crop(-removed if stage is None else -removed_pruned[stage], **options)",
        "cache_layer.crop(-removed, **options)",
        CROPPED,
    ),
    "turns begin at 0": Mutant(
        "a later turn goes on behind the first",
        "pruned_cache.py",
        "        new = index + past_length\n",
        "        new = index\n",
        CROPPED,
    ),
    "the end is dropped": Mutant(
        "the last token of a row stays",
        "visual_grids.py",
        "return [replace(grid, keeps_last=is_needed(grid)) for grid in grids]",
        "return grids",
        tuple(family for family in FAMILIES if family != "llava_onevision"),  # whose images end with a newline, which stays
    ),
    "zeros in the loss": Mutant(
        "the loss leaves out what a dropped token would predict",
        "pruned_model.py",
        "supervised = shifted.masked_fill(dropped.to(shifted.device), ignore_index)",
        "supervised = shifted",
    ),
    "one ratio for all": Mutant(
        "a call has a ratio of its own",
        "pruned_model.py",
        "settings = self.config.pruning_settings(request.ratio) if has_visuals else None",
        "settings = self.config.pruning_settings() if has_visuals else None",
    ),
    "one operation more": Mutant(
        "off runs the stock class's operations alone",
        "pruned_model.py",
        "        if is_stock_call:\n            with self.config.encoding_for",
        "        if is_stock_call:\n            torch.zeros(1)\n            with self.config.encoding_for",
    ),
    "chosen again": Mutant(
        "gradient checkpointing runs a layer again on the same tokens",
        "pruned_decoder.py",
        "        if stage.choice is not None:  # gradient checkpointing",
        "        if False:  # gradient checkpointing",
    ),
    "positions forgotten": Mutant(
        "M-RoPE goes on behind an image",
        "pruned_cache.py",
        "    position_notes(cache).note(position_ids, attention_mask, int(cache.get_seq_length()))",
        "    pass",
        ("qwen2_vl", "glm4v", "qwen3_vl", "qwen3_5"),
    ),
    "features one further": Mutant(
        "DeepStack adds its features to their own tokens",
        "pruned_decoder.py",
        "                added = stage.choice.whole_packing.pack(added)",
        "                added = added[:, : hidden_states.shape[1]]",
        ("qwen3_vl",),
    ),
    "padding between tokens": Mutant(
        "a recurrent state goes over no padding",
        "pruned_decoder.py",
        "return hidden_states, inputs | self._inputs_of_linear(stage, hidden_states.device)",
        'return hidden_states, inputs | {"attention_mask": None}',
        ("qwen3_5",),
    ),
    "random weights": Mutant(
        "a missing weight is an error",
        "pruned_model.py",
        "if missing and not output_loading_info:",
        "if False:",
    ),
}


def copied(folder: Path) -> Path:
    """The files of the repository that git knows, as the package `vlmpruner` in `folder`."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        target = folder / "vlmpruner" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    return folder / "vlmpruner"


def check_patches(chosen: dict[str, Mutant]) -> None:
    """Stop where a mutant is no change of this code."""
    stale = [name for name, each in chosen.items() if (ROOT / each.file).read_text().count(each.old) != 1]
    if stale:
        sys.exit(f"What {', '.join(map(repr, stale))} would change is not there once. Mend tests/mutants.py.")


def first_failure(python: FreshPython, repo: Path, family: str) -> str | None:
    """The first test of a family's column that fails on `repo`; None where none does."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--every-family", "--family", family]
    words = ["-m", "pytest", *options, "tests/test_families.py"]
    done = python.run(*words, cwd=repo, path=[repo.parent, repo], timeout=1200)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/test_families\.py(?:::(\w+))?", done.stdout, re.MULTILINE)
    if not found or not found.group(1):
        sys.exit(f"{family}: the tests did not run.\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return found.group(1)


def row(name: str, mutant: Mutant, noticed: dict[str, str]) -> str:
    """A line of the table."""
    counts = Counter(noticed.values()).most_common()
    tests = ", ".join(f"`{test.removeprefix('test_')}`" + (f" ({count})" if count > 1 else "") for test, count in counts)
    return f"| {name} | {mutant.guarantee} | {len(noticed)} of {len(mutant.families)} | {tests} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", nargs="+", choices=MUTANTS, default=[*MUTANTS], metavar="NAME", help="by default all")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="NAME", help="by default nine")
    options = parser.parse_args()
    chosen = {name: MUTANTS[name] for name in options.mutants}
    check_patches(chosen)
    print("| mutant | what it breaks | noticed in | first, in how many families |\n|---|---|---|---|", flush=True)
    unnoticed = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as folder, FreshPython(environment | {"OMP_NUM_THREADS": "1"}) as python:
        repo = copied(Path(folder))
        for name, mutant in chosen.items():
            text = (ROOT / mutant.file).read_text()
            (repo / mutant.file).write_text(text.replace(mutant.old, mutant.new))
            families = [family for family in mutant.families if family in options.families]
            found = {family: first_failure(python, repo, family) for family in families}
            (repo / mutant.file).write_text(text)
            unnoticed += [f"{name} in {family}" for family, test in found.items() if test is None]
            print(row(name, mutant, {family: test for family, test in found.items() if test}), flush=True)
    if unnoticed:
        print(f"\nUnnoticed: {', '.join(unnoticed)}.")
    return int(bool(unnoticed))


if __name__ == "__main__":
    sys.exit(main())
