"""vLLM's worker on a CPU, with pruning: in a file of its own, because importing vLLM's needs a CPU build."""

from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import PrunedWorkerMixin


class PruningCPUWorker(PrunedWorkerMixin, CPUWorker):
    """See `PrunedWorkerMixin`."""
