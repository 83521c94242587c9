"""Damaged files end in one line of ours: seeded mutations of every format that is read.

Each mutation of a sound file is read as the product reads it. It may succeed, or raise a
PixArtError whose message is one line; any other exception is a raw error, and fails the test with
the number of the mutation, which makes it again. Processor time and memory are bounded for each.
"""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from pixart_rt.bundle import MANIFEST, ComponentEntry, Manifest, damaged_files, hash_files
from pixart_rt.checkpoints.controlnet import (
    ControlNetCheckpoint,
    read_controlnet,
    write_controlnet,
    write_controlnet_pth,
)
from pixart_rt.checkpoints.dit import DiTCheckpoint, _shapes, read_dit, write_dit
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.lora import read_adapter
from pixart_rt.checkpoints.pipeline_folder import _components
from pixart_rt.checkpoints.scheduler_config import SchedulerSettings
from pixart_rt.checkpoints.tensor_names import expected_shapes
from pixart_rt.checkpoints.text_encoder import _transformers_name, read_text_encoder
from pixart_rt.checkpoints.transformer import (
    WEIGHTS,
    TransformerCheckpoint,
    read_transformer,
    write_diffusers,
    write_pth,
)
from pixart_rt.config import EngineConfig, ModelConfig
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder, family_text_tokens
from pixart_rt.data.extract import ExtractConfig, Extraction
from pixart_rt.data.folder import ImageFolder
from pixart_rt.data.manifest import EMPTY_PROMPT, INDEX
from pixart_rt.data.store import FeatureStore
from pixart_rt.errors import PixArtError
from pixart_rt.inference.prompts import PromptEncoder
from pixart_rt.inference.schedulers import dpmpp_levels
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig
from pixart_rt.model.dit import DiTConfig
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.tokenizer import PromptTokenizer
from pixart_rt.model.vae import read_vae
from pixart_rt.training.recipe import read_recipe
from tests.data.conftest import draw_pictures

REPOSITORY = Path(__file__).parent.parent
MODEL = ModelConfig(
    num_layers=1, num_heads=1, head_dim=12, caption_channels=8, sample_size=8, max_text_tokens=20,
    interpolation_scale=1.0,
)  # fmt: skip
T5 = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1)
CPU_SECONDS = 20  # of one mutation; the slowest sound file takes a tenth of a second
MEMORY = 4 << 30  # bytes above what the process has mapped

JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 3.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63,
    2**70, 10**400, "", "x", "../../x", "/etc/passwd", "a\0b", "\ud83d", "x" * 5000, [], {}, [[]],
    [None], {"a": {}}, [1, 2, 3], ["x"] * 3, "epsilon", "float16", "0" * 64,
)  # fmt: skip
Mutator = Callable[[bytes, random.Random], bytes]


