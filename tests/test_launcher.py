"""`python -m vlmpruner`: models that a program loads are pruned, the program runs as by `python`, and the last line says it."""

import os
import re
import subprocess
import sys

import pytest
from families import FAMILIES, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vlmpruner import launcher
from vlmpruner.launcher import NOTHING_PRUNED, Watch, each_loaded, main, run_program


LLAVA = FAMILIES["llava"].checkpoint
LAST_LINE = re.compile(r"vlmpruner: pruned (\d+) images? in (\d+) calls? of (.+): kept (\d+) of (\d+) visual tokens\.")
# Loads by the way that its second argument says, asks about a picture, and exits as the third says.
PROGRAM = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline
from beside import asks

def by_name(folder): return LlavaForConditionalGeneration.from_pretrained(folder)
def by_auto(folder): return AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)[0]
def by_pipeline(folder): return pipeline("image-text-to-text", model=folder).model

if __name__ == "__main__":
    folder, way, ending = sys.argv[1:4]
    model = globals()[way](folder)
    assert isinstance(model, LlavaForConditionalGeneration)
    asks(model, AutoProcessor.from_pretrained(folder))
    if ending == "error":
        raise KeyError("of the program")
    sys.exit({"none": None, "0": 0, "5": 5, "text": "the program's text"}[ending])
"""
BESIDE = """
from PIL import Image

def asks(model, processor):
    inputs = processor(images=Image.new("RGB", (140, 112)), text="<image> What is it?", return_tensors="pt")
    for _ in range(2):
        model.generate(**inputs, max_new_tokens=2)
"""
# Has no image, and a model of text beside.
OF_TEXT = """
import sys
from transformers import AutoModel, LlavaForConditionalGeneration
LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
AutoModel.from_pretrained(sys.argv[2])
"""
pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text(BESIDE)
    return tmp_path


@pytest.fixture
def launch(monkeypatch, capsys):
    """Runs the launcher in this process. Gives the exit status, or the program's exception, and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["-m", *map(str, words)])
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        loading, main_module = PreTrainedModel.from_pretrained, sys.modules["__main__"]
        try:
            status = main()
        except BaseException as error:
            status = error.code if isinstance(error, SystemExit) else error
        assert PreTrainedModel.from_pretrained == loading and sys.modules["__main__"] is main_module
        sys.modules.pop("beside", None)
        return status, capsys.readouterr().err

    yield run
    FAMILIES["llava"].model_class.observers.clear()


@pytest.mark.parametrize("way", ["by_name", "by_auto", "by_pipeline"])
def test_every_way_to_load_is_pruned_and_counted(way, launch, folder):
    status, error = launch("--ratio", 0.75, "--method", "divprune", "--", folder / "program.py", LLAVA, way, "none")
    images, calls, name, kept, visual = LAST_LINE.search(error).groups()
    assert (status, images, calls, name) == (0, "2", "2", "LlavaForConditionalGeneration")
    assert int(kept) == int(visual) // 4


@pytest.mark.parametrize("ending, status", [("0", 0), ("5", 5), ("text", "the program's text"), ("error", KeyError)])
def test_the_end_of_the_program_is_kept(ending, status, launch, folder):
    found, error = launch("--ratio", 0.5, "--", folder / "program.py", LLAVA, "by_name", ending)
    assert found == status or type(found) is status
    assert LAST_LINE.search(error)


def test_nothing_pruned_is_a_failure(launch, tmp_path):
    (tmp_path / "text.py").write_text(OF_TEXT)
    text = tmp_path / "text"
    model = AutoModelForImageTextToText.from_pretrained(LLAVA)
    model.get_decoder().save_pretrained(text)
    status, error = launch("--ratio", 0.5, "--", tmp_path / "text.py", LLAVA, text)
    assert status == NOTHING_PRUNED
    assert "nothing was pruned: no call of LlavaForConditionalGeneration had an image" in error
    assert f"Left alone: {type(model.get_decoder()).__name__}" in error
    (tmp_path / "empty.py").write_text("")
    status, error = launch("--ratio", 0.5, "--", tmp_path / "empty.py")
    assert status == NOTHING_PRUNED and "no model of a supported family was loaded" in error
    (tmp_path / "fails.py").write_text("raise SystemExit(7)")
    assert launch("--ratio", 0.5, "--", tmp_path / "fails.py")[0] == 7


