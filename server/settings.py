"""Every setting of Skippy, once: `--help`, the docs table and `.env.example` come from here.

A value is taken from the first place that has one: the command line, a `SKIPPY_*`
environment variable, the YAML file named by `--config` (or SKIPPY_CONFIG), the default.
An empty string means "not set" in all of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from skippy.engine import ConfigError, Device, Dtype, EngineConfig, Quantization

ENV_PREFIX = "SKIPPY_"
CONFIG_VARIABLE = "SKIPPY_CONFIG"
"""Names the YAML file; not a setting itself."""

LogLevel = Literal["debug", "info", "warning", "error"]

_ENGINE_FIELDS = tuple(field.name for field in fields(EngineConfig))
_ENGINE_DEFAULTS = EngineConfig()
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<suffix>IB|B)?", re.IGNORECASE)


def parse_bytes(text: object) -> object:
    """`512MiB`, `1.5G` and `4096` in bytes; K, M, G and T (also KiB ...) are powers of 1024, KB ... of 1000."""
    if not isinstance(text, str):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a size in bytes such as 4096, 512MiB or 4G")
    power = _UNITS[match["unit"].upper()]
    if match["unit"] and (match["suffix"] or "").upper() == "B":
        power = 1000 ** (power.bit_length() // 10)
    size = float(match["number"]) * power
    if size > 2**62:
        raise ValueError("expected a size that some machine has")
    return int(size)


def parse_auto(value: object) -> object:
    """None, with which the engine chooses, for `auto`."""
    return None if value == "auto" else value


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
Auto = BeforeValidator(parse_auto)


class Settings(BaseModel):
    """The whole configuration of one server, checked and frozen.

    The fields of EngineConfig have the same names, defaults and limits here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default=_ENGINE_DEFAULTS.model,
        description="folder of a Hugging Face checkpoint, its name on the hub (owner/model), or the built-in model",
    )
    revision: str | None = Field(
        default=_ENGINE_DEFAULTS.revision,
        description="branch, tag or commit of a model on the hub; unset: its main branch",
    )
    device: Device = Field(
        default=_ENGINE_DEFAULTS.device, description="where the model runs; auto takes CUDA where it is"
    )
    dtype: Dtype = Field(default=_ENGINE_DEFAULTS.dtype, description="type of the weights and activations")
    quantization: Quantization = Field(
        default=_ENGINE_DEFAULTS.quantization,
        description="how the layers' weights are held: none as they are, int8 in 8 bits, nf4 in 4.5; other tokens than "
        "without it, the same with every drafter",
    )
    max_model_len: Annotated[int | None, Auto] = Field(
        default=_ENGINE_DEFAULTS.max_model_len,
        description="longest prompt plus output, in tokens; auto: the longest that the model can and the cache holds",
    )
    max_num_seqs: int = Field(
        default=_ENGINE_DEFAULTS.max_num_seqs, description="most sequences that run at the same time"
    )
    max_num_batched_tokens: int = Field(
        default=_ENGINE_DEFAULTS.max_num_batched_tokens,
        description="token budget of one step; longer prompts go in chunks",
    )
    block_size: int = Field(
        default=_ENGINE_DEFAULTS.block_size,
        description="tokens per block of the KV cache; on a GPU a multiple of 8",
    )
    kv_cache_memory_bytes: Annotated[ByteSize | None, Auto] = Field(
        default=_ENGINE_DEFAULTS.kv_cache_memory_bytes,
        description="size of the KV cache, as 512MiB or 4G; auto: what fits",
    )
    gpu_memory_utilization: float = Field(
        default=_ENGINE_DEFAULTS.gpu_memory_utilization,
        description="share of the GPU's memory to use when the cache size is auto",
    )
    enable_prefix_caching: bool = Field(
        default=_ENGINE_DEFAULTS.enable_prefix_caching, description="reuse the KV cache of prompts that begin alike"
    )
    drafter: str = Field(
        default=_ENGINE_DEFAULTS.drafter,
        description="what proposes tokens ahead: none, ngram, suffix, recycling, s3d, eagle3 or hybrid; a "
        "request may name another; auto takes hybrid (suffix where that promises more, elsewhere s3d or eagle3, or "
        "recycling without an adapter), or suffix where there is no hybrid",
    )
    adapter: str | None = Field(
        default=_ENGINE_DEFAULTS.adapter,
        description="adapter for s3d, or a published EAGLE-3 head: a folder, or a name on the hub (owner/name); "
        "unset: the folder s3d in the model's, if there is one",
    )
    num_speculative_tokens: Annotated[int | None, Auto] = Field(
        default=_ENGINE_DEFAULTS.num_speculative_tokens,
        description="tokens drafted per step and sequence; auto: ngram drafts 4, and the others measure while "
        "serving how many pay, none included",
    )
    share_drafts: bool = Field(
        default=_ENGINE_DEFAULTS.share_drafts,
        description="draft also from recent outputs of other requests; without, no draft tells a client anything of "
        "another's text (see enable_prefix_caching, too)",
    )
    tuned_plan: str | None = Field(
        default=_ENGINE_DEFAULTS.tuned_plan,
        description="file that skippy tune saved, with which s3d and hybrid need not measure first; unset: when "
        "serving, the one in the user's cache directory, if there is one",
    )
    learn: str | None = Field(
        default=_ENGINE_DEFAULTS.learn,
        description="train the adapter in this folder on what is served, while nothing is; begun if it is not there. "
        "No text is written",
    )
    num_threads: Annotated[int | None, Auto] = Field(
        default=_ENGINE_DEFAULTS.num_threads,
        description="CPU threads of the engine; auto: all cores; when serving or tuning, one less than there are or "
        "than a container may use",
    )

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    served_model_name: str | None = Field(default=None, description="model name in the API; unset: the model as given")
    max_waiting: int = Field(
        default=1024, ge=1, description="most sequences (n of each prompt) that may wait; further ones are answered 429"
    )
    log_interval: float = Field(
        default=10.0, gt=0, allow_inf_nan=False, description="seconds between log lines under load"
    )
    log_level: LogLevel = Field(default="info", description="least severe log messages to show")

    @model_validator(mode="after")
    def _within_the_engines_limits(self) -> Self:
        try:
            self.engine_config()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def engine_config(self) -> EngineConfig:
        """The part that the engine is built from."""
        return EngineConfig(**{name: getattr(self, name) for name in _ENGINE_FIELDS})


