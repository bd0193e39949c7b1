"""The training of the small model: reproducible, resumable, and its batches say what they mean."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy import Configuration, collect_questions, evaluate
from training import train
from training.model import build_model
from training.scenes import LETTERS, QUESTION_TYPES, ask, draw, make_scene, patch_labels


pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few and small pictures, and no checkpoint or log of the real run."""
    monkeypatch.setattr(train, "WORK", tmp_path / "work")
    monkeypatch.setattr(train, "CHECKPOINTS", tmp_path / "kept")
    monkeypatch.setattr(train, "LOG", tmp_path / "log.jsonl")
    monkeypatch.setattr(train, "TOWER_LEVELS", ((60, 6, 6, 0.75, 2, 1),))
    monkeypatch.setattr(train, "DECODER_LEVELS", ((60, 6, (1, 2), (0, 1), 1, 0.5),))
    monkeypatch.setattr(train, "JOIN_SCENES", 1)

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


def test_the_joined_model_starts_from_all_parts(small):
    small()
    for stage in ("tower", "decoder", "projector"):
        train.STAGES[stage](until=2)
    losses = train.train_join(until=2)
    assert len(losses) == 2 and all(loss == loss for loss in losses)
    modules = torch.load(train.WORK / "join.pt")["modules"]
    for stage, name, prefix in (
        ("tower", "tower.embeddings.position_embedding.weight", "model.model.vision_"),
        ("decoder", "model.lm_head.weight", ""),
        ("decoder", "where.bias", ""),
        ("projector", "projector.linear_1.weight", "model.model.multi_modal_"),
    ):
        part = torch.load(train.WORK / f"{stage}.pt")["modules"][name]
        assert 0 < (modules[prefix + name] - part).abs().max() < 0.01, name  # two steps away


def test_parts_of_another_model_are_refused(small):
    small()
    train.train_tower(until=1)
    train.train_decoder(until=1)
    saved = torch.load(train.WORK / "decoder.pt")
    del saved["modules"]["model.model.language_model.norm.weight"]
    torch.save(saved, train.WORK / "decoder.pt")
    with pytest.raises(ValueError, match=r"language_model\.norm\.weight"):
        train.train_projector(until=1)


