"""The torch dtype of each precision."""

import torch

from pixart_rt.config import Precision

DTYPES: dict[str, torch.dtype] = {  # a Precision is a string
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}
