"""The worker of a pruned model: vLLM's own, which also works out for each step which tokens the layers from the pruning layer
on have, and gives them attention metadata and cache slots accordingly.

A step that brings an image runs layer by layer (`models.py`), on fewer tokens from the pruning layer on. Every other step runs
vLLM's own forward pass, compiled and in piecewise CUDA graphs where the engine uses them: all its tokens go on, and only the
lengths and slots of the pruned layers differ. A step of requests that lost nothing is the stock model's in every respect.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import AttentionGroup

from vlmpruner.token_pruning import Selection
from vlmpruner.token_pruning_device import GridBatch

from .requests import PrunedGrid, RequestPruning, request_pruning


@dataclass(frozen=True)
class StepGrid:
    """A grid that a step selects from: of which request, and its `rows` [num_visual] among the step's tokens, on the host."""

    request_id: str
    grid: PrunedGrid
    rows: torch.LongTensor
    is_recorded: bool


class PruningStep:
    """Which tokens of one step the pruned layers have.

    Args:
        request_ids: of the requests of the step.
        pruning: what each of them loses.
        num_computed: [num_requests] int, tokens of each before the step.
        num_new: [num_requests] int, tokens of each in the step.
        device: where the tensors are made.

    Attributes:
        grids: those that the step selects from, in the order of its tokens.
        num_held: [num_requests], entries of each request in the pruned layers after the step.
        num_kept: [num_requests], those among them that the step adds.
        selection: what was kept, once the pruning layer has run.
    """

    def __init__(
        self,
        request_ids: Sequence[str],
        pruning: Sequence[RequestPruning],
        num_computed: np.ndarray,
        num_new: np.ndarray,
        device: torch.device,
    ):
        self.device, self.num_tokens = device, int(num_new.sum())
        self.grids: list[StepGrid] = []
        self.selection: Selection | None = None
        self.num_held, self.num_kept = num_computed + num_new, num_new.astype(np.int64)
        row = 0
        for number, (request_id, loses) in enumerate(zip(request_ids, pruning, strict=True)):
            start, end = int(num_computed[number]), int(num_computed[number] + num_new[number])
            for medium in loses.media_between(start, end):
                self.num_kept[number] -= medium.num_dropped
                for grid in medium.grids:
                    self.grids.append(StepGrid(request_id, grid, grid.places - start + row, loses.wants_record))
            self.num_held[number] -= loses.num_dropped(end)
            row += end - start
        self.is_stock = not self.grids and bool((self.num_held == num_computed + num_new).all())

    @property
    def total_kept(self) -> int:
        return int(self.num_kept.sum())

    @cached_property
    def places(self) -> torch.LongTensor:
        """[total_kept] the entry of its request's shorter cache that each kept token takes."""
        past, starts = self.num_held - self.num_kept, self.num_kept.cumsum() - self.num_kept
        places = np.arange(self.total_kept) + np.repeat(past - starts, self.num_kept)
        return torch.from_numpy(places).to(self.device)

    @cached_property
    def shorter(self) -> dict:
        """The fields of `CommonAttentionMetadata` that differ in the pruned layers; the same objects for all their groups."""
        starts = torch.from_numpy(np.concatenate([[0], self.num_kept.cumsum()]).astype(np.int32))
        lengths = torch.from_numpy(self.num_held.astype(np.int32))
        return {
            "query_start_loc": starts.to(self.device),
            "query_start_loc_cpu": starts,
            "seq_lens": lengths.to(self.device),
            "seq_lens_cpu_upper_bound": lengths,
            "num_actual_tokens": self.total_kept,
            "max_query_len": int(self.num_kept.max()),
            "max_seq_len": int(self.num_held.max()),
            "positions": None,
            "_num_computed_tokens_cache": None,
            "_token_to_req_indices_cache": None,
        }

    @cached_property
    def rows(self) -> torch.LongTensor:
        """[num_visual] the rows of all grids' tokens among those of the step, one grid after another."""
        return torch.cat([grid.rows for grid in self.grids]).to(self.device)

    @cached_property
    def batch(self) -> GridBatch:
        """The grids, for the selection."""
        grids = [step_grid.grid for step_grid in self.grids]
        required = [len(grid.places) - 1 if grid.keeps_last else None for grid in grids]
        sides, num_keep = [grid.sides for grid in grids], [grid.num_keep for grid in grids]
        return GridBatch(sides, num_keep, self.device, required)

    def kept_rows(self) -> torch.LongTensor:
        """[total_kept] the rows of the tokens that go on, ascending."""
        goes_on = torch.ones(self.num_tokens, dtype=torch.uint8, device=self.device)
        goes_on[self.rows] = 0
        goes_on[self.rows[self.selection.kept]] = 1
        # A stable sort, unlike `nonzero`, does not ask the device how many there are.
        return goes_on.argsort(descending=True, stable=True)[: self.total_kept]

    def kept_places(self) -> dict[str, dict[int, list[int]]]:
        """Where the kept tokens are on their grids, for requests that asked: id -> first place of the grid -> places on it."""
        recorded: dict[str, dict[int, list[int]]] = {}
        if not any(step_grid.is_recorded for step_grid in self.grids):
            return recorded
        kept = self.batch.layout.place[self.selection.kept].cpu().split(self.selection.counts)
        for step_grid, places in zip(self.grids, kept, strict=True):
            if step_grid.is_recorded:
                recorded.setdefault(step_grid.request_id, {})[int(step_grid.grid.places[0])] = places.tolist()
        return recorded


