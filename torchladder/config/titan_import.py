"""Imports a torchtitan v0.2.2 job file: writes its settings as a config of this package, and names what is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from torchladder import optim
from torchladder.config.load import load_file
from torchladder.config.titan_flavors import FLAVORS, LAYERS, find_flavor
from torchladder.config.titan_keys import (
    CONVERTED,
    DEFAULTS,
    MISSING,
    OPTIONAL,
    OUR_DEFAULTS,
    PIPELINE,
    SAME,
)
from torchladder.config.toml_files import parse_settings
from torchladder.distributed.pipeline_layout import STAGES_PER_RANK
from torchladder.registry import require

OWN_SECTIONS = {"attention", "curriculum", "data", "tokenizer"}
"""Sections of this package's configs that every config of torchtitan lacks."""

HUB_SPLITS = {"c4": "train", "c4_validation": "validation"}
"""torchtitan's dataset on the Hub -> its split of allenai/c4."""

OFF = "has no effect without checkpoint.enable"
FLOAT8 = "quantize.linear.float8"


@dataclass
class TitanImport:
    """The import of one file.

    Attributes:
        given: ``section.key`` -> value, as the file sets them.
        settings: section -> key -> value, of the config to write.
        missing: key -> why the config has no counterpart, or a different one.
        unneeded: keys without a counterpart that the file sets to torchtitan's default.
    """

    given: dict[str, Any]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unneeded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for section, keys in SAME.items():
            for key in keys:
                self._set(f"{section}.{key}", self[f"{section}.{key}"])
        self._import_model()
        self._import_optimizer()
        self._import_data()
        self._import_validation_data()
        self._import_parallelism()
        self._import_pipeline()
        self._import_float8()
        self._import_checkpoint()
        for key, value in self.given.items():
            default, reason = MISSING.get(key, (None, "torchtitan v0.2.2 has no such key"))
            if key not in DEFAULTS or (key in MISSING and value != default):
                self.missing[key] = reason
            elif key in MISSING:
                self.unneeded.append(key)
        self._remove_defaults()

    def __getitem__(self, key: str) -> Any:
        """Returns the value of a key of torchtitan."""
        return self.given.get(key, DEFAULTS[key])

    def to_toml(self, source: str) -> str:
        """Returns the config, headed by its ``source`` and what it lacks."""
        lines = [f"Imported from {source}, a job file of torchtitan v0.2.2.", *self.notices()]
        lines.append("Every step has the full context, as there; [curriculum] shortens it at first.")
        comments = "".join(f"# {line}\n" for text in lines for line in text.splitlines())
        return f"{comments}\n{tomli_w.dumps(self.settings)}"

    def notices(self) -> list[str]:
        """Returns a line for each key that is missing, and one for those that nothing needs to replace."""
        values = DEFAULTS | self.given
        lines = [f"{key} = {values[key]!r}: {why}." for key, why in self.missing.items()]
        if self.unneeded:
            lines.append(f"at torchtitan's default, without a counterpart: {', '.join(self.unneeded)}.")
        return lines

    def _set(self, key: str, value: Any) -> None:
        """Sets a key of the config; TOML has no null, so None leaves it unset."""
        if value is not None:
            section, _, name = key.rpartition(".")
            self.settings.setdefault(section, {})[name] = value

    def _import_model(self) -> None:
        found = find_flavor(self["model.name"], self["model.flavor"])
        if found is not None:
            self.settings["model"], self.settings["attention"] = found[0], {"masks": found[1]}
        else:
            known = "; ".join(f"{name} {', '.join(sizes)}" for name, (_, sizes) in FLAVORS.items())
            why = f"set [model], or model.hf_assets_path to a folder with a config.json. Imported are {known}"
            self.missing |= {"model.name": f"no model of this shape: {why}", "model.flavor": "see model.name"}
        path = self["model.tokenizer_path"] or self["model.hf_assets_path"]
        self.settings["tokenizer"] = {"name": "huggingface", "path": path}
        if "model.tokenizer_path" in self.given and "model.hf_assets_path" in self.given:
            self.missing["model.hf_assets_path"] = "model.tokenizer_path takes precedence"

    def _import_optimizer(self) -> None:
        if self["optimizer.name"] not in optim.registry.names():
            self.missing["optimizer.name"] = "no such optimizer; register it in a plugin, job.plugins"
            self._set("optimizer.name", DEFAULTS["optimizer.name"])
        self._set("optimizer.decay_matrices_only", False)
        # There, warmup and decay are cut to the steps of the run.
        total = self["lr_scheduler.total_steps"] or self["training.steps"]
        warmup, ratio = min(self["lr_scheduler.warmup_steps"], total), self["lr_scheduler.decay_ratio"]
        if ratio is not None and warmup + round(total * ratio) > total:
            self.missing["lr_scheduler.decay_ratio"] = "the decay begins right after the warmup, as it does there"
            ratio = None
        if warmup < self["lr_scheduler.warmup_steps"]:
            self.missing["lr_scheduler.warmup_steps"] = f"the warmup takes all {total} steps, as it does there"
        self._set("lr_scheduler.warmup_steps", warmup)
        self._set("lr_scheduler.decay_ratio", ratio)

    def _import_data(self) -> None:
        name, path = str(self["training.dataset"]).lower(), self["training.dataset_path"]
        workers, prefetch = (self[f"training.dataloader.{key}"] for key in ("num_workers", "prefetch_factor"))
        data: dict[str, Any] = {"bos": self["model.name"] == "llama3", "validation_fraction": 0.0}
        data["pin_memory"] = self["training.dataloader.pin_memory"]
        if name in HUB_SPLITS:
            data |= {"name": "hub", "path": path or "allenai/c4", "config": "en", "train_split": HUB_SPLITS[name]}
            data["shuffle_buffer"] = 0
            if workers:
                self.missing["training.dataloader.num_workers"] = "the loader hub reads in a thread, data.prefetch"
            elif "training.dataloader.num_workers" in self.given:
                self.unneeded.append("training.dataloader.num_workers")
        else:
            data |= {
                "name": "rows",
                "sources": self._text_sources("training"),
                "shuffle": False,
                "num_workers": workers,
            }
        if prefetch and workers and data["name"] == "rows":
            data["prefetch_factor"] = prefetch
        elif prefetch:
            self.missing["training.dataloader.prefetch_factor"] = "needs data.num_workers above 0, and the loader rows"
        self.settings["data"] = data

    def _text_sources(self, section: str) -> list[dict[str, str]]:
        """Returns the sources of a dataset that is not on the Hub."""
        name, path = str(self[f"{section}.dataset"]).lower(), self[f"{section}.dataset_path"]
        key = "sources" if section == "training" else "validation_sources"
        if name != "c4_test":
            kind = f"the text of {section}.dataset_path" if path else "set the data"
            why = f"a dataset of torchtitan's or your own code; data.{key}: {kind}"
            self.missing[f"{section}.dataset"] = why
        path = path or ("tests/assets/c4_test" if name == "c4_test" else None)
        return [{"path": path}] if path else []

    def _import_validation_data(self) -> None:
        data, name = self.settings["data"], str(self["validation.dataset"]).lower()
        path = self["validation.dataset_path"] or "allenai/c4"
        named = self["validation.enable"] or self.given.keys() & {"validation.dataset", "validation.dataset_path"}
        if named and data["name"] == "hub" and name in HUB_SPLITS and path == data["path"]:
            data["validation_split"] = HUB_SPLITS[name]
        elif named and data["name"] == "rows" and name not in HUB_SPLITS:
            data["validation_sources"] = self._text_sources("validation")
        elif named:
            data["validation_fraction"] = 0.02 if self["validation.enable"] else 0.0
            why = f"the loader {data['name']} does not validate on it; data.validation_fraction holds documents out"
            self.missing |= {key: why for key in self.given if key.startswith("validation.dataset")}
            self.missing.setdefault("validation.dataset", why)
        for key in ("local_batch_size", "seq_len"):
            if self.given.get(f"validation.{key}", self[f"training.{key}"]) != self[f"training.{key}"]:
                self.missing[f"validation.{key}"] = f"validation has training.{key}"

    def _import_parallelism(self) -> None:
        reshard = self["parallelism.fsdp_reshard_after_forward"]
        default = "always" if self["parallelism.pipeline_parallel_degree"] == 1 else "never"
        self._set("parallelism.fsdp_reshard_after_forward", default if reshard == "default" else reshard)
        asynchronous, degree = (
            self["parallelism.enable_async_tensor_parallel"],
            self["parallelism.tensor_parallel_degree"],
        )
        if asynchronous and degree == 1:
            self.missing["parallelism.enable_async_tensor_parallel"] = "has no effect without tensor parallelism"
        else:
            self._set("parallelism.enable_async_tensor_parallel", asynchronous)
        mode = self["activation_checkpoint.mode"]
        if mode == "memory_budget":
            self.missing["activation_checkpoint.mode"] = "mode = 'selective' with selective_ac_option = 'op' is nearest"
            self.settings["activation_checkpoint"]["selective_ac_option"] = "op"
            if self["activation_checkpoint.selective_ac_option"] != "op":
                self.missing["activation_checkpoint.selective_ac_option"] = "has no effect in the mode memory_budget"
        self._set("activation_checkpoint.mode", "selective" if mode == "memory_budget" else mode)

    def _import_pipeline(self) -> None:
        if self["parallelism.pipeline_parallel_degree"] == 1:
            for key in PIPELINE.keys() & self.given.keys():
                if self[key] == PIPELINE[key]:
                    self.unneeded.append(key)
                else:
                    self.missing[key] = "has no effect without pipeline parallelism"
            return
        for key in ("pipeline_parallel_degree", *(key.partition(".")[2] for key in list(PIPELINE)[1:-1])):
            self._set(f"parallelism.{key}", self[f"parallelism.{key}"])
        key = "parallelism.pipeline_parallel_schedule"
        known = {name.lower(): name for name in STAGES_PER_RANK}
        schedule = known.get(str(self[key]).lower())
        if schedule is None:
            self.missing[key] = f"no such schedule; {', '.join(known.values())} are"
        self._set(key, schedule or PIPELINE[key])
        key, parts = "parallelism.module_fqns_per_model_part", self["parallelism.module_fqns_per_model_part"]
        points = [next((name for name in part if name.startswith("layers.")), "") for part in (parts or [])[1:]]
        if points and all(points):
            self._set("parallelism.pipeline_parallel_split_points", points)
            if self.settings["parallelism"].pop("pipeline_parallel_layers_per_stage", None) is not None:
                self.missing["parallelism.pipeline_parallel_layers_per_stage"] = f"{key} takes precedence"
        elif parts:
            self.missing[key] = "each stage begins with a layer, parallelism.pipeline_parallel_split_points"

    def _import_float8(self) -> None:
        keys = [key for key in CONVERTED if key.startswith(FLOAT8)]
        for key in keys:
            self._set(f"float8.{key.rpartition('.')[2]}", self[key])
        section, converters = self.settings["float8"], self["model.converters"]
        section["enable"] = FLOAT8 in converters
        if others := [name for name in converters if name != FLOAT8]:
            self.missing["model.converters"] = f"no counterpart of {', '.join(others)}; float8.enable is {FLOAT8}"
        if "auto_filter_small_kn" in section["filter_fqns"]:
            self.missing[f"{FLOAT8}.filter_fqns"] = "auto_filter_small_kn: set float8.min_features"
        names = [name.split(".") for name in section["filter_fqns"] if name != "auto_filter_small_kn"]
        section["filter_fqns"] = [".".join(LAYERS.get(part, part) for part in name) for name in names]
        gathers, scales = keys[0], keys[1]
        if section.get("recipe_name", "tensorwise") != "tensorwise" and self[gathers]:
            self.missing[gathers] = "needs the recipe tensorwise"
            section["enable_fsdp_float8_all_gather"] = False
        if self[scales] and not section["enable_fsdp_float8_all_gather"]:
            self.missing[scales] = "has no effect without enable_fsdp_float8_all_gather"
            section["precompute_float8_dynamic_scale_for_fsdp"] = False

    def _import_checkpoint(self) -> None:
        enable, path = self["checkpoint.enable"], self["checkpoint.initial_load_path"]
        for key in ("create_seed_checkpoint", "last_save_in_hf", "initial_load_in_hf"):
            key = f"checkpoint.{key}"
            works = enable and (key.endswith("load_in_hf") or not self["checkpoint.load_only"])
            self._set(key, bool(works and self[key]))
            if self[key] and not works:
                self.missing[key] = OFF if not enable else "saves, which checkpoint.load_only excludes"
        if enable and self["checkpoint.initial_load_in_hf"]:
            self._set("checkpoint.initial_load_path", path or self["model.hf_assets_path"])
        elif path:
            why = "a checkpoint of torchtitan has its own format: convert it to Hugging Face's with torchtitan, and set"
            self.missing["checkpoint.initial_load_path"] = f"{why} initial_load_path and initial_load_in_hf"
        excluded = {"optimizer", "dataloader", "train_state"}
        names = self["checkpoint.exclude_from_loading"]
        self._set("checkpoint.exclude_from_loading", [name for name in names if name in excluded])
        if others := [name for name in names if name not in excluded]:
            why = "the learning rate is a function of the step, which train_state has"
            why = why if others == ["lr_scheduler"] else f"can only exclude {', '.join(sorted(excluded))}"
            self.missing["checkpoint.exclude_from_loading"] = f"without {', '.join(others)}: {why}"

    def _remove_defaults(self) -> None:
        """Removes what the file does not set and what would be the same without it."""
        names = {f"{name}.name": self.settings[name]["name"] for name in ("data", "optimizer")}
        required = {"data.path": ""} if names["data.name"] == "hub" else {}
        defaults = load_file(None, names | required)
        for name, section in self.settings.items():
            for key in [key for key in section if name not in ("model", "tokenizer") and key != "name"]:
                unset = f"{name}.{key}" not in self.given
                if unset and (f"{name}.{key}" in OUR_DEFAULTS or section[key] == getattr(getattr(defaults, name), key)):
                    del section[key]
        self.settings = {name: section for name, section in self.settings.items() if section}


