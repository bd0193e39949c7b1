"""The notebook runs on the model at the root, and what is stored with it is what it prints."""

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "pruning_tour.ipynb"
MOST_BYTES = 700_000


def printed(cell) -> str:
    """The text that a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.once
def test_the_notebook_prints_what_is_stored_with_it():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    run = nbformat.read(NOTEBOOK, as_version=4)
    for cell in run.cells:
        cell.outputs = [] if cell.cell_type == "code" else None
    nbclient.NotebookClient(
        run, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    code = [(old, new) for old, new in zip(stored.cells, run.cells, strict=True) if old.cell_type == "code"]
    assert sum(pictures(new) for _, new in code) == 4
    for old, new in code:
        assert pictures(old) == pictures(new), old.source
        if "measured" in old.metadata.get("tags", ()):  # times, which are those of a machine, are not stored
            assert not old.outputs
        else:
            assert printed(old) == printed(new), old.source
    assert "first token after" in printed(code[-1][1])
