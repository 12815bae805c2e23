"""torchladder import-titan: every key of torchtitan v0.2.2 is imported or named, and the config it writes loads."""

import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchladder import commands, config, models
from torchladder.config.titan_flavors import FLAVORS, find_flavor
from torchladder.config.titan_import import TitanImport, read_titan_file
from torchladder.config.titan_keys import DEFAULTS
from torchladder.optim import LRSchedulerConfig

# Section -> the keys of v0.2.2, from the dataclasses of its config; CHOICES has values other than the default.
KEYS = {
    "job": "config_file dump_folder description print_config save_config_file custom_config_module",
    "profiling": "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup "
    "enable_memory_snapshot save_memory_snapshot_folder",
    "metrics": "log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks enable_wandb",
    "model": "name flavor hf_assets_path tokenizer_path converters print_after_conversion",
    "optimizer": "name lr beta1 beta2 eps weight_decay implementation early_step_in_backward",
    "lr_scheduler": "warmup_steps total_steps decay_ratio decay_type min_lr_factor",
    "training": "dataset dataset_path local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload "
    "dtype mixed_precision_param mixed_precision_reduce gc_freq gc_debug",
    "training.dataloader": "num_workers persistent_workers pin_memory prefetch_factor",
    "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward "
    "tensor_parallel_degree disable_loss_parallel enable_async_tensor_parallel pipeline_parallel_degree "
    "module_fqns_per_model_part pipeline_parallel_first_stage_less_layers pipeline_parallel_last_stage_less_layers "
    "pipeline_parallel_layers_per_stage pipeline_parallel_schedule pipeline_parallel_schedule_csv "
    "pipeline_parallel_microbatch_size pipeline_parallel_expert_parallel_overlap context_parallel_degree "
    "context_parallel_load_balancer context_parallel_rotate_method expert_parallel_degree "
    "expert_tensor_parallel_degree expert_parallel_comm_backend",
    "checkpoint": "enable enable_ft_dataloader_checkpoints folder interval initial_load_path initial_load_model_only "
    "initial_load_in_hf initial_load_in_hf_quantized last_save_model_only last_save_in_hf export_dtype async_mode "
    "keep_latest_k load_step exclude_from_loading enable_first_step_checkpoint create_seed_checkpoint load_only",
    "activation_checkpoint": "mode selective_ac_option per_op_sac_force_recompute_mm_shapes_by_fqns early_stop "
    "memory_budget visualize_memory_budget_pareto preserve_rng_state determinism_check debug",
    "compile": "enable components backend",
    "quantize.linear.float8": "enable_fsdp_float8_all_gather precompute_float8_dynamic_scale_for_fsdp recipe_name "
    "filter_fqns emulate",
    "quantize.linear.mx": "mxfp8_dim1_cast_kernel_choice recipe_name filter_fqns",
    "quantize.grouped_mm.float8": "fqns",
    "quantize.grouped_mm.mx": "recipe_name fqns",
    "comm": "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder save_traces_file_prefix mode",
    "memory_estimation": "enable disable_fake_mode",
    "fault_tolerance": "enable process_group process_group_timeout_ms replica_id group_size min_replica_size "
    "semi_sync_method",
    "experimental": "custom_import custom_args_module",
    "validation": "enable dataset dataset_path local_batch_size seq_len freq steps",
    "validation.dataloader": "num_workers persistent_workers pin_memory prefetch_factor",
    "debug": "seed deterministic deterministic_warn_only moe_force_load_balance",
}
NAMES = [f"{section}.{key}" for section, keys in KEYS.items() for key in keys.split()]

