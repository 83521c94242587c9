"""The memory that an image takes: predicted, measured, and made to fit a card."""
