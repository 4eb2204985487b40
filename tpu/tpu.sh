#!/usr/bin/env bash
# One command for a TPU's whole life; tpu/README.md tells it from the beginning.
#
#   tpu/tpu.sh create          ask the cloud for the TPU and wait until it is there
#   tpu/tpu.sh setup           send the code and install it on every host
#   tpu/tpu.sh push            send the code again, after a change
#   tpu/tpu.sh run ARGS        python ARGS on every host: run -m experiments.arithmetic
#   tpu/tpu.sh logs [N]        follow host 0 (WORKER=1: another); N: the last N lines
#   tpu/tpu.sh status          state of the TPU, and of the run on every host
#   tpu/tpu.sh stop            finish the update, save, stop
#   tpu/tpu.sh resume          go on with the last run
#   tpu/tpu.sh supervise ARGS  create, setup and run; again when the cloud takes it
#   tpu/tpu.sh delete NAME     give the TPU back: costs end here
#
# Settings: tpu/env. DRY_RUN=1 prints the cloud's commands and touches nothing.
set -uo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
ROOT=$(dirname "$HERE")
# shellcheck source=tpu/lib.sh
. "$HERE/lib.sh"

# --- the command of the last run, kept in tpu/.last/NAME ----------------------

LAST=()

has_flag() { # $1 is a flag of the words after it
  local flag=$1 word
  shift
  for word in "$@"; do
    case $word in "$flag" | "$flag="*) return 0 ;; esac
  done
  return 1
}

remember() { # python's arguments; adds where the run writes
  LAST=("$@")
  if ! has_flag --output_dir "$@" && ! has_flag --output-dir "$@"; then
    [ -n "$TPU_RUN" ] || TPU_RUN=$TPU_NAME-$(date +%Y%m%d-%H%M%S)
    LAST=("$@" --output_dir "$TPU_BUCKET/$TPU_RUN")
  fi
  dry && return
  if ! mkdir -p "$HERE/.last" || ! printf '%s\0' "${LAST[@]}" >"$HERE/.last/$TPU_NAME"; then
    fail "$HERE/.last cannot be written"
  fi
}

recall() {
  local word
  if [ $# -gt 0 ]; then
    remember "$@"
    return
  fi
  [ -f "$HERE/.last/$TPU_NAME" ] ||
    fail "no run of $TPU_NAME is known; give its arguments, as after run"
  while IFS= read -r -d '' word; do
    LAST=(${LAST[@]+"${LAST[@]}"} "$word")
  done <"$HERE/.last/$TPU_NAME"
}

# --- create, setup, push ------------------------------------------------------

# The API and the bucket, once; who may not ask for them may have them already.
prepare_project() {
  local bucket=${TPU_BUCKET#gs://}
  bucket=gs://${bucket%%/*}
  retry gcloud services enable tpu.googleapis.com "--project=$TPU_PROJECT" ||
    say 'goes on: the API may be enabled already' >&2
  if dry; then
    call gcloud storage buckets describe "$bucket"
    say '... and where there is none:'
  elif QUIET=1 retry gcloud storage buckets describe "$bucket" >/dev/null; then
    return
  elif ! is_error 'not found'; then
    cat "$ERRORS" >&2
    say "goes on: is there a bucket $bucket that the TPU may write to?" >&2
    return
  fi
  # in the TPU's region: no fee for traffic between them
  retry gcloud storage buckets create "$bucket" "--project=$TPU_PROJECT" \
    "--location=${TPU_ZONE%-*}" --uniform-bucket-level-access
}

create() {
  local state=NONE
  if ! dry; then
    state=$(cloud_state) || return 1
  fi
  case $state in
    FAILED | SUSPENDED | SUSPENDING | DELETING)
      say "$TPU_NAME: $state; it is deleted and asked for again"
      [ "$state" = DELETING ] || remove || return 1
      wait_for NONE || return 1
      state=NONE
      ;;
  esac
  if [ "$state" = NONE ]; then
    prepare_project || return 1
    request || is_error 'ALREADY_EXISTS|already exists' || return 1
  fi
  say "costs begin when it is ACTIVE and end with: tpu/tpu.sh delete $TPU_NAME"
  wait_for ACTIVE
}

list_code() { # files of the clone, but for ignored ones; each ends with a NUL
  local file
  if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard
  else
    find . -type f -not -path './runs/*' -not -path './tpu/.last/*' -print0
  fi | while IFS= read -r -d '' file; do
    if [ -f "$file" ]; then printf '%s\0' "$file"; fi
  done
}

push() {
  local archive=code.tar.gz
  local unpack='rm -rf jaxrl_new && mkdir jaxrl_new && tar -xzf jaxrl_code.tar.gz -C jaxrl_new'
  if dry; then
    echo "+ git ls-files -z --cached --others --exclude-standard | tar -czf $archive --null -T -"
  else
    archive=$WORK/$archive
    (cd "$ROOT" && list_code | COPYFILE_DISABLE=1 tar -czf "$archive" --null -T -) || return 1
  fi
  copy "$archive" jaxrl_code.tar.gz &&
    remote "$unpack && rm -rf jaxrl_tok && mv jaxrl_new jaxrl_tok"
}

setup() {
  push || return 1
  if [ -n "$TPU_SECRETS" ]; then # a file: never words of a command
    copy "$TPU_SECRETS" .jaxrl_secrets && remote 'chmod 600 .jaxrl_secrets' || return 1
  fi
  worker install "$TPU_EXTRAS"
}

# --- run, status, stop, resume ------------------------------------------------

run_states() { # a line for each host, as worker.sh has it: @ HOST STATE ...
  worker status | grep '^@ '
  return "${PIPESTATUS[0]}"
}

# Puts what the hosts say into one word, RUN_STATE: running, failing (one has
# failed, another runs), finished, saved (75), asked (saved by tpu.sh stop), idle,
# or failed. RUN_STATUS: the first exit status that is neither 0 nor 75.
judge() { # the lines of run_states
  local state status asked running=0 ended=0 failed=0 saved=0 stopped=0
  RUN_STATUS=''
  while read -r _ _ state status asked; do
    case $state-$status in
      running-*) running=1 ;;
      ended-0) ended=1 ;;
      ended-75) saved=1 ;;
      ended-*)
        failed=1
        RUN_STATUS=${RUN_STATUS:-$status}
        ;;
    esac
    [ "$asked" != asked ] || stopped=1
  done <<<"$1"
  case $running$failed$saved$ended in
    1[01]1* | 11*) RUN_STATE=failing ;;
    1*) RUN_STATE=running ;;
    01*) RUN_STATE=failed ;;
    001*) RUN_STATE=saved ;;
    0001) RUN_STATE=finished ;;
    *) RUN_STATE=idle ;;
  esac
  if [ "$running$stopped" = 01 ] && [ "$RUN_STATE" != finished ]; then
    RUN_STATE=asked
  fi
}

