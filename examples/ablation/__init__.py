"""The paper's claims on drawn scenes: what `python -m examples.ablation` runs."""
