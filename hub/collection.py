"""The commands that make the exports of hub/collection.yaml: `python hub/collection.py [NAME ...]`.

`--run FOLDER` runs them, one after the other, into FOLDER. `--publish NAMESPACE` also uploads each to NAMESPACE on the Hub and
puts them into a collection there; it needs a token (`hf auth login`). An entry has a base, the name of the repo, and what else
export.py takes: `revision`, `results` and the `pruning_*` keys without `pruning_`.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from huggingface_hub import add_collection_item, create_collection


ROOT = Path(__file__).resolve().parents[1]
COLLECTION = ROOT / "hub" / "collection.yaml"


def command(entry: dict, folder: Path, namespace: str | None = None) -> list[str]:
    """The arguments of export.py for an entry, after `python`."""
    arguments = ["export.py", entry["base"], "--output", str(folder / entry["name"])]
    for key, value in entry.items():
        if key not in ("base", "name"):
            arguments += [f"--{key.replace('_', '-')}", str(value)]
    return arguments + (["--push-to-hub", f"{namespace}/{entry['name']}"] if namespace else [])


def chosen(entries: list[dict], names: list[str]) -> list[dict]:
    """The entries called `names`, or all.

    Raises:
        ValueError: naming those that there are not.
    """
    known = [entry["name"] for entry in entries]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"The collection has no {', '.join(unknown)}; it has {', '.join(known)}.")
    return [entry for entry in entries if not names or entry["name"] in names]


def publish(collection: dict, entries: list[dict], namespace: str) -> str:
    """Put the uploaded entries into a collection on the Hub, and give its address."""
    made = create_collection(collection["title"], namespace=namespace, description=collection["description"], exists_ok=True)
    for entry in entries:
        add_collection_item(made.slug, f"{namespace}/{entry['name']}", "model", exists_ok=True)
    return made.url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries, by default all")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run the commands; exports go there")
    parser.add_argument("--publish", metavar="NAMESPACE", help="with --run: upload, and make the collection of this user")
    options = parser.parse_args()
    if options.publish and not options.run:
        parser.error("--publish uploads what --run makes: give both.")
    collection = yaml.safe_load(COLLECTION.read_text())
    try:
        entries = chosen(collection["models"], options.names)
    except ValueError as error:
        parser.error(str(error))
    for entry in entries:
        arguments = command(entry, options.run.resolve() if options.run else Path("exports"), options.publish)
        print(shlex.join(["python", *arguments]), flush=True)
        if options.run and (failed := subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode):
            return failed
    if options.publish:
        print(publish(collection, entries, options.publish))
    return 0


if __name__ == "__main__":
    sys.exit(main())