def read_titan_file(path: Path) -> TitanImport:
    """Reads and converts a job file of torchtitan v0.2.2.

    Raises:
        ConfigError: the file is missing, not TOML, or no job file of torchtitan.
    """
    require(path.suffix != ".py", f"{path}: a config of torchtitan 0.3 is Python; import-titan reads v0.2.2's TOML.")
    settings = parse_settings(path.read_text(encoding="utf-8-sig"), path)
    require(not OWN_SECTIONS & settings.keys(), f"{path} is a config of torchladder already.")
    given = {key: value for section, table in settings.items() for key, value in _flatten(section, table).items()}
    known = f"{path} is no job file of torchtitan v0.2.2: it sets none of its keys, such as training.steps."
    require(bool(given.keys() & DEFAULTS.keys()), known)
    for key in given.keys() & DEFAULTS.keys() - MISSING.keys():
        kind = OPTIONAL.get(key, type(DEFAULTS[key]))
        value = given[key]
        fits = type(value) is kind or (kind is float and type(value) is int)
        require(fits, f"{path}: {key} = {value!r}: must be of the type {kind.__name__}.")
    return TitanImport(given)


def _flatten(key: str, value: Any) -> dict[str, Any]:
    """Returns ``section.key`` -> value of a table and of the tables inside of it."""
    if not isinstance(value, dict):
        return {key: value}
    return {name: inner for own, child in value.items() for name, inner in _flatten(f"{key}.{own}", child).items()}
