"""Prompts to what the transformer sees of them, each once: tokenizer, text encoder, caches.

Two things are kept for each text: its embeddings (PromptEncoder; in memory and, if asked, on disk)
and the keys and values of all blocks (TextCache). The unconditional half's embeddings come with
the bundle. The text encoder runs at few lengths, each of which may have a CUDA graph
(cuda_graphs.py).

B prompts, T text tokens of the model, C caption channels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_rt.backends.component import Component
from pixart_rt.config import CfgNull, text_lengths
from pixart_rt.errors import BundleError, ConfigError
from pixart_rt.files import replacing
from pixart_rt.inference.cache_limits import CACHED_PROMPTS, CACHED_TEXT_BYTES, PROMPT_BYTES
from pixart_rt.inference.cuda_graphs import GraphKey, Graphs
from pixart_rt.inference.lru import Lru
from pixart_rt.inference.prompt_embeds import PromptEmbeds
from pixart_rt.kernels.cross_attention import Absorbed
from pixart_rt.model.text_kv import PromptText, TextSide
from pixart_rt.model.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)

TEXT_GRAPH_BYTES = 1 << 30  # of the text encoder's CUDA graphs
NULL_PROMPT = "null_prompt.safetensors"  # T5("") of the bundle, at full length


@dataclass(frozen=True, slots=True)
class TextTokens:
    """What a run of the text encoder depends on, but its weights: [B, T] int64, each."""

    input_ids: Tensor
    attention_mask: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The component's inputs by name."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def with_tensors(self, tensors: dict[str, Tensor]) -> TextTokens:
        """The same inputs with other tensors."""
        return TextTokens(**tensors)


class PromptEncoder:
    """Encodes prompts, each once: a text seen before comes from a cache.

    `hits`, `disk_hits` and `misses` count texts; only a miss runs the text encoder, on prompts
    of about one length at a time, at the smallest of `text_lengths` that holds them.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        text_encoder: Component,
        device: torch.device,
        max_batch: int,
        *,
        null_prompt: Path | None = None,
        disk: Path | None = None,
        disk_key: str = "",
    ) -> None:
        """null_prompt: the bundle's file of T5(""). disk: a folder that keeps embeddings, under
        names that depend on the text and on `disk_key`, which must tell text encoders apart.
        """
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.device, self.max_batch = device, max_batch
        self.hits = self.disk_hits = self.misses = 0
        self.graphs: Graphs[TextTokens] = Graphs(max_bytes=TEXT_GRAPH_BYTES)
        self._disk, self._disk_key = disk, disk_key
        self.cache: Lru[tuple[str, bool], PromptEmbeds] = Lru(
            lambda prompt: prompt.num_bytes, max_bytes=PROMPT_BYTES, max_entries=CACHED_PROMPTS
        )
        self._null = None if null_prompt is None else load_null(null_prompt, device)

    def __call__(self, prompts: Sequence[str], *, whole: bool = False) -> PromptEmbeds:
        """The embeddings of B prompts; warns when one is longer than the model reads.

        whole: also the embeddings of padding, for the conventions that attend to them.
        """
        return PromptEmbeds.cat(self.rows(prompts, whole=whole))

    def rows(self, prompts: Sequence[str], *, whole: bool = False) -> list[PromptEmbeds]:
        """The same, each prompt by itself; equal prompts are one object."""
        texts = list(dict.fromkeys(prompts))
        known = {text: self._find(text, whole) for text in texts}
        rows = {text: row for text, row in known.items() if row is not None}
        missing = [text for text in texts if text not in rows]
        self.misses += len(missing)
        self.hits += len(prompts) - len(missing)
        for chunk, tokens in self._chunks(missing):
            encoded = self._encode(tokens, whole)
            for text, row in zip(chunk, encoded.rows(), strict=True):
                rows[text] = row.named(text)
                self._write(text, whole, row)
        for text, row in rows.items():
            if row is not self._null:
                self.cache.put((text, whole), row)
        return [rows[text] for text in prompts]

    def _find(self, text: str, whole: bool) -> PromptEmbeds | None:
        if text == "" and self._null is not None:
            return self._null
        return self.cache.get((text, whole)) or self._read(text, whole)

    def _chunks(self, prompts: list[str]) -> Iterator[tuple[list[str], TextTokens]]:
        """Prompts of about one length, at most `max_batch`, with their tokens on the CPU."""
        if not prompts:
            return
        tokens = self.tokenizer(prompts)
        counts = tokens.attention_mask.sum(1)
        for rows in counts.argsort(stable=True).split(self.max_batch):
            chunk = [prompts[row] for row in rows.tolist()]
            yield chunk, TextTokens(tokens.input_ids[rows], tokens.attention_mask[rows])

    def _encode(self, tokens: TextTokens, whole: bool) -> PromptEmbeds:
        counts = tuple(tokens.attention_mask.sum(1).tolist())
        longest = self.tokenizer.max_tokens
        length = longest if whole else text_length(max(counts), longest)
        ids, mask = (
            each[:, :length].to(self.device) for each in (tokens.input_ids, tokens.attention_mask)
        )
        embeds = self.embed(TextTokens(ids, mask)).to(self.device)
        padding = longest - length
        return PromptEmbeds(
            F.pad(embeds, (0, 0, 0, padding)), F.pad(mask.bool(), (0, padding)), counts
        )

    def warm(self, num_prompts: int) -> None:
        """Capture the text encoder for so many prompts at once, at each of its lengths, where a
        CUDA graph can hold it and is not there yet. Does nothing elsewhere.
        """
        if not self.text_encoder.capturable:
            return
        for length in text_lengths(self.tokenizer.max_tokens):
            ones = torch.ones(num_prompts, length, dtype=torch.int64, device=self.device)
            tokens = TextTokens(ones, ones)
            key = self._graph_key(tokens)
            if key not in self.graphs:
                self._run(tokens)
                self.graphs.capture(key, self._run, tokens)

    def embed(self, tokens: TextTokens) -> Tensor:
        """Embeddings [B, T, C] of tokens on the device: by the graph of these shapes, if there is
        one or it is captured now (cuda_graphs.py), else by the text encoder. No cache is asked.
        """
        # A caller's own wrapper need not say that it is.
        may_capture = self.graphs.automatic and getattr(self.text_encoder, "capturable", False)
        embeds = None
        if may_capture or len(self.graphs):
            run = self._run if may_capture else None
            embeds = self.graphs.recall(self._graph_key(tokens), run, tokens)
        return self._run(tokens) if embeds is None else embeds

    def _run(self, tokens: TextTokens) -> Tensor:
        return self.text_encoder(**tokens.tensors())

    def _graph_key(self, tokens: TextTokens) -> GraphKey:
        return GraphKey.of(tokens, (self.text_encoder, self.text_encoder.version()))

    def _path(self, text: str, whole: bool) -> Path | None:
        if self._disk is None:
            return None
        name = f"{self._disk_key}\0{whole}\0{text}".encode(errors="surrogatepass")
        return self._disk / f"{hashlib.sha256(name).hexdigest()}.safetensors"

    def _read(self, text: str, whole: bool) -> PromptEmbeds | None:
        path = self._path(text, whole)
        if path is None or not path.is_file():
            return None
        try:
            embeds = load_file(path, device="cpu")["embeds"]
            count = int(load_file(path)["num_tokens"])
            longest = self.tokenizer.max_tokens
            if embeds.dim() != 2 or not 0 < count <= len(embeds) <= longest:
                raise ValueError(f"{count} tokens with embeddings {list(embeds.shape)}")
        except Exception as error:  # safetensors raises its own; a cache must never stop a request
            logger.warning("the cached prompt %s is damaged (%s); it is encoded again", path, error)
            return None
        self.disk_hits += 1
        embeds = F.pad(embeds, (0, 0, 0, longest - len(embeds)))[None].to(self.device)
        mask = torch.arange(longest, device=self.device)[None] < count
        return PromptEmbeds(embeds, mask, (count,), (text,))

    def _write(self, text: str, whole: bool, encoded: PromptEmbeds) -> None:
        path = self._path(text, whole)
        if path is None:
            return
        rows = encoded.embeds.shape[1] if whole else encoded.num_tokens[0]
        kept = encoded.embeds[0, :rows].cpu().contiguous()
        try:
            with replacing(path) as temporary:
                save_file(
                    {"embeds": kept, "num_tokens": torch.tensor(encoded.num_tokens[0])}, temporary
                )
        except (OSError, SafetensorError, ConfigError) as error:
            logger.warning(
                "the prompt cache %s cannot be written (%s); embeddings are not kept", path.parent,
                error,
            )  # fmt: skip
            self._disk = None  # one warning; a cache must never stop a request


