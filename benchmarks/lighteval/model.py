"""A pruned model for `lighteval custom`. docs/evaluation.md has the command.

lighteval's own class for pictures opens an exported repo with its custom code, but it looks at no record, and it finds old
answers by the model's name and arguments, which say nothing of how the config prunes. So this class takes the ratio as an
argument, keeps no answers, and checks the record of every batch, as the plugin for lmms-eval does.
"""

import json
from types import SimpleNamespace

import torch
from lighteval.models import abstract_model
from lighteval.models.model_output import ModelResponse
from pydantic import Field, create_model
from tqdm import tqdm

from vlmpruner_lmms_eval.loading import PRUNING_KEYS, check_record, load, tokens_kept


# What lighteval writes into the results file as `model_config`. An unknown argument is an error.
Arguments = create_model(
    "Arguments",
    __base__=abstract_model.ModelConfig,
    model_name=str,
    pruning_ratio=(float, Field(ge=0, lt=1)),
    **dict.fromkeys(sorted({*PRUNING_KEYS} - {"pruning_ratio"}), (str | None, None)),
    batch_size=(int, Field(1, ge=1)),
    dtype=(str, "auto"),
    device=(str | None, None),
    revision=(str | None, None),
    kept=(dict, {}),
)


def value_of(text):
    """A number or a truth value where the text is one in JSON."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


class VLMPruner(abstract_model.LightevalModel):
    """Greedy answers of a pruned model, in one process.

    Args:
        config: its `model_name` holds the arguments, as `lighteval accelerate` takes them: `model_name=FOLDER_OR_ID,
            pruning_ratio=0.889` and, as wanted, other `pruning_*` keys, batch_size, dtype, device, revision, system_prompt.

    Raises:
        ValueError: for an unknown argument, a bad value, and without a ratio.
    """

    def __init__(self, config):
        self.config = Arguments.from_args(config.model_name)
        self._cache = SimpleNamespace(_init_registry=lambda registry: None)  # the pipeline wants one
        keys = {key: value_of(text) for key in PRUNING_KEYS if (text := getattr(self.config, key)) is not None}
        self.model, self.processor = load(self.config.model_name, self.config.revision, dtype=self.config.dtype, **keys)
        self.model.to(self.config.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    tokenizer = property(lambda self: self.processor.tokenizer)
    add_special_tokens = property(lambda self: False)
    max_length = property(lambda self: self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @torch.inference_mode()
    def greedy_until(self, docs: list) -> list[ModelResponse]:
        """Raises a RuntimeError where the record of a batch is not what the ratio says."""
        size, responses, records = self.config.batch_size, [], []
        for first in tqdm(range(0, len(docs), size), desc="Greedy generation"):
            answers, record = self._answer(docs[first : first + size])
            responses += answers
            records += [] if record is None else [record]
        self.config.kept = tokens_kept(records, self.model.config.get_text_config(decoder=True).num_hidden_layers)
        return responses

    def _answer(self, docs: list) -> tuple[list[ModelResponse], object]:
        if any(doc.num_samples != 1 for doc in docs):
            raise ValueError("Answers are greedy, so of a question there is one. Choose a task with num_samples=[1].")
        texts, images = [self._prompt(doc) for doc in docs], [list(doc.images or []) for doc in docs]
        flat = [image for row in images for image in row]
        options = {"images": images if self.processor.images_by_row else flat} if flat else {}
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            options["add_special_tokens"] = False
        inputs = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **options)
        inputs = inputs.to(self.model.device, self.model.dtype)
        length = self.config.generation_parameters.max_new_tokens or max(doc.generation_size or 0 for doc in docs) or 256
        outputs = self.model.generate(**inputs, max_new_tokens=length, do_sample=False, return_dict_in_generate=True)
        record = self.model.get_pruning_record(outputs)
        check_record(record, {"image": len(flat)}, self.model.config.pruning_settings() is not None)
        tokens = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        answers = []
        found = self.processor.batch_decode(tokens, skip_special_tokens=True)
        for text, prompt, row, doc in zip(found, texts, tokens, docs, strict=True):
            for end in doc.stop_sequences or []:
                text = text.split(end)[0]
            answers.append(ModelResponse(input=prompt, text=[text], output_tokens=[row.tolist()]))
        return answers, record

    def _prompt(self, doc) -> str:
        """Pictures first, then the question; the task's instruction is a system message, as in lighteval."""
        content = [*({"type": "image"} for _ in doc.images or []), {"type": "text", "text": doc.query}]
        messages = [{"role": "user", "content": content}]
        if instruction := (self.config.system_prompt or "") + (doc.instruction or ""):
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": instruction}]})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def loglikelihood(self, docs: list):
        raise NotImplementedError("This model answers by generating; it does not score given answers. Choose another task.")

    loglikelihood_rolling = loglikelihood
