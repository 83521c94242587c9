"""Optimizers by name, with gradient clipping, loss scale, moving averages and schedules."""
