"""The training step of an R(2+1)D-18 encoder in PyTorch, tuned as an expert would for a CPU.

Tuned: channels last, AdamW over all tensors at once (foreach), gradients set to none, one thread a
core; eager or compiled, of which the benchmark takes the better. torchvision's own network.
"""

from __future__ import annotations

import os
import sys
import time
import types


def seconds_of_steps(*, batch: int, steps: int, compiled: bool) -> list[float]:
    """Seconds of each step, forward, backward and AdamW, after one that is not counted."""
    import torch

    # torchvision declares its compiled operators as it is imported, which fails where they were
    # built for another PyTorch; this network uses none of them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
    from torchvision.models.video import r2plus1d_18

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    network = r2plus1d_18(weights=None)
    network.fc = torch.nn.Identity()
    network = network.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, foreach=True)
    clips = torch.randn(batch, 3, 16, 112, 112).to(memory_format=torch.channels_last_3d)
    forward = torch.compile(network) if compiled else network
    seconds = []
    for _ in range(1 + steps):
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = forward(clips).square().mean()
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]
