"""Shared fixtures. Every test runs offline, on the CPU, on the tiny checkpoints in `tests/data/`."""

import os
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from fresh_python import FreshPython
from transformers.utils import logging

import vlmpruner


logging.set_verbosity_error()


ROOT = Path(__file__).resolve().parents[1]


class RootOfTests:
    """The root is the package `vlmpruner`, but no package of tests. As one, pytest would import its `__init__.py` a second
    time, under the name of the clone's folder, and fail where that name is no identifier."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path.resolve() == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(RootOfTests())
    imported = Path(next(iter(vlmpruner.__path__))).resolve()
    if imported != ROOT:
        raise pytest.UsageError(
            f"These tests are of {ROOT}, but this Python imports vlmpruner from {imported}, where its environment was made. "
            "Run `make test`, or `pip install -e .` in this folder."
        )


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config, items):
    shared = {item for item in items if shares_its_code(item)}
    config.hook.pytest_deselected(items=list(shared))
    items[:] = [item for item in items if item not in shared]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def shares_its_code(item) -> bool:
    """Whether a test is of a family that is `like` another, and is none of the `core` that all families run."""
    family = getattr(item, "callspec", None) and item.callspec.params.get("family")
    return bool(getattr(family, "like", None)) and not item.get_closest_marker("core")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory):
    """Runs scripts that know nothing of the project, unless it is on their path, with one cache of custom code for all."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with FreshPython(environment) as fresh:
        yield fresh