def text_length(num_tokens: int, longest: int) -> int:
    """The length at which the text encoder runs for prompts of at most `num_tokens`."""
    return min(length for length in text_lengths(longest) if length >= num_tokens)


def load_null(path: Path, device: torch.device) -> PromptEmbeds | None:
    """The bundle's T5(""), or None if the bundle has no text encoder."""
    if not path.is_file():
        return None
    tensors = load_file(path)
    mask = tensors["mask"].bool()
    embeds = tensors["embeds"].float().to(device)
    return PromptEmbeds(embeds, mask.to(device), (int(mask.sum()),), ("",))


class TextCache:
    """Keys and values of all blocks for each text, in memory up to a number of bytes."""

    def __init__(self, side: TextSide, max_bytes: int = CACHED_TEXT_BYTES) -> None:
        self.side = side
        self.hits = self.misses = 0
        self._kept: Lru[str, PromptText] = Lru(lambda text: text.num_bytes, max_bytes=max_bytes)
        self._absorbed: Lru[tuple[str | None, ...], Absorbed | None] = Lru(max_entries=1)

    def __call__(self, rows: Sequence[PromptEmbeds]) -> PromptText:
        """The text of rows of one prompt each; one without a name is not kept."""
        return PromptText.cat([self._one(row) for row in rows])

    def _one(self, row: PromptEmbeds) -> PromptText:
        [name] = row.texts
        kept = None if name is None else self._kept.get(name)
        if kept is not None:
            self.hits += 1
            return kept
        self.misses += 1
        made = self.side(row.embeds, row.mask, row.num_tokens[0])
        if name is not None:
            self._kept.put(name, made)
        return made

    def absorbed(self, names: Sequence[str | None], text: PromptText) -> Absorbed | None:
        """The absorbed form of rows of these names, where it is less work; the last is kept."""
        key = tuple(names)
        if None in key:
            return self.side.absorbed(text)
        if key in self._absorbed:
            return self._absorbed.get(key)
        made = self.side.absorbed(text)
        self._absorbed.put(key, made)
        return made


