"""Module -> exported program -> ONNX, for each component, with named dynamic dimensions.

    component      dynamic dimensions                      static
    text_encoder   batch, text_tokens
    transformer    batch, num_tokens, num_null,
                   num_text, num_outputs                   T, the text length; widths
    vae_decoder    batch, latent_height, latent_width      channels

Opset 20: attention is decomposed, which every runtime at hand builds and runs; the fused operator
of opset 23 refuses a mask broadcast over queries in ONNX Runtime.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pixart_rt.checkpoints.bundle_module import DenoiserModule, HiddenModule, TextEncoderModule
from pixart_rt.config import ModelConfig
from pixart_rt.errors import BuildError
from pixart_rt.export.onnx_passes import two_stage_group_norms
from pixart_rt.kernels.decompositions import decompositions
from pixart_rt.model.signature import BOUNDS, CONTROLNET, SIGNATURES
from pixart_rt.model.text_encoder import T5Encoder
from pixart_rt.model.vae import VaeDecoder

OPSET = 20


@dataclass(frozen=True, slots=True)
class Graph:
    """A module with example inputs and the names of its dynamic dimensions."""

    component: str
    module: nn.Module
    example: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]  # input -> axis -> dimension name
    output: str
    max_text: int = BOUNDS["text_tokens"][1]

    def dynamic_shapes(self) -> dict[str, dict[int, Dim]]:
        bounds = {**BOUNDS, "text_tokens": (BOUNDS["text_tokens"][0], self.max_text)}
        dims = {name: Dim(name, min=least, max=most) for name, (least, most) in bounds.items()}
        return {
            name: {axis: dims[dim] for axis, dim in self.dynamic.get(name, {}).items()}
            for name in self.example
        }


def transformer_graph(
    module: DenoiserModule, config: ModelConfig, num_copies: int | None = None
) -> Graph:
    """The denoiser. The example has 59 tokens: no bucket's number, and none of the model's.

    With the `num_copies` of a ControlNet it takes control images.
    """
    signature = SIGNATURES["transformer"]
    return Graph(
        "transformer",
        module,
        transformer_inputs(config, batch=3, num_tokens=59, guided=2, num_copies=num_copies),
        signature.dynamic(*([] if num_copies is None else [CONTROLNET])),
        signature.output,
    )


def text_encoder_graph(encoder: T5Encoder, num_tokens: int) -> Graph:
    """A text encoder, or one part of a split one, for texts of up to `num_tokens`.

    The position bias is folded into one constant, and one only.
    """
    encoder.fold_position_bias(num_tokens)
    first, last = encoder.start == 0, encoder.stop == encoder.config.num_layers
    module = TextEncoderModule(encoder) if first else HiddenModule(encoder)
    length = num_tokens - 1  # no length that is used, and not that of the folded bias
    inputs = text_encoder_inputs(encoder.config.vocab_size, batch=2, num_tokens=length)
    if not first:
        hidden = torch.randn(2, length, encoder.config.d_model)
        inputs = {"hidden": hidden, "attention_mask": inputs["attention_mask"]}
    return Graph(
        "text_encoder",
        module,
        inputs,
        {name: {0: "batch", 1: "text_tokens"} for name in inputs},
        SIGNATURES["text_encoder"].output if last else "hidden_out",
        max_text=num_tokens,
    )


def vae_decoder_graph(module: VaeDecoder, latent_channels: int) -> Graph:
    """The decoder. The example is 2 latents of 6×10: no size of a real bucket."""
    return Graph(
        "vae_decoder",
        module,
        {"latents": torch.randn(2, latent_channels, 6, 10)},
        SIGNATURES["vae_decoder"].dynamic(),
        SIGNATURES["vae_decoder"].output,
    )


def transformer_inputs(
    config: ModelConfig,
    *,
    batch: int,
    num_tokens: int,
    guided: int | None = None,
    num_copies: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Random inputs of the denoiser for `batch` images, of which the first `guided` (by default
    all) have a row of one visible token besides their own, which sees between 1 and all. Control
    images with the `num_copies` of a ControlNet.
    """

    sizes = {
        "batch": batch,
        "num_tokens": num_tokens,
        "num_null": batch if guided is None else guided,
        "num_text": batch,
        "num_outputs": config.patch_size**2 * config.out_channels,
        "token_channels": config.token_channels,
        "width": config.hidden_size,
        "blocks": config.num_layers + (num_copies or 0),
        "max_text": config.max_text_tokens,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
    }
    kinds = () if num_copies is None else (CONTROLNET,)
    return SIGNATURES["transformer"].random(sizes, *kinds, generator=generator)


