"""Synthetic scenes with questions and answers: coloured shapes and signs with writing on textured backgrounds.

A scene is a pure function of its split and seed. It is first a layout (what is where), which costs a fraction of a
millisecond and needs no drawing; `draw` makes the picture and `patch_labels` what every patch of the vision tower shows.

Splits are disjoint: each seeds its own stream, words are either for training or for testing, a number whose digits hash to
the test side is never drawn in training, and four combinations of colour and shape appear in test scenes only.

The hard splits are test scenes too: more and smaller shapes, small letters, several signs of one colour, and busy backgrounds,
half of them drawn textures and half photographs that scikit-image ships. The crowded ones are hard ones with more in them, and
smaller. `hard_development` and `crowded_development` are for choosing (presets, parameters), `hard_test` and `crowded_test` for
measuring what was chosen; the former share no words and no photographs with the latter.

Question types, after the benchmarks of the paper (arXiv 2512.02700): `read` and `read_color` (TextVQA, OCRBench), `existence`
(POPE), `color`, `shape` and `count` (MME), `relation` (GQA).
"""

import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont


PATCH = 14  # pixels
HARD_SPLITS = ("hard_development", "hard_test", "crowded_development", "crowded_test")
SPLITS = ("train", "validation", "test", *HARD_SPLITS)
QUESTION_TYPES = ("read", "read_color", "existence", "color", "shape", "count", "relation")

