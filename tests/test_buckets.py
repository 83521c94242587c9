"""The bucket tables against diffusers' (33 of the 40 sizes) and the paper's properties."""

from collections import Counter

import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)

from pixart_rt.buckets import (
    RESOLUTIONS,
    bucket_for_aspect,
    buckets,
    choose_bucket,
    nearest_bucket,
    token_range,
)
from pixart_rt.errors import ConfigError

DIFFUSERS = {256: ASPECT_RATIO_256_BIN, 512: ASPECT_RATIO_512_BIN, 1024: ASPECT_RATIO_1024_BIN}
TRAINING_ONLY = {0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88}  # diffusers leaves these seven out
SINGLE_COUNTS = {3696, 3712, 3744, 3808, 3872, 3888, 3952, 3968, 4000, 4048, 4080}  # at 1024


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_sizes_are_diffusers_sizes(resolution):
    ours = {bucket.ratio: (bucket.height, bucket.width) for bucket in buckets(resolution)}
    theirs = {
        float(ratio): (int(height), int(width))
        for ratio, (height, width) in DIFFUSERS[resolution].items()
    }
    assert len(ours) == 40
    assert {ratio: ours[ratio] for ratio in theirs} == theirs
    assert set(ours) - set(theirs) == TRAINING_ONLY


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_bucket_keeps_the_rules_of_the_table(resolution):
    for bucket in buckets(resolution):
        assert bucket.height % (resolution // 16) == bucket.width % (resolution // 16) == 0
        assert 0.9 <= bucket.height * bucket.width / resolution**2 <= 1
        assert abs(bucket.ratio - bucket.height / bucket.width) < 0.0051  # rounded to two digits
        rows, columns = bucket.grid
        assert (rows * 16, columns * 16) == (bucket.height, bucket.width)
        assert bucket.num_tokens == rows * columns


def test_token_counts_at_1024():
    """Oracle: the list in the deployment report, 14 distinct counts."""
    counts = Counter(bucket.num_tokens for bucket in buckets(1024))
    assert set(counts) == SINGLE_COUNTS | {3840, 4032, 4096}
    assert (counts[3840], counts[4032], counts[4096]) == (8, 6, 3)


@pytest.mark.parametrize(
    ("resolution", "expected"), [(256, (231, 256)), (512, (924, 1024)), (1024, (3696, 4096))]
)
def test_token_range(resolution, expected):
    assert token_range(resolution) == expected
    assert len({bucket.num_tokens for bucket in buckets(resolution)}) == 14


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("size", [(1024, 1024), (768, 1024), (1080, 1920), (900, 1234), (1, 2)])
def test_nearest_bucket_is_the_one_diffusers_bins_to(resolution, size):
    """None of these sizes is nearest to one of the seven keys that diffusers lacks."""
    expected = PixArtImageProcessor.classify_height_width_bin(*size, DIFFUSERS[resolution])
    found = nearest_bucket(resolution, *size)
    assert (found.height, found.width) == expected


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_bucket_is_nearest_to_itself(resolution):
    for bucket in buckets(resolution):
        assert nearest_bucket(resolution, bucket.height, bucket.width) == bucket


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        ("1:1", (1024, 1024)),
        ("3:2", (832, 1216)),  # landscape: the first number is the width
        ("2:3", (1216, 832)),
        ("16:9", (768, 1344)),
        ("9:16", (1344, 768)),
        ("0.25", (2048, 512)),
        ("4:1", (512, 2048)),
    ],
)
def test_bucket_for_aspect(aspect, size):
    bucket = bucket_for_aspect(1024, aspect)
    assert (bucket.height, bucket.width) == size


@pytest.mark.parametrize(
    "aspect",
    [
        "",
        "wide",
        "3:0",
        "0:3",
        "-1:2",
        "3:2:1",
        "nan",
        "3x2",
        "3:",
        ":2",
        "+3:2",
        " 3:2",
        "3/2",
        "1_0:3",
        "1e2:1",
        "1e10000000:1",
        "1234567:1",
        "٣:٢",
        "0.0",
        "1.:2",
    ],
)
def test_what_is_no_aspect_ratio_is_refused(aspect):
    with pytest.raises(ConfigError, match="is not width:height"):
        bucket_for_aspect(1024, aspect)


@pytest.mark.parametrize("aspect", ["4.01:1", "100:1", "0.24", "1:5"])
def test_shapes_that_no_bucket_comes_near_are_refused(aspect):
    with pytest.raises(ConfigError, match=f"{aspect}' is not supported; the model draws 1:4 to 4"):
        bucket_for_aspect(1024, aspect)


@pytest.mark.parametrize(("height", "width"), [(4000, 40), (40, 4000), (16, 65)])
def test_so_are_their_sizes(height, width):
    with pytest.raises(ConfigError, match="the model draws 1:4 to 4:1"):
        choose_bucket(1024, None, height, width)


@pytest.mark.parametrize(("height", "width"), [(0, 64), (64, 0), (-1, 64)])
def test_sizes_must_be_positive(height, width):
    with pytest.raises(ConfigError, match="sides must be positive"):
        nearest_bucket(1024, height, width)


@pytest.mark.parametrize("resolution", [0, 768, 2048])
def test_other_resolutions_have_no_table(resolution):
    with pytest.raises(ConfigError, match=f"resolution {resolution} has no bucket table"):
        buckets(resolution)
