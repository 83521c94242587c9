"""Maps the top-level folders kernels/, export/, training/ and recipes/ into the package pixart_rt.

They hold no __init__.py of their own: a top-level package called `kernels` would hide Hugging
Face's `kernels`, which transformers and diffusers import. All other metadata is in pyproject.toml.
"""

from setuptools import find_packages, setup

ROOMS = ["kernels", "export", "training"]
MAPPED = [*ROOMS, "recipes"]  # recipes holds TOML files, which `pixart-rt train` finds by name

setup(
    packages=[
        *find_packages(include=["pixart_rt", "pixart_rt.*"]),
        *(f"pixart_rt.{room}" for room in MAPPED),
        *(f"pixart_rt.{room}.{name}" for room in ROOMS for name in find_packages(room)),
    ],
    package_dir={f"pixart_rt.{room}": room for room in MAPPED},
)
