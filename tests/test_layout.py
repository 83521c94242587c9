"""The shape of the repository: folders, links, and who may import whom, read from the sources."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pixart_rt

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "export", "training")  # top-level folders imported as pixart_rt.<name>

# Bottom first. A file imports from its own layer and from those before it, with two exceptions:
# the lowest layer imports nothing of ours, and the rooms next to each other do not know each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"kernels", "errors", "stderr_console", "version", "torchao_import", "typed"}),
    frozenset({"approximations", "buckets", "config", "files"}),
    frozenset({"model", "bundle"}),
    frozenset({"checkpoints"}),
    frozenset({"backends"}),
    frozenset({"inference", "memory", "data"}),
    frozenset({"doctor"}),
    frozenset({"export", "training"}),
    frozenset({"bench", "evaluation"}),
    frozenset({"cli", "__main__"}),
)
BESIDE = ({"inference", "data"}, {"export", "training"}, {"bench", "evaluation"})
# PixArtPipeline.from_pretrained builds a bundle where the cache has none. It imports the exporter
# when it is called, so that loading a bundle needs none of it; named here, not hidden from `ast`.
WHEN_CALLED = {("inference.from_pretrained", "export.build")}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def layer_table() -> str:
    """LAYERS as CONTRIBUTING.md shows them, the top first; `|` stands between neighbours."""
    pairs = [" | ".join(sorted(pair)) for pair in BESIDE]
    lines = []
    for layer in reversed(LAYERS):
        paired = [text for text, pair in zip(pairs, BESIDE, strict=True) if pair <= layer]
        others = sorted(layer - set().union(*(pair for pair in BESIDE if pair <= layer)))
        lines.append("    " + ", ".join(paired + [name for name in others if name != "__main__"]))
    return "\n".join(lines)


def sources() -> Iterator[tuple[str, Path]]:
    """Every source file of the package with its dotted name below pixart_rt."""
    for path in sorted((ROOT / "pixart_rt").rglob("*.py")):
        relative = path.relative_to(ROOT / "pixart_rt")
        if relative.parts[0] not in ROOMS:  # reached through a link on some Pythons, not on others
            yield ".".join(relative.with_suffix("").parts), path
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


FILES = dict(sources())


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all imports in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write pixart_rt. in full"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> Iterator[str]:
    """The imports from pixart_rt, without that prefix; names of the root as what they stand for."""
    for name in imports(path):
        package, _, inner = name.partition(".")
        if package == "pixart_rt" and inner:
            lazy = pixart_rt._LAZY.get(inner)
            yield inner if lazy is None else lazy.removeprefix("pixart_rt.")


def layer_of(name: str) -> str | None:
    """The entry of LAYERS for a dotted name; None for the constants that the root hands on."""
    head = name.partition(".")[0]
    return None if head in pixart_rt.__all__ else head


def test_the_sources_were_found() -> None:
    assert {"config", "cli.build", "kernels.attention", "export.build"} <= FILES.keys()


def test_contributing_shows_the_layers() -> None:
    assert f"\n{layer_table()}\n" in (ROOT / "CONTRIBUTING.md").read_text(), layer_table()


def test_every_module_has_a_layer() -> None:
    heads = {name.partition(".")[0] for name in FILES} - {"__init__"}
    assert heads <= RANK.keys(), f"give {heads - RANK.keys()} a place in LAYERS"


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_imports_point_inwards(name: str) -> None:
    importer = name.partition(".")[0]
    for imported in own_imports(FILES[name]):
        target = layer_of(imported)
        if target is None or target == importer:
            continue
        if (name, imported.rpartition(".")[0]) in WHEN_CALLED:
            continue
        assert target in RANK, f"{name} imports pixart_rt.{imported}, which has no layer"
        assert RANK[target] <= RANK[importer], f"{name} imports {imported}, a layer above it"
        assert not any({importer, target} <= pair for pair in BESIDE), (
            f"{name} imports {imported}, its neighbour"
        )


@pytest.mark.parametrize(("importer", "imported"), sorted(WHEN_CALLED))
def test_an_exception_is_imported_inside_a_function(importer: str, imported: str) -> None:
    tree = ast.parse(FILES[importer].read_text())
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert f"pixart_rt.{imported}" not in {getattr(node, "module", "") for node in at_import}
    assert any(name.startswith(imported) for name in own_imports(FILES[importer])), "unused"


def test_the_pipeline_loads_no_exporter() -> None:
    code = """
from pixart_rt import PixArtPipeline
import sys
assert not [name for name in sys.modules if name.startswith("pixart_rt.export")]"""
    loaded_after(code)


OUTSIDE = {"examples", "benchmarks", "tests"}  # folders of the checkout that stand on the package


@pytest.mark.parametrize("name", FILES)
def test_nothing_stands_on_what_is_not_installed(name: str) -> None:
    assert not OUTSIDE & {imported.partition(".")[0] for imported in imports(FILES[name])}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("kernels.")])
def test_kernels_need_torch_and_triton_only(name: str) -> None:
    packages = {imported.partition(".")[0] for imported in imports(FILES[name])}
    optional = {"kernels.quack_linear": {"quack"}}.get(name, set())  # imported if it is installed
    assert packages - set(sys.stdlib_module_names) - optional <= {"torch", "triton", "pixart_rt"}
    assert all(each.startswith("kernels.") for each in own_imports(FILES[name]))


@pytest.mark.parametrize(
    "name",
    [
        "inference.pipeline",
        "inference.bundle_components",
        "inference.generation",
        "inference.request_plan",
        "inference.prompts",
    ],
)
def test_the_pipeline_knows_no_concrete_backend(name: str) -> None:
    seen = {each for each in own_imports(FILES[name]) if each.startswith("backends")}
    allowed = {"backends.get_backend", "backends.choose_backend", "backends.default_device",
               "backends.loading.Loader"}  # fmt: skip
    assert {each for each in seen if not each.startswith("backends.component.")} <= allowed


@pytest.mark.parametrize("name", FILES)
def test_no_module_has_the_name_of_a_library_it_imports(name: str) -> None:
    stem = name.rpartition(".")[2]
    assert stem not in {imported.partition(".")[0] for imported in imports(FILES[name])}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_a_relative_link_and_no_package(room: str) -> None:
    assert (ROOT / room).is_dir()
    link = ROOT / "pixart_rt" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"
    hidden = ROOT / room / "__init__.py"
    assert not hidden.exists(), "it would hide another library's package of that name"


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    tail = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "numpy", "diffusers", "transformers", "onnx", "onnxruntime"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_after("import pixart_rt")


def test_a_public_name_is_loaded_when_used() -> None:
    """With torch and triton; diffusers and others wait until a VAE or a tokenizer is loaded."""
    loaded = loaded_after("from pixart_rt import PixArtPipeline")
    assert {"torch", "triton"} <= loaded
    late = HEAVY - {"torch", "numpy"} | {"torchao", "sympy", "bs4", "ftfy", "peft"}
    assert not late & loaded


@pytest.mark.parametrize(
    "verb",
    [
        [],
        ["build"],
        ["generate"],
        ["fidelity"],
        ["plan"],
        ["verify"],
        ["doctor"],
        ["convert"],
        ["merge"],
        ["bench"],
        ["reparameterize"],
        ["data"],
        ["data", "extract"],
        ["finetune"],
        ["finetune", "lora"],
    ],
)
def test_help_loads_nothing_heavy(verb: list[str]) -> None:
    code = f"from pixart_rt.cli import main\nassert main([*{verb}, '--help']) == 0"
    assert not HEAVY & loaded_after(code)
