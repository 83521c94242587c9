"""LoRA (arXiv:2106.09685) on the text transformer, through peft: added, trained, saved.

    add_lora(model, LoraSettings(rank=16))               only the adapters require gradients then
    save_lora(folder, lora_state(model), settings)       for peft on diffusers' transformer
    train_lora(Pictures(images=...), out)                both, and the training between them

The saved folder has diffusers' names. Our query, key and value are one linear: its adapter, A
[r, D] and B [3D, r], is exactly three adapters with the same A and a third of B each. The opposite
is not so; adapters trained elsewhere are merged (checkpoints/lora.py), not trained on.

r rank, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixart_rt.checkpoints.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    BASE_SHA256,
    sampled_sha256,
)
from pixart_rt.checkpoints.lora_files import PREFIX
from pixart_rt.checkpoints.pipeline_folder import COMPONENTS
from pixart_rt.checkpoints.tensor_names import diffusers_names
from pixart_rt.checkpoints.transformer import ORIGIN_FILE
from pixart_rt.errors import BackendError, ConfigError
from pixart_rt.files import ADAPTER, replacing_folder
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.torchao_import import quiet_imports
from pixart_rt.training.finetune.few_pictures import (
    Pictures,
    asked_of_pictures,
    train_on_pictures,
)
from pixart_rt.training.finetune.job import Base, Job, of_model, open_base
from pixart_rt.training.finetune.settings import (
    DEFAULT_ADAPTER,
    DEFAULT_MODEL,
    DEFAULT_OPTIONS,
    LORA,
    FinetuneSettings,
    JobOptions,
    LoraSettings,
    LoraTargets,
)
from pixart_rt.training.progress import Progress, silent

_ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear",
              "cross_attn.proj")  # fmt: skip
LINEARS = {  # of a block
    LoraTargets.ATTENTION: _ATTENTION,
    LoraTargets.ALL: (*_ATTENTION, "mlp.fc1", "mlp.fc2"),
}
_THEIRS = {  # the same in diffusers' words, as endings of module names
    LoraTargets.ATTENTION: ("to_q", "to_k", "to_v", "to_out.0"),
    LoraTargets.ALL: ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
}
_ADAPTER = "default"  # peft's name for the only one
_A, _B = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def train_lora(
    pictures: Pictures,
    out: str | Path,
    *,
    model: str = DEFAULT_MODEL,
    adapter: LoraSettings = DEFAULT_ADAPTER,
    settings: FinetuneSettings = LORA,
    options: JobOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
) -> Path:
    """Train an adapter on pictures of a subject or a style; write its folder and return it.

    A run that was stopped is resumed by the same call. Raises ConfigError, DataError or
    CheckpointError, one line each.
    """
    job = pictures.job(out, model, settings, options)
    base = open_base(job, COMPONENTS, ADAPTER)
    asked = {**asked_of_pictures("lora", pictures, job), "lora": asdict(adapter)}
    train_on_pictures(
        pictures,
        job,
        base,
        asked=asked,
        adapt=lambda transformer: add_lora(transformer, adapter, options.seed),
        write=lambda weights: write_adapter(job, base, adapter, asked, weights),
        progress=progress,
    )
    return job.out


def write_adapter(
    job: Job,
    base: Base,
    adapter: LoraSettings,
    asked: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> None:
    """Write the adapters among a job's trained weights to its `out`."""
    save_lora(
        job.out,
        adapters_in(of_model(weights)),
        adapter,
        base=job.model,
        origin={
            **base.origin(asked),
            "resolution": base.checkpoint.config.resolution,
            BASE_CONFIG: base.checkpoint.config.to_dict(),
            BASE_SHA256: sampled_sha256(base.checkpoint.state),
        },
        force=job.options.force,
    )


def add_lora(model: PixArtTransformer, settings: LoraSettings, seed: int = 0) -> None:
    """Freeze a model and give its linears adapters that change nothing yet.

    A is normal with deviation 1 / r (peft's "gaussian", as in the original code), drawn from `seed`
    in the order of the blocks; B is zero. Both are float32 whatever the model is. The model's
    operators may be the reference or the fused ones: both run such a linear as a module
    (model/operators.py).

    Raises ConfigError if the model has adapters, BackendError where peft is not installed.
    """
    if any(_A in name for name, _ in model.named_parameters()):
        raise ConfigError("a LoRA was requested of a model that has one; load the model again")
    inject, config_class = _peft()
    config = config_class(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=[
            f"blocks.{index}.{linear}"
            for index in range(model.config.num_layers)
            for linear in LINEARS[settings.targets]
        ],
    )
    model.requires_grad_(False)
    inject(config, model)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        start = torch.zeros(parameter.shape)
        if name.endswith(_A):
            start.normal_(std=1 / settings.rank, generator=random)
        elif not name.endswith(_B):
            continue
        parameter.data = start.to(parameter.device)


def lora_state(model: PixArtTransformer) -> dict[str, Tensor]:
    """The adapters' parameters by our names, such as blocks.0.attn.qkv.lora_A.default.weight."""
    return adapters_in(dict(model.named_parameters()))


def adapters_in(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a model's weights that are adapters'."""
    return {name: each.detach() for name, each in weights.items() if name.endswith((_A, _B))}


def peft_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters by our names, as `lora_state` gives them, under peft's names for diffusers' modules.

    Float32. A packed linear's A is repeated for each of its parts, its B divided among them.
    """
    tensors = {}
    for name, b in state.items():
        if not name.endswith(_B):
            continue
        linear = name.removesuffix(_B)
        a = state[linear + _A].float()
        theirs = [each.removesuffix(".weight") for each in diffusers_names(f"{linear}.weight")]
        for module, part in zip(theirs, b.float().chunk(len(theirs)), strict=True):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.clone()  # a file holds no tensor twice
            tensors[f"{PREFIX}{module}.lora_B.weight"] = part.contiguous()
    return tensors


def save_lora(
    folder: Path,
    state: Mapping[str, Tensor],
    settings: LoraSettings,
    *,
    base: str | None = None,
    origin: Mapping[str, Any] | None = None,
    force: bool = True,
) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained(transformer, folder)` reads.

    state: as `lora_state` gives it, or averages of the same names. base: the model's name, for
    people. origin: how it was made, in a file of its own. With `force` another adapter that we
    wrote is replaced; never anything else (files.py): ConfigError.
    """
    folder = Path(folder)
    _, config_class = _peft()
    config = config_class(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(_THEIRS[settings.targets]),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    values = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    with replacing_folder(folder, ADAPTER, force=force) as temporary:
        text = json.dumps(values, indent=2, sort_keys=True)
        (temporary / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(
            {name: tensor.cpu() for name, tensor in peft_tensors(state).items()},
            temporary / ADAPTER_WEIGHTS,
            metadata={"format": "pt"},
        )
        if origin is not None:
            (temporary / ORIGIN_FILE).write_text(
                json.dumps(origin, indent=2) + "\n", encoding="utf-8"
            )


def _peft() -> tuple[Any, Any]:
    """peft's inject_adapter_in_model and LoraConfig."""
    try:
        with quiet_imports():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BackendError(
            f"a LoRA was requested, but peft is not installed ({error}); pip install "
            "'pixart_rt[train]'"
        ) from error
    return inject_adapter_in_model, LoraConfig
