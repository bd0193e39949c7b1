"""What a reader, a machine and a contributor are told: links, versions, workflow, forms, the collection."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import export
from hub import collection


ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "training" / "README.md"])
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
pytestmark = pytest.mark.once


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target


def test_versions_are_one():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == version
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2512.02700"


def test_the_workflow_runs_what_ci_runs():
    listed = subprocess.run(["bash", ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True).stdout
    targets = json.loads(listed)
    assert {"lint", "test", "test-oldest"} <= set(targets)
    for target in targets:
        made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    run = workflow["jobs"]["run"]
    assert run["strategy"]["matrix"] == {"target": "${{ fromJSON(needs.targets.outputs.list) }}"}
    assert run["steps"][-1]["run"] == "bash .ci/run ${{ matrix.target }}"
    python = next(step["with"]["python-version"] for step in run["steps"] if "setup-python" in step.get("uses", ""))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python}"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms_are_what_github_takes(form):
    content = yaml.safe_load(form.read_text())
    assert set(content) == {"name", "description", "labels", "body"}
    ids = [part["id"] for part in content["body"]]
    assert len(ids) == len(set(ids)) and any(part.get("validations", {}).get("required") for part in content["body"])
    for part in content["body"]:
        assert part["type"] in ("input", "textarea", "dropdown", "checkboxes") and part["attributes"]["label"]


def test_the_collection_prints_commands_that_export_takes(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["collection.py"])
    assert collection.main() == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    entries = yaml.safe_load(collection.COLLECTION.read_text())["models"]
    assert [command[2] for command in commands] == [entry["base"] for entry in entries]
    assert len({entry["name"] for entry in entries}) == len(entries) >= 9
    for command in commands:
        assert command[:2] == ["python", "export.py"]
        arguments = export.argument_parser().parse_args(command[2:])
        assert arguments.results is None or (ROOT / arguments.results).is_file()


def test_the_collection_is_exported_and_published(fresh_python, tmp_path, monkeypatch, capfd):
    """The small model is exported for real; the upload and the Hub are not."""

    def run(command, cwd, **options):
        return fresh_python.run(*command[1:], cwd=cwd, path=[cwd])

    monkeypatch.setattr(collection.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["collection.py", "tiny-scenes-vlmpruner", "--run", str(tmp_path)])
    assert collection.main() == 0
    assert "## Measured" in (tmp_path / "tiny-scenes-vlmpruner" / "README.md").read_text()

    done = []

    class Made:
        slug, url = "someone/vlm-pruner-1", "the address"

    monkeypatch.setattr(collection, "create_collection", lambda title, **options: done.append((title, options)) or Made)
    monkeypatch.setattr(collection, "add_collection_item", lambda slug, item, kind, **options: done.append((slug, item, kind)))
    monkeypatch.setattr(collection.subprocess, "run", lambda command, **options: done.append(command[1:]) or Succeeded)
    monkeypatch.setattr(sys, "argv", ["collection.py", "tiny-scenes-vlmpruner", "--run", str(tmp_path), "--publish", "someone"])
    assert collection.main() == 0
    assert done[0][-2:] == ["--push-to-hub", "someone/tiny-scenes-vlmpruner"]
    assert done[1][0] == "VLM-Pruner" and done[1][1]["namespace"] == "someone"
    assert done[2] == ("someone/vlm-pruner-1", "someone/tiny-scenes-vlmpruner", "model")
    assert capfd.readouterr().out.splitlines()[-1] == "the address"


class Succeeded:
    returncode = 0


def test_an_absent_entry_of_the_collection_is_named():
    with pytest.raises(ValueError, match=r"The collection has no other; it has llava-1\.5-7b-vlmpruner, "):
        collection.chosen(yaml.safe_load(collection.COLLECTION.read_text())["models"], ["other"])
