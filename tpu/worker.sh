#!/usr/bin/env bash
# Words that tpu.sh gives to every host of a TPU, over ssh:
#
#   install EXTRAS   an environment with Python 3.13 and jaxrl_tok[EXTRAS]
#   start ARGS       python ARGS, in the background
#   status           one line: @ HOST running | ended STATUS [asked] | idle
#   stop             SIGTERM: the update is finished, the state saved
#   kill             SIGKILL
#   logs N [follow]  the last N lines
#
# In the home: jaxrl_tok (code), jaxrl_env (environment), jaxrl_run (command,
# pid, log, status of the last run), .jaxrl_secrets (variables that it gets).
set -uo pipefail
cd || exit 1
RUN=$PWD/jaxrl_run
PYTHON=$PWD/jaxrl_env/bin/python

fail() { # status 3: another try would not help; 4: it may
  printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
  exit "${STATUS:-3}"
}

boot() { # process ids mean nothing after a reboot
  cat /proc/sys/kernel/random/boot_id
}

is_running() { # the process that watches the run, or the run itself
  local name pid
  [ "$(cat "$RUN/boot" 2>/dev/null)" = "$(boot)" ] || return 1
  for name in watcher pid; do
    if pid=$(cat "$RUN/$name" 2>/dev/null) && kill -0 "$pid" 2>/dev/null; then
      return 0
    fi
  done
  return 1
}

install() { # the VMs' own Python may be too old: uv brings one
  local STATUS=4
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null ||
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv ||
    fail 'uv cannot be installed; is there a way to pypi.org?'
  uv venv --quiet --allow-existing --python 3.13 jaxrl_env || fail 'no Python 3.13'
  uv pip install --quiet --python "$PYTHON" -e "./jaxrl_tok[$1]" || fail 'pip install failed'
  echo "$(hostname): installed"
}

start() {
  local command
  [ -x "$PYTHON" ] || fail 'nothing is installed; tpu.sh setup'
  printf -v command '%q ' "$@"
  if is_running; then
    [ "$command" = "$(cat "$RUN/command")" ] && echo "$(hostname): runs already" && return
    fail 'another run goes on; tpu.sh stop'
  fi
  if ! { rm -rf "$RUN" && mkdir "$RUN" && boot >"$RUN/boot" &&
    printf '%s' "$command" >"$RUN/command"; }; then
    fail "$RUN cannot be written"
  fi
  setsid nohup bash "$0" watch "$@" </dev/null >/dev/null 2>&1 &
  echo $! >"$RUN/watcher"
  echo "$(hostname): started"
}

watch() { # in the background: runs python and writes down how it ended
  local status
  if [ -f "$HOME/.jaxrl_secrets" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$HOME/.jaxrl_secrets"
    set +a
  fi
  cd "$HOME/jaxrl_tok" || exit 1
  PYTHONUNBUFFERED=1 "$PYTHON" "$@" >>"$RUN/log" 2>&1 &
  echo $! >"$RUN/pid"
  wait $!
  status=$?
  echo "exit status $status" >>"$RUN/log"
  echo "$status" >"$RUN/part" && mv "$RUN/part" "$RUN/status"
}

status() {
  local state=idle
  if is_running; then
    state=running
  elif [ -f "$RUN/status" ]; then
    state="ended $(cat "$RUN/status")"
  elif [ -f "$RUN/command" ]; then
    state='ended lost' # a reboot, or its watcher was killed
  fi
  [ "${state%% *}" = ended ] && [ -f "$RUN/asked" ] && state="$state asked"
  echo "@ $(hostname) $state"
}

send() { # a signal to the run, which may just be starting
  local tries=0
  while is_running && [ ! -s "$RUN/pid" ] && [ $((tries += 1)) -le 50 ]; do
    sleep 0.1
  done
  if is_running; then
    kill "-$1" "$(cat "$RUN/pid")"
  fi
  return 0
}

logs() {
  [ -f "$RUN/log" ] || fail 'there is no log; tpu.sh run'
  if [ "${2:-}" = follow ]; then
    tail -n "$1" -F "$RUN/log"
  else
    tail -n "$1" "$RUN/log"
  fi
}

word=${1:-}
shift || true
case $word in
  install | start | watch | status | logs) "$word" "$@" ;;
  stop) # once: a second signal would end it unsaved
    if is_running && [ ! -f "$RUN/asked" ]; then
      touch "$RUN/asked"
      send TERM
    fi
    ;;
  kill) send KILL ;;
  *) fail "unknown word '$word'" ;;
esac
