"""The PixArt family in plain PyTorch: transformer, text encoder, VAE and their checkpoints."""
