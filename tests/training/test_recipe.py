"""The recipe against Table 4 of the paper, the original code's rates, and mistaken files."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pixart_rt.config import XL_2_256, XL_2_1024_MS, CfgNull
from pixart_rt.errors import ConfigError
from pixart_rt.training.optim.warmup import Warmup
from pixart_rt.training.optimizer_settings import PhaseOptimizer
from pixart_rt.training.presets import PRESETS, Preset
from pixart_rt.training.recipe import Recipe, Stage, Start, Weights, read_recipe
from pixart_rt.training.recipe_report import differences, optimizer_table, phase_table, report
from pixart_rt.training.reparameterize_settings import TBlock, TextStart
from pixart_rt.training.run_settings import OptimizerKind

FILE = Path(__file__).parents[2] / "recipes" / "pixart-alpha.toml"
PAPER, CODE = PRESETS[Preset.PAPER], PRESETS[Preset.ORIGINAL_CODE]

# Table 4: resolution, images (M), steps (K), batch, lr, V100 days.
TABLE_4 = [
    (256, 1, 300, 128 * 8, 2e-5, 88),
    (256, 10, 150, 178 * 64, 2e-5, 672),
    (256, 14, 90, 178 * 64, 2e-5, 416),
    (512, 14, 100, 40 * 64, 2e-5, 320),
    (1024, 14, 16, 12 * 32, 2e-5, 160),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_recipe(FILE)


def test_the_five_phases_of_table_4(recipe):
    assert recipe.preset is Preset.PAPER
    found = [
        (each.resolution, each.num_images / 1e6, each.steps / 1e3, each.global_batch(PAPER),
         recipe.phase_optimizer(each).lr, each.v100_days)
        for each in recipe.phases
    ]  # fmt: skip
    assert found == TABLE_4
    assert sum(row[5] for row in TABLE_4) == sum(each.v100_days for each in recipe.phases) == 1656
    stages = [each.stage for each in recipe.phases]
    aesthetic = Stage.HIGH_AESTHETICS
    assert stages == [Stage.PIXEL_DEPENDENCY, Stage.TEXT_IMAGE_ALIGNMENT, *[aesthetic] * 3]
    starts = [each.start for each in recipe.phases]
    assert starts == [Start.RANDOM, Start.REPARAMETERIZED, *[Start.PREVIOUS] * 3]
    assert all(each.start_weights is Weights.EMA for each in recipe.phases)
    assert [each.multi_scale for each in recipe.phases] == [False, False, False, True, True]
    assert [each.micro_conditioning for each in recipe.phases] == [False] * 4 + [True]
    assert recipe.text_start == TextStart(t=500, t_block=TBlock.MEAN)
    assert (recipe.text_dropout, recipe.text_start.cfg_null) == (0.1, CfgNull.EMPTY_PROMPT)


def test_the_papers_optimiser(recipe):
    """Section 3.1: AdamW, weight decay 0.03, a constant 2e-5."""
    assert PAPER.weight_decay == 0.03
    for phase in recipe.phases:
        optimizer = recipe.phase_optimizer(phase)
        assert optimizer.weight_decay == 0.03
        rates = [optimizer.lr * optimizer.warmup.share(step) for step in (0, 1, 10**6)]
        assert rates == [2e-5] * 3


def test_the_original_codes_rates(recipe):
    """1.33e-4, 6.3e-5 and 2.45e-5: 2e-5 sqrt(batch / 256) of 176 x 64, 40 x 64 and 12 x 32."""
    code = replace(recipe, preset=Preset.ORIGINAL_CODE)
    found = {each.name: code.phase_optimizer(each).lr for each in code.phases}
    assert found["text-image-256"] == found["aesthetics-256"] == pytest.approx(1.33e-4, rel=3e-3)
    assert found["text-image-256"] == pytest.approx(2e-5 * (176 * 64 / 256) ** 0.5, rel=1e-12)
    assert found["aesthetics-512"] == pytest.approx(6.3e-5, rel=4e-3)
    assert found["aesthetics-1024"] == pytest.approx(2.45e-5, rel=1e-3)


def test_the_original_codes_clipping_and_eps():
    """4e-7 a gradient (611M of them), 40 times PyTorch's eps and 4000 times its own."""
    assert (CODE.clip_norm, CODE.eps, CODE.weight_decay) == (0.01, 1e-10, 0.03)
    assert CODE.clipped_rms() == pytest.approx(4.05e-7, rel=1e-2)
    assert CODE.clip_ratio() == pytest.approx(4046, rel=1e-3)
    assert replace(CODE, eps=1e-8).clip_ratio() == pytest.approx(40.46, rel=1e-3)


