"""Fine-tuning: LoRA adapters, distilled pipelines and their settings."""
