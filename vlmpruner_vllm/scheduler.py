"""The scheduler of a pruned model: vLLM's own, which also tells the cache groups what each request loses, keeps an image in one
step, and gives the record of what was kept to the response."""

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .kv_cache import KeptTokensManager, check_groups
from .requests import RequestPruning, request_pruning


logger = init_logger("vllm.vlmpruner")


class PrunedSchedulerMixin:
    """Put in front of a scheduler's class.

    Attributes:
        pruning: what each request loses, by request id, as long as it holds blocks.
        kept: for a request that asked for it: a grid's first place in the prompt -> the places of its kept tokens on the grid.
    """

    def __init__(self, vllm_config, **kwargs):
        super().__init__(vllm_config=vllm_config, **kwargs)
        self.pruning: dict[str, RequestPruning] = {}
        self.kept: dict[str, dict[int, list[int]]] = {}
        check_groups(self.kv_cache_config.kv_cache_groups)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, KeptTokensManager):
                manager.pruning = self.pruning

    def add_request(self, request: Request) -> None:
        self._note(request)
        super().add_request(request)

    def _update_request_as_session(self, session: Request, update) -> None:
        super()._update_request_as_session(session, update)
        self._note(session)

    def _note(self, request: Request) -> None:
        config = self.vllm_config.model_config.hf_config
        self.pruning[request.request_id] = request_pruning(
            config, request.mm_features, request.sampling_params, request.num_prompt_tokens
        )

    def _try_schedule_encoder_inputs(self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args, **kwargs):
        """Ends a step before an image that it would cut. `disable_chunked_mm_input` alone does not see to it: it steps back
        from inside an image, but a request that already waits right at one may still be cut there."""
        for medium in self.pruning[request.request_id].media:
            if medium.start < num_computed_tokens + num_new_tokens < medium.end:
                num_new_tokens = max(medium.start - num_computed_tokens, 0)
                break
        return super()._try_schedule_encoder_inputs(request, num_computed_tokens, num_new_tokens, *args, **kwargs)

    def update_from_output(self, scheduler_output, model_runner_output):
        for request_id, places in getattr(model_runner_output, "kept_places", {}).items():
            if request_id in self.pruning:  # else it was aborted while the step ran
                self.kept.setdefault(request_id, {}).update(places)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _connector_finished(self, request: Request):
        """What a response carries beside its text: the record, in the place of a KV connector's parameters."""
        pruning, kept = self.pruning[request.request_id], self.kept.pop(request.request_id, {})
        grids = [grid for medium in pruning.media for grid in medium.grids]
        if not grids:
            return False, None
        record = []
        for grid in grids:
            entry = {"modality": grid.modality, "number": grid.medium, "grid": list(grid.sides)}
            record.append(entry | {"num_visual": len(grid.places), "num_kept": grid.num_keep})
            if pruning.wants_record:
                record[-1]["kept"] = kept.get(int(grid.places[0]))
        logger.debug("Request %s kept of its visual tokens: %s", request.request_id, record)
        return False, {"pruning_record": record}

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.pruning.pop(request.request_id, None)


class PruningScheduler(PrunedSchedulerMixin, Scheduler):
    """See `PrunedSchedulerMixin`."""


class PruningAsyncScheduler(PrunedSchedulerMixin, AsyncScheduler):
    """See `PrunedSchedulerMixin`."""


def make_scheduler(vllm_config, **kwargs) -> PrunedSchedulerMixin:
    """For `scheduler_cls`. A function, because whether scheduling is asynchronous is decided after `scheduler_cls`."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (PruningAsyncScheduler if is_async else PruningScheduler)(vllm_config, **kwargs)