status() {
  local state lines
  if dry; then
    requests describe "$TPU_NAME" "${WHERE[@]}" '--format=value(state.state)'
    worker status
    return
  fi
  state=$(cloud_state) || return 1
  say "$TPU_NAME: $state"
  [ "$state" = ACTIVE ] || return 0
  lines=$(run_states) || return 1
  printf '%s\n' "$lines"
}

wait_stopped() { # seconds at most
  local waited=0 lines
  dry && return
  while lines=$(run_states) || return 1; do
    judge "$lines"
    case $RUN_STATE in running | failing) ;; *) break ;; esac
    [ "$waited" -lt "$1" ] || return 1
    pause 5
    waited=$((waited + 5))
  done
  printf '%s\n' "$lines"
}

stop() {
  worker stop || return 1
  wait_stopped "$TPU_STOP_WAIT" || {
    say "it still runs after $TPU_STOP_WAIT s; tpu/tpu.sh logs shows why" >&2
    return 1
  }
  dry || say 'stopped; exit status 75: the state is saved; tpu/tpu.sh resume goes on'
}

follow() {
  if [ $# -gt 0 ]; then
    requests ssh "$TPU_NAME" "${WHERE[@]}" \
      ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} --node=0 \
      "--worker=${WORKER:-0}" --quiet "--command=bash jaxrl_tok/tpu/worker.sh logs $(quote "$1")"
  else # until ^C
    call gcloud compute tpus queued-resources ssh "$TPU_NAME" "${WHERE[@]}" \
      ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} --node=0 \
      "--worker=${WORKER:-0}" --quiet '--command=bash jaxrl_tok/tpu/worker.sh logs 50 follow'
  fi
}

# --- supervise ----------------------------------------------------------------

# Makes the TPU and the run be there; a run that goes on already is left alone.
bring_up() {
  local state=NONE lines=''
  if ! dry; then
    state=$(cloud_state) || return 1
  fi
  if [ "$state" != ACTIVE ]; then
    create || return 1
  elif lines=$(run_states 2>/dev/null); then
    judge "$lines"
    case $RUN_STATE in running | failing) return 0 ;; esac
  fi
  if [ -z "$READY" ] || [ "$state" != ACTIVE ]; then
    setup || return 1
    READY=1
  fi
  worker start "${LAST[@]}" --resume auto
}

# Polls until the run has ended; RESULT: as judge, or lost (the cloud took the
# TPU), or unreachable.
watch_run() {
  local state lines waited=0 missed=0
  while true; do
    pause "$TPU_POLL"
    if ! state=$(cloud_state); then
      say 'the cloud does not answer; the run may go on, and cost' >&2
      continue
    fi
    RESULT=lost
    [ "$state" = ACTIVE ] || return
    if ! lines=$(run_states); then
      RESULT=unreachable
      missed=$((missed + 1))
      [ "$missed" -lt 3 ] || return
      continue
    fi
    missed=0
    judge "$lines"
    RESULT=$RUN_STATE
    case $RESULT in
      running) waited=0 ;;
      failing) # the others notice by their heartbeat, or are ended
        if [ "$waited" -ge "$TPU_GRACE" ]; then
          worker kill
        fi
        waited=$((waited + TPU_POLL))
        ;;
      *) return ;;
    esac
  done
}

