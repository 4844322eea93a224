"""The eight curves that matter: a view of a wandb project, or the address of a trackio dashboard (docs/metrics.md).

python examples/dashboard.py wandb ENTITY PROJECT       # saves a view; pip install wandb wandb-workspaces, wandb login
python examples/dashboard.py trackio PROJECT [--at http://127.0.0.1:7860]       # beside `trackio show`, or a Space's
"""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import urlencode

CURVES = {
    "reward": {"smoothing_type": "exponential", "smoothing_factor": 0.9},  # the curve that a collapse is defined on
    "frac_reward_zero_std": {},
    "capo/kl/measured": {"log_y": True},
    "capo/scale": {},
    "entropy": {},
    "completions/mean_length": {},
    "grad_norm": {"log_y": True},
    "capo/rejection_rate": {},
}


def wandb_view(entity: str, project: str) -> Any:
    """A view of the project with these curves and no other panel; `save` makes it."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    step = "train/global_step"
    panels = [reports.LinePlot(title=name, x=step, y=[f"train/{name}"], **how) for name, how in CURVES.items()]
    layout = workspaces.SectionLayoutSettings(columns=4, rows=2)
    section = workspaces.Section(name="CAPO", panels=panels, is_open=True, layout_settings=layout)
    return workspaces.Workspace(entity=entity, project=project, name="CAPO: the eight curves", sections=[section])


def trackio_address(project: str, at: str = "http://127.0.0.1:7860") -> str:
    """Where a trackio dashboard shows these curves and no other; its axes are linear, its smoothing is for all."""
    asked = {"project": project, "metrics": ",".join(f"train/{name}" for name in CURVES)}
    return f"{at.rstrip('/')}/?{urlencode(asked, safe='/,')}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("wandb").add_argument("entity")
    kinds.add_parser("trackio").add_argument("--at", default="http://127.0.0.1:7860")
    for kind in kinds.choices.values():
        kind.add_argument("project")
    options = parser.parse_args(arguments)
    if options.kind == "wandb":
        print(wandb_view(options.entity, options.project).save().url)
    else:
        print(trackio_address(options.project, options.at))


if __name__ == "__main__":
    main()
