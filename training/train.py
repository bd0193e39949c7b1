"""Train the small model on two CPU cores: `python -m training.train STAGE`, or all stages after another without one.

tower    The vision tower alone, supervised per patch with what the generator knows, on crops around writing and shapes.
decoder  The decoder alone, fed with embeddings of the true patch labels, from small grids with few objects to whole scenes.
join     Tower, projector and decoder together on pictures; the losses are the answers' and, fading out, the patches'.
publish  Write the result to the root of the repo.

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
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from export import export_model

from .model import GRID, build_model, build_processor, build_tokenizer
from .muon import Muon
from .scenes import LABELS, PATCH, Scene, ask, draw, make_scene, patch_labels


HERE = Path(__file__).resolve().parent
WORK, LOG = HERE / "work", HERE / "log.jsonl"
SEED = 0
WIDTH = 192

# Crops of the tower stage: until which step, crop side in patches, crops a scene, scenes a step.
TOWER_LEVELS = ((2900, 6, 8, 8), (3900, 12, 4, 5), (4300, 24, 1, 4))
# Levels of the decoder stage: until which step, side in patches, shapes, signs, scenes a step.
DECODER_LEVELS = (
    (1000, 8, (1, 2), (0, 1), 16),
    (1300, 12, (1, 4), (0, 1), 12),
    (2300, 16, (2, 5), (1, 2), 8),
    (2700, 24, (2, 6), (1, 3), 4),
)
JOIN_STEPS = 1500
JOIN_SCENES = 8  # a step
PROJECTOR_STEPS = 150  # of the join stage, in which the projector alone is fitted
STEPS = {"tower": TOWER_LEVELS[-1][0], "decoder": DECODER_LEVELS[-1][0], "join": JOIN_STEPS}
LEARNING_RATE = {"tower": 5e-4, "decoder": 6e-4, "join": 6e-4}
DECAY = {"tower": 0.1, "decoder": 0.3, "join": 0.6}  # part of the steps over which the rate goes down
IGNORE = -100


def scene_seed(stage: str, step: int, number: int) -> int:
    return {"tower": 0, "decoder": 1, "join": 2}[stage] * 10**9 + step * 100 + number


def level_at(levels: tuple, step: int) -> tuple:
    return next((level for level in levels if step < level[0]), levels[-1])


class TowerBatches(Dataset):
    """Step to crops: pixels [crops, side, side, 3] uint8, places of the patches in the grid, labels of the patches."""

    def __len__(self):
        return STEPS["tower"]

    def __getitem__(self, step: int) -> dict:
        _, side, per_scene, scenes = level_at(TOWER_LEVELS, step)
        rng = random.Random(f"crops {step}")
        crops = []
        for number in range(scenes):
            scene = make_scene("train", scene_seed("tower", step, number), num_shapes=(3, 8), num_signs=(2, 4))
            crops += self._crops(rng, scene, side, per_scene)
        return {name: torch.from_numpy(np.stack([crop[name] for crop in crops])) for name in crops[0]}

    def _crops(self, rng: random.Random, scene: Scene, side: int, count: int):
        pixels, labels = np.asarray(draw(scene)), patch_labels(scene)
        boxes = [box for sign in scene.signs for box in sign.letters]
        for _ in range(count):
            pool = boxes if boxes and rng.random() < 0.75 else [shape.box for shape in scene.shapes] or boxes
            box = rng.choice(pool)
            corner = []
            for low, high in ((box[1], box[3]), (box[0], box[2])):
                start = (low + high) // 2 // PATCH - side // 2 + rng.randint(-side // 4, side // 4)
                corner.append(min(max(start, 0), GRID - side))
            row, column = corner
            part = slice(row, row + side), slice(column, column + side)
            crop = {name: label[part].copy() for name, label in labels.items()}
            for sign in scene.signs:  # a letter's place in its sign can not be seen where the sign is cut
                left, top, right, bottom = (edge / PATCH for edge in sign.box)
                if left < column or top < row or right > column + side or bottom > row + side:
                    down = slice(max(0, int(top - row)), max(0, int(bottom - row) + 1))
                    across = slice(max(0, int(left - column)), max(0, int(right - column) + 1))
                    for name in ("place", "last"):
                        crop[name][down, across] = IGNORE
            rows, columns = np.mgrid[part]
            yield crop | {
                "pixels": pixels[row * PATCH : (row + side) * PATCH, column * PATCH : (column + side) * PATCH],
                "positions": (rows * GRID + columns).reshape(-1),
            }


@lru_cache(maxsize=1)
def tokenizer():
    return build_tokenizer()


@lru_cache(maxsize=100_000)
def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


def pack(scene: Scene, num_visual: int, turns: bool) -> dict:
    """All questions of a scene in one sequence.

    As a chat of several turns, or (`turns` False) as branches: every question follows the picture, in position and in what it
    may attend to, as if it were the only one.

    Returns:
        ids, positions, targets (IGNORE where no answer is predicted), segment (0 for what all see), question (number, -1 if
        none): lists of one length; kinds: of the questions.
    """
    image = tokens_of("<image>")[0]
    ids = [*tokens_of("<s>"), *tokens_of("USER: "), *[image] * num_visual]
    prefix = len(ids)
    segment, question, answers, positions = [0] * prefix, [-1] * prefix, [False] * prefix, list(range(prefix))
    questions = ask(scene)
    for number, item in enumerate(questions):
        head = "USER: " if turns and number else "\n"
        prompt, answer = tokens_of(f"{head}{item.text} ASSISTANT:"), (*tokens_of(f" {item.answer}"), *tokens_of("</s>"))
        start = len(ids) if turns else prefix
        positions += range(start, start + len(prompt) + len(answer))
        ids += [*prompt, *answer]
        segment += [0 if turns else number + 1] * (len(prompt) + len(answer))
        question += [-1] * len(prompt) + [number] * len(answer)
        answers += [False] * len(prompt) + [True] * len(answer)
    targets = [token if said else IGNORE for token, said in zip([*ids[1:], 0], [*answers[1:], False], strict=True)]
    return {
        "ids": ids,
        "positions": positions,
        "targets": targets,
        "segment": segment,
        "question": [*question[1:], -1],
        "kinds": [item.kind for item in questions],
    }


def collate(packed: list[dict]) -> dict:
    length = max(len(item["ids"]) for item in packed)
    fill = {"ids": 0, "positions": 0, "targets": IGNORE, "segment": -1, "question": -1}
    batch = {
        name: torch.tensor([item[name] + [value] * (length - len(item[name])) for item in packed])
        for name, value in fill.items()
    }
    return batch | {"kinds": [item["kinds"] for item in packed]}


class AnswerBatches(Dataset):
    """Step to packed questions and answers with patch labels, and in the join stage the pictures."""

    def __init__(self, stage: str):
        self.stage = stage

    def __len__(self):
        return STEPS[self.stage]

    def __getitem__(self, step: int) -> dict:
        if self.stage == "decoder":
            _, side, shapes, signs, count = level_at(DECODER_LEVELS, step)
        else:
            side, shapes, signs, count = GRID, (2, 6), (1, 3), JOIN_SCENES
        scenes = [
            make_scene("train", scene_seed(self.stage, step, number), side * PATCH, shapes, signs) for number in range(count)
        ]
        batch = collate([pack(scene, side * side, turns=step % 5 == 4) for scene in scenes])
        labels = [patch_labels(scene) for scene in scenes]
        batch |= {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in LABELS}
        # Small grids stand anywhere in the large one, so that every position is learned.
        rng = np.random.RandomState(step)
        corners = rng.randint(0, GRID - side + 1, size=(count, 2))
        grid = np.arange(side)
        places = (corners[:, :1, None] + grid[:, None]) * GRID + corners[:, 1:, None] + grid
        batch["positions_2d"] = torch.from_numpy(places.reshape(count, -1))
        if self.stage == "join":
            batch["pixels"] = torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))
        return batch


class PatchEmbedding(nn.Module):
    """What a perfect tower would say: the sum of embeddings of a patch's labels and of its row and column."""

    def __init__(self):
        super().__init__()
        sizes = LABELS | {"row": GRID, "column": GRID}
        self.tables = nn.ModuleDict({name: nn.Embedding(size, WIDTH) for name, size in sizes.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, labels: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        known = {name: labels[name].flatten(1) for name in LABELS}
        known |= {"row": positions // GRID, "column": positions % GRID}
        return sum(table(known[name]) for name, table in self.tables.items())


class PatchHeads(nn.Module):
    """Linear readers of the labels, used in training only."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in LABELS.items()})

    def losses(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total, right = features.new_zeros(()), {}
        for name, head in self.heads.items():
            logits, target = head(features).flatten(0, 1), labels[name].flatten()
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


def answer_loss(model: nn.Module, visual: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of the answers, mean over their tokens, and for each question type how many are right as a whole."""
    embeds = model.get_input_embeddings()(batch["ids"])
    image = batch["ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(image[..., None], visual)
    segment = batch["segment"]
    length = segment.shape[1]
    sees = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    sees &= torch.ones(length, length, dtype=torch.bool).tril()
    states = model.model.language_model(
        inputs_embeds=embeds, attention_mask=sees[:, None], position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    said = batch["targets"] != IGNORE
    logits, target = model.lm_head(states[said]), batch["targets"][said]
    loss = F.cross_entropy(logits, target)
    wrong = logits.argmax(1) != target
    rows = said.nonzero()[:, 0]
    failed = set(zip(rows[wrong].tolist(), batch["question"][said][wrong].tolist(), strict=True))
    outcomes = defaultdict(list)
    for row, kinds in enumerate(batch["kinds"]):
        for number, kind in enumerate(kinds):
            outcomes[kind].append((row, number) not in failed)
    return loss, {kind: (sum(found), len(found)) for kind, found in outcomes.items()}


class Trainer:
    """One stage: modules, optimiser, schedule, checkpoint, log."""

    def __init__(self, stage: str, modules: nn.ModuleDict):
        self.stage, self.modules, self.step, self.seconds = stage, modules, 0, 0.0
        inner = [weight for name, weight in modules.named_parameters() if weight.ndim == 2 and ".layers." in name]
        other = [weight for name, weight in modules.named_parameters() if weight.ndim != 2 or ".layers." not in name]
        self.optimizers = [
            # Orthogonalised updates, scaled to the size of AdamW's, take half as many steps here.
            Muon(inner, lr=LEARNING_RATE[stage]),
            torch.optim.AdamW(other, lr=LEARNING_RATE[stage], weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self.path = WORK / f"{stage}.pt"
        if self.path.exists():
            saved = torch.load(self.path)
            modules.load_state_dict(saved["modules"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
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
            num_workers=1,
            prefetch_factor=4,
            worker_init_fn=lambda _: torch.set_num_threads(1),
        )
        sums, start, losses = defaultdict(lambda: np.zeros(2)), time.time(), []
        for batch in loader:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate()
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
    modules = nn.ModuleDict({"model": model, "patches": PatchEmbedding()})

    def loss_of(batch, step):
        return answer_loss(model, modules["patches"](batch, batch["positions_2d"]), batch)

    return Trainer("decoder", modules).run(AnswerBatches("decoder"), loss_of, until=until)


def train_join(until: int | None = None):
    torch.manual_seed(SEED)
    model, heads, patches = build_model(tokenizer()), PatchHeads(), PatchEmbedding()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    modules = nn.ModuleDict({"model": model, "heads": heads})
    if not (WORK / "join.pt").exists():
        parts = torch.load(WORK / "tower.pt")["modules"]
        nn.ModuleDict({"tower": tower, "heads": heads}).load_state_dict(parts)
        parts = torch.load(WORK / "decoder.pt")["modules"]
        nn.ModuleDict({"model": model, "patches": patches}).load_state_dict(parts, strict=False)

    def loss_of(batch, step):
        fitting = step < PROJECTOR_STEPS  # the projector alone learns to say what the decoder was trained on
        with torch.set_grad_enabled(not fitting):
            features = tower_features(tower, batch["pixels"], batch["positions_2d"])
        visual = projector(features)
        if fitting:
            wanted = patches(batch, batch["positions_2d"]).detach()
            return (visual - wanted).square().mean() / wanted.var(), {}
        patch_loss, right = heads.losses(features, batch)
        loss, outcomes = answer_loss(model, visual, batch)
        share = 0.1 * max(0, 1 - step / JOIN_STEPS)
        return loss + share * patch_loss, {"answers": loss.item()} | right | outcomes

    if (WORK / "join.pt").exists():
        patches = None
    return Trainer("join", modules).run(AnswerBatches("join"), loss_of, until=until)


def publish(until: int | None = None):
    """Write the trained model to the root of the repo, in bfloat16, as export.py makes a pruned model repo."""
    model, modules = build_model(tokenizer()), torch.load(WORK / "join.pt")["modules"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in modules.items() if name.startswith("model.")})
    model.generation_config.update(do_sample=False, max_new_tokens=12)
    with tempfile.TemporaryDirectory() as folder:
        base, pruned = Path(folder) / "small-llava", Path(folder) / "pruned"
        model.to(torch.bfloat16).save_pretrained(base)
        build_processor(tokenizer()).save_pretrained(base)
        export_model(base, pruned)
        for file in pruned.iterdir():
            if file.suffix in (".json", ".jinja", ".safetensors"):
                shutil.copyfile(file, HERE.parent / file.name)


STAGES = {"tower": train_tower, "decoder": train_decoder, "join": train_join, "publish": publish}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES, help="one stage; all of them if not given")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--until", type=int, help="stop at this step")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for stage in [options.stage] if options.stage else STAGES:
        STAGES[stage](options.until)


if __name__ == "__main__":
    main()
