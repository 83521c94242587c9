"""Prompts to images: the pipeline, its denoising loops, caches and CUDA graphs."""
