#!/usr/bin/env bash
# Installs ictjax into .venv of this checkout on a TPU VM or a GPU machine, whose own Python may be
# too old: uv brings Python 3.12. Usage, in the checkout: experiments/launch/setup.sh tpu|cuda
set -euo pipefail

extra=${1:-}
case $extra in
  tpu | cuda) ;;
  *) echo "setup.sh: name what JAX runs on: setup.sh tpu, or setup.sh cuda." >&2; exit 2 ;;
esac
if [ ! -f constraints-py312.txt ]; then
  echo "setup.sh: there is no constraints-py312.txt in $PWD: start it in a checkout of ictjax." >&2
  exit 2
fi
if ! command -v c++ >/dev/null || ! command -v git >/dev/null; then
  sudo apt-get update -q && sudo apt-get install -qy g++ git make
fi
if ! command -v uv >/dev/null; then
  python3 -m pip install --user --quiet uv
  PATH=$HOME/.local/bin:$PATH
fi
# with pip of its own, as make expects
uv venv --quiet --seed --python 3.12 .venv
# the planner of TextWorld builds itself with whatever python is on PATH
PATH=$PWD/.venv/bin:$PATH .venv/bin/python -m pip install --quiet -c constraints-py312.txt -e ".[$extra]"
.venv/bin/python -c 'import jax; print(len(jax.local_devices()), jax.devices()[0].device_kind)'
