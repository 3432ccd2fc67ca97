"""The README promises nothing that is not so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from readme_table import README, updated


def test_the_numbers_are_those_of_the_recorded_runs() -> None:
    assert updated(README.read_text()) == README.read_text(), "run python tests/readme_table.py"


def test_the_first_lines_of_python_run_as_printed(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert code is not None
    run = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "['0']"


@pytest.mark.parametrize("path", ["src", "python/dgrad", "tests", "cmake"])
def test_every_file_that_the_readme_names_exists(path: str) -> None:
    root = README.parent
    assert (root / path).is_dir()
    for name in re.findall(r"`((?:src|tests|python|cmake)/[\w./-]+\.\w+)`", README.read_text()):
        assert (root / name).exists(), name
