"""The seam between the model and its operators: the model calls these names and no others.

Each name is the plain PyTorch reference of the operator's file in kernels/.
"""

from pixart_rt.kernels.attention import attention_ref as attention
from pixart_rt.kernels.gate_residual import gate_residual_ref as gate_residual
from pixart_rt.kernels.ln_modulate import ln_modulate_ref as ln_modulate

__all__ = ["attention", "gate_residual", "ln_modulate"]
