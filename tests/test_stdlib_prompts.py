"""Prompts out of Python modules."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from skippy.engine.training import stdlib_prompts

DOC = '    """Say what is to be said about the things that are there."""\n'
MODULE = f"""import os
from sys import (
    path)
import json

def first(things):
{DOC}    return things

def undocumented(things):
    return things

@decorated
def third(things, more=None):
{DOC}    return more

def short():
    'Too short.'
    return 1

def nothing_but_its_docstring():
{DOC}
"""


def test_headers_and_docstrings_are_cut_out_and_some_follow_imports() -> None:
    first, third = sorted(stdlib_prompts.prompts_of(MODULE), key=lambda prompt: "third" in prompt)
    assert first.endswith(f"def first(things):\n{DOC}")
    assert third.endswith(f"def third(things, more=None):\n{DOC}")
    assert "import os\nimport json\n\n\ndef" in first + third
    assert "path" not in first + third


def test_broken_modules_and_tests_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "good.py").write_text(MODULE)
    assert len(list(stdlib_prompts.library_prompts(tmp_path))) == 2


def test_the_command_writes_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text(MODULE)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else sys.prefix)
    assert stdlib_prompts.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(set(json.loads(line)) == {"prompt"} for line in lines)
