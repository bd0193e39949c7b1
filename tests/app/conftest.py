"""The tests of app.py run in an environment of their own, with Gradio and Selenium: `make test-app`."""

from importlib.util import find_spec


if find_spec("gradio") is None or find_spec("selenium") is None:  # `make test`
    collect_ignore_glob = ["*"]
