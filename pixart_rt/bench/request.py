"""What is measured. A request that exists can be measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from pixart_rt.buckets import choose_bucket
from pixart_rt.bundle import Manifest
from pixart_rt.config import CfgNull, SamplingConfig, Scheduler
from pixart_rt.errors import ConfigError

PEERS = ("diffusers", "diffusers-compile")
PROMPT = "a red circle above a blue square"
# Decibels of PSNR of 8-bit images. In float32 tiny had 73 and more on a CPU; 16 bits round 2**13
# times as coarsely or more in every step. agreement.py has a second bound, from the images.
MIN_PSNR = {"fp32": 40.0, "fp16": 20.0, "bf16": 20.0}


class Prompts:
    """Texts that no system has seen: the request's prompt with a running number."""

    def __init__(self, prompt: str) -> None:
        self.prompt, self._numbers = prompt, count(1)

    def text(self, number: int) -> str:
        return f"{self.prompt}, picture {number}"

    def new(self, batch: int) -> list[str]:
        return [self.text(next(self._numbers)) for _ in range(batch)]

    def cached(self, batch: int) -> list[str]:
        return [self.prompt] * batch


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """One measurement of a bundle. `peer_model` is a pipeline folder in diffusers' layout."""

    bundle: Path
    prompt: str = PROMPT
    aspect_ratio: str = "1:1"
    steps: int = 20
    guidance_scale: float = 4.5
    seed: int = 0
    batches: tuple[int, ...] = (1,)  # the first one is measured in full
    repeats: int = 10
    warmup: int | None = None  # None: 1, and 3 on a GPU, where graphs are captured at the second
    threads: int | None = None  # None: PyTorch's default
    peers: tuple[str, ...] = ()
    peer_model: Path | None = None
    min_psnr: float | None = None  # None: of MIN_PSNR, by the bundle's precision
    cold: bool = True

    def __post_init__(self) -> None:
        for name in ("repeats", "warmup", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"batches are counts of images from 1 on, got {self.batches}")
        if len(set(self.batches)) < len(self.batches):
            raise ConfigError(f"a batch size was given twice in {self.batches}")
        if unknown := [peer for peer in self.peers if peer not in PEERS]:
            raise ConfigError(f"peer {unknown[0]!r} is not one of {', '.join(PEERS)}")
        if len(set(self.peers)) < len(self.peers):
            raise ConfigError(f"a peer was given twice in {', '.join(self.peers)}")
        self.sampling  # noqa: B018 - refuses steps and guidance that cannot be
        if self.peers and self.steps < 2:
            raise ConfigError("diffusers' pipeline cannot run 1 step; use at least 2 with a peer")

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(num_inference_steps=self.steps, guidance_scale=self.guidance_scale)

    def checked(self, manifest: Manifest) -> BenchRequest:
        """This request if the bundle can serve it, peers found; else a ConfigError says why."""
        choose_bucket(int(manifest.engine_config["resolution"]), self.aspect_ratio, None, None)
        most = int(manifest.engine_config["max_batch"])
        if max(self.batches) > most:
            raise ConfigError(
                f"batch {max(self.batches)} was requested, but {self.bundle} was built for at most "
                f"{most}; build it with --max-batch {max(self.batches)}"
            )
        if "text_encoder" not in manifest.components:
            raise ConfigError(
                f"{self.bundle} has no text encoder, and a prompt's whole way is measured; build "
                "it again without --components"
            )
        if not self.peers:
            return self
        if manifest.scheduler != Scheduler.DPM_SOLVER:
            raise ConfigError(
                f"peers are compared with {Scheduler.DPM_SOLVER} alone, {self.bundle} samples with "
                f"{manifest.scheduler}, which draws noise of its own; leave --peer out"
            )
        if manifest.config.cfg_null is not CfgNull.EMPTY_PROMPT:
            raise ConfigError(
                f"{self.bundle} was built with --cfg-null {manifest.config.cfg_null}, diffusers "
                "guides by the empty prompt: their images differ; leave --peer out"
            )
        folder = self.peer_model or pipeline_folder(manifest)
        if folder is None or not (folder / "model_index.json").is_file():
            raise ConfigError(
                f"the peers need the weights of {manifest.model['name']} as a diffusers pipeline "
                f"folder, and {folder or manifest.model.get('source')} is none here; give "
                "--peer-model DIR"
            )
        return replace(self, peer_model=folder)


def pipeline_folder(manifest: Manifest) -> Path | None:
    """The diffusers pipeline that a bundle was built from, if it is still there."""
    if manifest.model["name"] == "tiny":
        return Path(__file__).resolve().parents[1] / "assets" / "tiny"
    source = Path(manifest.model.get("source", ""))
    for folder in (source, source.parent):
        if (folder / "model_index.json").is_file():
            return folder
    return None


def transformer_folder(manifest: Manifest) -> str:
    """The pipeline's subfolder with the bundle's transformer: tiny has one for each resolution."""
    tiny = manifest.model["name"] == "tiny"
    return "transformer_256" if tiny and manifest.config.resolution == 256 else "transformer"
