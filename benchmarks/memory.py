"""Predicted memory against measured: whole requests, and each component's upper bound.

    python -m benchmarks.memory     writes benchmarks/results/memory.json and the two tables of
                                    docs/memory.md

Runs on the GPU if there is one, else on the CPU: requests of the tiny model, whose build measures
itself, and random weights of the published shapes against the bounds of a model that is not built:
XL/2's transformer at 256 px (2.1 GB in float32), Stable Diffusion's VAE at 256 px and two of
T5-XXL's 24 layers.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import ROOT, write_result
from pixart_rt import PixArtPipeline
from pixart_rt.bundle import Manifest
from pixart_rt.checkpoints.bundle_module import DenoiserModule, TextEncoderModule
from pixart_rt.config import XL_2_256, EngineConfig, Kernels, Precision, Weights
from pixart_rt.export.build import build
from pixart_rt.export.onnx_export import transformer_inputs
from pixart_rt.memory.activations import upper_bound
from pixart_rt.memory.forecast import forecast
from pixart_rt.memory.measure import peak_bytes
from pixart_rt.memory.models import bundle_model, find_model
from pixart_rt.memory.tiers import GIB, tiers
from pixart_rt.memory.weights import module_bytes
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.quantize import quantize_weights
from pixart_rt.model.text_encoder import T5_XXL, T5Encoder, keep_dtype
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.model.vae import SD_VAE, VaeDecoder, vae_from_config

DOC = ROOT / "docs" / "memory.md"
STAGES = ("encode", "prepare", "denoise", "decode")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
TOLERANCE = 0.15  # of a request
Row = dict[str, Any]


def row(
    what: str, module: torch.nn.Module, weights: int, predicted: int, call: Callable[[], Any]
) -> Row:
    """One line of the table; the first call is not measured."""
    with torch.no_grad():
        call()
        measured = peak_bytes(call, DEVICE)
    held = sum(_stored(parameter) for parameter in module.parameters())
    gc.collect()
    return {
        "what": what,
        "weights": held,
        "weights_predicted": weights,
        "activations": measured,
        "activations_predicted": predicted,
        "difference": predicted / measured - 1,
    }


def _stored(parameter: torch.Tensor) -> int:
    names = getattr(parameter, "tensor_data_names", None)
    if names is None:
        return parameter.nbytes
    optional = getattr(parameter, "optional_tensor_data_names", [])
    parts = [getattr(parameter, name) for name in (*names, *optional)]
    return sum(part.nbytes for part in parts if part is not None)


def transformer_row(precision: Precision, weights: Weights) -> Row:
    """A guided image, both halves with keys and values."""
    module = DenoiserModule(PixArtTransformer(XL_2_256)).eval().requires_grad_(False)
    module = module.to(DTYPES[precision])
    quantize_weights(module, weights)
    module = module.to(DEVICE)
    module.core.use(Kernels.FUSED if ON_GPU else Kernels.REFERENCE, weights=weights)
    inputs = transformer_inputs(XL_2_256, batch=2, num_tokens=256, guided=0)
    for name in ("constant", "text_kv"):  # in the precision, as a pipeline's text side gives them
        inputs[name] = inputs[name].to(DTYPES[precision])
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    config = XL_2_256.to_dict()
    return row(
        f"transformer XL/2, 256 px, a guided image, {precision}, {weights} weights",
        module,
        module_bytes("transformer", config, precision, weights),
        upper_bound("transformer", config, 512, 120, precision, weights),
        lambda: module(**inputs),
    )


def text_row(precision: Precision, weights: Weights) -> Row:
    t5 = replace(T5_XXL, num_layers=2)
    module = TextEncoderModule(T5Encoder(t5)).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(keep_dtype(name, DTYPES[precision]))
    quantize_weights(module, weights)
    module = module.to(DEVICE)
    ids = torch.randint(0, t5.vocab_size, (2, 120), device=DEVICE)
    mask = torch.ones_like(ids)
    return row(
        f"T5-XXL, 2 layers, 2 prompts, {precision}, {weights} weights",
        module,
        module_bytes("text_encoder", asdict(t5), precision, weights),
        upper_bound("text_encoder", asdict(t5), 2, 120, precision, weights),
        lambda: module(input_ids=ids, attention_mask=mask),
    )


def vae_row(precision: Precision) -> Row:
    module = VaeDecoder(vae_from_config(SD_VAE)).to(DEVICE, DTYPES[precision])
    module.use(Kernels.FUSED if ON_GPU else Kernels.REFERENCE)  # channels-last, as in a pipeline
    latents = torch.randn(1, 4, 32, 32, device=DEVICE)
    return row(
        f"Stable Diffusion's VAE, 256 px, {precision}",
        module,
        module_bytes("vae_decoder", SD_VAE, precision),
        upper_bound("vae_decoder", SD_VAE, 32 * 32, 120, precision),
        lambda: module(latents=latents),
    )


def request_rows(resolution: int) -> list[Row]:
    """First requests of tiny: the peak of all stages, of those before the decoder (latents), and
    in tiles, for one image and two.
    """
    prompt = "a small yellow circle above a large purple square on white " * 5
    prompt += "a small yellow circle above a large purple"  # 64 tokens
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(resolution=resolution, backend="torch", max_batch=2)
        bundle = build("tiny", Path(folder) / "tiny", config).path
        model = bundle_model(bundle, Manifest.read(bundle))
        assert model.built is not None
        for batch, output_type, tiled in (
            (1, "pt", False), (1, "latent", False), (1, "pt", True),
            (2, "pt", False), (2, "latent", False),
        ):  # fmt: skip
            config = replace(model.built, max_batch=batch, vae_tiling=tiled)
            found = forecast(model, config, cached_prompts=batch + 1, steps=2)
            PixArtPipeline.from_bundle(bundle, DEVICE)(" ", num_inference_steps=1)  # tables
            call = partial(
                PixArtPipeline.from_bundle(bundle, DEVICE, auto_capture=False),  # not predicted
                [prompt, prompt[1:]][:batch],
                prompt[2:],
                num_inference_steps=2,
                output_type=output_type,
                vae_tiling=tiled,
            )
            stages = found.stages if output_type == "pt" else {**found.stages, "decode": 0}
            measured, predicted = peak_bytes(call, DEVICE), max(stages.values()) - found.loaded
            what = "to latents" if output_type == "latent" else "in tiles" if tiled else "to images"
            weights = sum(part.weights for part in found.parts.values())
            rows.append({
                "what": f"tiny, {resolution} px, {batch} at once, {what}, fp32",
                "weights": weights,
                "weights_predicted": weights,
                "activations": measured,
                "activations_predicted": predicted,
                "difference": predicted / measured - 1,
            })  # fmt: skip
    return rows


def all_tiers() -> list[Row]:
    """Every tier of the published 1024 px model."""
    model = find_model("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)
    config = EngineConfig(backend="torch", precision=Precision.BF16, text_precision=Precision.BF16)
    return [
        {"tier": tier.name, "peak": tier.forecast.peak, **tier.forecast.stages,
         "gives_up": tier.gives_up}
        for tier in tiers(model, config)
    ]  # fmt: skip


def tables(rows: list[Row], predicted: list[Row]) -> tuple[str, str]:
    mib = 1 << 20
    lines = ["| what | weights, MiB | activations measured, MiB | predicted | difference |",
             "|--|--:|--:|--:|--:|"]  # fmt: skip
    lines += [
        f"| {r['what']} | {r['weights'] / mib:.1f} | {r['activations'] / mib:.1f} | "
        f"{r['activations_predicted'] / mib:.1f} | {r['difference']:+.1%} |"
        for r in rows
    ]
    other = ["| tier | encode, GiB | prepare | denoise | decode | peak | gives up |",
             "|--|--:|--:|--:|--:|--:|--|"]  # fmt: skip
    other += [
        "| " + " | ".join([f"`{r['tier']}`", *(f"{r[k] / GIB:.2f}" for k in
                          (*STAGES, "peak")), r["gives_up"]]) + " |"
        for r in predicted
    ]  # fmt: skip
    return "\n".join(lines), "\n".join(other)


def put(text: str, name: str, table: str) -> str:
    """The document with the table between `<!-- name -->` and `<!-- end -->` replaced."""
    head, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    assert mark and end, f"{DOC} has no place for {name}"
    return head + mark + table + "\n" + end + tail


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    torch.manual_seed(0)
    full, int8, fp8 = Weights.FULL, Weights.INT8, Weights.FP8
    half = (Precision.BF16, Precision.FP16) if ON_GPU else (Precision.BF16,)
    requests = [row for resolution in (256, 1024) for row in request_rows(resolution)]
    bounds = [transformer_row(Precision.FP32, full), text_row(Precision.FP32, full)]
    for precision in half:
        bounds += [transformer_row(precision, weights) for weights in (full, int8, fp8)]
        bounds += [text_row(precision, weights) for weights in (full, int8, fp8)]
    bounds += [vae_row(precision) for precision in (Precision.FP32, *(half if ON_GPU else ()))]
    rows = requests + bounds
    worst = max(abs(row["difference"]) for row in requests)
    hold = all(row["difference"] >= -0.02 for row in bounds)
    exact = all(row["weights"] == row["weights_predicted"] for row in rows)
    predicted = all_tiers()
    values = {"device": str(DEVICE), "worst": worst, "bounds_hold": hold, "weights_exact": exact,
              "rows": rows, "tiers": predicted}  # fmt: skip
    path = write_result("memory", values)
    measured, tier_table = tables(rows, predicted)
    DOC.write_text(
        put(put(DOC.read_text(encoding="utf-8"), "measured", measured), "tiers", tier_table),
        encoding="utf-8",
    )
    print(path)
    return 0 if exact and hold and worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
