"""The settings of a model, an engine and a sampling run. A setting that exists is valid."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from pixart_rt.approximations import Approximation
from pixart_rt.buckets import PIXELS_PER_TOKEN, RESOLUTIONS, token_range
from pixart_rt.errors import ConfigError
from pixart_rt.typed import check_types

COMPONENTS = ("text_encoder", "transformer", "vae_decoder")


class Precision(StrEnum):
    """The dtype of a component's weights and matrix products."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Kernels(StrEnum):
    """Which operators a PyTorch module calls."""

    REFERENCE = "reference"
    """Plain PyTorch."""
    FUSED = "fused"
    """The Triton kernels; the reference of each wherever its kernel does not run."""


class Quality(StrEnum):
    """How the transformer rounds, from most faithful to fastest."""

    LOSSLESS = "lossless"
    """Every rounding where the unfused model in this precision has it."""
    HIGH = "high"
    """The same mathematics with fewer roundings. The default."""
    FAST = "fast"
    """The blocks' linears in fp8 (e4m3), with a scale for each row."""


class Weights(StrEnum):
    """How a PyTorch component keeps the weights of its linears; the arithmetic keeps its precision.

    Not a Quality: that is about how activations round. Quantized by torchao when loaded.
    """

    FULL = "full"
    """In the component's precision. The default."""
    INT8 = "int8"
    """int8 with a scale for each output."""
    FP8 = "fp8"
    """float8 e4m3 with a scale for each output: as small as int8, and coarser."""


class TextPlace(StrEnum):
    """Where the weights of a text encoder are while a pipeline runs on a GPU."""

    RESIDENT = "resident"
    """On the GPU throughout. The default."""
    OFFLOAD = "offload"
    """In host memory, brought to the GPU for each prompt that is new, and dropped there after."""
    CPU = "cpu"
    """In host memory, and run there."""


class CfgNull(StrEnum):
    """What the unconditional branch of guidance sees. Three conventions were published."""

    EMPTY_PROMPT = "empty-prompt"
    """T5("") with its own one-token mask: diffusers, both families. The default."""
    Y_EMBEDDING = "y-embedding"
    """The checkpoint's y_embedding under the caption's mask: the original PixArt-alpha code."""
    EMPTY_PROMPT_CAPTION_MASK = "empty-prompt-caption-mask"
    """T5("") under the caption's mask: the original PixArt-Sigma code."""


class Saving(StrEnum):
    """Work that the pipeline leaves out because the images are the same without it."""

    SHARED_FIRST_BLOCK = "shared-first-block"
    """The first self-attention once for both halves of guidance: they differ only in their text."""
    CONSTANT_TEXT = "constant-text"
    """A vector instead of cross-attention for unconditional prompts of one visible token."""
    ABSORBED_TEXT = "absorbed-text"
    """Query and output projections folded into short prompts, where the backend can."""
    NOISE_ONLY = "noise-only"
    """No learned variance for samplers that do not use it."""
    SHORT_TEXT = "short-text"
    """The text encoder at the length of the longest prompt, not of the model's text."""
    FUSED_SOLVER = "fused-solver"
    """Guidance and the DPM-Solver++ step in one operator on tokens."""


