"""A few pictures, encoded once and held in memory: what DreamBooth and LoRA train on.

    source = encode_instances(encoder, table, instances, of_class)
    source.num_instances          ids below are instances, the others pictures of their class

Pictures come from a plain folder with one prompt for all, or from an ImageFolder with a caption
each. Every instance goes to the bucket nearest to its shape. A class picture goes to the nearest of
the instances' buckets; where such a bucket is nobody's nearest, all class pictures are cut to it as
well. So each bucket in use has both kinds, and a step of one bucket can pair them.

B images, C latent channels, h×w latent pixels, T text tokens, E text width, D the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pixart_rt.buckets import Bucket
from pixart_rt.bundle import sha256
from pixart_rt.data.batch import Batch, draw_noise
from pixart_rt.data.crop import fit, nearest, open_rgb
from pixart_rt.data.encode import FeatureEncoder
from pixart_rt.data.folder import ImageFolder
from pixart_rt.data.loader import identity_of
from pixart_rt.data.sample import pad_text
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.files import check_source

LISTED = 5  # pictures that an error names
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture and what it is called."""

    path: Path
    caption: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture's features: moments [2, C, h, w] float32, not scaled."""

    moments: Tensor
    caption: int  # which text
    bucket: int
    original_size: tuple[int, int]  # height, width


def pictures_of(folder: Path, prompt: str) -> list[Picture]:
    """The image files of a plain folder, by name, all with the same prompt.

    Files of other kinds are passed over. Raises DataError if there is no image.
    """
    check_source(folder, "pictures")
    Image.init()
    kinds = Image.registered_extensions()
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in kinds and path.is_file() and not path.name.startswith(".")
    ]
    if not found:
        raise DataError(f"{folder} has no pictures; put some there, as JPEG or PNG files")
    return [Picture(path, prompt) for path in found]


def captioned_pictures(folder: Path, caption_column: str = "text") -> list[Picture]:
    """The pictures of an ImageFolder with their own captions (data/folder.py)."""
    images = ImageFolder(folder, caption_column)
    entries = [images[index] for index in range(len(images))]
    return [Picture(entry.path, entry.caption) for entry in entries]


class InstanceSource:
    """A Source (loader.py) in memory. Its latents are drawn anew at every step.

    texts: embeddings [T, E] and mask [T] of each caption that differs; `num_cut` of them are longer
    than the model reads. empty_prompt: T5("") [n, E].
    """

    def __init__(
        self,
        samples: Sequence[Encoded],
        texts: Sequence[tuple[Tensor, Tensor]],
        table: Sequence[Bucket],
        *,
        scaling_factor: float,
        empty_prompt: Tensor,
        identity: str,
        num_instances: int,
        num_cut: int = 0,
    ) -> None:
        self.empty_prompt, self.identity = empty_prompt, identity
        self.samples, self.texts = list(samples), list(texts)
        self.buckets, self.scaling_factor = tuple(table), scaling_factor
        self.num_instances, self.num_cut = num_instances, num_cut
        self.bucket_of: npt.NDArray[np.uint8] = np.array([s.bucket for s in samples], np.uint8)

    def __len__(self) -> int:
        return len(self.samples)

    @torch.no_grad()
    def projected(self, projection: Callable[[Tensor], Tensor]) -> InstanceSource:
        """The same with every caption through a projection that does not learn: [T, D] for [T, E].

        `projection` takes and gives float32, [1, T, E] to [1, T, D]: PixArtTransformer.y_proj.
        """
        texts = [(projection(embeds[None].float())[0].cpu(), mask) for embeds, mask in self.texts]
        return InstanceSource(
            self.samples, texts, self.buckets,
            scaling_factor=self.scaling_factor, empty_prompt=self.empty_prompt,
            identity=self.identity, num_instances=self.num_instances, num_cut=self.num_cut,
        )  # fmt: skip

    def load(self, ids: Sequence[int], *, seed: int, step: int) -> Batch:
        """The samples of a step, all of one bucket, else ConfigError."""
        chosen = [self.samples[int(sample)] for sample in ids]
        found = {sample.bucket for sample in chosen}
        if len(found) != 1:
            raise ConfigError(f"a batch is of one bucket, these samples are of {sorted(found)}")
        bucket = self.buckets[found.pop()]
        moments = torch.stack([sample.moments for sample in chosen])
        noise = draw_noise(seed, step, [int(sample) for sample in ids], moments.shape[2:])
        texts = [self.texts[sample.caption] for sample in chosen]
        return Batch(
            ids=torch.tensor([int(sample) for sample in ids]),
            latents=(moments[:, 0] + moments[:, 1] * noise) * self.scaling_factor,
            prompt_embeds=torch.stack([embeds for embeds, _ in texts]),
            prompt_mask=torch.stack([mask for _, mask in texts]),
            original_size=torch.tensor([sample.original_size for sample in chosen]).float(),
            aspect_ratio=torch.full((len(chosen), 1), bucket.ratio),
            bucket=bucket,
        )

    def finish(self, loaded: Batch) -> Batch:
        """Nothing is left to do."""
        return loaded


