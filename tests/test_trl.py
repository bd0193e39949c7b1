"""TRL's trainers that compare a model with a reference model, and what they do with padded rows."""

import copy
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from families import FAMILIES, load_processor, load_pruned, make_inputs, picture, small_checkpoint

from vlmpruner import pruned_model


pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.once
FAMILY = FAMILIES["llava"]
TEXTS = ("What is it?", "What do you see in this one here, please?")


@pytest.fixture(autouse=True)
def state_of_accelerate():
    """One for all of a process, which keeps the options of whoever came first."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A repo with the code, that is pruned at 0.889."""
    folder = tmp_path_factory.mktemp("trl")
    load_pruned(FAMILY).save_pretrained(folder / "repo")
    load_processor(FAMILY).save_pretrained(folder / "repo")
    return folder / "repo"


@pytest.fixture
def told(monkeypatch):
    messages = []
    monkeypatch.setattr(pruned_model.logger, "warning", messages.append)
    monkeypatch.setattr(pruned_model.logger, "warning_once", lambda message: None)  # of the loss, test_tools.py has that
    return messages


def load(path, ratio):
    return FAMILY.pruned_class.from_pretrained(path, pruning_ratio=ratio)


def options(folder, **more):
    return more | {
        "output_dir": folder,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "trust_remote_code": True,
    }


def adapter():
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj"])


def logged(trainer, name):
    trainer.train()
    return float(next(entry[name] for entry in trainer.state.log_history if name in entry))


def dpo(model, folder, model_init_kwargs=None, **more):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Squares."), ("rejected", "No."))}
    rows = [
        {"images": [picture(number, 140, 112)], "prompt": [{"role": "user", "content": text}]} | answers
        for number, text in enumerate(TEXTS)
    ]
    more_options = {"max_length": None, "model_init_kwargs": model_init_kwargs, "per_device_train_batch_size": 2}
    arguments = DPOConfig(**options(folder, **more_options))
    return DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=load_processor(FAMILY), **more
    )


# What the page says of each: how the trainer gets its reference model, and whether that is pruned as the model in training.
WAYS = {
    "another ratio": (lambda repo: {"model": load(repo, 0.5)}, False),
    "another ratio for both": (lambda repo: {"model": load(repo, 0.5), "model_init_kwargs": {"pruning_ratio": 0.5}}, True),
    "unpruned checkpoint": (lambda repo: {"model": load(small_checkpoint(FAMILY), 0.889)}, False),
    "adapter": (lambda repo: {"model": load(small_checkpoint(FAMILY), 0.889), "peft_config": adapter()}, True),
    "given": (lambda repo: {"model": load(repo, 0.5), "ref_model": load(repo, 0.5)}, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_reference_of_dpo_is_pruned_as_the_model_or_it_is_told(repo, told, tmp_path, way):
    """Before the first step the two are one model: then the loss is log 2."""
    make, is_alike = WAYS[way]
    trainer = dpo(folder=tmp_path, **make(repo))
    assert (abs(logged(trainer, "loss") - math.log(2)) < 1e-5) == is_alike
    assert bool(told) != is_alike
    for message in told:
        path = trainer.model.config.name_or_path
        assert "pruning_ratio=" in message and f"Another from {path} is " in message and "See docs/training.md" in message


def test_saved_model_is_its_own_reference(repo, told, tmp_path):
    load(small_checkpoint(FAMILY), 0.5).save_pretrained(tmp_path / "half")
    trainer = dpo(FAMILY.pruned_class.from_pretrained(tmp_path / "half"), tmp_path)
    assert trainer.ref_model.config.pruning_ratio == 0.5
    assert logged(trainer, "loss") == pytest.approx(math.log(2), abs=1e-5) and not told


@pytest.mark.parametrize(("init", "is_alike"), [(None, False), ({"pruning_ratio": 0.5}, True)])
def test_reference_of_grpo_is_pruned_as_the_model_or_it_is_told(repo, told, tmp_path, init, is_alike):
    """It takes no reference model: `model_init_kwargs` are the reference's, whatever TRL says of them."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"image": picture(number, 140, 112), "prompt": [{"role": "user", "content": TEXTS[number]}]} for number in (0, 1)]
    sizes = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 3}
    trainer = GRPOTrainer(
        load(repo, 0.5),
        reward_funcs=lambda completions, **rest: [float(number) for number in range(len(completions))],
        args=GRPOConfig(**options(tmp_path, beta=0.1, model_init_kwargs=init, **sizes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_processor(FAMILY),
    )
    assert (abs(logged(trainer, "kl")) < 1e-6) == is_alike
    assert bool(told) != is_alike


def test_tags_of_others_look_for_no_reference(repo, told):
    half, whole = load(repo, 0.5), load(repo, 0.889)
    for tags in ("mine", ["trl", "sft"]):
        half.add_model_tags(tags)
    assert not told and half.model_tags == ["mine", "trl", "sft"]
    half.add_model_tags("dpo")
    assert len(told) == 1 and "pruning_ratio=0.889" in told[0]
    del whole
    half.add_model_tags("dpo")
    assert len(told) == 1


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
def test_scores_of_left_padded_prompts_equal_single_rows(name):
    """As TRL scores: prompts padded at the left, completions at the right, and no `position_ids`. The model keeps for that what
    it kept when it answered, and tells it of TRL's outputs too."""
    from trl.trainer.utils import add_fused_lm_head

    family = FAMILIES[name]
    model = copy.deepcopy(load_pruned(family))
    add_fused_lm_head(model)
    answers = [[9, 10, 11], [12, 13]]

    def scores(texts, answers):
        inputs = dict(make_inputs(family, [([picture(number)], text) for number, text in texts]))
        longest = max(map(len, answers))
        ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
        is_answer = torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers])
        new = {"input_ids": ids, "attention_mask": is_answer, "mm_token_type_ids": torch.zeros_like(ids)}
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids.masked_fill(is_answer == 0, -100)], dim=1)
        inputs |= {key: torch.cat([inputs[key], new[key]], dim=1) for key in new if key in inputs}
        with torch.no_grad():
            outputs = model(**inputs, labels=labels, fused_lm_head=True)
        kept = [(image.row, image.order.tolist()) for image in model.get_pruning_record(outputs)]
        return outputs.log_probs[:, -longest:], kept

    batch, kept = scores(list(enumerate(TEXTS)), answers)
    for row, text in enumerate(TEXTS):
        alone, kept_alone = scores([(row, text)], [answers[row]])
        torch.testing.assert_close(batch[row : row + 1, : alone.shape[1]], alone, rtol=0, atol=1e-4)
        assert [order for image_row, order in kept if image_row == row] == [order for _, order in kept_alone]
        inputs = make_inputs(family, [([picture(row)], text)])
        answered = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
        assert [image.order.tolist() for image in model.get_pruning_record(answered)] == [order for _, order in kept_alone]
