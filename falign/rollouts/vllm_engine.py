"""Sampling from a vLLM server over HTTP; vLLM itself is never imported."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from falign.errors import ConfigError, EngineError, RolloutError
from falign.rollouts.base import (
    Engine,
    EngineCapabilities,
    SampledCompletion,
    SamplingParams,
    check_prompts,
    check_request,
)
from falign.rollouts.gap import Canary
from falign.rollouts.vllm_adapters import AdapterSync, why_not_servable
from falign.rollouts.vllm_client import HTTPClient, ServerLostError
from falign.rollouts.vllm_completions import VersionUnknownError, complete
from falign.rollouts.vllm_description import describe_server
from falign.rollouts.vllm_merged import MergedSync
from falign.rollouts.vllm_published import Published, Sync
from falign.seeds import mixed

__all__ = ["VLLMEngine"]

_MOST_LOSSES = 3  # losses of the server during one call; more suggest that the call itself causes them
_MOST_REQUESTS = 64  # concurrent requests, each for one prompt
T = TypeVar("T")


class VLLMEngine(Engine):
    """Sampling from a vLLM server, which gets every version of the weights through a shared folder.

    Each prompt is one request with its own seed, because vLLM gives all prompts of a request the same random numbers.
    The engine waits for a server that is unavailable, sends it the published versions again from their folders, and
    repeats lost requests with their seeds. This does not need the present weights of the policy.

    Args:
        url: Address of the server.
        shared_dir: A folder that the server sees under the same path; the engine makes its own folder in it.
        vocabulary: Number of tokens of the model.
        timeout: Seconds for each call.
        wait: Seconds that a server may be unavailable, also at the start.
        sync: ``adapter``: each version is an adapter over the server's base; ``merged``: it replaces the server's
            weights; ``auto``: ``adapter`` if the server supports it.

    Attributes:
        canary: The test of each version when it is published; None for no test.

    Raises:
        ConfigError: The server's settings are wrong.
        EngineError: The server is unavailable.
    """

    many_processes = False  # a process that loses the server would leave the others waiting
    samples_beside_training = True

    def __init__(
        self,
        url: str,
        *,
        shared_dir: str | Path,
        vocabulary: int,
        timeout: float = 600.0,
        wait: float = 300.0,
        sync: Literal["auto", "adapter", "merged"] = "auto",
    ) -> None:
        self.client, self.vocabulary, self.wait = HTTPClient(url, timeout=timeout), vocabulary, wait
        self.folder = Path(shared_dir).expanduser().absolute() / f"falign-{uuid.uuid4().hex[:8]}"
        self.asked: Literal["auto", "adapter", "merged"] = sync
        self.sync: Sync | None = None
        self.why_merged: str | None = None
        self.canary: Canary | None = None
        self._published: dict[int, Published] = {}
        self._unloaded: list[Path] = []
        self._count = 0
        if not self.client.wait_until_healthy(wait):
            raise self._gone()
        self.description = describe_server(self.client)
        self.description.require_usable(self.client.url)

    @override
    def publish(self, model: nn.Module, version: int) -> None:
        policy = model.module if isinstance(model, DistributedDataParallel) else model
        sync, self._count = self._sync_for(policy), self._count + 1
        published = Published(
            version, f"{self.folder.name}-{self._count}-v{version}", self.folder / f"{self._count}-v{version}"
        )
        sync.write(policy, published.folder)
        for old in list(self._published) if sync.exclusive else [version]:
            self.retire(old)
        self._published[version] = published
        self._persist(lambda: sync.bring(self._published.values()))
        if self.canary is not None:
            self.canary.check(self, policy, version)

    @override
    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        *,
        version: int,
        seed: int | list[int],
        first: int = 0,
    ) -> list[SampledCompletion]:
        published, sync = self._published.get(version), self.sync
        if published is None or sync is None:
            raise RolloutError(
                f"Version {version} is not published, these are: {sorted(self._published)}. Call publish(model, "
                f"{version}) first."
            )
        check_request(prompt_ids, n, seed)
        check_prompts(prompt_ids, params, vocabulary=self.vocabulary, positions=self.description.max_length)
        parts = [(seed, first + i) for i in range(len(prompt_ids))] if isinstance(seed, int) else [(s,) for s in seed]
        seeds = [mixed(*part) for part in parts]
        answered: dict[int, list[SampledCompletion]] = {}

        def answer_the_rest() -> None:
            sync.bring([published])
            rest = [i for i in range(len(prompt_ids)) if i not in answered]
            ask = partial(complete, self.client, n=n, params=params, model=sync.model_of(published), version=version)
            with ThreadPoolExecutor(min(_MOST_REQUESTS, max(len(rest), 1))) as pool:
                replies = {i: pool.submit(ask, prompt_ids[i], seed=seeds[i]) for i in rest}
            failed = [error for reply in replies.values() if (error := reply.exception()) is not None]
            sync.check_held(published)  # if it raises, all replies of this attempt are dropped
            answered.update({i: reply.result() for i, reply in replies.items() if reply.exception() is None})
            if failed:
                raise next((error for error in failed if not isinstance(error, ServerLostError)), failed[0])

        self._persist(answer_the_rest)
        return [rollout for i in range(len(prompt_ids)) for rollout in answered[i]]

    @override
    def retire(self, version: int) -> None:
        published = self._published.pop(version, None)
        if published is None:
            return
        sync = self.sync
        assert sync is not None
        self._persist(lambda: sync.drop(published))
        # One version later, when no running request can still read it.
        for folder in self._unloaded:
            shutil.rmtree(folder)
        self._unloaded = [published.folder]

    @override
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            dtype=self.description.dtype, processed_logprobs=True, max_length=self.description.max_length
        )

    @override
    def close(self) -> None:
        if self.sync is not None and self.client.is_healthy():  # a server that is gone has nothing left to drop
            for version in list(self._published):
                self.sync.drop(self._published.pop(version))
            self.sync.close()
        self._published.clear()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _sync_for(self, model: nn.Module) -> Sync:
        """Choose how weights are sent to the server, based on the first published ones."""
        if self.sync is not None:
            return self.sync
        reason = why_not_servable(model, max_rank=self.description.max_lora_rank)
        if reason is None and not self.description.loads_adapters:
            reason = "the server runs without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        if self.asked == "adapter" and reason is not None:
            raise ConfigError(
                f"rollout.engine.sync=adapter: {reason}. Fix that, or choose merged (or auto), which sends whole "
                "weights to the server."
            )
        if self.asked == "merged":
            reason = "rollout.engine.sync=merged"
        self.why_merged = reason
        if reason is None:
            self.sync = AdapterSync(self.client, base=self.description.model)
        else:
            self.sync = MergedSync(self.client, self.description)
        return self.sync

    def _persist(self, action: Callable[[], T]) -> T:
        """Repeat an idempotent action until the server stays available throughout."""
        losses, was_unknown = 0, False
        while True:
            try:
                return action()
            except ServerLostError as error:
                losses += 1
                if losses > _MOST_LOSSES:
                    raise EngineError(
                        f"{error} That was the {losses}th time during one call: see the server's log for the cause."
                    ) from error
                self._await_return(error)
            except VersionUnknownError:
                if was_unknown:
                    raise
                was_unknown = True
            assert self.sync is not None
            self.sync.doubt()

    def _await_return(self, error: ServerLostError) -> None:
        if not self.client.wait_until_healthy(self.wait):
            raise self._gone() from error
        now = describe_server(self.client)
        if now != self.description:
            raise EngineError(
                f"{self.client.url} came back with other settings, {now} in place of {self.description}: start it with "
                "the former settings."
            )

    def _gone(self) -> EngineError:
        return EngineError(
            f"{self.client.url}: there has been no vLLM server for wait={self.wait:g} seconds"
            + (f"; published are {sorted(self._published)}" if self._published else "")
            + ". Start it (scripts/vllm_server.sh MODEL), and start or resume the run."
        )
