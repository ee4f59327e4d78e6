"""The training step of an R(2+1)D-18 encoder in PyTorch, tuned as by an expert.

Tuned: channels last, AdamW over all tensors at once (foreach on a CPU, fused on a GPU), gradients
set to None, one thread per core, cuDNN's benchmark mode on a GPU; eager or compiled (the benchmark
takes the better). The network is torchvision's.
"""

from __future__ import annotations

import os
import sys
import types


def seconds_of_steps(
    *, batch: int, steps: int, compiled: bool, dtype: str = "float32", device: str = "cpu"
) -> list[float]:
    """Seconds of each step: forward, backward and AdamW.

    Args:
        batch: clips per step.
        steps: number of timed steps, after one on a CPU or three on a GPU.
        compiled: use `torch.compile`.
        dtype: dtype of `torch.autocast` unless "float32".
        device: "cpu" or "cuda".
    """
    import torch

    from benchmarks.measure import seconds_of_each

    # torchvision declares its compiled operators on import, which fails if they were built for
    # another PyTorch; this network uses none of them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
    from torchvision.models.video import r2plus1d_18

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    network = r2plus1d_18(weights=None)
    network.fc = torch.nn.Identity()
    network = network.to(device, memory_format=torch.channels_last_3d)
    kind = {"foreach": True} if device == "cpu" else {"fused": True}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, **kind)
    clips = torch.randn(batch, 3, 16, 112, 112, device=device)
    clips = clips.to(memory_format=torch.channels_last_3d)
    forward = torch.compile(network) if compiled else network
    autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            features = forward(clips)
        loss = features.float().square().mean()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        loss.item()

    # On a GPU, the second and third step still find memory and algorithms.
    return seconds_of_each(step, steps, warmup=1 if device == "cpu" else 3)
