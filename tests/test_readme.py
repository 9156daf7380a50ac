"""The README's own statements: true line counts, flags that exist, Python that runs, no gaps."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_is_on_the_map():
    on_the_map = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    assert on_the_map == {path.name for path in ROOT.glob("*.py")}


def test_every_flag_of_generate_is_in_the_readme_and_back():
    shown = subprocess.run([sys.executable, "generate.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    flags = set(re.findall(r"--\w+", shown)) - {"--help"}
    section = README.split("## Generate")[1].split("\n## ")[0]
    assert set(re.findall(r"--\w+", section)) | {"--checkpoint_path"} == flags


def test_the_python_example_runs(tiny_checkpoint):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("checkpoints/SmolLM2-135M-Instruct", str(tiny_checkpoint))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue()


def test_no_placeholder_is_left():
    assert "@@" not in README


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_figures_are_those_of_the_files(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    for row in content["rows"]:
        if content["suite"] in ("prefill", "forward", "train"):
            figure = f"{row['seconds'] * 1e3:.1f} ms"
        else:
            figure = f"| {row['tokens'] / row['seconds']:.1f} "
        assert figure in README, row["name"]
