"""A rollout server for verl where vLLM would stand: `generate` of transformers behind verl's own interfaces.

`rollout.name=transformers` selects it, once verl has loaded this module (`VERL_USE_EXTERNAL_MODULES`). verl's trainer
asks three things of a rollout engine: a replica, which launches a server for some of its workers; the server, a Ray
actor that turns prompts into tokens; and an adapter inside each worker, which hands the server the trainer's weights.
"""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace

import ray
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "transformers"


class Replica(RolloutReplica):
    """One server, for as many workers as a model is split over."""

    async def launch_servers(self):
        server = ray.remote(Server).options(
            name=server_name(self.replica_rank), max_concurrency=self.max_concurrency, num_cpus=1
        )
        self._server_handle = server.remote(self.model_config.path, self.config.response_length, self.config.seed)
        self._server_address = server_name(self.replica_rank)
        self.servers = [self._server_handle]
        await self._server_handle.sleep.remote()  # which comes back when the server stands


class Server:
    """Answers the requests of a moment together, with the weights it was last given."""

    def __init__(self, path, response_length, seed):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).eval()
        self.response_length, self.seed = response_length, seed
        self.waiting, self.step = [], None

    async def load(self, weights, step):
        """The trainer's weights after its `step`; what is drawn with them depends on the seed and the step alone."""
        self.model.load_state_dict(weights)
        self.step = step
        torch.manual_seed(self.seed + (step or 0))

    async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
        given = {name for name, value in kwargs.items() if value is not None}
        if given:
            raise ValueError(f"this server reads text alone, and was sent {', '.join(sorted(given))}")
        request = SimpleNamespace(prompt=list(prompt_ids), how=sampling_params, answer=asyncio.Future())
        self.waiting.append(request)
        if len(self.waiting) == 1:
            asyncio.get_running_loop().create_task(self._answer())
        return await request.answer

    async def _answer(self):
        seen = 0
        while seen < len(self.waiting):  # until nobody has come for a moment
            seen = len(self.waiting)
            await asyncio.sleep(0.05)
        requests, self.waiting = self.waiting, []
        try:
            # in an order that does not depend on which of them came first
            for request, output in zip(*self._generate(sorted(requests, key=lambda each: each.prompt)), strict=True):
                request.answer.set_result(output)
        except Exception as error:
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(error)

    @torch.no_grad()
    def _generate(self, requests):
        how = requests[0].how
        if any(request.how != how for request in requests):
            raise ValueError("requests of one moment ask for different sampling")
        prompts = [torch.tensor(request.prompt) for request in requests]
        sampled = how["temperature"] > 0
        done = self.model.generate(
            pad_sequence(prompts, batch_first=True, padding_side="left"),
            attention_mask=pad_sequence([torch.ones_like(each) for each in prompts], True, padding_side="left"),
            do_sample=sampled,
            temperature=how["temperature"] if sampled else None,
            top_k=max(how["top_k"], 0),
            top_p=how["top_p"],
            repetition_penalty=how["repetition_penalty"],
            max_new_tokens=how.get("max_tokens", self.response_length),
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = torch.stack(done.scores, dim=1).log_softmax(-1)
        answers = done.sequences[:, -scores.shape[1] :]
        log_probs = scores.gather(-1, answers[..., None]).squeeze(-1)
        end = self.model.generation_config.eos_token_id
        return requests, [self._output(*each, end) for each in zip(answers.tolist(), log_probs.tolist(), strict=True)]

    def _output(self, tokens, log_probs, end):
        length = tokens.index(end) + 1 if end in tokens else len(tokens)
        return TokenOutput(
            token_ids=tokens[:length],
            log_probs=log_probs[:length],
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )

    async def sleep(self):
        """A CPU has no memory to give back."""


class Adapter(base.BaseRollout):
    """The server's side of a worker: the first worker of each replica sends the weights."""

    def __init__(self, config, model_config, device_mesh):
        super().__init__(config, model_config, device_mesh)
        size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        self.replica, self.rank = divmod(int(os.environ["RANK"]), size)

    async def update_weights(self, weights, wire_format="named_tensors", global_steps=None, **kwargs):
        assert wire_format == "named_tensors", wire_format
        weights = {name: each.detach().cpu().clone() for name, each in weights}  # all workers gather, one sends
        if self.rank == 0:
            await ray.get_actor(server_name(self.replica)).load.remote(weights, global_steps)

    async def resume(self, tags):
        """A CPU has no memory to take."""

    async def release(self):
        """A CPU has no memory to give back."""


def server_name(replica):
    return f"{NAME}_server_{replica}"


RolloutReplicaRegistry.register(NAME, lambda: Replica)
base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.{Adapter.__name__}"
