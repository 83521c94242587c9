"""PyTorch backends: eager, torch.compile, and weights offloaded to host memory."""
