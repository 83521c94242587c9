"""What a pipeline keeps for later requests, at most; forecasts of memory count it."""

CACHED_PROMPTS = 256  # XL: 2 MB each
PROMPT_BYTES = 1 << 29  # of their embeddings: 256 of PixArt-alpha's XL, 109 of Sigma's
CACHED_TEXT_BYTES = 1 << 28  # keys and values; XL in 16 bits: 15.5 MB a prompt
PLAN_BYTES = 1 << 28  # XL at 1024 px, 20 steps, one image: 20 MB
