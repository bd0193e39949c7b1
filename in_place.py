"""Prune a model of transformers that is already loaded, and take the pruning off again.

`prune` gives the loaded model the classes of this project: its config, the generating model, the model below it and the decoder
layers change their class, and nothing else. Weights, hooks and wrappers stay where they are, so adapters, quantised weights and
offloaded weights work as before. `unprune` gives all of them the stock classes again. Nothing is kept beside the model: what is
to be undone follows from the classes.

Other libraries replace `forward` on a single module: hooks of accelerate, mixed precision, `torch.compile`. Such a replacement
holds the method of the stock class, and would go on to run the model unpruned. `prune` looks for this method inside the
replacement and puts the method of the pruned class there. Where it is not found, the model is refused.
"""

import copy
import functools
import importlib
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from . import processing
from .configuration_vlmpruner import CONFIG_OF_BASE_MODEL, PruningConfig, first_layer_above_keys
from .processing import DrawMixin
from .pruned_decoder import pruned_layer_classes
from .stock_lookups import register_model_type, stock_class, undecorated
from .tensor_parallel import check_heads


PREFIX = "pruning_"
MIXINS = ("PrunedModelMixin", "PrunedForConditionalGenerationMixin", "PrunedLayerMixin", "RecurrentRowsMixin")
# Which thread has a model in `with pruning(model)`. A second thread would change the classes under the first.
_threads: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def prune(model, ratio: float = 0.889, method: str = "vlm_pruner", **keys):
    """Prune a loaded model in place, whatever it is wrapped into.

    Args:
        model: a model of a supported family in its stock class, or in ours, or a module that has such models inside, like those
            of PEFT, DDP, FSDP and `torch.compile`. Or a processor of such a model, which gets `draw_kept_tokens`; the other
            arguments do not concern it.
        ratio: fraction of the visual tokens of each image that is removed, in [0, 1).
        method: a name of docs/methods.md.
        keys: other keys of docs/settings.md, with `pruning_` in front or without it: `layer=3` is `pruning_layer=3`. A key that
            is not given has its default, also where the model was pruned with another value before.

    Returns:
        `model` itself. The models in it have `get_pruning_record`.

    Raises:
        ValueError: for a model that is not supported, a `forward` that was replaced by code which does not lead to the stock
            method, and a key that is unknown or out of range. Then nothing was changed.
        RuntimeError: while another thread has this model in `with pruning(model)`.
    """
    if isinstance(model, ProcessorMixin):
        return _prune_processor(model)
    keys = _with_prefix({"ratio": ratio, "method": method} | keys)
    with _lock:
        models = models_in(model)
        before = [(each, _keys_of(each)) for each in models]
        try:
            for each in models:
                _refuse_other_thread(each)
                _prune_model(each, keys)
        except Exception:
            _restore(before)
            raise
    return model


def unprune(model):
    """Give a pruned model, or a processor, the classes of transformers again, in place.

    The model is the stock model then, with what was done to it since: weights, adapters, and keys of the config that are not
    about pruning. A model of a pruned repo becomes its base model. One that is not pruned stays as it is.

    Args:
        model: what `prune` took.

    Returns:
        `model` itself.

    Raises:
        ValueError, RuntimeError: as `prune`.
    """
    if isinstance(model, ProcessorMixin):
        return _unprune_processor(model)
    with _lock:
        for each in models_in(model):
            _refuse_other_thread(each)
            if is_ours(type(each)):
                _unprune_model(each)
    return model


@contextmanager
def pruning(model, ratio: float = 0.889, method: str = "vlm_pruner", **keys):
    """`prune` for the length of a `with` block. Afterwards the model is as before: unpruned, or pruned with its own keys.

    Blocks can be nested. While a block is open, another thread can call the model, but neither prune nor unprune it. Arguments
    and errors are as in `prune`.
    """
    with _lock:
        before = [(each, _keys_of(each)) for each in models_in(model)]
        prune(model, ratio, method, **keys)
        first = [each for each, _ in before if each not in _threads]
        _threads.update(dict.fromkeys(first, threading.get_ident()))
    try:
        yield model
    finally:
        with _lock:
            _restore(before)
            for each in first:
                del _threads[each]


