"""Tasks for workers of the GPU tests."""

import os
import time


def hold(nbytes, seconds=0.5):
    """Hold a tensor on the GPU for a while; return the device this worker sees."""
    import torch

    block = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    time.sleep(seconds)
    del block
    return torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")


def multiply():
    """Do something small on the GPU."""
    import torch

    return float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
