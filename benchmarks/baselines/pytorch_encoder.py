"""The training step of an R(2+1)D-18 encoder in PyTorch, tuned as an expert would.

Tuned: channels last, AdamW over all tensors at once (foreach on a CPU, fused on a GPU), gradients
set to none, one thread a core, on a GPU the fastest convolution of cuDNN's (benchmark mode); eager
or compiled, of which the benchmark takes the better. torchvision's own network.
"""

from __future__ import annotations

import os
import sys
import time
import types


def seconds_of_steps(
    *, batch: int, steps: int, compiled: bool, dtype: str = "float32", device: str = "cpu"
) -> list[float]:
    """Seconds of each step, forward, backward and AdamW, after those that are not counted.

    Args:
        batch: clips.
        steps: how many are timed.
        compiled: by `torch.compile`.
        dtype: other than "float32": that of `torch.autocast`.
        device: "cpu" or "cuda".
    """
    import torch

    # torchvision declares its compiled operators as it is imported, which fails where they were
    # built for another PyTorch; this network uses none of them.
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
    # The first compiles; on a GPU, the second and third still find memory and algorithms.
    uncounted = 1 if device == "cpu" else 3
    seconds = []
    for _ in range(uncounted + steps):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            features = forward(clips)
        loss = features.float().square().mean()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        loss.item()
        seconds.append(time.perf_counter() - begin)
    return seconds[uncounted:]
