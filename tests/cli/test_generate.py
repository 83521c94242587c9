"""`generate`: what it refuses before loading anything, and real images from a small bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixart_rt import PixArtPipeline
from pixart_rt.bundle import Manifest
from pixart_rt.errors import NumericsError
from pixart_rt.inference.generation import ImageResult
from pixart_rt.inference.images import read_metadata
from pixart_rt.inference.request import Request
from pixart_rt.version import __version__

PROMPT = "a red circle above a blue square"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--aspect", "wide"], "width:height"),
        (["--aspect", "3:2", "--height", 64, "--width", 64], "not both"),
        (["--aspect", "1e10000000:1"], "width:height"),
        (["--height", 64], "--height and --width go together"),
        (["--steps", 0], "--steps must be between 1 and"),
        (["--guidance", -1], "--guidance must be from 0 to 100, got -1.0"),
        (["--guidance", "nan"], "--guidance must be a finite number"),
        (["--guidance", 3, "--scheduler", "lcm"], "distilled into the model"),
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--negative", "x" * 5000], "--negative has 5000 characters"),
        (["--step-cache", -1], "its threshold is from 0 to 1"),
        (["--step-cache", 99], "its threshold is from 0 to 1"),
        (["--guidance", 1000], "--guidance must be from 0 to 100, got 1000"),
        (["--aspect", "10:1"], "the model draws 1:4 to 4:1"),
        (["--height", 1, "--width", 1], "--height must be at least 16"),
        (["--step-cache", 0.1, "--first-block-cache", 0.1], "choose one"),
        (["--guidance-stop", 1.5], "--guidance-stop must be"),
        (["--scheduler", "dmd", "--steps", 2], "must be 1 with dmd"),
        (
            ["--scheduler", "lcm"],
            "--scheduler lcm was requested of made up, whose weights were trained "
            "for dpm-solver++: its images would be ruined; leave it out, or insist with --force",
        ),
        (["-n", 10_001], "10001 images were requested (--num 10001); the most is 10000"),
        (["--prompts", "all.txt"], "both a PROMPT and --prompts"),
        (["--control-image", "edges.png"], "has no ControlNet; leave it out"),
    ],
)
def test_impossible_settings_are_refused_before_loading(
    run: Callable[..., Any], hollow_bundle: Path, options: list[object], message: str
) -> None:
    out = hollow_bundle.parent / "o.png"
    outcome = run("generate", PROMPT, "--bundle", hollow_bundle, "-o", out, *options)
    assert outcome.code == 2
    assert message in outcome.error
    assert not out.exists()


@pytest.mark.parametrize(("num", "existing"), [(1, "o.png"), (3, "o-2.png")])
def test_existing_files_are_refused_before_loading(
    run: Callable[..., Any], hollow_bundle: Path, num: int, existing: str
) -> None:
    kept = hollow_bundle.parent / existing
    kept.write_bytes(b"mine")
    out = hollow_bundle.parent / "o.png"
    outcome = run("generate", PROMPT, "--bundle", hollow_bundle, "-o", out, "-n", num)
    assert outcome.code == 2
    assert existing in outcome.error and "--force" in outcome.error
    assert kept.read_bytes() == b"mine"
    forced = run("generate", PROMPT, "--bundle", hollow_bundle, "-o", out, "-n", num, "--force")
    assert forced.code == 1, "now it continues, to the missing engines"
    assert "was built without" in forced.error
    assert kept.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-o", "/proc/o.png"], "takes no new files"),
        (["-o", "mine/o.png"], "mine is a file"),
        (["-o", f"{'n' * 252}.png"], "name"),
        (["-o", "o.png", "--prompt-cache", "mine"], "--prompt-cache mine is a file"),
        (["-o", "o.png", "--preview", "mine"], "mine is a file"),
        (["-o", "o.png", "--preview", "/proc/p"], "takes no new files"),
    ],
)
def test_places_are_checked_before_loading(
    run: Callable[..., Any], hollow_bundle: Path, options: list[str], says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(hollow_bundle.parent)
    Path("mine").write_text("mine")
    outcome = run("generate", PROMPT, "--bundle", hollow_bundle, *options, "--force")
    assert outcome.code == 2 and says in outcome.error
    assert Path("mine").read_text() == "mine" and not Path("o.png").exists()


def test_only_png_is_written(run: Callable[..., Any], hollow_bundle: Path) -> None:
    outcome = run("generate", PROMPT, "--bundle", hollow_bundle, "-o", "image.jpg")
    assert outcome.code == 2
    assert "image.jpg.png" in outcome.error


def test_text_that_is_none_is_refused(run: Callable[..., Any], hollow_bundle: Path) -> None:
    outcome = run("generate", "caf\udce9", "--bundle", hollow_bundle, "-o", "o.png")
    assert outcome.code == 2
    assert "UTF-8" in outcome.error


def test_a_folder_that_is_no_bundle_is_named(run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run("generate", PROMPT, "--bundle", tmp_path, "-o", tmp_path / "o.png")
    assert outcome.code == 1
    assert "is not a bundle" in outcome.error and "pixart-rt build" in outcome.error


def test_an_image_tells_how_it_was_made(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "one.png"
    outcome = run(
        "generate", PROMPT, "--bundle", bundle_256, "-o", out, "--aspect", "3:2", "--steps", 2,
        "--seed", 5, "--negative", "stars", "--scheduler", "ddim",
    )  # fmt: skip
    assert outcome.code == 0
    assert outcome.out == f"{out}\n"
    assert "denoising" in outcome.err
    facts = read_metadata(out)
    assert facts == {
        "prompt": PROMPT, "negative_prompt": "stars", "seed": "5", "steps": "2",
        "guidance_scale": "4.5", "scheduler": "ddim", "size": "304x208",
        "model": Manifest.read(bundle_256).model["name"], "bundle": Manifest.read(bundle_256).key,
        "pixart_rt": __version__,
    }  # fmt: skip
    with Image.open(out) as image:
        assert image.size == (304, 208)  # the 256 px bucket nearest to 3:2
        assert np.asarray(image).std() > 1, "not a flat image"


def test_several_images_have_names_and_seeds_of_their_own(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path
) -> None:
    common = ["generate", PROMPT, "--bundle", bundle_256, "--steps", 1, "--json"]
    outcome = run(*common, "-o", tmp_path / "many.png", "-n", 3, "--seed", 7)
    result = json.loads(outcome.out)
    files = [tmp_path / f"many-{index}.png" for index in range(3)]
    assert result["files"] == [str(path) for path in files]
    assert [image["seed"] for image in result["images"]] == [7, 8, 9]
    assert [read_metadata(path)["seed"] for path in files] == ["7", "8", "9"]
    run(*common, "-o", tmp_path / "again.png", "--seed", 9)
    with Image.open(files[2]) as batched, Image.open(tmp_path / "again.png") as alone:
        difference = np.asarray(batched, dtype=int) - np.asarray(alone, dtype=int)
    assert np.abs(difference).max() <= 1, "the seed decides, not the place in the batch"


def test_a_grid_is_one_captioned_file(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grid.png"
    outcome = run("generate", PROMPT, "--bundle", bundle_256, "-o", out, "-n", 4, "--grid",
                  "--steps", 1, "--width", 96, "--height", 64)  # fmt: skip
    assert outcome.out == f"{out}\n"
    assert read_metadata(out)["seed"] == "0 1 2 3"
    with Image.open(out) as sheet:
        assert sheet.width >= 2 * 96 and sheet.height >= 2 * 64 + 2 * 11  # captions below
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_an_approximate_image_says_so(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path
) -> None:
    outcome = run("generate", PROMPT, "--bundle", bundle_256, "-o", tmp_path / "o.png", "--steps",
                  6, "--step-cache", 1, "--guidance-stop", 0.5, "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    facts = read_metadata(tmp_path / "o.png")
    assert facts["approximate"] == "step-cache 1"
    skipped = set(facts["skipped_steps"].split())
    assert skipped and skipped <= {"1", "2", "4"}, "not the first, the last, where guidance ends"
    assert facts["guidance_stop"] == "0.5"
    [image] = json.loads(outcome.out)["images"]
    assert {name: str(value) for name, value in image.items()} == facts


def test_an_engine_has_no_first_block_cache(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path
) -> None:
    outcome = run("generate", PROMPT, "--bundle", bundle_256, "-o", tmp_path / "o.png",
                  "--first-block-cache", 0.1)  # fmt: skip
    assert outcome.code == 2
    assert "--backend torch" in outcome.error and "step cache" in outcome.error
    assert not list(tmp_path.iterdir())


def test_lcm_runs_without_guidance_by_default(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lcm.png"
    outcome = run("generate", PROMPT, "--bundle", bundle_256, "-o", out, "--scheduler", "lcm",
                  "--steps", 1, "--force")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert read_metadata(out)["guidance_scale"] == "1.0"


def test_previews_of_every_second_step(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "previews"
    words = ["generate", PROMPT, "--bundle", bundle_256, "-o", tmp_path / "o.png", "-n", 3,
             "--steps", 5, "--preview", folder, "--preview-every", 2, "--vae-tiling"]  # fmt: skip
    assert run(*words).code == 0
    assert read_metadata(tmp_path / "o-0.png")["vae_tiling"] == "True"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"image-{i:03}-step-{s:03}.png" for i in range(3) for s in (2, 4)]
    with Image.open(folder / names[0]) as picture:
        assert picture.size == (32, 32)
    assert read_metadata(folder / names[0]) == {"step": "2", "steps": "5"}
    refused = run(*words, "--aspect", "1:1")
    assert refused.code == 2 and "exists" in refused.error
    words[words.index("-o") + 1] = tmp_path / "other.png"
    refused = run(*words)
    assert refused.code == 2 and "is not empty" in refused.error


def test_previews_of_a_bundle_without_them_are_refused_before_loading(
    run: Callable[..., Any], hollow_bundle: Path
) -> None:
    folder = hollow_bundle.parent / "previews"
    outcome = run("generate", PROMPT, "--bundle", hollow_bundle, "-o", "o.png", "--preview", folder)
    assert outcome.code == 1
    assert "has no preview.safetensors" in outcome.error
    assert not folder.exists()


def test_progress_stands_in_the_way_of_no_capture(
    run: Callable[..., Any], bundle_256: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call, without a callback unless previews are asked, whose images and seeds are theirs."""
    calls: list[dict[str, Any]] = []
    loads: list[dict[str, Any]] = []
    real_stream, real_load = PixArtPipeline.stream, PixArtPipeline.from_bundle

    def stream(pipe: PixArtPipeline, requests: Any, **kwargs: Any) -> Any:
        calls.append({"num_images": len(requests), **kwargs})
        return real_stream(pipe, requests, **kwargs)

    def load(*args: Any, **kwargs: Any) -> PixArtPipeline:
        loads.append(kwargs)
        return real_load(*args, **kwargs)

    monkeypatch.setattr(PixArtPipeline, "stream", stream)
    monkeypatch.setattr(PixArtPipeline, "from_bundle", load)

    def images(name: str, *options: object) -> list[tuple[Any, Any]]:
        out = tmp_path / f"{name}.png"
        words = ("--bundle", bundle_256, "-o", out, "-n", 7, "--steps", 1, "--seed", 3, *options)
        assert run("generate", PROMPT, *words).code == 0
        paths = [tmp_path / f"{name}-{index}.png" for index in range(7)]
        return [(np.asarray(Image.open(path)), read_metadata(path)["seed"]) for path in paths]

    expected = images("by-step", "--preview", tmp_path / "previews")
    assert calls[-1]["callback_on_step_end"] is not None
    actual = images("by-batch")
    assert len(calls) == 2 and calls[-1]["num_images"] == 7
    assert calls[-1]["callback_on_step_end"] is None, "a graph could be replayed"
    for (image, seed), (other, other_seed) in zip(actual, expected, strict=True):
        assert seed == other_seed
        assert np.abs(image.astype(int) - other).max() <= 1  # 8-bit rounding
    assert [load["auto_capture"] for load in loads] == [True, True]
    images("off", "--no-auto-capture")
    assert loads[-1]["auto_capture"] is False


