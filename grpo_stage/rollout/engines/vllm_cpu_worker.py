"""vLLM's worker of a server on a CPU, with what this stage changes in vLLM where it starts it in its own process."""

from vllm.v1.worker.cpu_worker import CPUWorker

from grpo_stage.rollout.engines.vllm_process import add_one_adapter_at_once


class AdapterCPUWorker(CPUWorker):
    """For `--worker-cls`, of a server that gets adapters."""

    def init_device(self) -> None:
        add_one_adapter_at_once()
        super().init_device()
