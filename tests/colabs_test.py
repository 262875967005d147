"""The notebooks run from top to bottom."""

import json
from pathlib import Path

import pytest
from conftest import TINY


@pytest.mark.slow
def test_digits_notebook_runs(digits_dir, tmp_path, monkeypatch):
    notebook = json.loads(Path("colabs/digits.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    # A smaller model and a folder that goes away; all else runs as it stands.
    overrides = {**TINY, "data.path": digits_dir}
    code = "\n".join(cells).replace("overrides = {}", f"overrides = {overrides}")
    code = code.replace('"runs/digits_notebook"', repr(str(tmp_path)))
    assert str(tmp_path) in code and digits_dir in code
    exec(compile(code, "digits.ipynb", "exec"), {"__name__": "notebook"})
    assert (tmp_path / "report.json").exists()
