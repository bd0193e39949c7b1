"""Ask one question about every picture and video of a folder, on as many processes or machines as Ray has.

`python examples/batch_inference.py --model llava-pruned --input photos --output captions.jsonl --workers 2`

Needs `pip install "ray[data]" av` (the extra `ray`). Each worker has a model of its own, on a GPU if there is one. The output
has one JSON object a line, in no order: `path` in the folder, `text`, `num_visual` and `num_kept` tokens, and what was asked;
for a file that can not be read or answered `error` in place of them. Lines are ASCII, with all else escaped as JSON does, also
the bytes of a name that is no UTF-8: `os.fsencode(path)` is the name. Lines are written as they come. A second run answers what
has no line yet (with --retry-errors, also what has an error); a file of other settings is refused.
"""

import argparse
import json
import os
import sys
from pathlib import Path


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers

try:
    import ray
except ImportError as error:
    raise SystemExit('This example needs Ray Data: pip install "ray[data]" av') from error
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video


PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
ASKED = ("model", "question", "pruning_ratio", "max_new_tokens", "num_frames")


class Answerer:
    """One worker: answers batches of paths.

    Args:
        folder: what the paths are relative to.
        asked: the settings, by the names of `ASKED`.
    """

    def __init__(self, folder: str, asked: dict):
        self.folder, self.asked = Path(folder), asked
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ratio = {} if asked["pruning_ratio"] is None else {"pruning_ratio": asked["pruning_ratio"]}
        self.model = AutoModelForImageTextToText.from_pretrained(
            asked["model"], trust_remote_code=True, dtype="auto", device_map=device, **ratio
        ).eval()
        self.processor = AutoProcessor.from_pretrained(asked["model"], trust_remote_code=True)

    def __call__(self, batch: dict) -> dict:
        """{"path": paths as bytes} -> {"line": for each a line of the output}"""
        read, lines = [], []
        for path in map(os.fsdecode, batch["path"]):
            try:
                read.append((path, self.read(self.folder / path)))
            except Exception as error:
                lines.append(self.line(path, error=describe(error)))
        pictures = [(path, media) for path, media in read if "images" in media]
        groups = [pictures] if pictures else []
        groups += [[(path, media)] for path, media in read if "videos" in media]
        for group in groups:
            lines += self.answer(group)
        return {"line": [json.dumps(line) for line in lines]}

    def read(self, path: Path) -> dict:
        """What the processor takes of a file. Photos are turned upright."""
        if path.suffix.lower() in PICTURES:
            return {"images": [ImageOps.exif_transpose(Image.open(path)).convert("RGB")]}
        frames, metadata = load_video(str(path), sample_indices_fn=self.frames_seen)
        return {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}

    def frames_seen(self, metadata, **_) -> np.ndarray:
        number = min(self.asked["num_frames"], metadata.total_num_frames)
        return np.linspace(0, metadata.total_num_frames - 1, number).round().astype(int)

    def answer(self, group: list[tuple[str, dict]]) -> list[dict]:
        """Lines of files that go through the model together; where that fails, each of them is tried alone."""
        try:
            answers = self.generate([media for _, media in group])
        except Exception as error:
            if len(group) > 1:
                return [line for each in group for line in self.answer([each])]
            return [self.line(group[0][0], error=describe(error))]
        return [self.line(path, **answer) for (path, _), answer in zip(group, answers, strict=True)]

    @torch.inference_mode()
    def generate(self, media: list[dict]) -> list[dict]:
        kind = "image" if "images" in media[0] else "video"
        content = [{"type": kind}, {"type": "text", "text": self.asked["question"]}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if (start := self.processor.tokenizer.bos_token) and text.startswith(start):  # or the tokenizer would add another
            options["add_special_tokens"] = False
        inputs = dict(media[0])
        if kind == "image":
            by_row = [each["images"] for each in media]
            inputs = {"images": by_row if self.processor.images_by_row else [image for row in by_row for image in row]}
        inputs = self.processor(text=[text] * len(media), **options, **inputs).to(self.model.device, self.model.dtype)
        outputs = self.model.generate(
            **inputs, max_new_tokens=self.asked["max_new_tokens"], do_sample=False, return_dict_in_generate=True
        )
        texts = self.processor.batch_decode(outputs.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers, record = [{"text": text.strip()} for text in texts], self.model.get_pruning_record(outputs)
        for entry in record or ():
            for name in ("num_visual", "num_kept"):
                answers[entry.row][name] = answers[entry.row].get(name, 0) + getattr(entry, name)
        return answers

    def line(self, path: str, **answer) -> dict:
        return {"path": str(path)} | answer | self.asked


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def answered_before(output: Path, asked: dict, retry_errors: bool) -> set[str]:
    """Paths that need no answer. Cuts off a last line that was interrupted and, to retry them, lines of errors.

    Raises:
        ValueError: if a line is of other settings, or none of this program.
    """
    if not output.exists():
        return set()
    kept, done = [], set()
    lines = output.read_bytes().splitlines(keepends=True)  # of text it would split at more than the end of a line
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if line is None and number == len(lines):
            break
        if not isinstance(line, dict) or not isinstance(line.get("path"), str):
            raise ValueError(f"{output}, line {number}, is not a line of this program. Give another --output.")
        if different := [name for name in ASKED if line.get(name) != asked[name]]:
            said = ", ".join(f"{name} {line.get(name)!r} instead of {asked[name]!r}" for name in different)
            raise ValueError(f"{output}, line {number}, was answered with {said}. Give another --output.")
        if retry_errors and "error" in line:
            continue
        kept.append(text)
        done.add(line["path"])
    if len(kept) < len(lines):
        staged = output.with_name(output.name + ".new")
        staged.write_bytes(b"".join(kept))
        os.replace(staged, output)
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pruned model repo, such as export.py makes")
    parser.add_argument("--input", type=Path, required=True, help="folder of pictures and videos; its folders are searched too")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--question", default="Describe what you see.")
    parser.add_argument("--pruning-ratio", type=float, help="by default that of the model's config")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-frames", type=int, default=32, help="of a video, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures that one worker answers together")
    parser.add_argument("--workers", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--address", help="of a Ray cluster, or `auto`; by default Ray is started on this machine")
    parser.add_argument("--retry-errors", action="store_true")
    options = parser.parse_args()
    for word in sys.argv:
        if word.encode(errors="replace").decode() != word:
            name = os.fsencode(word)
            parser.error(f"{name!r} is no UTF-8, and Ray takes no other command line. Of a folder, give a link to it.")
    if not options.input.is_dir():
        parser.error(f"--input {options.input} is not a folder.")
    asked = {name: getattr(options, name) for name in ASKED}
    if Path(options.model).is_dir():
        asked["model"] = str(Path(options.model).resolve())
    try:
        done = answered_before(options.output, asked, options.retry_errors)
    except ValueError as error:
        parser.error(str(error))
    files = sorted(path for path in options.input.rglob("*") if path.suffix.lower() in PICTURES | VIDEOS and path.is_file())
    paths = [str(path.relative_to(options.input)) for path in files]
    todo = [path for path in paths if path not in done]
    print(f"{len(paths)} files, {len(paths) - len(todo)} answered before, {len(todo)} to do")
    if not todo:
        return
    # A bad setting is an error here and not in each worker; and the repo's code is in the cache before several read it.
    config = AutoConfig.from_pretrained(asked["model"], trust_remote_code=True)
    with torch.device("meta"):
        AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    if asked["pruning_ratio"] is not None:
        config.pruning_settings(asked["pruning_ratio"])
    local = {"num_cpus": options.workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(**({"address": options.address} if options.address else {"address": "local"} | local), log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = [{"path": os.fsencode(path)} for path in todo]  # as bytes, since a name need not be text
    answers = ray.data.from_items(paths, override_num_blocks=len(todo)).map_batches(
        Answerer,
        fn_constructor_args=[str(options.input.resolve()), asked],
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a", encoding="ascii") as output, tqdm(total=len(todo)) as progress:
        for row in answers.iter_rows():
            output.write(row["line"] + "\n")
            output.flush()
            progress.update()
    ray.shutdown()


if __name__ == "__main__":
    main()
