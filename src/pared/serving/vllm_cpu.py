"""The environment of a vLLM process on a CPU that is tested or measured: no traffic, no second process, a small cache."""

from __future__ import annotations

# VLLM_CPU_KVCACHE_SPACE: GiB. VLLM_CPU_NUM_OF_RESERVED_CPU: cores that vLLM would leave to others, of few.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