class Value(NamedTuple):
    """What a user wrote, not yet parsed, and where."""

    text: str
    origin: str


Layer = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings and, for each, where its value came from."""

    settings: Settings
    origins: Mapping[str, str]

    @classmethod
    def merge(cls, *layers: Layer) -> Self:
        """The first layer that has a value wins.

        Raises:
            ConfigError: a value is bad; the message names it and its origin.
        """
        values: dict[str, Value] = {}
        for layer in layers:
            for name, value in layer.items():
                values.setdefault(name, value)
        try:
            settings = Settings.model_validate({name: value.text for name, value in values.items()})
        except ValidationError as error:
            raise ConfigError(_first_problem(error, values)) from error
        return cls(settings, {name: values[name].origin if name in values else "default" for name in setting_names()})

    def as_yaml(self) -> str:
        """Every value with its origin as a comment; `--config` reads it back."""
        lines = []
        for name, value in self.settings.model_dump().items():
            entry = yaml.safe_dump({name: value}, width=float("inf"), allow_unicode=True).rstrip("\n")
            lines.append(f"{entry}  # {self.origins[name]}\n")
        return "".join(lines)


def load(
    arguments: Layer, environ: Mapping[str, str], config: str | None = None, without: Collection[str] = ()
) -> Resolved:
    """Resolve the settings of one command.

    Args:
        config: the file named on the command line.
        without: names of settings that mean nothing to the command, and keep their defaults.

    Raises:
        ConfigError: an unknown name, a bad value or an unreadable file.
    """
    path = config or environ.get(CONFIG_VARIABLE)
    layers = (arguments, from_environment(environ), from_yaml(path) if path else {})
    return Resolved.merge(*({name: layer[name] for name in layer if name not in without} for layer in layers))


def setting_names() -> tuple[str, ...]:
    return tuple(Settings.model_fields)


def from_environment(environ: Mapping[str, str]) -> Layer:
    layer = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in setting_names() or variable != variable_of(name):
            known = [*map(variable_of, setting_names()), CONFIG_VARIABLE]
            raise ConfigError(f"unknown environment variable {variable}{nearest(variable, known)}")
        if text:
            layer[name] = Value(text, variable)
    return layer


class _OneOfEachKey(yaml.SafeLoader):
    """YAML says that keys are unique; PyYAML alone would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


def from_yaml(path: str) -> Layer:
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), _OneOfEachKey)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config file {path}: {reason}") from error
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the config file {path} is not YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"the config file {path} must hold 'name: value' lines")
    layer = {}
    for key, value in document.items():
        if key not in setting_names():
            raise ConfigError(f"unknown key {key!r} in {path}{nearest(str(key), setting_names())}")
        if isinstance(value, dict | list):
            raise ConfigError(f"{key} in {path} must be a single value")
        # As text, because YAML's own types would let `port: yes` through as 1.
        if value is not None and value != "":
            layer[key] = Value(str(value), path)
    return layer


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion to end an error message with, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def variable_of(name: str) -> str:
    return ENV_PREFIX + name.upper()


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def is_switch(name: str) -> bool:
    return Settings.model_fields[name].annotation is bool


def kind_of(name: str) -> str:
    """How the values of a setting look, for help and docs: a type, or the choices."""
    annotation: Any = Settings.model_fields[name].annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    names = {bool: "true|false", int: "integer", float: "number", str: "text", ByteSize: "bytes"}
    return names[annotation] + ("|auto" if takes_auto(name) else "")


def takes_auto(name: str) -> bool:
    """Whether `auto` leaves the choice to the engine."""
    return Auto in Settings.model_fields[name].metadata


def default_text(name: str) -> str:
    """The default as a user would write it; empty when it is unset."""
    default = Settings.model_fields[name].default
    if default is None:
        return "auto" if takes_auto(name) else ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def _first_problem(error: ValidationError, values: Mapping[str, Value]) -> str:
    problem = error.errors(include_url=False)[0]
    reason = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if problem["loc"]:
        name = str(problem["loc"][0])
        given = values[name]
        return f"bad value {given.text!r} for {name} (from {given.origin}): {reason[0].lower()}{reason[1:]}"
    # A limit of the engine, maybe on several settings together: its message names them.
    origins = [f"{name} is from {given.origin}" for name, given in values.items() if re.search(rf"\b{name}\b", reason)]
    return f"{reason} ({', '.join(origins)})"
