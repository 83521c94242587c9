"""The fused operators against the reference ones, in a whole model: outputs, gradients, tools."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pixart_rt.buckets import buckets
from pixart_rt.checkpoints import tensor_names
from pixart_rt.config import Kernels, ModelConfig, Quality
from pixart_rt.errors import ConfigError
from pixart_rt.kernels import checkpointing, launch
from pixart_rt.kernels.decompositions import decompositions
from pixart_rt.kernels.fp8_linear import fp8_linear_gelu
from pixart_rt.model import operators as ops
from pixart_rt.model.embeddings import patchify, position_table
from pixart_rt.model.transformer import PixArtTransformer

CONFIG = ModelConfig(
    num_layers=4, num_heads=2, caption_channels=24, sample_size=32, interpolation_scale=1.0,
    micro_conditioning=False,
)  # fmt: skip


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(config=CONFIG, seed=0):
    """Every parameter random: zero-initialised ones would hide a missing term."""
    random = torch.Generator().manual_seed(seed)
    model = PixArtTransformer(config)
    for parameter in model.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(std=spread, generator=random)
    return model


def inputs_of(config, N, B=3, T=120, seed=1):
    """Inputs of the core; image i sees i·40 + 1 text tokens."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(T)[None] < torch.tensor([min(40 * i + 1, T) for i in range(B)])[:, None]
    return [
        torch.randn(B, N, config.token_channels, generator=random),
        torch.randn(1, N, config.hidden_size, generator=random),
        torch.randn(B, 7, config.hidden_size, generator=random),
        torch.randn(B, T, config.caption_channels, generator=random),
        mask,
    ]


def relative(actual, expected):
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def gradients(model, inputs, scale=1.0):
    """The output, and the gradients of all parameters for a random gradient of the output."""
    output = model(*inputs)
    random = torch.Generator().manual_seed(2)
    output.backward(scale * torch.randn(output.shape, generator=random).to(output))
    return output.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def test_forward_and_every_gradient_of_four_blocks(device):
    """In float32, in the interpreter or on a GPU."""
    model = random_model().to(device)
    inputs = [each.to(device) for each in inputs_of(CONFIG, 37)]
    inputs[2].requires_grad_()
    expected, wanted = gradients(model, inputs)
    wanted["modulation"] = inputs[2].grad.clone()
    model.zero_grad()
    inputs[2].grad = None
    actual, found = gradients(model.use(Kernels.FUSED), inputs)
    found["modulation"] = inputs[2].grad
    assert relative(actual, expected) < 1e-5
    assert found.keys() == wanted.keys()
    assert {name.split(".")[0] for name in found} >= {"blocks", "final_layer", "modulation"}
    for name, gradient in found.items():
        assert relative(gradient, wanted[name]) < 5e-5, name


def products(model, inputs):
    """How often a forward calls our GEMM with gate and residual in it."""
    with Counter() as counter, torch.no_grad():
        model(*inputs)
    return counter.calls.get(torch.ops.pixart_rt.linear_gate_residual.default, 0)


# A block: attention's projection, cross-attention's and the MLP's second; a last block's MLP has no
# LayerNorm after it.
FORMS = {None: 1 + 2, "epilogue": 3 * 2, "cublas": 0}


@contextmanager
def choosing(form):
    """This form of a linear with gate and residual, with and without a LayerNorm after it."""
    with ExitStack() as stack:
        for op in ("linear_residual", "linear_residual_norm") if form else ():
            stack.enter_context(launch.choosing(op, form))
        yield


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_gate_and_residual(form, device):
    """Ours in the GEMM's epilogue and after cuBLAS's product, forward and every gradient."""
    config = replace(CONFIG, num_layers=2)
    model = random_model(config).to(device)
    inputs = [each.to(device) for each in inputs_of(config, 7)]
    expected, wanted = gradients(model, inputs)
    model.zero_grad()
    with choosing(form):
        assert products(model.use(Kernels.FUSED), inputs) == FORMS[form]
        actual, found = gradients(model, inputs)
    assert relative(actual, expected) < 1e-5
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert relative(gradient, wanted[name]) < 5e-5, name