COLORS = {
    "red": (205, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 220, 45),
    "green": (35, 145, 55),
    "blue": (35, 75, 205),
    "purple": (130, 45, 160),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MAX_LETTERS = 6
TEST_COMBINATIONS = (("purple", "star"), ("green", "cross"), ("white", "triangle"), ("orange", "square"))
DARK_LETTERS_ON = ("yellow", "white", "orange")

_TRAIN_WORDS = """
ABLE ACID AGE AIR ALARM ALBUM APPLE ARM ART BABY BACK BAG BALL BAND BANK BAR BASE BATH BEACH BEAN BEAR BED BEEF BELL
BELT BIKE BIRD BLADE BLOCK BOAT BODY BOLT BOOK BOOT BOWL BOX BRAIN BREAD BRICK BUS BUSH CAB CAKE CALL CAMP CAP CAR CARD
CART CASH CAT CHAIR CHALK CHEF CHIN CITY CLAY CLUB COAL COAT CODE COIN COLD COOK CORN COW CRAB CREAM CROW CUP DANCE DATE
DAWN DEER DESK DIAL DISH DOG DOLL DOOR DRAW DRUM DUCK DUST EAR EAST EDGE EGG ENGINE EXIT EYE FACE FAN FARM FERRY FIELD
FILM FIRE FISH FLAG FLAT FLOOR FOG FOOD FOOT FORK FOX FROG FUEL GAME GATE GIFT GLASS GLUE GOAT GOLD GOLF GRASS GUIDE GYM
HALL HAND HAT HAWK HEAD HEAT HERO HILL HOME HOOK HORN HOTEL HOUR ICE INK INN IRON JAM JAR JAZZ JET JOB JOKE JUICE KEY
KICK KIND KING KITE KNEE KNIFE LAB LADY LAKE LAMP LAND LAW LEAF LEG LEMON LIFT LINE LION LIST LOCK LOFT LOVE LUNCH MAP
MARKET MASK MEAL MEAT MENU METAL MILL MIND MINT MOON MOUSE MUD MUSIC NAIL NAME NECK NEST NET NEWS NIGHT NOSE NOTE OAK
OCEAN OFFICE OIL OPEN OVEN PAGE PAINT PALM PAN PAPER PARK PATH PEAR PEN PET PIANO PIG PILOT PIN PIPE PIZZA PLANE PLATE
POND POOL PORT POT PUB PUMP QUEEN QUIET RACE RADIO RAIN RAT RED RICE RING RIVER ROAD ROBOT ROCK ROOF ROOM ROPE ROSE RUG
SAFE SAIL SALAD SALT SAND SAW SEAT SEED SHEEP SHIP SHIRT SHOE SHOP SIGN SILK SKI SKIN SKY SLOW SNAKE SNOW SOAP SOCK SOFA
SONG SOUP SPOON STAFF STAIR STAR STEEL STONE STORE STORM SUGAR SUN SWIM TABLE TAPE TAXI TEA TEAM TENT TEST TIE TIGER
TOAST TOOL TOWEL TOWER TOWN TOY TRAIN TRAM TREE TRUCK TUBE TUNE UNION VAN VASE VIEW VOTE WALL WATCH WATER WAVE WAX WEB
WEST WHALE WHEEL WIND WINE WING WOLF WOOD WOOL WORK YARD YEAR ZERO ZINC ZONE
"""
TRAIN_WORDS = _TRAIN_WORDS.split()
_TEST_WORDS = """
ANGLE ARROW BAKER BENCH BLUE BOSS BRIDGE BRUSH CABIN CAFE CAMERA CANDLE CASTLE CLIFF CLOCK CLOUD CROSS CROWN DEPOT DIVER
DOCK DREAM EAGLE EARTH FALCON FAST FERN FLAME FLUTE FOREST FRAME FRUIT GARDEN GHOST GLOVE GRAPE GUARD HARBOR HEDGE HONEY
HORSE HOUSE ISLAND IVORY JACKET JOKER JUDGE JUNGLE KAYAK KIOSK KIWI LADDER LEVEL LIGHT LOBBY MAGIC MAPLE MILK MOTEL
MUSEUM NORTH NURSE OLIVE ONION ORBIT PANDA PARCEL PEPPER PHONE PLANT POLICE PUZZLE RABBIT RANCH ROCKET SALON SCHOOL
SILVER SOUTH SPACE SPEED STOP STREET STUDIO SWAN TEMPLE TICKET TOMATO TRAVEL TULIP TUNNEL VALLEY VELVET VIOLIN WAGON
WINDOW WINTER YOGURT ZEBRA
"""
TEST_WORDS = _TEST_WORDS.split()
_WORDS = {"development": TEST_WORDS[::2], "test": TEST_WORDS[1::2]}
WORDS = {split: _WORDS[split.partition("_")[2]] for split in HARD_SPLITS}  # of the test scenes that have not all
# Files in scikit-image's wheel, in the public domain or under CC0, as the functions of `skimage.data` say.
_PHOTOGRAPHS = {
    "development": ("camera.png", "chelsea.png", "gravel.png", "rocket.jpg"),
    "test": ("astronaut.png", "brick.png", "coffee.png", "grass.png"),
}
PHOTOGRAPHS = {split: _PHOTOGRAPHS[split.partition("_")[2]] for split in HARD_SPLITS}
# Contrast of a photograph, of 1. With it and `HARD` the model at the root, unpruned, answers 83 % of 20 questions of each type
# of hard_development (88 % at 0.35); with `CROWDED` 76 % of those of crowded_development. Each was chosen before a pruned model
# was asked about its scenes.
BUSY = 0.6


@dataclass(frozen=True)
class Layout:
    """How many things a scene holds, least and most, and of what size in pixels. None: by the size of the picture."""

    num_shapes: tuple[int, int] = (2, 6)
    num_signs: tuple[int, int] = (1, 3)
    shape_size: tuple[int, int] | None = None
    font_size: tuple[int, int] = (30, 50)


HARD = Layout(num_shapes=(6, 9), num_signs=(1, 4), shape_size=(30, 50), font_size=(25, 34))
CROWDED = Layout(num_shapes=(10, 14), num_signs=(1, 4), shape_size=(26, 42), font_size=(24, 30))
LAYOUTS = {split: HARD if split.startswith("hard") else CROWDED for split in HARD_SPLITS}  # the others: Layout()


@dataclass(frozen=True)
class Shape:
    """A shape in its bounding box, pixels, `size` wide and high."""

    color: str
    kind: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + self.size, self.y + self.size

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Sign:
    """A board with writing: its box, the font by name and size in pixels, the box of every letter's ink."""

    color: str
    text: str
    font: str
    font_size: int
    box: tuple[int, int, int, int]
    letters: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Scene:
    """What a picture of `size` x `size` pixels shows."""

    split: str
    seed: int
    size: int
    shapes: tuple[Shape, ...]
    signs: tuple[Sign, ...]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@lru_cache(maxsize=1)
def font_files() -> dict[str, Path | None]:
    """Fonts that come with matplotlib (DejaVu, STIX) and with Pillow (None: its default, Aileron)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = {"sans": "DejaVuSans-Bold", "serif": "DejaVuSerif-Bold", "mono": "DejaVuSansMono-Bold", "times": "STIXGeneralBol"}
    return {name: folder / f"{file}.ttf" for name, file in names.items()} | {"aileron": None}


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = font_files()[name]
    if path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=50_000)
def _letter_metrics(name: str, size: int, letter: str) -> tuple[int, tuple[int, int, int, int]]:
    """Advance and ink box of a letter, pixels, the box relative to the pen on the ascender line."""
    font = _font(name, size)
    return round(font.getlength(letter)), tuple(map(int, font.getbbox(letter)))


def is_test(split: str) -> bool:
    """Whether scenes of a split hold what training never shows."""
    return split == "test" or split in HARD_SPLITS


def is_test_number(text: str) -> bool:
    """Whether a number is kept for test scenes: one in four, by the sum of its digits weighted by their place."""
    return sum((place + 2) * int(digit) for place, digit in enumerate(text)) % 4 == 0


def make_scene(
    split: str,
    seed: int,
    size: int = 336,
    num_shapes: tuple[int, int] | None = None,
    num_signs: tuple[int, int] | None = None,
) -> Scene:
    """Lay out a scene.

    Args:
        split: one of `SPLITS`.
        seed: integer >= 0; with the split it determines everything.
        size: side of the picture, pixels, a multiple of 14.
        num_shapes, num_signs: least and most, by default those of the split's layout; fewer where they do not fit.

    Raises:
        ValueError: unknown split, or a size that patches do not fill.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, but is {split!r}.")
    if size % PATCH or size < 6 * PATCH:
        raise ValueError(f"size must be a multiple of {PATCH} and at least {6 * PATCH}, but is {size!r}.")
    rng = random.Random(f"{split} {seed} {size}")
    layout = LAYOUTS.get(split, Layout())
    boxes: list[tuple[int, int, int, int]] = []
    sign_colors = rng.sample(list(COLORS), 3)
    if split in HARD_SPLITS:  # the first has a color of its own
        sign_colors = [*sign_colors[:2], sign_colors[1], rng.choice(sign_colors[1:])]
    sign_colors = sign_colors[: rng.randint(*(num_signs or layout.num_signs))]
    signs = [_place_sign(rng, split, color, size, boxes, layout.font_size) for color in sign_colors]
    combinations = _combinations(rng, split, rng.randint(*(num_shapes or layout.num_shapes)))
    shapes = [_place_shape(rng, color, kind, size, boxes, layout.shape_size) for color, kind in combinations]
    return Scene(split, seed, size, tuple(filter(None, shapes)), tuple(filter(None, signs)))


def _combinations(rng: random.Random, split: str, count: int) -> list[tuple[str, str]]:
    """Colour and kind of each shape. In half of the scenes one kind comes several times, to be counted."""
    repeated, times = rng.choice(SHAPES), rng.choice((0, 0, 0, 2, 3, 4))
    chosen = [rng.choice(TEST_COMBINATIONS)] if is_test(split) else []
    while len(chosen) < count:
        kind = repeated if len(chosen) < times else rng.choice(SHAPES)
        pair = rng.choice(list(COLORS)), kind
        if is_test(split) or pair not in TEST_COMBINATIONS:
            chosen.append(pair)
    return chosen


def _free_place(rng: random.Random, width: int, height: int, size: int, boxes: list) -> tuple[int, int] | None:
    gap = 5
    for _ in range(30):
        x, y = rng.randint(3, max(3, size - width - 3)), rng.randint(3, max(3, size - height - 3))
        if x + width > size or y + height > size:
            return None
        if all(x + width + gap < b[0] or b[2] + gap < x or y + height + gap < b[1] or b[3] + gap < y for b in boxes):
            boxes.append((x, y, x + width, y + height))
            return x, y
    return None


def _place_shape(
    rng: random.Random, color: str, kind: str, size: int, boxes: list, sides: tuple[int, int] | None
) -> Shape | None:
    side = rng.randint(*(sides or (30, max(40, min(80, size // 4)))))
    place = _free_place(rng, side, side, size, boxes)
    return place and Shape(color, kind, *place, side)


def _writing(rng: random.Random, split: str, longest: int) -> str:
    """A word or a number of the split; in training also letters at random, so that words can not be guessed."""
    choice = rng.random()
    if choice < 0.25:
        while True:
            text = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, min(4, longest))))
            if is_test_number(text) == is_test(split):
                return text
    if is_test(split):
        words = WORDS.get(split, TEST_WORDS)
        return rng.choice([word for word in words if len(word) <= longest] or words)
    if choice < 0.5:
        return rng.choice([word for word in TRAIN_WORDS if len(word) <= longest])
    while True:
        lengths = range(2, longest + 1)
        (length,) = rng.choices(lengths, [length**2 for length in lengths])  # long ones are the hard ones
        text = "".join(rng.choice(LETTERS[:26]) for _ in range(length))
        if text not in TEST_WORDS:
            return text


def _place_sign(rng: random.Random, split: str, color: str, size: int, boxes: list, font_sizes: tuple[int, int]) -> Sign | None:
    longest = max(3, min(MAX_LETTERS, (size - 30) // 34))
    text, name = _writing(rng, split, longest), rng.choice(list(font_files()))
    font_size = rng.randint(*font_sizes)
    spacing = rng.randint(1, 4)
    while True:
        metrics = [_letter_metrics(name, font_size, letter) for letter in text]
        width = sum(advance for advance, _ in metrics) + spacing * (len(text) - 1)
        top, bottom = min(box[1] for _, box in metrics), max(box[3] for _, box in metrics)
        across, down = rng.randint(8, 14), rng.randint(6, 12)
        if width + 2 * across <= size - 8 or font_size <= 24:
            break
        font_size -= 4
    place = _free_place(rng, width + 2 * across, bottom - top + 2 * down, size, boxes)
    if place is None:
        return None
    pen, letters = place[0] + across, []
    for advance, box in metrics:
        offset = place[1] + down - top
        letters.append((pen + box[0], offset + box[1], pen + box[2], offset + box[3]))
        pen += advance + spacing
    return Sign(color, text, name, font_size, boxes[-1], tuple(letters))


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB. The same pixels for the same scene and versions of Pillow, the fonts and the photographs.

    Raises:
        ModuleNotFoundError: a hard scene lies on a photograph, and scikit-image, which ships it, is not installed.
    """
    rng = random.Random(f"{scene.split} {scene.seed} {scene.size} colors")
    pixels = np.random.RandomState(rng.randrange(2**31))
    if scene.split not in HARD_SPLITS:
        background = _background(rng, pixels, scene.size)
    elif rng.random() < 0.5:
        background = _photograph(rng, rng.choice(PHOTOGRAPHS[scene.split]), scene.size)
    else:
        background = _texture(rng, pixels, scene.size)
    picture = Image.fromarray(background)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        _draw_shape(pen, shape, _shade(rng, shape.color))
    for sign in scene.signs:
        dark = sign.color in DARK_LETTERS_ON
        ink = tuple(rng.randint(0, 40) for _ in "rgb") if dark else tuple(rng.randint(225, 255) for _ in "rgb")
        pen.rounded_rectangle(
            sign.box, radius=rng.randint(0, 8), fill=_shade(rng, sign.color), outline=ink, width=rng.randint(1, 2)
        )
        for letter, box in zip(sign.text, sign.letters, strict=True):
            _, ink_box = _letter_metrics(sign.font, sign.font_size, letter)
            pen.text((box[0] - ink_box[0], box[1] - ink_box[1]), letter, fill=ink, font=_font(sign.font, sign.font_size))
    noise = pixels.randint(-6, 7, size=(scene.size, scene.size, 1), dtype=np.int16)
    return Image.fromarray((np.asarray(picture, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8))


def _shade(rng: random.Random, color: str) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-14, 14))) for value in COLORS[color])


def _background(rng: random.Random, pixels: np.random.RandomState, size: int) -> np.ndarray:
    """A gradient between two greyish mid-tones, or blotches of them: none of the named colours."""
    first, second = (np.array(_greyish(rng)) for _ in range(2))
    if rng.random() < 0.5:
        across, down = rng.uniform(-1, 1), rng.uniform(-1, 1)
        y, x = np.mgrid[0:size, 0:size] / size
        mix = across * x + down * y
        mix = (mix - mix.min()) / max(float(mix.max() - mix.min()), 1e-6)
    else:
        cells = rng.randint(4, 14)
        coarse = Image.fromarray(pixels.randint(0, 256, size=(cells, cells)).astype(np.uint8))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    return (first + (second - first) * mix[..., None]).clip(0, 255).astype(np.uint8)


def _photograph(rng: random.Random, name: str, size: int) -> np.ndarray:
    """A square part of a photograph, three fifths of its shorter side or more, with its contrast lowered to `BUSY`."""
    photograph = _photograph_file(name)
    side = round(min(photograph.size) * rng.uniform(0.6, 1))
    left, top = rng.randint(0, photograph.width - side), rng.randint(0, photograph.height - side)
    part = photograph.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    values = np.asarray(part, dtype=np.float64)
    return (145 + BUSY * (values - values.mean())).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _photograph_file(name: str) -> Image.Image:
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise ModuleNotFoundError(
            "Hard scenes lie on photographs that scikit-image ships, which is not installed. Run pip install "
            '"vlmpruner[bench]" (in a clone of the repository, pip install ".[bench]").'
        )
    return Image.open(Path(package.origin).parent / "data" / name).convert("RGB")


def _texture(rng: random.Random, pixels: np.random.RandomState, size: int) -> np.ndarray:
    """Stripes, checks, dots or grain of two greyish mid-tones, at any angle."""
    first, second = (np.array(_greyish(rng), dtype=np.float64) for _ in range(2))
    angle, period = rng.uniform(0, math.pi), rng.uniform(12, 40)
    kind = rng.choice(("stripes", "checks", "dots", "grain"))
    y, x = np.mgrid[0:size, 0:size]
    across, down = ((x * math.cos(turn) + y * math.sin(turn)) / period for turn in (angle, angle + math.pi / 2))
    if kind == "stripes":
        mix = across % 1 < 0.5
    elif kind == "checks":
        mix = (across % 1 < 0.5) ^ (down % 1 < 0.5)
    elif kind == "dots":
        mix = np.hypot(across % 1 - 0.5, down % 1 - 0.5) < 0.3
    else:
        cells = rng.randint(40, 120)
        coarse = Image.fromarray(pixels.randint(0, 256, size=(cells, cells)).astype(np.uint8))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    return (first + (second - first) * mix[..., None]).clip(0, 255).astype(np.uint8)


def _greyish(rng: random.Random) -> tuple[int, ...]:
    level = rng.randint(105, 185)
    return tuple(level + rng.randint(-18, 18) for _ in "rgb")


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, fill: tuple[int, ...]):
    edge = tuple(value // 2 for value in fill) if sum(fill) > 90 else (90, 90, 90)
    if shape.kind == "circle":
        pen.ellipse(shape.box, fill=fill, outline=edge, width=2)
    elif shape.kind == "square":
        pen.rectangle(shape.box, fill=fill, outline=edge, width=2)
    else:
        pen.polygon(_corners(shape.kind, shape.x, shape.y, shape.size), fill=fill, outline=edge, width=2)


def _corners(kind: str, left: int, top: int, side: int) -> list[tuple[float, float]]:
    if kind == "triangle":
        unit = [(0.5, 0), (1, 1), (0, 1)]
    elif kind == "cross":
        a, b = 0.32, 0.68
        unit = [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    else:
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2, 0.22, 0.53)
        unit = [(0.5 + r * np.cos(angle), 0.53 + r * np.sin(angle)) for r, angle in zip(radii, angles, strict=True)]
    return [(float(left + x * side), float(top + y * side)) for x, y in unit]


LABELS = {
    "color": 1 + len(COLORS),
    "shape": 1 + len(SHAPES),
    "letter": 1 + len(LETTERS),
    "place": 1 + MAX_LETTERS,
    "last": 3,
    "middle": 2,
}


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """What each patch shows: for each of `LABELS` an array [rows, columns] int64, 0 where there is none.

    color: of the shape or sign; shape; letter: the one with the largest part of the patch; place: 1 for a sign's first letter;
    last: 1 for a letter that is not a sign's last, 2 for the last; middle: 1 where the middle of a shape is, once for each.
    """
    side = scene.size // PATCH
    labels = {name: np.zeros((side, side), dtype=np.int64) for name in LABELS}
    colors = list(COLORS)
    for shape in scene.shapes:
        covered = coverage(shape.box, side) >= 0.4
        labels["color"][covered] = 1 + colors.index(shape.color)
        labels["shape"][covered] = 1 + SHAPES.index(shape.kind)
        column, row = (int(place) // PATCH for place in shape.center)
        labels["middle"][row, column] = 1
    for sign in scene.signs:
        labels["color"][coverage(sign.box, side) >= 0.4] = 1 + colors.index(sign.color)
        best = np.full((side, side), 0.2)
        for place, (letter, box) in enumerate(zip(sign.text, sign.letters, strict=True)):
            part = coverage(box, side)
            larger = part > best
            best[larger] = part[larger]
            labels["letter"][larger] = 1 + LETTERS.index(letter)
            labels["place"][larger] = 1 + place
            labels["last"][larger] = 1 + (place == len(sign.text) - 1)
    return labels


def coverage(box: Sequence[int], side: int) -> np.ndarray:
    """[side, side]: the part of each patch that lies in a box of pixels."""
    starts = np.arange(side) * PATCH
    across = np.clip(np.minimum(starts + PATCH, box[2]) - np.maximum(starts, box[0]), 0, None)
    down = np.clip(np.minimum(starts + PATCH, box[3]) - np.maximum(starts, box[1]), 0, None)
    return down[:, None] * across / PATCH**2


def ask(scene: Scene) -> list[Question]:
    """The questions of a scene, at most two of each type, in an order of its own. Yes and no are equally likely."""
    rng = random.Random(f"{scene.split} {scene.seed} {scene.size} questions")
    questions = [*_about_signs(scene), *_about_existence(rng, scene), *_about_looks(rng, scene), *_about_number(rng, scene)]
    questions += about_relation(rng, scene)
    rng.shuffle(questions)
    return questions


def _about_signs(scene: Scene) -> list[Question]:
    if len(scene.signs) == 1:
        return [Question("read", "What does the sign say?", scene.signs[0].text)]
    colors = [sign.color for sign in scene.signs]
    return [about_sign(sign) for sign in scene.signs if colors.count(sign.color) == 1][:2]


def about_sign(sign: Sign) -> Question:
    """Among several; no other sign of its scene has its color."""
    return Question("read_color", f"What is written on the {sign.color} sign?", sign.text)


def _about_existence(rng: random.Random, scene: Scene) -> list[Question]:
    present = sorted({(shape.color, shape.kind) for shape in scene.shapes})
    absent = [
        (color, kind)
        for color in COLORS
        for kind in SHAPES
        if (color, kind) not in present and (is_test(scene.split) or (color, kind) not in TEST_COMBINATIONS)
    ]
    # Half of the absent ones share the colour or the kind with something that is there.
    close = [pair for pair in absent if any(pair[0] == color or pair[1] == kind for color, kind in present)]
    pairs = [(rng.choice(present), "yes")] if present and rng.random() < 0.5 else [(rng.choice(absent), "no")]
    if present and close:
        pairs.append((rng.choice(present), "yes") if pairs[0][1] == "no" else (rng.choice(close), "no"))
    return [
        Question("existence", f"Is there {'an' if color == 'orange' else 'a'} {color} {kind}?", answer)
        for (color, kind), answer in pairs
    ]


def _about_looks(rng: random.Random, scene: Scene) -> list[Question]:
    kinds, colors = [shape.kind for shape in scene.shapes], [shape.color for shape in scene.shapes]
    by_kind = [shape for shape in scene.shapes if kinds.count(shape.kind) == 1]
    by_color = [shape for shape in scene.shapes if colors.count(shape.color) == 1]
    about_color = [
        Question("color", f"What color is the {shape.kind}?", shape.color)
        for shape in rng.sample(by_kind, min(2, len(by_kind)))
    ]
    about_shape = [
        Question("shape", f"What shape is the {shape.color} object?", shape.kind)
        for shape in rng.sample(by_color, min(2, len(by_color)))
    ]
    return about_color + about_shape


def _about_number(rng: random.Random, scene: Scene) -> list[Question]:
    kinds = [shape.kind for shape in scene.shapes]
    counts = sorted({kinds.count(kind) for kind in SHAPES})
    number = rng.choice(counts)
    kind = rng.choice([kind for kind in SHAPES if kinds.count(kind) == number])
    return [Question("count", f"How many {kind}{'es' if kind == 'cross' else 's'} are there?", str(number))]


def about_relation(rng: random.Random, scene: Scene) -> list[Question]:
    pairs = [(shape.color, shape.kind) for shape in scene.shapes]
    single = [shape for shape in scene.shapes if pairs.count((shape.color, shape.kind)) == 1]
    far = [
        (one, other, axis)
        for one in single
        for other in single
        for axis in (0, 1)
        if one is not other and abs(one.center[axis] - other.center[axis]) >= 2 * PATCH
    ]
    if not far:
        return []
    one, other, axis = rng.choice(far)
    before = one.center[axis] < other.center[axis]
    said_before = rng.random() < 0.5
    word = (("left of", "right of"), ("above", "below"))[axis][not said_before]
    text = f"Is the {one.color} {one.kind} {word} the {other.color} {other.kind}?"
    return [Question("relation", text, "yes" if before == said_before else "no")]
