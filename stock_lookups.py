"""What libraries know of a stock model by its model type, its class name or its source file, they know of ours too.

transformers, PEFT and others keep tables by model type: which old names of weights a checkpoint or a LoRA adapter may have,
which tokenizer goes with a model, which layers an adapter is put on, which models see images. Some also go by the name of a
class, or read the file that holds it. Our configs have model types of their own, our classes have names of their own, and our
files hold a difference alone. So such a look-up would find nothing, mostly without a word. Here it finds what it finds for the
base model:

- By model type or config class: ours stand in the same tables with the base's entry (`TABLES`, `TABLES_BY_CONFIG`), from the
  moment when the config classes are imported. A library that is imported later gets them when the next model is made.
- By class name: a renaming of weights is registered for a class of ours when the class is made.
- By source file: `AskedAsStockMixin` hands the question on to the stock class. `processing.py` does so for processors.

A config does not report the base's model type instead, because programs choose a class by it, too. One that reads "llava" takes
the stock class, and gives an unpruned model under the name of a pruned one; `llava_hf` of lmms-eval would. One that reads our
type stops with an error. For the same reason `AutoConfig` has no entry of ours: a pruned repo is opened by its own code alone.
"""

import sys

from transformers.conversion_mapping import (
    USER_REGISTERED_MAPPINGS,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import image_processing_auto, tokenization_auto, video_processing_auto


# Module -> its tables, of which a version may lack some. Others are not for ours: they choose the class of a config or a model.
TABLES = {
    "transformers.conversion_mapping": ("_MODEL_TO_CONVERSION_PATTERN",),  # PEFT takes a copy when it is imported
    "transformers.models.auto.modeling_auto": (
        "MODEL_MAPPING_NAMES",
        "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    ),
    "transformers.models.auto.tokenization_auto": (
        "TOKENIZER_MAPPING_NAMES",
        "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS",
    ),
    "transformers.models.auto.processing_auto": ("PROCESSOR_MAPPING_NAMES",),
    "transformers.models.auto.image_processing_auto": ("IMAGE_PROCESSOR_MAPPING_NAMES",),
    "transformers.models.auto.video_processing_auto": ("VIDEO_PROCESSOR_MAPPING_NAMES",),
    "transformers.cli.serving.utils": ("_RESPONSE_TEMPLATE_FALLBACKS",),
    "peft.utils.transformers_weight_conversion": ("_MODEL_TO_CONVERSION_PATTERN",),
    "peft.utils.constants": ("TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING",),
}
# Tables by config class. That of processors is not among them, because ours have classes of their own.
TABLES_BY_CONFIG = (
    tokenization_auto.TOKENIZER_MAPPING,
    image_processing_auto.IMAGE_PROCESSOR_MAPPING,
    video_processing_auto.VIDEO_PROCESSOR_MAPPING,
)


def stock_class(our_class: type) -> type | None:
    """The class of transformers that one of ours extends; None for a mixin."""
    return next((each for each in our_class.__mro__ if each.__module__.startswith("transformers.")), None)


def undecorated(some_class: type) -> type:
    """A class without the mixin that FSDP2, or other code of torch.distributed, puts in front of the class of one module."""
    bases = some_class.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__module__.startswith("torch.distributed.") else some_class


def register_model_type(config_class: type) -> None:
    """Let the tables of all libraries that are imported have the base's entries for `config_class`, one of ours, too."""
    own, base = config_class.model_type, config_class.base_model_type
    ours = config_class.__name__.removesuffix("Config")
    stock = stock_class(config_class).__name__.removesuffix("Config")
    class_names = {f"{stock}{part}": f"{ours}{part}" for part in ("Model", "ForConditionalGeneration")}
    for module, names in TABLES.items():
        for name in names:
            _add_entry(getattr(sys.modules.get(module), name, {}), own, base, class_names)
    for table in TABLES_BY_CONFIG:
        getattr(table, "_reverse_config_mapping", {}).setdefault(config_class.__name__, base)
    register_weight_renaming(own, base)


def _add_entry(table: dict | set, own: str, base: str, class_names: dict[str, str]) -> None:
    """Where `table` has the model type `base`, alone or in a tuple of types, give it `own`, with our class for a stock one."""
    if isinstance(table, set):
        table |= {own} if base in table else set()
        return
    for key, entry in list(table.items()):
        if key == base:
            table.setdefault(own, class_names.get(entry, entry) if isinstance(entry, str) else entry)
        elif isinstance(key, tuple) and base in key:
            table.setdefault((own,), entry)


def register_weight_renaming(own: str, stock: str) -> None:
    """Let the library rename parameters of checkpoints and adapters for `own` as for `stock`: model types or class names.

    It skips custom code of which neither is registered, and the weights stay as they were drawn.
    """
    if own in USER_REGISTERED_MAPPINGS:
        return  # and it may hold more by now, of a fusion of layers
    renaming = get_checkpoint_conversion_mapping(stock)
    if renaming is not None:
        register_checkpoint_conversion_mapping(own, renaming, overwrite=True)


class AskedAsStockMixin:
    """Put in front of a stock model, whose source file tells the library what can be set."""

    def __init_subclass__(cls):
        super().__init_subclass__()
        if stock := stock_class(cls):  # else a mixin of a family
            register_weight_renaming(cls.__name__, stock.__name__)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return stock_class(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return stock_class(cls)._can_set_experts_implementation()
