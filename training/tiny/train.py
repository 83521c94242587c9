"""Train the tiny transformers in stages: 128 and 256 pixels, then 1024-MS on buckets of sizes.

    python -m pixart_rt.training.tiny.train 256 --init runs/tiny/128 --out runs/tiny/256

The text encoder stays frozen, as in PixArt-alpha. The loss is GaussianDiffusion's MSE plus bound.
Timesteps are drawn from u' = s u / (1 + (s - 1) u) with u uniform: at more pixels the same noise
hides less (arXiv:2403.03206, section 5.3.2), and the layout is settled where little is visible.
A stage ends with a cosine to zero; the average of the weights (EMA) is what is kept.
"""

import argparse
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel

from pixart_rt.buckets import buckets
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.tiny.latents import LatentStore
from pixart_rt.training.tiny.scenes import Scene, caption
from pixart_rt.training.tiny.train_text import pad

CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.99
PROMPT_TOKENS = 32  # longer than any caption; the mask makes more padding equal


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What one stage trains on, and how."""

    sizes: tuple[tuple[int, int], ...]  # pixels
    batch: int
    minutes: float
    lr: float
    shift: float  # s above
    multiscale: bool = False  # 1024-MS: micro-conditioning and finer positions


def bucket_sizes(resolution: int) -> tuple[tuple[int, int], ...]:
    return tuple((bucket.height, bucket.width) for bucket in buckets(resolution))


STAGES = {
    "128": Stage(sizes=((128, 128),), batch=48, minutes=13, lr=2e-3, shift=2.5),
    "256": Stage(sizes=((256, 256),), batch=16, minutes=24.5, lr=2.2e-3, shift=1.5),
    "ms256": Stage(
        sizes=bucket_sizes(256), batch=16, minutes=4, lr=1e-3, shift=2.5, multiscale=True
    ),
    "ms512": Stage(
        sizes=bucket_sizes(512), batch=4, minutes=5, lr=8e-4, shift=3.5, multiscale=True
    ),
    "ms1024": Stage(
        sizes=bucket_sizes(1024), batch=1, minutes=8, lr=4e-4, shift=5, multiscale=True
    ),
}


def build_transformer(
    multiscale: bool, heads: int = 2, layers: int = 8, caption_channels: int = 128
) -> PixArtTransformer2DModel:
    """Positions run over 0..16 at every size: base 16 at 256 pixels, 64 scaled by 4 at 1024."""
    return PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=72,
        num_layers=layers,
        cross_attention_dim=heads * 72,
        caption_channels=caption_channels,
        sample_size=128 if multiscale else 32,
        interpolation_scale=4 if multiscale else 1,
        use_additional_conditions=multiscale,
    )


def init_weights(model: PixArtTransformer2DModel) -> None:
    """DiT's start: zero gates and output, so that every block begins as the identity."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "scale_shift_table" not in name:
            torch.nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    torch.nn.init.zeros_(model.proj_out.weight)


def fork(model: PixArtTransformer2DModel, source: Path) -> None:
    """Start from another stage's weights; new size embedders begin by adding nothing."""
    weights = PixArtTransformer2DModel.from_pretrained(source).state_dict()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    if missing:
        for embedder in ("resolution_embedder", "aspect_ratio_embedder"):
            last = getattr(model.adaln_single.emb, embedder).linear_2
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)


