"""The file that tune saves: where it lies, when it is taken, and when it is left alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support_engine import write_adapter, write_checkpoint

from skippy.engine import ConfigError, Engine, EngineConfig
from skippy.engine.config import BUILTIN_MODEL
from skippy.engine.tuned import (
    FORMAT_VERSION,
    Key,
    Measured,
    TunedPlan,
    check_writable,
    default_path,
    key_of,
    save_plan,
)
from skippy.engine.weights import open_checkpoint

ADAPTER: dict[str, Any] = {"num_speculative_tokens": 3}
SECONDS = {1: {0: 1.0, 1: 1.1, 2: 1.2, 3: 0.5}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"))
    write_adapter(folder, **ADAPTER)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of(model: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(**{"model": str(model), "device": "cpu", "dtype": "float32", "num_threads": 1, **changes})


def key_for(model: Path) -> Key:
    Engine(config_of(model, drafter="none"))  # sets the threads
    return key_of(config_of(model), open_checkpoint(str(model)), "cpu", "float32")


def save(folder: Path, path: Path, /, **changes: Any) -> Path:
    """A plan for a model, with another key if one is given."""
    key = Key(**{**{name: getattr(key_for(folder), name) for name in Key.__struct_fields__}, **changes})
    check_writable(path)
    save_plan(path, TunedPlan(FORMAT_VERSION, key, {"s3d": Measured(SECONDS, [0.9, 0.8])}, [{"width": 0}]))
    return path


def knows(engine: Engine, drafter: str = "s3d") -> bool:
    """Whether a drafter's controller began with times."""
    return bool(engine.drafting._controllers[drafter]._prior["seconds"])


class TestWhereItLies:
    def test_in_the_users_cache_one_file_per_folder(
        self, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = default_path(open_checkpoint(str(model)))
        assert path.parent == cache / "skippy" / "plans"
        assert path != default_path(open_checkpoint(BUILTIN_MODEL))
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert default_path(open_checkpoint(str(model))).parent == Path.home() / ".cache" / "skippy" / "plans"

    def test_where_nothing_can_be_written_is_known_before(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is a folder"):
            check_writable(tmp_path)
        with pytest.raises(ConfigError, match=r"cannot write /dev/null/x.json"):
            check_writable(Path("/dev/null/x.json"))

    def test_it_is_json_for_people_too(self, model: Path, tmp_path: Path) -> None:
        text = save(model, tmp_path / "plan.json").read_text()
        assert json.loads(text)["rows"] == [{"width": 0}]
        assert len(text.splitlines()) > 10
        assert [path.name for path in tmp_path.glob("plan*")] == ["plan.json"]


class TestWhenItIsTaken:
    def test_by_itself_and_only_for_the_drafters_it_has(self, model: Path) -> None:
        assert not knows(Engine(config_of(model)))
        save(model, default_path(open_checkpoint(str(model))))
        engine = Engine(config_of(model), serves=True)
        assert knows(engine)
        assert not knows(Engine(config_of(model))), "what serves nobody runs with other threads"
        assert engine.drafting._controllers["s3d"].width(1) == 3, "it promises most from the first step on"
        assert knows(engine, "hybrid")
        assert not knows(engine, "suffix")

    def test_from_a_file_that_was_named(self, model: Path, tmp_path: Path) -> None:
        path = save(model, tmp_path / "plan.json")
        assert not knows(Engine(config_of(model)))
        assert knows(Engine(config_of(model, tuned_plan=str(path))))

    @pytest.mark.parametrize(
        "changes",
        [
            {"device": "Abacus"},
            {"threads": 99},
            {"dtype": "bfloat16"},
            {"quantization": "int8"},
            {"torch": "0.1"},
            {"model": "0"},
            {"adapter": None},
        ],
    )
    def test_measured_elsewhere_it_is_left_alone_with_one_warning(
        self, model: Path, tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        path = save(model, tmp_path / "plan.json", **changes)
        with caplog.at_level(logging.WARNING, "skippy.engine"):
            engine = Engine(config_of(model, tuned_plan=str(path)))
        assert not knows(engine)
        [record] = caplog.records
        assert f"is ignored: its {next(iter(changes))} is another one" in record.getMessage()

    def test_another_adapter_is_another_key(self, model: Path, tmp_path: Path) -> None:
        other = write_adapter(model, tmp_path / "other", seed=1, **ADAPTER)
        keys = [
            key_of(config_of(model, adapter=adapter), open_checkpoint(str(model)), "cpu", "float32")
            for adapter in (None, str(other))
        ]
        assert keys[0].adapter != keys[1].adapter
        assert keys[0].model == keys[1].model

    def test_nobody_looks_for_it_without_an_adapter(self, tmp_path: Path) -> None:
        bare = write_checkpoint(tmp_path / "bare")
        Engine(config_of(bare, tuned_plan="/no/such/file"))


class TestDamage:
    @pytest.mark.parametrize(
        "content",
        [
            "",
            "no JSON",
            "{}",
            "[" * 100_000,
            '{"format_version": 2}',
            '{"format_version": 1, "key": {}, "drafters": {}, "rows": []}',
        ],
        ids=["empty", "text", "nothing in it", "deep", "another version", "no key"],
    )
    def test_a_damaged_file_is_an_error_if_named_and_else_a_warning(
        self, model: Path, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        named, found = tmp_path / "plan.json", default_path(open_checkpoint(str(model)))
        check_writable(found)
        for path in (named, found):
            path.write_text(content)
        with pytest.raises(ConfigError, match=r"the tuned plan .*plan.json cannot be read"):
            Engine(config_of(model, tuned_plan=str(named)))
        assert not knows(Engine(config_of(model), serves=True))
        assert [record.getMessage().endswith("it is ignored") for record in caplog.records] == [True]

    @pytest.mark.parametrize("seconds", [{"1": {"0": 0.0}}, {"1": {"0": -1.0}}, {"x": {}}, {"1": {"0": None}}])
    def test_times_that_cannot_be_are_refused(self, model: Path, tmp_path: Path, seconds: dict[str, Any]) -> None:
        path = save(model, tmp_path / "plan.json")
        plan = json.loads(path.read_text())
        plan["drafters"]["s3d"]["seconds"] = seconds
        path.write_text(json.dumps(plan))
        with pytest.raises(ConfigError, match="cannot be read"):
            Engine(config_of(model, tuned_plan=str(path)))

    def test_a_file_that_is_named_must_be_there(self, model: Path) -> None:
        with pytest.raises(ConfigError, match="the tuned plan /no/such/file cannot be read"):
            Engine(config_of(model, tuned_plan="/no/such/file"))