def junk(draw: random.Random) -> Any:
    """A copy: what is put into a value may be changed there."""
    return copy.deepcopy(draw.choice(JUNK))


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, insert or swap bytes, half of them near the beginning, as headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        at = min(int(draw.expovariate(1 / 200)), len(changed) - 1) if draw.random() < 0.5 else None
        at = draw.randrange(len(changed)) if at is None or at < 0 else at
        kind = draw.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at] = draw.choice((0, 255, 32, 34, 91, 123, draw.randrange(256)))
        elif kind == 2:
            del changed[at : at + draw.choice((1, 4, 100))]
        elif kind == 3:
            changed[at:at] = draw.choice((b"\0", b"[" * 50_000, b"{}", b"\xff\xfe", b"9" * 5000))
        elif kind == 4:
            changed[at:at] = changed[at : at + 50]
        elif kind == 5:
            other = draw.randrange(len(changed))
            changed[at], changed[other] = changed[other], changed[at]
        else:
            del changed[draw.choice((at, at, 0, len(changed) // 2)) :]
        if not changed:
            break
    return bytes(changed)


def mutate_value(value: Any, draw: random.Random) -> Any:
    """One place of a JSON value replaced, removed, renamed or repeated."""
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        keys = inside if isinstance(inside, dict) else range(len(inside))
        for key in keys:
            places.append((inside, key))
            if isinstance(inside[key], dict | list):
                walk(inside[key])

    walk(value)
    if not places or draw.random() < 0.02:
        return junk(draw)
    inside, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[str(junk(draw))] = inside.pop(key)
    elif kind == 2:
        other, from_there = draw.choice(places)
        with suppress(KeyError, IndexError):
            inside[key] = json.loads(json.dumps(other[from_there]))
    elif kind == 3 and type(inside[key]) in (int, float):
        inside[key] = inside[key] * draw.choice((-1, 0, 2, 1000, 10**9, 0.5))
    else:
        inside[key] = junk(draw)
    return value


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return mutate_bytes(data, draw)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if isinstance(value, dict | list):
            value = mutate_value(value, draw)
    return json.dumps(value).encode()


def mutate_lines(data: bytes, draw: random.Random) -> bytes:
    """JSON lines: one of them mutated."""
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    lines[at] = mutate_json(lines[at], draw)
    return b"".join(lines)


def mutate_toml(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return mutate_bytes(data, draw)
    lines = data.decode().splitlines(keepends=True)
    settings = [at for at, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    at = draw.choice(settings)
    name, _, value = lines[at].partition("=")
    junk = ("nan", "inf", "-1", "0", "1e400", "9" * 400, '""', "[]", "{}", "true", "1979-05-27",
            '"x"', "[1, 'x']", "[[1]]", "{a = 1}", "0.5", "3")  # fmt: skip
    kind = draw.randrange(4)
    if kind == 0:
        lines[at] = f"{draw.choice(('x', 'steps', 'lr', 'phases'))} = {value}"
    elif kind == 1:
        lines.insert(draw.randrange(len(lines)), lines.pop(at))
    elif kind == 2:
        lines.insert(at, draw.choice(lines))
    else:
        lines[at] = f"{name}= {draw.choice(junk)}\n"
    return "".join(lines).encode()


def mutate_safetensors(data: bytes, draw: random.Random) -> bytes:
    """The header's JSON or its length; else any bytes."""
    size = int.from_bytes(data[:8], "little")
    if draw.random() < 0.2:
        lie = draw.choice((0, 1, size - 1, size + 1, 2**31, 2**40, 2**64 - 1))
        return struct.pack("<Q", lie) + data[8:]
    if draw.random() < 0.3:
        return mutate_bytes(data, draw)
    header = json.loads(data[8 : 8 + size])
    if draw.random() < 0.3:
        entry = draw.choice([each for name, each in header.items() if name != "__metadata__"])
        entry["dtype"] = draw.choice(
            ("F16", "BF16", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "X")
        )
        if entry["dtype"] in ("F16", "BF16"):
            entry["shape"] = [*entry["shape"], 2]  # the same bytes
    else:
        header = mutate_value(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def mutate_zip(data: bytes, draw: random.Random) -> bytes:
    """The pickle inside a .pth, with right checksums around it; else any bytes."""
    if draw.random() < 0.4:
        return mutate_bytes(data, draw)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = mutate_bytes(content, draw)
            elif draw.random() < 0.02:
                continue
            new.writestr(entry.filename, content)
    return target.getvalue()


@dataclass(frozen=True)
class Case:
    """A file to mutate, and how the product reads it."""

    path: Path
    mutate: Mutator
    read: Callable[[], object]


def drawn_state(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def transformer_checkpoint() -> TransformerCheckpoint:
    null = torch.zeros(MODEL.max_text_tokens, MODEL.caption_channels)
    return TransformerCheckpoint(MODEL, drawn_state(expected_shapes(MODEL)), null, "made", {"a": 1})


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def bundle_manifest(root: Path) -> list[Case]:
    (root / "transformer").mkdir()
    (root / "transformer" / "model.safetensors").write_bytes(b"1234")
    (root / "y.safetensors").write_bytes(b"1234")
    entry = ComponentEntry(
        backend="torch", precision="fp32", parts=("transformer/model.safetensors",),
        files=hash_files(root, [root / "transformer" / "model.safetensors"]),
        profiles=[{"batch": [1, 1, 2]}], parity={"error": 0.1},
    )  # fmt: skip
    manifest = Manifest(
        pixart_rt_version="0", key="k" * 64, created="2026-01-01T00:00:00+00:00",
        model={"name": "made up", "sha256": "0"}, model_config=MODEL.to_dict(),
        engine_config=json.loads(json.dumps({"resolution": 256, "max_batch": 1,
                                             "precision": "fp32", "quality": "high"})),
        components={"transformer": entry}, files=hash_files(root, [root / "y.safetensors"]),
        vae={"scaling_factor": 0.18}, scheduler="dpm-solver++", buckets=[[256, 256], [128, 512]],
        versions={"torch": "2"}, build={"seconds": {"a": 1.5}},
        controlnet=ControlNetConfig(num_copies=1).to_dict(),
    )  # fmt: skip
    (root / MANIFEST).write_text(manifest.to_json())

    def read() -> None:
        found = Manifest.read(root)
        damaged_files(root, found)
        EngineConfig(resolution=found.engine_config.get("resolution", 256))
        _ = found.to_json(), found.vae_tiling, [found.weights_of(name) for name in found.components]

    return [Case(root / MANIFEST, mutate_json, read)]


def transformer_config(root: Path) -> list[Case]:
    write_diffusers(transformer_checkpoint(), root / "transformer")
    index = write_json(root / "model_index.json", {
        "_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "x"],
        "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "x"],
    })  # fmt: skip

    def read() -> None:
        read_transformer(root)
        family_text_tokens(root)
        _components(root)

    names = ("config.json", "origin.json")
    return [Case(root / "transformer" / name, mutate_json, read) for name in names] + [
        Case(index, mutate_json, read)
    ]


def scheduler_config(root: Path) -> list[Case]:
    stored = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text())
    path = write_json(root / "scheduler_config.json", stored | {"trained_betas": None})

    def read() -> None:
        dpmpp_levels(SchedulerSettings.read(root), 3)

    return [Case(path, mutate_json, read)]


def text_encoder_config(root: Path) -> list[Case]:
    path = write_json(root / "config.json", asdict(T5))
    with torch.device("meta"):
        encoder = T5Encoder(T5)
    shapes = {
        _transformers_name(name, 0, {"shared.weight": 0}): parameter.shape  # type: ignore[arg-type]
        for name, parameter in encoder.named_parameters()
    }
    save_file(drawn_state(shapes), root / "model.safetensors")

    def read() -> None:
        read_text_encoder(root, torch.float32)

    return [
        Case(path, mutate_json, read),
        Case(root / "model.safetensors", mutate_safetensors, read),
    ]


def vae_config(root: Path) -> list[Case]:
    vae = AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, layers_per_block=1, sample_size=32,
        down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
    )  # fmt: skip
    vae.save_pretrained(root)
    weights = root / "diffusion_pytorch_model.safetensors"

    def read() -> None:
        read_vae(root)

    return [Case(root / "config.json", mutate_json, read), Case(weights, mutate_safetensors, read)]


def controlnet_config(root: Path) -> list[Case]:
    folder, pth = root / "folder", root / "a.pth"
    checkpoint = controlnet_checkpoint()
    write_controlnet(checkpoint, folder)
    write_controlnet_pth(checkpoint, transformer_of_two(), pth)
    two = transformer_of_two().config

    def read() -> None:
        read_controlnet(folder, two)

    def read_pth() -> None:
        read_controlnet(pth, two)

    return [
        Case(folder / "config.json", mutate_json, read),
        Case(folder / "model.safetensors", mutate_safetensors, read),
        Case(pth, mutate_zip, read_pth),
    ]


def transformer_of_two() -> TransformerCheckpoint:
    config = replace(MODEL, num_layers=2)
    return TransformerCheckpoint(config, drawn_state(expected_shapes(config)), None, "made")


def controlnet_checkpoint() -> ControlNetCheckpoint:
    two, config = transformer_of_two().config, ControlNetConfig(num_copies=1)
    with torch.device("meta"):
        module = ControlNetTransformer(two, config)
    shapes = {f"copies.{name}": each.shape for name, each in module.copies.named_parameters()}
    return ControlNetCheckpoint(config, two, drawn_state(shapes), "made")


def recipes(root: Path) -> list[Case]:
    cases = []
    for source in sorted((REPOSITORY / "recipes").glob("*.toml")):
        path = root / source.name
        path.write_bytes(source.read_bytes())
        cases.append(Case(path, mutate_toml, lambda path=path: read_recipe(path)))  # type: ignore[misc]
    return cases


def safetensors_files(root: Path) -> list[Case]:
    write_diffusers(transformer_checkpoint(), root / "t")
    write_pth(transformer_checkpoint(), root / "a.pth")
    state = torch.load(root / "a.pth", weights_only=True)["state_dict"]
    save_file({name: each.contiguous() for name, each in state.items()}, root / "a.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(root / "t" / WEIGHTS), "part.safetensors")}
    (root / "s").mkdir()
    (root / "s" / "config.json").write_bytes((root / "t" / "config.json").read_bytes())
    (root / "s" / "part.safetensors").write_bytes((root / "t" / WEIGHTS).read_bytes())
    shards = write_json(root / "s" / f"{WEIGHTS}.index.json", index)
    return [
        Case(root / "t" / WEIGHTS, mutate_safetensors, lambda: read_transformer(root / "t")),
        Case(root / "t" / "y_embedding.safetensors", mutate_safetensors,
             lambda: read_transformer(root / "t")),
        Case(root / "a.safetensors", mutate_safetensors,
             lambda: read_transformer(root / "a.safetensors", heads=1)),
        Case(shards, mutate_json, lambda: read_transformer(root / "s")),
    ]  # fmt: skip


def pickles(root: Path) -> list[Case]:
    write_pth(transformer_checkpoint(), root / "a.pth")
    state = torch.load(root / "a.pth", weights_only=True)
    torch.save(state, root / "old.pth", _use_new_zipfile_serialization=False)
    config = DiTConfig(
        num_classes=3, num_layers=1, num_heads=1, head_dim=12, in_channels=4, out_channels=8,
        patch_size=2, sample_size=8,
    )  # fmt: skip
    shapes = {name: torch.Size(shape) for name, shape in _shapes(config).items()}
    write_dit(DiTCheckpoint(config, drawn_state(shapes), "made"), root / "dit.pt")
    torch.save({"ema": torch.load(root / "dit.pt", weights_only=True)}, root / "b.pth")

    def reader(name: str) -> Callable[[], object]:
        return lambda: read_transformer(root / name, heads=1)

    return [
        Case(root / "a.pth", mutate_zip, reader("a.pth")),
        Case(root / "old.pth", mutate_bytes, reader("old.pth")),
        Case(root / "b.pth", mutate_zip, lambda: read_dit(root / "b.pth", heads=1)),
    ]


def adapters(root: Path) -> list[Case]:
    folder, name = root / "peft", "transformer_blocks.0.attn1.to_q"
    folder.mkdir()
    path = write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"],
        "rank_pattern": {"to_q": 2}, "alpha_pattern": {}, "use_rslora": False, "bias": "none",
    })  # fmt: skip
    halves = {"A": torch.ones(2, 12), "B": torch.ones(12, 2)}
    weights = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{name}.lora_{k}.weight": v for k, v in halves.items()}, weights)
    write_json(folder / "origin.json", {"scheduler": "lcm", "base_config": MODEL.to_dict()})
    kohya, flat = root / "kohya.safetensors", "lora_transformer_" + name.replace(".", "_")
    save_file({f"{flat}.lora_down.weight": halves["A"], f"{flat}.lora_up.weight": halves["B"],
               f"{flat}.alpha": torch.tensor(2.0)}, kohya)  # fmt: skip
    told = root / "pytorch_lora_weights.safetensors"
    settings = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 4})}
    named = {f"transformer.{name}.lora_{k}.weight": each for k, each in halves.items()}
    save_file(named, told, metadata=settings)

    def read() -> None:
        read_adapter(folder)

    return [
        Case(path, mutate_json, read),
        Case(folder / "origin.json", mutate_json, read),
        Case(weights, mutate_safetensors, read),
        Case(kohya, mutate_safetensors, lambda: read_adapter(kohya)),
        Case(told, mutate_safetensors, lambda: read_adapter(told)),
    ]


def tokenizers(root: Path) -> list[Case]:
    cases = []
    for source in sorted((TINY / "tokenizer").iterdir()):
        folder = root / source.name
        folder.mkdir()
        for each in source.parent.iterdir():
            (folder / each.name).write_bytes(each.read_bytes())
        mutate = mutate_json if source.suffix == ".json" else mutate_bytes

        def read(folder: Path = folder) -> None:
            PromptTokenizer(folder, 20)(["a red circle"])

        cases.append(Case(folder / source.name, mutate, read))
    return cases


def prompt_cache(root: Path) -> list[Case]:
    """What a cached prompt holds is taken or encoded again; it never stops a request."""
    tokenizer = PromptTokenizer(TINY / "tokenizer", 20)

    class Encoder:
        capturable = False

        def __call__(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.ones(*input_ids.shape, 8)

    def encode() -> None:
        device, made = torch.device("cpu"), Encoder()
        encoder = PromptEncoder(tokenizer, made, device, 1, disk=root)  # type: ignore[arg-type]
        found = encoder.rows(["a red circle"])[0]
        assert found.embeds.shape[-1] == 8, "a cached prompt of another width"

    encode()
    [path] = root.glob("*.safetensors")
    return [Case(path, mutate_safetensors, encode)]


def feature_store(root: Path) -> list[Case]:
    images = draw_pictures(root / "images", 3)
    encoder = FeatureEncoder.open(EncoderConfig(model="tiny"), torch.device("cpu"))
    store = root / "store"
    Extraction(ImageFolder(images), store, encoder, ExtractConfig(), "tiny").run()

    def read() -> None:
        found = FeatureStore(store)
        _ = found.bucket_of, found.num_tokens, found.sources, found.empty_prompt, found.classes
        for sample in range(len(found)):
            found.load([sample], seed=0, step=0)
        found.damaged()

    [shard] = store.glob("*.parquet")
    lines = images / "metadata.jsonl"

    def read_lines() -> None:
        folder = ImageFolder(images)
        for index in range(len(folder)):
            with suppress(PixArtError):
                _ = folder[index]

    return [
        Case(store / MANIFEST, mutate_json, read),
        Case(store / INDEX, mutate_bytes, read),
        Case(store / EMPTY_PROMPT, mutate_safetensors, read),
        Case(shard, mutate_bytes, read),
        Case(lines, mutate_lines, read_lines),
    ]


FORMATS: dict[str, Callable[[Path], list[Case]]] = {
    "bundle manifest": bundle_manifest,
    "transformer config": transformer_config,
    "scheduler config": scheduler_config,
    "text encoder": text_encoder_config,
    "VAE": vae_config,
    "controlnet": controlnet_config,
    "recipes": recipes,
    "safetensors": safetensors_files,
    "pickles": pickles,
    "adapters": adapters,
    "tokenizer": tokenizers,
    "prompt cache": prompt_cache,
    "feature store": feature_store,
}


class Hang(BaseException):
    """Not an Exception: readers turn those into lines of ours."""


@contextmanager
def bounded() -> Iterator[None]:
    """Hang after CPU_SECONDS of the processor, MemoryError above MEMORY."""

    def stop(*_: object) -> None:
        raise Hang(f"more than {CPU_SECONDS} s of the processor")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)


def raw_error(case: Case) -> str | None:
    """What the product raises that is no line of ours."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.read()
    except PixArtError as error:
        several = "\n" in str(error).strip() or len(str(error)) > 2000
        return f"not one line: {str(error)[:300]!r}" if several else None
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def run(name: str, folder: Path, count: int) -> None:
    cases = FORMATS[name](folder)
    sound = [case.path.read_bytes() for case in cases]
    for case in cases:
        case.read()  # as it is, each is read
    failures: dict[str, str] = {}
    for number in range(count):
        at = number % len(cases)
        case, draw = cases[at], random.Random(f"{name} {number}")
        with suppress(RecursionError, OverflowError):  # of json.dumps, in the mutation itself
            case.path.write_bytes(case.mutate(sound[at], draw))
        if (found := raw_error(case)) is not None:
            failures.setdefault(found.split(":")[0] + found[-60:], f"{number} {case.path}: {found}")
        case.path.write_bytes(sound[at])
    assert not failures, f"{len(failures)} kinds\n" + "\n".join(list(failures.values())[:40])


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_ends_in_one_line(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, 60)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FORMATS)
def test_two_thousand_damaged_files_end_in_one_line(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, 2000)