class TextCache:
    """Captions to T5 embeddings, dropping one in ten to the empty prompt."""

    def __init__(self, tokenizer: Path, encoder: Path) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(
            model_file=str(tokenizer / "spiece.model")
        )
        self.encoder = T5EncoderModel.from_pretrained(encoder).eval()

    @torch.no_grad()
    def encode(self, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(embeddings [B, PROMPT_TOKENS, C], mask [B, PROMPT_TOKENS]) of random phrasings."""
        texts = ["" if rng.random() < CAPTION_DROPOUT else caption(s, rng) for s in scenes]
        rows = [[*self.pieces.encode(text), self.pieces.eos_id()] for text in texts]
        ids, mask = pad(rows, multiple=PROMPT_TOKENS)
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask.float()


def loss_of(
    model: PixArtTransformer2DModel,
    diffusion: GaussianDiffusion,
    store: LatentStore,
    latents: Tensor,
    text: tuple[Tensor, Tensor],
    shift: float,
) -> dict[str, Tensor]:
    """The losses [B] of one batch at random timesteps."""
    batch, device = len(latents), latents.device
    u = torch.rand(batch, device=device)
    t = (shift * u / (1 + (shift - 1) * u) * diffusion.num_timesteps).long()
    noise = torch.randn_like(latents)
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.config.use_additional_conditions:
        size = torch.tensor([[store.height, store.width]], dtype=torch.float32, device=device)
        sizes = {
            "resolution": size.expand(batch, 2),
            "aspect_ratio": (size[:, :1] / size[:, 1:]).expand(batch, 1),
        }
    with torch.autocast(device.type, torch.bfloat16):
        output = model(
            diffusion.q_sample(latents, t, noise),
            encoder_hidden_states=text[0],
            encoder_attention_mask=text[1],
            timestep=t,
            added_cond_kwargs=sizes,
        ).sample
    return diffusion.training_losses(output, latents, t, noise)


class Run:
    """Weights, their average, the optimizer and the clock; all of it on disk every few minutes."""

    def __init__(self, model: PixArtTransformer2DModel, stage: Stage, out: Path) -> None:
        self.model, self.stage, self.out = model, stage, out
        self.average = {name: value.clone() for name, value in model.state_dict().items()}
        inner = {
            name: p
            for name, p in model.named_parameters()
            if name.startswith("transformer_blocks") and "table" not in name and p.dim() == 2
        }
        outer = [p for name, p in model.named_parameters() if name not in inner]
        self.optimizers = [
            torch.optim.Muon(
                inner.values(), lr=stage.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(outer, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step, self.seconds = 0, 0.0
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", weights_only=True)
            model.load_state_dict(state["model"])
            self.average = state["average"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def done(self) -> float:
        return min(self.seconds / (60 * self.stage.minutes), 1.0)

    def update(self, loss: Tensor) -> None:
        rate = self.stage.lr * min(1, (self.step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * self.done))
        self.model.zero_grad()
        loss.backward()
        self.average_over_ranks()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = float(rate)
            optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            values = list(self.model.state_dict().values())
            torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)

    def average_over_ranks(self) -> None:
        """Mean of the gradients, and of the clock so that all ranks stop at the same step."""
        if not dist.is_initialized():
            return
        gradients = [parameter.grad for parameter in self.model.parameters()]
        flat = torch.cat(
            [g.flatten() for g in gradients] + [gradients[0].new_tensor([self.seconds])]
        )
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        self.seconds = flat[-1].item()
        parts = flat[:-1].split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        )

    def save(self) -> None:
        """state.pt to resume from, and the averaged weights as a diffusers transformer."""
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.out / "state.new")
        (self.out / "state.new").rename(self.out / "state.pt")
        self.model.save_pretrained(self.out, state_dict=self.average)


def train(
    stage: Stage,
    model: PixArtTransformer2DModel,
    text: TextCache,
    latents: Path,
    out: Path,
    seed: int,
) -> None:
    """Run a stage to its end, or on from where it stopped."""
    run = Run(model, stage, out)
    device = next(model.parameters()).device
    rank = dist.get_rank() if dist.is_initialized() else 0
    rng = np.random.default_rng([seed, run.step, rank])
    torch.manual_seed(1000 * (seed + run.step) + rank)
    diffusion = GaussianDiffusion()
    stores = [
        LatentStore(latents, *size)
        for size in stage.sizes
        if (latents / f"{size[0]}x{size[1]}.npy").exists()
    ]
    window, before, saved = [], time.monotonic(), run.seconds
    while run.done < 1:
        store = stores[rng.integers(len(stores))]
        batch, scenes = store.sample(rng, stage.batch)
        embeds, mask = (tensor.to(device) for tensor in text.encode(scenes, rng))
        batch = batch.to(device)
        losses = loss_of(model, diffusion, store, batch, (embeds, mask), stage.shift)
        run.update(losses["loss"].mean())
        window.append((losses["mse"].mean().item(), losses["vb"].mean().item()))
        now = time.monotonic()
        run.seconds, before = run.seconds + now - before, now
        if run.step % 50 == 0 and rank == 0:
            mse, vb = np.mean(window, axis=0)
            print(f"{run.step} {run.seconds:.0f}s mse {mse:.4f} vb {vb:.4f}", flush=True)
            window = []
        if run.seconds - saved > 120:
            run.save()
            saved = run.seconds
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--root", type=Path, default=Path("runs/tiny"), help="the other parts")
    parser.add_argument("--init", type=Path, help="start from this transformer's weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="instead of the stage's own")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # started by torchrun: one thread a rank beats many threads in one
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    stage = STAGES[args.stage]
    if args.minutes:
        stage = replace(stage, minutes=args.minutes)
    model = build_transformer(stage.multiscale)
    init_weights(model)
    if args.init:
        fork(model, args.init)
    if args.compile:
        for block in model.transformer_blocks:
            block.compile(dynamic=False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    text = TextCache(args.root / "tokenizer", args.root / "text_encoder")
    train(stage, model.train(), text, args.root / "latents", args.out, args.seed)


if __name__ == "__main__":
    main()
