"""What a pruning method says and returns is checked: a slip is named with the method, its value and the legal range."""

import re
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, load_pruned, make_inputs, picture
from test_configuration import config

from vlmpruner import pruning_contract
from vlmpruner.method_dart import DART
from vlmpruner.pruning_contract import checked_counts, checked_merge, checked_places, checked_selection, checked_sizes
from vlmpruner.pruning_method import MethodParameters, PruningMethod, StageTokens, number
from vlmpruner.pruning_methods import METHODS
from vlmpruner.token_pruning import Selection


pytestmark = pytest.mark.once


class First(PruningMethod):
    """The first tokens."""

    def select(self, image):
        return torch.arange(image.num_keep)


def stage_tokens():
    """Of three grids of 20 tokens, of each of which 6 are to stay."""
    return StageTokens(
        stage=0,
        hidden_states=torch.randn(60, 8),
        keys=None,
        indices=torch.arange(20).repeat(3),
        grids=[(4, 5)] * 3,
        sizes=[20] * 3,
        num_keep=[6] * 3,
        keeps_last=[False] * 3,
        batch=None,
        signals={},
    )


def select(method):
    return checked_selection(method(None, 1, 4), stage_tokens())


def settings(monkeypatch, method, **keys):
    """Of a config with four layers, by a method that takes the place of one in the registry."""
    monkeypatch.setitem(METHODS, "fastv", method)
    return config(pruning_method="fastv", **keys).pruning_settings()


@torch.no_grad()
def test_a_forward_checks_what_its_method_returns(monkeypatch):
    model = load_pruned(FAMILIES["llava"], pruning_method="fastv")
    inputs = make_inputs(FAMILIES["llava"], [([picture(1)], "What is it?")])

    class Longer(First):
        def select(self, image):
            return torch.arange(image.num_keep + 3)

    monkeypatch.setitem(METHODS, "fastv", First)
    assert [image.order.tolist() for image in model(**inputs).pruning_record] == [list(range(4))]
    monkeypatch.setitem(METHODS, "fastv", Longer)
    with pytest.raises(ValueError, match=r"Longer\.select must return 4 places of 36 tokens, but returned 7"):
        model(**inputs)


# What `select` returns, of 20 tokens of which 6 are to stay
SELECTED = {
    "duplicates": (lambda places: torch.cat([places[:-1], places[:1]]), r"distinct places in \[0, 19\], but returned \["),
    "too many": (lambda places: torch.cat([places, 10 + places[:3]]), "6 places of 20 tokens, but returned 9"),
    "too few": (lambda places: places[:5], "6 places of 20 tokens, but returned 5"),
    "none": (lambda places: places[:0], "6 places of 20 tokens, but returned 0"),
    "negative": (lambda places: places - 1, r"distinct places in \[0, 19\], but returned \[-1, 0"),
    "beyond": (lambda places: places + 19, r"distinct places in \[0, 19\], but returned \[19, 20"),
    "a mask": (lambda places: torch.arange(20) < 6, r"1 dimensions, torch.int64 on cpu, .* shape \(20,\), torch.bool on cpu"),
    "int32": (lambda places: places.int(), r"torch.int64 on cpu, but returned one of shape \(6,\), torch.int32"),
    "floats": (lambda places: places.float(), "torch.int64 on cpu, .* torch.float32"),
    "a matrix": (lambda places: places[None], r"1 dimensions, .* shape \(1, 6\)"),
    "elsewhere": (lambda places: places.to("meta"), "on cpu, but returned .* on meta"),
    "a list": (lambda places: places.tolist(), "torch.int64 on cpu, but returned a list"),
    "nothing": (lambda places: None, "torch.int64 on cpu, but returned a NoneType"),
}


@pytest.mark.parametrize("slip", SELECTED)
def test_what_select_returns_is_named(slip):
    change, message = SELECTED[slip]

    class Slipping(First):
        def select(self, image):
            return change(super().select(image))

    with pytest.raises(ValueError, match=rf"Slipping\.select must return .*{message}"):
        select(Slipping)


def test_a_method_that_keeps_as_many_as_it_likes_is_checked_too():
    class Free(First):
        counts_are_known = False
        more = 0

        def select(self, image):
            return torch.arange(len(image.indices) + self.more)

    assert select(Free).counts == (20, 20, 20)
    Free.more = 1
    with pytest.raises(ValueError, match=r"Free\.select must return at most 20 places of 20 tokens, but returned 21"):
        select(Free)


