"""What a pruning method promises, checked. What it returns decides which tokens are still there, so a slip would show nowhere.

A class is checked when it is defined, an instance when a call begins (`check_method`), and what it returns in each call. Types,
shapes and lengths are known on the host. Values are looked at where nobody waits for them, outside of CUDA; on CUDA an
assertion on the device looks at those of `select`.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise

import torch

from .token_pruning import Selection


# What a method may look at, and of that what comes from the layer below the stage; how it may correct attention.
SIGNALS = ("keys", "attention", "own_attention", "text", "question", "tower")
SIGNALS_FROM_BELOW = ("keys", "attention")
CORRECTIONS = ("size", "distance")


def check_class(method: type) -> None:
    """Raise a ValueError where a class of methods names what there is not."""
    for attribute, legal in (("looks_at", SIGNALS), ("corrections", CORRECTIONS)):
        if not isinstance(words := getattr(method, attribute), property):
            _check_words(method.__name__, attribute, words, legal)
    parameters = {field.name for field in fields(method.Parameters)}
    if unknown := sorted({name for preset in method.presets.values() for name in preset} - parameters):
        raise ValueError(f"{method.__name__}.presets names {unknown}, but its parameters are {sorted(parameters)}.")
    if missing := sorted(parameters - set(getattr(method.Parameters, "legal", parameters))):
        raise ValueError(f"{method.Parameters.__name__}.legal must have a range for each parameter, but lacks {missing}.")


def _check_words(name: str, attribute: str, words, legal: Sequence[str]) -> None:
    if not isinstance(words, set | frozenset) or not words <= set(legal):
        shown = sorted(words, key=str) if isinstance(words, set | frozenset) else words
        raise ValueError(f"{name}.{attribute} must be a set of some of {legal}, but is {shown!r}.")


def check_method(method) -> None:
    """Raise a ValueError where what a method says of itself can not be in its decoder."""
    name, last = type(method).__name__, method.num_layers - 1
    _check_words(name, "looks_at", method.looks_at, SIGNALS)
    _check_words(name, "corrections", method.corrections, CORRECTIONS)
    layers = method.stage_layers()
    if not _are(layers, _is_integer) or not layers or not _ascend((-1, *layers, last + 1)):
        raise ValueError(
            f"{name}.stage_layers() must be decoder layers from 0 to {last}, at least one, ascending and each once, but is "
            f"{layers!r}."
        )
    if layers[0] == 0 and (missing := method.looks_at & set(SIGNALS_FROM_BELOW)):
        raise ValueError(
            f"{name} looks at {sorted(missing)} of the layer below, but {name}.stage_layers() is {layers!r}, and there is none "
            f"below layer 0. Its layers must be from 1 to {last}."
        )
    if "size" in method.corrections and not method.has_merge:
        raise ValueError(f"{name}.corrections has 'size', so {name}.has_merge must be True, but is {method.has_merge!r}.")


def checked_shares(method, layers: Sequence[int]) -> Sequence[float]:
    """`stage_shares` of a method.

    Raises:
        ValueError: unless they are numbers in [0, 1], one for each of `layers`, that do not grow, the first above 0.
    """
    shares = method.stage_shares()
    if not _are(shares, _is_number) or len(shares) != len(layers) or not _fall((1, *shares, 0)) or shares[0] == 0:
        raise ValueError(
            f"{type(method).__name__}.stage_shares() must be {len(layers)} numbers in [0, 1], one for each of the layers "
            f"{layers!r}, none above the one before it, the first above 0, but is {shares!r}."
        )
    return shares


def checked_counts(method, num_visual: int, num_keep: int) -> Sequence[int]:
    """`counts` of a method.

    Raises:
        ValueError: unless they are integers from `num_visual` to 0, one for each stage, that do not grow.
    """
    counts, layers = method.counts(num_visual, num_keep), method.stage_layers()
    if not _are(counts, _is_integer) or len(counts) != len(layers) or not _fall((num_visual, *counts, 0)):
        raise ValueError(
            f"{type(method).__name__}.counts({num_visual}, {num_keep}) must be {len(layers)} integers in [0, {num_visual}], "
            f"one for each of the layers {layers!r}, none above the one before it, but is {counts!r}."
        )
    return counts


def checked_places(places, num_tokens: int, num_keep: int | None, device: torch.device, name: str) -> torch.LongTensor:
    """`places` as `name` returned them.

    Args:
        num_tokens: how many tokens there are.
        num_keep: how many are to be kept; None where that is the method's to say.

    Raises:
        ValueError: unless they are as many, distinct and in [0, num_tokens). On CUDA a failed assertion says the last two.
    """
    _check_tensor(places, 1, torch.int64, device, name)
    if len(places) != num_keep if num_keep is not None else len(places) > num_tokens:
        expected = f"at most {num_tokens}" if num_keep is None else num_keep
        raise ValueError(f"{name} must return {expected} places of {num_tokens} tokens, but returned {len(places)}.")
    if len(places) > 0:
        ascending = places.sort().values
        is_legal = (ascending.diff() > 0).all() & (ascending[0] >= 0) & (ascending[-1] < num_tokens)
        message = f"{name} must return distinct places in [0, {num_tokens - 1}]"
        if not values_are_free(places):
            torch._assert_async(is_legal, f"{message}.")
        elif not is_legal:
            raise ValueError(f"{message}, but returned {places.tolist()}.")
    return places


def checked_selection(method, tokens) -> Selection:
    """`select_batch` of a method for a stage's tokens.

    Raises:
        ValueError: for anything but a `Selection` of as many tokens of each grid as are to be kept; on CUDA as far as the host
            knows.
    """
    selection, name = method.select_batch(tokens), f"{type(method).__name__}.select_batch"
    if getattr(selection, "_fields", None) != Selection._fields:  # by class, the library's copy of a method's module is another
        raise ValueError(f"{name} must return a Selection, but returned {_described(selection)}.")
    counts, budget = selection.counts, tuple(tokens.num_keep if method.counts_are_known else tokens.sizes)
    is_legal = _are(counts, _is_integer) and len(counts) == len(budget)
    if not is_legal or (tuple(counts) != budget if method.counts_are_known else not all(map(_is_within, counts, budget))):
        bound = "" if method.counts_are_known else "at most "
        raise ValueError(f"{name} must keep {bound}{budget} tokens of the grids, but its counts are {counts!r}.")
    for field, places in (("order", selection.order), ("kept", selection.kept)):
        _check_tensor(places, 1, torch.int64, tokens.hidden_states.device, f"{name}, as {field},")
        if len(places) != sum(counts):
            raise ValueError(f"{name} must return {sum(counts)} places as {field}, but returned {len(places)}.")
    if values_are_free(selection.order):
        _check_grids(selection, tokens.sizes, name)
    return selection


def values_are_free(tensor: torch.Tensor) -> bool:
    """Whether nobody waits for a device where values are looked at."""
    return not tensor.is_cuda


def _check_grids(selection: Selection, sizes: Sequence[int], name: str) -> None:
    """Raise a ValueError unless the places of each grid are distinct and its own, and `kept` are the same ascending."""
    start = 0
    for number, (size, places) in enumerate(zip(sizes, selection.order.split(selection.counts), strict=True)):
        own = places - start
        checked_places(own, size, None, own.device, f"{name}, of grid {number} counted from its first token,")
        start += size
    if not torch.equal(selection.order.sort().values, selection.kept):
        raise ValueError(f"{name} must return as kept what is in order, ascending, but returned {selection.kept.tolist()}.")


def checked_merge(method, hidden_states: torch.Tensor, selection: Selection, tokens) -> torch.Tensor:
    """`merge` of a method. Raises a ValueError for anything but [R, hidden_size], of the type of `hidden_states`."""
    merged, name = method.merge(hidden_states, selection, tokens), f"{type(method).__name__}.merge"
    _check_tensor(merged, 2, hidden_states.dtype, hidden_states.device, name)
    _check_shape(merged, (len(selection.kept), hidden_states.shape[1]), name)
    return merged


def checked_sizes(method, selection: Selection, tokens) -> torch.Tensor:
    """`sizes` of a method. Raises a ValueError for anything but [R, 2] float32, positive."""
    sizes, name = method.sizes(selection, tokens), f"{type(method).__name__}.sizes"
    _check_tensor(sizes, 2, torch.float32, tokens.hidden_states.device, name)
    _check_shape(sizes, (len(selection.kept), 2), name)
    if values_are_free(sizes) and not bool((sizes > 0).all()):
        raise ValueError(f"{name} must return numbers above 0, but the least is {float(sizes.min())}.")
    return sizes


def _check_tensor(tensor, ndim: int, dtype: torch.dtype, device: torch.device, name: str) -> None:
    is_tensor = isinstance(tensor, torch.Tensor)
    if not is_tensor or tensor.ndim != ndim or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must return a tensor of {ndim} dimensions, {dtype} on {device}, but returned {_described(tensor)}."
        )


def _check_shape(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must return a tensor of shape {shape}, but returned {tuple(tensor.shape)}.")


def _described(value) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"one of shape {tuple(value.shape)}, {value.dtype} on {value.device}"


def _are(values, is_legal: Callable[[object], bool]) -> bool:
    return isinstance(values, tuple | list) and all(map(is_legal, values))


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_within(count: int, limit: int) -> bool:
    return 0 <= count <= limit


def _ascend(values: Sequence[float]) -> bool:
    return all(value < later for value, later in pairwise(values))


def _fall(values: Sequence[float]) -> bool:
    return all(value >= later for value, later in pairwise(values))
