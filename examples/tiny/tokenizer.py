"""Train the tiny SentencePiece vocabulary and save it as a T5 tokenizer.

    python -m examples.tiny.tokenizer --out runs/tiny/tokenizer

Every caption word becomes one piece; single characters cover the rest of printable ASCII, so any
prompt has ids. Ids follow T5: 0 pads, 1 ends a prompt, 2 is unknown, 100 sentinels at the end.
"""

import argparse
import io
import math
import string
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import T5Tokenizer

from examples.tiny.scenes import caption, random_scene

MAX_TOKENS = 120  # PixArt-alpha's prompt length
CAPTIONS = 20_000  # that it is trained on


def train_sentencepiece(seed: int = 0) -> bytes:
    """The serialized SentencePiece model."""
    rng = np.random.default_rng(seed)
    corpus = [caption(random_scene(rng, held_out=False), rng) for _ in range(CAPTIONS)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=256,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=string.printable.strip(),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return add_words(model.getvalue(), corpus)


def add_words(model: bytes, corpus: list[str]) -> bytes:
    """Give every word of the corpus a piece: on so few words, unigram training keeps fragments."""
    proto = model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    known = {piece.piece for piece in proto.pieces}
    words = Counter("\u2581" + word.strip(",") for text in corpus for word in text.split())
    for word, count in sorted(words.items()):
        if word not in known:
            proto.pieces.add(piece=word, score=math.log(count / words.total()))
    return proto.SerializeToString()


def save_tokenizer(model: bytes, out: Path) -> T5Tokenizer:
    """Write spiece.model and the files of `T5Tokenizer.save_pretrained` into `out`."""
    with tempfile.TemporaryDirectory() as folder:
        # only from_pretrained on a folder keeps the vocabulary; T5Tokenizer(vocab_file=...) not
        (Path(folder) / "spiece.model").write_bytes(model)
        tokenizer = T5Tokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(out)
    (out / "spiece.model").write_bytes(model)
    return T5Tokenizer.from_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/tokenizer"))
    args = parser.parse_args(arguments)
    tokenizer = save_tokenizer(train_sentencepiece(), args.out)
    print(f"{len(tokenizer)} ids in {args.out}")


if __name__ == "__main__":
    main()
