"""Prompts for a model that writes Python: `python -m skippy.engine.training.stdlib_prompts > prompts.jsonl`.

Function headers with their docstrings, out of the standard library of the interpreter that
runs this, some behind a few imports of their module. One JSON object with a "prompt" per line.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 60, 1200
"""Characters of a header with its docstring."""
IMPORTS = 2
"""Import lines at most."""
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib"}


def library_prompts(folder: Path) -> Iterator[str]:
    """A prompt per documented function at the top level of the modules below a folder, in the order of their names."""
    for path in sorted(folder.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(folder).parts):
            try:
                source = path.read_text(encoding="utf-8")
                yield from prompts_of(source)
            except (SyntaxError, ValueError):
                continue  # some modules are there to be broken, or in another encoding


def prompts_of(source: str) -> Iterator[str]:
    """A prompt per documented function at the top level of a module, every other one behind imports.

    Raises:
        SyntaxError: it is not Python.
    """
    body, lines = ast.parse(source).body, source.splitlines()
    imports = [
        lines[node.lineno - 1]
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno == node.end_lineno
    ]
    for place, node in enumerate(body):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            header = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n"
            if SHORTEST < len(header) < LONGEST:
                before = imports[:IMPORTS] if place % 2 else []
                yield "\n".join([*before, "", "", header]) if before else header


def main() -> int:
    prompts = list(library_prompts(Path(sysconfig.get_path("stdlib"))))
    random.Random(0).shuffle(prompts)
    for prompt in prompts:
        sys.stdout.write(json.dumps({"prompt": prompt}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