def encode_instances(
    encoder: FeatureEncoder,
    table: Sequence[Bucket],
    instances: Sequence[Picture],
    of_class: Sequence[Picture] = (),
    *,
    repeats: int = 1,
    progress: Progress = lambda name, done, total: None,
) -> InstanceSource:
    """Encode every picture and every caption that differs, once.

    repeats: ids that each picture has. Noise is drawn for an id, so where a step has more images
    than a bucket has pictures, they need as many ids as the step has images. Ids share memory.

    Pictures that cannot be read are one DataError that names them all, before anything is encoded:
    among a few, none may be missing unnoticed.
    """
    _refuse_unreadable([*instances, *of_class])
    captions = sorted({picture.caption for picture in (*instances, *of_class)})
    features, cut = encoder.text(captions)
    embeds, mask = pad_text(features, encoder.max_text_tokens)
    number = {caption: index for index, caption in enumerate(captions)}
    total = len(instances) + len(of_class)
    samples = []
    for done, picture in enumerate(instances):
        progress("encoding pictures", done, total)
        image = open_rgb(picture.path)
        bucket = nearest(table, image.height, image.width)
        samples.append(_encode(encoder, table, image, bucket, number[picture.caption]))
    of_instances = sorted({sample.bucket for sample in samples})
    kept: list[Encoded] = []
    for done, picture in enumerate(of_class, len(instances)):
        progress("encoding pictures", done, total)
        image = open_rgb(picture.path)
        bucket = of_instances[nearest([table[k] for k in of_instances], image.height, image.width)]
        kept.append(_encode(encoder, table, image, bucket, number[picture.caption]))
    for bucket in sorted({*of_instances} - {sample.bucket for sample in kept}):
        for picture in of_class:
            image = open_rgb(picture.path)
            kept.append(_encode(encoder, table, image, bucket, number[picture.caption]))
    about = {"pictures": [[sha256(each.path), each.caption] for each in (*instances, *of_class)]}
    return InstanceSource(
        [*samples * repeats, *kept * repeats], list(zip(embeds, mask, strict=True)), table,
        scaling_factor=encoder.scaling_factor, empty_prompt=encoder.text([""])[0][0],
        identity=identity_of({**about, **encoder.identity}), num_instances=repeats * len(samples),
        num_cut=sum(tokens > 0 for tokens in cut),
    )  # fmt: skip


def _refuse_unreadable(pictures: Sequence[Picture]) -> None:
    reasons = []
    paths = list(dict.fromkeys(picture.path for picture in pictures))
    for path in paths:
        try:
            open_rgb(path)
        except DataError as error:
            reasons.append(str(error))
    if len(reasons) == 1:
        raise DataError(reasons[0])
    if reasons:
        shown = "; ".join(reasons[:LISTED]) + (" ..." if len(reasons) > LISTED else "")
        raise DataError(f"{len(reasons)} of {len(paths)} pictures cannot be read: {shown}")


def _encode(
    encoder: FeatureEncoder, table: Sequence[Bucket], image: Image.Image, bucket: int, caption: int
) -> Encoded:
    fitted = fit(image, table[bucket])
    moments = encoder.moments([fitted.pixels])[0]
    return Encoded(moments, caption, bucket, fitted.original_size)
