"""What is behind the page: choices, refusals, and requests that do not meet."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import app
from app import EXAMPLES, PICTURES, Asker, Choice, Unanswerable, cards
from demo import Run, load_pruned, open_picture
from export import ROOT, Base, own


PICTURE = str(PICTURES / EXAMPLES[0][0])
QUESTION = EXAMPLES[0][1]
EXAMPLE_ANSWERS = {"signs.webp": "CLIFF", "stars.webp": "2", "colors.webp": "purple", "places.webp": "yes"}
DEFAULT = Choice("vlm_pruner", "paper", 0.889)


def asker_of(path: Path) -> Asker:
    return Asker(*load_pruned(Base.open(str(path)), str(path)), max_new_tokens=12)


@pytest.fixture(scope="module")
def asker():
    return asker_of(ROOT)


def last(asker, *arguments):
    *_, answered = asker.answers(*arguments)
    return answered


@pytest.mark.parametrize(("file", "question"), EXAMPLES)
def test_examples_are_answered_with_and_without_pruning(asker, file, question):
    unpruned, pruned, drawing = last(asker, str(PICTURES / file), question, DEFAULT)
    assert unpruned.answer == pruned.answer == EXAMPLE_ANSWERS[file]
    assert unpruned.record is None and pruned.record.num_kept == drawing.num_steps == 64
    assert pruned.cache_bytes < unpruned.cache_bytes


def test_a_choice_is_what_is_run_and_the_config_is_as_before(asker, monkeypatch):
    monkeypatch.setattr(asker.config, "pruning_token_batch", 4)
    monkeypatch.setattr(asker.model.config, "pruning_token_batch", 4)
    before = asker.model.config.to_dict()
    seen = []
    measure = app.measure

    def noting(processor, model, inputs, ratio, *arguments, **options):
        config = model.config
        seen.append((config.pruning_method, config.pruning_preset, config.pruning_token_batch, ratio))
        return measure(processor, model, inputs, ratio, *arguments, **options)

    monkeypatch.setattr(app, "measure", noting)
    _, pruned, _ = last(asker, PICTURE, QUESTION, Choice("fastv", "paper", 0.75))
    assert pruned.record.num_kept == 144
    last(asker, PICTURE, QUESTION, Choice("vlm_pruner", "fine", 0.889))
    assert seen == [
        ("fastv", "paper", None, 0.0),
        ("fastv", "paper", None, 0.75),
        ("vlm_pruner", "fine", 4, 0.0),
        ("vlm_pruner", "fine", 4, 0.889),
    ]
    assert asker.model.config.to_dict() == before


def test_requests_at_one_time_do_not_meet(asker):
    """Two threads, each with a method of its own: each gets what it gets alone."""
    choices = [Choice("vlm_pruner", "paper", 0.889), Choice("divprune", "paper", 0.75)]
    alone = [last(asker, PICTURE, QUESTION, choice)[1].record.images[0].order for choice in choices]
    found = {}

    def ask(number: int):
        found[number] = [last(asker, PICTURE, QUESTION, choices[number])[1].record.images[0].order for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, orders in found.items():
        assert len(orders) == 3 and all(torch.equal(order, alone[number]) for order in orders)


def test_every_method_has_a_sentence(asker, monkeypatch):
    names = list(own("pruning_methods.METHODS"))
    assert list(asker.methods) == names
    for name in names:
        assert asker.about(Choice(name, "paper", 0.889)).count("Here 88.9% of each image's visual tokens leave at") == 1
    monkeypatch.setattr(type(asker.model.model), "tower_blocks", lambda model: None)  # a tower of which nobody says how
    refused = [name for name in names if asker.about(Choice(name, "paper", 0.889)).startswith("**Not with this model.**")]
    assert refused == [name for name in names if "tower" in asker.methods[name].looks_at] != []


@pytest.fixture
def files(tmp_path):
    whole = Path(PICTURE).read_bytes()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "broken.webp").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "question", "choice", "sentence"),
    [
        (None, QUESTION, DEFAULT, "Choose a picture"),
        (PICTURE, " \n", DEFAULT, "Ask a question"),
        (PICTURE, None, DEFAULT, "Ask a question"),
        (PICTURE, "a" * 501, DEFAULT, "has 501 characters, and 500 are the most"),
        (PICTURE, "What is in <image>?", DEFAULT, "image"),
        (PICTURE, QUESTION, Choice("vlm_pruner", "paper", 0), "nothing is pruned"),
        (PICTURE, QUESTION, Choice("vlm_pruner", "coarse", 0.889), "pruning_preset must be one of"),
        (PICTURE, QUESTION, Choice("absent", "paper", 0.889), "pruning_method must be one of"),
        ("text.png", QUESTION, DEFAULT, "text.png cannot be read as a picture"),
        ("empty.png", QUESTION, DEFAULT, "empty.png cannot be read as a picture"),
        ("broken.webp", QUESTION, DEFAULT, "broken.webp cannot be read as a picture"),
        ("drawing.svg", QUESTION, DEFAULT, "drawing.svg cannot be read as a picture"),
        ("huge.png", QUESTION, DEFAULT, "huge.png cannot be read as a picture: it has 9000 x 9000 pixels, and 50 million are"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(asker, files, file, question, choice, sentence):
    path = file if file in (None, PICTURE) else str(files / file)
    with pytest.raises(Unanswerable, match=sentence) as raised:
        last(asker, path, question, choice)
    assert str(files) not in str(raised.value)


def test_pictures_of_other_kinds_are_answered(asker, tmp_path):
    scene = open_picture(PICTURE)
    scene.quantize(64).save(tmp_path / "palette.png")
    scene.save(tmp_path / "animation.gif", save_all=True, append_images=[Image.new("RGB", scene.size)])
    for file in ("palette.png", "animation.gif"):
        unpruned, _, _ = last(asker, str(tmp_path / file), QUESTION, DEFAULT)
        assert unpruned.answer == EXAMPLE_ANSWERS["signs.webp"], file


def test_drawing_follows_the_order_of_selection(asker):
    drawing = last(asker, PICTURE, QUESTION, DEFAULT)[2]
    pictures = [asker.draw(drawing, first) for first in (0, 1, 64)]
    grids = [picture.crop((0, 0, 672, 672)).tobytes() for picture in pictures]  # without the legend below
    assert len(set(grids)) == 3
    assert pictures[2].tobytes() == asker.processor.draw_kept_tokens(record=drawing.record, inputs=drawing.pixels)[0].tobytes()


def test_answers_are_text_and_no_html():
    run = Run("<script>alert(1)</script>", 10, 3, 8, 0.1, 0.2, None)
    assert "<script>" not in cards(run, None) and "&lt;script&gt;" in cards(run, None)
