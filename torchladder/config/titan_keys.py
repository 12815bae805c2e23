"""Keys of torchtitan v0.2.2's job files: their defaults there, and their counterparts here."""

from __future__ import annotations

from typing import Any

SAME: dict[str, dict[str, Any]] = {
    "job": {"dump_folder": "./outputs", "description": "default job", "print_config": False},
    "profiling": {
        "enable_profiling": False,
        "save_traces_folder": "profile_traces",
        "profile_freq": 10,
        "profiler_active": 1,
        "profiler_warmup": 3,
        "enable_memory_snapshot": False,
        "save_memory_snapshot_folder": "memory_snapshot",
    },
    "metrics": {
        "log_freq": 10,
        "enable_tensorboard": False,
        "disable_color_printing": False,
        "save_tb_folder": "tb",
        "enable_wandb": False,
    },
    "optimizer": {
        "name": "AdamW",
        "lr": 8e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "implementation": "fused",
    },
    "lr_scheduler": {"total_steps": None, "decay_type": "linear", "min_lr_factor": 0.0},
    "training": {
        "local_batch_size": 8,
        "global_batch_size": -1,
        "seq_len": 2048,
        "max_norm": 1.0,
        "steps": 10000,
        "enable_cpu_offload": False,
        "dtype": "float32",
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
        "gc_freq": 50,
    },
    "parallelism": {
        "data_parallel_replicate_degree": 1,
        "data_parallel_shard_degree": -1,
        "tensor_parallel_degree": 1,
        "disable_loss_parallel": False,
        "context_parallel_degree": 1,
    },
    "checkpoint": {
        "enable": False,
        "folder": "checkpoint",
        "interval": 500,
        "initial_load_model_only": True,
        "last_save_model_only": True,
        "export_dtype": "float32",
        "async_mode": "disabled",
        "keep_latest_k": 10,
        "load_step": -1,
        "enable_first_step_checkpoint": False,
        "load_only": False,
    },
    "activation_checkpoint": {"selective_ac_option": "2", "preserve_rng_state": True},
    "compile": {"enable": False, "components": ["model", "loss"], "backend": "inductor"},
    "comm": {
        "init_timeout_seconds": 300,
        "train_timeout_seconds": 100,
        "trace_buf_size": 20000,
        "save_traces_folder": "comm_traces",
        "save_traces_file_prefix": "rank_",
    },
    "validation": {"enable": False, "freq": 10, "steps": -1},
    "debug": {"seed": None, "deterministic": False, "deterministic_warn_only": False},
}
"""Section -> key -> torchtitan's default, of the keys with the same name and meaning here."""

OUR_DEFAULTS = {"job.description", "comm.train_timeout_seconds", "activation_checkpoint.preserve_rng_state"}
"""Keys that change no result: where the file does not set them, the default of this package stays."""

PIPELINE: dict[str, Any] = {
    "parallelism.pipeline_parallel_schedule": "1F1B",
    "parallelism.pipeline_parallel_microbatch_size": 1,
    "parallelism.pipeline_parallel_layers_per_stage": None,
    "parallelism.pipeline_parallel_first_stage_less_layers": 1,
    "parallelism.pipeline_parallel_last_stage_less_layers": 1,
    "parallelism.module_fqns_per_model_part": None,
}
"""Key -> torchtitan's default, of the keys that have an effect only with pipeline parallelism."""

CONVERTED: dict[str, Any] = {
    "model.name": "llama3",
    "model.flavor": "debugmodel",
    "model.hf_assets_path": "./tests/assets/tokenizer",
    "model.tokenizer_path": None,
    "model.converters": [],
    "lr_scheduler.warmup_steps": 200,
    "lr_scheduler.decay_ratio": None,
    "training.dataset": "c4_test",
    "training.dataset_path": None,
    "training.dataloader.num_workers": 0,
    "training.dataloader.prefetch_factor": None,
    "training.dataloader.pin_memory": False,
    "parallelism.fsdp_reshard_after_forward": "default",
    "parallelism.enable_async_tensor_parallel": False,
    "parallelism.pipeline_parallel_degree": 1,
    **PIPELINE,
    "checkpoint.initial_load_path": None,
    "checkpoint.initial_load_in_hf": False,
    "checkpoint.last_save_in_hf": False,
    "checkpoint.create_seed_checkpoint": False,
    "checkpoint.exclude_from_loading": [],
    "activation_checkpoint.mode": "selective",
    "quantize.linear.float8.enable_fsdp_float8_all_gather": False,
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": False,
    "quantize.linear.float8.recipe_name": None,
    "quantize.linear.float8.filter_fqns": [],
    "quantize.linear.float8.emulate": False,
    "validation.dataset": "c4_validation",
    "validation.dataset_path": None,
    "validation.local_batch_size": 8,
    "validation.seq_len": 2048,
}
"""Key -> torchtitan's default, of the keys whose name or value differs here: see ``titan_import``."""

_EXPERTS = "no mixture-of-experts model"
_MX = "no MXFP8: [float8] has the recipes tensorwise, rowwise and rowwise_with_gw_hp"
_PER_REPLICA = "no torchft: [resilience] and checkpoints restart the whole run"
_WORKERS = "validation uses data.num_workers, data.prefetch_factor and data.pin_memory"

