"""Merge a LoRA adapter into the weights of the model that it was trained on, file to file."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixart_rt.checkpoints.hub import locate, transformer_path
from pixart_rt.checkpoints.lora import merge, read_adapter
from pixart_rt.checkpoints.pipeline_folder import COMPONENTS, is_pipeline, write_model
from pixart_rt.checkpoints.transformer import read_transformer
from pixart_rt.config import Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.files import PIPELINE, TRANSFORMER, check_model, is_model_file
from pixart_rt.training.finetune.lcm_pipeline import use_lcm_scheduler

_log = logging.getLogger(__name__)


def merge_adapter(
    base: str,
    adapter: str | Path,
    out: str | Path,
    *,
    scale: float = 1.0,
    res: int | None = None,
    transformer_only: bool = False,
    heads: int | None = None,
    sample_size: int | None = None,
    lcm: bool = False,
    any_base: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write `base` with `scale` times an adapter; return the summary of what was written.

    base: "tiny" (`res` 256: its model for that), a diffusers folder, a hub id, or a .pth, of which
      `heads` and `sample_size` say what the file does not.
    out: a pipeline folder where `base` is one (not with `transformer_only`), a transformer folder,
      or a .pth or .safetensors by its suffix.
    lcm: the adapter is an LCM-LoRA that does not say so itself.
    any_base: merge into other weights of the same shapes than it was trained on, too.

    Nothing is written before everything fits. Raises ConfigError or CheckpointError, one line each,
    also for an adapter of another model.
    """
    out = Path(out)
    if not math.isfinite(scale):
        raise ConfigError(f"`scale` {scale} is not supported; give a number such as 1 or 0.7")
    check_model(out, (PIPELINE, TRANSFORMER), force=force)
    trained = read_adapter(Path(adapter))
    if lcm:
        trained = replace(trained, scheduler=Scheduler.LCM)
    whole = not transformer_only and not is_model_file(out)
    folder = locate(base, COMPONENTS if whole else ["transformer"])
    pipeline = folder if whole and is_pipeline(folder) else None
    check_model(out, TRANSFORMER if pipeline is None else PIPELINE, force=force)
    path = transformer_path(folder, base, res)
    checkpoint = read_transformer(path, heads=heads, sample_size=sample_size)
    if res is not None and checkpoint.config.resolution != res:
        raise ConfigError(
            f"`res` {res} was requested, but {base} is a {checkpoint.config.resolution} px model"
        )
    merged = merge(checkpoint, trained, scale, any_base=any_base)
    distilled = trained.scheduler is Scheduler.LCM
    if distilled and pipeline is None:
        _log.info("%s will hold no scheduler: sample it with lcm, without guidance", out)
    summary = write_model(
        merged,
        out,
        pipeline=pipeline,
        finish=use_lcm_scheduler if distilled else lambda _: None,
        force=force,
    )
    return summary | {"origin": merged.origin}
