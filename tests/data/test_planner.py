"""The stage planner's arithmetic, by hand; and encoder FLOPs against published figures."""

from __future__ import annotations

import json

import pytest

from pixart_rt.data.planner import (
    Choice,
    Rates,
    Stage,
    decide,
    duration,
    encoder_flops,
    feature_bytes,
    size,
)
from pixart_rt.data.probe import make_plan
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.model.text_encoder import T5_XXL
from pixart_rt.model.vae import SD_VAE

RATES = Rates(vae=100, text=25, read=200, write_bytes=1e6)  # 0.05 s to encode, 0.005 to read


def stage(**changes: object) -> Stage:
    given = {"images": 3600, "epochs": 2.0, "resolution": 256, "bytes_per_image": 1e4}
    return Stage(**{**given, **changes})


def test_hours_by_hand():
    decision = decide(stage(flops_per_image=2e12), RATES)
    assert decision.store_hours == pytest.approx(0.05 + 0.01)
    assert decision.write_hours == pytest.approx(0.01)
    assert decision.online_hours == pytest.approx(2 * 0.05)
    assert decision.store_bytes == 3600 * 1e4
    assert (decision.store_flops, decision.online_flops) == (3600 * 2e12, 7200 * 2e12)
    assert decision.break_even_epochs == pytest.approx(1.2)
    assert decision.choice is Choice.STORE


@pytest.mark.parametrize(
    ("epochs", "choice"), [(0.44, "online"), (1, "online"), (1.19, "online"), (1.21, "store"),
                           (171, "store")],
)  # fmt: skip
def test_the_choice_turns_at_break_even(epochs, choice):
    decision = decide(stage(epochs=epochs), RATES)
    assert decision.choice == choice
    cheaper = min(decision.store_hours, decision.online_hours)
    assert cheaper == (decision.store_hours if choice == "store" else decision.online_hours)


def test_a_store_that_does_not_fit_is_no_choice():
    decision = decide(stage(epochs=171, free_bytes=1e7), RATES)
    assert decision.choice is Choice.ONLINE
    assert decision.reason.startswith("a store of 36 MB does not fit into 10 MB")


def test_slow_reading_stalls_both_sides():
    slow = Rates(vae=100, text=25, read=5, write_bytes=1e6)  # 0.2 s to read
    decision = decide(stage(), slow)
    assert decision.store_hours == pytest.approx(0.2 + 0.01)
    assert decision.online_hours == pytest.approx(2 * 0.2)
    training = Rates(vae=100, text=25, read=5, write_bytes=1e6, train=10)  # hides 0.1 s of it
    assert decide(stage(), training).online_hours == pytest.approx(2 * (0.05 + 0.05))


def test_the_arithmetic_shows_its_figures():
    decision = decide(stage(flops_per_image=2e12), Rates(vae=100, text=25, read=200,
                                                         write_bytes=1e6, train=40))  # fmt: skip
    text = "\n".join(decision.arithmetic)
    for figure in ("1/100 + 1/25 = 0.05 s", "3600 x 2 epochs x 0.05 s = 0.1 h", "36 MB",
                   "1.2 epochs", "200%"):  # fmt: skip
        assert figure in text
    json.dumps(decision.to_dict())


def test_what_cannot_be_is_refused():
    for changes in ({"images": 0}, {"epochs": 0.0}, {"resolution": 300}, {"bytes_per_image": 0}):
        with pytest.raises(ConfigError):
            stage(**changes)
    with pytest.raises(ConfigError, match="vae must be more than 0"):
        Rates(vae=0, text=1, read=1, write_bytes=1)


@pytest.mark.parametrize(("resolution", "tera"), [(256, 0.27), (512, 1.12), (1024, 4.88)])
def test_flops_of_the_published_encoders(resolution, tera):
    """Known figures: SD's VAE encoder 0.27, 1.12 and 4.88 TFLOP, T5-XXL 1.12 at 120 tokens."""
    vae, text = encoder_flops(SD_VAE, T5_XXL, resolution, 120)
    assert vae / 1e12 == pytest.approx(tera, abs=0.005)
    assert text / 1e12 == pytest.approx(1.12, abs=0.005)


def test_feature_bytes_are_what_a_store_holds(pictures, store, extraction):
    assert feature_bytes(256, 120) == 2 * (2 * 4 * 32 * 32 + 120 * 4096)
    plan = make_plan(extraction(pictures, store.parent / "elsewhere"), num_probed=12)
    # all but the file's own bookkeeping, 3 KB a sample at most for so few and small ones
    exact = feature_bytes(256, 17, text_width=128)
    assert exact < plan.bytes_per_image < exact + 3000


def test_a_plan_measures_and_writes_nothing(pictures, tmp_path, extraction):
    made = extraction(pictures, tmp_path / "store")
    plan = make_plan(made, num_probed=5)
    assert not list(tmp_path.iterdir())
    assert (plan.images, plan.images_left, plan.shards, plan.probed) == (12, 12, 3, 5)
    rates = (plan.vae_per_second, plan.text_per_second, plan.read_per_second)
    assert min(rates) > 0
    assert plan.images_per_second <= min(plan.vae_per_second, plan.text_per_second)
    assert plan.hours == pytest.approx(12 / plan.images_per_second / 3600)
    assert "images: 12; 3 shards" in plan.lines()


def test_a_plan_of_a_store_that_is_half_made(pictures, tmp_path, extraction):
    made = extraction(pictures, tmp_path / "store")
    made.run()
    (tmp_path / "store" / "shard-00001.parquet").unlink()
    plan = make_plan(extraction(pictures, tmp_path / "store"), num_probed=3)
    assert plan.images_left == 5
    assert plan.lines()[0] == "images: 12, 7 of them done; 3 shards"


def test_a_probe_reports_unreadable_images(tmp_path, draw_images, extraction):
    images = draw_images(tmp_path / "images", 4)
    (images / "0003.png").write_bytes(b"x")
    plan = make_plan(extraction(images, tmp_path / "store"), num_probed=4)
    assert (plan.probed, plan.skipped) == (3, 1)
    assert "unreadable: 1 of the 4 probed" in plan.lines()
    for path in images.glob("0*"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="none of 4 probed"):
        make_plan(extraction(images, tmp_path / "store"), num_probed=4)


def test_units():
    assert [size(n) for n in (999, 2.5e6, 19.7e12)] == ["999 B", "2.5 MB", "19.7 TB"]
    assert [duration(n) for n in (3, 120, 9000)] == ["3 seconds", "2 minutes", "2.5 hours"]
