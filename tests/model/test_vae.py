"""The fused VAE decoder against diffusers' own with the same weights, and its attention alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_rt.config import Kernels
from pixart_rt.errors import CheckpointError
from pixart_rt.kernels import launch
from pixart_rt.model import vae_fused
from pixart_rt.model.vae import VaeDecoder, read_vae, read_vae_config, vae_from_config
from pixart_rt.model.vae_fused import ChunkedAttention, FusedGroupNorm

SD_LIKE = {  # an SD VAE's structure, narrow: attention, 8 groups, an upsampling, a shortcut
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "scaling_factor": 0.18215,
}
TINY_LIKE = {**SD_LIKE, "norm_num_groups": 1, "mid_block_add_attention": False}
SIZES = [(1, 4, 6), (2, 9, 5), (3, 16, 16)]


@pytest.fixture
def no_kernels(monkeypatch):
    """Operators run their references, as on a CPU without the interpreter."""
    monkeypatch.setattr(launch, "interpreting", lambda: False)


def random_vae(config: dict, seed: int = 0) -> AutoencoderKL:
    """Every parameter random: zero-initialised biases would hide a missing one."""
    random = torch.Generator().manual_seed(seed)
    vae = vae_from_config(config)
    for parameter in vae.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data.normal_(std=fan_in**-0.5, generator=random)
    return vae


def latents(size: tuple[int, int, int]) -> torch.Tensor:
    B, h, w = size
    return torch.randn(B, 4, h, w, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [SD_LIKE, TINY_LIKE], ids=["attention", "one group"])
def test_the_fused_decoder_is_diffusers(no_kernels, monkeypatch, config, size):
    """In float64, where the orders of sums leave nothing to tolerate; attention in many chunks."""
    monkeypatch.setattr(vae_fused, "SCORE_BYTES", 8 * 20 * 3)
    vae = random_vae(config).double()
    x = latents(size).double()
    expected = vae.decode(x / vae.config.scaling_factor).sample
    decoder = VaeDecoder(vae).use(Kernels.FUSED)
    kinds = [type(module) for module in decoder.modules()]
    resnets = kinds.count(ResnetBlock2D)
    attentions = int(config is SD_LIKE)
    assert kinds.count(FusedGroupNorm) == 2 * resnets + 1 + attentions
    assert torch.nn.GroupNorm not in kinds and torch.nn.SiLU not in kinds
    assert kinds.count(ChunkedAttention) == attentions
    assert expected.std() > 0.1, "a flat reference would prove nothing"
    torch.testing.assert_close(decoder(x), expected, atol=1e-10, rtol=1e-10)


def test_the_kernels_of_the_fused_decoder(monkeypatch):
    """The interpreter (a GPU where there is one), float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = random_vae(SD_LIKE)
    x = latents((2, 9, 5))
    expected = vae.double().decode(x.double() / vae.config.scaling_factor).sample
    decoder = VaeDecoder(vae.float().to(device)).use(Kernels.FUSED)
    actual = decoder(x.to(device)).cpu().double()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)  # a dozen layers of float32


def test_the_switch_goes_both_ways(no_kernels):
    vae = random_vae(SD_LIKE)
    decoder, x = VaeDecoder(vae), latents((2, 5, 7))
    names, modules = list(decoder.state_dict()), list(decoder.modules())
    before = decoder(x)
    decoder.use(Kernels.FUSED).use(Kernels.FUSED)
    assert sorted(decoder.state_dict()) == sorted(names)
    torch.testing.assert_close(decoder(x), before, atol=1e-5, rtol=1e-5)
    decoder.use(Kernels.REFERENCE)
    assert {id(module) for module in decoder.modules()} == {id(module) for module in modules}
    torch.testing.assert_close(decoder(x), before, atol=1e-5, rtol=1e-5)  # other layout, other sums


def test_activations_stay_channels_last(no_kernels):
    decoder = VaeDecoder(random_vae(SD_LIKE)).use(Kernels.FUSED)
    bad = []

    def look(module, _args, output):
        if output.dim() == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            bad.append(type(module).__name__)

    for module in decoder.modules():
        module.register_forward_hook(look)
    decoder(latents((2, 6, 5)))
    assert not bad


def test_an_unknown_activation_is_left_alone(no_kernels):
    vae = random_vae({**SD_LIKE, "act_fn": "gelu"})
    x = latents((1, 4, 6))
    expected = vae.decode(x / vae.config.scaling_factor).sample
    decoder = VaeDecoder(vae).use(Kernels.FUSED)
    torch.testing.assert_close(decoder(x), expected, atol=1e-5, rtol=1e-5)


def test_one_compilation_serves_all_sizes(no_kernels):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    decoder = VaeDecoder(random_vae(SD_LIKE)).use(Kernels.FUSED)
    compiled = torch.compile(decoder, backend=counter, fullgraph=True)
    for size in ((2, 4, 6), (3, 16, 12), (2, 31, 9)):
        x = latents(size)
        for axis in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, axis)
        torch.testing.assert_close(compiled(x), decoder(x), atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.bytes = max(self.bytes, output.numel() * output.element_size())
        return output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 64, 1000])
def test_chunked_attention_is_exact_and_bounded(monkeypatch, N, dtype):
    """Chunks that divide N and that do not; memory below a bound far under the whole matrix."""
    monkeypatch.setattr(vae_fused, "SCORE_BYTES", 64 << 10)
    random = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, N, 8, generator=random).to(dtype).unbind()
    q = q * 4  # scores of ±20: a softmax that is far from flat
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    with Largest() as largest:
        actual = vae_fused.attend_in_chunks(q, k, v, 0.3)
    assert largest.bytes <= max(64 << 10, q.numel() * 8)
    assert actual.dtype == dtype
    error = float((actual.double() - expected).norm() / expected.norm())
    assert error < {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]


def test_chunked_attention_is_registered():
    q, k, v = torch.randn(3, 2, 7, 4).unbind()
    torch.library.opcheck(torch.ops.pixart_rt.chunked_attention.default, (q, k, v, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunked_attention_on_tensor_cores(dtype):
    q, k, v = torch.randn(3, 1, 5000, 512, device="cuda").to(dtype).unbind()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    actual = vae_fused.attend_in_chunks(q, k, v, 512**-0.5)
    assert float((actual.double() - expected).norm() / expected.norm()) < 8e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [("shift_factor", 0.5), ("latents_mean", [1.0] * 4), ("latents_std", [2.0] * 4)],
)
def test_a_vae_with_other_latent_statistics_is_refused(
    name: str, value: object, pipeline_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """PixArt's pipelines ignore them, so its images would be silently wrong."""
    folder = Path(shutil.copytree(pipeline_folder(32) / "vae", tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(CheckpointError, match=name):
        read_vae(folder)


def test_the_configuration_read_without_diffusers_is_diffusers_own(
    pipeline_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pipeline_folder(32) / "vae", tmp_path / "vae"))
    found, whole = read_vae_config(folder), read_vae(folder).config
    assert all(found[name] == whole[name] for name in ("latent_channels", "scaling_factor"))
    (folder / "config.json").write_text("{}", encoding="utf-8")
    defaults = read_vae_config(folder)
    bare = vae_from_config({}).config
    assert all(defaults[name] == bare[name] for name in ("latent_channels", "scaling_factor"))
    for broken in ("[]", "{", '{"latent_channels": "4"}', '{"scaling_factor": 0}', "\xe4"):
        (folder / "config.json").write_bytes(broken.encode("latin-1"))
        with pytest.raises(CheckpointError, match="the VAE"):
            read_vae_config(folder)
