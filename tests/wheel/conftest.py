"""The tests of wheel and sdist have an environment of their own, with `build`, and ask the package index: `make test-wheel`."""

from importlib.util import find_spec


if find_spec("build") is None:  # `make test`
    collect_ignore_glob = ["*"]
