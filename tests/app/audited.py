"""`audited.py FILE ARGUMENTS` runs app.py with the arguments, and writes each host that it connects to or looks up to FILE."""

import runpy
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
log = Path(sys.argv[1])


def note(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event == "socket.connect" else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        with log.open("a") as file:
            file.write(f"{host}\n")


sys.addaudithook(note)
sys.argv = [str(ROOT / "app.py"), *sys.argv[2:]]
sys.path.insert(0, str(ROOT))
runpy.run_path(sys.argv[0], run_name="__main__")
