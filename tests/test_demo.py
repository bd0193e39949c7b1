"""The demo runs on what a bare clone has, and on what its user gives it."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, picture
from PIL import Image

from demo import main, open_picture
from training.scenes import ask, draw, make_scene


ROOT = Path(__file__).parents[1]
CHECKPOINT = FAMILIES["llava"].checkpoint
SCENE_SEED = 2
QUICK = ("--max-new-tokens", "4", "--repeats", "1")


@pytest.fixture
def demo(fresh_python, tmp_path):
    """Runs the demo in an empty folder."""
    return lambda *arguments: fresh_python.run(ROOT / "demo.py", *arguments, cwd=tmp_path, path=[ROOT])


def numbers(output: str, row: str) -> list[str]:
    """The two values of a row of the table."""
    return re.search(rf"^{row} {{2,}}(\S+(?: \S+)?) {{2,}}(\S+(?: \S+)?)", output, re.MULTILINE).groups()


@pytest.mark.once
def test_demo_on_a_base_checkpoint(demo, tmp_path):
    """An own picture and question; the base is exported on the way, and nothing of that stays."""
    picture(1).save(tmp_path / "mine.jpg")
    before = sorted(CHECKPOINT.parent.iterdir())
    process = demo("--model", CHECKPOINT, "--image", "mine.jpg", "--question", 'What\'s "this"?', "--ratio", "0.75", *QUICK)
    assert process.returncode == 0, process.stderr
    output = process.stdout
    assert 'What\'s "this"?' in output
    assert numbers(output, "visual tokens") == ("576", "144")
    full, pruned = map(int, numbers(output, "prompt tokens from layer 2 on"))
    assert full - pruned == 576 - 144
    unit = 4 * 64 * 2  # float32, hidden size, keys and values
    cached = [float(each.split()[0]) for each in numbers(output, "KV cache at the end")]
    expected = [4 * (full + 3) * unit / 1e6, (2 * (full + 3) + 2 * (pruned + 3)) * unit / 1e3]
    assert cached == pytest.approx(expected, rel=0.05)
    assert "time to the first token" in output
    assert "time in all" in output
    path = re.search(r"kept: (\S+)", output).group(1)
    assert Image.open(tmp_path / path).size == (672, 702)
    assert sorted(CHECKPOINT.parent.iterdir()) == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["demo_output", "mine.jpg"]


@pytest.mark.once
def test_demo_without_arguments(demo, tmp_path):
    """The model at the root reads a sign of a scene that it was not trained on, unpruned and with 64 of 576 tokens."""
    scene = make_scene("test", SCENE_SEED)
    assert (np.asarray(Image.open(ROOT / "docs" / "scene.png")) == np.asarray(draw(scene))).all()
    process = demo("--repeats", "1")
    assert process.returncode == 0, process.stderr
    question = re.search(r"^question +(.+)$", process.stdout, re.MULTILINE).group(1)
    answer = next(asked.answer for asked in ask(scene) if asked.text == question)
    assert re.findall(r"^(?:un)?pruned +(\w+)$", process.stdout, re.MULTILINE) == [answer, answer]
    assert numbers(process.stdout, "visual tokens") == ("576", "64")
    assert Image.open(tmp_path / "demo_output" / "kept.png").size == (672, 702)


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./absent"), "is neither a folder nor the id of a model on the Hub"),
        (("--ratio", "0"), "Nothing would be pruned"),
    ],
)
def test_errors_are_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    assert main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def saved(folder, name: str, image: Image.Image, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_pictures_of_every_kind_are_shown_upright_and_in_color(tmp_path):
    """Each file is 30 x 20 pixels of (200, 100, 50), in its left half where one half differs, in 255s elsewhere."""
    plain, exif = Image.new("RGB", (30, 20), (200, 100, 50)), Image.Exif()
    halves = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    halves.paste((200, 100, 50, 255), (0, 0, 15, 20))
    palette = Image.new("P", (30, 20), 1)
    palette.putpalette([200, 100, 50, 0, 0, 0])
    palette.paste(0, (0, 0, 15, 20))
    exif[0x0112] = 6
    lossless = {"quality": 100, "subsampling": 0}
    on_its_side = saved(tmp_path, "phone.png", plain.rotate(90, expand=True), exif=exif)
    assert open_picture(on_its_side).size == (30, 20)
    for path in (
        on_its_side,
        saved(tmp_path, "cmyk.jpg", plain.convert("CMYK"), **lossless),
        saved(tmp_path, "animation.gif", plain, save_all=True, append_images=[Image.new("RGB", (30, 20))]),
    ):
        np.testing.assert_allclose(np.asarray(open_picture(path)), np.asarray(plain), atol=3, err_msg=path.name)
    for path in (
        saved(tmp_path, "transparent.png", halves),
        saved(tmp_path, "palette.png", palette, transparency=1),
        saved(tmp_path, "palette.gif", palette, transparency=1),
    ):
        pixels = np.asarray(open_picture(path))
        assert (pixels[:, :15] == (200, 100, 50)).all() and (pixels[:, 15:] == 255).all(), path.name
    deep = saved(tmp_path, "deep.png", Image.fromarray(np.full((20, 30), 100 * 257, dtype=np.uint16)))
    assert (np.asarray(open_picture(deep)) == 100).all()


@pytest.mark.parametrize("content", [b"", b"no picture", "cut off"])
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    whole = saved(tmp_path, "whole.png", picture(1))
    (tmp_path / "broken.png").write_bytes(whole.read_bytes()[:5000] if content == "cut off" else content)
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture: .+"):
        open_picture(tmp_path / "broken.png")
