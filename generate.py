"""`model.generate(**inputs, custom_generate=REPO, trust_remote_code=True, pruning_ratio=0.889)`: one request, pruned.

transformers calls `generate` here in place of its own method. `custom_generate.py` writes the repo that this needs.
"""

from typing import TYPE_CHECKING

from .in_place import pruning


if TYPE_CHECKING:
    # `pruning` imports the module of the model's family by its name. transformers brings along what it finds in import lines.
    from .modeling_vlmpruner_glm4v import VLMPrunerGlm4vModel  # noqa: F401
    from .modeling_vlmpruner_idefics3 import VLMPrunerIdefics3Model  # noqa: F401
    from .modeling_vlmpruner_internvl import VLMPrunerInternVLModel  # noqa: F401
    from .modeling_vlmpruner_llava import VLMPrunerLlavaModel  # noqa: F401
    from .modeling_vlmpruner_llava_next_video import VLMPrunerLlavaNextVideoModel  # noqa: F401
    from .modeling_vlmpruner_mistral3 import VLMPrunerMistral3Model  # noqa: F401
    from .modeling_vlmpruner_qwen2vl import VLMPrunerQwen2VLModel  # noqa: F401
    from .modeling_vlmpruner_qwen3_5 import VLMPrunerQwen3_5Model  # noqa: F401
    from .modeling_vlmpruner_qwen3vl import VLMPrunerQwen3VLModel  # noqa: F401


# What says where this repo is, which transformers hands on as well.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "token")
# What `generate` of a pruned model takes itself.
OF_A_REQUEST = ("pruning_ratio", "pruning_question")


def generate(model, pruning_method: str = "vlm_pruner", **arguments):
    """`model.generate(**arguments)` with the visual tokens of its images and videos pruned. The model is as before afterwards.

    Args:
        model: a model of a supported family, in a class of transformers or in a pruned one.
        pruning_method: a name of docs/methods.md.
        arguments: of `generate`, and other keys of docs/settings.md, as `pruning_ratio`. A key that is not given has its
            default. `pruning_question` is the text of each row, for methods that look at it.

    Returns:
        What `generate` returns. With `return_dict_in_generate=True` that has an attribute `pruning_record`: what was kept of
        each image, or None where nothing was pruned.

    Raises:
        ValueError: for a model that is not supported, and a key that is unknown or out of range.
        RuntimeError: while another thread generates with this model.
    """
    arguments = {name: value for name, value in arguments.items() if name not in HUB_ARGUMENTS}
    is_key = {name: name.startswith("pruning_") and name not in OF_A_REQUEST for name in arguments}
    with pruning(model, method=pruning_method, **{name: value for name, value in arguments.items() if is_key[name]}):
        # Not `model.generate`: that may be this function, where the weights lie in this repo, too.
        outputs = type(model).generate(model, **{name: value for name, value in arguments.items() if not is_key[name]})
        if hasattr(outputs, "sequences"):
            outputs.pruning_record = model.get_pruning_record(outputs)
    return outputs
