"""Shared fixtures. Every test runs offline, on the CPU, on the tiny checkpoints in `tests/data/`."""

import os
from pathlib import Path
from zlib import crc32


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


def pytest_addoption(parser):
    parser.addoption("--every-family", action="store_true", help="run each test of the matrix with all families")
    parser.addoption("--family", action="append", help="run the matrix with this family alone; may come several times")


def pytest_generate_tests(metafunc):
    """The families of a test that takes `family` and names none.

    - Marked `core`: all.
    - Without a mark: those that have code of their own, so none that is `like` another.
    - Marked `spread`: one of each kind of decoder, as its name decides, so that each family gets some of these tests. The code
      that they go through is one for all families.
    """
    definition = metafunc._arg2fixturedefs.get("family", [None])[-1]
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if definition is None or definition.params is not None or any("family" in names for names in named):
        return
    from families import FAMILIES, one_of_each_kind  # not in every environment

    families, marks = list(FAMILIES.values()), {mark.name for mark in metafunc.definition.iter_markers()}
    if "core" not in marks and not metafunc.config.getoption("every_family"):
        own = [family for family in families if not family.like]
        families = one_of_each_kind(crc32(metafunc.function.__name__.encode()), families) if "spread" in marks else own
    if only := metafunc.config.getoption("family"):
        families = [family for family in families if family.name in only]
    metafunc.parametrize("family", families, ids=lambda family: family.name, indirect=True, scope=definition.scope)


@pytest.fixture
def family(request):
    return request.param


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
