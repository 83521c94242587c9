"""Predicted memory against measured, component by component.

    python -m benchmarks.memory     writes benchmarks/results/memory.json and the two tables of
                                    docs/memory.md

Runs on the GPU if there is one, else on the CPU, with random weights of the published shapes:
XL/2's transformer at 256 px (all of it: 2.1 GB in float32) and its text side, Stable Diffusion's
VAE at 256 px, and two of T5-XXL's 24 layers; and whole requests of the tiny model.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import ROOT, write_result
from pixart_rt import PixArtPipeline
from pixart_rt.bundle import Manifest
from pixart_rt.checkpoints.bundle_module import DenoiserModule, TextEncoderModule
from pixart_rt.config import EngineConfig, Kernels, Precision, Weights
from pixart_rt.export.build import build
from pixart_rt.export.onnx_export import transformer_inputs
from pixart_rt.inference.vae_tiling import Tiling
from pixart_rt.memory.activations import (
    text_activations,
    transformer_activations,
    vae_activations,
)
from pixart_rt.memory.forecast import STAGES, Setting, forecast
from pixart_rt.memory.measure import peak_bytes
from pixart_rt.memory.shapes import bundle_shape, find_shape
from pixart_rt.memory.text_side import (
    Words,
    absorb_activations,
    kv_bytes,
    text_side_activations,
)
from pixart_rt.memory.tiers import GIB, choices
from pixart_rt.memory.weights import (
    text_side_weights,
    text_weights,
    transformer_weights,
    vae_weights,
)
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.quantize import quantize_weights
from pixart_rt.model.text_encoder import T5Encoder, keep_dtype
from pixart_rt.model.text_kv import TextSide
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.model.vae import SD_VAE, VaeDecoder, vae_from_config

DOC = ROOT / "docs" / "memory.md"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
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
    """A guided image whose prompt has its longest absorbed form."""
    config, length = find_shape("PixArt-alpha/PixArt-XL-2-256x256", 256).config, 64
    dtype = DTYPES[precision]
    torch.set_default_dtype(dtype)
    module = DenoiserModule(PixArtTransformer(config)).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    quantize_weights(module, weights)
    module = module.to(DEVICE)
    module.core.use(Kernels.FUSED if ON_GPU else Kernels.REFERENCE, weights=weights)
    inputs = transformer_inputs(config, batch=1, num_tokens=256)
    del inputs["text_kv"]
    slots = (config.num_layers, 1, config.num_heads * length)
    inputs |= {
        "constant": inputs["constant"].to(dtype),
        "absorbed_keys": torch.randn(*slots, config.hidden_size, dtype=dtype),
        "absorbed_values": torch.randn(*slots, config.hidden_size, dtype=dtype),
        "absorbed_bias": torch.randn(*slots).unflatten(2, (config.num_heads, length)),
    }
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    predicted = transformer_activations(
        config, precision, rows=2, num_tokens=256, constant=1, length=length, fused=ON_GPU,
        weights=weights,
    )  # fmt: skip
    name = f"transformer XL/2, 256 px, a guided image, {precision}, {weights} weights"
    return row(name, module, transformer_weights(config, precision, weights), predicted,
               lambda: module(**inputs))  # fmt: skip


def text_side_row(precision: Precision) -> Row:
    """A prompt of 60 tokens: its keys and values and, beside them, their absorbed form."""
    config = find_shape("PixArt-alpha/PixArt-XL-2-256x256", 256).config
    side = TextSide(config).to(DEVICE, DTYPES[precision]).eval().requires_grad_(False)
    embeds = torch.randn(1, config.max_text_tokens, config.caption_channels, device=DEVICE)
    mask = torch.arange(config.max_text_tokens, device=DEVICE)[None] < 60

    def call() -> Any:
        text = side(embeds, mask, 60)
        return text, side.absorbed(text)

    predicted = max(
        text_side_activations(config, precision),
        kv_bytes(config, precision) + absorb_activations(config, precision, 1, 64),
    )
    name = f"text side of XL/2, a prompt of 60 tokens, {precision}"
    return row(name, side, text_side_weights(config, precision), predicted, call)


def text_row(precision: Precision, weights: Weights) -> Row:
    whole = find_shape("PixArt-alpha/PixArt-XL-2-1024-MS", 1024).text
    assert whole is not None
    t5 = replace(whole, num_layers=2)
    module = TextEncoderModule(T5Encoder(t5)).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(keep_dtype(name, DTYPES[precision]))
    quantize_weights(module, weights)
    module = module.to(DEVICE)
    ids = torch.randint(0, t5.vocab_size, (2, 120), device=DEVICE)
    mask = torch.ones_like(ids)
    predicted = text_activations(t5, precision, rows=2, num_tokens=120, weights=weights)
    name = f"T5-XXL, 2 layers, 2 prompts, {precision}, {weights} weights"
    return row(name, module, text_weights(t5, precision, weights), predicted,
               lambda: module(input_ids=ids, attention_mask=mask))  # fmt: skip


def vae_row(precision: Precision) -> Row:
    shape = find_shape("xl-random", 256).vae
    module = VaeDecoder(vae_from_config(SD_VAE)).to(DEVICE, DTYPES[precision])
    module.use(Kernels.FUSED if ON_GPU else Kernels.REFERENCE)  # channels-last, as in a pipeline
    latents = torch.randn(1, 4, 32, 32, device=DEVICE)
    predicted = vae_activations(shape, precision, rows=1, height=32, width=32)
    name = f"Stable Diffusion's VAE, 256 px, {precision}"
    return row(name, module, vae_weights(shape, precision), predicted,
               lambda: module(latents=latents))  # fmt: skip


def request_row(resolution: int, output_type: str = "pt", tiled: bool = False) -> Row:
    """A first request of tiny: the peak of all its stages, weights aside; for latents it is before
    the decoder, which may work in tiles.
    """
    prompt = "a small yellow circle above a purple square " * 3
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(resolution=resolution, backend="torch")
        bundle = build("tiny", Path(folder) / "tiny", config).path
        pipe = PixArtPipeline.from_bundle(bundle, DEVICE)
        shape = bundle_shape(bundle, Manifest.read(bundle))
        pipe(" ", num_inference_steps=1, output_type=output_type)  # libraries' own first memory
        pipe = PixArtPipeline.from_bundle(bundle, DEVICE)
    assert pipe.prompt_encoder is not None
    words = Words(int(pipe.prompt_encoder.tokenizer([prompt]).attention_mask.sum()))
    setting = Setting(
        precision=Precision.FP32, text_precision=Precision.FP32, fused=ON_GPU,
        cached_prompts=1, words=words, tiling=Tiling() if tiled else None,
    )  # fmt: skip
    found = forecast(shape, resolution, setting, 2)
    weights = sum(part.weights for part in found.parts.values())
    stages = found.stages if output_type == "pt" else {**found.stages, "decode": 0}
    measured = peak_bytes(
        lambda: pipe(prompt, num_inference_steps=2, output_type=output_type, vae_tiling=tiled),
        DEVICE,
    )
    predicted = max(stages.values()) - found.loaded
    what = "a request" if output_type == "pt" else "its stages before the decoder"
    what += ", the VAE in tiles," if tiled else ""
    return {
        "what": f"tiny, {what} at {resolution} px, fp32",
        "weights": weights,
        "weights_predicted": weights,
        "activations": measured,
        "activations_predicted": predicted,
        "difference": predicted / measured - 1,
    }


def tiers() -> list[Row]:
    """Every tier of the published 1024 px model."""
    shape = find_shape("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)
    return [
        {"tier": each.tier.name, "peak": each.forecast.peak, **each.forecast.stages,
         "gives_up": each.tier.gives_up}
        for each in choices(shape, 1024, Setting())
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
    torch.manual_seed(0)
    full, int8, fp8 = Weights.FULL, Weights.INT8, Weights.FP8
    half = (Precision.BF16, Precision.FP16) if ON_GPU else (Precision.BF16,)
    rows = [transformer_row(Precision.FP32, full)]
    for precision in half:
        rows += [transformer_row(precision, weights) for weights in (full, int8, fp8)]
    rows += [text_side_row(precision) for precision in (Precision.FP32, *half)]
    rows += [text_row(Precision.FP32, full)]
    for precision in half:
        rows += [text_row(precision, weights) for weights in (full, int8, fp8)]
    rows += [vae_row(precision) for precision in (Precision.FP32, *(half if ON_GPU else ()))]
    for resolution in (256, 1024):
        rows += [request_row(resolution), request_row(resolution, "latent")]
    rows.append(request_row(1024, tiled=True))
    worst = max(abs(r["difference"]) for r in rows)
    exact = all(r["weights"] == r["weights_predicted"] for r in rows)
    predicted = tiers()
    values = {"device": str(DEVICE), "worst": worst, "weights_exact": exact, "rows": rows,
              "tiers": predicted}  # fmt: skip
    path = write_result("memory", values)
    measured, tier_table = tables(rows, predicted)
    DOC.write_text(
        put(put(DOC.read_text(encoding="utf-8"), "measured", measured), "tiers", tier_table),
        encoding="utf-8",
    )
    print(path)
    return 0 if exact and worst <= 0.10 else 1


if __name__ == "__main__":
    sys.exit(main())
