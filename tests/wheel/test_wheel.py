"""The wheel and the sdist: what is in them, and that what is installed of them works without the clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vlmpruner_lmms_eval", "vlmpruner_vllm")
SCRIPTS = {"app.py", "demo.py", "setup.py"}
MODULES = {path.name for path in ROOT.glob("*.py")} - SCRIPTS
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(*command, **options) -> None:
    process = subprocess.run(
        list(map(str, command)),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        **options,
    )
    assert process.returncode == 0, process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Wheel and sdist, the wheel built of the sdist. They are built in a copy, since setuptools writes beside its sources."""
    scratch = tmp_path_factory.mktemp("built")
    shutil.copytree(
        ROOT, scratch / "clone", ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "work")
    )
    run(sys.executable, "-m", "build", "--outdir", scratch / "dist", scratch / "clone")
    (wheel,), (sdist,) = (scratch / "dist").glob("*.whl"), (scratch / "dist").glob("*.tar.gz")
    return wheel, sdist


def plugin_files() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).glob("*.py")}


def test_the_wheel_holds_the_modules_of_the_library_alone(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if not PurePosixPath(name).parts[0].endswith(".dist-info")}
        (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    assert names == {f"vlmpruner/{name}" for name in MODULES} | plugin_files()
    fields = Parser().parsestr(metadata)
    assert fields["Description-Content-Type"] == "text/markdown" and fields["License-Expression"] == "Apache-2.0"
    assert fields.get_payload().startswith("# VLM-Pruner for transformers\n")


def test_the_sdist_holds_what_the_wheel_is_built_of(built):
    with tarfile.open(built[1]) as sdist:
        files = {member.name.split("/", 1)[1] for member in sdist.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    papers = {
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "docs/package.md",
        "pyproject.toml",
        "setup.py",
    }
    assert {name for name in files if ".egg-info/" not in name} == MODULES | plugin_files() | papers | made
    assert built[1].stat().st_size < 1_000_000


@pytest.mark.parametrize("form", ["wheel", "sdist"])
def test_what_is_installed_works_without_the_clone(built, tmp_path, form):
    """In an environment that has of the clone's nothing but torch, transformers and what they need."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", built[["wheel", "sdist"].index(form)])
    (site_packages,) = environment.glob("lib/python3.*/site-packages")
    (site_packages / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    empty.mkdir()
    if form == "sdist":  # the same files, which the other case runs
        installed = {path.name for path in (site_packages / "vlmpruner").glob("*.py")}
        assert installed == MODULES
        return
    run(python, Path(__file__).with_name("use_installed.py"), cwd=empty)