@pytest.mark.parametrize("form", ["epilogue", "cublas"])
def test_a_compiled_model_has_the_form_of_its_shapes(form, no_kernels):
    """Where the number of tokens is fixed; where it is any, the default."""
    config = replace(CONFIG, num_layers=2)
    model = random_model(config).use(Kernels.FUSED)
    for dynamic in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        inputs = inputs_of(config, 37, B=2)
        if dynamic:
            torch._dynamo.mark_dynamic(inputs[0], 1)
            torch._dynamo.mark_dynamic(inputs[1], 1)
        with choosing(form), torch.no_grad():
            compiled(*inputs)
        (graph,) = counter.graphs
        nodes = [n for n in graph.graph.nodes if "linear_gate_residual" in str(n.target)]
        assert len(nodes) == FORMS[None if dynamic else form]


@pytest.mark.parametrize("quality", [Quality.HIGH, Quality.LOSSLESS])
def test_half_precision_is_as_near_as_the_reference(quality, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    exact = random_model()
    inputs = inputs_of(CONFIG, 37)
    with torch.no_grad():
        expected = exact(*inputs)
        half = random_model().to(device, dtype)
        moved = [each.to(device) for each in inputs]
        plain = relative(half.use(Kernels.REFERENCE, quality)(*moved), expected)
        fused = relative(half.use(Kernels.FUSED, quality)(*moved), expected)
    assert fused < 1.3 * plain


def test_fp8_is_near(no_kernels):
    model = random_model()
    inputs = inputs_of(CONFIG, 37)
    with torch.no_grad():
        expected = model(*inputs)
        actual = model.use(Kernels.FUSED, Quality.FAST)(*inputs)
    assert 1e-3 < relative(actual, expected) < 0.1  # not the same, so fp8 did run


def test_fp8_scales_of_groups_are_as_near_over_depth_as_scales_of_rows(no_kernels, monkeypatch):
    """GELU's output with a scale for 128 columns, against one for its whole row."""
    config = replace(CONFIG, num_layers=8)
    model = random_model(config)
    inputs = inputs_of(config, 37)
    with torch.no_grad():
        expected = model(*inputs)
        model.use(Kernels.FUSED, Quality.FAST)
        groups = relative(model(*inputs), expected)
        monkeypatch.setattr(ops.Fp8Operators, "linear_gelu", plain_gelu)
        rows = relative(model(*inputs), expected)
    assert groups != rows and groups < 1.05 * rows


def plain_gelu(self, y, layer):
    """As it was: GELU in 16 bits or more, which the next linear quantizes by rows."""
    return fp8_linear_gelu(*ops._quantized(y, layer))


def test_fp8_needs_the_kernels():
    with pytest.raises(ConfigError, match="fp8"):
        random_model().use(Kernels.REFERENCE, Quality.FAST)


def test_lossless_is_diffusers_bit_by_bit():
    """bfloat16 on the CPU: the same roundings in the same places give the same bits."""
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=72, num_layers=4, cross_attention_dim=144,
        caption_channels=24, sample_size=32, use_additional_conditions=False,
    )  # fmt: skip
    for parameter in theirs.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(std=spread)
    ours = PixArtTransformer(CONFIG)
    ours.load_state_dict(
        tensor_names.to_ours(
            theirs.state_dict(), CONFIG, tensor_names.diffusers_names, known=[], source="diffusers"
        )
    )
    theirs, ours = theirs.bfloat16().eval(), ours.bfloat16().eval()
    latents, text = torch.randn(2, 4, 20, 28), torch.randn(2, 120, 24)
    mask = torch.arange(120)[None] < torch.tensor([[1], [77]])
    timestep = torch.tensor([999, 20])
    with torch.no_grad():
        expected = theirs(
            latents.bfloat16(), encoder_hidden_states=text.bfloat16(),
            encoder_attention_mask=mask, timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
        inputs = [
            patchify(latents, 2), position_table(CONFIG, (10, 14)),
            ours.modulator(timestep).float(), text, mask,
        ]  # fmt: skip
        lossless = ours.use(Kernels.REFERENCE, Quality.LOSSLESS)(*inputs)
        high = ours.use(Kernels.REFERENCE, Quality.HIGH)(*inputs)
    expected = patchify_output(expected)
    assert torch.equal(lossless, expected)
    assert not torch.equal(high, expected)


def patchify_output(image):
    """[B, C, h, w] to [B, N, p·p·C], channels last, as the final layer gives it."""
    B, C, h, w = image.shape
    parts = image.reshape(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return parts.reshape(B, h * w // 4, 4 * C)


def test_one_compilation_serves_every_token_count(no_kernels):
    model = random_model(replace(CONFIG, num_layers=2)).use(Kernels.FUSED)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = sorted({bucket.num_tokens for bucket in buckets(256)})
    assert len(counts) > 10
    for N in counts:
        inputs = inputs_of(CONFIG, N, B=2)
        torch._dynamo.mark_dynamic(inputs[0], 1)
        torch._dynamo.mark_dynamic(inputs[1], 1)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert counter.frame_count == 1


def test_compiled_training_step(no_kernels):
    model = random_model().use(Kernels.FUSED)
    inputs = inputs_of(CONFIG, 37)
    expected, wanted = gradients(model, inputs)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, found = gradients(compiled, inputs)
    torch.testing.assert_close(actual, expected)
    for name, gradient in found.items():
        assert relative(gradient, wanted[name.removeprefix("_orig_mod.")]) < 1e-5, name


# Weights of keys past the image may overflow float16; they reach only rows that are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("form", [None, "epilogue"])
def test_autocast_keeps_the_residual_stream_in_float32(form, device):
    """Under autocast, as in training: as near float64 as the reference under the same autocast."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    config = replace(CONFIG, num_layers=2) if form else CONFIG  # the interpreter is slow
    model = random_model(config).to(device)
    inputs = [each.to(device) for each in inputs_of(config, 37)]
    small = 1e-3  # sums over tokens pass float16's range otherwise
    exact = random_model(config).double().to(device)
    wide = [each.double() if each.is_floating_point() else each for each in inputs]
    _, wanted = gradients(exact, wide, small)
    errors = {}
    for kernels in Kernels:
        model.zero_grad()
        with torch.autocast(device.type, dtype), choosing(form):
            _, found = gradients(model.use(kernels), inputs, small)
        errors[kernels] = {n: relative(g, wanted[n]) for n, g in found.items()}
        assert all(g.dtype == torch.float32 for g in found.values())
    for name, error in errors[Kernels.FUSED].items():
        assert error < 1.5 * errors[Kernels.REFERENCE][name] + 1e-3, name


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_recomputes_elementwise_only(no_kernels):
    model = random_model().use(Kernels.FUSED)
    inputs = inputs_of(CONFIG, 37)
    with choosing("epilogue"):
        _, wanted = gradients(model, inputs)
    model.zero_grad()
    for block in model.blocks:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, checkpointing.policy),
        )
    with Counter() as counter, choosing("epilogue"):
        _, found = gradients(model, inputs)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name])
    ours = torch.ops.pixart_rt
    blocks = len(model.blocks)
    assert counter.calls[ours.linear_gate_residual.default] == 3 * blocks  # once each
    assert counter.calls[ours.linear_gelu.default] == blocks
    assert counter.calls[ours.ln_modulate.default] >= 2 * blocks + 1 + blocks  # some of them again


@pytest.mark.parametrize("quality", Quality)
def test_exported_operators_decompose_into_pytorchs_own(quality, no_kernels):
    model = random_model(replace(CONFIG, num_layers=2)).use(Kernels.FUSED, quality).eval()
    inputs = inputs_of(CONFIG, 37)
    with torch.no_grad():
        expected = model(*inputs)
        program = torch.export.export(model, tuple(inputs), strict=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch.export's own
            plain = program.run_decompositions(decompositions())
        actual = plain.module()(*inputs)

    def ours(exported):
        return [n for n in exported.graph.nodes if "pixart_rt" in str(n.target)]

    assert ours(program) and not ours(plain)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
