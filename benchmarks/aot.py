"""Compiles the pretraining step for devices that need not exist, and reads the compiled program.

Each function runs in its own process (`measure.run_child`, environment of `tpu_aot` or `gpu_aot`),
because the compilers read their environment once. A full step takes minutes to compile, so programs
are cached under a hash of the program, the topology and the versions; metrics are read from them
again.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental import topologies

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.errors import UserError
from avcl_jax.models.transformers import Transformer
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.views import MODALITIES
from avcl_jax.training import sharding
from avcl_jax.training.program import bank_exchange, build, loss_spec
from avcl_jax.training.state import state_shardings
from avcl_jax.training.step import jit_train_step
from benchmarks import hlo_costs
from benchmarks.batches import complete_views, draw_all
from benchmarks.gpu_costs import GPUS, costs, gpu_of
from benchmarks.measure import version
from benchmarks.model_flops import matrix_flops

# Only the exchange of the bank is traced under this name (objectives/feature_bank.py).
_BANK_SCOPE = "/shard_map/"


def config_of(preset: str, overrides: Mapping[str, str]) -> ml_collections.ConfigDict:
    """A preset of configs/pretrain.py with overrides as on the command line of `avcl_jax.main`.

    Raises:
        UserError: if an overridden key does not exist or is ignored.
    """
    config = pretrain.get_config(preset)
    known = experiment.flatten(config.to_dict())
    values: dict[str, Any] = {}
    for key, text in overrides.items():
        if key not in known:
            raise UserError(f"configs/pretrain.py:{preset} has no key {key!r}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    config.update_from_flattened_dict(values)
    experiment.check_used(config, overrides)
    return config


def _is_gpu(topology: str) -> bool:
    return topology.partition(":")[0] in GPUS


def _devices(topology: str) -> Any:
    """Devices of "v5e:4x4", a slice of TPUs, or "h100:8", a host of GPUs; they need not exist."""
    if _is_gpu(topology):
        gpu, gpus = gpu_of(topology)
        return topologies.get_topology_desc(
            platform="cuda", target_config=gpu.target, topology=f"1x{gpus}x1"
        ).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def program(config: ml_collections.ConfigDict, devices: Any) -> tuple[Any, tuple[Any, ...]]:
    """The step of `avcl_jax.main` for devices that need not exist.

    Returns:
        The jitted step, and the shapes of its arguments (state, batch, key).
    """
    mesh, init, step = build(config, devices)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init(key)[0], key)
    spec = experiment.render_spec(config)
    arrays = spec.batch_shapes(config.global_batch_size, config.bank.health_labels)
    batch = {name: jax.ShapeDtypeStruct(*value) for name, value in arrays.items()}
    return jit_train_step(step, mesh, state_shardings(state, mesh)), (state, batch, key)


def step_flops(config: ml_collections.ConfigDict) -> int:
    """Model FLOPs of networks and heads for one video (two views), forward and backward."""
    model = experiment.audio_visual_model(config)
    spec = experiment.render_spec(config)
    size, mel, frames = spec.crop.image_size, spec.log_mel, spec.views.num_frames
    inputs = (
        jax.ShapeDtypeStruct((1, 2, frames, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, 2, mel.frames, mel.mels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.bool_),
        jax.ShapeDtypeStruct((1,), jnp.bool_),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(functools.partial(model.init, train=False), key, *inputs)

    def outputs(params: Any, statistics: Any, *inputs: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        arrays, _ = model.apply(variables, *inputs, train=True, mutable=["batch_stats"])
        return sum(array.astype(jnp.float32).sum() for array in arrays.values())

    return matrix_flops(jax.grad(outputs), variables["params"], variables["batch_stats"], *inputs)


def compile_cached(lowered: Any, topology: str, cache: Path) -> tuple[str, dict[str, Any]]:
    """Text of the compiled program and further facts, from the cache if they are in it."""
    compiler = "jax-cuda12-pjrt" if _is_gpu(topology) else "libtpu"
    versions = {name: version(name) for name in ("jax", "jaxlib", compiler)}
    about = json.dumps([topology, versions], sort_keys=True)
    name = hashlib.sha256((about + lowered.as_text()).encode()).hexdigest()[:24]
    text_path, facts_path = cache / f"{name}.hlo.gz", cache / f"{name}.json"
    if facts_path.exists():
        return gzip.decompress(text_path.read_bytes()).decode(), json.loads(facts_path.read_text())
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    facts = {
        "topology": topology,
        "versions": versions,
        "compile_seconds": round(seconds, 1),
        "memory": {
            kind: getattr(memory, f"{kind}_size_in_bytes")
            for kind in ("argument", "output", "alias", "temp", "generated_code")
        },
        # The GPU compiler counts none.
        "compiler_flops": (compiled.cost_analysis() or {}).get("flops"),
    }
    text = compiled.as_text()
    cache.mkdir(parents=True, exist_ok=True)
    text_path.write_bytes(gzip.compress(text.encode()))
    facts_path.write_text(json.dumps(facts, indent=1) + "\n")  # last, because it marks both
    return text, facts


def _part(op_name: str) -> str:
    """Part of the step in which an operation was traced."""
    if _BANK_SCOPE in op_name:
        return "bank"
    for part in ("video_encoder", "audio_encoder"):
        if part in op_name:
            return part
    if "AudioVisualModel" in op_name:
        return "heads"
    return "other" if op_name else "unnamed"


def _cycles(module: hlo_costs.Module) -> dict[str, Any]:
    """Estimates of the TPU compiler, per chip."""
    cycles = hlo_costs.cycles(module)
    parts: Counter[str] = Counter()
    for op_name, count in cycles.by_op_name.items():
        parts[_part(op_name)] += count
    return {
        "cycles": cycles.total,
        "cycles_by_part": dict(parts.most_common()),
        "bytes_without_cycles": dict(cycles.uncounted.most_common(8)),
        "loops_of_unknown_length": cycles.loops_of_unknown_length,
        "convolutions": {
            f"{left} x {right}, {dimensions}-D": count
            for (left, right, dimensions), count in hlo_costs.convolution_types(
                module, "conv_general_dilated"
            ).items()
        },
    }


def _metrics(text: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a compiled program, per chip."""
    module = hlo_costs.parse(text)
    topology, memory = facts["topology"], facts["memory"]
    grouped: dict[tuple[str, str], list[int]] = {}
    reduced: Counter[str] = Counter()  # elements of all-reduces outside the bank, by dtype
    for collective in hlo_costs.collectives(module):
        part = "bank" if _BANK_SCOPE in collective.op_name else "step"
        entry = grouped.setdefault((collective.kind, part), [0, 0])
        entry[0] += collective.times
        entry[1] += collective.bytes
        if (collective.kind, part) == ("all-reduce", "step"):
            for dtype, count in collective.shapes:
                reduced[dtype] += collective.times * count
    of_chip = vars(costs(module, *gpu_of(topology))) if _is_gpu(topology) else _cycles(module)
    return {
        **facts,
        **of_chip,
        "hbm_bytes": sum(memory.values()) - 2 * memory["alias"],
        "collectives": [
            {"kind": kind, "part": part, "times": times, "bytes": count}
            for (kind, part), (times, count) in sorted(grouped.items())
        ],
        "aliased_parameters": len(module.aliased_parameters),
        "reduced_elements": dict(reduced),
    }