def text_encoder_inputs(
    vocab_size: int, *, batch: int, num_tokens: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Random token ids, right-padded to between 1 and all tokens."""
    sizes = {"batch": batch, "text_tokens": num_tokens, "vocabulary": vocab_size}
    return SIGNATURES["text_encoder"].random(sizes, generator=generator)


def on_device(graph: Graph, device: torch.device) -> Graph:
    """The graph with its module and example on a device, for a program that is tied to one."""
    example = {name: tensor.to(device) for name, tensor in graph.example.items()}
    return replace(graph, module=graph.module.to(device), example=example)


def export_program(graph: Graph) -> ExportedProgram:
    """The graph as a torch.export program whose sizes are symbols where they may vary."""
    with torch.no_grad():
        return torch.export.export(
            graph.module,
            (),
            kwargs=graph.example,
            dynamic_shapes=graph.dynamic_shapes(),
            strict=False,
        )


def export_onnx(
    graph: Graph, path: Path, nodes: Mapping[Any, Callable[..., Any]] | None = None
) -> None:
    """Write the graph as ONNX, weights in `path` + ".data", inputs and dimensions named.

    `nodes` are operators of ours with decompositions other than the usual (plugins/graph.py).
    Raises BuildError when a dimension that should be dynamic came out as a constant.
    """
    with two_stage_group_norms(graph.module):
        program = export_program(graph)
    with quiet_exporter():
        exported = torch.onnx.export(
            without_own_operators(program, nodes or {}),
            dynamo=True,
            opset_version=OPSET,
            output_names=[graph.output],
            verbose=False,
        )
    if exported is None:
        raise BuildError(f"torch.onnx.export returned nothing for {graph.component}")
    _name_dimensions(exported.model, graph)
    for node in exported.model.graph:  # paths of the building machine have no place in an artifact
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    exported.save(os.fspath(path), external_data=True)


def without_own_operators(
    program: ExportedProgram, nodes: Mapping[Any, Callable[..., Any]]
) -> ExportedProgram:
    """The program with the fused operators, if it has any, taken apart into PyTorch's own."""
    table = {**decompositions(), **nodes}
    found = any(node.target in table for node in program.graph.nodes)
    return program.run_decompositions(table) if found else program


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide the exporter's warnings of its own deprecations and of an absent torchvision."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registry.setLevel(level)


def _name_dimensions(model: Any, graph: Graph) -> None:
    """Give the exporter's symbols (s12, 2*s25) the names of our dimensions, everywhere."""
    names: dict[str, str] = {}
    inputs = {value.name: value for value in model.graph.inputs}
    for name, axes in graph.dynamic.items():
        for axis, dim in axes.items():
            found = inputs[name].shape[axis]
            if isinstance(found, int):
                raise BuildError(f"{graph.component}: {name} axis {axis} was fixed at {found}")
            names[str(found)] = dim

    def named(size: object) -> str:
        """A symbol, or an expression of symbols (8*s12, s3 + s4), in our names."""
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size))

    for value in _values(model):
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is not None:
                value.shape[axis] = named(size)


def _values(model: Any) -> list[Any]:
    graph = model.graph
    produced = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.outputs, *produced]