# Images as they come. The pipeline is a stand-in: what it gives, and when, is the test's.


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, hollow_bundle: Path) -> Callable[..., list[Request]]:
    """made(0, 2, "stop"): images of these requests come, one that fails as -1 - index, then it ends
    with Ctrl-C. Returns the requests that will have been asked for.
    """
    asked: list[Request] = []

    def result(request: Request, index: int, *, bad: bool) -> ImageResult:
        resolved = request.resolved(Manifest.read(hollow_bundle))
        error = NumericsError(f"an image came out with NaN (seed {request.seed})") if bad else None
        image = None if bad else Image.new("RGB", (8, 4))
        return ImageResult(index=index, request=request, image=image, error=error,
                           bucket=resolved.bucket, sampling=resolved.sampling,
                           skipped_steps=())  # fmt: skip

    def prepare(*events: Any) -> list[Request]:
        class Stand:
            max_batch = 1

            def stream(self, requests: list[Request], **_: Any) -> Iterator[ImageResult]:
                asked.extend(requests)
                for event in events:
                    if event == "stop":
                        raise KeyboardInterrupt
                    index = event if event >= 0 else -1 - event
                    yield result(requests[index], index, bad=event < 0)

        monkeypatch.setattr(PixArtPipeline, "from_bundle", lambda *_, **__: Stand())
        return asked

    return prepare


