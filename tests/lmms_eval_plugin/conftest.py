"""Shared by the tests of the plugin for lmms-eval. They run in an environment of their own: `make test-lmms-eval`."""

import os
from importlib.metadata import PackageNotFoundError, version


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

try:
    version("lmms_eval")
except PackageNotFoundError:  # `make test`
    collect_ignore_glob = ["*"]
