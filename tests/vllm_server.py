"""A small HTTP server that speaks what TRL's client asks of `vllm serve`, over a model of transformers on the CPU.

    with without_cuda(), Server(model, lag=2) as server:
        trainer = CAPOTrainer(..., args=CAPOConfig(..., **server.settings()))

Real: the protocol from end to end, HTTP included, as `trl.generation.vllm_client` speaks it; `generate` of transformers
with the log-probability of each sampled token after temperature and the rest (`processed_logprobs`); weights that come
in as they were announced. What stands in for CUDA is listed in `without_cuda`.
"""

from __future__ import annotations

import copy
import json
import socket
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from threading import Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers import GenerationConfig, PreTrainedModel
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_client import VLLMClient

HOST = "127.0.0.1"
NAME = "a model"
_PATIENCE = 300.0  # seconds, of each side for the other; machines may be busy
# Of a request for completions: what is sampled by, and what only says how to answer.
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
_ANSWER = {"model", "prompt", "n", "max_tokens", "logprobs", "return_token_ids", "return_tokens_as_token_ids"}


class Server:
    """Generates with a copy of `model`, whose weights are those of `lag` updates ago (or of the oldest since a trainer
    joined).

    The random numbers of a request depend on it and on `seed` alone. `score` [C, T] → [C, T] may change the
    log-probabilities that are told (a sampler that rounds, or one that can't say). `requests` are the paths that were
    asked for, `completions` the token ids that were sampled, by request.
    """

    def __init__(self, model: PreTrainedModel, lag: int = 0, seed: int = 0) -> None:
        self.model, self.lag, self.seed = copy.deepcopy(model).eval(), lag, seed
        self.score: Callable[[torch.Tensor], torch.Tensor] = lambda log_pi: log_pi
        self.requests: list[str] = []
        self.completions: list[list[list[int]]] = []
        self.logprobs_mode = "processed_logprobs"
        self._received: deque[dict[str, torch.Tensor]] = deque(maxlen=lag + 1)
        self._incoming: dict[str, torch.Tensor] = {}
        self._trainer: socket.socket | None = None
        self._http = ThreadingHTTPServer((HOST, 0), _handler(self))
        self._thread = Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    def settings(self) -> dict[str, Any]:
        """The fields of a trainer that generates here."""
        return {
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": f"http://{HOST}:{self._http.server_port}",
            "vllm_group_port": free_port(),
        }

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._leave()

    # ---- the routes: each takes what was sent, and returns what is answered -----------------------------------------

    def get(self, path: str) -> dict[str, Any]:
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": NAME}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {
                "vllm_config": {
                    "weight_transfer_config": {"backend": "nccl"},
                    "model_config": {"logprobs_mode": self.logprobs_mode},
                }
            },
        }[path]

    def post(self, path: str, sent: dict[str, Any]) -> dict[str, Any]:
        return {
            "/v1/completions": self._complete,
            "/init_weight_transfer_engine": self._join,
            "/start_weight_update": self._start,
            "/update_weights": self._receive,
            "/finish_weight_update": self._finish,
            "/reset_prefix_cache": lambda sent: {"success": True},
        }[path](sent)

    def _join(self, sent: dict[str, Any]) -> dict[str, Any]:
        info = sent["init_info"]
        assert (info["rank_offset"], info["world_size"]) == (1, 2)
        self._leave()
        deadline = time.monotonic() + _PATIENCE
        while self._trainer is None:  # the two meet in any order
            try:
                self._trainer = socket.create_connection((info["master_address"], info["master_port"]), _PATIENCE)
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._received.clear()
        return {}

    def _start(self, sent: dict[str, Any]) -> dict[str, Any]:
        self._incoming = {}
        return {}

    def _receive(self, sent: dict[str, Any]) -> dict[str, Any]:
        assert self._trainer is not None, "no trainer has joined"
        info = sent["update_info"]
        for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            dtype = getattr(torch, kind)
            data = bytearray(prod(shape) * dtype.itemsize)
            view = memoryview(data)
            while view:
                if not (count := self._trainer.recv_into(view)):
                    raise ConnectionError("the trainer is gone")
                view = view[count:]
            self._incoming[name] = torch.frombuffer(data, dtype=dtype).view(shape)
        return {}

    def _finish(self, sent: dict[str, Any]) -> dict[str, Any]:
        own = dict(self.model.named_parameters())
        assert self._incoming.keys() == own.keys(), self._incoming.keys() ^ own.keys()
        self._received.append(self._incoming)
        with torch.no_grad():
            for name, weight in self._received[0].items():
                assert own[name].dtype == weight.dtype
                own[name].copy_(weight)
        return {}

    @torch.no_grad()
    def _complete(self, sent: dict[str, Any]) -> dict[str, Any]:
        if unknown := sent.keys() - _SAMPLING - _ANSWER:
            raise ValueError(f"this server has no {sorted(unknown)}")
        asked, config = sent["prompt"], self.model.generation_config
        pad, ends = config.pad_token_id, config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends)
        longest = max(map(len, asked))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in asked])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
        settings = GenerationConfig(
            do_sample=True,
            max_new_tokens=sent["max_tokens"],
            num_return_sequences=sent["n"],
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            return_dict_in_generate=True,
            output_scores=True,
            **{name: sent[name] for name in _SAMPLING},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(json.dumps([self.seed, asked]).encode()))
            made = self.model.generate(ids, attention_mask=mask, generation_config=settings)
        chosen = made.sequences[:, longest:]
        scores = torch.stack(made.scores, dim=1)  # after temperature and the rest
        log_pi = self.score(scores.log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1))
        choices = []
        for i, (tokens, told) in enumerate(zip(chosen.tolist(), log_pi.tolist(), strict=True)):
            length = next((at for at, token in enumerate(tokens, start=1) if token in ends), len(tokens))
            names = [f"token_id:{token}" for token in tokens[:length]]
            choices.append(
                {
                    "prompt_token_ids": asked[i // sent["n"]],
                    "token_ids": tokens[:length],
                    "logprobs": {
                        "tokens": names,
                        "token_logprobs": told[:length],
                        "top_logprobs": [{name: value} for name, value in zip(names, told, strict=False)],
                    },
                }
            )
        self.completions.append([choice["token_ids"] for choice in choices])
        return {"choices": choices}

    def _leave(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server((HOST, 0)) as free:
        return free.getsockname()[1]


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections, as the client expects

        def do_GET(self) -> None:
            self._answer(lambda path: server.get(path))

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            self._answer(lambda path: server.post(path, sent))

        def _answer(self, route: Callable[[str], dict[str, Any]]) -> None:
            path = self.path.split("?")[0]
            server.requests.append(path)
            try:
                status, answer = 200, route(path)
            except KeyError as error:
                status, answer = 404, {"error": f"no {error}"}
            except Exception as error:  # the client tells it; of 500 it would try again
                status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *said: Any) -> None:
            pass

    return Handler


# ---- the trainer's side ----------------------------------------------------------------------------------------------


@contextmanager
def without_cuda(stateful: bool = False) -> Iterator[None]:
    """TRL's vLLM client where neither vLLM nor CUDA is. In their places stand

        is_vllm_available          yes
        get_ip                     this machine's
        the device of the group    "cuda" is said, and nothing is put there
        NCCL's group and broadcast a TCP connection, over which the tensors' bytes go in the order of the announcement

    and nothing else: all other code is TRL's. `stateful` takes the client's way with vLLM from 0.28 on.
    """
    join = VLLMClient.init_communicator
    names = {
        "is_vllm_available": lambda *_, **__: True,
        "get_ip": lambda: HOST,
        "_HAS_STATEFUL_TRAINER_ENGINE": stateful,
        "open_trainer_endpoint": _endpoint,
        "packed_nccl_broadcast_producer": lambda iterator, group, src, post_iter_func: _send(
            map(post_iter_func, iterator), group
        ),
        "NCCLTrainerSendWeightsArgs": SimpleNamespace,
        "NCCLWeightTransferEngine": SimpleNamespace(
            trainer_init=_endpoint,
            trainer_send_weights=lambda iterator, trainer_args: _send(
                (tensor for _, tensor in iterator), trainer_args.group
            ),
        ),
    }
    with ExitStack() as patches:
        for name, value in names.items():
            patches.enter_context(patch.object(vllm_client, name, value, create=True))
        patches.enter_context(patch.object(vllm_generation, "is_vllm_available", names["is_vllm_available"]))
        patches.enter_context(
            patch.object(VLLMClient, "init_communicator", lambda self, device: join(self, device="cuda"))
        )
        yield


def _endpoint(info: dict[str, Any]) -> Any:
    with socket.create_server((info["master_address"], info["master_port"])) as listener:
        listener.settimeout(_PATIENCE)
        with listener.accept()[0] as connection:  # a file closes when TRL lets go of it
            return SimpleNamespace(group=SimpleNamespace(store=None, socket=connection.makefile("wb")))


def _send(tensors: Iterator[torch.Tensor], communicator: Any) -> None:
    for tensor in tensors:
        communicator.group.socket.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    communicator.group.socket.flush()
