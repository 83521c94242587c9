"""The tiny PixArt-alpha that ships with the package: scenes, scorer, tokenizer and training."""
