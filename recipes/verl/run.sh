#!/usr/bin/env bash
# CAPO on verl, the paper's aggressive regime. Any setting of verl can be given again:
#   recipes/verl/run.sh trainer.n_gpus_per_node=8 actor_rollout_ref.actor.capo.mode=monitor
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# modules of your own come first; Ray's workers on this machine inherit it
export VERL_USE_EXTERNAL_MODULES=${VERL_USE_EXTERNAL_MODULES:+$VERL_USE_EXTERNAL_MODULES,}capo_rl.verl
exec python -m verl.trainer.main_ppo --config-path "$here" --config-name capo_aggressive "$@"