_MOST = {  # above those of any model; without them a damaged file takes hours and all memory
    "num_layers": 256, "num_heads": 1024, "head_dim": 1024, "in_channels": 1024, "patch_size": 64,
    "caption_channels": 2**16, "max_text_tokens": 2**16, "sample_size": 2**12,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a PixArt transformer. The default is XL/2 at 1024, multi-scale."""

    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    in_channels: int = 4  # of the latents
    out_channels: int = 8  # noise and, when twice in_channels, the learned variance
    patch_size: int = 2
    caption_channels: int = 4096  # width of the text encoder
    max_text_tokens: int = 120  # 300 for PixArt-Sigma
    sample_size: int = 128  # latent pixels per side: resolution / 8
    interpolation_scale: float = 2.0  # of the position table (`lewei_scale`, `pe_interpolation`)
    micro_conditioning: bool = True  # on image size and aspect ratio
    cfg_null: CfgNull = CfgNull.EMPTY_PROMPT

    def __post_init__(self) -> None:
        scale = self.interpolation_scale
        if isinstance(scale, float) and not math.isfinite(scale):  # which is no number of a file
            raise ConfigError(f"interpolation_scale must be > 0 and finite, got {scale}")
        check_types(self)  # TypeError, as for any call with wrong types; readers say which file
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be positive, got {value}")
            if value > most:
                raise ConfigError(f"{name} must be at most {most}, got {value}")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ConfigError(
                f"out_channels is {self.out_channels}; it must be in_channels ({self.in_channels}) "
                "or, with a learned variance, twice that"
            )
        if self.hidden_size % 4:
            raise ConfigError(
                f"width {self.hidden_size} = num_heads x head_dim must be a multiple of 4 "
                "for the position table"
            )
        if self.micro_conditioning and self.hidden_size % 3:
            raise ConfigError(
                f"micro-conditioning splits the width in three, but {self.hidden_size} = "
                f"{self.num_heads} heads x {self.head_dim} does not divide; change the heads"
            )
        if scale <= 0:
            raise ConfigError(f"interpolation_scale must be > 0, got {scale}")

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def token_channels(self) -> int:
        """Numbers per input patch token: 16 for 4-channel latents and patches of 2×2."""
        return self.in_channels * self.patch_size**2

    @property
    def base_size(self) -> int:
        """Tokens per side at the model's own resolution."""
        return self.sample_size // self.patch_size

    @property
    def resolution(self) -> int:
        """Pixels per side of the square image the model was trained for."""
        return self.base_size * PIXELS_PER_TOKEN

    @property
    def learned_variance(self) -> bool:
        return self.out_channels == 2 * self.in_channels

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown model settings {sorted(unknown)}")
        return cls(**{**values, "cfg_null": CfgNull(values.get("cfg_null", CfgNull.EMPTY_PROMPT))})


XL_2_1024_MS = ModelConfig()
XL_2_512 = replace(XL_2_1024_MS, sample_size=64, interpolation_scale=1.0, micro_conditioning=False)
XL_2_256 = replace(XL_2_512, sample_size=32)
SIGMA_XL_2_1024 = replace(XL_2_1024_MS, micro_conditioning=False, max_text_tokens=300)

PUBLISHED = {  # the default checkpoint of `pixart-rt build` by resolution
    1024: "PixArt-alpha/PixArt-XL-2-1024-MS",
    512: "PixArt-alpha/PixArt-XL-2-512x512",
    256: "PixArt-alpha/PixArt-XL-2-256x256",
}
RANDOM_XL = {1024: XL_2_1024_MS, 512: XL_2_512, 256: XL_2_256}


def text_lengths(max_text_tokens: int) -> tuple[int, ...]:
    """The lengths at which a text encoder runs: 16, 32, 64, 128 below the model's own, and that."""
    return (*(n for n in (16, 32, 64, 128) if n < max_text_tokens), max_text_tokens)


LARGEST_BATCH = 31  # guidance doubles it, and exported graphs take up to 63 rows


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What a bundle's engines are compiled for. Equal configs build interchangeable engines."""

    resolution: int = 1024  # pixels per side
    backend: str = "onnxruntime"
    precision: Precision = Precision.FP32  # of transformer and VAE decoder
    text_precision: Precision = Precision.FP32
    max_batch: int = 1  # images per call; guidance doubles it inside the engine
    targets: tuple[str, ...] = ()  # such as ("sm80", "sm89"); empty: the present machine
    components: tuple[str, ...] = COMPONENTS
    text_encoder_backend: str | None = None  # None: the same as the others; or "torch"
    quality: Quality = Quality.HIGH  # other ones with the backends torch and torch-compile
    plugins: bool = False  # also a transformer engine that holds our kernels, for TensorRT
    weights: Weights = Weights.FULL  # of the transformer's blocks; others as for quality
    text_weights: Weights = Weights.FULL  # of the text encoder; others where PyTorch runs it
    text_place: TextPlace = TextPlace.RESIDENT  # what a pipeline does unless it is told otherwise
    vae_tiling: bool = False  # likewise

    def __post_init__(self) -> None:
        if self.plugins and self.backend not in ("auto", "tensorrt", "tensorrt-rtx"):
            raise ConfigError(
                f"plugins were requested with backend {self.backend}, which has none; use "
                "tensorrt-rtx or tensorrt, or leave them out"
            )
        if self.plugins and "transformer" not in self.components:
            raise ConfigError(
                f"plugins were requested without the transformer, whose operators they are; found "
                f"components {', '.join(self.components)}; add it or leave plugins out"
            )
        if self.quality is not Quality.HIGH and self.backend not in ("torch", "torch-compile"):
            raise ConfigError(
                f"quality {self.quality} is not supported with backend {self.backend}, whose "
                "compiler chooses its roundings itself; use torch or torch-compile"
            )
        check_weights(self)
        if self.resolution not in RESOLUTIONS:
            raise ConfigError(f"resolution {self.resolution} is not one of {RESOLUTIONS}")
        if not 1 <= self.max_batch <= LARGEST_BATCH:
            raise ConfigError(
                f"max_batch must be between 1 and {LARGEST_BATCH}, got {self.max_batch}"
            )
        unknown = [name for name in self.components if name not in COMPONENTS]
        if unknown or not self.components:
            raise ConfigError(f"components {unknown} are unknown; choose from {COMPONENTS}")

    @property
    def token_range(self) -> tuple[int, int]:
        """Smallest and largest token count that an engine accepts."""
        return token_range(self.resolution)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """From a manifest's values; settings that it does not have keep their defaults."""
        kinds: dict[str, Any] = {
            "precision": Precision, "text_precision": Precision, "quality": Quality,
            "weights": Weights, "text_weights": Weights, "text_place": TextPlace,
            "targets": tuple, "components": tuple,
        }  # fmt: skip
        return cls(**{k: kinds[k](v) if k in kinds else v for k, v in values.items()})


def check_weights(config: EngineConfig) -> None:
    """Refuse quantized weights and offloading where no PyTorch module could have them."""
    text_backend = config.text_encoder_backend or config.backend
    asked = (
        ("weights", config.weights is not Weights.FULL, config.backend),
        ("text_weights", config.text_weights is not Weights.FULL, text_backend),
    )
    for name, given, backend in asked:
        if given and backend not in ("torch", "torch-compile", "auto"):
            raise ConfigError(
                f"{name} {getattr(config, name)} is not supported with backend {backend}; weights "
                "are quantized where PyTorch runs them: use torch or torch-compile"
                + (", or --text-encoder torch" if name == "text_weights" else "")
            )
    if config.weights is not Weights.FULL and config.quality is not Quality.HIGH:
        raise ConfigError(
            f"weights {config.weights} were requested with quality {config.quality}; lossless "
            f"keeps all weights and fast has its own fp8 ones: use quality {Quality.HIGH}"
        )
    if config.text_place is TextPlace.OFFLOAD and text_backend not in ("torch", "auto"):
        raise ConfigError(
            f"text_place offload is not supported with backend {text_backend} for the text "
            "encoder; only plain PyTorch can be moved: use --text-encoder torch"
        )


class Scheduler(StrEnum):
    """The samplers, by name. All but LCM and DMD run any PixArt checkpoint."""

    DPM_SOLVER = "dpm-solver++"
    SA_SOLVER = "sa-solver"
    DDIM = "ddim"
    IDDPM = "iddpm"
    LCM = "lcm"
    DMD = "dmd"


MOST_GUIDANCE = 100
MOST_STEPS = {
    Scheduler.DPM_SOLVER: 999,  # at 1000 two timesteps of diffusers' solver coincide: NaN
    Scheduler.SA_SOLVER: 999,
    Scheduler.DDIM: 1000,
    Scheduler.IDDPM: 1000,
    Scheduler.LCM: 50,  # the steps it was distilled from
    Scheduler.DMD: 1,
}
USUAL_STEPS = {Scheduler.LCM: 4, Scheduler.DMD: 1}  # where nobody says; 20 with the others
DISTILLED = frozenset({Scheduler.LCM, Scheduler.DMD})  # guidance is in their checkpoints' weights


def check_guidance(scale: float) -> None:
    """Raises ConfigError outside what gives images: 0 to 100 (1: no guidance)."""
    if not 0 <= scale <= MOST_GUIDANCE:
        raise ConfigError(f"guidance_scale must be from 0 to {MOST_GUIDANCE}, got {scale}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What a model's makers sample it with; None: the usual, 4.5 and 20 (docs/bundles.md)."""

    guidance_scale: float | None = None
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        scale, steps = self.guidance_scale, self.num_inference_steps
        for name, value, kinds in (
            ("guidance_scale", scale, int | float),
            ("num_inference_steps", steps, int),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        if scale is not None:
            check_guidance(scale)
        if steps is not None and steps < 1:
            raise ConfigError(f"num_inference_steps must be at least 1, got {steps}")


def is_trained_for(trained: Scheduler, asked: Scheduler) -> bool:
    """True where weights made for one sampler can be run by another: all but the distilled."""
    return asked is trained or not {asked, trained} & DISTILLED


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How an image is sampled. Names and defaults are those of diffusers."""

    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    scheduler: Scheduler = Scheduler.DPM_SOLVER
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The part of the steps, from first to last, that is guided (arXiv:2404.07724)."""
    approximate: Approximation | None = None

    def __post_init__(self) -> None:
        most = MOST_STEPS[self.scheduler]
        if not 1 <= self.num_inference_steps <= most:
            raise ConfigError(
                f"num_inference_steps must be {'between 1 and ' if most > 1 else ''}{most} with "
                f"{self.scheduler}, got {self.num_inference_steps}"
            )
        check_guidance(self.guidance_scale)
        first, last = self.guidance_interval
        if not 0 <= first <= last <= 1:
            raise ConfigError(
                f"guidance_interval must be two fractions of the steps in order, such as (0, 0.5), "
                f"got {self.guidance_interval}"
            )

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch runs at all. Not with scale <= 1, as in diffusers."""
        first, last = self.guidance_interval
        return self.guidance_scale > 1 and first < last

    def guides(self, step: int) -> bool:
        """Whether it runs at this step, counted from 0."""
        first, last = self.guidance_interval
        return self.guided and first <= step / self.num_inference_steps < last
