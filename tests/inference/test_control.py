"""Images with a ControlNet, from checkpoint to pipeline, against a plain loop over the formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixart_rt import PixArtPipeline
from pixart_rt.approximations import FirstBlockCache, StepCache
from pixart_rt.backends import get_backend
from pixart_rt.buckets import bucket_for_aspect
from pixart_rt.bundle import Manifest, damaged_files
from pixart_rt.checkpoints.controlnet import (
    controlnet_of,
    load_controlnet,
    read_controlnet,
    write_controlnet,
)
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer
from pixart_rt.cli import main
from pixart_rt.config import EngineConfig, Saving
from pixart_rt.errors import BundleError, ConfigError
from pixart_rt.export.build import build
from pixart_rt.export.numerics import verify_bundle
from pixart_rt.inference.images import read_metadata
from pixart_rt.inference.request import Request
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from tests.conftest import randomize
from tests.model.plain_controlnet import plain_controlnet

pytestmark = pytest.mark.usefixtures("no_kernels")
SHAPES = {"parallel": 2, "chained": 1}  # copies; the random pipeline has two blocks
PROMPT, ASPECT = "a red circle above a blue square", "2:1"


@pytest.fixture(scope="module", params=SHAPES)
def controlnet(
    request: pytest.FixtureRequest,
    pipeline_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A random ControlNet's folder for the random 256 px pipeline."""
    model = load_transformer(read_transformer(pipeline_folder(32)))
    settings = ControlNetConfig(
        variant=ControlVariant(request.param), num_copies=SHAPES[request.param]
    )
    made = ControlNetTransformer.of(model, settings)
    randomize(made.copies, 9)
    out = tmp_path_factory.mktemp("controlnets") / str(request.param)
    write_controlnet(controlnet_of(made, "a test"), out)
    return out


def built(folder: Path, controlnet: Path, out: Path, **settings: Any) -> Path:
    config = EngineConfig(**{"resolution": 256, "max_batch": 2, "backend": "torch", **settings})
    return build(str(folder), out, config, controlnet=controlnet).path


