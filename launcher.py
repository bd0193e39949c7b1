"""Run a program of other people with its vision-language models pruned:
`python -m vlmpruner --ratio 0.889 --method divprune -- script.py ARGUMENTS`, or `-- -m module ARGUMENTS`.

What the program loads with `from_pretrained`, by a stock class, an Auto class or a pipeline, is pruned in place before the
program gets it. At the end a line on stderr says what was pruned. The exit status is the program's, but `NOTHING_PRUNED` where
the program ended well and no image was pruned. Processors stay as they are.

Elsewhere this project changes the model that it was given and nothing else. Here `PreTrainedModel.from_pretrained` is replaced
for the whole process: the process runs this one program, and its caller asked for it.

Not pruned are models that are made in another way, and models of processes that the program starts. So the launcher goes inside
of other launchers: `accelerate launch -m vlmpruner --ratio 0.889 -- script.py`. transformers and torch are imported before the
program runs: set variables that they read at import, as `HF_HOME`, in the shell.
"""

import argparse
import os
import runpy
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

from transformers import PreTrainedModel

from . import in_place
from .configuration_vlmpruner import METHODS, METHODS_WITH, PruningConfig, check_ratio
from .export import add_pruning_keys
from .pruned_cache import PruningRecord
from .stock_lookups import stock_class, undecorated


NAME = "python -m vlmpruner"
NOTHING_PRUNED = 3  # 1 and 2 are what Python and argparse exit with
HOW_TO = (
    "Only models that this process loads with from_pretrained are pruned. A program that starts others, as accelerate launch "
    "and torchrun do, goes outside: accelerate launch -m vlmpruner ... -- script.py."
)


class Watch:
    """Prunes what a program loads, and counts what its calls pruned.

    Args:
        keys: `pruning_` key -> value, for all models.
    """

    def __init__(self, keys: dict):
        self.keys = keys
        self.num_images = self.num_calls = self.num_kept = self.num_visual = 0
        self.classes: Counter[str] = Counter()
        self.left_alone: Counter[str] = Counter()
        self.refusals: list[str] = []
        self._lock = threading.Lock()

    def prune(self, model: PreTrainedModel) -> None:
        """Prune a loaded model, or leave it alone if it is not of a supported family.

        Raises:
            ValueError: for one of a supported family that `vlmpruner.prune` refuses.
        """
        try:
            models = in_place.find_models(model)
            if models:
                in_place.prune(model, **self.keys)
        except ValueError as error:
            self.refusals.append(str(error))
            raise
        if not models:
            self.left_alone[type(model).__name__] += 1
        for each in models:
            own_class = undecorated(type(each))
            self.classes[stock_class(own_class).__name__] += 1
            observers = in_place.model_below(each).observers
            if self.count not in observers:
                observers.append(self.count)

    def count(self, record: PruningRecord) -> None:
        """Called with the record of each call that prunes."""
        with self._lock:
            self.num_calls += 1
            self.num_images += len({(grid.modality, grid.image) for grid in record})
            self.num_kept += record.num_kept
            self.num_visual += record.num_visual

    def __str__(self) -> str:
        """The last line. A video counts as an image."""
        if self.num_images:
            images, calls = _counted(self.num_images, "image"), _counted(self.num_calls, "call")
            kept = f"kept {self.num_kept} of {self.num_visual} visual tokens"
            text = f"pruned {images} in {calls} of {_listed(self.classes)}: {kept}."
        elif self.classes:
            text = (
                f"nothing was pruned: no call of {_listed(self.classes)} had an image or a video with a ratio above 0. {HOW_TO}"
            )
        else:
            text = f"nothing was pruned: no model of a supported family was loaded. {HOW_TO}"
        if self.left_alone:
            text += f" Left alone: {_listed(self.left_alone)}."
        if self.refusals:
            text += f" Refused: {' '.join(self.refusals)}"
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        return f"vlmpruner{rank}: {text}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names: Counter[str]) -> str:
    return ", ".join(name if number == 1 else f"{number} {name}" for name, number in names.items())


@contextmanager
def each_loaded(call: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Call `call` with each model that `from_pretrained` loads, before it is given to who asked for it."""
    stock = PreTrainedModel.__dict__["from_pretrained"]

    @classmethod
    @wraps(stock.__func__)
    def from_pretrained(cls, *args, **kwargs):
        loaded = stock.__func__(cls, *args, **kwargs)
        call(loaded[0] if isinstance(loaded, tuple) else loaded)  # with what was missing in the checkpoint, if asked for
        return loaded

    PreTrainedModel.from_pretrained = from_pretrained
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = stock


def run_program(words: list[str]) -> None:
    """Run a script or, after `-m`, a module in this process, as `python` with these words does. A script that is not a file is
    looked for among the commands, as `lmms-eval`."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    script = words[0] if os.path.exists(words[0]) else shutil.which(words[0]) or words[0]
    sys.argv = [script, *words[1:]]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def parse(words: list[str]) -> tuple[dict, list[str]]:
    """The keys, and the words of the program."""
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog=NAME,
        usage=f"{NAME} --ratio RATIO [--method METHOD] [--KEY VALUE ...] -- {{SCRIPT | -m MODULE}} [ARGUMENT ...]",
        description="Run a program with the vision-language models that it loads pruned.",
        allow_abbrev=False,
    )
    add_pruning_keys(parser, PruningConfig, METHODS_WITH)
    keys, program = vars(parser.parse_args(words[:end])), words[end + 1 :]
    if not program or program == ["-m"]:
        parser.error("the program is missing: write -- and then a script, or -m and a module.")
    if "pruning_ratio" not in keys:
        parser.error("--ratio is missing: the fraction of the visual tokens of each image that is removed.")
    method = keys.get("pruning_method", "vlm_pruner")
    if method not in METHODS:
        parser.error(f"--method must be one of {', '.join(METHODS)}, got {method!r}.")
    try:
        check_ratio(keys["pruning_ratio"])
    except ValueError as error:
        parser.error(str(error))
    if keys["pruning_ratio"] == 0:
        parser.error("--ratio 0 prunes nothing. Run the program without the launcher.")
    return {name.removeprefix(in_place.PREFIX): value for name, value in keys.items()}, program


def main() -> int:
    keys, program = parse(sys.argv[1:])
    watch = Watch(keys)
    try:
        with each_loaded(watch.prune):
            run_program(program)
    except SystemExit as exit:
        if exit.code:
            raise
    finally:
        print(watch, file=sys.stderr, flush=True)
    return 0 if watch.num_images else NOTHING_PRUNED