finished() {
  say 'done: exit status 0 on every host'
  if [ -n "$TPU_DELETE_WHEN_DONE" ]; then
    remove
  else
    say "the TPU still costs; tpu/tpu.sh delete $TPU_NAME"
  fi
}

# Counts a failure; true while another try is left.
another_try() {
  failures=$((failures + 1))
  say "$1 (failure $failures; it gives up after $TPU_MAX_FAILURES)"
  if [ "$failures" -ge "$TPU_MAX_FAILURES" ]; then
    say "given up; the TPU may still cost: tpu/tpu.sh logs 50, tpu/tpu.sh delete $TPU_NAME" >&2
    return 1
  fi
  pause "$TPU_POLL"
}

supervise() {
  local failures=0 losses=0
  READY='' RESULT=''
  trap 'say "not watched any more; the run goes on, and costs: stop, delete" >&2; exit 130' INT
  while true; do
    if ! bring_up; then
      another_try 'the TPU or the run could not be started' || return 1
      continue
    fi
    if dry; then
      worker status
      say "... every $TPU_POLL s; create, setup and start --resume auto again when the TPU is gone"
      return
    fi
    say "watching; the log: tpu/tpu.sh logs"
    watch_run
    case $RESULT in
      finished)
        finished
        return
        ;;
      asked)
        say 'stopped by tpu/tpu.sh stop; tpu/tpu.sh resume goes on'
        return 75
        ;;
      saved) say 'stopped by a signal, state saved (exit status 75): resumed' ;;
      lost)
        losses=$((losses + 1))
        say "the cloud took the TPU ($losses of $TPU_MAX_LOSSES at most): a new one goes on from the last checkpoint"
        [ "$losses" -lt "$TPU_MAX_LOSSES" ] || return 1
        ;;
      unreachable)
        another_try 'the hosts cannot be reached: the TPU is made anew' || return 1
        remove
        ;;
      *) another_try "the run failed, exit status ${RUN_STATUS:-unknown}" || return 1 ;;
    esac
  done
}

# --- delete -------------------------------------------------------------------

delete() { # the exact name, passed or typed
  local typed=${1:-}
  if [ $# = 0 ]; then
    printf 'type the name of the TPU to delete (%s): ' "$TPU_NAME"
    IFS= read -r typed
  fi
  [ "$typed" = "$TPU_NAME" ] ||
    fail "nothing is deleted: '$typed' is not the name, $TPU_NAME"
  remove || fail "not deleted; it may still cost: https://console.cloud.google.com/compute/tpus"
  if dry; then
    wait_for NONE
  elif ! wait_for NONE; then
    fail "not gone yet; it may still cost: tpu/tpu.sh status"
  fi
  say "deleted. Runs stay, and cost a little: gcloud storage rm -r $TPU_BUCKET/RUN"
}

# --- the door -----------------------------------------------------------------

usage() {
  sed -n '2,/^set /{/^#/{s/^#//;s/^ //;p;};}' "${BASH_SOURCE[0]}"
}

main() {
  local word=${1:-help}
  shift || true
  case $word in
    help | -h | --help)
      usage
      return
      ;;
    create | setup | push | run | logs | status | stop | resume | supervise | delete) ;;
    *) fail "'$word' is no word of tpu.sh; tpu/tpu.sh help lists them" ;;
  esac
  read_settings
  check_settings
  dry || command -v gcloud >/dev/null ||
    fail 'gcloud is not installed; https://cloud.google.com/sdk/docs/install'
  WORK=$(mktemp -d) || fail 'no temporary directory'
  trap 'rm -rf "$WORK"' EXIT
  ERRORS=$WORK/errors
  : >"$ERRORS"
  case $word in
    create) create || fail "$TPU_NAME is not there; tpu/tpu.sh status" ;;
    setup) setup || fail 'setup failed; see above, then run it again' ;;
    push) push || fail 'the code was not sent; see above' ;;
    run)
      [ $# -gt 0 ] || fail 'run what? as after python: tpu/tpu.sh run -m experiments.arithmetic'
      remember "$@"
      worker start "${LAST[@]}" || fail 'the run did not start on every host; see above'
      say "it goes on without you: tpu/tpu.sh logs, status, stop"
      ;;
    resume)
      recall "$@"
      worker start "${LAST[@]}" --resume auto ||
        fail 'the run did not start on every host; see above (supervise makes a new TPU)'
      ;;
    supervise)
      recall "$@"
      supervise
      ;;
    logs) follow "$@" ;;
    status) status || fail 'the hosts do not answer; see above' ;;
    stop) stop || fail 'not stopped on every host' ;;
    delete) delete "$@" ;;
  esac
}

main "$@"