@pytest.fixture(scope="module")
def bundle(
    controlnet: Path,
    pipeline_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return built(pipeline_folder(32), controlnet, tmp_path_factory.mktemp("bundles") / "torch")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> PixArtPipeline:
    return PixArtPipeline.from_bundle(bundle, "cpu")


@pytest.fixture
def edges() -> Image.Image:
    """A picture of lines, of no bucket's shape."""
    values = np.zeros((200, 310), np.uint8)
    values[40:160, 60] = values[100, 20:280] = 255
    return Image.fromarray(values)


def latents(pipe: PixArtPipeline, **arguments: Any) -> Tensor:
    values = {"num_inference_steps": 3, "aspect_ratio": ASPECT, "output_type": "latent"}
    return pipe(arguments.pop("prompt", PROMPT), **{**values, **arguments}).images


def plain_latents(
    folder: Path, controlnet: Path, pipe: PixArtPipeline, control: Tensor, seed: int, steps: int
) -> Tensor:
    """Three lines of loop around the plain model, diffusers' solver and diffusers' text encoder."""
    checkpoint = read_transformer(folder)
    model = load_controlnet(read_controlnet(controlnet, checkpoint.config), checkpoint)
    config, bucket = model.config, bucket_for_aspect(256, ASPECT)
    whole = diffusers.PixArtAlphaPipeline.from_pretrained(folder)
    embeds, mask, null, null_mask = whole.encode_prompt(PROMPT, negative_prompt="")
    solver = whole.scheduler
    solver.set_timesteps(steps)
    shape = (1, 4, bucket.height // 8, bucket.width // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for t in solver.timesteps:
        with torch.no_grad():
            tokens = plain_controlnet(
                model.state_dict(), config.num_heads, model.controlnet.variant,
                patchify(x, 2).repeat(2, 1, 1), position_table(config, bucket.grid),
                model.modulator(t[None].float()).repeat(2, 1, 1), torch.cat([null, embeds]),
                torch.cat([null_mask, mask]).bool(), patchify(control, 2).repeat(2, 1, 1),
            )  # fmt: skip
        noise = unpatchify(tokens, bucket.grid, 2)[:, :4].float()
        noise = noise[:1] + 4.5 * (noise[1:] - noise[:1])
        x = solver.step(noise, t, x, return_dict=False)[0]
    return x


def test_a_guided_image_is_that_of_the_formulas(
    pipe, edges, controlnet, pipeline_folder, bundle
) -> None:
    folder, bucket = pipeline_folder(32), bucket_for_aspect(256, ASPECT)
    fitted = edges.convert("RGB").resize(  # 310x200 covers 352x176 at 352/310, and is cut in height
        (bucket.width, bucket.height), Image.Resampling.BICUBIC,
        box=(0, 100 - 310 / bucket.width * bucket.height / 2,
             310, 100 + 310 / bucket.width * bucket.height / 2),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        control = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    expected = plain_latents(folder, controlnet, pipe, control, seed=5, steps=4)
    actual = latents(pipe, seed=5, num_inference_steps=4, control_image=edges)
    # float32 against float64 through four steps, guided: 1e-3 of values near 1 to 10
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)
    again = latents(pipe, seed=5, num_inference_steps=4, control_latents=control)
    torch.testing.assert_close(again, actual, atol=1e-4, rtol=1e-4)
    other = latents(pipe, seed=5, num_inference_steps=4, control_latents=control.flip(-1))
    assert float((other - actual).abs().max()) > 0.1, "the control image matters"


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_each_image_of_a_batch_has_its_own_control(pipe, edges, scheduler, guidance_scale) -> None:
    controls = [edges, edges.transpose(Image.Transpose.FLIP_LEFT_RIGHT), edges.rotate(90)]
    settings = {"scheduler": scheduler, "guidance_scale": guidance_scale, "seed": [1, 1, 1]}
    together = latents(pipe, prompt=[PROMPT] * 3, control_image=controls, **settings)
    for row, control in enumerate(controls):
        alone = latents(pipe, control_image=control, **{**settings, "seed": 1})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-3, rtol=1e-3)
    assert float((together[0] - together[1]).abs().max()) > 0.05


def test_one_control_image_serves_all(pipe, edges) -> None:
    both = latents(pipe, prompt=[PROMPT, PROMPT], control_image=edges, seed=[2, 2])
    torch.testing.assert_close(both[0], both[1], atol=1e-4, rtol=1e-4)


def test_many_requests_and_a_warm_pipeline(pipe, edges) -> None:
    pipe.warmup(["2:1"], num_inference_steps=3, prompts=[PROMPT], progress=lambda *_: None)
    wide = Request(prompt=PROMPT, aspect_ratio=ASPECT, seed=4, control_image=edges)
    tall = Request(prompt="a star", aspect_ratio="1:2", seed=5, control_image=edges.rotate(90))
    found = pipe.generate_many([wide, tall], num_inference_steps=3, output_type="latent")
    torch.testing.assert_close(
        found[0], latents(pipe, seed=4, control_image=edges), atol=1e-3, rtol=1e-3
    )
    assert found[1].shape[2] == 2 * found[1].shape[3]
    with pytest.raises(ConfigError, match="no control images were given"):
        pipe.generate_many([Request(prompt=PROMPT)], num_inference_steps=3)


def test_steps_may_be_reused_but_not_blocks(pipe, edges) -> None:
    reused = latents(
        pipe, num_inference_steps=6, control_image=edges, approximate=StepCache(threshold=0.9)
    )
    assert bool(reused.isfinite().all())
    with pytest.raises(ConfigError, match="cannot stop after its first block"):
        latents(pipe, control_image=edges, approximate=FirstBlockCache(threshold=0.1))


def test_an_engine_gives_the_image_of_plain_pytorch(
    bundle, edges, controlnet, pipeline_folder, tmp_path
) -> None:
    settings = {"backend": "onnxruntime", "components": ("transformer",)}
    other = built(pipeline_folder(32), controlnet, tmp_path / "ort", **settings)
    assert all(result.ok for result in verify_bundle(other))
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    expected = latents(pipe, control_image=edges, seed=3)
    device = torch.device("cpu")
    engine = get_backend("onnxruntime").load(other, Manifest.read(other), "transformer", device)
    pipe.transformer = engine
    pipe.denoiser.savings -= {Saving.ABSORBED_TEXT}  # a form of text that engines do not take
    actual = latents(pipe, control_image=edges, seed=3)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_the_manifest_says_that_there_is_a_controlnet(bundle, controlnet) -> None:
    manifest = Manifest.read(bundle)
    config = json.loads((controlnet / "config.json").read_text())
    assert manifest.control is not None
    assert manifest.control.to_dict() == {name: config[name] for name in ("variant", "num_copies")}
    assert {"vae_encoder/config.json", "vae_encoder/model.safetensors"} <= manifest.files.keys()
    assert not damaged_files(bundle, manifest)


def test_another_controlnet_is_another_build(pipeline_folder, controlnet, tmp_path) -> None:
    folder = pipeline_folder(32)
    config = EngineConfig(resolution=256, backend="torch", components=("transformer",))
    first = build(str(folder), tmp_path / "b", config, controlnet=controlnet)
    assert build(str(folder), tmp_path / "b", config, controlnet=controlnet).cached
    checkpoint = read_controlnet(controlnet, read_transformer(folder).config)
    checkpoint.state["copies.0.after_proj.bias"] += 1
    write_controlnet(checkpoint, tmp_path / "other")
    other = tmp_path / "other"
    second = build(str(folder), tmp_path / "b", config, controlnet=other, force=True)
    assert not second.cached and second.manifest.key != first.manifest.key
    plain = build(str(folder), tmp_path / "b", config, force=True)
    assert plain.manifest.control is None and not plain.cached


def test_control_images_that_do_not_fit_are_refused(pipe, edges, bundle_256) -> None:
    with pytest.raises(ConfigError, match="no control images were given to a bundle with"):
        latents(pipe)
    blank = torch.zeros(1, 4, 22, 44)
    with pytest.raises(ConfigError, match="2 control images were given to a bundle with"):
        latents(pipe, control_image=edges, control_latents=blank)
    with pytest.raises(ConfigError, match="2 control images were given for 3 images"):
        latents(pipe, prompt=[PROMPT] * 3, control_image=[edges, edges])
    with pytest.raises(ConfigError, match=r"\[1, 4, 32, 32\]; .* take \[1, 4, 22, 44\] each"):
        latents(pipe, control_latents=torch.zeros(1, 4, 32, 32))
    plain = PixArtPipeline.from_bundle(bundle_256, "cpu")
    with pytest.raises(ConfigError, match="this bundle has no ControlNet; leave it out"):
        latents(plain, control_image=edges)
    with pytest.raises(ConfigError, match="this bundle has no ControlNet; leave it out"):
        latents(plain, control_latents=blank)


def test_a_bundle_without_an_encoder_takes_latents_alone(pipe, edges, bundle, tmp_path) -> None:
    pipe = PixArtPipeline.from_bundle(bundle, "cpu")
    pipe.controls._folder = tmp_path
    with pytest.raises(
        BundleError, match="no vae_encoder for control images; pass control_latents"
    ):
        latents(pipe, control_image=edges)
    latents(pipe, control_latents=torch.zeros(1, 4, 22, 44))


def test_the_command_makes_the_pipelines_image(pipe, edges, bundle, tmp_path, capsys) -> None:
    edges.save(tmp_path / "edges.png")
    words = ["generate", PROMPT, "--bundle", str(bundle), "-o", str(tmp_path / "o.png"),
             "--steps", "2", "--aspect", ASPECT, "--seed", "6"]  # fmt: skip
    assert main([*words, "--control-image", str(tmp_path / "edges.png")]) == 0
    assert read_metadata(tmp_path / "o.png")["control_image"] == "edges.png"
    expected = latents(pipe, seed=6, num_inference_steps=2, control_image=edges, output_type="np")[
        0
    ]
    with Image.open(tmp_path / "o.png") as made:
        assert np.abs(np.asarray(made) / 255 - expected).max() <= 1 / 255
    assert main([*words, "--force"]) == 2
    assert "has a ControlNet; name a picture of edges" in capsys.readouterr().err
    assert main([*words, "--force", "--vram", "8G", "--control-image",
                 str(tmp_path / "edges.png")]) == 0  # fmt: skip
    assert "memory: text encoder resident, 2 at once" in capsys.readouterr().err
    (tmp_path / "none.png").write_text("no picture")
    assert main([*words, "--force", "--control-image", str(tmp_path / "none.png")]) == 2
    assert "none.png cannot be read" in capsys.readouterr().err


def test_random_weights_have_no_controlnet(controlnet, tmp_path) -> None:
    config = EngineConfig(resolution=256, backend="torch", components=("transformer",))
    with pytest.raises(ConfigError, match="is not supported with xl-random"):
        build("xl-random", tmp_path / "b", config, controlnet=controlnet)