def test_ctrl_c_keeps_the_images_that_are_finished(
    run: Callable[..., Any], hollow_bundle: Path, made: Callable[..., Any]
) -> None:
    made(0, 2, "stop")
    out = hollow_bundle.parent / "o.png"
    outcome = run("generate", PROMPT, "--bundle", hollow_bundle, "-o", out, "-n", 4)
    assert outcome.code == 130
    assert "stopped: 2 of 4 images are written, not o-1.png, o-3.png" in outcome.err
    kept = [out.with_name(f"o-{index}.png") for index in (0, 2)]
    assert sorted(out.parent.glob("*.png")) == kept
    assert [read_metadata(path)["seed"] for path in kept] == ["0", "2"]


def test_an_image_that_fails_loses_no_other(
    run: Callable[..., Any], hollow_bundle: Path, made: Callable[..., Any]
) -> None:
    made(2, -2, 0)
    out = hollow_bundle.parent / "o.png"
    words = ("generate", PROMPT, "--bundle", hollow_bundle, "-o", out, "-n", 3)
    outcome = run(*words)
    assert outcome.code == 1
    assert outcome.error.startswith("failed: 2 of 3 images are written, not o-1.png: an image")
    assert outcome.out.splitlines() == [str(out.with_name(f"o-{index}.png")) for index in (0, 2)]
    sheet = run(*words, "--grid", "--json")
    assert sheet.code == 1 and "not image 1" in sheet.error
    found = json.loads(sheet.out)
    assert [each["seed"] for each in found["images"]] == [0, 2] and out.is_file()
    assert read_metadata(out)["seed"] == "0 2"


