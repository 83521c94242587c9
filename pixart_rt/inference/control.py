"""Control images of a request: checked against the bundle, cut to the bucket, encoded by its VAE.

A bundle with a ControlNet needs one for every image; any other takes none. The picture is one of
edges, as the ControlNet was trained on (data/edges.py), and is scaled and centre-cropped to the
bucket as training's are. B images, C latent channels, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from pixart_rt.buckets import VAE_SCALE_FACTOR, Bucket
from pixart_rt.bundle import Manifest
from pixart_rt.checkpoints.bundle_module import VAE_ENCODER, load_module
from pixart_rt.config import ModelConfig
from pixart_rt.errors import BundleError, ConfigError
from pixart_rt.inference.request import Request

ControlImage = Image | Sequence[Image]  # one for all images of a call, or one for each


class Controls:
    """Latents of the control images of a bundle's requests. The encoder is read when first asked.

    `wanted`: whether the bundle has a ControlNet.
    """

    def __init__(self, manifest: Manifest, folder: Path, device: torch.device) -> None:
        self.wanted = manifest.control is not None
        self._config: ModelConfig = manifest.config
        self._folder, self._device = folder, device
        self._encoder: nn.Module | None = None

    def __call__(
        self, requests: Sequence[Request], buckets: Sequence[Bucket]
    ) -> list[Tensor | None]:
        """Latents [1, C, h, w] for each request at its bucket; None for each without a ControlNet.

        A picture that several requests share is encoded once. The requests have been checked.
        Raises ConfigError for latents of another shape.
        """
        encoded: dict[tuple[int, Bucket], Tensor] = {}
        found: list[Tensor | None] = []
        for request, bucket in zip(requests, buckets, strict=True):
            image, latents = request.control_image, request.control_latents
            if image is not None:
                key = (id(image), bucket)  # the requests keep the pictures, so ids stay theirs
                if key not in encoded:
                    encoded[key] = self._encode(image, bucket)
                latents = encoded[key]
            found.append(None if latents is None else self._fitting(latents, bucket))
        return found

    def check(self, request: Request) -> None:
        """Refuse a request that lacks its control image, has two, or has one that is not taken."""
        num_given = (request.control_image is not None) + (request.control_latents is not None)
        if not self.wanted and num_given:
            raise ConfigError(
                "a control image was given, but this bundle has no ControlNet; leave it out, or "
                "build with --controlnet"
            )
        if self.wanted and num_given != 1:
            raise ConfigError(
                f"{num_given or 'no'} control images were given to a bundle with a ControlNet; "
                "give control_image or control_latents, one of the two"
            )

    def _fitting(self, latents: Tensor, bucket: Bucket) -> Tensor:
        expected = self.blank(bucket).shape
        if latents.shape != expected:
            raise ConfigError(
                f"control_latents are {list(latents.shape)}; images of {bucket.width}x"
                f"{bucket.height} pixels take {list(expected)} each"
            )
        return latents.float().to(self._device)

    def blank(self, bucket: Bucket) -> Tensor:
        """Latents [1, C, h, w] of zeros, where only their shape matters."""
        height, width = bucket.height // VAE_SCALE_FACTOR, bucket.width // VAE_SCALE_FACTOR
        return torch.zeros(1, self._config.in_channels, height, width, device=self._device)

    def _encode(self, image: Image, bucket: Bucket) -> Tensor:
        size = (bucket.width, bucket.height)
        fitted = ImageOps.fit(image.convert("RGB"), size, Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(fitted)).to(self._device)
        if self._encoder is None:
            if not (self._folder / VAE_ENCODER).is_dir():
                raise BundleError(
                    f"{self._folder} has no {VAE_ENCODER} for control images; pass "
                    "control_latents, or build again from a whole pipeline folder"
                )
            self._encoder = load_module(self._folder / VAE_ENCODER, VAE_ENCODER).to(self._device)
        encoded: Tensor = self._encoder(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
        return encoded