CHOICES = {
    "model.name": ["llama3", "qwen3", "deepseek_v3"],
    "model.flavor": ["debugmodel", "8B", "8B_flex", "debugmodel_varlen_attn", "405B"],
    "model.converters": [[], ["quantize.linear.float8"], ["quantize.linear.mx"]],
    "optimizer.name": ["AdamW", "Adam", "Lion"],
    "optimizer.implementation": ["fused", "foreach", "for-loop"],
    "optimizer.lr": [8e-4, 1e-4],
    "optimizer.beta1": [0.9, 0.8],
    "optimizer.beta2": [0.95, 0.99],
    "lr_scheduler.warmup_steps": [200, 0, 20000],
    "lr_scheduler.total_steps": [30, 5000],
    "lr_scheduler.decay_ratio": [0.1, 1.0],
    "lr_scheduler.decay_type": ["linear", "sqrt", "cosine"],
    "lr_scheduler.min_lr_factor": [0.0, 0.1],
    "training.dataset": ["c4_test", "c4", "C4", "c4_validation", "mine"],
    "training.global_batch_size": [-1, 64],
    "training.max_norm": [1.0, 2],
    "training.mixed_precision_reduce": ["float32"],
    "training.dtype": ["float32", "bfloat16"],
    "training.mixed_precision_param": ["bfloat16"],
    "parallelism.data_parallel_shard_degree": [-1, 4],
    "parallelism.fsdp_reshard_after_forward": ["default", "always", "never"],
    "parallelism.module_fqns_per_model_part": [[["layers.0"], ["layers.1"]]],
    "checkpoint.keep_latest_k": [0, 2, 10],
    "checkpoint.export_dtype": ["float16", "bfloat16", "float32"],
    "checkpoint.async_mode": ["disabled", "async", "async_with_pinned_mem"],
    "checkpoint.load_step": [-1, 100],
    "checkpoint.exclude_from_loading": [[], ["optimizer"], ["lr_scheduler", "dataloader"], ["model"]],
    "activation_checkpoint.mode": ["selective", "full", "memory_budget", "none"],
    "activation_checkpoint.selective_ac_option": ["2", "op"],
    "compile.components": [["model", "loss"], ["model"], ["loss"]],
    "compile.backend": ["inductor"],
    "profiling.profile_freq": [10, 100],
    "profiling.profiler_active": [1, 4],
    "profiling.profiler_warmup": [3, 5],
    "quantize.linear.float8.recipe_name": ["tensorwise", "rowwise", "rowwise_with_gw_hp"],
    "quantize.linear.float8.filter_fqns": [[], ["output", "attention.wk"], ["auto_filter_small_kn"]],
    "validation.dataset": ["c4_validation", "c4_test", "mine"],
    "validation.steps": [-1, 3],
    "debug.seed": [0, 7],
}

PATHS = ("dataset_path", "tokenizer_path", "hf_assets_path", "initial_load_path")


def values(key):
    """Returns values of a key: the chosen ones, or torchtitan's default and another of its type."""
    default = DEFAULTS[key]
    if key in CHOICES:
        return CHOICES[key]
    if isinstance(default, bool):
        return [False, True]
    others = {int: [1, 16], float: [0.25], list: [["one"]], str: ["one", "two"], type(None): ["one"]}
    if key.endswith(("prefetch_factor", "layers_per_stage")):
        return [2, 4]
    return [*([] if default is None else [default]), *others[type(default)]]


def nested(flat):
    """Returns the tables of a file."""
    tables = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[name] = value
    return tables


# Key of torchtitan -> whether a loaded config has its value, for the keys whose name or value differs.
HAS = {
    "model.name": lambda c, v: c.model.name == {"llama3": "llama"}.get(v, v),
    "model.flavor": lambda c, v: models.resolve(c.model).dim == {"d": 256, "8": 4096, "4": 16384}[v[0]],
    "model.hf_assets_path": lambda c, v: c.tokenizer.path == v,
    "model.tokenizer_path": lambda c, v: c.tokenizer.path == v,
    "model.converters": lambda c, v: c.float8.enable == bool(v),
    "training.dataset": lambda c, v: (
        (c.data.name, getattr(c.data, "train_split", ""))
        == {"c4": ("hub", "train"), "c4_validation": ("hub", "validation")}.get(v.lower(), ("rows", ""))
    ),
    "training.dataset_path": lambda c, v: v in (getattr(c.data, "path", ""), *sources(c, "sources")),
    "parallelism.fsdp_reshard_after_forward": lambda c, v: (
        c.parallelism.fsdp_reshard_after_forward == v.replace("default", "always")
    ),
    "quantize.linear.float8.filter_fqns": lambda c, v: (
        c.float8.filter_fqns == [{"output": "head"}.get(x, "attention.k_proj") for x in v]
    ),
    "validation.dataset": lambda c, v: (
        getattr(c.data, "validation_split", "") == "validation" or len(sources(c, "validation_sources")) == 1
    ),
    "validation.dataset_path": lambda c, v: v in (getattr(c.data, "path", ""), *sources(c, "validation_sources")),
    "validation.local_batch_size": lambda c, v: c.training.local_batch_size == v,
    "validation.seq_len": lambda c, v: c.training.seq_len == v,
}


