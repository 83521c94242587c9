"""Training data: image folders to feature stores, and reading them back."""
