"""examples/batch_inference.py: two Ray workers on this machine, resumed, with files that can not be read."""

import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load_pruned, picture
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor

from training.scenes import draw, make_scene


ROOT = Path(__file__).parents[1]
QUESTION = "How many circles are there?"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "examples/batch_inference.py", "--model", ".", "--input", folder / "photos"]
    words += ["--output", folder / "captions.jsonl", "--question", QUESTION, "--max-new-tokens", "12", *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_TMPDIR": "/tmp"}
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def lines_of(folder: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    found = {line["path"]: line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(ROOT / "examples" / "batch_inference.py"))


@pytest.mark.once
def test_two_workers_go_on_with_a_folder(tmp_path, example):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    no_text = os.fsdecode(b"caf\xe9.png") if sys.platform == "linux" else "cafe.png"  # elsewhere names must be UTF-8
    scenes = {"a.png": 0, "b.JPG": 1, "more/c.png": 2, "more/d.webp": 3, "split\u2028here.png": 4, no_text: 5}
    for name, seed in scenes.items():
        draw(make_scene("test", seed)).save(tmp_path / "photos" / name, quality=95)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "photos" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    model = AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answers = {}
    for name in scenes:
        picture = Image.open(tmp_path / "photos" / name).convert("RGB")
        inputs = processor(images=picture, text=text, return_tensors="pt").to(torch.bfloat16)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers[name] = processor.decode(tokens, skip_special_tokens=True).strip()

    asked = {"model": str(ROOT), "question": QUESTION, "pruning_ratio": None, "max_new_tokens": 12, "num_frames": 32}
    lines = [json.dumps({"path": name, "text": answers[name]} | asked) for name in ("a.png", "b.JPG")]
    output = tmp_path / "captions.jsonl"
    output.write_text(f"{lines[0]}\n{lines[1][:40]}")  # interrupted within its last line
    done = run(tmp_path, "--workers", "2", "--batch-size", "2")
    assert done.returncode == 0 and "8 files, 1 answered before, 7 to do" in done.stdout, done.stdout + done.stderr[-3000:]
    found = lines_of(tmp_path)
    assert set(found) == {*scenes, "broken.png", "broken.mp4"}
    assert all(set(found[name]) >= {"error"} and "text" not in found[name] for name in ("broken.png", "broken.mp4"))
    assert found["broken.png"]["error"].startswith("UnidentifiedImageError: ")
    assert {name: found[name]["text"] for name in scenes} == answers and found["a.png"] == json.loads(lines[0])
    assert all((found[name]["num_visual"], found[name]["num_kept"]) == (576, 64) for name in [*scenes][1:])

    assert {name: found["b.JPG"][name] for name in example["ASKED"]} == asked
    assert example["answered_before"](output, asked, retry_errors=False) == set(found)
    with pytest.raises(ValueError, match=r"line 1, was answered with pruning_ratio None instead of 0\.5"):
        example["answered_before"](output, asked | {"pruning_ratio": 0.5}, retry_errors=False)
    assert example["answered_before"](output, asked, retry_errors=True) == set(scenes) == set(lines_of(tmp_path))
    output.write_text("[]\n" + output.read_text())
    with pytest.raises(ValueError, match="line 1, is not a line of this program"):
        example["answered_before"](output, asked, retry_errors=False)


@pytest.mark.once
def test_lines_end_where_json_lines_end(tmp_path):
    """Text is split at more: at U+2028 and U+0085, which JSON need not escape. What was interrupted may end within a letter."""
    example = runpy.run_path(str(ROOT / "examples" / "batch_inference.py"))
    asked = dict.fromkeys(example["ASKED"])
    whole = [json.dumps({"path": path, "text": "a\u2028b\x85c"} | asked, ensure_ascii=False) for path in ("é\u2028", "b")]
    output = tmp_path / "lines.jsonl"
    output.write_bytes("\n".join([*whole, whole[0]]).encode()[: -len(whole[0].encode()) + len('{"path": "') + 1])
    assert example["answered_before"](output, asked, retry_errors=False) == {"é\u2028", "b"}
    assert output.read_text(encoding="utf-8") == "\n".join([*whole, ""])


@pytest.mark.once
def test_a_command_line_that_is_no_utf8_is_named(monkeypatch, capsys):
    """Ray fails at it in C++."""
    words = ["batch_inference.py", "--model", ".", "--input", os.fsdecode(b"caf\xe9"), "--output", "lines.jsonl"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples" / "batch_inference.py"))["main"]()
    assert r"error: b'caf\xe9' is no UTF-8, and Ray takes no other command line" in capsys.readouterr().err


@pytest.mark.once
def test_a_prompt_starts_with_one_token_of_start():
    """Chat templates write it, and public tokenizers add it: those of Mistral and of Idefics3, not the small one here."""
    family = FAMILIES["mistral3"]
    processor = family.processor_class.from_pretrained(family.checkpoint)
    start = processor.tokenizer.bos_token
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, processor.tokenizer.bos_token_id)]
    )
    answerer_class = runpy.run_path(str(ROOT / "examples" / "batch_inference.py"))["Answerer"]
    answerer, seen = object.__new__(answerer_class), {}
    answerer.asked, answerer.processor = {"question": QUESTION, "max_new_tokens": 1}, processor
    answerer.model = copy.deepcopy(load_pruned(family))
    answerer.model.register_forward_pre_hook(lambda model, args, given: seen.update(given), with_kwargs=True)
    answerer.generate([{"images": [picture(1, 80, 80)]}])
    content = [{"type": "image", "image": picture(1, 80, 80)}, {"type": "text", "text": QUESTION}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    assert torch.equal(
        seen["input_ids"], processor.apply_chat_template([{"role": "user", "content": content}], **options)["input_ids"]
    )
    assert seen["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.once
def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    Image.new("RGB", (16, 8)).save(tmp_path / "photo.jpg", exif=exif)
    read = runpy.run_path(str(ROOT / "examples" / "batch_inference.py"))["Answerer"].read
    assert read(None, tmp_path / "photo.jpg")["images"][0].size == (8, 16)


def test_without_ray_it_says_what_to_install(tmp_path):
    hidden = "import sys; sys.modules['ray'] = None; import runpy; runpy.run_path('examples/batch_inference.py')"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and 'pip install "ray[data]" av' in done.stderr