def sources(loaded, key):
    return [source.path for source in getattr(loaded.data, key, [])]


def has(loaded, key, value):
    if key in HAS:
        return HAS[key](loaded, value)
    section, _, name = key.rpartition(".")
    section = {"quantize.linear.float8": "float8", "training.dataloader": "data"}.get(section, section)
    return getattr(getattr(loaded, section, None), name, "no such key") == value


def test_the_tables_have_every_key_and_no_other():
    assert len(NAMES) == 149
    assert DEFAULTS.keys() == set(NAMES)


@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_key_is_imported_with_its_value_or_named(tmp_path, data):
    keys = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=60, unique=True))
    flat = {key: data.draw(st.sampled_from(values(key)), label=key) for key in keys}
    file = tmp_path / "old.toml"
    file.write_text(tomli_w.dumps(nested(flat)))
    imported = read_titan_file(file)
    loaded = config.load_text(imported.to_toml("old.toml"), "new.toml")
    for key, value in flat.items():
        named = key in imported.missing or key in imported.unneeded
        assert named or has(loaded, key, value), (key, value)
    for key, reason in imported.missing.items():
        assert any(line.startswith(f"{key} = ") and reason in line for line in imported.notices())


def test_settings_that_a_file_leaves_out_have_the_defaults_of_torchtitan(tmp_path):
    (tmp_path / "old.toml").write_text("[training]\nsteps = 7\n")
    loaded = config.load_text(read_titan_file(tmp_path / "old.toml").to_toml("old.toml"), "new.toml")
    assert models.resolve(loaded.model).n_layers == 6
    assert (loaded.tokenizer.path, sources(loaded, "sources")) == ("./tests/assets/tokenizer", ["tests/assets/c4_test"])
    assert (loaded.activation_checkpoint.mode, loaded.compile.components) == ("selective", ["model", "loss"])
    assert (loaded.checkpoint.last_save_model_only, loaded.metrics.enable_tensorboard) == (True, False)
    assert (loaded.validation.enable, loaded.data.validation_fraction) == (False, 0.0)
    assert (loaded.data.shuffle, loaded.data.bos, loaded.optimizer.decay_matrices_only) == (False, True, False)


