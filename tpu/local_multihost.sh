#!/usr/bin/env bash
# A run of several processes on this machine, as on the hosts of a TPU slice:
#
#   tpu/local_multihost.sh [ENV=VALUE ...] -m experiments.arithmetic --max_steps 5
#
# Starts python ARGS NUM_PROCESSES times, each with its own fake CPU devices and
#   --coordinator_address localhost:PORT --num_processes N --process_id I
# (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID in the environment,
# too). Lines of output begin with [I]. When one fails the others get SIGTERM,
# after GRACE seconds SIGKILL; its exit status is the script's. After a 75 (saved,
# stopped by a signal) they have GRACE seconds to come to it, too. SIGINT and
# SIGTERM go to all, once.
#
# Variables: NUM_PROCESSES (2), NUM_DEVICES of each (4), PORT (a free one),
# GRACE (30), PYTHON (python), RESTARTS (0: how often all start again, with
# --resume auto, after a failure). DRY_RUN=1 prints the commands.
set -uo pipefail
while [[ ${1:-} == [A-Z]*=* ]]; do
  export "${1?}"
  shift
done
: "${NUM_PROCESSES:=2}" "${NUM_DEVICES:=4}" "${GRACE:=30}" "${PYTHON:=python}"
: "${RESTARTS:=0}"
if [ $# = 0 ]; then
  sed -n '2,/^set /{/^#/{s/^#//;s/^ //;p;};}' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$NUM_DEVICES PYTHONUNBUFFERED=1
export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo JAX_NUM_PROCESSES=$NUM_PROCESSES

free_port() {
  "$PYTHON" -c 'import socket
s = socket.socket()
s.bind(("localhost", 0))
print(s.getsockname()[1])'
}

pids=() ticks='' signal='' asked=''
send() { # a signal to all that live; a second SIGTERM would end them unsaved
  if [ "$1" = KILL ] || [ -z "$signal" ]; then
    signal=$1 ticks=0
    kill "-$1" "${pids[@]}" 2>/dev/null
  fi
}
trap 'asked=1; send INT' INT
trap 'asked=1; send TERM' TERM
set -m # each in a process group of its own: ^C comes once, from here

prefix() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

start() { # all processes, into pids
  local i port=${PORT:-} command
  [ -n "$port" ] || port=$(free_port) || exit 1
  export JAX_COORDINATOR_ADDRESS=localhost:$port
  pids=() ticks='' signal=''
  for ((i = 0; i < NUM_PROCESSES; i++)); do
    command=("$PYTHON" "$@" --coordinator_address "localhost:$port"
      --num_processes "$NUM_PROCESSES" --process_id "$i")
    if [ "${DRY_RUN:-0}" != 0 ]; then
      printf '+'
      printf ' %q' "${command[@]}"
      echo
    else
      JAX_PROCESS_ID=$i "${command[@]}" </dev/null > >(prefix "$i") 2>&1 &
      pids=(${pids[@]+"${pids[@]}"} $!)
    fi
  done
}

# Waits for all; bash 3.2 has no wait -n, so it looks who still lives. ticks: of
# 0.1 s since the signal, or since the first 75.
finish() {
  local i ended status=0 lives=${#pids[@]}
  while [ "$lives" -gt 0 ]; do
    lives=0
    for i in ${pids[@]+"${!pids[@]}"}; do
      if kill -0 "${pids[i]}" 2>/dev/null; then
        lives=$((lives + 1))
        continue
      fi
      wait "${pids[i]}" 2>/dev/null
      ended=$?
      unset "pids[i]"
      if [ "$status" = 0 ] && [ "$ended" != 0 ]; then
        status=$ended ticks=${ticks:-0}
        echo "local_multihost: process $i ended with exit status $status" >&2
        [ "$status" = 75 ] || [ ${#pids[@]} = 0 ] || send TERM
      fi
    done
    [ "$lives" = 0 ] || sleep 0.1
    if [ -n "$ticks" ] && [ $((ticks += 1)) -gt $((GRACE * 10)) ] && [ "$lives" -gt 0 ]; then
      if [ -z "$signal" ]; then send TERM; else send KILL; fi
    fi
  done
  wait
  return "$status"
}

start "$@"
until finish; status=$? && [ "$status" = 0 ]; do
  if [ -n "$asked" ] || [ "$RESTARTS" -le 0 ]; then exit "$status"; fi
  RESTARTS=$((RESTARTS - 1))
  echo "local_multihost: all start again ($RESTARTS more times)" >&2
  start "$@" --resume auto
done
