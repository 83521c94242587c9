"""Two ranks train a ControlNet under FSDP, one without: run by test_controlnet.py.

    python sharded_controlnet.py OUT        with torchrun's variables, or alone

Writes the losses of two steps, by sample, to OUT/RANK.json and, from rank 0, the whole weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from pixart_rt.config import Precision
from pixart_rt.data.batch import Batch
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.run_settings import Checkpointing, Parallel, RunSettings
from pixart_rt.training.trainer import Trainer
from tests.training.objectives.test_controlnet import batch_of, objective_of


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with start_ranks("cpu") as ranks:

        def feed(start: int, stop: int) -> Iterator[Batch]:
            for step in range(start, stop):
                whole = batch_of((20, 37)[step % 2], torch.float32).rows(0, 2)
                yield whole.rows(ranks.rank, ranks.rank + 1) if ranks.num_ranks == 2 else whole

        settings = RunSettings(
            steps=2, lr=1e-3, precision=Precision.FP32, micro_batches=2, clip_norm=1.0,
            parallel=Parallel.FSDP, checkpointing=Checkpointing.FULL, save_every=1,
        )  # fmt: skip
        objective = objective_of("chained").float()
        trainer = Trainer(objective, feed, settings, out / "run", ranks)
        losses = [trainer.step(batch).losses["loss"].tolist() for batch in feed(0, 2)]
        weights = trainer.weights(average=False)
        (out / f"{ranks.rank}.json").write_text(json.dumps(losses))
        if ranks.is_first:
            torch.save(weights, out / "weights.pt")


if __name__ == "__main__":
    main()
