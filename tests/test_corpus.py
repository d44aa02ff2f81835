"""What text a model may be trained on, how it is parted, and the file of its tokens."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippy.engine import BUILTIN_MODEL, ConfigError, Tokenizer
from skippy.engine.hub import find_model
from skippy.engine.training.corpus import HELD_OUT_BY, Exclusion, Sources, is_held_out, is_permissive, load_tokens
from skippy.engine.training.display import Display

TOKENIZER = find_model(BUILTIN_MODEL) / "tokenizer.json"
SOURCE = "# a module of some length, which is not to be left out because it is short\n" * 4


def install(packages: Path, name: str, metadata: str, files: dict[str, str]) -> None:
    """A package as an installer leaves it."""
    about = packages / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}\n")
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, text in files.items():
        (packages / file).parent.mkdir(parents=True, exist_ok=True)
        (packages / file).write_text(text)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    library, packages = tmp_path / "lib", tmp_path / "packages"
    (library / "test").mkdir(parents=True)
    (library / "module.py").write_text(f"{SOURCE}LIBRARY = 1\n")
    (library / "test" / "test_module.py").write_text(f"{SOURCE}TEST = 1\n")
    for i in range(300):
        (library / f"numbered{i}.py").write_text(f"# number {i}\n{SOURCE}")
    mit, gpl = "License-Expression: MIT", "License-Expression: GPL-3.0-only"
    install(
        packages,
        "free",
        mit,
        {
            "free/__init__.py": f"{SOURCE}FREE = 1\n",
            "free/_vendor/other.py": f"{SOURCE}VENDORED = 1\n",
            "free/copy.py": f"# GNU General Public License\n{SOURCE}COPIED = 1\n",
            "free/again.py": f"{SOURCE}LIBRARY = 1\n",
            "free/short.py": "SHORT = 1\n",
            "free/made.py": f"# This file was automatically generated from model.py.\n{SOURCE}MADE = 1\n",
            "free/data.txt": f"{SOURCE}DATA = 1\n",
        },
    )
    install(packages, "unfree", gpl, {"unfree.py": f"{SOURCE}UNFREE = 1\n"})
    stories = tmp_path / "stories.txt"
    stories.write_text("".join(f"The {i}th mouse found a nut.\nThe end.\n<|endoftext|>\n" for i in range(300)))
    return Sources(library, packages, stories)


@pytest.mark.parametrize(
    ("metadata", "permissive"),
    [
        ("License-Expression: MIT", True),
        ("License-Expression: BSD-3-Clause AND (MIT OR Apache-2.0)", True),
        ("License-Expression: Apache-2.0 WITH LLVM-exception", True),
        ("License-Expression: MIT OR GPL-3.0-only", False),
        ("License-Expression: MPL-2.0\nClassifier: License :: OSI Approved :: MIT License", False),
        ("Classifier: License :: OSI Approved :: BSD License", True),
        ("Classifier: License :: OSI Approved :: Python Software Foundation License\nLicense: whatever", True),
        ("Classifier: License :: OSI Approved :: MIT License\nClassifier: License :: OSI Approved :: MPL 2.0", False),
        ("License: Apache 2.0 License", True),
        ("License: MPL-2.0 AND MIT", False),
        ("License: Proprietary", False),
        ("", False),
    ],
)
def test_licences(tmp_path: Path, metadata: str, permissive: bool) -> None:
    install(tmp_path, "package", metadata, {})
    assert is_permissive(PathDistribution(tmp_path / "package-1.0.dist-info")) is permissive


def test_python_is_of_the_library_and_of_permissive_packages(sources: Sources) -> None:
    found = [text.rsplit("\n", 2)[-2] for text in sources.documents("python")]
    assert sorted(line for line in found if " = 1" in line) == ["FREE = 1", "LIBRARY = 1"]


def test_stories_are_parted_by_the_separator(sources: Sources) -> None:
    found = list(sources.documents("stories"))
    assert len(found) == 300
    assert found[7] == "The 7th mouse found a nut.\nThe end."


@given(st.text(min_size=HELD_OUT_BY, max_size=HELD_OUT_BY), st.text(), st.text())
def test_the_beginning_decides_what_is_held_out(beginning: str, one: str, other: str) -> None:
    assert is_held_out(beginning + one) == is_held_out(beginning + other)


def test_about_one_document_in_a_hundred_is_held_out() -> None:
    assert 60 < sum(is_held_out(f"document {i}") for i in range(10_000)) < 140


def test_documents_are_whole_on_one_side(sources: Sources, tmp_path: Path) -> None:
    tokens = load_tokens(sources, TOKENIZER, tmp_path / "cache", Display())
    tokenizer = Tokenizer.load(TOKENIZER.parent)
    for kind in ("python", "stories"):
        texts = {}
        for split in ("train", "held_out"):
            text = tokenizer.decode(tokens[f"{kind}.{split}"].tolist(), skip_special_tokens=False)
            *texts[split], rest = text.split("<|endoftext|>")
            assert rest == "", "a separator stands behind each document"
        assert all(map(is_held_out, texts["held_out"]))
        assert not any(map(is_held_out, texts["train"]))
        assert texts["held_out"]
        assert sorted(texts["train"] + texts["held_out"]) == sorted(sources.documents(kind))


def test_special_tokens_that_a_file_spells_out_are_characters(sources: Sources, tmp_path: Path) -> None:
    (sources.library / "module.py").write_text(f"{SOURCE}END = '<|fim_middle|>'\n")
    tokens = load_tokens(sources, TOKENIZER, tmp_path / "cache", Display())["python.train"].tolist()
    assert 3 not in tokens
    assert "END = '<|fim_middle|>'" in Tokenizer.load(TOKENIZER.parent).decode(tokens)


def test_tokens_are_made_once(sources: Sources, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = load_tokens(sources, TOKENIZER, cache, Display())
    shutil.rmtree(sources.library)
    read = load_tokens(sources, TOKENIZER, cache, Display())
    assert {name: stream.tolist() for name, stream in read.items()} == {n: s.tolist() for n, s in made.items()}
    with pytest.raises(ConfigError, match="another stories"):
        load_tokens(Sources(sources.library, sources.packages), TOKENIZER, cache, Display())


def test_evaluation_problems_are_excluded(sources: Sources, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    prompt, solution = "def add_up(a, b):\n", "    " + " ".join(f"word{i}" for i in range(20))
    coding = {"prompt": prompt, "canonical_solution": solution, "entry_point": "add_up"}
    asking = {"turns": ["Why?", " ".join(f"reason{i}" for i in range(13))]}
    problems.write_text(json.dumps(coding) + "\n" + json.dumps(asking) + "\n")
    exclusion = Exclusion(str(problems))
    assert exclusion.forbids("class Sum:\n    def add_up(self):\n")
    assert exclusion.forbids(" ".join(f"Word{i}" for i in range(3, 16)))
    assert exclusion.forbids(" ".join(f"reason{i}" for i in range(13)))
    assert not exclusion.forbids("def add_up_all(a):\n    return add_up(*a)\n")
    assert not exclusion.forbids(" ".join(f"word{i}" for i in range(3, 15)))
    (sources.library / "module.py").write_text(f"{SOURCE}def add_up(x):\n    return x\n")
    excluding = Sources(sources.library, sources.packages, sources.stories, str(problems))
    tokens = load_tokens(excluding, TOKENIZER, tmp_path / "cache", Display())
    assert "def add_up" not in Tokenizer.load(TOKENIZER.parent).decode(tokens["python.train"].tolist())


def test_stories_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        list(Sources(tmp_path, tmp_path, tmp_path / "missing").documents("stories"))
