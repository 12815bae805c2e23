"""What a run will do, in lines of text: for its start and for ``torchladder plan``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torchladder.data.dataloader import BaseDataLoader, TracksSources
from torchladder.models.attention import AttentionKernel
from torchladder.training.pipeline_plan import pipeline_lines
from torchladder.training.run_plan import LayerTypePlan, Plan

logger = logging.getLogger(__name__)


def summary_lines(plan: Plan) -> list[str]:
    """Returns the plan as a few lines of text, for the start of a run."""
    config, batch, seq_len = plan.config, plan.batch, plan.config.training.seq_len
    full = plan.layer_types[0]
    first, last = full.first_window, full.last_window
    (shortest, longest), ends = full.window_range, (first, last)
    ladder = f"{config.curriculum.name}, window {first:,} at step 0"
    if shortest < min(ends) or longest > max(ends):
        ladder += f", then {shortest:,} to {longest:,}"
    mixed = len(plan.layer_types) > 1
    masks = "all layers" if mixed else " + ".join(config.attention.masks)
    if plan.full_context_step is not None and plan.full_context_step > 0:
        ladder += f", the full {seq_len:,} from step {plan.full_context_step:,}"
    elif last != seq_len:
        ladder += f", {last:,} at the last step" + (f": never the full {seq_len:,}" if longest < seq_len else "")
    ranks = f"{batch.dp_degree} rank{'s' if batch.dp_degree > 1 else ''}"
    return [
        f"model       {f'{config.model.name} {config.model.flavor}'.strip()}, {plan.num_parameters:,} parameters, "
        f"{plan.state_bytes / 2**30:.2f} GiB of weights, gradients and optimizer state per rank",
        f"step        {batch.global_batch_size} rows x {seq_len:,} tokens = {plan.tokens_per_step:,} tokens "
        f"({ranks} x {batch.local_batch_size} rows x {batch.accumulation_steps} accumulated)",
        *pipeline_lines(plan),
        *([f"batch       {plan.schedule.batch}"] if plan.schedule.batch.varies else []),
        f"run         {plan.steps:,} steps, {plan.num_tokens:,} tokens, {plan.flops:.3e} FLOPs",
        f"curriculum  {ladder}",
        *(_layer_type_line(one) for one in plan.layer_types if mixed),
        f"masks       {masks}: {plan.attention_saved:.1%} of attention saved, {plan.saved:.1%} of all FLOPs",
        *(f"optimizer   {group}" for group in plan.optimizer_groups),
    ]


def _layer_type_line(plan: LayerTypePlan) -> str:
    shortest, longest = plan.window_range
    window = f"{shortest:,}" + (f" to {longest:,}" if longest != shortest else "")
    return (
        f"layers      {plan.layers} {plan.layer_type}: {' + '.join(plan.masks)}, window {window}, "
        f"{plan.flops:.3e} attention FLOPs, {plan.saved:.1%} saved"
    )


def log_plan(plan: Plan, kernels: Mapping[str, AttentionKernel], loaders: list[BaseDataLoader], step: int) -> None:
    """Writes the resolved settings to config.toml and logs what the run will do after its first ``step`` steps."""
    config, text = plan.config, plan.config.to_toml()
    folder = Path(config.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text)
    lines = [config.job.description] if config.job.description else []
    lines += summary_lines(plan)
    for layer_type, kernel in kernels.items():
        lines.append(f"kernel      {f'{layer_type}: ' if len(kernels) > 1 else ''}{kernel.name}: {kernel.reason}")
    lines += [f"data        {line}" for loader in loaders for line in loader.describe()]
    lines += [f"resume      after step {step:,}"] if step else []
    lines += [f"settings:\n{text}"] if config.job.print_config else []
    for line in lines:
        logger.info("%s", line)
    if any("document" in masks for masks in config.layer_masks.values()) and isinstance(loaders[0], TracksSources):
        for source, share in loaders[0].boundary_shares().items():
            logger.info("documents   begin inside %.0f%% of the rows of %s", 100 * share, source)
            if not share:
                logger.warning(
                    "attention.masks: 'document' changes nothing in %s: no document begins inside a sampled row. If "
                    "these rows were packed elsewhere, documents_by_eos = true finds their documents by the eos token.",
                    source,
                )
