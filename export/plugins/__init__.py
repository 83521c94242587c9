"""TensorRT plugins: a transformer's graph with fused operators as nodes, and their kernels."""