def test_prompts_of_a_file(
    run: Callable[..., Any], hollow_bundle: Path, made: Callable[..., Any]
) -> None:
    folder = hollow_bundle.parent
    (folder / "all.txt").write_text("\ufeffa café\n\n  two stars  \n", encoding="utf-8")
    words = ("generate", "--bundle", hollow_bundle, "-o", folder / "o.png", "--prompts")
    asked = made(0, 1, 2, 3)
    assert run(*words, folder / "all.txt", "-n", 2, "--seed", 5, "--aspect", "3:2").code == 0
    assert [(each.prompt, each.seed, each.aspect_ratio) for each in asked] == [
        ("a café", 5, "3:2"), ("a café", 6, "3:2"),
        ("two stars", 7, "3:2"), ("two stars", 8, "3:2"),
    ]  # fmt: skip
    assert read_metadata(folder / "o-3.png")["prompt"] == "two stars"
    lines = [{"prompt": "a star", "seed": 40, "guidance_scale": 2},
             {"prompt": "a dot", "height": 64, "width": 32}]  # fmt: skip
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked.clear()
    made(0, 1)
    assert run(*words, folder / "all.jsonl", "--force", "--aspect", "3:2").code == 0
    assert [(each.seed, each.guidance_scale, each.aspect_ratio, each.height) for each in asked] == [
        (40, 2.0, "3:2", None), (1, None, None, 64),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no prompt; write one a line"),
        ("a star", "line 1 is no JSON"),
        ("[3]", "line 1 must be an object"),
        ('{"prompt": "a", "steps": 3}', "line 1 has steps; its fields may be prompt, "),
        ('{"prompt": "a"}\n{"prompt": 7}', "line 2: prompt must be text, got 7"),
    ],
)
def test_lines_that_cannot_be_read_are_named(
    run: Callable[..., Any], hollow_bundle: Path, text: str, says: str
) -> None:
    path = hollow_bundle.parent / "all.jsonl"
    path.write_text(text)
    outcome = run("generate", "--bundle", hollow_bundle, "-o", "o.png", "--prompts", path)
    assert outcome.code == 2 and says in outcome.error
    assert "no PROMPT" in run("generate", "--bundle", hollow_bundle, "-o", "o.png").error
