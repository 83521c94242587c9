"""Small real models: a random PixArt pipeline in diffusers layout, and its bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

if not torch.cuda.is_available():  # Triton reads this once, when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Say what is wrong with a pair of versions whose interpreter fails deep inside a kernel."""
    import numpy
    import triton

    reason = interpreter_refuses(triton.__version__, numpy.__version__)
    if reason and triton.knobs.runtime.interpret:
        raise pytest.UsageError(reason)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's; its own loadgroup needs pytest before 9.2
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, a file's tests stay in one; so do all that launch kernels.

    tests/kernels/test_launch_compiles.py compiles what the others of its folder have launched.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            apart = file.endswith(("/test_codegen.py", "/test_jit_sm90.py"))
            return file if apart or "tests/kernels/" not in file else "tests/kernels"

    return Scheduling(config, log)


def interpreter_refuses(triton: str, numpy: str) -> str:
    """Why Triton's interpreter cannot run with these versions; empty if it can.

    Triton 3.6 converts arrays of one element to scalars, which NumPy 2.4 refuses with a TypeError.
    On a GPU nothing is interpreted, and any NumPy will do.
    """
    if release(triton) >= (3, 7) or release(numpy) < (2, 4):
        return ""
    return (
        f"Triton {triton}'s interpreter, which runs the kernels where there is no GPU, does not "
        f"work with NumPy {numpy}: install numpy<2.4, or triton>=3.7"
    )


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


CAPTIONS = [
    "a red circle above a blue square",
    "two green triangles on a white background, in a row",
    "a large yellow star to the left of a small purple circle",
]


def write_tokenizer(folder: Path) -> int:
    """A SentencePiece T5 tokenizer of a few dozen pieces; its vocabulary size."""
    import sentencepiece
    from transformers import T5Tokenizer

    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    tokenizer = T5Tokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer)


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Every parameter random and not small: zero-initialised ones would hide a missing term."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(std=spread, generator=generator)


def make_pipeline_folder(folder: Path, sample_size: int, *, sigma: bool = False) -> Path:
    """A random PixArt pipeline for `sample_size` latent pixels a side; micro-conditioned at 128."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    vocabulary = write_tokenizer(folder / "tokenizer")
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_heads=4,
            num_layers=3,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=72, cross_attention_dim=72, num_layers=2,
        sample_size=sample_size, caption_channels=32,
        use_additional_conditions=sample_size == 128 and not sigma,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.13025 if sigma else 0.18215,
        mid_block_add_attention=sample_size < 128,
    )  # fmt: skip
    for seed, module in enumerate((transformer, vae)):
        randomize(module, seed)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", solver_order=2
    )
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(str(folder / "tokenizer"))
    family = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    family(tokenizer, t5.eval(), vae.eval(), transformer.eval(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """pipeline_folder(sample_size, sigma=False): a random pipeline, made once."""
    made: dict[tuple[int, bool], Path] = {}

    def get(sample_size: int, *, sigma: bool = False) -> Path:
        key = (sample_size, sigma)
        if key not in made:
            root = tmp_path_factory.mktemp("pipelines") / f"{sample_size}-{sigma}"
            made[key] = make_pipeline_folder(root, sample_size, sigma=sigma)
        return made[key]

    return get


@pytest.fixture(scope="session")
def bundle_256(
    pipeline_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An ONNX Runtime bundle of the random 256 px pipeline."""
    from pixart_rt.config import EngineConfig
    from pixart_rt.export.build import build

    out = tmp_path_factory.mktemp("bundles") / "ort-256"
    return build(str(pipeline_folder(32)), out, EngineConfig(resolution=256, max_batch=2)).path


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """References instead of Triton's interpreter, as on any CPU outside the tests."""
    from pixart_rt.kernels import launch

    monkeypatch.setattr(launch, "interpreting", lambda: False)