def test_a_token_of_padding_is_no_place():
    """Where padding of a tile takes no part, places are among the others: a negative one would be the last of these."""
    with pytest.raises(ValueError, match=r"distinct places in \[0, 3\], but returned \[0, -1\]"):
        checked_places(torch.tensor([0, -1]), 4, 2, torch.device("cpu"), "Any.select")


def test_on_a_gpu_the_device_asserts(monkeypatch):
    """Here on a CPU, where the assertion says so at once."""
    monkeypatch.setattr(pruning_contract, "values_are_free", lambda tensor: False)
    checked_places(torch.tensor([2, 0]), 4, 2, torch.device("cpu"), "Any.select")
    with pytest.raises(RuntimeError, match=r"Any.select must return distinct places in \[0, 3\]"):
        checked_places(torch.tensor([2, 2]), 4, 2, torch.device("cpu"), "Any.select")


def both(counts, order, kept=None):
    return Selection(counts, order, order.sort().values if kept is None else kept)


SELECTIONS = {
    "a tensor": (lambda selection: selection.order, "must return a Selection, but returned one of shape"),
    "counts": (
        lambda selection: both((6, 5, 7), selection.order),
        r"must keep \(6, 6, 6\) tokens of the grids, but its counts are \(6, 5, 7\)",
    ),
    "a count too few": (lambda selection: both((6, 6), selection.order), r"but its counts are \(6, 6\)"),
    "length": (lambda selection: both(selection.counts, selection.order[:-1]), "18 places as order, but returned 17"),
    "kept": (
        lambda selection: both(selection.counts, selection.order, selection.order.sort().values[1:]),
        "18 places as kept, but returned 17",
    ),
    "unsorted": (
        lambda selection: both(selection.counts, selection.order, selection.order.sort(descending=True).values),
        "as kept what is in order, ascending",
    ),
    "type": (lambda selection: both(selection.counts, selection.order.int()), "as order, must return .* torch.int32"),
    "of another grid": (
        lambda selection: both(selection.counts, selection.order.roll(1)),
        r"of grid 0 .* distinct places in \[0, 19\]",
    ),
    "duplicates": (
        lambda selection: both(selection.counts, torch.cat([selection.order[:1], selection.order[:-1]])),
        "of grid 0 .* distinct places",
    ),
}


@pytest.mark.parametrize("slip", SELECTIONS)
def test_what_select_batch_returns_is_named(slip):
    change, message = SELECTIONS[slip]

    class Slipping(First):
        def select_batch(self, tokens):
            return change(super().select_batch(tokens))

    with pytest.raises(ValueError, match=rf"Slipping\.select_batch.*{message}"):
        select(Slipping)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda merged: merged[1:], r"shape \(18, 8\), but returned \(17, 8\)"),
        (lambda merged: merged[:, 1:], r"shape \(18, 8\), but returned \(18, 7\)"),
        (lambda merged: merged.double(), "torch.float32 on cpu, but returned .* torch.float64"),
        (lambda merged: None, "but returned a NoneType"),
    ],
)
def test_what_merge_returns_is_named(change, message):
    class Slipping(First):
        has_merge = True

        def merge(self, hidden_states, selection, tokens):
            return change(hidden_states[selection.kept])

    tokens = stage_tokens()
    with pytest.raises(ValueError, match=rf"Slipping\.merge must return .*{message}"):
        checked_merge(Slipping(None, 1, 4), tokens.hidden_states, select(First), tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sizes: sizes[:, 0], r"2 dimensions, .* shape \(18,\)"),
        (lambda sizes: sizes[1:], r"shape \(18, 2\), but returned \(17, 2\)"),
        (lambda sizes: sizes.long(), "torch.float32 on cpu, but returned .* torch.int64"),
        (lambda sizes: sizes - 1, r"numbers above 0, but the least is 0\.0"),
    ],
)
def test_what_sizes_returns_is_named(change, message):
    class Slipping(First):
        def sizes(self, selection, tokens):
            return change(torch.ones(len(selection.kept), 2))

    with pytest.raises(ValueError, match=rf"Slipping\.sizes must return .*{message}"):
        checked_sizes(Slipping(None, 1, 4), select(First), stage_tokens())


@pytest.mark.parametrize("counts", [(3, 4), (3,), (101, 3), (3, -1), (3.0, 2), None])
def test_counts_are_checked(counts):
    class Counting(First):
        def stage_layers(self):
            return (1, 2)

        def counts(self, num_visual, num_keep):
            return counts

    message = r"Counting\.counts\(100, 7\) must be 2 integers in \[0, 100\], .* layers \(1, 2\).* but is "
    with pytest.raises(ValueError, match=message + re.escape(repr(counts))):
        checked_counts(Counting(None, 1, 4), 100, 7)


