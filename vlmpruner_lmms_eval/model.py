"""A pruned model as lmms-eval calls it: chat messages in, texts out.

Differences from the library's own wrappers: one class serves every family of this project, batches of any size are padded on
the left, an error is raised instead of scored as an empty answer, and each batch's record is checked.
"""

import time

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm import tqdm
from transformers.video_utils import load_video

from .loading import PRUNING_KEYS, check_record, load, tokens_kept


NO_END = "\n\n"  # what lmms-eval has in `until` where a task says nothing; answers in paragraphs would be cut


class VLMPruner(lmms):
    """`lmms-eval --model vlmpruner --model_args pretrained=...,pruning_ratio=...`

    What was kept is in the results file, under `throughput`: `avg_pruning_ratio`, `avg_visual_tokens`, `avg_tokens_kept` and
    `avg_tokens_kept_all_layers`, means over the grids that the first process pruned (see `tokens_kept`).

    Args:
        pretrained: folder or Hub id of a base checkpoint of a supported family, or of a pruned repo.
        pruning_ratio: in [0, 1); 0 is the unpruned model. Has no default, so that the results file names it.
        batch_size: requests that are answered together; a number.
        device: by default the GPU of this process, or the CPU.
        device_map: "auto" spreads one model over several GPUs; not with several processes.
        dtype, attn_implementation, revision: as in `from_pretrained`.
        max_num_frames: frames of a video, evenly spaced; all of a shorter one.
        min_pixels, max_pixels: as in the processor; for Qwen models.
        system_prompt: text in front of each conversation.
        max_new_tokens: for tasks that do not say.
        kwargs: other `pruning_*` keys: pruning_method, pruning_preset and so on, by default as in the config of `pretrained`.

    Raises:
        ValueError: for an argument of another name, and for values outside their range.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        pruning_ratio: float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        max_num_frames: int = 32,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 1024,
        max_batch_size: int | None = None,
        **kwargs,
    ):
        super().__init__()
        if unknown := sorted(set(kwargs) - set(PRUNING_KEYS)):
            raise ValueError(f"Unknown model_args {', '.join(unknown)}. The pruning keys are {', '.join(PRUNING_KEYS)}.")
        if pruning_ratio is None:
            raise ValueError("Give pruning_ratio in model_args, in [0, 1); 0 is the unpruned model.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}.")
        self.accelerator = Accelerator()
        if device_map is not None and self.accelerator.num_processes > 1:
            raise ValueError(
                f"device_map={device_map!r} spreads one model over devices, but {self.accelerator.num_processes} processes "
                "run, each with a model of its own. Start one process, or leave it out."
            )
        options = {"pruning_ratio": pruning_ratio, "dtype": dtype} | kwargs
        for name, value in (("attn_implementation", attn_implementation), ("device_map", device_map)):
            if value is not None:
                options[name] = value
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        pixels = {name: value for name, value in pixels.items() if value is not None}
        self.model, self.processor = load(pretrained, revision, pixels, **options)
        if device_map is None:
            self.model.to(self.accelerator.device if device is None else device)
        self.device, self.tokenizer, self.batch_size = self.model.device, self.processor.tokenizer, int(batch_size)
        self.max_num_frames, self.max_new_tokens, self.system_prompt = max_num_frames, max_new_tokens, system_prompt
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, greedy unless the task says otherwise."""
        order = Collator(
            [request.args for request in requests],
            lambda args: (len(str(args[0])), args[3]),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        results, records, start = [], [], time.perf_counter()
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as progress:
            for chunk in order.get_batched(n=self.batch_size):
                answers, record = self._answer(chunk)
                results += answers
                records += [] if record is None else [record]
                progress.update(len(answers))
        seconds, num_tokens = time.perf_counter() - start, sum(result.token_counts.output_tokens for result in results)
        settings = self.model.config.pruning_settings()
        kept = {"pruning_ratio": 0.0 if settings is None else settings.ratio}
        kept |= tokens_kept(records, self.model.config.get_text_config(decoder=True).num_hidden_layers)
        log_metrics(seconds, num_tokens, num_tokens / max(seconds, 1e-9), kept | {"num_requests": len(requests)})
        return order.get_original(results)

    def _answer(self, chunk: list[tuple]) -> tuple[list[GenerationResult], object]:
        """The answers to requests of one generation setting, and the record of what was kept."""
        chats = []
        for _, doc_to_messages, _, number, task, split in chunk:
            messages = doc_to_messages(self.task_dict[task][split][number])
            if self.system_prompt:
                messages = self._apply_system_prompt(messages, self.system_prompt)
            chats.append(ChatMessages(messages=messages))
        inputs, num_of_modality = self._inputs(chats)
        options, until = self._generation_options(chunk[0][2])
        outputs = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        record = self.model.get_pruning_record(outputs)
        check_record(record, num_of_modality, self.model.config.pruning_settings() is not None)
        tokens = outputs.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        num_in, num_out = inputs["attention_mask"].sum(1).tolist(), self._lengths(tokens)
        answers = []
        for text, *counts in zip(texts, num_in, num_out, strict=True):
            for end in until:
                text = text.split(end)[0]
            answers.append(GenerationResult(text, TokenCounts(*counts)))
        return answers, record

    def _inputs(self, chats: list[ChatMessages]) -> tuple[dict, dict[str, int]]:
        """What the model takes, and how many images and videos are in it.

        Raises:
            ValueError: for sound.
        """
        media = [chat.extract_media() for chat in chats]
        images, videos, sounds = ([each for part in media for each in part[kind]] for kind in range(3))
        if sounds:
            raise ValueError(f"{len(sounds)} sounds in a batch, but the model takes text, images and videos.")
        texts = [
            self.processor.apply_chat_template(chat.to_hf_messages(), add_generation_prompt=True, tokenize=False)
            for chat in chats
        ]
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            options["add_special_tokens"] = False
        if images:
            options["images"] = [row for row, *_ in media] if self.processor.images_by_row else images
        if videos:
            frames, metadata = zip(*(load_video(video, sample_indices_fn=self._places) for video in videos), strict=True)
            options |= {"videos": list(frames), "video_metadata": list(metadata), "do_sample_frames": False}
        inputs = self.processor(text=texts, **options).to(self.device, self.model.dtype)
        return inputs, {"image": len(images), "video": len(videos)}

    def _places(self, metadata, **_) -> np.ndarray:
        """Which frames of a video are seen."""
        num_frames = min(self.max_num_frames, metadata.total_num_frames)
        return np.linspace(0, metadata.total_num_frames - 1, num_frames).round().astype(int)

    def _generation_options(self, task_options: dict) -> tuple[dict, list[str]]:
        """The task's options for `generate`, and the strings that end an answer. Options of other models are left out."""
        sample = bool(task_options.get("do_sample", True)) and (task_options.get("temperature") or 0) > 0
        options = {
            "do_sample": sample,
            "num_beams": task_options.get("num_beams") or 1,
            "max_new_tokens": task_options.get("max_new_tokens") or self.max_new_tokens,
        }
        if sample:
            options |= {name: task_options[name] for name in ("temperature", "top_p", "top_k") if task_options.get(name)}
        until = task_options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        return options, [end for end in until if end != NO_END]

    def _lengths(self, tokens: torch.Tensor) -> list[int]:
        """Generated tokens of each row, the end of sequence included."""
        ends = self.model.generation_config.eos_token_id
        is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device).flatten()) if ends is not None else tokens < 0
        after = is_end.cumsum(1) - is_end.long()
        return (after == 0).sum(1).tolist()

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError(
            "The vlmpruner model answers by generating; it does not score given answers. Choose another task."
        )

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("The vlmpruner model does not answer in several rounds. Choose another task.")
