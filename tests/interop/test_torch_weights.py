"""Our encoders compute what PyTorch computes with the same weights, layer by layer."""

from __future__ import annotations

import argparse
import functools
import pickle
import sys
import types

import jax
import numpy as np
import pytest

from avcl_jax.errors import UserError
from avcl_jax.export import torch_names
from avcl_jax.export.torch_weights import from_torch, read_state_dict, to_torch
from avcl_jax.models.encoders import create_encoder
from avcl_jax.models.layers import BatchNorm, Conv
from tests.test_import_weights import state_dict

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="PyTorch is not installed (requirements-interop.txt)")
# torchvision declares its compiled operators as it is imported, which fails where they were built
# for another PyTorch; the networks use none of them.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
torchvision = pytest.importorskip(
    "torchvision", reason="torchvision is not installed (requirements-interop.txt)"
)
video_models = torchvision.models.video
functional = torch.nn.functional

NETWORKS = ("r2plus1d_18", "r2plus1d_34", "r2plus1d_50", "r3d_18", "mc3_18", "s3d")


def build(name: str):
    """torchvision's network of our name, without its classifier."""
    if name in ("r2plus1d_34", "r2plus1d_50"):
        module = video_models.resnet
        block = module.BasicBlock if name.endswith("34") else module.Bottleneck
        network = module.VideoResNet(
            block, [module.Conv2Plus1D] * 4, [3, 4, 6, 3], module.R2Plus1dStem
        )
    else:
        network = getattr(video_models, name)(weights=None)
    if name == "s3d":
        network.avgpool = torch.nn.AdaptiveAvgPool3d(1)
        network.classifier = torch.nn.Identity()
    else:
        network.fc = torch.nn.Identity()
    return randomise(network)


def randomise(network):
    """Gives normalisations constants and statistics that differ in every channel."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            shape = module.weight.shape
            module.weight.data = 0.5 + torch.rand(shape, generator=generator)
            module.bias.data = 0.2 * torch.randn(shape, generator=generator)
            module.running_mean = 0.2 * torch.randn(shape, generator=generator)
            module.running_var = 0.5 + torch.rand(shape, generator=generator)
    return network.eval()


def arrays(network) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


def channels_last(tensor) -> np.ndarray:
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def features(encoder, variables, x: np.ndarray) -> np.ndarray:
    return jax.jit(lambda v, x: encoder.apply(v, x, train=False)["features"])(variables, x)


def assert_close(ours, theirs, what: str) -> None:
    """To 1e-4 of the largest value: float32 sums of thousands of terms in another order."""
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    np.testing.assert_allclose(
        ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()), rtol=1e-4, err_msg=what
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_agrees_with_torchvision(name):
    network = build(name)
    outputs = {}

    def note(theirs):
        # A copy: the next layer's ReLU works in place.
        return lambda module, inputs, output: outputs.update({theirs: output.detach().clone()})

    for theirs, module in network.named_modules():
        module.register_forward_hook(note(theirs))
    clip = torch.randn((1, 8, 64, 64, 3), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = network(clip.permute(0, 4, 1, 2, 3)).reshape(1, -1).numpy()

    encoder = create_encoder("video", name, {"subtract_time_mean": False})
    variables = from_torch(arrays(network), code_base="torchvision", name=name, modality="video")
    result, captured = jax.jit(
        lambda variables, x: encoder.apply(
            variables,
            x,
            train=False,
            capture_intermediates=lambda module, _: isinstance(module, BatchNorm | Conv),
            mutable=["intermediates"],
        )
    )(variables, clip.numpy())
    rows = torch_names.CODE_BASES["torchvision"].tables[name](encoder)
    for ours, theirs in rows.items():
        found = captured["intermediates"]
        for part in ours.split("/"):
            found = found[part]
        assert_close(found["__call__"][0], channels_last(outputs[theirs]), f"{ours} = {theirs}")
    last = outputs["features" if name == "s3d" else "layer4"]
    assert_close(result["map"], channels_last(last), "map")
    assert_close(result["features"], expected, "features")
    assert np.ptp(expected) > 1e-2


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("r2plus1d_18", 31_300_125),
        ("r3d_18", 33_166_272),
        ("mc3_18", 11_490_240),
        ("s3d", 7_910_048),
    ],
)
def test_torchvision_counts_what_we_count(name, published):
    assert sum(parameter.numel() for parameter in build(name).parameters()) == published


@pytest.mark.parametrize("name", ["mc3_18", "r2plus1d_18"])
def test_what_we_export_loads_in_torchvision(name):
    encoder = create_encoder("video", name, {"subtract_time_mean": False})
    clip = np.random.default_rng(0).normal(size=(1, 8, 48, 48, 3)).astype(np.float32)
    shapes = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), clip)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: (
            (0.5 + rng.random(leaf.shape)).astype(np.float32)
            if leaf.ndim == 1
            else rng.normal(0, 1 / np.sqrt(leaf.size / leaf.shape[-1]), leaf.shape)
        ),
        shapes,
    )
    state = to_torch(variables, code_base="torchvision", name=name, modality="video")
    network = build(name)
    network.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    with torch.no_grad():
        theirs = network(torch.from_numpy(clip).permute(0, 4, 1, 2, 3)).numpy()
    ours = features(encoder, variables, clip)
    assert_close(ours, theirs, "features")


def normalise(x, state, name):
    statistics = (
        state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return functional.batch_norm(x, *statistics, eps=1e-5)


def avid_video(state, x):
    """AVID's R(2+1)D-18 from its state dict; written from its description, not its code."""

    def conv(x, name, stride=1, padding=0):
        return functional.conv3d(x, state[f"{name}.weight"], stride=stride, padding=padding)

    x = normalise(conv(x, "conv1.0", (1, 2, 2), (1, 3, 3)), state, "conv1.1").relu()
    x = functional.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage in (2, 3, 4, 5):
        for block in (0, 1):
            name = f"conv{stage}x.{block}"
            stride = 2 if stage > 2 and block == 0 else 1
            y = conv(x, f"{name}.spt_conv1", (1, stride, stride), (0, 1, 1))
            y = normalise(y, state, f"{name}.spt_bn1").relu()
            y = conv(y, f"{name}.tmp_conv1", (stride, 1, 1), (1, 0, 0))
            y = normalise(y, state, f"{name}.tmp_bn1").relu()
            y = conv(y, f"{name}.spt_conv2", 1, (0, 1, 1))
            y = normalise(y, state, f"{name}.spt_bn2").relu()
            y = conv(y, f"{name}.tmp_conv2", 1, (1, 0, 0))
            if stride == 2:
                x = conv(x, f"{name}.res_conv", stride)
            x = normalise(x + y, state, f"{name}.out_bn").relu()
    return x.amax(dim=(2, 3, 4))


