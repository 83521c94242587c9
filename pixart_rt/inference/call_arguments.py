"""The arguments of one call of the pipeline as requests, one for each image.

P prompts, each with its images in a row: image k is of prompt k // num_images_per_prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pixart_rt.errors import ConfigError
from pixart_rt.inference.request import (
    DEFAULT_SEED,
    LARGEST_SEED,
    MOST_IMAGES,
    Request,
    checked_text,
    whole_number,
)

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: object) -> None:
    """Refuse any other than OUTPUT_TYPES."""
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")


def check_requests(requests: Any) -> list[Request]:
    """`requests` as a list. Raises ConfigError for anything but Requests."""
    try:
        listed = [] if isinstance(requests, str) else list(requests)
    except TypeError:
        listed = [requests]
    wrong = [request for request in listed if not isinstance(request, Request)]
    if wrong or isinstance(requests, str):
        found = type(wrong[0] if wrong else requests).__name__
        raise ConfigError(f"requests must be a list of Request, got {found}")
    return listed


def call_requests(
    *,
    prompt: Any,
    negative_prompt: Any,
    num_images_per_prompt: Any,
    seed: Any,
    generator: Any,
    embeds: dict[str, Tensor | None],
    control_image: Any,
    control_latents: Tensor | None,
    **settings: Any,
) -> list[Request]:
    """A request for each image of a call; `settings` are those that all of them share.

    embeds: prompt_embeds and so on, each with a row for each prompt.
    """
    per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt, 1, MOST_IMAGES)
    prompts = _prompts(prompt, embeds["prompt_embeds"])
    count = len(prompts) * per_prompt
    if count > MOST_IMAGES:
        raise ConfigError(
            f"{count} images were requested of one call, the most is {MOST_IMAGES}; make several "
            "calls"
        )
    negatives = _negatives(negative_prompt, len(prompts))
    rows = _embed_rows(embeds, len(prompts))
    if generator is not None and isinstance(seed, int) and seed == DEFAULT_SEED:
        seed = None  # left out; image k would have k
    seeds, generators = _seeds(seed, count), _generators(generator, count)
    images = _controls(control_image, count)
    latents = _controls(None if control_latents is None else control_latents.split(1), count)
    return [
        Request(
            prompt=prompts[image // per_prompt],
            negative_prompt=negatives[image // per_prompt],
            seed=seeds[image],
            generator=generators[image],
            control_image=images[image],
            control_latents=latents[image],
            **rows[image // per_prompt],
            **settings,
        )
        for image in range(count)
    ]


def _prompts(prompt: Any, embeds: Tensor | None) -> list[Any]:
    """The text of each prompt; None for those whose embeddings are given."""
    if prompt is None and embeds is not None:
        return [None] * len(embeds)
    if isinstance(prompt, str) or prompt is None:
        return [prompt]
    if not isinstance(prompt, Sequence):
        checked_text("prompt", prompt)
    if not prompt:
        raise ConfigError("the list of prompts is empty; give at least one prompt")
    return [checked_text("prompt", text) for text in prompt]


def _negatives(negative_prompt: Any, count: int) -> list[Any]:
    if isinstance(negative_prompt, str) or not isinstance(negative_prompt, Sequence):
        return [negative_prompt] * count
    if len(negative_prompt) != count:
        raise ConfigError(
            f"{len(negative_prompt)} negative prompts were given for {count} prompts; give one, or "
            "one for each"
        )
    return list(negative_prompt)


def _embed_rows(embeds: dict[str, Tensor | None], count: int) -> list[dict[str, Any]]:
    """The tensors of each prompt, a row each."""
    given = {name: tensor for name, tensor in embeds.items() if tensor is not None}
    for name, tensor in given.items():
        kind = "negative prompt" if name.startswith("negative") else "prompt"
        if len(tensor) != count:
            raise ConfigError(
                f"{len(tensor)} {kind} embeddings were given for {count} prompts; give one each"
            )
    return [{name: tensor[row : row + 1] for name, tensor in given.items()} for row in range(count)]


def _seeds(seed: Any, count: int) -> list[int | None]:
    if seed is None:
        return [None] * count
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        first = whole_number("seed", seed, 0, LARGEST_SEED)
        return [first + index for index in range(count)]
    if len(seed) != count:
        raise ConfigError(f"{len(seed)} seeds were given for {count} images; give one each")
    return list(seed)


def _generators(generator: Any, count: int) -> list[Any]:
    """One that all images draw from in turn, or one for each, as in diffusers."""
    if not isinstance(generator, list | tuple):
        return [generator] * count
    if len(generator) != count:
        raise ConfigError(
            f"{len(generator)} generators were given for {count} images; give one, or one for each"
        )
    return list(generator)


def _controls(given: Any, count: int) -> list[Any]:
    """One control image for all images, or one for each."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) not in (1, count):
        raise ConfigError(
            f"{len(given)} control images were given for {count} images; give one, or one for each"
        )
    return list(given) * count if len(given) == 1 else list(given)