def test_the_original_codes_warmup_as_it_acts():
    """LambdaLR from 0, advanced once per process at each step: over after 16 steps on 64 GPUs."""
    counted, shares = 0, []
    for _ in range(20):
        shares.append(min(counted / 1000, 1.0))
        for _ in range(64):
            counted += 1
    warmup = CODE.warmup(64)
    assert [warmup.share(step) for step in range(20)] == pytest.approx(shares)
    assert shares[15] < 1 == shares[16] and shares[0] == 0
    assert CODE.effective_warmup(1) == 1000


def test_models_of_the_phases(recipe):
    """Positions interpolated (DiffFit) with the paper, as released with the original code."""
    models = {
        name: [each.model_config(settings, XL_2_256) for each in recipe.phases[1:]]
        for name, settings in PRESETS.items()
    }
    assert [each.interpolation_scale for each in models[Preset.PAPER]] == [1, 1, 2, 4]
    assert [each.interpolation_scale for each in models[Preset.ORIGINAL_CODE]] == [1, 1, 1, 2]
    assert models[Preset.ORIGINAL_CODE][0] == XL_2_256
    assert models[Preset.ORIGINAL_CODE][-1] == XL_2_1024_MS
    assert [each.resolution for each in models[Preset.PAPER]] == [256, 256, 512, 1024]


def test_the_report_names_every_rate_and_difference(recipe):
    text = "\n".join(report(read_recipe(FILE, Preset.ORIGINAL_CODE)))
    assert text.startswith("preset original-code")
    rows = [re.split(r"\s{2,}", line) for line in phase_table(recipe)]
    assert len(rows) == 11 and all(len(row) == 8 for row in rows)
    assert rows[3] == ["text-image-256", "256", "150000", "paper", "11392", "2e-05", "0", "1"]
    assert rows[4][3:] == ["original-code", "11264", "0.000133", "15.6", "1"]
    assert rows[8][5] == "6.32e-05" and rows[10][5] == "2.45e-05"
    assert "clip ratio 4.05e+03" in text and "RMS of at most 4.05e-07" in text
    assert "pixel-dependency is not in the original code" in text
    named = {line.split(":")[0].strip() for line in differences()}
    assert named == {"lr_rule", "eps", "clip_norm", "warmup_steps", "warmup_per_process",
                     "positions", "original_batches"}  # fmt: skip
    assert "  eps: 1e-08 (paper), 1e-10 (original-code)" in text


OVERRIDES = """
[optimizer]
lr = 1e-4
weight_decay = 0.01
betas = [0.9, 0.99]
eps = 1e-9
clip_norm = 0.5
warmup_steps = 200
decay = 0.25

[text_start]"""


