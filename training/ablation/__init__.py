"""The paper's claims on drawn scenes: what `pixart-rt reproduce ablation` runs."""