class KeptTokensGroup(AttentionGroup):
    """The layers of a cache group that hold kept tokens alone: their metadata is that of fewer tokens."""

    def build_metadata(self, common_attn_metadata: CommonAttentionMetadata, *args, **kwargs):
        if (step := self.runner.pruning_step) is not None:
            common_attn_metadata = replace(common_attn_metadata, **step.shorter)
        return super().build_metadata(common_attn_metadata, *args, **kwargs)


class PrunedRunnerMixin:
    """Put in front of a model runner's class.

    Attributes:
        pruning: the features of each request of the last step, and what it loses, by request id.
        pruning_step: the step that is running, or None where it is the stock model's.
        kept_places: what the step has to report to the scheduler.
    """

    def start_pruning(self) -> None:
        self.pruning: dict[str, tuple[list, RequestPruning]] = {}
        self.pruning_step: PruningStep | None = None
        self.kept_places: dict[str, dict[int, list[int]]] = {}

    def initialize_metadata_builders(self, kv_cache_config, kernel_block_sizes) -> None:
        super().initialize_metadata_builders(kv_cache_config, kernel_block_sizes)
        for number in self._pruned_groups():
            for group in self.attn_groups[number]:
                group.__class__, group.runner = KeptTokensGroup, self

    def _pruned_groups(self) -> list[int]:
        groups = self.kv_cache_config.kv_cache_groups
        return [number for number, group in enumerate(groups) if group.kv_cache_spec.is_pruned]

    def execute_model(self, *args, **kwargs):
        try:
            return super().execute_model(*args, **kwargs)
        finally:
            self.pruning_step = None  # a dummy run that follows is the stock model's

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens: np.ndarray):
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        request_ids = self.input_batch.req_ids
        self.pruning = {request_id: self._pruning_of(request_id) for request_id in request_ids}
        pruning = [loses for _, loses in self.pruning.values()]
        num_computed = self.input_batch.num_computed_tokens_cpu[: len(request_ids)]
        step = PruningStep(request_ids, pruning, num_computed, num_scheduled_tokens, self.device)
        if not step.is_stock:
            self.pruning_step = step
            for number in self._pruned_groups():
                self.input_batch.block_table[number].compute_slot_mapping(
                    len(request_ids), step.shorter["query_start_loc"], step.places
                )
        return prepared

    def _pruning_of(self, request_id: str) -> tuple[list, RequestPruning]:
        """What a request loses, with the features that it follows from: another request may have had the same id."""
        state = self.requests[request_id]
        known = self.pruning.get(request_id)
        if known is not None and known[0] is state.mm_features:
            return known
        config = self.model_config.hf_config
        return state.mm_features, request_pruning(config, state.mm_features, state.sampling_params, state.num_prompt_tokens)

    def _get_slot_mappings(self, *args, **kwargs):
        of_groups, of_layers = super()._get_slot_mappings(*args, **kwargs)
        step = self.pruning_step
        if step is None or not step.grids:  # all tokens of the step go on
            return of_groups, of_layers
        for number in self._pruned_groups():
            slots = of_groups[number][: step.total_kept]
            of_groups[number] = slots
            of_layers |= dict.fromkeys(self.kv_cache_config.kv_cache_groups[number].layer_names, slots)
        return of_groups, of_layers

    def _model_forward(self, *args, **kwargs):
        step = self.pruning_step
        if step is None or not step.grids:
            return super()._model_forward(*args, **kwargs)
        outputs = super()._model_forward(*args, pruning_step=step, **kwargs)
        self.kept_places = step.kept_places()
        return outputs

    def sample_tokens(self, grammar_output):
        output = super().sample_tokens(grammar_output)
        if self.kept_places:
            # Asynchronous scheduling wraps the output until its tokens are on the host.
            getattr(output, "_model_runner_output", output).kept_places = self.kept_places
            self.kept_places = {}
        return output


@lru_cache
def _pruned_runner_class(runner_class: type) -> type:
    return type(f"Pruned{runner_class.__name__}", (PrunedRunnerMixin, runner_class), {})


class PrunedWorkerMixin:
    """Put in front of a worker's class."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner.__class__ = _pruned_runner_class(type(self.model_runner))
        self.model_runner.start_pruning()


class PruningWorker(PrunedWorkerMixin, Worker):
    """vLLM's worker on a GPU, with pruning."""