def test_the_published_model_loads_and_is_scored(small, tmp_path):
    """From the first step to the accuracy benchmark: the files that stand at a repo's root, beside its code."""
    small()
    for stage in train.STAGES.values():
        stage(until=3)
    train.keep()
    weight = train.stopped_at("settle")["modules"]["model.model.language_model.layers.3.mlp.up_proj.weight"]
    repo = tmp_path / "repo"
    repo.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copyfile(file, repo / file.name)
    train.write_repo(repo)
    model, processor, about = accuracy.load(repo)
    torch.testing.assert_close(model.model.language_model.layers[3].mlp.up_proj.weight, weight, atol=1e-6, rtol=0.01)
    assert about["hardware"] and about["dtype"] == "float32"

    questions = collect_questions(1)
    for configuration, num_kept in (
        (Configuration("none", 0), None),
        (Configuration("vlm_pruner", 0.889), 64),
        (Configuration("random", 0.667), 192),
        (Configuration("vlm_pruner", 0.889, {"pruning_layer": 1}, blind=True), 64),
    ):
        result = evaluate(model, processor, questions, configuration, batch_size=4)
        assert {kind: len(outcome) for kind, outcome in result["right"].items()} == dict.fromkeys(QUESTION_TYPES, 1)
        assert (result.get("num_visual"), result.get("num_kept")) == (num_kept and 576, num_kept)
        assert (model.config.pruning_method, model.config.pruning_layer) == ("vlm_pruner", 2)
    with pytest.raises(RuntimeError, match="only 0 of 7 pictures were pruned"):
        evaluate(model, processor, questions, Configuration("none", 0.5), batch_size=4)


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
    packed = train.pack(scene, ask(scene), patch_labels(scene), shown, turns=False)
    batch = train.collate([packed]) | {"shown": torch.from_numpy(shown)[None]}
    batch["positions_2d"] = torch.arange(36)[None]
    model = build_model(tokenizer).eval()
    visual, num_shown = torch.randn(1, 36, 192), int(shown.sum())
    losses = []
    with torch.no_grad():
        _, numbers = train.answer_loss(model, torch.nn.Linear(192, 4), visual, batch)
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
    assert numbers["answers"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert sum(numbers[kind][1] for kind in QUESTION_TYPES if kind in numbers) == len(ask(scene))


@pytest.mark.parametrize("turns", [False, True])
def test_the_decoder_is_taught_to_look_where_the_answer_is(turns):
    """At each step of an answer: patches that say what comes next, named by what the scene's layout says is there."""
    tokenizer, seen = train.tokenizer(), set()
    for seed in range(60):
        scene = make_scene("train", seed)
        questions, labels = ask(scene), patch_labels(scene)
        shown = np.random.RandomState(seed).random_sample(576) < 0.7
        packed = train.pack(scene, ask(scene), labels, shown, turns)
        things = [*scene.shapes, *scene.signs]
        for at, first, second in packed["pointers"]:
            question = questions[packed["question"][at]]
            target = tokenizer.decode([packed["targets"][at]])
            for number, places in enumerate((first, second)):
                if places == [0]:
                    continue
                rows, columns = np.divmod(np.array(packed["positions"])[places] - len(train.tokens_of("<s>USER: ")), 24)
                middle = set(zip((14 * columns + 7).tolist(), (14 * rows + 7).tolist(), strict=True))
                over = [
                    thing
                    for thing in things
                    if all(
                        thing.box[0] - 9 <= x <= thing.box[2] + 9 and thing.box[1] - 9 <= y <= thing.box[3] + 9
                        for x, y in middle
                    )
                ]
                assert len(over) == 1 or question.kind == "existence"
                if question.kind == "existence":
                    assert question.answer == "yes"
                elif question.kind == "relation":
                    words = question.text.rstrip("?").split()
                    assert [over[0].color, over[0].kind] == (words[2:4], words[-2:])[number]
                elif question.kind == "color":
                    assert over[0].color == question.answer == target.strip()
                elif question.kind == "shape":
                    assert over[0].kind == question.answer == target.strip()
                else:
                    letter = labels["letter"].ravel()[24 * rows + columns]
                    place = labels["place"].ravel()[24 * rows + columns]
                    assert over[0].text == question.answer and len(set(place)) == 1
                    assert {LETTERS[index - 1] for index in letter} == {question.answer[place[0] - 1]}
                    assert target in (" ", question.answer[place[0] - 1])
                seen.add((question.kind, number, target == " "))
    assert {kind for kind, *_ in seen} == set(QUESTION_TYPES) - {"count"}


def test_attention_taught_is_the_attention_of_the_layer():
    scene = make_scene("train", 1, 84)
    batch = train.collate([train.pack(scene, ask(scene), patch_labels(scene), np.ones(36, dtype=bool), turns=False)])
    model = build_model(train.tokenizer()).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        embeds = torch.randn(*batch["ids"].shape, 192)
        length = embeds.shape[1]
        sees = torch.ones(1, length, length, dtype=torch.bool).tril()
        mask = torch.zeros(1, 1, length, length).masked_fill(~sees[:, None], torch.finfo(torch.float32).min)
        output = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=batch["positions"],
            output_attentions=True,
            output_hidden_states=True,
        )
        loss, mean = train.pointer_loss(model, output.hidden_states[train.POINTING_LAYER], sees, batch)
    attention = output.attentions[train.POINTING_LAYER][0, :2]
    given = torch.stack(
        [attention[:, at].mul(wanted).sum(1) for (_, at), wanted in zip(batch["pointing"], batch["pointed"], strict=True)]
    )
    assert mean == pytest.approx(given.mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(-given.log().mean().item(), rel=1e-4)


def test_a_system_message_is_no_turn_of_the_assistant():
    """It was written as an answer that had ended. Other roles are refused."""
    processor = train.build_processor(train.tokenizer())
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        text = processor.apply_chat_template([{"role": "system", "content": content}, user], add_generation_prompt=True)
        assert text == "<s>Be brief. USER: <image>\nWhat? ASSISTANT:"
    with pytest.raises(Exception, match="must be system, user or assistant, got tool"):
        processor.apply_chat_template([{"role": "tool", "content": "3"}])
    assert (ROOT / "chat_template.jinja").read_text() == processor.chat_template


def test_turns_are_the_chat_template():
    processor = train.build_processor(train.tokenizer())
    scene = make_scene("train", 2, 84)
    messages = []
    for number, question in enumerate(ask(scene)):
        image = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    expected = train.tokens_of(processor.apply_chat_template(messages))
    labels = {name: label[:1, :1] for name, label in patch_labels(scene).items()}
    packed = train.pack(scene, ask(scene), labels, np.ones(1, dtype=bool), turns=True)
    assert tuple(packed["ids"]) == expected
    assert packed["positions"] == list(range(len(expected)))
