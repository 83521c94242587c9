"""TensorRT and TensorRT-RTX: engines, shared device memory, runtime cache and plugins."""
