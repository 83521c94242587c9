"""Our transformer against diffusers' PixArtTransformer2DModel with the same weights, float32."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pixart_rt.buckets import RESOLUTIONS, buckets, nearest_bucket
from pixart_rt.checkpoints import tensor_names
from pixart_rt.config import SIGMA_XL_2_1024, XL_2_256, XL_2_512, XL_2_1024_MS
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from pixart_rt.model.transformer import PixArtTransformer

TOLERANCE = 1e-4  # the project's bound; outputs are near 1 and differences are near 1e-6
SMALL = {256: (2, 2), 512: (1, 1), 1024: (1, 1)}  # layers, heads: 4096 tokens are slow
SCALES = {256: 1.0, 512: 1.0, 1024: 2.0}


def one_bucket_per_token_count(resolution):
    return list({bucket.num_tokens: bucket for bucket in buckets(resolution)}.values())


def random_inputs(config, bucket, num_text, seed, text_length=None):
    """A batch with one image per entry of num_text: its number of unmasked text tokens."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(num_text), text_length or config.max_text_tokens
    inputs = {
        "latents": torch.randn(
            B, config.in_channels, bucket.height // 8, bucket.width // 8, generator=generator
        ),
        "timestep": torch.randint(0, 1000, (B,), generator=generator),
        "embeds": torch.randn(B, T, config.caption_channels, generator=generator),
        "mask": torch.arange(T)[None] < torch.tensor(num_text)[:, None],
    }
    if config.micro_conditioning:
        inputs["size"] = torch.tensor([[bucket.height, bucket.width]] * B).float()
        inputs["aspect"] = torch.full((B,), bucket.height / bucket.width)
    return inputs


def run_reference(model, inputs):
    conditions = {"resolution": None, "aspect_ratio": None}
    if "size" in inputs:
        conditions = {"resolution": inputs["size"], "aspect_ratio": inputs["aspect"][:, None]}
    return model(
        inputs["latents"],
        encoder_hidden_states=inputs["embeds"],
        encoder_attention_mask=inputs["mask"],
        timestep=inputs["timestep"],
        added_cond_kwargs=conditions,
    ).sample


