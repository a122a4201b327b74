"""The settings of a vLLM server, and the check that a run can work with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from falign.errors import ConfigError, EngineError
from falign.rollouts.vllm_client import HTTPClient, RefusedError

__all__ = ["ServerDescription", "describe_server"]


@dataclass(frozen=True)
class ServerDescription:
    """A server's settings; servers with equal settings sample the same.

    Attributes:
        base: The name of its base model in requests.
        model: The path or name that its base model was loaded from.
        dtype: Dtype of its weights.
        logprobs_mode: The distribution of its log-probabilities.
        max_length: Maximum number of tokens of a prompt with its completion.
        max_lora_rank: Maximum rank of adapters; 0 if it serves none.
        max_cpu_loras: Number of adapters that it holds before it drops one.
        loads_adapters: Whether it loads new adapters while it runs.
        data_parallel_size: Number of replicas behind the address.
        instance: An identifier that changes with each start.
    """

    base: str
    model: str
    dtype: str
    logprobs_mode: str
    max_length: int
    max_lora_rank: int
    max_cpu_loras: int
    loads_adapters: bool
    data_parallel_size: int
    instance: str = field(compare=False)

    def require_usable(self, url: str) -> None:
        """Refuse settings under which log-probabilities or weights would be wrong.

        Raises:
            ConfigError: A setting is wrong; the message names the server's option.
        """
        if self.logprobs_mode != "processed_logprobs":
            raise ConfigError(
                f"{url}: its log-probabilities are {self.logprobs_mode}, not those of the distribution that it samples "
                "from: start it with --logprobs-mode processed_logprobs (scripts/vllm_server.sh does)."
            )
        if self.data_parallel_size != 1:
            raise ConfigError(
                f"{url}: data_parallel_size={self.data_parallel_size}, and new weights reach only the replica that "
                "answers: start one server without --data-parallel-size."
            )


def describe_server(client: HTTPClient) -> ServerDescription:
    """Ask a server for its settings.

    Raises:
        ConfigError: The server does not give its settings.
        EngineError: The server does not reply, or not as vLLM does.
    """
    try:
        info = client.get("/server_info?config_format=json")
    except RefusedError as error:
        raise ConfigError(
            f"{error} It does not give its settings and takes no new weights: start it with VLLM_SERVER_DEV_MODE=1 "
            "(scripts/vllm_server.sh does)."
        ) from error
    cards = client.get("/v1/models")
    try:
        return _read(info, cards)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EngineError(
            f"{client.url}/server_info: {type(error).__name__} {error} where vLLM 0.32 has its settings: use that "
            "version (scripts/vllm_server.sh install)."
        ) from error


def _read(info: dict[str, Any], cards: dict[str, Any]) -> ServerDescription:
    config = info["vllm_config"]
    model, lora = config["model_config"], config["lora_config"]
    return ServerDescription(
        base=str(next(card["id"] for card in cards["data"] if not card.get("parent"))),
        model=str(model["model"]),
        dtype=str(model["dtype"]).removeprefix("torch."),
        logprobs_mode=str(model["logprobs_mode"]),
        max_length=int(model["max_model_len"]),
        max_lora_rank=0 if lora is None else int(lora["max_lora_rank"]),
        max_cpu_loras=0 if lora is None else int(lora["max_cpu_loras"] or lora["max_loras"]),
        loads_adapters=bool(info["vllm_env"].get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")),
        data_parallel_size=int(config["parallel_config"]["data_parallel_size"]),
        instance=str(config["instance_id"]),
    )
