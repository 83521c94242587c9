"""Train the tiny 8x autoencoder on drawn scenes: L1 + L2 + a small KL term (arXiv:2112.10752).

    python -m examples.tiny.train_vae --minutes 20 --out runs/tiny/vae

Most steps see small crops of scenes drawn at 128 to 1024 pixels; a growing share sees whole images,
because group normalisation takes its statistics over all pixels. The latents are
standardized at the end and the inverse of their deviation is written as `scaling_factor`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from examples.tiny.scenes import draw, place, random_scene

KL_WEIGHT = 1e-4  # against a mean over pixels; ten times more and colours collapse
CROPS = ((16, 64), (4, 128))  # batch size and side of the window
WHOLE = ((2, 256), (1, 512))  # batch size and side of the whole image
STANDARDIZED = 128  # whole scenes that the latents' scale is measured on
SIDES = (128, 192, 256, 384, 512, 768, 1024)  # pixels of the scene that a crop is cut from


def build_vae() -> AutoencoderKL:
    """8x smaller, 4 channels, no attention: 0.6 s to decode 1024 x 1024 on two CPU cores."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=1024,
    )
    start_linear(vae)
    return vae


@torch.no_grad()
def start_linear(vae: AutoencoderKL) -> None:
    """Start as a linear autoencoder whose norms have a constant scale.

    Residual branches begin at zero and the other convolutions keep the variance, so colours pass
    from the first step. Group normalisation divides by the statistics of the whole image: on flat
    scenes these are mostly background, and colours came out differently at each size. Two channels
    held at +-sqrt(C / 2) by biases, in the one group, keep the statistics nearly constant.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        channels, fan_in = module.out_channels, module.weight[0].numel()
        nn.init.normal_(module.weight, std=fan_in**-0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif channels >= 16:
            module.bias[0], module.bias[1] = (channels / 2) ** 0.5, -((channels / 2) ** 0.5)


def crops(rng: np.random.Generator, batch: int, side: int) -> Tensor:
    """[batch, 3, side, side] in -1..1, windows of scenes of many sizes."""
    images = []
    for _ in range(batch):
        height, width = rng.choice(SIDES, 2)
        height, width = max(int(height), side), max(int(width), side)
        scene = random_scene(rng, held_out=False)
        places = place(scene, height, width, rng)
        target = places[rng.integers(len(places))]  # look where something is, mostly
        left = int(np.clip(target.x + rng.normal() * target.radius - side / 2, 0, width - side))
        top = int(np.clip(target.y + rng.normal() * target.radius - side / 2, 0, height - side))
        images.append(draw(scene, places, side, side, left, top))
    return to_tensor(images)


def whole(rng: np.random.Generator, batch: int, height: int, width: int) -> Tensor:
    """[batch, 3, height, width] in -1..1, whole scenes."""
    images = []
    for _ in range(batch):
        scene = random_scene(rng, held_out=False)
        images.append(draw(scene, place(scene, height, width, rng), height, width))
    return to_tensor(images)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (stacked * 2 - 1).contiguous(memory_format=torch.channels_last)


def vae_loss(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """(L1 + L2 over pixels, KL per latent value)."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    error = decoded.float() - images
    return error.abs().mean() + error.square().mean(), kl


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, rng: np.random.Generator) -> float:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latents.

    Diffusion starts from N(0, 1), so every channel should have that scale; `scaling_factor` alone
    moves no mean. Measured over whole 256-pixel scenes. Returns 1 / std afterwards, close to 1.
    """
    images = [whole(rng, 8, 256, 256) for _ in range(STANDARDIZED // 8)]
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in images])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    into.bias[:4] -= mean
    into.bias[:4] /= std
    into.weight[:4] /= std[:, None, None, None]
    into.bias[4:] -= 2 * std.log()
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    return 1 / torch.cat([vae.encode(batch).latent_dist.mean for batch in images]).std().item()


def train(
    out: Path, minutes: float, seed: int, lr: float, decoder_only: bool, log_every: int = 50
) -> None:
    """Train from scratch, or on from what is in `out`; `decoder_only` leaves the latents alone."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = build_vae()
    if (out / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(out)
    vae.to(memory_format=torch.channels_last)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    ema = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = min((time.monotonic() - start) / (60 * minutes), 1.0)
        rate = lr * min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if rng.random() < 0.1 + 0.3 * done**2:
            batch, side = WHOLE[int(rng.random() < 0.2 * done)]
            images = whole(rng, batch, side, side)
        else:
            images = crops(rng, *CROPS[int(rng.random() < 0.5)])
        distance, kl = vae_loss(vae, images)
        optimizer.zero_grad()
        (distance + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        for name, value in vae.state_dict().items():
            ema[name].lerp_(value, min(0.01, 1 / (step + 1)) if step < 100 else 0.01)
        step += 1
        if step % log_every == 0:
            seconds = time.monotonic() - start
            print(f"{step} {seconds:.0f}s distance {distance:.4f} kl {kl:.3f}", flush=True)
        if step % (10 * log_every) == 0:
            vae.save_pretrained(out)
    vae.load_state_dict(ema)
    vae.eval()
    if not decoder_only:
        factor = round(standardize_latents(vae, rng), 5)
        vae.register_to_config(scaling_factor=factor)
    vae.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/vae"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    train(args.out, args.minutes, args.seed, args.lr, args.decoder_only)


if __name__ == "__main__":
    main()