@pytest.mark.parametrize("preset", Preset)
def test_a_table_replaces_the_presets_settings_and_a_phase_the_tables(tmp_path, preset):
    """The nearest setting counts; the preset's rule for the rate stays: 1 or sqrt(batch / 256)."""
    text = FILE.read_text().replace("[text_start]", OVERRIDES, 1)
    text = text.replace("lr = 2e-5\nv100_days = 672", "v100_days = 672", 1)  # text-image-256
    last = "lr = 2e-5\nweight_decay = 0\nbetas = [0.8, 0.95]\neps = 1e-7\nclip_norm = 2\n"
    text = text.replace("lr = 2e-5\nv100_days = 160",
                        last + "warmup_steps = 0\ndecay = 1\nv100_days = 160", 1)  # fmt: skip
    (tmp_path / "r.toml").write_text(text)
    recipe = read_recipe(tmp_path / "r.toml", preset)
    grows = preset is Preset.ORIGINAL_CODE
    table, own = recipe.phase_optimizer(recipe.phases[1]), recipe.phase_optimizer(recipe.phases[4])
    assert table == PhaseOptimizer(
        kind=OptimizerKind.ADAMW, lr=pytest.approx(1e-4 * (44**0.5 if grows else 1)),
        weight_decay=0.01, betas=(0.9, 0.99), eps=1e-9, clip_norm=0.5, warmup=Warmup(steps=200),
        decay=0.25,
    )  # fmt: skip
    assert own == PhaseOptimizer(
        kind=OptimizerKind.ADAMW, lr=pytest.approx(2e-5 * (1.5**0.5 if grows else 1)),
        weight_decay=0, betas=(0.8, 0.95), eps=1e-7, clip_norm=2, warmup=Warmup(), decay=1,
    )  # fmt: skip
    again = recipe.phase_optimizer(recipe.phases[4], batch=1024)
    assert again.lr == pytest.approx(2e-5 * (2 if grows else 1))


def test_came_keeps_its_own_betas_and_eps(tmp_path, recipe):
    came = recipe.phase_optimizer(recipe.phases[0], kind=OptimizerKind.CAME)
    assert (came.betas, came.eps, came.weight_decay) == (None, None, 0.03)
    for setting, says in (
        ("betas = [0.9, 0.99]", r"phase pixel-dependency: betas \[0.9, 0.99\] .* came takes 3"),
        ("eps = 1e-8", "came has two of its own"),
    ):
        table = f'[optimizer]\nkind = "came"\n{setting}\n[text_start]'
        with pytest.raises(ConfigError, match=says):
            read_recipe(changed(tmp_path, "[text_start]", table))
    table = '[optimizer]\nkind = "came"\nbetas = [0.8, 0.9, 0.99]\n[text_start]'
    found = read_recipe(changed(tmp_path, "[text_start]", table))
    assert found.phase_optimizer(found.phases[0]).betas == (0.8, 0.9, 0.99)


