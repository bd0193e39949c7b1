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


def run(*command, cwd: Path | None = None) -> None:
    process = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Wheel and sdist, the wheel built of the sdist. They are built in a copy, since setuptools writes beside its sources."""
    scratch = tmp_path_factory.mktemp("built")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "work")
    shutil.copytree(ROOT, scratch / "clone", ignore=left_out)
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
    texts = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "docs/package.md"}
    settings = {"MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg", "setup.py"}
    assert {name for name in files if ".egg-info/" not in name} == MODULES | plugin_files() | texts | settings
    assert built[1].stat().st_size < 1_000_000


def install(distribution: Path, environment: Path) -> Path:
    """The site-packages of a new environment that has `distribution` and nothing else."""
    venv.create(environment, symlinks=True)
    run(sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--no-deps", distribution)
    (site_packages,) = environment.glob("lib/python3.*/site-packages")
    return site_packages


def test_the_sdist_installs_what_the_wheel_does(built, tmp_path):
    site_packages = install(built[1], tmp_path / "environment")
    assert {path.name for path in (site_packages / "vlmpruner").iterdir() if path.is_file()} == MODULES
    assert all((site_packages / name).is_file() for name in plugin_files())


def test_what_is_installed_works_without_the_clone(built, tmp_path):
    """In an environment that has torch, transformers and what they need from the one that tests, and not the clone."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    site_packages = install(built[0], environment)
    (site_packages / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    empty.mkdir()
    run(environment / "bin" / "python", Path(__file__).with_name("use_installed.py"), cwd=empty)
