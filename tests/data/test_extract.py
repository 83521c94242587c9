"""Extraction: what a store holds, what is skipped, and that a kill costs the open shard only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pixart_rt.buckets import buckets, nearest_bucket
from pixart_rt.config import Precision
from pixart_rt.data import extract as extract_module
from pixart_rt.data.crop import fit, open_rgb
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder, family_text_tokens
from pixart_rt.data.extract import ExtractConfig
from pixart_rt.data.manifest import EMPTY_PROMPT, INDEX, MANIFEST, StoreManifest, shard_name
from pixart_rt.data.sample import bfloat16_from_bytes
from pixart_rt.data.shard import SCHEMA, Record, Skipped, read_shard, write_shard
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import CheckpointError, ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="it writes the data sets that are extracted")


def contents(store: Path) -> dict[str, bytes]:
    """The store's files but the manifest, which holds a date."""
    return {
        path.name: path.read_bytes()
        for path in store.iterdir()
        if path.is_file() and path.name != MANIFEST
    }


def test_a_store_holds_what_the_encoders_gave(pictures, store, encoder, sizes):
    """The oracle: each image alone through crop, VAE and T5."""
    features = FeatureStore(store)
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    assert len(features) == len(lines) == 12
    for sample, line in enumerate(lines):
        bucket = nearest_bucket(256, *sizes[sample % len(sizes)])
        assert features.buckets[features.bucket_of[sample]] == bucket
        assert features.original_size(sample) == sizes[sample % len(sizes)]
        alone = encoder.moments([fit(open_rgb(pictures / line["file_name"]), bucket).pixels])[0]
        kept = features.moments(sample)
        assert kept.shape == (2, 4, bucket.height // 8, bucket.width // 8)
        # float16 keeps 11 bits; alone, float32 sums in another order, and is itself 3e-4 from
        # float64 on this VAE, whose means reach 5
        torch.testing.assert_close(kept.float(), alone, rtol=1e-3, atol=1e-3)
        (text,), _ = encoder.text([line["text"]])
        assert features.text(sample).shape == text.shape
        torch.testing.assert_close(features.text(sample), text, rtol=2**-7, atol=1e-2)  # bf16
    torch.testing.assert_close(features.empty_prompt, encoder.text([""])[0][0])


def test_text_features_do_not_depend_on_the_padding(encoder):
    """A batch is padded to its longest caption; T5 at the model's 120 tokens is the oracle."""
    captions = ["a red circle", "two green triangles and a small yellow star in a row", ""]
    features, cuts = encoder.text(captions)
    tokens = encoder.tokenizer(captions)
    padded = encoder.text_encoder(tokens.input_ids, tokens.attention_mask)
    for row, feature in enumerate(features):
        expected = padded[row, : len(feature)]
        torch.testing.assert_close(feature.float(), expected, rtol=2**-7, atol=1e-2)  # bf16
        assert len(feature) == int(tokens.attention_mask[row].sum())
    assert cuts == [0, 0, 0]


def test_datasets_reads_the_shards(pictures, store, tmp_path):
    files = sorted(str(path) for path in store.glob("shard-*.parquet"))
    table = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path)
    )
    features = FeatureStore(store)
    assert table.column_names == SCHEMA.names
    assert len(table) == 12
    for sample in (0, 4, 5, 11):
        row = table[sample]
        shape = (2, 4, row["height"] // 8, row["width"] // 8)
        latents = np.frombuffer(row["latents"], "<f2").reshape(shape)
        np.testing.assert_array_equal(latents, features.moments(sample).numpy())
        text = bfloat16_from_bytes(row["prompt_embeds"], features.manifest.text_width)
        assert torch.equal(text, features.text(sample))
        assert row["num_tokens"] == len(text)
        assert row["source"] == sample
        line = json.loads((pictures / "metadata.jsonl").read_text().splitlines()[sample])
        assert (row["file_name"], row["caption"]) == (line["file_name"], line["text"])


def test_offsets_are_right_where_values_repeat(tmp_path):
    """Equal latents, latents that begin like the text before them, and more than a row group."""
    rng = np.random.default_rng(0)
    same = rng.bytes(300)
    records = [
        Record(file_name=f"{i}", source=i, caption="c", num_tokens=1 + i % 3, num_tokens_cut=0,
               bucket=0, size=(16, 16), original_size=(9, 9), crop=(0.0, 0.0, 9.0, 9.0),
               latents=same if i % 2 else same[:64] + rng.bytes(236),
               prompt_embeds=same[: 10 * (1 + i % 3)])
        for i in range(150)
    ]  # fmt: skip
    write_shard(tmp_path / "s.parquet", records, [Skipped(150, None, "r")])
    rows, skipped = read_shard(tmp_path / "s.parquet")
    data = (tmp_path / "s.parquet").read_bytes()
    for row, record in zip(rows, records, strict=True):
        latents, text = int(row["latents_at"]), int(row["text_at"])
        assert data[latents : latents + 300] == record.latents
        assert data[text : text + len(record.prompt_embeds)] == record.prompt_embeds
    assert skipped == [Skipped(150, None, "r")]
    assert pq.read_table(tmp_path / "s.parquet")["latents"].to_pylist() == [
        record.latents for record in records
    ]


def test_unreadable_images_are_listed_and_skipped(tmp_path, extraction, draw_images, sizes):
    images = draw_images(tmp_path / "images", 8)
    (images / "0001.png").write_bytes(b"no picture")
    (images / "0002.jpg").unlink()
    whole = (images / "0007.png").read_bytes()
    (images / "0007.png").write_bytes(whole[: len(whole) // 3])
    lines = (images / "metadata.jsonl").read_text().splitlines()
    (images / "metadata.jsonl").write_text("\n".join([*lines[:5], "{broken", *lines[5:]]))
    manifest = extraction(images, tmp_path / "store", shard_images=3).run()
    assert (manifest.complete, manifest.num_images, manifest.num_samples) == (True, 9, 5)
    reports = [
        json.loads(line) for line in (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [(each["line"], each["file_name"]) for each in reports] == [
        (2, "0001.png"), (3, "0002.jpg"), (6, None), (9, "0007.png"),
    ]  # fmt: skip
    assert "no image" in reports[0]["reason"]
    assert "no such file" in reports[1]["reason"]
    assert "not JSON" in reports[2]["reason"]
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 5
    assert store.damaged() == []
    assert [store.original_size(i) for i in range(5)] == [sizes[k] for k in (0, 3, 4, 5, 6)]


def test_nothing_readable_is_an_error(tmp_path, extraction, draw_images):
    images = draw_images(tmp_path / "images", 2)
    for path in images.glob("0*"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 2 images could be read"):
        extraction(images, tmp_path / "store").run()


def test_square_cuts_every_image_to_one_bucket(pictures, tmp_path, extraction):
    extraction(pictures, tmp_path / "store", square=True).run()
    store = FeatureStore(tmp_path / "store")
    assert [(bucket.height, bucket.width) for bucket in store.buckets] == [(256, 256)]
    assert set(store.bucket_of) == {0}
    assert store.load(range(12), seed=0, step=0).latents.shape == (12, 4, 32, 32)


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_the_table_is_the_40_buckets(resolution):
    assert ExtractConfig(resolution=resolution).table == buckets(resolution)


@pytest.mark.parametrize("side", [16, 128, 256])
def test_squares_may_have_any_side_of_whole_tokens(side):
    (bucket,) = ExtractConfig(resolution=side, square=True).table
    assert (bucket.height, bucket.width, bucket.ratio) == (side, side, 1.0)


def test_a_caption_longer_than_the_model_reads_is_counted(
    tmp_path, extraction, caplog, draw_images
):
    images = draw_images(tmp_path / "images", 2)
    lines = [{"file_name": "0000.jpg", "text": "a red circle " * 100},
             {"file_name": "0001.png", "text": "a red circle"}]  # fmt: skip
    (images / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    extraction(images, tmp_path / "store").run()
    table = pq.read_table(tmp_path / "store" / shard_name(0), columns=["num_tokens_cut", "caption"])
    assert table["num_tokens_cut"][0].as_py() > 100
    assert table["num_tokens_cut"][1].as_py() == 0
    assert table["caption"].to_pylist() == [line["text"] for line in lines]
    assert FeatureStore(tmp_path / "store").num_tokens[0] == 120


def test_a_second_run_makes_nothing(store, pictures, extraction, monkeypatch):
    before = contents(store)
    monkeypatch.setattr(extract_module.Extraction, "_make", lambda *rest: pytest.fail("made again"))
    assert extraction(pictures, store).run().complete
    assert contents(store) == before


def test_a_lost_shard_is_made_again_just_as_it_was(pictures, tmp_path, extraction):
    extraction(pictures, tmp_path / "store").run()
    before = contents(tmp_path / "store")
    (tmp_path / "store" / shard_name(1)).unlink()
    with pytest.raises(DataError, match=r"lacks 1 of its shards, first shard-00001\.parquet"):
        FeatureStore(tmp_path / "store")
    assert extraction(pictures, tmp_path / "store").run().complete
    assert contents(tmp_path / "store") == before


def test_a_lost_index_is_joined_again(pictures, tmp_path, extraction):
    extraction(pictures, tmp_path / "store").run()
    before = contents(tmp_path / "store")
    (tmp_path / "store" / INDEX).unlink()
    (tmp_path / "store" / EMPTY_PROMPT).unlink()
    with pytest.raises(DataError, match=r"index\.npy cannot be read .* extract` that made the"):
        FeatureStore(tmp_path / "store")
    extraction(pictures, tmp_path / "store").run()
    assert contents(tmp_path / "store") == before


def test_a_shard_of_another_program_is_refused(pictures, tmp_path, extraction):
    """Such as one that `datasets` wrote anew, in which nobody knows where the samples lie."""
    extraction(pictures, tmp_path / "store").run()
    path = tmp_path / "store" / shard_name(0)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    (tmp_path / "store" / INDEX).unlink()
    with pytest.raises(DataError, match=r"shard-00000\.parquet is no shard that pixart-rt wrote"):
        extraction(pictures, tmp_path / "store").run()


def test_what_a_killed_process_left_is_no_obstacle(pictures, tmp_path, extraction):
    (tmp_path / "store" / ".manifest.json.x1").mkdir(parents=True)
    (tmp_path / "store" / ".shard-00000.parquet.part").write_bytes(b"half")
    assert extraction(pictures, tmp_path / "store").run().complete


def test_half_precision_is_close(pictures, encoder):
    """bfloat16 keeps 8 bits; a store of it differs from float32's by a per cent or so."""
    config = EncoderConfig(model="tiny", precision=Precision.BF16, text_precision=Precision.BF16)
    half = FeatureEncoder.open(config, torch.device("cpu"))
    pixels = [fit(open_rgb(pictures / "0000.jpg"), buckets(256)[20]).pixels]
    (exact,), (close,) = encoder.moments(pixels), half.moments(pixels)
    assert (close[0] - exact[0]).norm() < 0.05 * exact[0].norm()
    (text,), _ = encoder.text(["a red circle"])
    (rounded,), _ = half.text(["a red circle"])
    assert (rounded.float() - text.float()).norm() < 0.05 * text.float().norm()
    assert half.identity != encoder.identity


def test_the_prompt_length_is_the_pipelines(tmp_path):
    assert family_text_tokens(tmp_path) == 120
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    assert family_text_tokens(tmp_path) == 300
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_pixart_rt_max_text_tokens": 77}')
    assert family_text_tokens(tmp_path) == 77


def test_a_model_without_encoders_is_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(CheckpointError, match="has no text_encoder, tokenizer"):
        FeatureEncoder.open(EncoderConfig(model=str(tmp_path)), torch.device("cpu"))


def test_another_data_set_or_option_is_refused(pictures, store, extraction, tmp_path, draw_images):
    with pytest.raises(DataError, match="begun with another resolution"):
        extraction(pictures, store, resolution=512).run()
    with pytest.raises(DataError, match="begun with another caption_column"):
        extraction(pictures, store, column="other").run()
    other = draw_images(tmp_path / "other", 12, seed=1)
    with pytest.raises(DataError, match="begun with another images"):
        extraction(other, store).run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="is no feature store"):
        extraction(pictures, tmp_path / "mine").run()
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_settings_that_cannot_be_are_refused():
    for settings in (
        {"resolution": 300},
        {"resolution": 300, "square": True},
        {"batch": 0},
        {"threads": -1},
        {"shard_images": 10**6},
    ):
        with pytest.raises(ConfigError):
            ExtractConfig(**settings)


def test_overflow_stops_instead_of_storing_infinities(pictures, tmp_path, extraction, monkeypatch):
    made = extraction(pictures, tmp_path / "store")
    monkeypatch.setattr(
        made.encoder, "moments", lambda pixels: torch.full((len(pixels), 2, 4, 32, 32), 7e4)
    )
    with pytest.raises(DataError, match="beyond fp16"):
        made.run()
    assert not list((tmp_path / "store").glob("shard-*"))


CHILD = """
import sys
import time

import torch

from pathlib import Path
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder
from pixart_rt.data.extract import ExtractConfig, Extraction
from pixart_rt.data.folder import ImageFolder

images, store = Path(sys.argv[1]), Path(sys.argv[2])
encoder = FeatureEncoder.open(EncoderConfig(model="tiny"), torch.device("cpu"))
config = ExtractConfig(shard_images=4, batch=3, threads=2)
print("ready", flush=True)
sys.stdin.readline()
def progress(name, done, total):
    print(name, done, total, flush=True)
    time.sleep(600 if done == int(sys.argv[4]) else float(sys.argv[3]))
print(Extraction(ImageFolder(images), store, encoder, config, "tiny").run(progress).complete)
"""


def start(images: Path, store: Path, pause: float, hang_at: int = -1) -> subprocess.Popen[str]:
    """A process that pauses after every image, and after `hang_at` images for ever."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(images), str(store), str(pause), str(hang_at)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def go(*children: subprocess.Popen[str]) -> None:
    """Begin at the same time, however long each took to import."""
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()


def test_after_kill_9_only_the_open_shard_is_lost(tmp_path, draw_images, extraction):
    """A real process, killed inside its third shard; then the same command, not interrupted."""
    images = draw_images(tmp_path / "images", 18)
    store = tmp_path / "store"
    child = start(images, store, 0, hang_at=10)  # two images into the third of shards of four
    go(child)
    while child.stdout.readline() != "shard 3 of 5 10 18\n":
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in store.glob("shard-*")}
    assert sorted(kept) == [shard_name(0), shard_name(1)]
    assert not StoreManifest.read(store).complete
    with pytest.raises(DataError, match="is not finished"):
        FeatureStore(store)

    assert extraction(images, store, shard_images=4).run().complete
    for name, written in kept.items():
        assert (store / name).stat().st_mtime_ns == written, "a whole shard was made again"
    extraction(images, tmp_path / "at-once", shard_images=4).run()
    assert contents(store) == contents(tmp_path / "at-once")
    assert FeatureStore(store).damaged() == []


def test_two_processes_share_the_work(tmp_path, draw_images):
    images = draw_images(tmp_path / "images", 12)
    store = tmp_path / "store"
    children = [start(images, store, 0.1) for _ in range(2)]
    go(*children)
    outputs = [child.communicate()[0] for child in children]
    made = [{line.split()[1] for line in out.splitlines() if " of 3 " in line} for out in outputs]
    assert made[0] | made[1] == set("123")
    assert made[0] and made[1]
    assert not made[0] & made[1], "a shard was made twice"
    assert "True" in [out.splitlines()[-1] for out in outputs]
    assert FeatureStore(store).damaged() == []
    assert len(FeatureStore(store)) == 12
