"""How far two sets of images are apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from pixart_rt.bench.agreement import differences, worst


def image(value: int, size: tuple[int, int] = (5, 3)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_differences_are_the_worst_pairs() -> None:
    found = differences([image(10), image(100)], [image(10), image(97)])
    assert found["max_abs"] == 3 and found["mean_abs"] == 3
    assert found["psnr_db"] == pytest.approx(20 * math.log10(255 / 3))
    assert differences([image(255)], [image(0)])["psnr_db"] == 0, "bytes must not wrap around"


FAR = differences([image(0)], [image(200)])  # 2.1 dB
SAME = differences([image(7)], [image(7)])


def test_equal_images_are_written_without_infinity() -> None:
    found = differences([image(7)], [image(7)])
    assert found == {"psnr_db": math.inf, "mean_abs": 0, "max_abs": 0}
    assert worst([SAME], [FAR], 40.0) == {
        "images": 1, "bound_psnr_db": 40.0, "psnr_db": None, "mean_abs": 0, "max_abs": 0,
        "unrelated_psnr_db": FAR["psnr_db"], "agrees": True,
    }  # fmt: skip


def test_one_bad_pair_is_enough() -> None:
    assert worst([SAME, FAR], [FAR], 1.0)["agrees"] is False, "no closer than different images"
    assert worst([SAME, FAR], [{**FAR, "psnr_db": 2.0}], 2.1)["agrees"] is True
    assert worst([SAME, FAR], [{**FAR, "psnr_db": 2.0}], 2.2)["agrees"] is False


def test_a_model_that_always_draws_the_same_proves_nothing() -> None:
    found = worst([SAME], [SAME], 40.0)
    assert found["agrees"] is False and found["unrelated_psnr_db"] is None


def test_noise_is_not_an_image() -> None:
    """Unrelated images are far below every bound in use."""
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in "ab"]
    assert differences(noise[:1], noise[1:])["psnr_db"] < 10


@pytest.mark.parametrize("theirs", [[], [image(1, (3, 5))]])
def test_other_sizes_are_refused(theirs: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        differences([image(1)], theirs)
