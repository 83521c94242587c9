"""One rank of test_sharded_lcm.py: RANK STORE, two ranks in all, on the CPU.

Distils with the student, its teacher and its target sharded as a run does, and whole, and compares
the losses and all weights. Exits with 0 if they agree.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pixart_rt.buckets import Bucket
from pixart_rt.config import ModelConfig, Precision
from pixart_rt.data.batch import Batch
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.distributed import Spread, spread
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objectives.lcm import ConsistencyDistillation
from pixart_rt.training.process_group import Ranks
from pixart_rt.training.run_settings import Parallel, RunSettings
from pixart_rt.training.sample_rng import draw

CONFIG = ModelConfig(
    num_layers=2, num_heads=1, caption_channels=5, max_text_tokens=4, sample_size=8,
    interpolation_scale=1.0,
)  # fmt: skip


def distil(ranks: Ranks | None) -> tuple[ConsistencyDistillation, list[float]]:
    """The objective after three steps, and its losses."""
    torch.manual_seed(0)
    null = NullText(torch.randn(4, 5), torch.arange(4) < 1)
    objective = ConsistencyDistillation(PixArtTransformer(CONFIG), GaussianDiffusion(), null)
    run = Spread(objective)
    if ranks is not None:
        settings = RunSettings(
            steps=3, lr=0.01, precision=Precision.FP32, micro_batches=2, parallel=Parallel.FSDP
        )
        run = spread(objective, settings, ranks)
    batch = Batch(
        ids=torch.arange(3),
        latents=torch.randn(3, 4, 6, 10),
        prompt_embeds=torch.randn(3, 4, 5),
        prompt_mask=torch.arange(4)[None] < torch.tensor([4, 1, 2])[:, None],
        original_size=torch.tensor([[48.0, 80.0]]).expand(3, 2),
        aspect_ratio=torch.full((3, 1), 0.6),
        bucket=Bucket(ratio=0.6, height=48, width=80),
    )
    trained = [each for each in objective.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)  # AdamW's first steps are signs of roundings
    losses = []
    for step in range(3):
        loss = run(batch, draw(1, step, batch))["loss"].mean()
        loss.backward()
        run.average_replicated()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(torch.zeros(()))
        losses.append(loss.item())
    return objective, losses


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = Ranks(
        rank=rank, num_ranks=2, local_rank=rank, num_local=2, device=torch.device("cpu"),
        writers=dist.new_group(),
    )  # fmt: skip
    (ours, losses), (whole, wanted) = distil(ranks), distil(None)
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=0)
    expected = dict(whole.named_parameters())
    for name, value in ours.named_parameters():
        assert isinstance(value, DTensor), f"{name} is whole on every rank"
        torch.testing.assert_close(value.full_tensor(), expected[name], atol=1e-5, rtol=1e-4)
    student, target = (each.x_embedder.weight for each in (whole.model, whole.target))
    assert (student - whole.teacher.x_embedder.weight).abs().max() > 1e-3
    assert (student - target).abs().max() > 1e-3
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
