"""Who may import whom. Read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import skippy.engine

REPOSITORY = Path(__file__).parents[1]
WITHOUT_TORCH = (
    "accept",
    "admission",
    "blocks",
    "config",
    "controller",
    "drafters.auto",
    "drafters.base",
    "drafters.calibration",
    "drafters.ngram",
    "drafters.none",
    "drafters.suffix",
    "errors",
    "hub",
    "forecast",
    "messages",
    "progress",
    "prompts",
    "roofline",
    "scheduler",
    "sequence",
    "shape",
    "tokenizer",
    "types",
)

FORBIDDEN = [
    # (modules, what they must not import, except in these)
    ("skippy.engine", ("skippy.server", "fastapi", "starlette", "uvicorn", "pydantic", "httpx"), ()),
    ("skippy.server", ("torch", "transformers", "bitsandbytes"), ()),
    *((f"skippy.engine.{name}", ("torch",), ()) for name in WITHOUT_TORCH),
    ("skippy.engine.model", ("skippy.engine.kv", "skippy.engine.scheduler"), ()),
    *(
        (f"skippy.engine.{name}", ("skippy.engine.adapter", "skippy.engine.adapter_files", "skippy.engine.chain"), ())
        for name in ("model", "runner", "attention", "sampling")
    ),
    # How a configuration reads is known before anything is loaded.
    ("skippy.engine.families", ("skippy.engine.weights", "skippy.engine.build", "transformers"), ()),
    ("skippy.engine.adapter", ("skippy.engine.runner", "skippy.engine.kv", "skippy.engine.adapter_files"), ()),
    # A draft pass and a chain of tokens are the business of drafters that run a model, and of their training.
    (
        "skippy",
        ("skippy.engine.chain",),
        ("skippy.engine.drafters.s3d", "skippy.engine.drafters.eagle3", "skippy.engine.training"),
    ),
    # What a training would take is told before there is one.
    (
        "skippy",
        ("skippy.engine.training",),
        ("skippy.engine.training", "skippy.engine.plan", "skippy.engine.engine", "skippy.engine.learning"),
    ),
    ("skippy.engine.accept", ("skippy.engine.model",), ()),
    ("skippy.engine.sampling", ("skippy.engine.model",), ()),
    ("skippy", ("skippy.engine.bench",), ("skippy.engine.bench",)),
    ("skippy", ("skippy.engine.measure",), ("skippy.engine.bench", "skippy.engine.measure", "skippy.engine.tune")),
    # What a plan is saved as is read when serving; how it is made is not known there.
    ("skippy", ("skippy.engine.tune",), ("skippy.engine.tune",)),
    ("skippy", ("skippy.engine.plan",), ("skippy.engine.plan", "skippy.engine.tune")),
    ("skippy", ("skippy.engine.roofline",), ("skippy.engine.plan", "skippy.engine.tune")),
    ("skippy", ("skippy.engine.forecast",), ("skippy.engine.tune",)),
    ("skippy.server", ("skippy.engine.run_bench", "skippy.engine.BenchOptions"), ("skippy.server.cli",)),
    ("skippy", ("bitsandbytes",), ("skippy.engine.quant",)),
    # Nothing else asks the network for anything.
    ("skippy", ("huggingface_hub",), ("skippy.engine.hub", "skippy.engine.progress")),
    ("skippy", ("engine", "server"), ()),
]


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package with its file."""
    for folder in ("engine", "server"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(["skippy", *parts]).removesuffix(".__init__"), path


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """A syntax tree without what only type checkers read."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from at_run_time(child)


def imports(source: str) -> set[str]:
    """The dotted names that some source imports when it runs: modules, and what is taken from them."""
    names: set[str] = set()
    for node in at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\nfrom c import d as e\ndef f():\n    if x:\n        import g\n"
    source += "if TYPE_CHECKING:\n    import h\n"
    assert imports(source) == {"a.b", "c.d", "g"}
    assert within("a.b", "a")
    assert not within("ab", "a")


def test_the_rules_name_what_exists() -> None:
    known = {"skippy", *dict(sources()), *(f"skippy.engine.{name}" for name in skippy.engine.__all__)}
    named = {name for package, forbidden, exempt in FORBIDDEN for name in (package, *forbidden, *exempt)}
    assert {name for name in named if within(name, "skippy")} <= known


@pytest.mark.parametrize(("package", "forbidden", "exempt"), FORBIDDEN)
def test_forbidden_imports(package: str, forbidden: tuple[str, ...], exempt: tuple[str, ...]) -> None:
    found = [
        f"{module} imports {name}"
        for module, path in sources()
        if within(module, package) and not any(within(module, other) for other in exempt)
        for name in imports(path.read_text(encoding="utf-8"))
        if any(within(name, target) for target in forbidden)
    ]
    assert found == []


def test_the_server_uses_public_names_of_the_engine_only() -> None:
    public = {f"skippy.engine.{name}" for name in skippy.engine.__all__}
    found = [
        f"{module} imports {name}"
        for module, path in sources()
        if within(module, "skippy.server")
        for name in imports(path.read_text(encoding="utf-8"))
        if within(name, "skippy.engine") and name not in public
        # The client of the engine process speaks its language.
        if not (module == "skippy.server.client" and within(name, "skippy.engine.messages"))
    ]
    assert found == []


def test_public_names_exist_and_are_sorted() -> None:
    assert sorted(skippy.engine.__all__) == list(skippy.engine.__all__)
    for name in skippy.engine.__all__:
        assert getattr(skippy.engine, name) is not None


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after a statement."""
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_server_process_never_loads_torch() -> None:
    loaded = loaded_after("import skippy.server.app, skippy.server.cli, skippy.server.verify")
    assert "fastapi" in loaded
    assert not loaded & {"torch", "transformers", "bitsandbytes"}


def test_what_is_pure_stays_pure_with_all_it_imports() -> None:
    loaded = loaded_after(f"import {', '.join(f'skippy.engine.{name}' for name in WITHOUT_TORCH)}")
    assert not loaded & {"torch", "transformers", "fastapi", "pydantic"}


def test_an_engine_loads_nothing_that_it_does_not_need() -> None:
    """bitsandbytes is for quantised models, transformers for rare rotary embeddings, sympy for PyTorch's compiler."""
    loaded = loaded_after(
        "from skippy.engine import Engine, EngineConfig, Request, SamplingParams\n"
        "engine = Engine(EngineConfig(device='cpu', drafter='s3d', num_speculative_tokens=4))\n"
        "steps = engine.run([Request('x', (1, 2, 3), SamplingParams(max_tokens=16, ignore_eos=True))])\n"
        "assert sum(step.stats.draft_tokens for step in steps) > 4"
    )
    assert "torch" in loaded
    assert not loaded & {"bitsandbytes", "transformers", "sympy"}


def test_serving_loads_nothing_of_training() -> None:
    script = "import sys, skippy.engine.worker; print(*(name for name in sys.modules if name.startswith('skippy.')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "skippy.engine.drafters.s3d" in done.stdout.split(), done.stderr
    assert "skippy.engine.training" not in done.stdout
