"""The commands and the code of README and docs run, offline, on the model at the root."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from vlmpruner.export import export_model


ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / "training" / "README.md"])
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BASE, EXPORT = "llava-hf/llava-1.5-7b-hf", "llava-pruned"  # what a reader has, or is said to make
# (page, how the block begins) -> why it does not run here.
NOT_RUN = {
    ("docs/attention.md", 'pip install -e ".[flash-attn]"'): "needs a GPU",
    ("docs/attention.md", "from transformers"): "needs a GPU; tests/test_flash_attention.py loads so with a stand-in",
    (
        "docs/any_model.md",
        "python -m vlmpruner --ratio 0.889 -- -m lmms_eval",
    ): "needs lmms-eval; tests/lmms_eval_plugin runs it",
    ("docs/any_model.md", "python -m vlmpruner --ratio 0.889 -- sft.py"): "needs TRL and data; its page says what was run",
    ("docs/any_model.md", "python -m vlmpruner --ratio 0.889 -- transformers"): "serves until it is stopped",
    ("docs/any_model.md", "python -m vlmpruner --ratio 0.889 -- run.py"): "needs VLMEvalKit and others; not run",
    ("docs/evaluation.md", "lmms-eval --model"): "needs lmms-eval; tests/lmms_eval_plugin runs it",
    ("docs/evaluation.md", "torchrun"): "needs lmms-eval; tests/lmms_eval_plugin runs it",
    ("docs/evaluation.md", 'pip install -e ".[lighteval]"'): "needs lighteval; tests/test_lighteval.py runs it",
    ("docs/looking.md", 'pip install -e ".[app]"'): "serves until it is stopped; tests/app opens the page",
    ("docs/looking.md", 'pip install -e ".[notebook]"'): "tests/test_notebook.py runs the notebook",
    ("docs/package.md", "import vlmpruner"): "an excerpt; tests/wheel runs it",
    ("docs/parallel.md", "torchrun"): "its program is below it; tests/test_parallel.py runs both",
    ("docs/parallel.md", "from PIL import Image"): "one of two processes; tests/test_parallel.py runs both",
    ("docs/parallel.md", 'pip install -e ".[ray]"'): "needs a folder of pictures; tests/test_examples.py has one",
    ("docs/quantization.md", "from torchao"): "needs torchao; tests/test_quantization.py loads so where it is installed",
    ("docs/quantization.md", 'pip install -e ".[quantization]"'): "takes minutes; tests/test_quantization.py has its parts",
    ("docs/serving.md", 'pip install "vlmpruner[vllm]"'): "needs vLLM; tests/vllm_plugin/test_server.py starts a server",
    ("docs/serving.md", "from openai import OpenAI"): "asks that server, and opens an address",
    ("docs/serving.md", "make bench-serving"): "takes minutes; tests/test_benchmarks.py has its parts",
    ("docs/training.md", "from functools import partial"): "parts of a script; tests/test_tools.py trains so",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runner_of(page: Path) -> Path | None:
    """The test that a page names as the one that runs it."""
    named = re.search(r"`(tests/\w+\.py)` runs this\s+page", page.read_text())
    return ROOT / named.group(1) if named else None


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


def reason(page: Path, code: str) -> str | None:
    return next((why for (name, start), why in NOT_RUN.items() if name == name_of(page) and code.startswith(start)), None)


RUN = [page for page in PAGES if not runner_of(page) and any(reason(page, code) is None for _, code in blocks(page))]


@pytest.mark.once
def test_reasons_are_of_blocks_that_there_are():
    for name, start in NOT_RUN:
        assert any(code.startswith(start) for _, code in blocks(ROOT / name)), (name, start)
    for page in PAGES:
        if test := runner_of(page):
            assert page.name in test.read_text(), f"{name_of(page)} says that {test.name} runs it"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return export_model(ROOT, tmp_path_factory.mktemp("docs") / EXPORT, report=lambda line: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model at the root as its base model: what stands in for a checkpoint of the Hub."""
    return export_model(ROOT, tmp_path_factory.mktemp("docs") / "base", to_base=True, report=lambda line: None)


@pytest.fixture
def clone(tmp_path):
    """What a reader stands in: the repository, with a photo in it. Folders are links, in which nothing here writes."""
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
        elif not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    shutil.copy(ROOT / "docs" / "scene.png", tmp_path / "photo.jpg")
    return tmp_path


def commands(language: str, code: str) -> list[list[str]]:
    """The commands of a block: words that follow `python`, or another line of the shell."""
    if language == "python":
        return [["-c", code]]
    lines = code.replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] if line.startswith("python ") else line for line in lines]


@pytest.mark.once
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_what_a_page_says_to_run_runs(page, clone, base, export, fresh_python):
    """Each command in a process of its own, in the order of the page; lines that install are left out."""
    if f"--output {EXPORT}" not in page.read_text():
        (clone / EXPORT).symlink_to(export)
    for language, code in blocks(page):
        if reason(page, code):
            continue
        code = code.replace(BASE, str(base))
        for command in commands(language, re.sub(r"^pip install .*\n", "", code, flags=re.MULTILINE)):
            if isinstance(command, str):
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=clone, capture_output=True, text=True)
            else:
                folder = clone if command[0].startswith("-") else clone / Path(command[0]).parent
                done = fresh_python.run(*command, cwd=clone, path=[folder])
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
