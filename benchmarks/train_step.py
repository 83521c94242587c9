"""A whole training step of ours against a compiled loop on diffusers' model, on one device.

    python -m benchmarks.train_step                     writes benchmarks/results/train_step.json
    python -m benchmarks.train_step --json OUT --model tiny --res 64 --batch 2     to try on a CPU

A step is: noise and timesteps drawn, the loss, backward, clipping, fused AdamW, the average. Ours
is `Trainer.step` as `pixart-rt train` runs it. The peer is the loop of diffusers' training scripts
on its PixArtTransformer2DModel, eager and through torch.compile, whole and block by block. Both get
the same weights, batch, captions and loss (noise error and the bound of the learned variance), in
bfloat16 autocast on a GPU.

First every form's loss and gradients are compared with those of the peer's eager model in float32:
in float32, where they may differ by `TOLERANCE`, and in the precision that is timed, on the device
and with the kernels that are timed, where they may differ by `HALF` times what the peer's eager
model does in that precision. A form that differs by more is listed without a speed, and the exit
code is 1. A row names the kernels that the self-test refused: in their place PyTorch's operators
ran. A card of less than `ROOMY` bytes gets half of `BATCH`; the row says which. MFU is of the
device's peak by its data sheet, and `floor_seconds` is what the step's matrix products take at the
rate of one large product, measured in the same run. Without a GPU nothing is measured: the times
are those of a CPU, and forms with Triton kernels are left out.

Not yet run on a GPU. Expected on an H200, and not measured: 1.1 times the faster peer at 256 and
512 px, an MFU of 46 % there and of 42 % at 1024 px. The file says what it found; no test reads it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.provenance import result_file
from benchmarks.rows import Rows, failure, kernels_tested
from benchmarks.weights import diffusers_model, random_state
from pixart_rt.bench.gpu_lock import compiler_waits
from pixart_rt.bench.provenance import ResultFile
from pixart_rt.bench.roofline import ceilings
from pixart_rt.bench.timing import median_seconds, start_afresh
from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints import tensor_names
from pixart_rt.config import RANDOM_XL, XL_2_256, Kernels, ModelConfig, Precision
from pixart_rt.data.batch import Batch
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText, drop_captions
from pixart_rt.training.flops import peak_flops, step_flops, text_model
from pixart_rt.training.objectives.denoising import TextObjective
from pixart_rt.training.process_group import Ranks, start_ranks
from pixart_rt.training.run_settings import Checkpointing, RunSettings
from pixart_rt.training.sample_rng import draw
from pixart_rt.training.trainer import Trainer

RESOLUTIONS = (256, 512, 1024)
BATCH = {256: 128, 512: 32, 1024: 8}  # 32768 tokens each; not yet tried on an H200
# The peer's eager step at these batches saves about 60 GiB of activations (counted, not measured),
# and weights, optimiser and averages take 11.4: a card with less memory gets half the batch.
ROOMY = 100 * 2**30  # bytes
CHECKED = 2  # images of the comparison
# Of a parameter's gradient, |ours - peer's| / |peer's| over all its numbers; of a loss, relative.
# Both are float32 sums in another order, through all blocks forward and backward: at most 5e-6 on a
# CPU (`--model small --res 128`). 1e-3 leaves more blocks and a GPU's sums room; a term that is
# missing or weighted otherwise shows above 1e-2 (tests/benchmarks/test_train_step.py).
TOLERANCE = 1e-3
# In 16 bits a gradient is off by that format's rounding, through all blocks: by as much as the
# peer's own is off, which is measured in the same run, give or take. A parameter whose gradient
# nearly cancels is off by more; below LEAST_HALF nothing is called wrong. On a CPU in bfloat16 ours
# is off by 0.5 to 1.3 times what the peer is (`--model small --res 128 --precision bf16`).
HALF, LEAST_HALF = 3.0, 0.02
SEED, LR, CLIP, DECAY, DROPOUT, WEIGHT_DECAY = 0, 1e-6, 1.0, 0.9999, 0.1, 0.03
EPS, BETAS = 1e-8, (0.9, 0.999)
SHAPES = {  # blocks, heads, width of a head, width of the text
    "xl": (28, 16, 72, 4096),
    "small": (12, 6, 64, 512),
    "tiny": (2, 2, 72, 64),
}
TARGETS = {256: {"speedup": 1.1, "mfu": 0.46}, 512: {"speedup": 1.1, "mfu": 0.46},
           1024: {"mfu": 0.42}}  # fmt: skip


Checked = tuple[Tensor, dict[str, Tensor]]  # the loss, and gradients by our names


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One way to run the step."""

    name: str
    ours: bool = True
    fused: bool = False
    compiled: str = ""  # "blocks" or, of the peer, "whole"
    checkpointing: Checkpointing = Checkpointing.NONE


