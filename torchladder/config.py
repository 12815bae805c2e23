"""The settings of a run: defaults in the dataclasses, then a TOML file, then the command line.

Each section is the dataclass of the room that it sets. Four sections stand for a part chosen by ``name``; their keys
are that part's own parameters, so they exist only once the part is known: ``load`` reads the names first, imports the
plugins, and then makes the sections.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pydantic
import tomli
import tomli_w
import tyro

from torchladder import curriculum, data, mask, models, optim
from torchladder.checkpoint import CheckpointConfig
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.distributed.parallelize import ActivationCheckpointConfig, CompileConfig
from torchladder.distributed.ranks import CommConfig
from torchladder.generate import SamplesConfig
from torchladder.metrics import MetricsConfig
from torchladder.models import attention
from torchladder.profiling import ProfilingConfig
from torchladder.registry import ConfigError, Registry, unknown


@dataclass(frozen=True)
class JobConfig:
    """The run as a whole."""

    config_file: str = ""
    """A TOML file with the run's settings; the command line wins over it."""

    extends: str = ""
    """In a file: another TOML file, relative to this one, whose settings this one starts from."""

    plugins: list[str] = field(default_factory=list)
    """Python modules to import first; they register parts. Found on the path, here or beside the config file."""

    dump_folder: str = "./outputs"
    """Where the run leaves everything that it writes."""

    description: str = ""
    """A line that says what the run is for."""

    print_config: bool = False
    """Print the resolved settings at the start."""


