"""Which transport a run has, and what contradicts it. Standard library only."""

from __future__ import annotations

from siren_megatron.rollout.options import RolloutOptions


def check_sharing(options: RolloutOptions) -> None:
    """Refuse what contradicts whether vLLM shares a GPU with the trainer.

    Raises:
        ValueError: one line that names both options.
    """
    devices, transfer = options.rollout_devices, options.weight_transfer
    if devices is None and transfer == "nccl":
        raise ValueError(
            "--weight-transfer nccl is between different GPUs: give vLLM some of its own (--rollout-devices)"
        )
    if devices is not None and transfer == "ipc":
        raise ValueError(
            f"--weight-transfer ipc is within one GPU, and --rollout-devices {devices} gives vLLM others"
        )
    if devices is not None and options.rollout_sleep:
        raise ValueError(
            f"--rollout-sleep {options.rollout_sleep} frees memory for a trainer on the same GPU, and "
            f"--rollout-devices {devices} gives vLLM others"
        )
    if options.rollout_async_steps and options.rollout_sleep:
        raise ValueError(
            f"--rollout-sleep {options.rollout_sleep} contradicts --rollout-async-steps "
            f"{options.rollout_async_steps}: vLLM samples while the trainer trains"
        )


def weight_transfer(options: RolloutOptions, *, on_cpu: bool) -> str:
    """The run's transport: `--weight-transfer`, or what auto means here.

    Raises:
        ValueError: `--weight-transfer` or `--rollout-sleep` needs a GPU, and there is none.
    """
    if on_cpu and options.rollout_sleep:
        raise ValueError(f"--rollout-sleep {options.rollout_sleep}: on a CPU there is no GPU memory to free")
    if on_cpu and options.weight_transfer in ("ipc", "nccl"):
        raise ValueError(f"--weight-transfer {options.weight_transfer} needs GPUs, and this run is on a CPU")
    if options.weight_transfer != "auto":
        return options.weight_transfer
    if on_cpu:
        return "shared-memory"
    return "ipc" if options.rollout_devices is None else "nccl"