def test_the_report_shows_preset_recipe_and_effective_values(tmp_path):
    path = changed(tmp_path, "[text_start]", "[optimizer]\nweight_decay = 0.01\n[text_start]")
    recipe = read_recipe(path, Preset.ORIGINAL_CODE)
    first, *others = recipe.phases
    recipe = replace(recipe, phases=(replace(first, clip_norm=0.02), *others))
    rows = [re.split(r"\s{2,}", line) for line in optimizer_table(recipe)]
    assert rows[0] == ["phase", "setting", "preset", "recipe", "effective"]
    assert ["all", "weight_decay", "0.03", "0.01", "0.01"] in rows
    assert ["all", "eps", "1e-10", "-", "1e-10"] in rows
    assert ["all", "betas", "0.9 0.999", "-", "0.9 0.999"] in rows
    assert ["pixel-dependency", "clip_norm", "0.01", "0.02", "0.02"] in rows
    assert ["aesthetics-512", "clip_norm", "0.01", "-", "0.01"] in rows
    assert ["text-image-256", "lr", "* sqrt(batch / 256)", "2e-05", "0.000133"] in rows
    assert ["text-image-256", "warmup_steps", "15.6", "-", "15.6"] in rows
    lines = optimizer_table(recipe, batch=1024, optimizer=OptimizerKind.CAME)
    rows = [re.split(r"\s{2,}", line) for line in lines]
    assert ["all", "lr", "* sqrt(batch / 256)", "2e-05", "4e-05"] in rows
    assert ["all", "kind", "adamw", "adamw", "came"] in rows
    assert ["all", "eps", "1e-10", "-", "came's own"] in rows
    text = "\n".join(report(recipe))
    assert "pixel-dependency: clip ratio 8.09e+03" in text, "twice the norm, twice the ratio"


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = FILE.read_text()
    assert old in text
    (tmp_path / "r.toml").write_text(text.replace(old, new, 1))
    return tmp_path / "r.toml"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("text_dropout", "text_drop", "has the unknown setting text_drop; there are preset, pha"),
        ("num_images = 10", "num_image = 10", r"phases\[1\] has the unknown setting num_image"),
        ("steps = 90_000\n", "", r"phases\[2\] lacks the setting steps"),
        ('"paper"', '"papr"', "preset is 'papr'; choose from paper, original-code"),
        ("steps = 90_000", 'steps = "90"', r"phases\[2\]: steps must be of type int, got '90'"),
        ("steps = 90_000", "steps = 0", r"phases\[2\]: steps must be > 0"),
        ("multi_scale = true", "multi_scale = 1", "multi_scale must be of type bool, got 1"),
        ("resolution = 512", "resolution = 500", "resolution 500 is not one of"),
        ('start = "previous"', 'start = "reparameterized"', "starts reparameterized, but before"),
        ('start = "reparameterized"', 'start = "previous"', "starts previous, but before it is"),
        ('start = "random"', 'start = "reparameterized"', "which makes a text model"),
        ('stage = "high-aesthetics"', 'stage = "pixel-dependency"', "starts previous, but before"),
        ('name = "aesthetics-256"', 'name = "text-image-256"', "names of their own"),
        ("text_dropout = 0.1", "text_dropout = 1.5", "between 0 and 1"),
        ("t = 500", "t = 1000", "text_start: t must be a timestep"),
        ("[text_start]", "[[text_start]]", "text_start must be a table"),
        ("preset =", "preset", "is no TOML"),
        (
            "[text_start]",
            "[optimizer]\nweight_decy = 0\n[text_start]",
            "optimizer has the unknown setting weight_decy",
        ),
        (
            "[text_start]",
            "[optimizer]\nclip_norm = 0\n[text_start]",
            "clip_norm must be > 0, got",
        ),
        ("[text_start]", "[optimizer]\nbetas = [1.0]\n[text_start]", r"betas must be in \[0, 1\)"),
        ("[text_start]", "[optimizer]\nbetas = 0.9\n[text_start]", "betas must be a list"),
        ("[text_start]", '[optimizer]\nkind = "sgd"\n[text_start]', "kind is 'sgd'; choose from"),
        ("preset =", 'optimizer = "muon"\npreset =', "optimizer must be a table, got 'muon'"),
        ("lr = 2e-5\n", "", "phase pixel-dependency: no lr is set; give one in"),
        ("lr = 2e-5\n", "lr = 2e-5\nweight_decay = -1\n", "weight_decay must be >= 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(changed(tmp_path, old, new))
    assert "r.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_model_may_start_from_scratch_or_from_what_is_given(tmp_path, recipe):
    scratch = read_recipe(changed(tmp_path, 'start = "reparameterized"', 'start = "random"'))
    assert scratch.phases[1].start is Start.RANDOM
    for first in (1, 2):  # from a DiT, or a text model, that the run is given
        assert replace(recipe, phases=recipe.phases[first:]).phases[0] is recipe.phases[first]


def test_what_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "absent.toml")


def test_recipes_load_no_torch():
    code = "import pixart_rt.training.recipe_report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FILE.parents[1]).returncode == 0


def test_recipes_of_the_package_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_recipe("pixart-alpha") == read_recipe(FILE)
    with pytest.raises(ConfigError, match="there are own-images, pixart-alpha, tiny"):
        read_recipe("nosuch")
    (tmp_path / "tiny").write_text("not = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="tiny is no TOML"):
        read_recipe("tiny")  # a file of the user's own comes first
