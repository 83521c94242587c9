"""Pre-train the tiny T5 encoder: every token must tell what its noun phrase and the scene are.

    python -m examples.tiny.train_text --minutes 4 --out runs/tiny/text_encoder

PixArt-alpha keeps a pre-trained text encoder frozen; a tiny one has to be pre-trained first.
Linear heads read from each token of a noun phrase its colour, shape, size and place (which of how
many, in a row or a column), and from every token the background. The heads are thrown away. Colour
and shape are bound in the text encoder, where it is cheap; the transformer learns to draw.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from examples.tiny.scenes import (
    BACKGROUNDS,
    PALETTE,
    SHAPES,
    SIZES,
    Scene,
    caption,
    random_scene,
)

WIDTH, BATCH = 128, 128
PLACES = [(1, "row", 0)] + [
    (count, direction, index)
    for count in (2, 3)
    for direction in ("row", "column")
    for index in range(count)
]
LABELS: dict[str, list[Any]] = {
    "color": list(PALETTE),
    "shape": list(SHAPES),
    "size": list(SIZES),
    "place": PLACES,
    "background": list(BACKGROUNDS),
}
IGNORE = -100


def build_text_encoder(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=WIDTH,
            d_ff=2 * WIDTH,
            d_kv=32,
            num_heads=4,
            num_layers=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            use_cache=False,
        )
    )


def noun_spans(scene: Scene, text: str) -> list[tuple[int, int]]:
    """Where in `text` each thing of the scene is named: [start, end) characters, in scene order."""
    order = list(range(len(scene.things)))
    if " below " in text or " to the right of " in text:
        order.reverse()
    spans, cursor = {}, 0
    for index in order:
        phrase = scene.things[index].phrase()
        start = text.index(phrase, cursor)
        cursor = start + len(phrase)
        spans[index] = (start, cursor)
    return [spans[index] for index in range(len(scene.things))]


def labelled(
    scene: Scene, text: str, pieces: sentencepiece.SentencePieceProcessor
) -> tuple[list[int], dict[str, list[int]]]:
    """Token ids with </s>, and for each of LABELS the class of each token or IGNORE."""
    proto = pieces.encode(text, return_type="proto").pieces
    ids = [piece.id for piece in proto] + [pieces.eos_id()]
    labels = {name: [IGNORE] * len(ids) for name in LABELS}
    labels["background"] = [LABELS["background"].index(scene.background)] * len(ids)
    direction = scene.direction if len(scene.things) > 1 else "row"
    for index, (start, end) in enumerate(noun_spans(scene, text)):
        thing = scene.things[index]
        where = PLACES.index((len(scene.things), direction, index))
        for position, piece in enumerate(proto):
            if piece.end > start and piece.begin < end:
                labels["color"][position] = LABELS["color"].index(thing.color)
                labels["shape"][position] = LABELS["shape"].index(thing.shape)
                labels["size"][position] = LABELS["size"].index(thing.size)
                labels["place"][position] = where
    return ids, labels


def batch(
    rng: np.random.Generator, size: int, pieces: sentencepiece.SentencePieceProcessor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(ids [B, L], mask [B, L], labels of [B, L]), padded to the longest caption."""
    rows = []
    for _ in range(size):
        scene = random_scene(rng, held_out=False)
        rows.append(labelled(scene, caption(scene, rng), pieces))
    ids, mask = pad([row[0] for row in rows])
    targets = {name: pad([row[1][name] for row in rows], IGNORE)[0] for name in LABELS}
    return ids, mask, targets


def pad(rows: list[list[int]], value: int = 0, multiple: int = 8) -> tuple[Tensor, Tensor]:
    """(rows [B, L] padded with `value` to a multiple, mask [B, L])."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    padded = torch.full((len(rows), length), value)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return padded, mask


def train(tokenizer: Path, out: Path, minutes: float, seed: int, lr: float) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "spiece.model"))
    encoder = build_text_encoder(len(pieces) + 100)  # T5's 100 sentinels
    if (out / "config.json").exists():
        encoder = T5EncoderModel.from_pretrained(out)
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in LABELS.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = min((time.monotonic() - start) / (60 * minutes), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * done))
        ids, mask, targets = batch(rng, BATCH, pieces)
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden + 0.1 * torch.randn_like(hidden)  # keeps the classes well apart
        losses = {
            name: F.cross_entropy(head(hidden).flatten(0, 1), targets[name].flatten())
            for name, head in heads.items()
        }
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            shown = " ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
            print(f"{step} {time.monotonic() - start:.0f}s {shown}", flush=True)
    encoder.eval().save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tiny/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/text_encoder"))
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    train(args.tokenizer, args.out, args.minutes, args.seed, args.lr)


if __name__ == "__main__":
    main()
