"""Scripts in processes of their own that do not each wait for torch and transformers, whose import takes most of such a test.

One process imports these, nothing of the project, and runs nothing. For each script it forks: the script begins where a new
interpreter stands after its imports.
"""

import atexit
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class FreshPython:
    """Runs scripts as `python -I SCRIPT ARGUMENTS` does: the folder of neither the script nor its start is on the path.

    Args:
        environment: the environment of all its scripts.
    """

    def __init__(self, environment: dict[str, str]):
        self.parent = subprocess.Popen(
            [sys.executable, "-I", __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.parent.stdin.close()
        self.parent.wait(timeout=30)

    def run(self, script: Path, *arguments, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
        """As `subprocess.run` with text captured. A script that takes longer than `timeout` seconds ends by SIGALRM."""
        words = [str(script), *map(str, arguments)]
        with tempfile.TemporaryDirectory() as folder:
            files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
            print(json.dumps([words, str(cwd), timeout, files]), file=self.parent.stdin, flush=True)
            status = int(self.parent.stdout.readline())
            return subprocess.CompletedProcess(words, status, *(Path(file).read_text() for file in files))


def serve() -> None:
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: F401

    for line in sys.stdin:
        words, folder, timeout, files = json.loads(line)
        child = os.fork()
        if child == 0:
            run(words, folder, timeout, files)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(words: list[str], folder: str, timeout: int, files: list[str]) -> None:
    signal.alarm(timeout)
    for number, path in enumerate([os.devnull, *files]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0))  # the parent's may hold what it has read ahead
    os.chdir(folder)
    sys.argv = words
    status = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if status and not isinstance(exit.code, int):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
