"""Scripts in processes of their own that do not each wait for torch and transformers, whose import takes most of such a test.

One process imports these, nothing of the project, and runs nothing. For each script it forks: the script begins where a new
interpreter stands after its imports. `conftest.py` has one for the whole session.
"""

import atexit
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


class FreshPython:
    """Runs scripts as `python -I` does: the folder of neither the script nor its start is on the path.

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

    def run(self, *words, cwd: Path, path=(), timeout: int = 300, **environment) -> subprocess.CompletedProcess:
        """As `subprocess.run` with text captured. A script that takes longer than `timeout` seconds ends by SIGALRM.

        Args:
            words: what follows `python`: a script, `-m` and a module, or `-c` and code, and its arguments.
            path: folders that modules are imported from, before all others.
            environment: variables beside those of all scripts.
        """
        (done,) = self._run_all(words, cwd, path, timeout, [environment])
        return done

    def run_ranks(self, number: int, *words, cwd: Path, path=(), timeout: int = 300) -> list[subprocess.CompletedProcess]:
        """`run` in `number` processes at once, with the variables by which `torchrun` tells each its place among them. Where
        one fails, the others are killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        group |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(number)]
        return self._run_all(words, cwd, path, timeout, ranks)

    def _run_all(self, words, cwd, path, timeout, environments) -> list[subprocess.CompletedProcess]:
        words = list(map(str, words))
        with tempfile.TemporaryDirectory() as folder:
            jobs = [
                {
                    "words": words,
                    "folder": str(cwd),
                    "path": list(map(str, path)),
                    "timeout": timeout,
                    "environment": {name: str(value) for name, value in environment.items()},
                    "files": [os.path.join(folder, f"{number}-{name}") for name in ("stdout", "stderr")],
                }
                for number, environment in enumerate(environments)
            ]
            print(json.dumps(jobs), file=self.parent.stdin, flush=True)
            statuses = json.loads(self.parent.stdout.readline())
            texts = [[Path(file).read_text() for file in job["files"]] for job in jobs]
            return [subprocess.CompletedProcess(words, *each) for each in zip(statuses, *zip(*texts, strict=True), strict=True)]


def serve() -> None:
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, pipeline  # noqa: F401

    for line in sys.stdin:
        jobs, children, statuses = json.loads(line), [], {}
        for job in jobs:
            children.append(os.fork())
            if children[-1] == 0:
                run(**job)
        while len(statuses) < len(children):
            child, status = os.wait()
            statuses[child] = os.waitstatus_to_exitcode(status)
            if status:
                for other in set(children) - set(statuses):
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([statuses[child] for child in children]), flush=True)


def run(words: list[str], folder: str, path: list[str], timeout: int, environment: dict[str, str], files: list[str]) -> None:
    signal.alarm(timeout)
    for number, name in enumerate([os.devnull, *files]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0))  # the parent's may hold what it has read ahead
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[:0] = path
    status = 0
    try:
        sys.argv = words[1:] if words[0] in ("-c", "-m") else words
        if words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
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
