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


def sum_on_device_of(module):
    """Compute on the device that a module has chosen; return its kind and the sum of eight ones."""
    import importlib

    import torch

    device = importlib.import_module(module).DEVICE
    return device.type, float(torch.ones(8, device=device).sum())


def step_of_adam():
    """Take a step of AdamW on the CPU, for which torch starts CUDA where it sees a GPU."""
    import torch

    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
