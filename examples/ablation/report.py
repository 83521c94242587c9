"""The ablation's results as one table and four pictures.

DIR/ablation.md   DIR/ablation.json   DIR/ablation-<claim>.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.ablation.arms import Arm, Plan
from examples.ablation.run import Curve, Point
from examples.ablation.shapes import Cost
from pixart_rt.files import replacing

COLORS = {
    Arm.REPARAMETERIZED: "#1f5fa8",
    Arm.SCRATCH: "#e08214",
    Arm.ADALN: "#4d9221",
    Arm.SPARSE: "#8c6bb1",
}
SIZE, DPI = (9.0, 4.0), 120  # inches


@dataclass(frozen=True, slots=True)
class Claim:
    """Two arms that differ in one thing."""

    name: str
    title: str
    labels: dict[Arm, str]
    from_dit: bool = False  # steps count from the DiT's first one where an arm starts from it


CLAIMS = (
    Claim("reparameterized", "Re-parameterised against from scratch",
          {Arm.REPARAMETERIZED: "re-parameterised DiT", Arm.SCRATCH: "from scratch"}),
    Claim("adaln", "adaLN-single against adaLN",
          {Arm.REPARAMETERIZED: "adaLN-single", Arm.ADALN: "adaLN"}),
    Claim("captions", "Dense against sparse captions",
          {Arm.REPARAMETERIZED: "dense captions", Arm.SPARSE: "sparse captions"}),
    Claim("decomposed", "Decomposed against single-stage training",
          {Arm.REPARAMETERIZED: "classes, then text", Arm.SCRATCH: "text at once"},
          from_dit=True),
)  # fmt: skip


def at(curve: Curve, step: int) -> Point:
    """An arm at one of its scored steps."""
    (point,) = (each for each in curve.points if each.step == step)
    return point


def table(plan: Plan, curves: Mapping[Arm, Curve], costs: Mapping[str, Cost]) -> list[str]:
    """Lines of markdown: a row for each side of each claim."""
    lines = [
        "| claim | arm | steps of text | images seen | loss | objects right | right and placed | "
        "images exact |",
        "|--|--|--|--|--|--|--|--|",
    ]
    for claim in CLAIMS:
        for arm, label in claim.labels.items():
            steps = plan.steps * (2 if arm is Arm.SCRATCH and claim.from_dit else 1)
            seen = plan.batch * (2 * plan.steps if claim.from_dit else steps)
            point = at(curves[arm], steps)
            shares = " | ".join(f"{v:.1%}" for v in (point.right, point.placed, point.exact))
            lines.append(
                f"| {claim.title} | {label} | {steps} | {seen} | {point.loss:.4f} | {shares} |"
            )
    lines += ["", "| | parameters | at XL/2 | peak memory of a training step |", "|--|--|--|--|"]
    for name, each in costs.items():
        lines.append(
            f"| {name.replace('_', '-')} | {each.parameters / 1e6:.2f} M | "
            f"{each.parameters_xl / 1e6:.1f} M | {each.peak_bytes / 2**20:.0f} MiB |"
        )
    return lines


def write(
    out: Path,
    plan: Plan,
    curves: Mapping[Arm, Curve],
    costs: Mapping[str, Cost],
    provenance: Mapping[str, Any],
) -> list[Path]:
    """All files; returns their paths, the table first."""
    values = {
        **provenance,
        "plan": plan.to_dict(),
        "arms": {str(arm): asdict(curve) for arm, curve in curves.items()},
        "costs": {name: asdict(each) for name, each in costs.items()},
    }
    markdown = "\n".join([_heading(plan), "", *table(plan, curves, costs)])
    texts = {"ablation.md": markdown, "ablation.json": json.dumps(values, indent=1)}
    written = []
    for name, text in texts.items():
        with replacing(out / name) as new:
            new.write_text(text + "\n", encoding="utf-8")
        written.append(out / name)
    for claim in CLAIMS:
        written.append(_picture(out, claim, plan, curves))
    return written


def _heading(plan: Plan) -> str:
    return (
        f"{plan.resolution} px, {plan.num_layers} blocks, S = {plan.steps} steps of {plan.batch} "
        f"images, {plan.optimizer}, lr {plan.lr:g}, seed {plan.seed}; averaged weights on "
        f"{plan.captions} held-out captions, {plan.sampling_steps} steps, guidance "
        f"{plan.guidance_scale:g}. Loss: on scenes and captions that no arm saw."
    )


def _picture(out: Path, claim: Claim, plan: Plan, curves: Mapping[Arm, Curve]) -> Path:
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for arm, label in claim.labels.items():
        after = plan.steps if claim.from_dit and arm is not Arm.SCRATCH else 0
        last = plan.steps * (2 if claim.from_dit else 1)
        _draw(losses, [(s + after, v) for s, v in curves[arm].losses], last, arm, label)
        points = [(each.step + after, 100 * each.placed) for each in curves[arm].points]
        _draw(scores, points, last, arm, label, marker="o")
    for axes, name in ((losses, "training loss"), (scores, "objects right and placed, %")):
        axes.set_xlabel("steps, with those of classes" if claim.from_dit else "steps of text")
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    losses.set_yscale("log")
    scores.set_ylim(0, max(10.0, scores.get_ylim()[1]))
    scores.legend(frameon=False)
    figure.suptitle(f"{claim.title}, {plan.resolution} px, {plan.batch} images a step", fontsize=10)
    path = out / f"ablation-{claim.name}.png"
    with replacing(path) as new:
        figure.savefig(new, format="png")
    return path


def _draw(
    axes: Axes, points: list[tuple[int, float]], last: int, arm: Arm, label: str,
    marker: str | None = None,
) -> None:  # fmt: skip
    shown = [point for point in points if point[0] <= last]
    axes.plot(*zip(*shown, strict=True), color=COLORS[arm], label=label, marker=marker)
