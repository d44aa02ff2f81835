"""One class of settings: where values come from, what is refused, and what is generated from it."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from skippy.engine import ConfigError, EngineConfig
from skippy.server.cli import COMMANDS
from skippy.server.settings import (
    Settings,
    Value,
    default_text,
    from_environment,
    from_yaml,
    kind_of,
    load,
    nearest,
    parse_bytes,
    setting_names,
    variable_of,
)
from skippy.server.settings_docs import env_example, markdown_table, with_table

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "skippy.yaml"


class TestOrder:
    def test_flag_over_variable_over_file_over_default(self, config: Path) -> None:
        config.write_text("port: 1\nmax_waiting: 1\nlog_interval: 1\n")
        environ = {"SKIPPY_PORT": "2", "SKIPPY_MAX_WAITING": "2", "PATH": "/bin"}
        resolved = load({"port": Value("3", "--port")}, environ, str(config))
        settings = resolved.settings
        assert (settings.port, settings.max_waiting, settings.log_interval, settings.log_level) == (3, 2, 1.0, "info")
        assert resolved.origins["port"] == "--port"
        assert resolved.origins["max_waiting"] == "SKIPPY_MAX_WAITING"
        assert resolved.origins["log_interval"] == str(config)
        assert resolved.origins["log_level"] == "default"

    def test_the_file_may_be_named_by_a_variable_and_the_flag_wins(self, config: Path, tmp_path: Path) -> None:
        config.write_text("port: 1")
        other = tmp_path / "other.yaml"
        other.write_text("port: 2")
        assert load({}, {"SKIPPY_CONFIG": str(config)}).settings.port == 1
        assert load({}, {"SKIPPY_CONFIG": str(config)}, str(other)).settings.port == 2

    def test_empty_means_unset(self, config: Path) -> None:
        config.write_text("port: 1\nhost: ''\nmax_waiting:\nmodel: null\n")
        resolved = load({}, {"SKIPPY_PORT": "", "SKIPPY_HOST": "", "SKIPPY_CONFIG": str(config)})
        assert resolved.settings == Settings(port=1)
        assert {name for name, origin in resolved.origins.items() if origin != "default"} == {"port"}

    def test_an_empty_file_and_an_empty_file_name_set_nothing(self, config: Path) -> None:
        config.write_text("# nothing\n")
        assert load({}, {}, str(config)).settings == Settings()
        assert load({}, {"SKIPPY_CONFIG": ""}, "").settings == Settings()

    def test_printed_config_can_be_read_back(self, config: Path) -> None:
        values = {"SKIPPY_MODEL": "it's: a # model", "SKIPPY_ENABLE_PREFIX_CACHING": "false"}
        resolved = load({"kv_cache_memory_bytes": Value("4G", "--kv-cache-memory-bytes")}, values)
        printed = resolved.as_yaml()
        config.write_text(printed)
        assert load({}, {}, str(config)).settings == resolved.settings
        assert "kv_cache_memory_bytes: 4294967296  # --kv-cache-memory-bytes\n" in printed
        assert "enable_prefix_caching: false  # SKIPPY_ENABLE_PREFIX_CACHING\n" in printed
        assert "port: 8000  # default\n" in printed


class TestRefusals:
    @pytest.mark.parametrize(
        ("variable", "hint"),
        [("SKIPPY_PROT", "SKIPPY_PORT"), ("SKIPPY_MAX_MODEL_LENGTH", "SKIPPY_MAX_MODEL_LEN"), ("SKIPPY_port", "PORT")],
    )
    def test_unknown_variable(self, variable: str, hint: str) -> None:
        with pytest.raises(ConfigError, match=f"unknown environment variable {variable}.*did you mean .*{hint}"):
            from_environment({variable: "1"})

    def test_unknown_variable_is_refused_even_when_empty(self) -> None:
        with pytest.raises(ConfigError, match="SKIPPY_PROT"):
            from_environment({"SKIPPY_PROT": ""})

    @pytest.mark.parametrize("key", ["max-num-seqs", "max_num_seq", "MAX_NUM_SEQS"])
    def test_unknown_key(self, config: Path, key: str) -> None:
        config.write_text(f"{key}: 4")
        with pytest.raises(ConfigError, match=f"unknown key '{key}' in {config}"):
            from_yaml(str(config))

    def test_nearest_says_nothing_about_what_is_near_nothing(self) -> None:
        assert nearest("max_num_seq", setting_names()) == "; did you mean max_num_seqs?"
        assert nearest("zzz", setting_names()) == ""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[1, 2]", "must hold 'name: value' lines"),
            ("port: [1]", "port in .* must be a single value"),
            ("port: {a: 1}", "port in .* must be a single value"),
            ("port: [", "is not YAML"),
            ("port: 1\nhost: a\nport: 2", "port is set twice"),
            ("port: yes", "bad value 'True' for port .from .*skippy.yaml"),
        ],
    )
    def test_bad_file(self, config: Path, text: str, message: str) -> None:
        config.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            load({}, {}, str(config))
        assert "\n" not in str(caught.value)

    def test_unreadable_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot read the config file .*missing.yaml: No such file"):
            load({}, {}, str(tmp_path / "missing.yaml"))
        (tmp_path / "latin.yaml").write_bytes(b"host: \xff\xfe")
        with pytest.raises(ConfigError, match="not UTF-8"):
            load({}, {}, str(tmp_path / "latin.yaml"))

    @pytest.mark.parametrize(
        ("name", "text", "reason"),
        [
            ("port", "eighty", "valid integer"),
            ("port", "70000", "less than or equal to 65535"),
            ("dtype", "int8", "'float32'"),
            ("device", "tpu", "'cuda'"),
            ("log_interval", "0", "greater than 0"),
            ("log_interval", "nan", "finite"),
            ("kv_cache_memory_bytes", "4 apples", "size in bytes"),
            ("enable_prefix_caching", "maybe", "valid boolean"),
        ],
    )
    def test_bad_value_names_its_origin(self, name: str, text: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=f"bad value '{text}' for {name} .from {variable_of(name)}.: .*{reason}"):
            load({}, {variable_of(name): text})

    def test_limits_of_the_engine_name_the_origin(self) -> None:
        with pytest.raises(ConfigError, match=r"at least 1, got 0 \(max_num_seqs is from SKIPPY_MAX_NUM_SEQS\)"):
            load({}, {"SKIPPY_MAX_NUM_SEQS": "0"})

    def test_limits_on_two_settings_name_both_origins(self) -> None:
        flag = {"max_num_seqs": Value("64", "--max-num-seqs")}
        with pytest.raises(ConfigError) as caught:
            load(flag, {"SKIPPY_MAX_NUM_BATCHED_TOKENS": "32"})
        assert "max_num_seqs is from --max-num-seqs" in str(caught.value)
        assert "max_num_batched_tokens is from SKIPPY_MAX_NUM_BATCHED_TOKENS" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("7B", 7),
        ("3K", 3072),
        ("1kB", 1000),
        ("512MiB", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("4G", 2**32),
        ("4g", 2**32),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "4X", "4GG", "1e9", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size in bytes"):
        parse_bytes(text)


def test_settings_hold_every_field_of_the_engine_config() -> None:
    ours, theirs = typing.get_type_hints(Settings), typing.get_type_hints(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        assert ours[field.name] == theirs[field.name], field.name
        assert Settings.model_fields[field.name].default == field.default, field.name
    assert Settings().engine_config() == EngineConfig()
    changed = Settings(model="m", dtype="float32", num_threads=3, enable_prefix_caching=False)
    assert changed.engine_config() == EngineConfig(
        model="m", dtype="float32", num_threads=3, enable_prefix_caching=False
    )


def test_the_adapter_is_a_folder_or_unset(config: Path) -> None:
    assert load({}, {"SKIPPY_ADAPTER": ""}).settings.adapter is None
    config.write_text("adapter: 7\n")
    assert load({}, {}, str(config)).settings.engine_config().adapter == "7"
    assert load({"adapter": Value("a b", "--adapter")}, {}, str(config)).settings.adapter == "a b"


def test_drafts_are_as_wide_as_pays_unless_a_width_is_given() -> None:
    assert load({}, {}).settings.engine_config().num_speculative_tokens is None
    assert load({}, {"SKIPPY_NUM_SPECULATIVE_TOKENS": "0"}).settings.num_speculative_tokens == 0
    with pytest.raises(ConfigError, match=r"at least 0, got -1 .num_speculative_tokens is from"):
        load({}, {"SKIPPY_NUM_SPECULATIVE_TOKENS": "-1"})


@pytest.mark.parametrize(
    ("command", "takes"), [("serve", True), ("generate", True), ("bench", True), ("verify", False)]
)
def test_commands_that_run_an_engine_take_an_adapter(command: str, takes: bool) -> None:
    assert ("adapter" in COMMANDS[command].settings) == takes


NUMBERS_OR_AUTO = ("max_model_len", "kv_cache_memory_bytes", "num_speculative_tokens", "num_threads")


class TestAuto:
    @pytest.mark.parametrize("name", NUMBERS_OR_AUTO)
    def test_it_leaves_the_choice_to_the_engine_wherever_it_is_written(self, config: Path, name: str) -> None:
        config.write_text(f"{name}: 7\n")
        assert getattr(load({}, {}, str(config)).settings.engine_config(), name) == 7
        by_variable = load({}, {variable_of(name): "auto"}, str(config))
        by_flag = load({name: Value("auto", "--flag")}, {}, str(config))
        for resolved in (by_variable, by_flag):
            assert getattr(resolved.settings.engine_config(), name) is None
            assert resolved.origins[name] != str(config)
        config.write_text(f"{name}: auto\n")
        assert load({}, {}, str(config)).settings == Settings()

    @pytest.mark.parametrize("name", NUMBERS_OR_AUTO)
    def test_it_is_the_default_and_said_to_be_a_value(self, name: str) -> None:
        assert default_text(name) == "auto"
        assert kind_of(name) in ("integer|auto", "bytes|auto")
        assert getattr(Settings(), name) is None

    @pytest.mark.parametrize("name", ["port", "max_num_seqs", "block_size"])
    def test_other_numbers_are_numbers(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"bad value 'auto' for {name}"):
            load({}, {variable_of(name): "auto"})


def test_a_revision_is_a_name_even_where_it_looks_like_a_number() -> None:
    assert load({}, {"SKIPPY_REVISION": "42"}).settings.engine_config().revision == "42"
    assert load({}, {"SKIPPY_REVISION": ""}).settings.revision is None


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1


class TestGenerated:
    def test_readme_has_the_table(self) -> None:
        readme = (REPOSITORY / "README.md").read_text()
        assert with_table(readme) == readme, "run: python -m skippy.server.settings_docs"
        assert markdown_table() in readme

    def test_env_example(self) -> None:
        text = (REPOSITORY / ".env.example").read_text()
        assert text == env_example(), "run: python -m skippy.server.settings_docs"

    def test_env_example_uncommented_is_the_default_configuration(self) -> None:
        lines = [line.removeprefix("#") for line in env_example().splitlines() if line.startswith("#SKIPPY_")]
        environ = dict(line.split("=", 1) for line in lines)
        assert load({}, environ).settings == Settings()
        assert list(environ) == [variable_of(name) for name in setting_names()]

    def test_the_table_has_a_row_with_the_default_of_each_setting(self) -> None:
        rows = {row.split("|")[2].strip(" `"): row for row in markdown_table().splitlines()[2:]}
        assert list(rows) == [variable_of(name) for name in setting_names()]
        for name in setting_names():
            assert f"| `{default_text(name)}` |" in rows[variable_of(name)] or not default_text(name)

    def test_every_default_is_plain_yaml(self) -> None:
        assert yaml.safe_load(load({}, {}).as_yaml()) == Settings().model_dump()