def unconditional(
    convention: CfgNull,
    prompt: PromptEmbeds,
    negative: list[str],
    encoder: PromptEncoder | None,
    y_embedding: Tensor | None,
    *,
    whole: bool = False,
) -> PromptEmbeds:
    """What the unconditional half sees, a row per row of `prompt` (see CfgNull).

    A negative prompt that is not empty replaces the convention for its row.
    """
    if convention is CfgNull.Y_EMBEDDING and all(text == "" for text in negative):
        return _null_rows(prompt, y_embedding)
    if encoder is None:
        raise BundleError(
            "this bundle has no text encoder for the negative prompt; pass "
            "negative_prompt_embeds or build the bundle with --components text_encoder too"
        )
    if convention is CfgNull.EMPTY_PROMPT:
        return encoder(negative, whole=whole)
    encoded = null = encoder(negative, whole=True)
    if convention is CfgNull.Y_EMBEDDING:
        null = _null_rows(prompt, y_embedding)
    own = [text != "" for text in negative]
    keep = torch.tensor(own, device=encoded.mask.device)
    counts = zip(own, encoded.num_tokens, prompt.num_tokens, strict=True)
    return PromptEmbeds(
        torch.where(keep[:, None, None], encoded.embeds, null.embeds),
        torch.where(keep[:, None], encoded.mask, prompt.mask),
        tuple(mine if is_own else theirs for is_own, mine, theirs in counts),
    )


def _null_rows(prompt: PromptEmbeds, y_embedding: Tensor | None) -> PromptEmbeds:
    if y_embedding is None:
        raise BundleError("the bundle lacks y_embedding.safetensors; build it again")
    return PromptEmbeds(y_embedding.expand_as(prompt.embeds), prompt.mask, prompt.num_tokens)