@dataclass(frozen=True)
class AttentionConfig:
    """Who sees whom, and which kernel computes it."""

    masks: list[str] = field(default_factory=lambda: ["causal"])
    """Masks that all have to allow a pair: causal, document, chunk, sliding, or a plugin's."""

    kernel: str = "auto"
    """What computes attention: flex, fold, varlen, flash, sdpa, dense; auto chooses by device and masks."""

    def __post_init__(self) -> None:
        _require(len(self.masks) > 0, "attention.masks is empty: name one at least, causal for no mask but the order.")
        for name in self.masks:
            mask.registry.get(name)
        if self.kernel != "auto":
            attention.registry.get(self.kernel)


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, batches, precision."""

    steps: int = 10_000
    """Optimizer steps of the whole run."""

    seq_len: int = 2048
    """Tokens in a row: the full context."""

    local_batch_size: int = 8
    """Rows that a rank puts through the model at once."""

    global_batch_size: int = -1
    """Rows of one optimizer step over all ranks; -1: local_batch_size times the data-parallel ranks."""

    max_norm: float = 1.0
    """Gradients are scaled down to this global norm at most."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the model's computation; weights and optimizer state stay float32."""

    mixed_precision_reduce: Literal["bfloat16", "float32"] = "float32"
    """Type in which gradients are added up over ranks."""

    gc_freq: int = 50
    """Steps between Python garbage collections, which are off otherwise: ranks then never wait for one."""

    def __post_init__(self) -> None:
        for key in ("steps", "seq_len", "local_batch_size", "gc_freq"):
            _require(getattr(self, key) >= 1, f"training.{key} = {getattr(self, key)}: must be 1 or more.")
        _require(self.max_norm > 0, f"training.max_norm = {self.max_norm}: must be positive.")
        _require(
            self.global_batch_size == -1 or self.global_batch_size >= 1,
            f"training.global_batch_size = {self.global_batch_size}: must be 1 or more, or -1.",
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out documents while training."""

    enable: bool = True
    """Validate at the start, every freq steps and at the end."""

    freq: int = 500
    """Steps between validations."""

    steps: int = 20
    """Micro-batches per rank of one validation; -1: all held-out rows."""

    windows: list[int] = field(default_factory=list)
    """Further windows to validate at, beside the full context."""

    def __post_init__(self) -> None:
        _require(self.freq >= 1, f"validation.freq = {self.freq}: must be 1 or more.")
        _require(self.steps >= 1 or self.steps == -1, f"validation.steps = {self.steps}: must be 1 or more, or -1.")
        _require(all(w >= 1 for w in self.windows), f"validation.windows = {self.windows}: must be 1 or more.")


@dataclass(frozen=True)
class DebugConfig:
    """Reproducibility."""

    seed: int = 0
    """Seed of the initial weights and of sampling; the order of data has its own, data.seed."""

    deterministic: bool = False
    """Use deterministic algorithms only: slower, and the same bits each time on the same machine."""


@dataclass(frozen=True)
class ExperimentalConfig:
    """Names kept for those who come from torchtitan."""

    custom_import: str = ""
    """One more plugin module, as in torchtitan; the same as an entry of job.plugins."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    job: JobConfig
    model: Any
    tokenizer: Any
    data: Any
    attention: AttentionConfig
    curriculum: Any
    training: TrainingConfig
    optimizer: Any
    lr_scheduler: optim.LRSchedulerConfig
    parallelism: ParallelismConfig
    activation_checkpoint: ActivationCheckpointConfig
    compile: CompileConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    samples: SamplesConfig
    metrics: MetricsConfig
    profiling: ProfilingConfig
    comm: CommConfig
    debug: DebugConfig
    experimental: ExperimentalConfig

    def to_toml(self) -> str:
        """Returns the settings as a TOML file that gives the same run."""
        sections = {name: _without_none(dataclasses.asdict(section)) for name, section in vars(self).items()}
        sections["job"].update(config_file="", extends="")
        return tomli_w.dumps(sections)


def load(argv: list[str]) -> Config:
    """Reads the settings of a run from a command line and the file that it names.

    Exits with code 2, as command lines do, where the command line itself is wrong, and with 0 after ``--help``.

    Raises:
        ConfigError: a file, section, key, value or plugin is not what it should be; the message says which.
    """
    file = _flag(argv, "job.config_file")
    settings, origins = _read(Path(file)) if file else ({}, {})
    _import_plugins(settings, argv, Path(file).parent if file else Path())

    sections: dict[str, Any] = {}
    kind = _config_type(settings, argv)
    for name in settings:
        if name not in _fields(kind):
            raise unknown(f"section in {_origin(origins, name)}", name, _fields(kind))
    for name, section in _fields(kind).items():
        assert isinstance(section.type, type)
        sections[name] = _section(section.type, name, settings.get(name, {}), origins)
    return tyro.cli(
        kind,
        default=kind(**sections),
        args=argv,
        prog="torchladder.train",
        description="Trains a language model on a context-length curriculum. The file that --job.config_file names "
        "comes first, the command line wins over it.",
        use_underscores=True,
    )


def fail(error: ConfigError) -> int:
    """Prints an error of the user's settings as one message and returns the exit code for it, 2."""
    print(f"torchladder: {error}", file=sys.stderr)
    return 2


# --- the file --------------------------------------------------------------------------------------------------------

Settings = dict[str, dict[str, Any]]
Origins = dict[tuple[str, str], Path]
"""(section, key) -> the file that sets it, for error messages"""


def _read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[Settings, Origins]:
    """Reads a file over the one that it extends."""
    path = path.resolve() if seen else path
    if path.resolve() in seen:
        raise ConfigError(f"{path}: job.extends comes back to the file itself.")
    try:
        own = tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [str(other) for other in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise unknown("config file", str(path), beside) from None
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, section in own.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: {name!r} stands outside of a section; write [section] above it.")

    base = own.get("job", {}).pop("extends", "")
    settings, origins = _read(path.parent / base, (*seen, path.resolve())) if base else ({}, {})
    for name, section in own.items():
        if "name" in section and section["name"] != settings.get(name, {}).get("name"):
            settings[name] = {}  # another part: the settings of the one it replaces mean nothing to it
        settings.setdefault(name, {}).update(section)
        origins.update({(name, key): path for key in section})
    return settings, origins


def _section(kind: type, name: str, settings: dict[str, Any], origins: Origins) -> Any:
    """Makes one section from the file's settings, checking every key and type."""
    hints = _fields(kind)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        where = f"{_origin(origins, name, key)}: {name}.{key}"
        if key not in hints:
            raise unknown(f"key in [{name}] of {_origin(origins, name, key)}", key, hints)
        try:
            # JSON has TOML's types, and in it a list may stand for a tuple while "3" does not stand for 3.
            values[key] = _adapter(hints[key].type).validate_json(json.dumps(value), strict=True)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{where} = {value!r}: {_first(error)}") from None
        except TypeError:
            raise ConfigError(f"{where} = {value!r}: dates and times have no meaning here.") from None
    for key, hint in hints.items():
        if key not in values and hint.default is dataclasses.MISSING and hint.default_factory is dataclasses.MISSING:
            values[key] = tyro.MISSING  # required: the command line may still give it
    try:
        return kind(**values)
    except ConfigError as error:
        files = {str(_origin(origins, name, key)) for key in settings}
        raise ConfigError(f"{', '.join(sorted(files)) or 'defaults'}: {error}") from None


def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Returns what checks a value of that type; in the tables of a list, too, every key must be known."""
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(extra="forbid"))


def _first(error: pydantic.ValidationError) -> str:
    """Returns what is wrong in one phrase, with the place inside a list or table where there is one."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    problem = first["msg"].replace("array", "list").replace("object", "table").replace("keyword argument", "key")
    return f"{place}: {problem}" if place else problem


def _origin(origins: Origins, section: str, key: str | None = None) -> Path | str:
    files = [file for (name, own), file in origins.items() if name == section and key in (None, own)]
    return files[-1] if files else "the defaults"


# --- parts -----------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Registry[Any], str]] = {
    "model": (models.registry, "llama"),
    "tokenizer": (data.tokenizer.registry, "sentencepiece"),
    "data": (data.registry, "rows"),
    "curriculum": (curriculum.registry, "constant"),
    "optimizer": (optim.registry, "AdamW"),
}
"""The sections that a registry fills, each with its default part."""


def _config_type(settings: Settings, argv: list[str]) -> type[Config]:
    """Returns Config with the sections of the parts that the file and the command line name."""
    parts = {}
    for section, (registry, default) in PARTS.items():
        name = _chosen(section, default, settings, argv)
        parts[section] = _part_type(registry, section, name)
    fields = [(name, parts.get(name, section.type)) for name, section in _fields(Config).items()]
    return dataclasses.make_dataclass("Config", fields, bases=(Config,), frozen=True)


def _chosen(section: str, default: str, settings: Settings, argv: list[str]) -> str:
    """Returns the part that a section names; one from the command line drops the file's settings for another."""
    in_file = settings.get(section, {}).get("name", default)
    name = _flag(argv, f"{section}.name") or in_file
    if name != in_file and settings.get(section):
        dropped = ", ".join(key for key in settings[section] if key != "name")
        print(f"torchladder: --{section}.name {name} replaces {in_file!r} of the file, with its settings ({dropped}).")
        settings[section] = {}
    return name


def _part_type(registry: Registry[Any], section: str, name: str) -> type:
    """Returns the section of one part: its name and its parameters."""
    part = registry.get(name)
    meanings = registry.docs(name)
    fields: list[Any] = [("name", _documented(str, f"{registry.kind}: {', '.join(registry.names())}."), name)]
    for key, parameter in registry.parameters(name).items():
        kind = _documented(parameter.annotation, meanings.get(key, ""))
        if parameter.default is inspect.Parameter.empty:
            fields.append((key, kind))
        else:
            fields.append((key, kind, _default(part, key, parameter.default)))
    made = dataclasses.make_dataclass(section.capitalize(), fields, frozen=True, kw_only=True)
    made.__doc__ = inspect.getdoc(part)
    return made


def _default(part: Any, key: str, default: Any) -> Any:
    """Returns a field that repeats the part's default, also where the part makes it anew each time."""
    if dataclasses.is_dataclass(part):
        factory = _fields(part)[key].default_factory
        if factory is not dataclasses.MISSING:
            return field(default_factory=factory)
    return field(default=default)


def _documented(kind: Any, meaning: str) -> Any:
    if get_origin(kind) is list and dataclasses.is_dataclass(get_args(kind)[0]):
        return Annotated[kind, tyro.conf.arg(help=meaning), _tables(kind)]
    return Annotated[kind, tyro.conf.arg(help=meaning)]


def _tables(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Returns how a list of tables is given on the command line: each as in a file, '{ path = "a.txt" }'."""

    def parse(words: list[str]) -> Any:
        try:
            tables = [tomli.loads(f"table = {word}")["table"] for word in words]
            return _adapter(kind).validate_json(json.dumps(tables), strict=True)
        except tomli.TOMLDecodeError as error:
            example = '{ path = "a.txt" }'
            raise ValueError(f"{words} are not tables as in a file, such as {example!r}: {error}") from None
        except pydantic.ValidationError as error:
            raise ValueError(_first(error)) from None

    def show(tables: list[Any]) -> list[str]:
        named = [{key: value for key, value in dataclasses.asdict(one).items() if value} for one in tables]
        return [f"{{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in one.items())} }}" for one in named]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[TABLE [TABLE ...]]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=show,
    )


def _import_plugins(settings: Settings, argv: list[str], beside: Path) -> None:
    """Imports the modules that register further parts, from the path, the working folder or beside the file."""
    names = _flags(argv, "job.plugins") or settings.get("job", {}).get("plugins", [])
    custom = _flag(argv, "experimental.custom_import") or settings.get("experimental", {}).get("custom_import")
    for folder in (str(beside.resolve()), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    for name in [*names, *([custom] if custom else [])]:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise ConfigError(f"plugin {name!r} imports {error.name!r}, which is not installed.") from error
            raise ConfigError(f"plugin {name!r} is not on the path, not here and not in {beside.resolve()}.") from None


# --- the command line, read ahead ------------------------------------------------------------------------------------


def _flags(argv: list[str], key: str) -> list[str]:
    """Returns the values after ``--key`` on the command line, before it is parsed as a whole."""
    values: list[str] = []
    reading = False
    for word in argv:
        flag, _, value = word.partition("=")
        if flag.startswith("--"):
            reading = flag[2:].replace("-", "_") == key
            values += [value] if reading and value else []
        elif reading:
            values.append(word)
    return values


def _flag(argv: list[str], key: str) -> str:
    return (_flags(argv, key) or [""])[-1]


def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of a dataclass by name, with their annotations resolved."""
    hints = get_type_hints(kind, include_extras=True)
    fields = {}
    for one in dataclasses.fields(kind):
        one.type = hints[one.name]
        fields[one.name] = one
    return fields


def _without_none(value: Any) -> Any:
    """TOML has no null: what is unset is left out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
