"""The adaLN text model: it starts as the DiT without class; its size at XL/2; it learns."""

from __future__ import annotations

import pytest
import torch

from examples.ablation.adaln import AdaLNObjective, AdaLNTransformer, from_dit
from examples.ablation.shapes import costs
from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.dit import DiTCheckpoint
from pixart_rt.config import XL_2_256, ModelConfig
from pixart_rt.data.batch import Batch
from pixart_rt.model.dit import DiT, DiTConfig
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.sample_rng import draw

TEXT, WIDTH = 5, 10
CONFIG = ModelConfig(
    num_layers=3, num_heads=2, head_dim=72, caption_channels=WIDTH, max_text_tokens=TEXT,
    sample_size=6, interpolation_scale=1.0, micro_conditioning=False,
)  # fmt: skip
BUCKET = Bucket(ratio=1.0, height=48, width=48)


@pytest.fixture
def dit():
    config = DiTConfig(num_classes=3, num_layers=3, num_heads=2, sample_size=6)
    model, random = DiT(config), torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # nothing zero, that would hide a missing term
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=random)
    return DiTCheckpoint(config, dict(model.state_dict()), "memory")


def make_batch(count=3):
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 5, 3])[:count]
    return Batch(
        ids=torch.arange(count),
        latents=torch.randn(count, 4, 6, 6, generator=random),
        prompt_embeds=torch.randn(count, TEXT, WIDTH, generator=random).bfloat16(),
        prompt_mask=torch.arange(TEXT) < lengths[:, None],
        original_size=torch.full((count, 2), 48.0),
        aspect_ratio=torch.ones(count, 1),
        bucket=BUCKET,
    )


@pytest.mark.parametrize("t", [0, 500, 999])
def test_it_starts_as_the_dit_without_class_at_every_timestep(dit, plain_dit, t):
    """Oracle: the float64 DiT of conftest.py."""
    model, batch = from_dit(dit, CONFIG), make_batch()
    times = torch.full((3,), float(t))
    with torch.no_grad():
        tokens = model(
            patchify(batch.latents, 2), position_table(CONFIG, BUCKET.grid),
            model.modulator(times), batch.prompt_embeds, batch.prompt_mask,
        )  # fmt: skip
    found = unpatchify(tokens, BUCKET.grid, 2)
    wide = {name: each.double() for name, each in dit.state.items()}
    wide["x_embedder.proj.weight"] = (
        wide.pop("x_embedder.weight").unflatten(1, (4, 2, 2))
        if "x_embedder.weight" in wide
        else wide["x_embedder.proj.weight"]
    )
    wide["x_embedder.proj.bias"] = wide.pop("x_embedder.bias")
    wide["pos_embed"] = position_table(CONFIG, BUCKET.grid).double()
    expected = plain_dit(wide, 2)(batch.latents, times, None)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_text_reaches_the_output_once_its_last_linear_is_not_zero(dit):
    model, batch = from_dit(dit, CONFIG), make_batch()
    for block in model.blocks:
        torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.1)

    def out(embeds):
        with torch.no_grad():
            return model(
                patchify(batch.latents, 2), position_table(CONFIG, BUCKET.grid),
                model.modulator(torch.full((3,), 300.0)), embeds, batch.prompt_mask,
            )  # fmt: skip

    masked = batch.prompt_embeds + ~batch.prompt_mask[..., None] * 7.0
    assert torch.equal(out(batch.prompt_embeds), out(masked.bfloat16()))
    assert not torch.allclose(out(batch.prompt_embeds), out(-batch.prompt_embeds))


def test_it_learns_a_batch(dit):
    null = NullText(torch.zeros(TEXT, WIDTH), torch.arange(TEXT) < 1)
    objective = AdaLNObjective(from_dit(dit, CONFIG), GaussianDiffusion(), null, 0.1)
    batch = make_batch()
    draws = draw(0, 0, batch)
    optimizer = torch.optim.Adam(objective.parameters(), 2e-3)
    losses = []
    for _ in range(15):
        loss = objective(batch, draws)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert objective.flops(BUCKET, False) is None


def test_what_a_shared_linear_saves():
    """Section 2.3: a linear in each block is 27 % of the DiT's parameters. By hand: L linears of
    6 D (D + 1) and one of 2 D (D + 1) for the last layer, against one of 6 D (D + 1) and tables of
    6 D and 2 D."""
    found = costs(CONFIG, make_batch())
    D, L = XL_2_256.hidden_size, XL_2_256.num_layers
    saved = (6 * L + 2) * D * (D + 1) - 6 * D * (D + 1) - (6 * L + 2) * D
    adaln, single = found["adaln"], found["adaln_single"]
    assert adaln.parameters_xl - single.parameters_xl == saved
    assert single.parameters_xl == 610_856_096
    assert adaln.peak_bytes > single.peak_bytes > 12 * single.parameters
    assert adaln.parameters == sum(each.numel() for each in AdaLNTransformer(CONFIG).parameters())