FORMS = (
    Form(name="diffusers", ours=False),
    Form(name="diffusers compiled", ours=False, compiled="whole"),
    Form(name="diffusers compiled blocks", ours=False, compiled="blocks"),
    Form(name="ours"),
    Form(name="ours fused", fused=True),
    Form(name="ours compiled", compiled="blocks"),
    Form(name="ours compiled fused", compiled="blocks", fused=True),
    Form(name="ours compiled fused selective", compiled="blocks", fused=True,
         checkpointing=Checkpointing.SELECTIVE),
    Form(name="ours compiled selective", compiled="blocks",
         checkpointing=Checkpointing.SELECTIVE),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A resolution: the weights that all forms start from, and what they train on."""

    config: ModelConfig
    state: dict[str, Tensor]  # our names, float32, on the CPU
    batch: Batch
    null: NullText
    device: torch.device
    precision: Precision

    def autocast(self, precision: Precision) -> Any:
        wide = precision is Precision.FP32
        dtype = torch.bfloat16 if wide else DTYPES[precision]
        return torch.autocast(self.device.type, dtype, enabled=not wide)


def config_of(model: str, resolution: int) -> ModelConfig:
    """XL/2 as published at the resolution, or the same with fewer and narrower blocks."""
    layers, heads, width, text = SHAPES[model]
    published = RANDOM_XL.get(resolution, replace(XL_2_256, sample_size=resolution // 8))
    return replace(
        published, num_layers=layers, num_heads=heads, head_dim=width, caption_channels=text
    )


def make_case(config: ModelConfig, size: int, device: torch.device, precision: Precision) -> Case:
    """Random weights and a random batch."""
    state = random_state(config, SEED, device)
    random = torch.Generator().manual_seed(SEED)
    T, side = config.max_text_tokens, config.sample_size
    text = torch.randn(size, T, config.caption_channels, generator=random)
    lengths = torch.randint(1, T + 1, (size, 1), generator=random)
    pixels = config.resolution
    batch = Batch(
        ids=torch.arange(size),
        latents=torch.randn(size, config.in_channels, side, side, generator=random),
        prompt_embeds=text.bfloat16(),
        prompt_mask=torch.arange(T) < lengths,
        original_size=torch.randint(256, 2048, (size, 2), generator=random).float(),
        aspect_ratio=torch.ones(size, 1),
        bucket=Bucket(ratio=1.0, height=pixels, width=pixels),
    )
    null = NullText(torch.randn(T, config.caption_channels, generator=random), torch.arange(T) < 1)
    return Case(config=config, state=state, batch=batch.to(device), null=null, device=device,
                precision=precision)  # fmt: skip


class Peer:
    """A loop as diffusers' training scripts write it, on its model."""

    def __init__(self, case: Case, form: Form) -> None:
        self.case, device = case, case.device
        model = diffusers_model(case.config, case.state)
        self.model = model.to(device).train()
        self.diffusion = GaussianDiffusion()
        mask = case.null.mask
        self.null = NullText(case.null.embeds.to(device), None if mask is None else mask.to(device))
        self.optimizer = torch.optim.AdamW(
            model.parameters(), LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.average = EMAModel(model.parameters(), decay=DECAY, foreach=True)
        if form.compiled == "whole":
            self.model.compile()
        elif form.compiled == "blocks":
            for block in self.model.transformer_blocks:
                block.compile()

    def loss(self, batch: Batch, noise: Tensor, t: Tensor, dropped: Tensor) -> Tensor:
        """[]: the mean over the batch of the loss that ours minimises."""
        embeds, mask = drop_captions(batch.prompt_embeds, batch.prompt_mask, dropped, self.null)
        noisy = self.diffusion.q_sample(batch.latents, t, noise)
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.case.config.micro_conditioning:
            sizes = {"resolution": batch.original_size, "aspect_ratio": batch.aspect_ratio}
        output = self.model(
            noisy,
            encoder_hidden_states=embeds.float(),
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        losses = self.diffusion.training_losses(output, batch.latents, t, noise)
        return losses["loss"].mean()

    def checked(self, batch: Batch, precision: Precision) -> Checked:
        """Loss [] and gradients under our names, of the draws that ours makes."""
        draws = draw(SEED, 0, batch).to(self.case.device)
        t = draws.timesteps(self.diffusion.num_timesteps)
        with self.case.autocast(precision):
            loss = self.loss(batch, draws.noise, t, draws.dropped(DROPOUT))
        loss.backward()
        found = _gradients(self.model)
        gradients = {
            ours: torch.cat([found[name] for name in tensor_names.diffusers_names(ours)])
            for ours in self.case.state
        }
        self.optimizer.zero_grad()
        return loss.detach(), gradients

    def step(self) -> None:
        case = self.case
        noise = torch.randn_like(case.batch.latents)
        size = (len(case.batch),)
        t = torch.randint(0, self.diffusion.num_timesteps, size, device=case.device)
        dropped = torch.rand(size, device=case.device) < DROPOUT
        with case.autocast(case.precision):
            loss = self.loss(case.batch, noise, t, dropped)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())

    def finite(self) -> bool:
        return all(bool(each.isfinite().all()) for each in self.model.parameters())


class Ours:
    """The trainer's step."""

    def __init__(self, case: Case, form: Form, ranks: Ranks, out: Path) -> None:
        with torch.device("meta"):
            model = PixArtTransformer(case.config)
        model.load_state_dict(copy.deepcopy(case.state), assign=True)
        model.use(Kernels.FUSED if form.fused else Kernels.REFERENCE)
        objective = TextObjective(model, GaussianDiffusion(), case.null, DROPOUT)
        self.case = case
        self.trainer = Trainer(objective, self._feed, _settings(case, form), out, ranks, log=())

    def _feed(self, start: int, stop: int) -> Iterator[Batch]:
        return iter([self.case.batch] * (stop - start))

    def checked(self, batch: Batch, precision: Precision) -> Checked:
        """Loss [] and gradients by name."""
        trainer = self.trainer
        settings = trainer.settings
        trainer.settings = replace(settings, precision=precision)
        losses = trainer.backward(batch, draw(SEED, 0, batch).to(self.case.device))
        trainer.settings = settings
        found = _gradients(trainer.objective)
        gradients = {name.removeprefix("model."): each for name, each in found.items()}
        trainer.optimizer.zero_grad()
        return losses["loss"].mean(), gradients

    def step(self) -> None:
        self.trainer.step(self.case.batch)

    def finite(self) -> bool:
        return not self.trainer.skipped.item()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def _settings(case: Case, form: Form) -> RunSettings:
    return RunSettings(
        steps=1, lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPS, clip_norm=CLIP,
        ema_decay=DECAY, precision=case.precision, compile=bool(form.compiled),
        checkpointing=form.checkpointing, seed=SEED,
    )  # fmt: skip


def make(form: Form, case: Case, ranks: Ranks, out: Path) -> Peer | Ours:
    return Ours(case, form, ranks, out) if form.ours else Peer(case, form)


def differences(found: Checked, expected: Checked) -> dict[str, float]:
    """The relative difference of the loss and of every gradient, by name; inf for NaN."""
    pairs = {"loss": (found[0], expected[0])}
    pairs |= {name: (found[1][name], gradient) for name, gradient in expected[1].items()}
    off = {}
    for name, (ours, theirs) in pairs.items():
        theirs = theirs.to(ours.device)
        scale = theirs.double().norm()
        value = float((ours.double().view_as(theirs) - theirs.double()).norm() / scale)
        off[name] = value if value == value else float("inf")
    return off


def worst(off: dict[str, float], allowed: dict[str, float]) -> str:
    """Whose difference is the largest, in units of what it may be."""
    return max(off, key=lambda name: off[name] / allowed[name])


def seconds_per_step(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Median over five runs of `steps` steps each, one after the other as in a run."""

    def run() -> None:
        for _ in range(steps):
            step()

    step()  # compiles: others may time meanwhile
    repeats, warmup = (5, 1) if device.type == "cuda" else (1, 0)
    return median_seconds(run, device, repeats=repeats, warmup=warmup) / steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What every form is compared with."""

    wide: Checked  # of the peer's eager model in float32, on the CPU
    half: dict[str, float] | None  # how far that model is off in the timed precision, if it is less


def expected_of(case: Case, ranks: Ranks) -> Expected:
    with tempfile.TemporaryDirectory() as out:
        eager = make(FORMS[0], case, ranks, Path(out))
    checked = case.batch.rows(0, CHECKED)
    loss, gradients = eager.checked(checked, Precision.FP32)
    wide = loss.cpu(), {name: each.cpu() for name, each in gradients.items()}
    del loss, gradients
    if case.precision is Precision.FP32:
        return Expected(wide=wide, half=None)
    return Expected(wide=wide, half=differences(eager.checked(checked, case.precision), wide))


def compared(running: Peer | Ours, case: Case, expected: Expected) -> dict[str, Any]:
    """How far a form is off, in float32 and in the timed precision, and whether by rounding."""
    checked = case.batch.rows(0, CHECKED)
    # Compiled code is compared in the precision that is timed; to compile it twice takes a minute.
    stance = "default" if expected.half is None else "force_eager"
    with torch.compiler.set_stance(stance):
        off = differences(running.checked(checked, Precision.FP32), expected.wide)
    name = max(off, key=lambda name: off[name])
    row = {"difference": off[name], "most_different": name, "agrees": off[name] <= TOLERANCE}
    if expected.half is None or not row["agrees"]:
        return row
    allowed = {name: max(HALF * value, LEAST_HALF) for name, value in expected.half.items()}
    off = differences(running.checked(checked, case.precision), expected.wide)
    name = worst(off, allowed)
    return row | {
        "half_difference": off[name], "half_allowed": allowed[name], "half_most_different": name,
        "agrees": off[name] <= allowed[name],
    }  # fmt: skip


def measure(
    form: Form,
    case: Case,
    ranks: Ranks,
    expected: Expected,
    rates: dict[str, float],
    steps: int,
) -> dict[str, Any]:
    """One row: the comparison and, where it holds, the speed."""
    device, size = case.device, len(case.batch)
    with tempfile.TemporaryDirectory() as out:
        running = make(form, case, ranks, Path(out))
    row = compared(running, case, expected)
    if device.type == "cuda":  # the comparison's own memory is not the step's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.compiler.reset()  # or it would remember a second batch size, and compile for any
    if not row["agrees"]:
        return row
    try:
        seconds = seconds_per_step(running.step, device, steps)
    except torch.OutOfMemoryError as error:
        return row | failure(error) | {"out_of_memory": True}
    if not running.finite():
        return row | {"agrees": False, "most_different": "a timed step, which was not finite"}
    return (
        row | {"seconds": seconds, "images_per_second": size / seconds} | _use(case, seconds, rates)
    )


def _use(case: Case, seconds: float, rates: dict[str, float]) -> dict[str, Any]:
    """Utilisation, the floor and memory; null where a GPU's rates are not known."""
    config, device = case.config, case.device
    products = text_model(config, config.base_size**2, config.max_text_tokens)
    flops = len(case.batch) * step_flops(products).model
    cuda = device.type == "cuda"
    peak = None
    if cuda:
        peak = peak_flops(torch.cuda.get_device_name(device), DTYPES[case.precision])
    measured = rates.get(f"matmul_{DTYPES[case.precision]}_tflop_per_s".replace("torch.", ""))
    return {
        "model_flops": flops,
        "mfu": flops / seconds / peak if peak else None,
        "floor_seconds": flops / (1e12 * measured) if measured else None,
        "memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each resolution our fastest form over the fastest peer; those that were timed."""
    found = []
    for pixels in sorted({row["pixels"] for row in rows}):
        timed = [row for row in rows if row["pixels"] == pixels and "seconds" in row]
        peers = [row for row in timed if row["form"].startswith("diffusers")]
        ours = [row for row in timed if not row["form"].startswith("diffusers")]
        if not peers or not ours:
            continue
        peer, our = (min(each, key=lambda row: row["seconds"]) for each in (peers, ours))
        found.append({"pixels": pixels, "peer": peer["form"], "ours": our["form"],
                      "speedup": peer["seconds"] / our["seconds"], "mfu": our["mfu"],
                      "expected_on_h200": TARGETS.get(pixels)})  # fmt: skip
    return found


def batch_for(pixels: int, device: torch.device) -> int:
    """Images of a step that this card has room for."""
    size = BATCH.get(pixels, 32)
    return size if torch.cuda.get_device_properties(device).total_memory >= ROOMY else size // 2


def run(args: argparse.Namespace, ranks: Ranks, save: ResultFile) -> Rows:
    device = ranks.device
    cuda = device.type == "cuda"
    model = args.model or ("xl" if cuda else "tiny")
    precision = Precision(args.precision or ("bf16" if cuda else "fp32"))
    chosen = [form for form in FORMS if not args.forms or form.name in args.forms.split(",")]
    if any(form.fused for form in chosen):
        kernels_tested(device, torch.float32, DTYPES[precision], training=True)
    rates = ceilings(device)
    values = {"measured": cuda, "model": model, "precision": str(precision), "steps": args.steps,
              "tolerance": TOLERANCE, "ceilings": rates}  # fmt: skip
    rows = Rows(save, _told, values=values, minutes=args.minutes,
                derived=lambda rows: {"compared": compare(rows)})  # fmt: skip
    for pixels in args.res or (RESOLUTIONS if cuda else (64,)):
        size = args.batch or (batch_for(pixels, device) if cuda else 2)
        case = make_case(config_of(model, pixels), max(size, CHECKED), device, precision)
        expected = expected_of(case, ranks)
        for form in chosen:
            row = {"pixels": pixels, "form": form.name, "batch": size, "difference": None}
            if form.fused and not cuda:
                rows.leave_out(row, "no GPU")
                continue
            rows.add(row, partial(measure, form, case, ranks, expected, rates, args.steps))
            start_afresh()
    return rows


def _told(row: dict[str, Any]) -> str:
    start = f"{row['pixels']:5}  {row['form']:32}"
    if row.get("out_of_memory"):
        return f"{start} out of memory at batch {row['batch']}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    if not row["agrees"]:
        half = "half_" if "half_difference" in row else ""
        return (
            f"{start} differs from diffusers by {row[f'{half}difference']:.1e} in "
            f"{row[f'{half}most_different']}: not timed"
        )
    mfu = "" if row["mfu"] is None else f"  MFU {100 * row['mfu']:.1f} %"
    return f"{start}{1e3 * row['seconds']:9.1f} ms{row['images_per_second']:9.1f} images/s{mfu}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--model", choices=SHAPES, help="default xl; tiny without a GPU")
    parser.add_argument("--res", type=int, nargs="+", help="pixels a side; default 256 512 1024")
    parser.add_argument("--batch", type=int, help="images, instead of 32768 tokens")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default bf16 on a GPU")
    parser.add_argument("--steps", type=int, default=10, help="in each of five timed runs")
    parser.add_argument("--forms", help="comma list; default all")
    parser.add_argument("--minutes", type=float, default=30, help="start nothing after this")
    args = parser.parse_args()
    names = {form.name for form in FORMS}
    if unknown := sorted(set((args.forms or FORMS[0].name).split(",")) - names):
        parser.error(f"--forms {unknown[0]} is not one of {', '.join(sorted(names))}")
    torch.backends.cudnn.allow_tf32 = False  # the comparison is in float32
    measured = torch.cuda.is_available()
    save = result_file(args.json, "train_step", measured=measured)
    compiler_waits()
    with start_ranks() as ranks:
        return run(args, ranks, save).end()


if __name__ == "__main__":
    raise SystemExit(main())
