"""How the record of a call stays with its outputs, also where others make outputs anew.

Outputs are of the stock class, so the record is an attribute of them. What casts, moves or scatters outputs makes new ones of
their fields alone. So the record is left in three places, which keep it no longer than the outputs live:
- With the outputs, as `pruning_record`. What runs inside of the model's own call (accelerate's mixed precision, hooks of
  `device_map`, FSDP2) may make them anew: the call leaves the record with what comes out in the end.
- With their tensors, weakly: for what puts the same tensors into new outputs (FSDP, `dataclasses.replace`).
- With the nodes of their graph: for what computes new tensors from them where gradients are wanted (DistributedDataParallel).

Where it is in none of them it is lost, and `record_of` says so: None means that nothing was pruned.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import ModelOutput

from .pruned_cache import PruningRecord, cache_of, pruning_state


NAME = "pruning_record"
TENSORS = ("loss", "logits", "last_hidden_state")  # of outputs, those that tell the record
MAX_NODES = 32  # of a graph that are looked at: a wrapper adds one or two to each tensor of the outputs

_records_of_tensors = WeakTensorKeyDictionary()
_record_of_call: ContextVar[list | None] = ContextVar("record_of_call", default=None)


@contextmanager
def record_of_call() -> Iterator[list[PruningRecord | None]]:
    """A list that gets the record of the last forward inside, as its only item. It stays empty where none ran."""
    found: list[PruningRecord | None] = []
    token = _record_of_call.set(found)
    try:
        yield found
    finally:
        _record_of_call.reset(token)
    if found:
        _tell_call(found[0])


def _tell_call(record: PruningRecord | None) -> None:
    if (found := _record_of_call.get()) is not None:
        found[:] = [record]


def leave_record(outputs: ModelOutput, record: PruningRecord | None) -> None:
    """Let `record_of` find the record of a call in its outputs; None where nothing was pruned."""
    setattr(outputs, NAME, record)
    if torch.compiler.is_compiling():
        return
    _tell_call(record)
    for tensor in _tensors_of(outputs):
        _records_of_tensors[tensor] = record
        if tensor.grad_fn is not None:
            tensor.grad_fn.metadata[NAME] = record


def record_of(outputs: Mapping) -> PruningRecord | None:
    """What was kept, or None if nothing was pruned: in the call, else over all turns that a cache among the outputs holds.

    Raises:
        ValueError: where it is not known.
    """
    if getattr(outputs, NAME, None) is not None:
        return outputs.pruning_record
    if (cache := cache_of(outputs)) is not None:
        return None if (state := pruning_state(cache)) is None else state.record
    if hasattr(outputs, NAME):
        return None
    tensors = _tensors_of(outputs)
    found = [_records_of_tensors[tensor] for tensor in tensors if tensor in _records_of_tensors]
    found = found or _records_behind([tensor.grad_fn for tensor in tensors])
    if not found or any(record is not found[0] for record in found):
        raise ValueError(
            f"It is not known what was pruned: this {type(outputs).__name__} is not what the model returned. What made it anew "
            "has lost the record; wrappers that cast, move or gather outputs may. Call with use_cache=True, as a cache has it "
            "too, or pass what the model inside of the wrapper returns."
        )
    return found[0]


def _tensors_of(outputs: Mapping) -> list[torch.Tensor]:
    values = map(outputs.get, TENSORS) if isinstance(outputs, Mapping) else ()
    return [value for value in values if isinstance(value, torch.Tensor)]


def _records_behind(nodes: list) -> list[PruningRecord | None]:
    """The records of the nearest nodes of a graph that have one, from `nodes` on."""
    found = []
    for node in islice(nodes, MAX_NODES):  # which gets longer meanwhile
        if node is None:
            continue
        if NAME in node.metadata:
            found.append(node.metadata[NAME])
        else:
            nodes += [earlier for earlier, _ in node.next_functions]
    return found


class RecordKeptMixin:
    """Put in front of a model: what its call returns has the record of its forward."""

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with record_of_call() as found:
            outputs = super().__call__(*args, **kwargs)
        if found and isinstance(outputs, ModelOutput) and not hasattr(outputs, NAME):
            leave_record(outputs, found[0])
        return outputs