MISSING: dict[str, tuple[Any, str]] = {
    "job.config_file": (None, "the command line names the file, --job.config_file"),
    "job.save_config_file": (None, "a run always writes job.dump_folder/config.toml"),
    "job.custom_config_module": ("", "a plugin's component has settings without it: job.plugins"),
    "metrics.save_for_all_ranks": (False, "rank 0 reports the sums and means of all ranks"),
    "model.print_after_conversion": (False, "`torchladder plan` shows the model's size"),
    "optimizer.early_step_in_backward": (
        False,
        "the optimizer steps after clipping; training.enable_cpu_offload saves more memory",
    ),
    "training.gc_debug": (False, "training.gc_freq is the only setting of the garbage collector"),
    "training.dataloader.persistent_workers": (False, "workers live as long as the run, data.num_workers"),
    "parallelism.pipeline_parallel_schedule_csv": (
        "",
        "a schedule is one of PyTorch's, parallelism.pipeline_parallel_schedule",
    ),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (True, _EXPERTS),
    "parallelism.context_parallel_load_balancer": (
        "headtail",
        "a rank's tokens are one slice of the row, parallelism.context_parallel_degree",
    ),
    "parallelism.context_parallel_rotate_method": (
        "allgather",
        "ranks receive the keys that their mask attends to, parallelism.context_parallel_degree",
    ),
    "parallelism.expert_parallel_degree": (1, _EXPERTS),
    "parallelism.expert_tensor_parallel_degree": (1, _EXPERTS),
    "parallelism.expert_parallel_comm_backend": ("standard", _EXPERTS),
    "checkpoint.enable_ft_dataloader_checkpoints": (True, _PER_REPLICA),
    "checkpoint.initial_load_in_hf_quantized": (
        False,
        "quantized weights are not read: give a folder in bfloat16 or float32, checkpoint.initial_load_path",
    ),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        ["moe.router.gate"],
        "selective_ac_option = 'op' saves every second matrix product of a block",
    ),
    "activation_checkpoint.early_stop": (False, "PyTorch's default"),
    "activation_checkpoint.memory_budget": (0.5, "the nearest is mode = 'selective' with selective_ac_option = 'op'"),
    "activation_checkpoint.visualize_memory_budget_pareto": (False, "`torchladder plan` estimates memory"),
    "activation_checkpoint.determinism_check": ("default", "PyTorch's default"),
    "activation_checkpoint.debug": (False, "PyTorch's default"),
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": ("triton", _MX),
    "quantize.linear.mx.recipe_name": ("mxfp8_cublas", _MX),
    "quantize.linear.mx.filter_fqns": (["output"], _MX),
    "quantize.grouped_mm.float8.fqns": ([], _EXPERTS),
    "quantize.grouped_mm.mx.recipe_name": ("mxfp8", _EXPERTS),
    "quantize.grouped_mm.mx.fqns": ([], _EXPERTS),
    "comm.mode": ("default", "`torchladder plan` checks a run of any number of ranks without them"),
    "memory_estimation.enable": (False, "`torchladder plan` estimates memory"),
    "memory_estimation.disable_fake_mode": (False, "`torchladder plan` estimates memory"),
    "fault_tolerance.enable": (False, _PER_REPLICA),
    "fault_tolerance.process_group": ("gloo", _PER_REPLICA),
    "fault_tolerance.process_group_timeout_ms": (10000, _PER_REPLICA),
    "fault_tolerance.replica_id": (0, _PER_REPLICA),
    "fault_tolerance.group_size": (0, _PER_REPLICA),
    "fault_tolerance.min_replica_size": (1, _PER_REPLICA),
    "fault_tolerance.semi_sync_method": (None, _PER_REPLICA),
    "experimental.custom_import": (
        "",
        "the module registers with torchtitan: register its components here, and name the new module in job.plugins",
    ),
    "experimental.custom_args_module": ("", "a plugin's component has settings without it: job.plugins"),
    "validation.dataloader.num_workers": (0, _WORKERS),
    "validation.dataloader.persistent_workers": (False, _WORKERS),
    "validation.dataloader.pin_memory": (False, _WORKERS),
    "validation.dataloader.prefetch_factor": (None, _WORKERS),
    "debug.moe_force_load_balance": (False, _EXPERTS),
}
"""Key -> torchtitan's default, and the reason or the nearest setting, of the keys without a counterpart."""

OPTIONAL: dict[str, type] = {
    **{"lr_scheduler.total_steps": int, "lr_scheduler.decay_ratio": float, "debug.seed": int},
    **{"training.dataloader.prefetch_factor": int, "quantize.linear.float8.recipe_name": str},
    **{"model.tokenizer_path": str, "checkpoint.initial_load_path": str},
    **{"training.dataset_path": str, "validation.dataset_path": str},
    **{"parallelism.pipeline_parallel_layers_per_stage": int, "parallelism.module_fqns_per_model_part": list},
}
"""Type of the keys above whose default is None."""

DEFAULTS: dict[str, Any] = {
    **{f"{section}.{key}": default for section, keys in SAME.items() for key, default in keys.items()},
    **CONVERTED,
    **{key: default for key, (default, _) in MISSING.items()},
}
"""Every key of v0.2.2 -> torchtitan's default."""