def avid_audio(state, x):
    """AVID's ten-layer audio network from its state dict, likewise."""

    def layer(x, conv, norm, stride, padding):
        x = functional.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        return normalise(x, state, norm).relu()

    x = layer(x, "conv1.0", "conv1.1", 2, 3)
    for block, stride in ((1, 2), (2, 2), (3, 2), (4, 1)):
        x = layer(x, f"block{block}.conv1", f"block{block}.bn1", stride, 1)
        x = layer(x, f"block{block}.conv2", f"block{block}.bn2", 1, 1)
    return x.amax(dim=(2, 3))


def random_state(code_base: str, prefix: str) -> dict[str, np.ndarray]:
    """Weights of the encoder behind `prefix`, with the names and shapes of the published code."""
    rng = np.random.default_rng(5)
    state = {}
    for name, zeros in state_dict(code_base).items():
        if not name.startswith(prefix):
            continue
        if name.endswith("running_var") or zeros.ndim == 1:
            state[name] = 0.5 + rng.random(zeros.shape)
        else:
            fan_in = max(np.prod(zeros.shape[1:]), 1)
            state[name] = rng.normal(size=zeros.shape) * np.sqrt(1 / fan_in)
        state[name] = np.asarray(state[name], zeros.dtype)
    return state


@pytest.mark.parametrize(
    ("name", "modality", "prefix", "reference"),
    [
        ("r2plus1d_18_avid", "video", "video_model.", avid_video),
        ("conv_10", "audio", "audio_model.", avid_audio),
    ],
)
def test_features_of_avid(name, modality, prefix, reference):
    state = random_state("avid", prefix)
    shape = (2, 8, 64, 64, 3) if modality == "video" else (2, 100, 65)
    x = np.random.default_rng(6).normal(size=shape).astype(np.float32)
    theirs_x = torch.from_numpy(x)
    theirs_x = theirs_x.permute(0, 4, 1, 2, 3) if modality == "video" else theirs_x[:, None]
    tensors = {key.removeprefix(prefix): torch.from_numpy(a) for key, a in state.items()}
    theirs = reference(tensors, theirs_x).numpy()
    encoder = create_encoder(
        modality, name, {"subtract_time_mean": False} if modality == "video" else {}
    )
    variables = from_torch(state, code_base="avid", name=name, modality=modality)
    ours = features(encoder, variables, x)
    assert_close(ours, theirs, "features")
    assert np.ptp(theirs) > 1e-2


@pytest.mark.parametrize(("name", "depths"), [("resnet_9", [1, 1, 1, 1]), ("resnet_18", [2] * 4)])
def test_features_of_gdt_whose_spectrograms_have_mels_first(name, depths):
    """GDT's audio network is torchvision's `ResNet` on one channel of [mels, frames]."""
    resnet = torchvision.models.resnet
    network = resnet.ResNet(resnet.BasicBlock, depths)
    network.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    state = {f"audio_network.base.{key}": a for key, a in arrays(randomise(network)).items()}
    network.fc = torch.nn.Identity()
    spectrogram = torch.randn((2, 99, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        theirs = network(spectrogram.transpose(1, 2)[:, None]).numpy()
    encoder = create_encoder("audio", name, {})
    variables = from_torch(state, code_base="gdt", name=name, modality="audio")
    ours = features(encoder, variables, spectrogram.numpy())
    assert_close(ours, theirs, "features")


def test_checkpoints_of_training_are_read_and_nothing_in_them_is_run(tmp_path):
    path = tmp_path / "checkpoint.pth"
    model = {"module.a.weight": torch.arange(4.0).half(), "module.b": torch.tensor(3)}
    for key in ("model", "state_dict"):
        torch.save(
            {"epoch": 3, key: model, "args": argparse.Namespace(lr=0.1), "optimizer": {"x": [1]}},
            path,
        )
        state = read_state_dict(path)
        assert state.keys() == {"a.weight", "b"}
        assert state["a.weight"].dtype == np.float32
    torch.save({"epoch": 3, "network": model}, path)
    with pytest.raises(UserError, match=r"no state dict.*: epoch, network are not arrays"):
        read_state_dict(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="contains a list, not a state dict"):
        read_state_dict(path)

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": {"a": torch.zeros(1)}, "args": Malicious()}, path)
    with pytest.raises(UserError, match="cannot be read as weights only"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UserError, match="cannot be read as weights only"):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as weights only"):
        read_state_dict(path)
