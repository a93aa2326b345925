"""The notebooks run, in a process of their own, and are kept with what they printed and drew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 60.0
"""Of processor time that a notebook may take, its kernel's start included."""


def outputs(notebook: Any) -> list[Any]:
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def kinds(notebook: Any) -> list[list[str]]:
    """What each cell of code gives: text, pictures. Warnings, which versions differ in, not."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [out.output_type, *sorted(out.get("data", {}))]
        for outs in cells
        for out in outs
        if out.get("name") != "stderr"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_what_it_is_kept_with(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are held by assertions in its cells: one that fails ends the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DISTR_MEASURE", "0")
    monkeypatch.delenv("DISTR_POLICY", raising=False)
    kept = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict(json.loads(json.dumps(kept)))
    before, client = (
        os.times(),
        nbclient.NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        ),
    )
    client.execute()
    after = os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < SECONDS
    assert kinds(notebook) == kinds(kept)


def test_they_are_kept_with_pictures_and_without_errors() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert {out.output_type for out in outputs(notebook)} <= {
            "stream",
            "display_data",
            "execute_result",
        }
        assert [out.text for out in outputs(notebook) if out.get("name") == "stderr"] == []
        pictures = [out for out in outputs(notebook) if "image/png" in out.get("data", {})]
        assert pictures
        assert path.stat().st_size < 800_000
        assert "site-packages" not in path.read_text(encoding="utf-8")
