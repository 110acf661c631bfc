"""The trainer's state as plain tensors: float32 weights and AdamW's moments, by parameter name.

It is whole tensors in safetensors files, so that a run may go on with another number of workers or
another ZeRO stage, and nothing is unpickled.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.publishing import discard_folder, is_whole, set_aside_folder
from cluster.run_folder import RunFolder
from training.engine import TrainingEngine

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PARTS = ("weight", *_MOMENTS)
_FILE_BYTES = 1 << 31
_INDEX = "state.json"


def save_state(engine: TrainingEngine, folder: Path | None, step: int) -> None:
    """Write the state after `step` optimizer steps. Every worker calls this, one with a folder."""
    files: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    for name, parameter in _trained(engine):
        for part in _PARTS:
            value = _read(engine, parameter, part)
            if folder:
                held[f"{name}:{part}"] = value.detach().to("cpu", torch.float32, copy=True)
        if folder and sum(value.nbytes for value in held.values()) > _FILE_BYTES:
            _flush(held, folder, files)
    if folder:
        _flush(held, folder, files)
        (folder / _INDEX).write_text(json.dumps({"step": step, "files": files}))


def load_state(engine: TrainingEngine, folder: Path) -> None:
    """Put a saved state into a fresh engine, on every worker."""
    index = json.loads((folder / _INDEX).read_text())
    _make_moments(engine, index["step"])
    saved = {key: file for file in index["files"] for key in _keys(folder / file)}
    for name, parameter in _trained(engine):
        for part in _PARTS:
            key = f"{name}:{part}"
            with safe_open(folder / saved[key], framework="pt") as file:
                _write(engine, parameter, part, file.get_tensor(key))


def newest_state(run: RunFolder, limit: int) -> int:
    """The last step up to `limit` whose state is whole, 0 where there is none.

    Damaged states are set aside.
    """
    for step in reversed(run.saved_steps()):
        if step > limit:
            continue
        if is_whole(run.trainer_state(step)):
            return step
        set_aside_folder(run.trainer_state(step))
    return 0


def discard_states(run: RunFolder, before: int) -> None:
    """Remove the states of steps before `before`."""
    for step in run.saved_steps():
        if step < before:
            discard_folder(run.trainer_state(step))


def _trained(engine: TrainingEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in engine.model.named_parameters() if p.requires_grad)


def _flush(held: dict[str, Tensor], folder: Path, files: dict[str, int]) -> None:
    if held:
        name = f"state_{len(files):05d}.safetensors"
        save_file(held, folder / name)
        files[name] = len(held)
        held.clear()


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _read(engine: TrainingEngine, parameter: nn.Parameter, part: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    master = _unsharded(engine, parameter)
    if master is not None:
        return master if part == "weight" else engine.adam.state[master][part]
    if part == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, part)


def _write(engine: TrainingEngine, parameter: nn.Parameter, part: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    master = _unsharded(engine, parameter)
    value = value.to(engine.deepspeed.device)
    if master is not None:
        (master.data if part == "weight" else engine.adam.state[master][part]).copy_(value)
    elif part == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, part)
    if part == "weight":
        _write_working_copy(parameter, value)


def _write_working_copy(parameter: nn.Parameter, value: Tensor) -> None:
    import deepspeed

    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)


def _unsharded(engine: TrainingEngine, parameter: nn.Parameter) -> Tensor | None:
    """The float32 tensor that AdamW steps for `parameter` without ZeRO; None with it."""
    optimizer: Any = engine.deepspeed.optimizer
    if optimizer is engine.adam:
        return parameter
    if not hasattr(optimizer, "fp32_groups"):
        return None
    for low, master in zip(optimizer.fp16_groups[0], optimizer.fp32_groups[0], strict=True):
        if low is parameter:
            return master
    raise AssertionError("a trained parameter that the optimizer does not know")


def _make_moments(engine: TrainingEngine, step: int) -> None:
    """AdamW makes its moments at its first step; a restored one needs them before."""
    optimizer: Any = engine.deepspeed.optimizer
    for flat in _stepped_tensors(engine, optimizer):
        engine.adam.state[flat] = {
            "step": torch.tensor(float(step), device=flat.device),
            **{moment: torch.zeros_like(flat) for moment in _MOMENTS},
        }
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer._lazy_init_hp_params_optimizer_state()


def _stepped_tensors(engine: TrainingEngine, optimizer: Any) -> list[Tensor]:
    if optimizer is engine.adam:
        return list(engine.adam.param_groups[0]["params"])
    if hasattr(optimizer, "fp32_groups"):
        return list(optimizer.fp32_groups[0])
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(optimizer.single_partition_of_fp32_groups)
    return list(optimizer.fp32_partitioned_groups_flat)
