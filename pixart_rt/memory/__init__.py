"""How much memory an image takes: predicted from the configuration, measured, and made to fit."""
