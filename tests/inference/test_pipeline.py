"""The pipeline against diffusers' PixArtAlphaPipeline with the same weights, seed and prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pixart_rt import PixArtPipeline
from pixart_rt.config import CfgNull, EngineConfig
from pixart_rt.errors import BundleError, Cancelled, ConfigError
from pixart_rt.export.build import build

pytestmark = pytest.mark.usefixtures("no_kernels")
PROMPT = "a red circle above a blue square"
MEAN_TOLERANCE = 1 / 255  # of the decoded image, as the issue that set it asks


def reference_image(folder: Path, *, sigma: bool = False, **arguments: Any) -> np.ndarray:
    """The image in [0, 1] that diffusers makes, float32 on the CPU."""
    import diffusers

    family = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    pipeline = family.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in arguments.pop("seeds")]
    return pipeline(**arguments, generator=generator, output_type="np").images


@pytest.fixture(scope="module")
def pipe(bundle_256: Path) -> PixArtPipeline:
    return PixArtPipeline.from_bundle(bundle_256, "cpu")


def latents(pipe: PixArtPipeline, **arguments: Any) -> torch.Tensor:
    values = {"prompt": PROMPT, "num_inference_steps": 3, **arguments}
    return pipe(**values, output_type="latent").images


@pytest.mark.parametrize("size", [(256, 256), (176, 352), (300, 200)])
def test_twenty_steps_match_diffusers(
    pipe: PixArtPipeline, pipeline_folder: Callable[..., Path], size: tuple[int, int]
) -> None:
    height, width = size  # a bucket, a bucket, and a size that is resized and cropped
    prompts = [PROMPT, "a large yellow star"]
    expected = reference_image(
        pipeline_folder(32), prompt=prompts, negative_prompt="", height=height, width=width,
        num_inference_steps=20, guidance_scale=4.5, seeds=[7, 8],
    )  # fmt: skip
    actual = pipe(prompts, height=height, width=width, seed=7, output_type="np").images
    assert actual.shape == expected.shape
    assert expected.std() > 0.02, "a flat reference image would prove nothing"
    assert np.abs(actual - expected).mean() <= MEAN_TOLERANCE


@pytest.mark.parametrize("sigma", [False, True])
def test_the_1024_models_match_diffusers(
    pipeline_folder: Callable[..., Path], tmp_path: Path, sigma: bool
) -> None:
    """Micro-conditioning (alpha) and 300 tokens, 0.13025 and no micro-conditioning (Sigma)."""
    folder = pipeline_folder(128, sigma=sigma)
    config = EngineConfig(resolution=1024, backend="torch")
    pipe = PixArtPipeline.from_bundle(build(str(folder), tmp_path / "b", config).path, "cpu")
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0}
    expected = reference_image(
        folder, sigma=sigma, prompt=PROMPT, height=512, width=2048, seeds=[3], **arguments
    )
    actual = pipe(PROMPT, height=512, width=2048, seed=3, output_type="np", **arguments).images
    assert np.abs(actual - expected).mean() <= MEAN_TOLERANCE
    assert pipe.config.max_text_tokens == (300 if sigma else 120)
    assert pipe.config.micro_conditioning is not sigma
    assert pipe.manifest.vae["scaling_factor"] == (0.13025 if sigma else 0.18215)


def test_an_image_does_not_depend_on_its_place_in_the_batch(pipe: PixArtPipeline) -> None:
    alone = latents(pipe, prompt="a small star", seed=12)
    batch = latents(pipe, prompt=["a blue square", "a small star", PROMPT], seed=[1, 12, 3])
    torch.testing.assert_close(batch[1:2], alone, atol=1e-4, rtol=1e-4)  # float32, other batch
    assert not torch.allclose(batch[0], batch[1], atol=0.1)


def test_several_images_per_prompt_take_successive_seeds(pipe: PixArtPipeline) -> None:
    result = pipe([PROMPT, "a star"], num_images_per_prompt=2, seed=5, num_inference_steps=1,
                  output_type="latent")  # fmt: skip
    assert result.seeds == [5, 6, 7, 8]
    assert result.prompts == [PROMPT, PROMPT, "a star", "a star"]
    torch.testing.assert_close(
        result.images[3:], latents(pipe, prompt="a star", seed=8, num_inference_steps=1),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_prompts_are_encoded_once(bundle_256: Path) -> None:
    pipe = PixArtPipeline.from_bundle(bundle_256, "cpu")
    first = latents(pipe, num_inference_steps=1)
    encoder = pipe.prompt_encoder
    assert encoder is not None
    assert (encoder.hits, encoder.misses) == (1, 1)  # the empty negative is in the bundle
    second = latents(pipe, num_inference_steps=1)
    assert (encoder.hits, encoder.misses) == (3, 1)
    assert torch.equal(first, second)


def test_embeddings_may_replace_the_prompt(pipe: PixArtPipeline) -> None:
    assert pipe.prompt_encoder is not None
    encoded, null = pipe.prompt_encoder([PROMPT]), pipe.prompt_encoder([""])
    given = latents(
        pipe, prompt=None, prompt_embeds=encoded.embeds, prompt_attention_mask=encoded.mask,
        negative_prompt_embeds=null.embeds, negative_prompt_attention_mask=null.mask,
    )  # fmt: skip
    torch.testing.assert_close(given, latents(pipe))


def test_negative_embeddings_need_a_row_per_prompt(pipe: PixArtPipeline) -> None:
    assert pipe.prompt_encoder is not None
    null = pipe.prompt_encoder([""])
    with pytest.raises(ConfigError, match="1 negative prompt embeddings were given for 2 prompts"):
        pipe(
            [PROMPT, "a star"],
            negative_prompt_embeds=null.embeds,
            negative_prompt_attention_mask=null.mask,
        )


def test_an_interrupt_while_the_prompt_is_read_is_heard(pipe: PixArtPipeline) -> None:
    assert pipe.prompt_encoder is not None
    real = pipe.prompt_encoder.text_encoder

    def slow(**inputs: torch.Tensor) -> torch.Tensor:
        pipe.interrupt()
        return real(**inputs)

    pipe.prompt_encoder.text_encoder = slow
    try:
        with pytest.raises(Cancelled, match="before step 1"):
            latents(pipe, prompt="a prompt not seen before")
    finally:
        pipe.prompt_encoder.text_encoder = real


def test_a_negative_prompt_changes_the_image_only_with_guidance(pipe: PixArtPipeline) -> None:
    assert not torch.allclose(latents(pipe), latents(pipe, negative_prompt="a star"), atol=1e-3)
    unguided = latents(pipe, guidance_scale=1.0)
    assert torch.equal(unguided, latents(pipe, guidance_scale=1.0, negative_prompt="a star"))


@pytest.mark.parametrize(("scheduler", "count"), [(None, 20), ("ddim", 20), ("lcm", 4), ("dmd", 1)])
def test_a_sampler_has_its_usual_number_of_steps(
    pipe: PixArtPipeline, scheduler: str | None, count: int
) -> None:
    steps: list[int] = []
    latents(
        pipe, scheduler=scheduler, force_scheduler=True, num_inference_steps=None,
        callback_on_step_end=lambda _p, step, _t, _v: steps.append(step),
    )  # fmt: skip
    assert steps == list(range(count))


@pytest.mark.parametrize("scheduler", ["sa-solver", "ddim", "iddpm", "lcm"])
def test_other_schedulers_match_their_diffusers_loop(
    pipe: PixArtPipeline, pipeline_folder: Callable[..., Path], scheduler: str
) -> None:
    """The oracle is a loop over diffusers' own transformer and scheduler, noise from one seed."""
    import diffusers
    from diffusers import PixArtTransformer2DModel

    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    solver = {
        "sa-solver": lambda: diffusers.SASolverScheduler(
            **betas, tau_func=lambda t: 1 if 200 <= t <= 800 else 0
        ),
        "ddim": lambda: diffusers.DDIMScheduler(**betas, clip_sample=False),
        "iddpm": lambda: diffusers.DDPMScheduler(
            **betas, clip_sample=False, variance_type="learned_range"
        ),
        "lcm": lambda: diffusers.LCMScheduler(**betas),
    }[scheduler]()

    model = PixArtTransformer2DModel.from_pretrained(pipeline_folder(32), subfolder="transformer")
    assert pipe.prompt_encoder is not None
    text = pipe.prompt_encoder(["", PROMPT] if scheduler != "lcm" else [PROMPT])
    solver.set_timesteps(4)
    generator = torch.Generator().manual_seed(21)
    x = torch.randn((1, 4, 32, 32), generator=generator)
    for t in solver.timesteps:
        with torch.no_grad():
            out = model(
                x.expand(len(text.embeds), -1, -1, -1), encoder_hidden_states=text.embeds,
                encoder_attention_mask=text.mask, timestep=t.expand(len(text.embeds)),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample  # fmt: skip
        eps = out[-1:, :4] if scheduler == "lcm" else out[:1, :4] + 4.5 * (out[1:] - out[:1])[:, :4]
        if scheduler == "iddpm":
            eps = torch.cat([eps, out[1:, 4:]], dim=1)
        x = solver.step(eps, t, x, generator=[generator], return_dict=False)[0]
    actual = latents(
        pipe, scheduler=scheduler, force_scheduler=True, num_inference_steps=4, seed=21
    )
    torch.testing.assert_close(actual, x, atol=2e-3, rtol=2e-3)  # float32 errors, guided 4.5 times


def test_dmd_is_one_call_at_timestep_400(pipe: PixArtPipeline) -> None:
    """Against the formula on the model's own output, and diffusers' DDPM at that timestep."""
    seen: dict[str, torch.Tensor] = {}
    transformer = pipe.transformer

    class Recorder:
        also_takes, capturable = transformer.also_takes, False

        def version(self) -> int:
            return 0

        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            assert not seen, "one call"
            seen.update(inputs, output=transformer(**inputs))
            return seen["output"]

    pipe.transformer = Recorder()
    steps: list[int] = []
    try:
        actual = latents(
            pipe, scheduler="dmd", force_scheduler=True, num_inference_steps=1, seed=21,
            callback_on_step_end=lambda _p, _s, timestep, _v: steps.append(int(timestep)),
        )  # fmt: skip
    finally:
        pipe.transformer = transformer
    assert steps == [400] and len(seen["text_rows"]) == 1 and not len(seen["null_rows"])
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(21))
    # A token's outputs are its 2x2 pixels, each with its 4 channels.
    eps = seen["output"].reshape(1, 16, 16, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
    kept = 1.0
    for t in range(401):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
    expected = (x.double() - (1 - kept) ** 0.5 * eps.double()) / kept**0.5
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    from diffusers import DDPMScheduler

    ddpm = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    theirs = ddpm.step(eps, 400, x).pred_original_sample
    torch.testing.assert_close(actual, theirs, atol=1e-4, rtol=1e-4)  # float32 cumulative products


def test_one_step_works_and_is_finite(pipe: PixArtPipeline) -> None:
    assert latents(pipe, num_inference_steps=1).isfinite().all()


def test_callback_sees_and_may_change_every_step(pipe: PixArtPipeline) -> None:
    steps = []

    def zero(_pipe: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict:
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])}

    result = latents(pipe, callback_on_step_end=zero, num_inference_steps=4)
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert [t for _, t in steps] == sorted((t for _, t in steps), reverse=True)
    assert torch.equal(result, torch.zeros_like(result))


