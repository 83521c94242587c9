"""The denoising loop on patch tokens: transformer, guidance and DPM-Solver++ step, S times.

Everything it reads is a tensor on the device that was there before it began: it allocates its
outputs, logs nothing, waits for nothing, and can be captured as one CUDA graph (cuda_graphs.py).

B images, N tokens, S steps, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from pixart_rt.kernels.solver import cfg_dpmpp_step

OnStep = Callable[[int, Tensor, Tensor], Tensor]  # step, x after it, its x0 -> the next x


@dataclass(frozen=True, slots=True)
class TextInputs:
    """The transformer's inputs that tell its rows and their text; see model/signature.py."""

    null_rows: Tensor
    text_rows: Tensor
    constant: Tensor
    prompt_mask: Tensor
    text_kv: Tensor | None = None
    absorbed_keys: Tensor | None = None
    absorbed_bias: Tensor | None = None
    absorbed_values: Tensor | None = None

    def to_dict(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class LoopInputs:
    """All that a run of the loop depends on, but the weights."""

    x: Tensor  # [B, N, C·p·p], the initial noise as tokens
    pos_embed: Tensor  # [B, N, D]
    modulation: Tensor  # [S, B, 7, D]
    coefficients: Tensor  # [S, B, 8] of kernels/solver.py
    outputs: Tensor  # the wanted channels of the model's output
    plain: TextInputs | None  # a row for each image, for steps without guidance
    guided: TextInputs | None  # two rows for each, for the others
    guides: tuple[bool, ...]  # whether step s takes the guided rows
    control: Tensor | None = None  # [B, N, C·p·p], where the transformer has a ControlNet

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own, in a fixed order."""
        found = {name: getattr(self, name) for name in TENSORS}
        if self.control is not None:
            found["control"] = self.control
        for text in ("plain", "guided"):
            inputs: TextInputs | None = getattr(self, text)
            if inputs is not None:
                found |= {f"{text}.{name}": value for name, value in inputs.to_dict().items()}
        return found

    def with_tensors(self, tensors: dict[str, Tensor]) -> LoopInputs:
        """The same inputs with other tensors, named as `tensors` names them."""

        def text(prefix: str) -> TextInputs | None:
            found = {
                name.removeprefix(f"{prefix}."): value
                for name, value in tensors.items()
                if name.startswith(f"{prefix}.")
            }
            return TextInputs(**found) if found else None

        return LoopInputs(
            **{name: tensors[name] for name in TENSORS},
            plain=text("plain"),
            guided=text("guided"),
            guides=self.guides,
            control=tensors.get("control"),
        )


TENSORS = ("x", "pos_embed", "modulation", "coefficients", "outputs")


def run_loop(
    transformer: Callable[..., Tensor],
    inputs: LoopInputs,
    channels: int,
    on_step: OnStep | None = None,
) -> Tensor:
    """The tokens [B, N, C·p·p] after the last step."""
    x = x0 = inputs.x
    control = {} if inputs.control is None else {"control": inputs.control}
    for step, guided in enumerate(inputs.guides):
        text = inputs.guided if guided else inputs.plain
        assert text is not None
        noise = transformer(
            tokens=x,
            pos_embed=inputs.pos_embed,
            modulation=inputs.modulation[step],
            outputs=inputs.outputs,
            **text.to_dict(),
            **control,
        )
        x, x0 = cfg_dpmpp_step(noise, x, x0, inputs.coefficients[step], channels)
        if on_step is not None:
            x = on_step(step, x, x0)
    return x
