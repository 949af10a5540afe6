"""GRPO with selective entropy regularisation on megatron-core, rollouts by vLLM.

    torchrun --nproc-per-node 2 pretrain_siren.py --tensor-model-parallel-size 2 --hf-checkpoint DIR \
        --prompt-data FILE --reward math --save DIR

`--help` lists the options, `--check` only checks them.
"""

from siren_megatron.config import parse_args
from siren_megatron.signals import StopSignals


def main() -> None:
    config = parse_args()
    if config.run.check:
        return
    # Before any library starts threads, which would not know that the signals are blocked.
    signals = StopSignals()
    # Heavy imports come after the options are known to be right, megatron-core's after the platform is set.
    from siren_megatron import platform

    device = platform.install()
    from siren_megatron.job import Job

    with Job(config, device, signals) as job:
        job.evaluate_if_due()
        while job.goes_on():
            rollout = job.rollout()
            batch = job.make_batch(rollout)
            batch = job.compute_logprobs(batch)
            batch = job.compute_advantages(batch)
            metrics = job.update(batch)
            job.update_weights()
            job.evaluate_if_due()
            job.log(batch, metrics)
            job.save_if_due()
        job.finish_saves()
        job.export()


if __name__ == "__main__":
    main()