def test_interrupt_stops_before_the_next_step(pipe: PixArtPipeline) -> None:
    seen = []

    def stop(running: PixArtPipeline, step: int, *_: Any) -> None:
        seen.append(step)
        running.interrupt()

    with pytest.raises(Cancelled, match="before step 2 of 5"):
        latents(pipe, callback_on_step_end=stop, num_inference_steps=5)
    assert seen == [0]
    assert latents(pipe, num_inference_steps=1).isfinite().all(), "the pipeline can be used again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 256}, "go together"),
        ({"height": 256, "width": 256, "aspect_ratio": "1:1"}, "not both"),
        ({"aspect_ratio": "wide"}, "width:height"),
        ({"aspect_ratio": "0:1"}, "width:height"),
        ({"scheduler": "euler"}, "dpm-solver"),
        ({"num_inference_steps": 0}, "between 1 and 999"),
        ({"num_inference_steps": 1000}, "between 1 and 999"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 images"),
        ({"scheduler": "lcm", "guidance_scale": 4.5}, "distilled"),
        (
            {"scheduler": "dmd", "guidance_scale": 2, "num_inference_steps": 1},
            "not supported with dmd",
        ),
        ({"scheduler": "dmd", "num_inference_steps": 20}, "must be 1 with dmd, got 20"),
        ({"prompt": []}, "empty"),
        ({"output_type": "gif"}, "output_type"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts"),
    ],
)
def test_impossible_arguments_are_refused(
    pipe: PixArtPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipe(**{"prompt": PROMPT, **arguments})


@pytest.mark.parametrize(
    ("aspect", "size"), [("1:1", (256, 256)), ("3:2", (304, 208)), ("9:16", (192, 336))]
)
def test_aspect_ratio_is_width_to_height(
    pipe: PixArtPipeline, aspect: str, size: tuple[int, int]
) -> None:
    image = pipe(PROMPT, aspect_ratio=aspect, num_inference_steps=1).images[0]
    assert image.size == size


def test_a_changed_or_missing_file_is_refused(bundle_256: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle_256, copy)
    path = next((copy / "transformer").glob("*.data"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="is changed"):
        PixArtPipeline.from_bundle(copy, "cpu")
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        PixArtPipeline.from_bundle(copy, "cpu")
    with pytest.raises(BundleError, match="not a bundle"):
        PixArtPipeline.from_bundle(tmp_path, "cpu")


def y_embedding_row(convention: CfgNull, **given: Any) -> Any:
    """`unconditional` on two prompts of 3 and 5 tokens with a fake encoder."""
    from pixart_rt.inference.prompt_embeds import PromptEmbeds
    from pixart_rt.inference.prompts import unconditional

    def encoded(value: float, counts: tuple[int, int]) -> PromptEmbeds:
        mask = torch.arange(6)[None] < torch.tensor(counts)[:, None]
        return PromptEmbeds(torch.full((2, 6, 4), value), mask, counts)

    prompt, empty = encoded(1.0, (3, 5)), encoded(7.0, (1, 1))
    null = torch.full((6, 4), -2.0)
    # Padding of the empty prompt is attended to under a caption's mask, so it must be there.
    needs_padding = convention is not CfgNull.EMPTY_PROMPT
    encode: Any = lambda _texts, whole: empty if whole is needs_padding else None  # noqa: E731
    negative = given.get("negative", ["", ""])
    return prompt, empty, unconditional(convention, prompt, negative, encode, null)


def test_the_three_conventions_of_the_unconditional_half() -> None:
    prompt, empty, found = y_embedding_row(CfgNull.EMPTY_PROMPT)
    assert torch.equal(found.embeds, empty.embeds) and torch.equal(found.mask, empty.mask)
    prompt, _, found = y_embedding_row(CfgNull.Y_EMBEDDING)
    assert (found.embeds == -2).all() and torch.equal(found.mask, prompt.mask)
    prompt, empty, found = y_embedding_row(CfgNull.EMPTY_PROMPT_CAPTION_MASK)
    assert torch.equal(found.embeds, empty.embeds) and torch.equal(found.mask, prompt.mask)
    prompt, empty, found = y_embedding_row(CfgNull.Y_EMBEDDING, negative=["", "a star"])
    assert (found.embeds[0] == -2).all() and torch.equal(found.mask[0], prompt.mask[0])
    assert torch.equal(found.embeds[1], empty.embeds[1])
    assert torch.equal(found.mask[1], empty.mask[1])
    assert found.num_tokens == (3, 1)