def _restore(before: list[tuple[PreTrainedModel, dict | None]]) -> None:
    """Let each model be pruned with these keys again, or be unpruned where they are None."""
    for model, keys in before:
        if keys is not None:
            _prune_model(model, keys)
        elif is_ours(type(model)):
            _unprune_model(model)


def _keys_of(model: PreTrainedModel) -> dict | None:
    """The keys that a model is pruned with; None where it is in its stock class."""
    if not is_ours(type(model)):
        return None
    return {name: value for name, value in vars(model.config).items() if name.startswith(PREFIX)}


def _refuse_other_thread(model: nn.Module) -> None:
    if _threads.get(model, threading.get_ident()) != threading.get_ident():
        raise RuntimeError(
            f"Another thread has this {type(model).__name__} in `with pruning(model)`. Keys of pruning belong to the model, "
            "not to a thread: pass pruning_ratio to generate for one request, or give each thread a model of its own."
        )


def _with_prefix(keys: dict) -> dict:
    """`keys` with `pruning_` in front of each name.

    Raises:
        ValueError: for a key that is unknown, and one that comes twice.
    """
    named, legal = {}, [field.name.removeprefix(PREFIX) for field in fields(PruningConfig) if field.name.startswith(PREFIX)]
    for name, value in keys.items():
        short_name = name.removeprefix(PREFIX)
        if short_name not in legal:
            raise ValueError(f"Unknown key {name!r}. prune takes {legal}.")
        if PREFIX + short_name in named:
            raise ValueError(f"{short_name} comes twice, as {named[PREFIX + short_name]!r} and as {value!r}.")
        named[PREFIX + short_name] = value
    return named


# Which models, and which classes


def is_ours(some_class: type) -> bool:
    """Whether a class is one that prunes. It goes by the names of mixins: `trust_remote_code` makes classes of its own."""
    return any(each.__name__ in MIXINS for each in some_class.__mro__)


def classes_of(config_class: type) -> dict[type, type]:
    """The stock classes of a family, the generating model and the model below it, each with ours."""
    module, name = config_class.auto_map_targets["AutoModelForImageTextToText"].split(".")
    module = importlib.import_module(f".{module}", __package__)
    ours = (getattr(module, name), getattr(module, name.replace("ForConditionalGeneration", "Model")))
    return {stock_class(each): each for each in ours}


def models_in(module) -> list[PreTrainedModel]:
    """The outermost models of supported families in a module, with a head or without, in a stock class or in ours.

    Raises:
        ValueError: where there is none, and for one whose class has code of its own.
    """
    found = find_models(module) if isinstance(module, nn.Module) else []
    if not found:
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        of_type = "" if model_type is None else f" of model_type {model_type!r}"
        raise ValueError(f"There is nothing to prune in a {type(module).__name__}{of_type}. {_supported()}")
    return found


def find_models(module: nn.Module) -> list[PreTrainedModel]:
    """As `models_in`, but a module may have none."""
    own_class = undecorated(type(module))
    if isinstance(module, PreTrainedModel) and is_ours(own_class):
        return [module]
    if isinstance(module, PreTrainedModel) and (config_class := _config_class_for(own_class)) is not None:
        classes = classes_of(config_class)
        if own_class in classes:
            return [module]
        if issubclass(own_class, tuple(classes)):
            raise ValueError(
                f"{own_class.__module__}.{own_class.__name__} has code of its own on top of the class of transformers, and "
                f"what that does to visual tokens is not known. {_supported()}"
            )
    return [model for child in module.children() for model in find_models(child)]


def _config_class_for(some_class: type) -> type | None:
    """Ours for a stock class of a family, None for another. A config is not asked: one of a pruned repo states our type."""
    return CONFIG_OF_BASE_MODEL.get(getattr(some_class.config_class, "model_type", None))


def _supported() -> str:
    types = ", ".join(sorted(CONFIG_OF_BASE_MODEL))
    return f"Supported are models in the classes of transformers with model_type {types}."