@pytest.mark.parametrize("shares", [(0.5,), (0.25, 0.5), (1.5, 0.5), (0, 0), ("half", 0), 0.5])
def test_shares_are_checked(shares):
    class Sharing(First):
        def stage_layers(self):
            return [1, 3]

        def stage_shares(self):
            return shares

    message = rf"Sharing\.stage_shares\(\) must be 2 numbers in \[0, 1\], .* layers \[1, 3\].* but is {re.escape(repr(shares))}"
    with pytest.raises(ValueError, match=message):
        checked_counts(Sharing(None, 1, 4), 100, 7)


@pytest.mark.parametrize("layers", [(), (2, 2), (3, 1), (1, 4), (-1,), (1.0,), (True,), 2, None])
def test_layers_are_checked_when_a_call_begins(layers, monkeypatch):
    class Layered(First):
        def stage_layers(self):
            return layers

    message = rf"Layered\.stage_layers\(\) must be decoder layers from 0 to 3, .* but is {re.escape(repr(layers))}"
    with pytest.raises(ValueError, match=message):
        settings(monkeypatch, Layered)
    assert settings(monkeypatch, Layered, pruning_ratio=0.0) is None  # off, nothing asks it


@pytest.mark.parametrize("signal", ["keys", "attention"])
def test_layer_0_has_no_layer_below(signal, monkeypatch):
    class Below(First):
        looks_at = frozenset({signal, "text"})

        def stage_layers(self):
            return (0, 2)

        def stage_shares(self):
            return (0.5, 0.25)

    with pytest.raises(ValueError, match=rf"Below looks at \['{signal}'\] of the layer below, .* is \(0, 2\), .* from 1 to 3"):
        settings(monkeypatch, Below)


def test_words_are_checked_when_a_class_is_defined():
    legal = r"\('keys', 'attention', 'own_attention', 'text', 'question', 'tower'\)"
    with pytest.raises(ValueError, match=rf"Typo\.looks_at must be a set of some of {legal}, but is \['attention', 'kyes'\]"):
        type("Typo", (First,), {"looks_at": frozenset({"kyes", "attention"})})
    with pytest.raises(ValueError, match=r"Word\.looks_at must be a set of some of .*, but is 'keys'"):
        type("Word", (First,), {"looks_at": "keys"})
    with pytest.raises(
        ValueError, match=r"Typo\.corrections must be a set of some of \('size', 'distance'\), but is \['sizes'\]"
    ):
        type("Typo", (First,), {"corrections": frozenset({"sizes"})})
    with pytest.raises(ValueError, match=r"Named\.presets names \['pivots'\], but its parameters are \['num_image_pivots', "):
        type("Named", (DART,), {"presets": {"paper": {"pivots": 3}}})


def test_a_parameter_without_a_range_is_named():
    @dataclass(frozen=True)
    class Parameters(MethodParameters):
        weight: float = 1.0
        sharpness: float = 1.0

        legal = {"weight": number(0, 1)}

    with pytest.raises(ValueError, match=r"Parameters\.legal must have a range for each parameter, but lacks \['sharpness'\]"):
        type("Ranged", (First,), {"Parameters": Parameters})


def test_words_of_an_instance_are_checked_when_a_call_begins(monkeypatch):
    class Late(First):
        def __init__(self, *args):
            super().__init__(*args)
            self.looks_at = {"keys", "towr"}

    with pytest.raises(ValueError, match=r"Late\.looks_at must be a set of .* but is \['keys', 'towr'\]"):
        settings(monkeypatch, Late)


def test_what_a_method_does_not_override_is_named(monkeypatch):
    with pytest.raises(NotImplementedError, match="Bare must override select or select_batch"):
        select(type("Bare", (PruningMethod,), {}))
    merging = type("Merging", (First,), {"has_merge": True})
    with pytest.raises(NotImplementedError, match="Merging has has_merge, so it must override merge"):
        checked_merge(merging(None, 1, 4), stage_tokens().hidden_states, select(merging), stage_tokens())
    with pytest.raises(ValueError, match=r"Sized\.corrections has 'size', so Sized\.has_merge must be True, but is False"):
        settings(monkeypatch, type("Sized", (First,), {"corrections": frozenset({"size"})}))