def run_ours(model, inputs):
    config = model.config
    _, _, h, w = inputs["latents"].shape
    grid = (h // config.patch_size, w // config.patch_size)
    modulation = model.modulator(inputs["timestep"], inputs.get("size"), inputs.get("aspect"))
    tokens = model(
        patchify(inputs["latents"], config.patch_size),
        position_table(config, grid),
        modulation,
        inputs["embeds"],
        inputs["mask"],
    )
    return unpatchify(tokens, grid, config.patch_size)


def largest_difference(pair, inputs):
    reference, ours = pair
    with torch.inference_mode():
        return float((run_ours(ours, inputs) - run_reference(reference, inputs)).abs().max())


@pytest.mark.parametrize("micro", [False, True], ids=["plain", "micro-conditioned"])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_token_count_matches_diffusers(resolution, micro, small_config, reference, ours_of):
    layers, heads = SMALL[resolution]
    config = small_config(
        num_layers=layers,
        num_heads=heads,
        sample_size=resolution // 8,
        interpolation_scale=SCALES[resolution],
        micro_conditioning=micro,
    )
    model = reference(config)
    pair = model, ours_of(model, config)
    chosen = one_bucket_per_token_count(resolution)
    assert len(chosen) == 14
    for seed, bucket in enumerate(chosen):
        num_text = [1 + (seed * 37) % 120]  # 1 to 112 tokens
        inputs = random_inputs(config, bucket, num_text, seed)
        assert largest_difference(pair, inputs) <= TOLERANCE, bucket


@pytest.mark.parametrize("micro", [False, True], ids=["plain", "micro-conditioned"])
def test_masks_and_timesteps_of_a_batch(micro, small_config, reference, ours_of):
    config = small_config(sample_size=32, interpolation_scale=1.0, micro_conditioning=micro)
    model = reference(config)
    inputs = random_inputs(config, nearest_bucket(256, 1, 2), [1, 120, 2, 119, 60, 77], seed=1)
    inputs["timestep"] = torch.tensor([0, 999, 1, 500, 998, 257])  # bf16 would merge some
    assert largest_difference((model, ours_of(model, config)), inputs) <= TOLERANCE


def test_every_mask_length(small_config, reference, ours_of):
    config = small_config(sample_size=32, interpolation_scale=1.0, micro_conditioning=False)
    model = reference(config)
    inputs = random_inputs(config, buckets(256)[0], list(range(1, 121)), seed=2)
    inputs["latents"] = inputs["latents"][:, :, :4, :6]  # 6 tokens: the text is what matters
    assert largest_difference((model, ours_of(model, config)), inputs) <= TOLERANCE


@pytest.mark.parametrize("what", ["mask", "timestep", "size", "aspect"])
def test_the_comparison_sees_a_wrong_input(what, small_config, reference, ours_of):
    """Guards the tests above: one input off by a little is far outside the tolerance."""
    config = small_config(sample_size=32, interpolation_scale=1.0)
    model = reference(config)
    inputs = random_inputs(config, buckets(256)[5], [60], seed=8)
    wrong = {name: tensor.clone() for name, tensor in inputs.items()}
    if what == "mask":
        wrong["mask"][0, 60] = True
    else:
        wrong[what] += 1
    with torch.inference_mode():
        off = run_ours(ours_of(model, config), wrong) - run_reference(model, inputs)
    assert float(off.abs().max()) > 10 * TOLERANCE


def test_masked_text_has_no_influence(small_config, reference, ours_of):
    config = small_config(sample_size=32, interpolation_scale=1.0, micro_conditioning=False)
    model = ours_of(reference(config), config)
    inputs = random_inputs(config, buckets(256)[7], [3], seed=3)
    with torch.inference_mode():
        expected = run_ours(model, inputs)
        inputs["embeds"][:, 3:] = 1e4
        torch.testing.assert_close(run_ours(model, inputs), expected, atol=1e-6, rtol=0)


def test_sigma_matches_diffusers(small_config, reference, ours_of):
    config = small_config(
        num_layers=1, num_heads=3, max_text_tokens=300, micro_conditioning=False, sample_size=128
    )
    model = reference(config)
    inputs = random_inputs(config, nearest_bucket(1024, 16, 9), [299], seed=4)
    assert inputs["embeds"].shape[1] == 300
    assert largest_difference((model, ours_of(model, config)), inputs) <= TOLERANCE


def test_without_a_learned_variance(small_config, reference, ours_of):
    config = small_config(out_channels=4, sample_size=32, interpolation_scale=1.0)
    model = reference(config)
    inputs = random_inputs(config, buckets(256)[20], [9], seed=5)
    assert run_ours(ours_of(model, config), inputs).shape == (1, 4, 32, 32)
    assert largest_difference((model, ours_of(model, config)), inputs) <= TOLERANCE


def test_gradients_match_diffusers(small_config, reference, ours_of):
    """Training goes through the same definition: every parameter gets diffusers' gradient."""
    config = small_config(sample_size=32, interpolation_scale=1.0)
    model = reference(config)
    ours = ours_of(model, config)
    inputs = random_inputs(config, buckets(256)[3], [5, 90], seed=6)
    inputs["latents"] = inputs["latents"][:, :, :8]
    target = torch.randn(2, 8, *inputs["latents"].shape[2:])
    for run, module in ((run_reference, model), (run_ours, ours)):
        (run(module, inputs) - target).pow(2).mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert all(bool((gradient != 0).any()) for gradient in gradients.values())
    named = tensor_names.from_ours(gradients, config, tensor_names.diffusers_names)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert named.keys() == expected.keys()
    for name, gradient in named.items():
        # float32 sums over many tokens in another order: 1e-4 of the largest entry of each.
        bound = 1e-4 * float(expected[name].abs().max()) + 1e-7
        assert float((gradient - expected[name]).abs().max()) <= bound, name


def test_bfloat16_stays_close_to_float32(small_config, reference, ours_of):
    config = small_config(sample_size=32, interpolation_scale=1.0)
    ours = ours_of(reference(config), config)
    inputs = random_inputs(config, buckets(256)[11], [40], seed=7)
    with torch.inference_mode():
        expected = run_ours(ours, inputs)
        actual = run_ours(ours.to(torch.bfloat16), inputs)
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < 0.03  # bf16 keeps 8 bits, 0.4 %; some 20 roundings in a row


def test_one_graph_serves_all_buckets_and_batches(small_config, reference, ours_of):
    config = small_config(sample_size=32, interpolation_scale=1.0)
    ours = ours_of(reference(config), config)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    sizes = [(buckets(256)[index], B) for index, B in ((0, 2), (20, 3), (39, 2), (12, 5))]
    for bucket, B in sizes:
        N = bucket.num_tokens
        tensors = [
            torch.randn(B, N, 16),
            position_table(config, bucket.grid),
            torch.randn(B, 7, config.hidden_size),
            torch.randn(B, 120, config.caption_channels),
            torch.ones(B, 120, dtype=torch.bool),
        ]
        for index, tensor in enumerate(tensors):
            if index != 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensors[0], 1)
        torch._dynamo.mark_dynamic(tensors[1], 1)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), ours(*tensors))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (XL_2_256, 610_856_096),  # counted from the published checkpoints
        (XL_2_512, 610_856_096),
        (XL_2_1024_MS, 611_349_152),
        (SIGMA_XL_2_1024, 610_856_096),
    ],
    ids=["256", "512", "1024-ms", "sigma"],
)
def test_parameter_counts_are_the_published_ones(config, count):
    with torch.device("meta"):
        model = PixArtTransformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_micro_conditioning_asks_for_size_and_aspect(small_config, reference, ours_of):
    config = small_config(sample_size=32)
    ours = ours_of(reference(config), config)
    with pytest.raises(ValueError, match="needs size and aspect_ratio"):
        ours.modulator(torch.tensor([1.0]))
