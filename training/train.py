"""Train the small model, on two CPU cores or a GPU: `python -m training.train STAGE`; without a stage, the first six.

tower    The vision tower alone, supervised per patch with what the generator knows, on crops around writing and shapes.
decoder  The decoder alone, fed with embeddings of the true patch labels, from small grids with few objects to whole scenes.
projector  The projector alone, to say what the tower sees in the decoder's embeddings of labels.
join     Tower, projector and decoder together on pictures; the losses are the answers' and the patches'.
settle   The same for a few steps, in half of which the decoder is shown all of the background, as it will be.
publish  Write the result to the root of the repo.
keep     Write the weights of the parts to training/checkpoints/, where a new clone goes on.

Every stage writes a checkpoint and goes on from it when started again; batches are a function of stage and step only, so a
run that was interrupted sees the same scenes. Lines of training/log.jsonl: stage, step, seconds, losses, accuracies.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from export import export_model

from .model import GRID, build_model, build_processor, build_tokenizer, position_waves
from .muon import Muon
from .scenes import (
    COLORS,
    LABELS,
    PATCH,
    SHAPES,
    Question,
    Scene,
    Shape,
    about_relation,
    about_sign,
    ask,
    coverage,
    draw,
    make_scene,
    patch_labels,
)


HERE = Path(__file__).resolve().parent
WORK, CHECKPOINTS, LOG = HERE / "work", HERE / "checkpoints", HERE / "log.jsonl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 0
WIDTH = 192

# Crops of the tower stage: until which step, rows and columns of patches, part around signs, crops a scene, scenes a step.
TOWER_LEVELS = (
    (2900, 6, 6, 0.75, 8, 8),
    (3900, 12, 12, 0.75, 4, 5),
    (4300, 24, 24, 0.75, 1, 4),
    (6000, 6, 20, 0.85, 3, 7),
    (6400, 12, 12, 0.5, 4, 5),
    (11600, 24, 24, 0.75, 1, 6),
)
SPARSE = 0.15  # part of the background's patches that the decoder is shown, where not all
# Levels of the decoder stage: until which step, side in patches, shapes, signs, scenes a step, part of the background.
DECODER_LEVELS = (
    (400, 8, (1, 2), (0, 2), 16, 1),
    (800, 12, (1, 4), (0, 2), 12, 1),
    (1200, 16, (2, 5), (1, 3), 8, 1),
    (3300, 24, (2, 6), (1, 3), 8, SPARSE),
)
JOIN_SCENES = 8  # a step, also of the projector stage
STEPS = {"tower": TOWER_LEVELS[-1][0], "decoder": DECODER_LEVELS[-1][0], "projector": 300, "join": 2000, "settle": 100}
LEARNING_RATE = {"tower": 1e-3, "decoder": 1e-3, "projector": 3e-3, "join": 2e-4, "settle": 5e-5}
DECAY = {
    "tower": 0.52,
    "decoder": 0.4,
    "projector": 0.7,
    "join": 0.9,
    "settle": 0.7,
}  # part of the steps over which the rate goes down
# Of the losses of answers by type, where not 1.
WEIGHTS = {"decoder": {"count": 3.0, "relation": 3.0}, "join": {"count": 2.0, "read": 3.0, "read_color": 3.0}}
WEIGHTS["settle"] = WEIGHTS["join"]
MORE_RELATIONS = 6  # questions about each scene in the decoder stage
EASY_UNTIL = 2200  # of the decoder stage: relations of two kinds
POINTING_LAYER, TEACHING = 3, 0.3  # whose first two heads are taught where to look, and the weight of those losses
IGNORE = -100


def scene_seed(stage: str, step: int, number: int) -> int:
    return list(STEPS).index(stage) * 10**9 + step * 100 + number


def level_at(levels: tuple, step: int) -> tuple:
    return next((level for level in levels if step < level[0]), levels[-1])


class TowerBatches(Dataset):
    """Step to crops: pixels [crops, height, width, 3] uint8, places of the patches in the grid, labels of the patches."""

    def __len__(self):
        return STEPS["tower"]

    def __getitem__(self, step: int) -> dict:
        _, rows, columns, around_signs, per_scene, scenes = level_at(TOWER_LEVELS, step)
        rng, crops = random.Random(f"crops {step}"), []
        for number in range(scenes):
            scene = make_scene("train", scene_seed("tower", step, number), num_shapes=(3, 8), num_signs=(2, 4))
            pixels, labels = np.asarray(draw(scene)), patch_labels(scene)
            for _ in range(per_scene):
                things = scene.signs if rng.random() < around_signs else scene.shapes
                box = rng.choice(things or scene.signs or scene.shapes).box
                row, column = _start(rng, box[1::2], rows), _start(rng, box[::2], columns)
                crops.append(_crop(scene, pixels, labels, slice(row, row + rows), slice(column, column + columns)))
        return {name: torch.from_numpy(np.stack([crop[name] for crop in crops])) for name in crops[0]}


def _start(rng: random.Random, ends: tuple[int, int], patches: int) -> int:
    """First patch of a crop along one axis: one that holds all between the ends, pixels, where it is long enough."""
    first, last = max(0, -(-ends[1] // PATCH) - patches), min(GRID - patches, ends[0] // PATCH)
    if first > last:  # longer than the crop: any part of it
        first, last = sorted(min(max(end, 0), GRID - patches) for end in (last, first))
    return rng.randint(first, last)


def _crop(scene: Scene, pixels: np.ndarray, labels: dict, rows: slice, columns: slice) -> dict:
    """A part of a picture with its labels. Where a sign is cut its letters' places can not be seen, where a shape is cut its
    middle: ignored."""
    crop = {name: label.copy() for name, label in labels.items()}
    for thing in (*scene.signs, *scene.shapes):
        left, top, right, bottom = (edge / PATCH for edge in thing.box)
        if left < columns.start or top < rows.start or right > columns.stop or bottom > rows.stop:
            for name in ("middle",) if isinstance(thing, Shape) else ("place", "last"):
                crop[name][int(top) : int(bottom) + 1, int(left) : int(right) + 1] = IGNORE
    crop = {name: label[rows, columns] for name, label in crop.items()}
    y, x = np.mgrid[rows, columns]
    part = pixels[rows.start * PATCH : rows.stop * PATCH, columns.start * PATCH : columns.stop * PATCH]
    return crop | {"pixels": part, "positions": (y * GRID + x).reshape(-1)}


@lru_cache(maxsize=1)
def tokenizer():
    return build_tokenizer()


@lru_cache(maxsize=100_000)
def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


def evidence(scene: Scene, labels: dict[str, np.ndarray], question: Question) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where the answer is seen: for each token of the answer two sets of patches, [patches] bool.

    The two differ for relations only, one for each object; both are empty where what is asked about does not exist. The list
    ends where no place shows what to say next (end of the answer, counts).
    """
    words = question.text.rstrip("?").split()
    label = {name: value.ravel() for name, value in labels.items()}

    def objects(color: str | None, kind: str | None) -> np.ndarray:
        found = label["shape"] == 1 + SHAPES.index(kind) if kind else label["shape"] > 0
        return found & (label["color"] == 1 + list(COLORS).index(color)) if color else found

    if question.kind in ("read", "read_color"):
        sign = next(sign for sign in scene.signs if question.kind == "read" or sign.color == words[-2])
        inside = (coverage(sign.box, scene.size // PATCH) > 0).ravel()
        letters = [inside & (label["place"] == place + 1) for place in range(len(sign.text))]
        return [(letter, letter) for letter in (letters[0], *letters)]  # a blank goes before the first letter
    if question.kind == "color":
        return [(objects(None, words[-1]),) * 2]
    if question.kind == "shape":
        return [(objects(words[-2], None),) * 2]
    if question.kind == "existence":
        return [(objects(*words[-2:]),) * 2]
    if question.kind == "relation":
        return [(objects(*words[2:4]), objects(*words[-2:]))]
    return []


def questions_of(scene: Scene, stage: str, step: int) -> list[Question]:
    """What training asks about a scene: `ask`, the signs that it leaves out, and in the decoder stage more about relations.

    That stage leaves out "right of" and "below" at first: with all four words, no linear function of the places is better than
    chance.
    """
    rng, questions = random.Random(f"{scene.seed} {scene.size} more"), ask(scene)
    questions += [about_sign(sign) for sign in scene.signs[2:]]
    if stage != "decoder":
        return questions
    questions += [question for _ in range(MORE_RELATIONS) for question in about_relation(rng, scene)]
    hard = {"right", "below"} if step < EASY_UNTIL else set()
    return [question for question in dict.fromkeys(questions) if not hard & set(question.text.split())]


def pack(
    scene: Scene,
    questions: list[Question],
    labels: dict[str, np.ndarray],
    shown: np.ndarray,
    turns: bool,
    weights: dict[str, float] | None = None,
) -> dict:
    """Questions about a scene in one sequence.

    As a chat of several turns, or (`turns` False) as branches: every question follows the picture, in position and in what it
    may attend to, as if it were the only one.

    Args:
        scene: what is asked about.
        questions: and their answers.
        labels: of its patches.
        shown: [patches] bool, which patches the sequence holds; the others leave a gap in the positions, as pruned tokens do.
        turns: one chat, in place of branches.
        weights: of the losses of answers by type, 1 for others.

    Returns:
        ids, positions, targets (IGNORE where no answer is predicted), segment (0 for what all see), question (number, -1 if
        none), weight (of the loss): lists of one length; kinds: of the questions; pointers: (place in the sequence, two lists
        of the places of patches that show what to say next, or of <s> where there is none).
    """
    image = tokens_of("<image>")[0]
    start = [*tokens_of("<s>"), *tokens_of("USER: ")]
    places = shown.nonzero()[0]
    ids = [*start, *[image] * len(places)]
    positions = [*range(len(start)), *(len(start) + places).tolist()]
    segment, question, answers, weight = [0] * len(ids), [-1] * len(ids), [False] * len(ids), [0.0] * len(ids)
    end_of_picture = end = len(start) + len(shown)
    pointers = []
    place_of = dict(zip(places.tolist(), range(len(start), len(ids)), strict=True))
    for number, item in enumerate(questions):
        head = "USER: " if turns and number else "\n"
        prompt, answer = tokens_of(f"{head}{item.text} ASSISTANT:"), (*tokens_of(f" {item.answer}"), *tokens_of("</s>"))
        begin = end if turns else end_of_picture
        end = begin + len(prompt) + len(answer)
        positions += range(begin, end)
        for offset, sets in enumerate(evidence(scene, labels, item)):
            seen = [[place_of[patch] for patch in patches.nonzero()[0].tolist() if patch in place_of] for patches in sets]
            pointers.append((len(ids) + len(prompt) - 1 + offset, *(there or [0] for there in seen)))
        ids += [*prompt, *answer]
        segment += [0 if turns else number + 1] * (len(prompt) + len(answer))
        question += [-1] * len(prompt) + [number] * len(answer)
        answers += [False] * len(prompt) + [True] * len(answer)
        weight += [(weights or {}).get(item.kind, 1.0)] * (len(prompt) + len(answer))
    targets = [token if said else IGNORE for token, said in zip([*ids[1:], 0], [*answers[1:], False], strict=True)]
    return {
        "ids": ids,
        "positions": positions,
        "targets": targets,
        "segment": segment,
        "question": [*question[1:], -1],
        "weight": weight,
        "kinds": [item.kind for item in questions],
        "pointers": pointers,
    }


def collate(packed: list[dict]) -> dict:
    length = max(len(item["ids"]) for item in packed)
    fill = {"ids": 0, "positions": 0, "targets": IGNORE, "segment": -1, "question": -1, "weight": 0.0}
    batch = {
        name: torch.tensor([item[name] + [value] * (length - len(item[name])) for item in packed])
        for name, value in fill.items()
    }
    pointers = [(row, *pointer) for row, item in enumerate(packed) for pointer in item["pointers"]]
    batch["pointing"] = torch.tensor([pointer[:2] for pointer in pointers]).view(-1, 2)
    batch["pointed"] = torch.zeros(len(pointers), 2, length, dtype=torch.bool)
    for number, (*_, first, second) in enumerate(pointers):
        batch["pointed"][number, 0, first] = batch["pointed"][number, 1, second] = True
    return batch | {"kinds": [item["kinds"] for item in packed]}


class AnswerBatches(Dataset):
    """Step to packed questions and answers with patch labels, and where the tower is needed the pictures."""

    def __init__(self, stage: str):
        self.stage = stage

    def __len__(self):
        return STEPS[self.stage]

    def __getitem__(self, step: int) -> dict:
        if self.stage == "decoder":
            _, side, shapes, signs, count, background = level_at(DECODER_LEVELS, step)
        else:
            side, shapes, signs, count = GRID, (2, 6), (1, 3), JOIN_SCENES
            background = 1 if self.stage == "settle" and step % 2 else SPARSE
        scenes = [
            make_scene("train", scene_seed(self.stage, step, number), side * PATCH, shapes, signs) for number in range(count)
        ]
        rng = np.random.RandomState(step)
        labels = [patch_labels(scene) for scene in scenes]
        # Most of a picture is background, which says nothing and costs as much as the rest.
        things = [((label["color"] > 0) | (label["letter"] > 0)).ravel() for label in labels]
        shown = [thing | (rng.random_sample(side * side) < background) for thing in things]
        asked = [questions_of(scene, self.stage, step) for scene in scenes]
        parts, weights = zip(scenes, asked, labels, shown, strict=True), WEIGHTS.get(self.stage)
        batch = collate([pack(*each, turns=step % 5 == 4, weights=weights) for each in parts])
        batch["shown"] = torch.from_numpy(np.stack(shown))
        batch |= {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in LABELS}
        # Small grids stand anywhere in the large one, so that every position is learned.
        corners = rng.randint(0, GRID - side + 1, size=(count, 2))
        grid = np.arange(side)
        places = (corners[:, :1, None] + grid[:, None]) * GRID + corners[:, 1:, None] + grid
        batch["positions_2d"] = torch.from_numpy(places.reshape(count, -1))
        if self.stage != "decoder":
            batch["pixels"] = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))
        return batch


