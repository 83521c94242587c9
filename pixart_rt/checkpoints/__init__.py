"""Checkpoint layouts, read and written: diffusers folders, original .pth, DiT, ControlNet, LoRA."""
