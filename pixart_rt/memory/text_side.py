"""Bytes of what the blocks see of prompts, kept and while it is made (model/text_kv.py).

L blocks, T text tokens, D width, H heads, s bytes of the precision. A prompt's keys and values are
L·T·2·D·s; its absorbed form of n slots is L·H·n·(2·D·s + 4), with n = 16, 32 or 64: for XL/2 in 16
bits 15 MB and up to 132 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixart_rt.config import ModelConfig, Precision
from pixart_rt.kernels.cross_attention import Form, choose_form
from pixart_rt.memory.weights import SIZE

WIDE = 4  # bytes: float32


@dataclass(frozen=True, slots=True)
class Words:
    """Visible tokens of a request's longest prompt and of its longest negative prompt."""

    prompt: int
    negative: int = 1  # the empty prompt's


def any_words(config: ModelConfig) -> tuple[Words, ...]:
    """Requests of which one has each stage's most: the longest absorbed form, and keys and values,
    each with and without a negative prompt.
    """
    longest = config.max_text_tokens
    absorbed = min(longest, Form.ABSORBED_64.value)
    return tuple(
        Words(prompt, negative)
        for prompt in (absorbed, longest)
        for negative in (1, absorbed, longest)
    )


def absorbed_length(num_tokens: int, absorbs: bool = True) -> int:
    """Slots of the absorbed form for prompts of at most `num_tokens`; 0: keys and values."""
    form = choose_form(num_tokens)
    if not absorbs or form is Form.STANDARD:
        return 0
    return max(form.value, Form.ABSORBED_16.value)


def kv_bytes(config: ModelConfig, precision: Precision) -> int:
    """One prompt's keys and values in all blocks."""
    text = config.max_text_tokens * 2 * config.hidden_size
    return config.num_layers * text * SIZE[precision]


def absorbed_bytes(config: ModelConfig, precision: Precision, rows: int, length: int) -> int:
    """The absorbed form of `rows` prompts in all blocks; 0 for a length of 0."""
    slots = config.num_layers * rows * config.num_heads * length
    return slots * (2 * config.hidden_size * SIZE[precision] + WIDE)


def text_side_activations(config: ModelConfig, precision: Precision) -> int:
    """Making one prompt's keys and values: the captions T·D·s, each block's, and all stacked."""
    captions = config.max_text_tokens * config.hidden_size * SIZE[precision]
    return captions + 2 * kv_bytes(config, precision)


def absorb_activations(config: ModelConfig, precision: Precision, rows: int, length: int) -> int:
    """Making the absorbed form. Most is held while all blocks' are stacked, twice the whole; or, of
    few blocks, in the last: the form in float32, the prompt's tokens B·n·3·D·4 and either a weight
    widened D·D·4 or the form rounded (for two prompts and more by way of a copy of one half).
    """
    whole = absorbed_bytes(config, precision, rows, length)
    if not whole:
        return 0
    D, L = config.hidden_size, config.num_layers
    wide = 2 * rows * config.num_heads * length * D * WIDE
    weight = D * D * WIDE if SIZE[precision] < WIDE else 0
    rounded = whole // L + (wide // 2 if rows > 1 else 0)
    last = wide + 3 * rows * length * D * WIDE + max(weight, rounded)
    return max(2 * whole, whole * (L - 1) // L + last)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextMemory:
    """What a request of `batch` images holds of its text, beyond what the cache keeps.

    named: the texts are known, so their keys and values are the cache's. replaces: another
    request's absorbed form is still there.
    """

    config: ModelConfig
    precision: Precision  # of the text side
    batch: int
    words: Words
    absorbs: bool = True
    named: bool = True
    replaces: bool = False

    @property
    def rows(self) -> tuple[int, int]:
        """With guidance: rows whose text is one vector, and the slots of the others' form."""
        if self._constant:
            return self.batch, self._length(self.words.prompt)
        return 0, self._length(max(self.words.prompt, self.words.negative))

    @property
    def prepare(self) -> int:
        """The most while the rows' text is made, of these moments in order:

        null       B prompts joined; one null prompt's keys and values, or B joined
        guided     both halves; joined 4·B where the null prompt is not constant; their form made,
                   the last request's still there

        Every step is taken to be guided, as by default: there are no rows without.
        """
        B, kv = self.batch, kv_bytes(self.config, self.precision)
        before = self.kept if self.replaces else 0
        made = text_side_activations(self.config, self.precision) - (kv if self.named else 0)
        moments = [B * kv + max(made, B * kv) + before]
        if self._constant:
            plain = self._length(self.words.prompt)
            moments.append(2 * B * kv + self._making(B, plain) + before)
        else:
            both = self._length(max(self.words.prompt, self.words.negative))
            moments.append(4 * B * kv + self._making(2 * B, both) + before)
        return max(moments)

    @property
    def denoise(self) -> int:
        """The rows' text during all steps."""
        B, kv = self.batch, kv_bytes(self.config, self.precision)
        if not self._constant:
            both = self._length(max(self.words.prompt, self.words.negative))
            return self._absorbed(2 * B, both) if both else 2 * B * kv
        plain = self._length(self.words.prompt)
        held = self._absorbed(B, plain) if plain else B * kv
        return held + self.config.num_layers * B * self.config.hidden_size * SIZE[self.precision]

    @property
    def kept(self) -> int:
        """The absorbed form that stays for the next request."""
        constant, length = self.rows
        return self._absorbed(2 * self.batch - constant, length)

    @property
    def _constant(self) -> bool:
        return self.words.negative == 1

    def _length(self, num_tokens: int) -> int:
        return absorbed_length(num_tokens, self.absorbs)

    def _absorbed(self, rows: int, length: int) -> int:
        return absorbed_bytes(self.config, self.precision, rows, length)

    def _making(self, rows: int, length: int) -> int:
        return absorb_activations(self.config, self.precision, rows, length)