@functools.lru_cache
def _in_place_of(old_class: type, new_class: type) -> type:
    """`new_class` with the mixin in front that `old_class` has."""
    if undecorated(old_class) is old_class:
        return new_class
    mixin, inner = old_class.__bases__
    content = {name: value for name, value in vars(old_class).items() if name in ("__module__", "__deepcopy__")}
    return type(old_class.__name__.replace(inner.__name__, new_class.__name__), (mixin, new_class), content)


# What changes


def _prune_model(model: PreTrainedModel, keys: dict) -> None:
    config = model.config
    if is_ours(type(model)):
        changed = _pruned_config(config, type(config), keys)
        _refuse_unknown_tower(model, changed)
        _become(config, changed)
        return
    config_class = _config_class_for(undecorated(type(model)))
    classes, changed = classes_of(config_class), _pruned_config(config, config_class, keys)
    new_classes = {}
    for module in model.modules():
        own_class = undecorated(type(module))
        if own_class in classes:
            new_classes[module] = classes[own_class]
    below = next(ours for ours in classes.values() if hasattr(ours, "decoder_layers"))
    new_classes |= pruned_layer_classes(model.get_decoder(), below.decoder_layers)
    check_heads(model)
    new_classes = {module: _in_place_of(type(module), new_class) for module, new_class in new_classes.items()}
    redirections = _redirections(new_classes)
    stock_config = copy.copy(config)
    register_model_type(config_class)  # again, for libraries that came after the config class
    _become(config, changed)
    _change_classes(model, new_classes, redirections)
    try:
        _refuse_unknown_tower(model, config)
    except ValueError:
        _unprune_model(model)
        _become(config, stock_config)
        raise


def _unprune_model(model: PreTrainedModel) -> None:
    config, new_classes = model.config, {}
    for module in model.modules():
        own_class = undecorated(type(module))
        if is_ours(own_class):
            new_classes[module] = stock_class(own_class)
    new_classes = {module: _in_place_of(type(module), new_class) for module, new_class in new_classes.items()}
    redirections = _redirections(new_classes)
    ours, stock = type(config), stock_class(type(config))
    changed = copy.copy(config)
    changed.__class__ = stock
    for name in {field.name for field in fields(ours)} - {field.name for field in fields(stock)}:
        vars(changed).pop(name, None)
    if vars(changed).get("auto_map") == ours.auto_map_targets:
        del changed.auto_map
    _set_model_type(changed)
    if changed.architectures == [undecorated(type(model)).__name__]:  # of a pruned repo, or saved meanwhile
        changed.architectures = [stock_class(type(model)).__name__]
    _become(config, changed)
    _change_classes(model, new_classes, redirections)


def _refuse_unknown_tower(model: PreTrainedModel, config: PruningConfig) -> None:
    """Of a model in our classes; see `PrunedModelMixin.refuse_unknown_tower`."""
    if (settings := config.pruning_settings()) is not None:
        below = next(module for module in model.modules() if hasattr(module, "refuse_unknown_tower"))
        below.refuse_unknown_tower(settings)


def _pruned_config(config, ours: type, keys: dict) -> PruningConfig:
    """A copy of a config in our class, with `keys`, and the defaults of the other keys.

    Raises:
        ValueError: as `PruningConfig.validate_pruning`.
    """
    changed = copy.copy(config)
    changed.__class__ = ours
    of_stock = {field.name for field in fields(stock_class(ours))}
    for field in fields(ours):
        if field.name.startswith(PREFIX) or (field.name not in of_stock and field.name not in vars(config)):
            setattr(changed, field.name, keys.get(field.name, field.default))
    if changed.pruning_layer is None:
        changed.pruning_layer = first_layer_above_keys(changed.get_text_config(decoder=True))
    vars(changed).setdefault("auto_map", dict(ours.auto_map_targets))
    _set_model_type(changed)
    changed.validate_pruning()
    return changed


def _set_model_type(config) -> None:
    """Let a config that names its type itself, as one that was read from a file, name that of its class."""
    if "model_type" in vars(config):
        vars(config)["model_type"] = type(config).model_type


def _become(config, other) -> None:
    config.__class__ = type(other)
    vars(config).clear()
    vars(config).update(vars(other))