class PatchEmbedding(nn.Module):
    """What a perfect tower would say: the sum of embeddings of a patch's labels and of its place.

    They start large beside what the first layers add, so that what a patch shows is not lost among it.
    """

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(size, WIDTH) for name, size in LABELS.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.2)
        self.positions = nn.Embedding.from_pretrained(position_waves(GRID, WIDTH, 0.3), freeze=False)

    def forward(self, labels: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        return self.positions(positions) + sum(table(labels[name].flatten(1)) for name, table in self.tables.items())


class PatchHeads(nn.Module):
    """Linear readers of the labels, used in training only."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in LABELS.items()})

    def losses(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total, right = features.new_zeros(()), {}
        for name, head in self.heads.items():
            logits, target = head(features).flatten(0, 1), labels[name].flatten()
            if (target == IGNORE).all():
                continue
            weight = logits.new_ones(logits.shape[1])
            weight[0] = 0.1
            total = total + F.cross_entropy(logits, target, weight, ignore_index=IGNORE)
            shown = target > 0
            right[name] = (logits.argmax(1)[shown] == target[shown]).float().mean().item() if shown.any() else float("nan")
        return total, right


def tower_features(tower: nn.Module, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[crops, patches, width] of crops whose patches have the given places in the grid; the tower's own for whole pictures."""
    count, height, width, _ = pixels.shape
    values = (pixels.float() / 255 - 0.5) / 0.25
    rows, columns = height // PATCH, width // PATCH
    patches = values.view(count, rows, PATCH, columns, PATCH, 3).permute(0, 1, 3, 5, 2, 4).reshape(count, rows * columns, -1)
    parts = tower.embeddings
    hidden = F.linear(patches, parts.patch_embedding.weight.flatten(1)) + parts.position_embedding(positions + 1)
    first = (parts.class_embedding + parts.position_embedding.weight[0]).expand(count, 1, -1)
    hidden = tower.pre_layrnorm(torch.cat((first, hidden), dim=1))
    return tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 1:]


