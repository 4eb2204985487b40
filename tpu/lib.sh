# shellcheck shell=bash
# Settings, quoting, retries and the cloud's commands, read by tpu.sh.
# Runs on bash 3.2, the one that macOS has.

# --- words on the screen ------------------------------------------------------

say() {
  printf 'tpu: %s\n' "$*"
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

dry() {
  [ "${DRY_RUN:-0}" != 0 ]
}

pause() { # seconds; TPU_SLEEP is another program than sleep
  "${TPU_SLEEP:-sleep}" "$1"
}

quote() { # words as a shell reads them again, here or on the TPU's hosts
  local word out=''
  for word in "$@"; do
    case $word in
      *\'*) printf -v word '%q' "$word" ;;
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'$word'" ;;
    esac
    out="$out${out:+ }$word"
  done
  printf '%s' "$out"
}

call() { # a command; DRY_RUN=1 prints it
  if dry; then
    printf '+ %s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# --- settings -----------------------------------------------------------------

SETTINGS='TPU_PROJECT TPU_ZONE TPU_NAME TPU_TYPE TPU_SLICES TPU_CAPACITY
  TPU_DURATION TPU_RUNTIME TPU_BUCKET TPU_RUN TPU_EXTRAS TPU_SECRETS
  TPU_DELETE_WHEN_DONE TPU_TRIES TPU_POLL TPU_GRACE TPU_STOP_WAIT
  TPU_MAX_FAILURES TPU_MAX_LOSSES'

# The file tpu/env, or TPU_ENV; a variable of the environment wins.
read_settings() {
  local file=${TPU_ENV:-$HERE/env} name known=''
  for name in $SETTINGS; do
    if [ -n "${!name+given}" ]; then
      printf -v known '%s%s=%q\n' "$known" "$name" "${!name}"
    fi
  done
  TPU_CREATE_FLAGS=()
  TPU_SSH_FLAGS=()
  if [ -f "$file" ]; then
    # shellcheck source=/dev/null
    . "$file" || fail "$file cannot be read; see tpu/env.example"
  fi
  eval "$known"
  : "${TPU_PROJECT:=}" "${TPU_ZONE:=}" "${TPU_BUCKET:=}" "${TPU_RUN:=}"
  : "${TPU_NAME:=jaxrl}" "${TPU_TYPE:=v5litepod-8}" "${TPU_SLICES:=1}"
  : "${TPU_CAPACITY:=spot}" "${TPU_DURATION:=4h}" "${TPU_RUNTIME:=}"
  : "${TPU_EXTRAS:=tpu,gcs}" "${TPU_SECRETS:=}" "${TPU_DELETE_WHEN_DONE:=}"
  : "${TPU_TRIES:=5}" "${TPU_POLL:=30}" "${TPU_GRACE:=120}"
  : "${TPU_STOP_WAIT:=900}" "${TPU_MAX_FAILURES:=3}" "${TPU_MAX_LOSSES:=20}"
  TPU_BUCKET=${TPU_BUCKET%/}
  WHERE=("--project=$TPU_PROJECT" "--zone=$TPU_ZONE")
}

check_settings() {
  local cure='copy tpu/env.example to tpu/env and fill it in' name
  local form='^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$' # a variable: bash 3.2
  for name in TPU_PROJECT TPU_ZONE TPU_BUCKET; do
    [ -n "${!name}" ] || fail "$name is not set; $cure"
  done
  [[ $TPU_NAME =~ $form ]] ||
    fail "TPU_NAME '$TPU_NAME' must be lower-case letters, digits and hyphens, a letter first"
  case $TPU_BUCKET in
    gs://?*) ;;
    *) fail "TPU_BUCKET '$TPU_BUCKET' must begin with gs://" ;;
  esac
  case $TPU_CAPACITY in
    spot | flex-start | on-demand | reserved) ;;
    *) fail "TPU_CAPACITY '$TPU_CAPACITY' must be spot, flex-start, on-demand or reserved" ;;
  esac
  form='^[1-9][0-9]*$'
  for name in TPU_SLICES TPU_TRIES TPU_POLL TPU_GRACE TPU_STOP_WAIT \
    TPU_MAX_FAILURES TPU_MAX_LOSSES; do
    [[ ${!name} =~ $form ]] || fail "$name '${!name}' must be a whole number, 1 or more"
  done
  [ -z "$TPU_SECRETS" ] || [ -f "$TPU_SECRETS" ] ||
    fail "TPU_SECRETS '$TPU_SECRETS' is no file; leave it empty or write one"
  case $TPU_DELETE_WHEN_DONE in
    '' | "$TPU_NAME") ;;
    *) fail "TPU_DELETE_WHEN_DONE must be the exact name, $TPU_NAME, or empty" ;;
  esac
  [ -n "$TPU_RUNTIME" ] || TPU_RUNTIME=$(runtime_of "$TPU_TYPE") ||
    fail "TPU_TYPE '$TPU_TYPE' has no known software; set TPU_RUNTIME (TPU7x: gke.yaml)"
}