def lr_factor(step, total, warmup, ratio, kind, lowest):
    """The schedule of torchtitan: warmup, plateau, decay, which ends one step after the run."""
    warmup = min(warmup, total)
    decay = total - warmup if ratio is None else min(round(total * ratio), total - warmup)
    if step < warmup:
        return (step + 1) / warmup
    if step < total + 1 - decay:
        return 1.0
    progress = (step - total + decay) / decay
    curves = {"linear": 1 - progress, "sqrt": 1 - math.sqrt(progress), "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return lowest + (1 - lowest) * curves[kind]


@given(
    total=st.integers(1, 50),
    warmup=st.integers(0, 60),
    ratio=st.none() | st.floats(0, 1),
    kind=st.sampled_from(["linear", "sqrt", "cosine"]),
    lowest=st.floats(0, 1),
)
@settings(max_examples=12, deadline=None)
def test_every_step_has_the_learning_rate_of_torchtitan(total, warmup, ratio, kind, lowest):
    given = {"training.steps": total, "lr_scheduler.warmup_steps": warmup, "lr_scheduler.decay_type": kind}
    given |= {"lr_scheduler.min_lr_factor": lowest} | ({} if ratio is None else {"lr_scheduler.decay_ratio": ratio})
    section = TitanImport(given).settings["lr_scheduler"]
    scheduler = LRSchedulerConfig(**section)
    for step in range(total):
        assert scheduler.factor(step, total) == pytest.approx(lr_factor(step, total, warmup, ratio, kind, lowest))


# Parameters of torchtitan's models, built on the meta device.
PARAMETERS = {
    ("llama3", "debugmodel"): 6_163_712,
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("llama3", "405B"): 405_853_388_800,
    ("qwen3", "debugmodel"): 31_987_968,
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
}


def test_models_have_as_many_parameters():
    assert PARAMETERS.keys() == {(name, size) for name, (_, sizes) in FLAVORS.items() for size in sizes}
    for (name, size), count in PARAMETERS.items():
        section, _ = find_flavor(name, size)
        shape = models.resolve(SimpleNamespace(**section))
        with torch.device("meta"):
            model = models.registry.get(section["name"])(shape, seq_len=16)
        assert sum(weight.numel() for weight in model.parameters()) == count, (name, size)


# The train configs that torchtitan ships for llama3: what differs between them and from the defaults.
LLAMA3_8B = """
[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "./assets/hf/Llama-3.1-8B"

[optimizer]
lr = 3e-4

[training]
local_batch_size = 1
seq_len = 8192
steps = 1000
dataset = "c4"

[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
pipeline_parallel_degree = 1
context_parallel_degree = 1

[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"

[quantize.linear.float8]
filter_fqns = ["output"]

[validation]
enable = false
dataset = "c4_validation"
freq = 500
"""
LLAMA3_405B = """
[model]
name = "llama3"
flavor = "405B"
converters = ["quantize.linear.float8"]

[lr_scheduler]
warmup_steps = 600

[training]
local_batch_size = 2
seq_len = 8192
steps = 3000
dataset = "c4"

[parallelism]
tensor_parallel_degree = 8
enable_async_tensor_parallel = true
pipeline_parallel_degree = 2

[activation_checkpoint]
mode = "full"

[compile]
enable = true

[quantize.linear.float8]
enable_fsdp_float8_all_gather = true
precompute_float8_dynamic_scale_for_fsdp = true
filter_fqns = ["output"]
"""


def test_the_shipped_config_of_llama3_8b(tmp_path, capsys):
    (tmp_path / "old.toml").write_text(LLAMA3_8B)
    assert commands.main(shlex.split(f"import-titan {tmp_path}/old.toml --output {tmp_path}/new.toml")) == 0
    errors = capsys.readouterr().err
    assert "18 of 18 keys imported, 0 named above, 0 at torchtitan's default" in errors
    loaded = config.load_file(tmp_path / "new.toml")
    assert (loaded.model.flavor, loaded.model.rope_scaling_factor) == ("llama3-8b", 8.0)
    assert (loaded.data.name, loaded.data.path, loaded.data.config) == ("hub", "allenai/c4", "en")
    assert (loaded.data.validation_split, loaded.data.shuffle_buffer) == ("validation", 0)
    assert (loaded.optimizer.lr, loaded.training.seq_len, loaded.validation.freq) == (3e-4, 8192, 500)


def test_the_shipped_config_of_llama3_405b(tmp_path, capsys):
    (tmp_path / "old.toml").write_text(LLAMA3_405B)
    assert commands.main(["import-titan", f"{tmp_path}/old.toml"]) == 0
    text, errors = capsys.readouterr()
    assert "16 of 16 keys imported, 0 named above" in errors
    loaded = config.load_text(text, "new.toml")
    pipeline = loaded.parallelism.pipeline_parallel_degree, loaded.parallelism.pipeline_parallel_schedule
    assert (*pipeline, loaded.parallelism.fsdp_reshard_after_forward) == (2, "1F1B", "never")
    assert loaded.float8.enable
    assert loaded.float8.precompute_float8_dynamic_scale_for_fsdp
    assert (loaded.parallelism.tensor_parallel_degree, loaded.parallelism.enable_async_tensor_parallel) == (8, True)


def test_weights_of_a_hugging_face_folder(tmp_path):
    given = {"model.hf_assets_path": "hf/8B", "checkpoint.enable": True, "checkpoint.initial_load_in_hf": True}
    (tmp_path / "old.toml").write_text(tomli_w.dumps(nested(given)))
    loaded = config.load_text(read_titan_file(tmp_path / "old.toml").to_toml("old.toml"), "new.toml")
    assert (loaded.checkpoint.initial_load_path, loaded.checkpoint.initial_load_in_hf) == ("hf/8B", True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("old.toml", "[training\n", "old.toml"),
        ("old.toml", "[tool.ruff]\nline-length = 120\n", "no job file of torchtitan v0.2.2"),
        ("old.toml", "[training]\nsteps = 7\n[curriculum]\nevery = 8\n", "is a config of torchladder already"),
        ("old.toml", '[training]\nsteps = "7"\n', "training.steps = '7': must be of the type int"),
        ("old.toml", "training = 7\n", "write .section. above it"),
        ("old.toml", "[checkpoint]\nkeep_latest_k = 1\n", "checkpoint.keep_latest_k = 1: must be"),
        ("old.py", "", "import-titan reads v0.2.2's TOML"),
        ("missing", "", "No such file"),
    ],
)
def test_files_that_are_no_job_files(tmp_path, capsys, name, text, message):
    file = tmp_path / name
    if name != "missing":
        file.write_text(text)
    assert commands.main(["import-titan", str(file)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message.replace(".section.", "[section]") in error


def test_an_output_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "old.toml").write_text("[training]\nsteps = 7\n")
    assert commands.main(shlex.split(f"import-titan {tmp_path}/old.toml --output {tmp_path}/old.toml")) == 2
    assert "choose another --output, or set --overwrite" in capsys.readouterr().err
    assert (tmp_path / "old.toml").read_text() == "[training]\nsteps = 7\n"


def test_keys_that_torchtitan_does_not_have_are_named(tmp_path):
    (tmp_path / "old.toml").write_text("[training]\nsteps = 7000\nbatch_size = 8\n[mine]\nx = 1\n")
    assert read_titan_file(tmp_path / "old.toml").missing == {
        "training.batch_size": "torchtitan v0.2.2 has no such key",
        "mine.x": "torchtitan v0.2.2 has no such key",
    }


def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/torchtitan.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("old.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.S)[1])
    command = re.search(r"torchladder (import-titan .*)", page)[1]
    assert commands.main(shlex.split(command)) == 0
    shown = "".join(f"    {line}\n" for line in capsys.readouterr().err.splitlines())
    assert f"\n\n{shown}\n" in page
    config.load_file(Path("run.toml"))


def test_a_pipeline(tmp_path, capsys):
    def imported(*lines):
        head = "[training]\nsteps = 10\n[parallelism]\n"
        (tmp_path / "old.toml").write_text(head + "\n".join(f"{line}" for line in lines))
        assert commands.main(["import-titan", f"{tmp_path}/old.toml"]) == 0
        text, errors = capsys.readouterr()
        return config.load_text(text, "new.toml").parallelism, errors

    fqns = (
        'module_fqns_per_model_part = [["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["layers.3", "norm"]]'
    )
    degree = "pipeline_parallel_degree = 3"
    found, errors = imported(degree, fqns, 'pipeline_parallel_schedule = "interleaved1f1b"')
    assert found.pipeline_parallel_split_points == ["layers.1", "layers.3"]
    assert found.pipeline_parallel_schedule == "Interleaved1F1B"
    assert "4 of 4 keys imported" in errors
    found, errors = imported(
        degree, 'pipeline_parallel_schedule = "DualPipeV"', "pipeline_parallel_microbatch_size = 2"
    )
    assert (found.pipeline_parallel_schedule, found.pipeline_parallel_microbatch_size) == ("1F1B", 2)
    assert "pipeline_parallel_schedule = 'DualPipeV': no such schedule; 1F1B, GPipe, Interleaved1F1B, ZBVZero" in errors
    found, errors = imported("pipeline_parallel_layers_per_stage = 2", "pipeline_parallel_microbatch_size = 1")
    assert found.pipeline_parallel_layers_per_stage is None
    assert "pipeline_parallel_layers_per_stage = 2: has no effect without pipeline parallelism" in errors