def pointer_loss(model: nn.Module, states: torch.Tensor, sees: torch.Tensor, batch: dict) -> tuple[torch.Tensor, float]:
    """Minus the logarithm of the attention that two heads give to the patches where the answer is seen, and its mean.

    Args:
        states: [pictures, tokens, width], what enters the layer of those heads.
        sees: [pictures, tokens, tokens] bool.
    """
    layer = model.model.language_model.layers[POINTING_LAYER]
    states = layer.input_layernorm(states)
    (rows, at), size = batch["pointing"].unbind(1), layer.self_attn.head_dim
    rope = model.model.language_model.rotary_emb(states, batch["positions"])
    query, key = (
        F.linear(states, projection.weight[: 2 * size]).unflatten(2, (2, size)).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rope)
    logits = torch.einsum("phd,phtd->pht", query[rows, :, at], key[rows]) * size**-0.5
    logits = logits.masked_fill(~sees[rows, at][:, None], float("-inf"))
    pointed = logits.log_softmax(-1).masked_fill(~batch["pointed"], float("-inf")).logsumexp(-1)
    return -pointed.mean(), pointed.exp().mean().item()


def place_loss(where: nn.Module, states: torch.Tensor, image: torch.Tensor, batch: dict) -> torch.Tensor:
    """How badly `where` reads the centres of what is pointed at, as a part of the variance of places in a picture.

    Args:
        where: [width] to rows and columns of the two, as parts of the picture's height and width.
        states: [pictures, tokens, width], what leaves the layer of the pointing heads.
        image: [pictures, tokens] bool, which tokens are patches.
    """
    (rows, at), places = batch["pointing"].unbind(1), batch["positions_2d"][batch["shown"]]
    places = torch.stack((places // GRID, places % GRID), dim=1) / GRID
    places = states.new_zeros(*image.shape, 2).masked_scatter(image[..., None], places.to(states))
    centers = (batch["pointed"].to(states) @ places[rows]) / batch["pointed"].sum(-1, keepdim=True)
    known = (batch["pointed"] & image[rows][:, None]).any(-1).all(-1)
    error = where(F.layer_norm(states[rows, at], states.shape[-1:])).unflatten(1, (2, 2)) - centers
    return 12 * error[known].square().mean() if known.any() else error.sum() * 0


def answer_loss(
    model: nn.Module, where: nn.Module, visual: torch.Tensor, batch: dict
) -> tuple[torch.Tensor, dict[str, float | tuple[int, int]]]:
    """Cross-entropy of the answers, weighted mean over their tokens, and for each question type how many are right as a whole.

    Two heads in the middle of the decoder are taught where to look, which is what plain training finds last, and their layer to
    say where that is, which relations need.

    Args:
        where: reads places from states, see `place_loss`.
        visual: [pictures, patches, width], what the decoder reads.
    """
    embeds = model.get_input_embeddings()(batch["ids"])
    image = batch["ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(image[..., None], visual[batch["shown"]])
    segment = batch["segment"]
    length = segment.shape[1]
    sees = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    sees &= torch.ones(length, length, dtype=torch.bool, device=sees.device).tril()
    output = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=sees[:, None],
        position_ids=batch["positions"],
        use_cache=False,
        output_hidden_states=True,
    )
    states = output.last_hidden_state
    said = batch["targets"] != IGNORE
    logits, target = model.lm_head(states[said]), batch["targets"][said]
    losses, weight = F.cross_entropy(logits, target, reduction="none"), batch["weight"][said]
    pointing, pointed = pointer_loss(model, output.hidden_states[POINTING_LAYER], sees, batch)
    misplaced = place_loss(where, output.hidden_states[POINTING_LAYER + 1], image, batch)
    wrong = logits.argmax(1) != target
    rows = said.nonzero()[:, 0]
    failed = set(zip(rows[wrong].tolist(), batch["question"][said][wrong].tolist(), strict=True))
    outcomes = defaultdict(list)
    for row, kinds in enumerate(batch["kinds"]):
        for number, kind in enumerate(kinds):
            outcomes[kind].append((row, number) not in failed)
    numbers = {"answers": losses.mean().item(), "pointed": pointed, "misplaced": misplaced.item()}
    numbers |= {kind: (sum(found), len(found)) for kind, found in outcomes.items()}
    return (losses * weight).sum() / weight.sum() + TEACHING * (pointing + misplaced), numbers


def stopped_at(stage: str) -> dict | None:
    """Where a stage stopped: its own checkpoint, else the one in the repo (weights alone, in bfloat16), else None."""
    own, kept = WORK / f"{stage}.pt", CHECKPOINTS / f"{stage}.safetensors"
    if own.exists():
        return torch.load(own, map_location=DEVICE)
    if not kept.exists():
        return None
    with safe_open(kept, "pt") as file:
        numbers = {name: float(value) for name, value in file.metadata().items()}
        modules = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a mapping
    return {"modules": modules, "step": int(numbers["step"]), "seconds": numbers["seconds"]}


def keep():
    """Write the weights of the stages' checkpoints to the repo, so that a later run goes on from there.

    All but those of the whole model, which stand at the root when they are published.
    """
    CHECKPOINTS.mkdir(exist_ok=True)
    for own in sorted(set(WORK.glob("*.pt")) - {WORK / "join.pt", WORK / "settle.pt"}):
        saved = torch.load(own, map_location="cpu")
        modules = {name: value.to(torch.bfloat16) for name, value in saved["modules"].items()}
        numbers = {"step": str(saved["step"]), "seconds": str(round(saved["seconds"]))}
        save_file(modules, CHECKPOINTS / f"{own.stem}.safetensors", metadata=numbers)


class Trainer:
    """One stage: modules, optimiser, schedule, checkpoint, log."""

    def __init__(self, stage: str, modules: nn.ModuleDict):
        self.stage, self.modules, self.step, self.seconds = stage, modules.to(DEVICE), 0, 0.0
        inner = [weight for name, weight in modules.named_parameters() if weight.ndim == 2 and ".layers." in name]
        other = [weight for name, weight in modules.named_parameters() if weight.ndim != 2 or ".layers." not in name]
        self.optimizers = [torch.optim.AdamW(other, lr=LEARNING_RATE[stage], weight_decay=0.0, betas=(0.9, 0.98))]
        if inner:
            self.optimizers.append(Muon(inner, lr=LEARNING_RATE[stage]))
        self.path = WORK / f"{stage}.pt"
        if saved := stopped_at(stage):
            modules.load_state_dict(saved["modules"])
            for optimizer, state in zip(self.optimizers, saved.get("optimizers", ()), strict=False):
                optimizer.load_state_dict(state)
            self.step, self.seconds = saved["step"], saved["seconds"]

    def rate(self) -> float:
        """Linear warm-up over 100 steps, constant, and a linear way down at the end."""
        left = (STEPS[self.stage] - self.step) / (STEPS[self.stage] * DECAY[self.stage])
        return LEARNING_RATE[self.stage] * min(1, (self.step + 1) / 100, max(left, 0.02))

    def run(self, batches: Dataset, loss_of, log_every: int = 50, save_every: int = 100, until: int | None = None):
        until = min(until or len(batches), len(batches))
        loader = DataLoader(
            torch.utils.data.Subset(batches, range(self.step, until)),
            batch_size=None,
            num_workers=max(1, os.cpu_count() // 2),
            prefetch_factor=4,
            worker_init_fn=lambda _: torch.set_num_threads(1),
        )
        sums, start, losses = defaultdict(lambda: np.zeros(2)), time.time(), []
        for batch in loader:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate()
            batch = {name: part.to(DEVICE) if torch.is_tensor(part) else part for name, part in batch.items()}
            loss, numbers = loss_of(batch, self.step)
            self.modules.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            losses.append(loss.item())
            for name, value in numbers.items():
                if value == value:  # NaN where a batch shows nothing of the kind
                    sums[name] += value if isinstance(value, tuple) else (value, 1)
            if self.step % log_every == 0 or self.step == until:
                line = {"stage": self.stage, "step": self.step, "seconds": round(self.seconds + time.time() - start)}
                line["loss"] = round(float(np.mean(losses[-log_every:])), 4)
                line |= {name: round(float(found / count), 3) for name, (found, count) in sorted(sums.items())}
                with LOG.open("a") as log:
                    log.write(json.dumps(line) + "\n")
                print(line, flush=True)
                sums.clear()
            if self.step % save_every == 0 or self.step == until:
                self.save(self.seconds + time.time() - start)
        self.seconds += time.time() - start
        return losses

    def save(self, seconds: float):
        WORK.mkdir(exist_ok=True)
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": seconds,
        }
        torch.save(state, self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)


def train_tower(until: int | None = None):
    torch.manual_seed(SEED)
    tower = build_model(tokenizer()).model.vision_tower
    modules = nn.ModuleDict({"tower": tower, "heads": PatchHeads()})

    def loss_of(batch, step):
        return modules["heads"].losses(tower_features(tower, batch["pixels"], batch["positions"]), batch)

    return Trainer("tower", modules).run(TowerBatches(), loss_of, until=until)


def train_decoder(until: int | None = None):
    torch.manual_seed(SEED)
    model = build_model(tokenizer())
    del model.model.vision_tower, model.model.multi_modal_projector
    modules = nn.ModuleDict({"model": model, "patches": PatchEmbedding(), "where": nn.Linear(WIDTH, 4)})

    def loss_of(batch, step):
        return answer_loss(model, modules["where"], modules["patches"](batch, batch["positions_2d"]), batch)

    return Trainer("decoder", modules).run(AnswerBatches("decoder"), loss_of, until=until)


def train_projector(until: int | None = None):
    torch.manual_seed(SEED)
    model, heads, patches = build_model(tokenizer()), PatchHeads(), PatchEmbedding()
    tower, projector = load_parts(model, heads, patches, nn.Linear(WIDTH, 4))

    def loss_of(batch, step):
        with torch.no_grad():
            features = tower_features(tower, batch["pixels"], batch["positions_2d"])[batch["shown"]]
            wanted = patches(batch, batch["positions_2d"])[batch["shown"]]
        return (projector(features) - wanted).square().mean() / wanted.var(), {}

    return Trainer("projector", nn.ModuleDict({"projector": projector})).run(AnswerBatches("projector"), loss_of, until=until)


def load_parts(model: nn.Module, *others: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What the stages tower and decoder learned, into the model, heads, patch embedding and reader of places.

    Returns: the model's tower and projector, on the device.
    """
    heads, patches, where = others
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    nn.ModuleDict({"tower": tower, "heads": heads}).load_state_dict(stopped_at("tower")["modules"])
    decoder = nn.ModuleDict({"model": model, "patches": patches, "where": where})
    missing, unknown = decoder.load_state_dict(stopped_at("decoder")["modules"], strict=False)
    known = ("model.model.vision_tower.", "model.model.multi_modal_projector.")
    if unknown or not all(name.startswith(known) for name in missing):
        raise ValueError(f"The decoder's checkpoint is of another model: it lacks {missing} and has {unknown}.")
    for module in (model, *others):
        module.to(DEVICE)
    return tower, projector


def train_join(until: int | None = None, stage: str = "join"):
    torch.manual_seed(SEED)
    model, heads, where = build_model(tokenizer()), PatchHeads(), nn.Linear(WIDTH, 4)
    modules = nn.ModuleDict({"model": model, "where": where, "heads": heads})
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    if stage == "settle" and stopped_at(stage) is None:
        modules.load_state_dict(stopped_at("join")["modules"])
    elif stopped_at(stage) is None:
        load_parts(model, heads, PatchEmbedding(), where)
        nn.ModuleDict({"projector": projector}).load_state_dict(stopped_at("projector")["modules"])

    def loss_of(batch, step):
        features = tower_features(tower, batch["pixels"], batch["positions_2d"])
        patch_loss, right = heads.losses(features, batch)
        loss, outcomes = answer_loss(model, where, projector(features), batch)
        return loss + 0.5 * patch_loss, {f"patch {name}": value for name, value in right.items()} | outcomes

    return Trainer(stage, modules).run(AnswerBatches(stage), loss_of, until=until)


def publish():
    """Write the trained model to the root of the repo, in bfloat16, as export.py makes a pruned model repo."""
    write_repo(HERE.parent)


def write_repo(folder: Path):
    """The files of the trained model, without the code."""
    model, modules = build_model(tokenizer()), stopped_at("settle")["modules"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in modules.items() if name.startswith("model.")})
    model.generation_config.update(do_sample=False, max_new_tokens=12)
    with tempfile.TemporaryDirectory() as made:
        base, pruned = Path(made) / "small-llava", Path(made) / "pruned"
        model.to(torch.bfloat16).save_pretrained(base)
        build_processor(tokenizer()).save_pretrained(base)
        export_model(base, pruned)
        for file in pruned.iterdir():
            if file.suffix in (".json", ".jinja", ".safetensors"):
                shutil.copyfile(file, folder / file.name)


STAGES = {"tower": train_tower, "decoder": train_decoder, "projector": train_projector, "join": train_join}
STAGES["settle"] = partial(train_join, stage="settle")
OTHERS = {"publish": publish, "keep": keep}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES | OTHERS, help="by default the first six, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--until", type=int, help="stop at this step")
    parser.add_argument("--from-scratch", action="store_true", help="do not start from training/checkpoints/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.from_scratch:
        global CHECKPOINTS
        CHECKPOINTS = WORK / "none"
    for stage in [options.stage] if options.stage else [*STAGES, "publish"]:
        if stage in STAGES:
            STAGES[stage](options.until)
        else:
            OTHERS[stage]()


if __name__ == "__main__":
    main()
