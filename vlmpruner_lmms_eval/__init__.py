"""VLM-Pruner inside lmms-eval: a plugin with the model name `vlmpruner`, for `lmms-eval --model vlmpruner --model_args ...`.

lmms-eval finds `models` by its entry point. Nothing of lmms-eval is patched. docs/evaluation.md has the commands.

    loading.py     from a folder or a Hub id, exported or base, to the pruned class of this package; knows no lmms-eval
    model.py       the model as lmms-eval calls it
"""


def models() -> list:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="vlmpruner", chat_class_path="vlmpruner_lmms_eval.model.VLMPruner")]