def _change_classes(model: nn.Module, new_classes: dict[nn.Module, type], redirections: list[Callable[[], None]]) -> None:
    for redirect in redirections:
        redirect()
    for module, new_class in new_classes.items():
        module.__class__ = new_class
    for name in ("_compiled_call", "_last_compile_config"):  # of `generate` with a static cache, made anew when it is needed
        vars(model).pop(name, None)


# What stands on a single module in place of a method of its class


def _redirections(new_classes: dict[nn.Module, type]) -> list[Callable[[], None]]:
    """What to call so that each replaced `forward` leads to the method of the new class.

    Raises:
        ValueError: for one in which the method of the present class is not found.
    """
    redirections = []
    for module, new_class in new_classes.items():
        present = type(module)
        if is_ours(new_class):
            _refuse_patched_class(undecorated(present))
        old, new = present.forward, new_class.forward
        for name, value in list(vars(module).items()):
            if not callable(value) or isinstance(value, nn.Module | type):
                continue
            found = list(_places_of(old, value, functools.partial(vars(module).__setitem__, name), set()))
            if name == "forward" and not found:
                raise ValueError(
                    f"forward of a {present.__name__} was replaced by {_name(value)}, which does not lead to the method of the "
                    "class: it would run as before. Prune the model first, and let that replace forward afterwards."
                )
            redirections += [functools.partial(put, new) for put in found]
    return redirections


def _refuse_patched_class(stock: type) -> None:
    """Raise a ValueError where another library has put its own `forward` into a class of transformers."""
    home = getattr(stock.forward, "__module__", None) or ""
    if not home.startswith("transformers."):
        raise ValueError(
            f"{stock.__name__}.forward was replaced by code of {home!r} for all models of this process. Pruning does not know "
            "what that does to visual tokens. Load the model without it."
        )


def _name(function) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _places_of(method: Callable, value, put: Callable, seen: set[int]) -> Iterator[Callable[[Callable], None]]:
    """For each place in a callable that holds `method`, bound or not: what puts another method there.

    Args:
        value: where to look. It may be a bound method, a closure, a `functools.partial`, or a callable object.
        put: what puts another value in place of this one.
    """
    if value is method:
        yield put
        return
    if isinstance(value, types.MethodType):
        if value.__func__ is method:
            yield lambda new: put(types.MethodType(new, value.__self__))
            return
        value = value.__func__
    if id(value) in seen or not callable(value) or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        yield from _places_of(method, value.func, lambda new: value.__setstate__((new, *value.__reduce__()[2][1:])), seen)
    for cell in getattr(value, "__closure__", None) or ():
        if cell != types.CellType():  # an empty one has no contents
            yield from _places_of(method, cell.cell_contents, functools.partial(setattr, cell, "cell_contents"), seen)
    for name, held in list(getattr(value, "__dict__", {}).items()):
        yield from _places_of(method, held, functools.partial(vars(value).__setitem__, name), seen)


# Processors


def _prune_processor(processor: ProcessorMixin) -> ProcessorMixin:
    if isinstance(processor, DrawMixin) or any(each.__name__ == "DrawMixin" for each in type(processor).__mro__):
        return processor
    ours = {stock_class(each): each for each in reversed(processor_classes())}
    if type(processor) not in ours:
        names = ", ".join(sorted(each.__name__ for each in ours))
        raise ValueError(f"A {type(processor).__name__} can not draw what was kept. Supported are {names}.")
    new_class = ours[type(processor)]
    for name, parameter in inspect.signature(new_class.__init__).parameters.items():
        if name not in inspect.signature(type(processor).__init__).parameters:
            vars(processor)[name] = parameter.default
    processor.__class__ = new_class
    return processor


def _unprune_processor(processor: ProcessorMixin) -> ProcessorMixin:
    ours, stock = type(processor), stock_class(type(processor))
    if ours is not stock:
        added = {"seen_images", *inspect.signature(ours.__init__).parameters} - {*inspect.signature(stock.__init__).parameters}
        for name in added:
            vars(processor).pop(name, None)
        processor.__class__ = stock
    return processor


def processor_classes() -> list[type]:
    """Ours of all families."""
    names = (config.auto_map_targets["AutoProcessor"].split(".")[1] for config in CONFIG_OF_BASE_MODEL.values())
    return [getattr(processing, name) for name in names]
