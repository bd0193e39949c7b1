"""The training of the small model: reproducible, resumable, and its batches say what they mean."""

import numpy as np
import pytest
import torch

from training import train
from training.model import build_model
from training.scenes import ask, draw, make_scene


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few and small pictures, and no checkpoint or log of the real run."""
    monkeypatch.setattr(train, "WORK", tmp_path / "work")
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "kept")
    monkeypatch.setattr(train, "LOG", tmp_path / "log.jsonl")
    monkeypatch.setattr(train, "TOWER_LEVELS", ((60, 6, 6, 0.75, 2, 1),))
    monkeypatch.setattr(train, "DECODER_LEVELS", ((60, 6, (1, 2), (0, 1), 1, 0.5),))
    monkeypatch.setattr(train, "JOIN_SCENES", 1)
    monkeypatch.setattr(train, "PROJECTOR_STEPS", 2)

    def fresh():
        train.WORK = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
        train.WORK.mkdir()

    return fresh


@pytest.mark.parametrize("stage", ["tower", "decoder"])
def test_two_trainings_with_one_seed_have_the_same_first_50_losses(small, stage):
    losses = []
    for _ in range(2):
        small()
        losses.append(train.STAGES[stage](until=50))
    assert len(losses[0]) == 50 and losses[0] == losses[1]
    assert sum(losses[0][-10:]) < sum(losses[0][:10])


def test_a_resumed_training_goes_on_as_if_never_stopped(small):
    small()
    straight = train.train_decoder(until=8)
    small()
    assert train.train_decoder(until=5) + train.train_decoder(until=8) == straight


def test_a_clone_goes_on_from_the_weights_that_were_kept(small):
    small()
    train.train_decoder(until=3)
    weights = torch.load(train.WORK / "decoder.pt")["modules"]
    train.keep()
    small()
    kept = train.stopped_at("decoder")
    assert kept["step"] == 3
    for name, weight in weights.items():
        torch.testing.assert_close(kept["modules"][name].float(), weight, atol=1e-6, rtol=0.01)
    assert len(train.train_decoder(until=5)) == 2


def test_the_joined_model_starts_from_both_parts(small):
    small()
    train.train_tower(until=2)
    train.train_decoder(until=2)
    losses = train.train_join(until=4)
    assert len(losses) == 4 and all(loss == loss for loss in losses)
    modules = torch.load(train.WORK / "join.pt")["modules"]
    parts = torch.load(train.WORK / "tower.pt")["modules"]
    name = "embeddings.position_embedding.weight"
    # Two steps of fitting the projector leave the tower alone, two more move it a little.
    assert 0 < (modules[f"model.model.vision_tower.{name}"] - parts[f"tower.{name}"]).abs().max() < 0.01


def test_crops_of_the_tower_are_the_tower_on_the_whole_picture():
    model = build_model(train.tokenizer()).eval()
    scene = make_scene("train", 0)
    pixels = torch.frombuffer(bytearray(draw(scene).tobytes()), dtype=torch.uint8).view(1, 336, 336, 3)
    values = ((pixels.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.model.vision_tower(values).last_hidden_state[:, 1:]
        found = train.tower_features(model.model.vision_tower, pixels, torch.arange(576)[None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_packed_questions_are_answered_as_if_each_were_alone():
    """A branch of the packed sequence has the logits of the plain prompt; what is predicted is the answer and its end."""
    tokenizer, scene = train.tokenizer(), make_scene("train", 1, 84)
    shown = np.random.RandomState(0).random_sample(36) < 0.5
    batch = train.collate([train.pack(scene, shown, turns=False)]) | {"shown": torch.from_numpy(shown)[None]}
    model = build_model(tokenizer).eval()
    visual, num_shown = torch.randn(1, 36, 192), int(shown.sum())
    losses = []
    with torch.no_grad():
        together, outcomes = train.answer_loss(model, visual, batch)
        for question in ask(scene):
            text = f"<s>USER: {'<image>' * num_shown}\n{question.text} ASSISTANT: {question.answer}</s>"
            ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            prompt = len(tokenizer(text.split("ASSISTANT:")[0] + "ASSISTANT:", add_special_tokens=False).input_ids)
            image = (ids == model.config.image_token_id)[..., None]
            embeds = model.get_input_embeddings()(ids).masked_scatter(image, visual[:, shown])
            first = int(image[0].nonzero()[0, 0])
            places = [*range(first), *(first + shown.nonzero()[0]), *range(first + 36, ids.shape[1] + 36 - num_shown)]
            states = model.model.language_model(inputs_embeds=embeds, position_ids=torch.tensor([places])).last_hidden_state
            logits = model.lm_head(states)[0, prompt - 1 : -1]
            losses += torch.nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="none").tolist()
    assert together.item() == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert sum(total for _, total in outcomes.values()) == len(ask(scene))


def test_turns_are_the_chat_template():
    processor = train.build_processor(train.tokenizer())
    scene = make_scene("train", 2, 84)
    messages = []
    for number, question in enumerate(ask(scene)):
        image = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    expected = train.tokens_of(processor.apply_chat_template(messages))
    packed = train.pack(scene, np.ones(1, dtype=bool), turns=True)
    assert tuple(packed["ids"]) == expected
    assert packed["positions"] == list(range(len(expected)))