runtime_of() { # software of a TPU VM, by accelerator type
  case $1 in
    v[234]-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) return 1 ;;
  esac
}

# --- the cloud ----------------------------------------------------------------

# gcloud's errors that another try does not mend
PERMANENT='NOT_FOUND|not found|ALREADY_EXISTS|already exists|PERMISSION_DENIED'
PERMANENT="$PERMANENT|UNAUTHENTICATED|INVALID_ARGUMENT|FAILED_PRECONDITION"
PERMANENT="$PERMANENT|QUOTA_EXCEEDED|[Qq]uota exceeded|unrecognized arguments"
PERMANENT="$PERMANENT|Invalid value|active account|Reauthentication"

is_error() { # of the last command: does its error match?
  grep -E '^ERROR: \(gcloud' "$ERRORS" | grep -qE "$1"
}

# A command of the cloud, tried again after 2, 4, 8, ... seconds. The last
# error stays in the file $ERRORS; QUIET=1 does not show it. Exit status 3 is
# worker.sh's: no further try either.
retry() {
  local try=1 wait=2 status
  if dry; then
    call "$@"
    return
  fi
  while true; do
    {
      if [ -n "${QUIET:-}" ]; then
        "$@" 2>"$ERRORS"
        status=$?
      else
        "$@" 2>&1 >&3 3>&- | tee "$ERRORS" >&2
        status=${PIPESTATUS[0]}
      fi
    } 3>&1
    case $status in 0 | 3) return "$status" ;; esac
    if [ "$try" -ge "$TPU_TRIES" ] || is_error "$PERMANENT"; then
      return "$status"
    fi
    say "failed ($try of $TPU_TRIES tries); again in $wait s" >&2
    pause "$wait"
    try=$((try + 1))
    wait=$((wait * 2))
  done
}

requests() { # gcloud's commands on the queued resource
  retry gcloud compute tpus queued-resources "$@"
}

cloud_state() { # ACTIVE, SUSPENDED, ... or NONE where there is no such TPU
  local state
  if state=$(QUIET=1 requests describe "$TPU_NAME" "${WHERE[@]}" '--format=value(state.state)'); then
    echo "$state"
  elif is_error 'NOT_FOUND|not found'; then
    echo NONE
  else
    cat "$ERRORS" >&2
    return 1
  fi
}

remote() { # a command line on every host of every slice
  requests ssh "$TPU_NAME" "${WHERE[@]}" \
    ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} --node=all --worker=all \
    --batch-size=all --quiet "--command=$1"
}

copy() { # a local file to a path in every host's home
  requests scp "$1" "$TPU_NAME:$2" "${WHERE[@]}" \
    ${TPU_SSH_FLAGS[@]+"${TPU_SSH_FLAGS[@]}"} --node=all --worker=all \
    --batch-size=all --quiet
}

worker() { # a word of worker.sh on every host
  remote "bash jaxrl_tok/tpu/worker.sh $(quote "$@")"
}

request() { # the queued resource that the settings describe
  local track=() flags=()
  case $TPU_CAPACITY in
    spot) flags=(--spot) ;;
    reserved) flags=(--reserved) ;;
    flex-start) # Preview: in gcloud alpha only
      track=(alpha)
      flags=(--provisioning-model=flex-start "--max-run-duration=$TPU_DURATION")
      ;;
  esac
  if [ "$TPU_SLICES" = 1 ]; then
    flags=(${flags[@]+"${flags[@]}"} "--node-id=$TPU_NAME")
  else
    flags=(${flags[@]+"${flags[@]}"} "--node-count=$TPU_SLICES" "--node-prefix=$TPU_NAME")
  fi
  retry gcloud ${track[@]+"${track[@]}"} compute tpus queued-resources create \
    "$TPU_NAME" "${WHERE[@]}" "--accelerator-type=$TPU_TYPE" \
    "--runtime-version=$TPU_RUNTIME" "${flags[@]}" \
    ${TPU_CREATE_FLAGS[@]+"${TPU_CREATE_FLAGS[@]}"}
}

remove() { # the TPU and its request, whatever state they are in
  requests delete "$TPU_NAME" "${WHERE[@]}" --force --quiet || is_error 'NOT_FOUND|not found'
}

# Waits until the state is one of $1, shown as it changes; fails at once in a
# state that it cannot come from.
wait_for() {
  local wanted=$1 state shown=''
  if dry; then
    requests describe "$TPU_NAME" "${WHERE[@]}" '--format=value(state.state)'
    say "... until its state is $wanted"
    return
  fi
  while state=$(cloud_state); do
    if [ "$state" != "$shown" ]; then
      say "$TPU_NAME: $state"
      shown=$state
    fi
    case $state in
      "$wanted") return 0 ;;
      FAILED | SUSPENDED) [ "$wanted" = NONE ] || return 1 ;;
      NONE) return 1 ;;
    esac
    pause "$TPU_POLL"
  done
  return 1
}
