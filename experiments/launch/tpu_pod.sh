#!/usr/bin/env bash
# Runs one command of ictjax on every host of a TPU pod slice, in the background of each, with a log
# there. Usage: experiments/launch/tpu_pod.sh NAME ZONE train|evaluate [FLAGS of ictjax ...]
# Variables (HF_TOKEN=..., ALFWORLD_DATA=...) are those of ictjax.env in the home folder of each host,
# where there is one: on a command line every user of the machine would see them.
# It is killed by: gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='pkill -f bin/ictjax'
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "tpu_pod.sh: name the slice, its zone and the command: tpu_pod.sh ict us-west4-a train --preset ... --run-dir ..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
words=$(printf ' %q' "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  if [ -f ictjax.env ]; then set -a; . ./ictjax.env; set +a; fi
  cd ictjax && mkdir -p logs &&
  nohup .venv/bin/ictjax$words --hosts.detect >> logs/\$(hostname).log 2>&1 < /dev/null &"
echo "Started on all hosts of $name. To follow the first: gcloud compute tpus tpu-vm ssh $name --zone=$zone --worker=0 --command='tail -f ictjax/logs/*.log'"