def test_a_refused_model_is_an_error_of_the_load_and_in_the_last_line():
    class Fork(FAMILIES["llava"].stock_class):
        pass

    watch = Watch({"ratio": 0.5})
    with each_loaded(watch.prune), pytest.raises(ValueError, match="has code of its own"):
        Fork.from_pretrained(LLAVA)
    assert "Refused: " in str(watch) and "Fork has code of its own" in str(watch)


def test_a_pruned_repo_gets_the_keys_and_is_counted(tmp_path):
    """Its classes are those of its own code, which are not those of this package."""
    from vlmpruner.export import export_model

    repo = export_model(LLAVA, tmp_path / "pruned", report=lambda line: None)
    watch = Watch({"ratio": 0.75})
    with each_loaded(watch.prune):
        model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.") and model.config.pruning_ratio == 0.75
    processor = AutoProcessor.from_pretrained(LLAVA)
    model(**processor(images=picture(1, 140, 112), text="<image> What?", return_tensors="pt"))
    assert (watch.num_images, watch.num_calls, watch.num_kept) == (1, 1, watch.num_visual // 4)


@pytest.mark.parametrize(
    "words, error",
    [
        (["--ratio", "0.5", "script.py"], "unrecognized arguments: script.py"),
        (["--ratio", "0.5"], "the program is missing"),
        (["--ratio", "0.5", "--", "-m"], "the program is missing"),
        (["--", "script.py"], "--ratio is missing"),
        (["--ratio", "1", "--", "script.py"], r"pruning_ratio must be a number in \[0, 1\).*got 1.0"),
        (["--ratio", "0", "--", "script.py"], "--ratio 0 prunes nothing"),
        (["--ratio", "0.5", "--method", "divprun", "--", "script.py"], "--method must be one of .*got 'divprun'"),
    ],
)
def test_bad_words(words, error, launch):
    status, text = launch(*words)
    assert status == 2 and re.search(error, text)


def test_keys_of_the_command_line():
    words = ["--ratio", "0.5", "--num-pivots", "3", "--layer", "2", "--", "-m", "module", "--ratio", "9", "--", "x"]
    keys, program = launcher.parse(words)
    assert keys == {"ratio": 0.5, "num_pivots": 3, "layer": 2}
    assert program == ["-m", "module", "--ratio", "9", "--", "x"]


SHOWS = """#!/usr/bin/env python
import pickle, sys, beside
class Thing: pass
print([__name__, sys.argv, sys.path[0], type(pickle.loads(pickle.dumps(Thing()))) is Thing])
"""


@pytest.mark.parametrize("kind", ["script", "module", "command"])
def test_a_program_sees_what_python_shows_it(kind, folder, monkeypatch, capsys):
    """Name, arguments, path, and its classes by `__main__` when they are unpickled. The script in a process of its own."""
    for name in ("shows.py", "shows"):
        (folder / name).write_text(SHOWS)
        (folder / name).chmod(0o755)
    away = folder / "away"
    away.mkdir()
    monkeypatch.chdir(folder if kind == "module" else away)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    words = {"script": ["../shows.py"], "module": ["-m", "shows"], "command": ["shows"]}[kind] + ["a", "--", "-b"]
    as_python = [str(folder / "shows"), *words[1:]] if kind == "command" else words
    expected = subprocess.run([sys.executable, *as_python], capture_output=True, text=True, check=True).stdout
    if kind == "script":
        command = [sys.executable, "-m", "vlmpruner", "--ratio", "0.5", "--", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == NOTHING_PRUNED, done.stderr
        shown = done.stdout
    else:
        monkeypatch.setattr(sys, "argv", [])
        monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
        run_program(words)
        sys.modules.pop("beside")
        shown = capsys.readouterr().out
    assert shown == expected


def test_outside_of_the_launcher_nothing_observes():
    assert FAMILIES["llava"].model_class.observers == []