def _setup(
    topology: str, preset: str, overrides: Mapping[str, str], videos_per_chip: int
) -> tuple[Any, ml_collections.ConfigDict]:
    """Devices of a topology, and the config for them."""
    devices = _devices(topology)
    config = config_of(preset, overrides)
    with config.unlocked():
        config.global_batch_size = videos_per_chip * len(devices)
    return devices, config


def _about(config: ml_collections.ConfigDict, devices: Any) -> dict[str, Any]:
    """Kind and sizes of a config on devices, and the bytes that its bank exchanges."""
    return {
        "transformer": isinstance(experiment.encoder(config, "video"), Transformer),
        "chips": len(devices),
        "videos_per_chip": config.global_batch_size // len(devices),
        "exchange": bank_exchange(config, len(devices))._asdict(),
        "bank_size": config.bank.size,
    }


def compile_product(*, topology: str, size: int) -> dict[str, Any]:
    """Cycles of a large bfloat16 product on one chip, to check the clock of the estimates."""
    place = jax.sharding.SingleDeviceSharding(_devices(topology)[0])
    factor = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=place)
    lowered = jax.jit(jnp.matmul, out_shardings=place).lower(factor, factor)
    module = hlo_costs.parse(lowered.compile().as_text() or "")
    return {"cycles": hlo_costs.cycles(module).total, "model_flops": 2 * size**3}


def compile_step(
    *, topology: str, preset: str, overrides: dict[str, str], videos_per_chip: int, cache: str
) -> dict[str, Any]:
    """Compiles the whole step and reads its metrics, per chip."""
    devices, config = _setup(topology, preset, overrides, videos_per_chip)
    step, arguments = program(config, devices)
    text, facts = compile_cached(step.lower(*arguments), topology, Path(cache))
    state = arguments[0]
    return {
        **_metrics(text, facts),
        **_about(config, devices),
        "model_flops": videos_per_chip * step_flops(config),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "statistics": sum(leaf.size for leaf in jax.tree.leaves(state.batch_stats)),
        "state_arrays": len(jax.tree.leaves(state)),
    }


def compile_bank(
    *, topology: str, preset: str, overrides: dict[str, str], videos_per_chip: int, cache: str
) -> dict[str, Any]:
    """Compiles all draws from the bank and the insertion of a step, and reads their metrics."""
    devices, config = _setup(topology, preset, overrides, videos_per_chip)
    mesh = sharding.create_mesh(config.execution.fsdp, devices)
    spec = loss_spec(config)
    if spec.bank is None:
        raise UserError("bank.size is 0: set a bank to compile")
    count, dim = config.global_batch_size, config.model.embedding_dim
    playbacks, labels = spec.bank.playbacks, experiment.bank_labels(config)

    def arguments() -> Any:
        dtype = jnp.dtype(config.bank.dtype)
        embeddings = dict.fromkeys(MODALITIES, jnp.zeros((count, 2, dim)))
        numbers = jnp.zeros(count, jnp.int32)
        return (
            feature_bank.create(config.bank.size, dim, dtype, labels=labels),
            jax.random.key(0),
            complete_views(embeddings, numbers, playbacks=playbacks, labels=labels),
        )

    def run(bank: Any, key: Any, views: Any) -> Any:
        drawn = draw_all(bank, key, views, spec, mesh=mesh)
        return feature_bank.insert(bank, views, mesh=mesh), drawn

    rows, whole = sharding.rows_sharding(mesh), sharding.replicated(mesh)
    shards = feature_bank.shardings(mesh)
    jitted = jax.jit(
        run, donate_argnums=0, in_shardings=(shards, whole, rows), out_shardings=(shards, rows)
    )
    lowered = jitted.lower(*jax.eval_shape(arguments))
    text, facts = compile_cached(lowered, topology, Path(cache))
    return {**_metrics(text, facts), **_about(config, devices)}
