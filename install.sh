#!/bin/sh
# SPDX-License-Identifier: AGPL-3.0-or-later
# Installs b9agent: finds a Python, gets b9agent.py, checks its SHA-256, and hands over to
# `b9agent.py service install`, which does the rest and says every step (--dry-run: says it only).
#
#   curl -fsSL URL/install.sh | B9AGENT_TOKEN=... sh -s -- --base-url URL --gateway HOST
#   sh /media/usb/install.sh --gateway HOST --token-file FILE     with b9agent.py beside it
#
# All of it stands in one pair of braces, which the shell reads to its end before it does anything: a
# download that was cut off, at whatever byte, does nothing.  The token goes on over a pipe; it is
# never in an argument.

{
# The b9agent.py that this file installs; tests/stamp writes it.
expected_sha256() {
  sha256=54b1bdb0e8d7c7217d2367c0c274418caa9c652243ba03aa68d331955a0bc211
}

usage() {
  printf '%s\n' "usage: sh install.sh [OPTION ...]

  --gateway HOST[:PORT] or URL   the gateway to join
  --pool POOL                    the worker pool
  --machine-id ID                the machine's id, which \`machine create\` printed with the token
  --token-file FILE              file, mode 0600, with the machine token; or set B9AGENT_TOKEN;
                                 or it is asked for
  --system, --user               a service of the machine, through sudo or doas, or of this user;
                                 default: of the machine where that can be, on macOS of the user
  --run-as USER                  whose rights the machine's service has; default: yours
  --python PATH                  the Python to use, 3.8 or newer
  --from DIR                     take b9agent.py from this folder; default: the one beside install.sh
  --base-url URL                 or download it from URL/b9agent.py
  --offline                      no network
  --no-service, --no-start       only the files; everything but the start
  --yes, --quiet                 ask nothing; say only what went wrong
  --dry-run                      print every step, change nothing
  --rollback                     put the previous version back
  --uninstall [--purge]          remove it; with --purge its configuration and state as well
  --help                         this text

B9AGENT_GATEWAY, B9AGENT_POOL, B9AGENT_TOKEN_FILE and so on in the environment do the same.
exit codes: 0 done, 2 usage, 3 token refused, 4 request refused, 5 download failed, 6 another
installer at work or the port taken, 7 more rights needed, 8 unhealthy and rolled back, 9 no service
manager, 10 unsuitable platform or Python, 11 b9agent.py is not the expected one, 70 defect"
}

say() {
  [ -n "$quiet" ] || printf '%s\n' "$*"
}

# fail CODE WHAT HINT
fail() {
  printf 'b9agent: error: %s. %s\n' "$2" "$3" >&2
  exit "$1"
}

last_line() {
  line=${1##*
}
}

is_on() {
  case $1 in '' | 0 | no | false) return 1 ;; esac
}

# One option with its value; switches have the value 1.
set_option() {
  case $1 in
    --gateway) gateway=$2 ;;
    --pool) pool=$2 ;;
    --machine-id) machine_id=$2 ;;
    --token-file) token_file=$2 ;;
    --run-as) run_as=$2 ;;
    --python) python_wanted=$2 ;;
    --from) from=$2 ;;
    --base-url) base_url=$2 ;;
    --system | --user)
      [ -z "$scope" ] || [ "$scope" = "${1#--}" ] ||
        fail 2 "--user and --system exclude each other" "Give one of them"
      scope=${1#--} ;;
    --offline) offline=1 ;;
    --no-service) no_service=1 ;;
    --no-start) no_start=1 ;;
    --yes) yes=1 ;;
    --quiet) quiet=1 ;;
    --dry-run) dry_run=1 ;;
    --rollback) rollback=1 ;;
    --uninstall) uninstall=1 ;;
    --purge) purge=1 ;;
    --token) fail 2 "there is no --token: every user would see it in ps" \
      "Set B9AGENT_TOKEN, or use --token-file FILE" ;;
    *) fail 2 "unknown option $1" "See: sh install.sh --help" ;;
  esac
}

read_environment() {
  # A variable of this name may have been exported to us: then ours would be as well.
  unset token handed
  token=${B9AGENT_TOKEN:-${BETA9_TOKEN:-}}
  unset B9AGENT_TOKEN BETA9_TOKEN
  gateway=${B9AGENT_GATEWAY:-}
  pool=${B9AGENT_POOL:-${BETA9_POOL_NAME:-}}
  machine_id=${B9AGENT_MACHINE_ID:-${BETA9_MACHINE_ID:-}}
  token_file=${B9AGENT_TOKEN_FILE:-}
  run_as=${B9AGENT_RUN_AS:-}
  python_wanted=${B9AGENT_PYTHON:-}
  from=${B9AGENT_FROM:-}
  base_url=${B9AGENT_BASE_URL:-}
  scope='' offline='' no_service='' no_start='' yes='' quiet='' dry_run=''
  rollback='' uninstall='' purge=''
  ! is_on "${B9AGENT_OFFLINE:-}" || offline=1
  ! is_on "${B9AGENT_NO_SERVICE:-}" || no_service=1
  ! is_on "${B9AGENT_NO_START:-}" || no_start=1
  ! is_on "${B9AGENT_YES:-}" || yes=1
  ! is_on "${B9AGENT_QUIET:-}" || quiet=1
  ! is_on "${B9AGENT_DRY_RUN:-}" || dry_run=1
}

read_options() {
  while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
      -h | --help) usage; exit 0 ;;
      --gateway | --pool | --machine-id | --token-file | --run-as | --python | --from | --base-url)
        case ${1:-} in '' | --*) fail 2 "$option needs a value" "See: sh install.sh --help" ;; esac
        set_option "$option" "$1"
        shift ;;
      --gateway=?* | --pool=?* | --machine-id=?* | --token-file=?* | --run-as=?* | --python=?* | \
        --from=?* | --base-url=?*) set_option "${option%%=*}" "${option#*=}" ;;
      --*=*) set_option "${option%%=*}" "" # --token=SECRET must not be shown
        fail 2 "${option%%=*} takes no such value" "See: sh install.sh --help" ;;
      *) set_option "$option" 1 ;;
    esac
  done
  [ -z "$purge" ] || [ -n "$uninstall" ] || fail 2 "--purge goes with --uninstall" "Add it"
  [ -z "$rollback" ] || [ -z "$uninstall" ] ||
    fail 2 "--rollback and --uninstall exclude each other" "Give one of them"
}

find_platform() {
  system=$(uname -s) || system=unknown
  case $system in
    Linux | Darwin) ;;
    *) fail 10 "b9agent runs on Linux and macOS, and this is $system" "Nothing was changed" ;;
  esac
  uid=$(id -u)
  user_code=${XDG_DATA_HOME:-${HOME:-/}/.local/share}/b9agent
  elevate=''
  if [ "$uid" -ne 0 ]; then
    for tool in sudo doas; do
      [ -n "$elevate" ] || ! command -v "$tool" >/dev/null 2>&1 || elevate=$tool
    done
  fi
  [ -n "$scope" ] || {
    scope=system
    [ "$uid" -eq 0 ] || { [ "$system" = Linux ] && [ -n "$elevate" ] && [ ! -d "$user_code" ]; } ||
      scope=user
  }
  installed=/usr/local/lib/b9agent
  [ "$scope" != user ] || installed=$user_code
  if [ "$scope" = user ] || [ -n "$dry_run" ]; then
    elevate=''
  elif [ "$uid" -ne 0 ] && [ -z "$elevate" ]; then
    fail 7 "a service of the machine needs root, and there is neither sudo nor doas" \
      "Run this as root, or with --user. Nothing was changed"
  fi
}

# Prints the interpreter's own path where it is one that will do; else why not.
try_python() {
  "$1" -I -c 'import sys
if sys.version_info < (3, 8):
    sys.exit("is Python %s" % sys.version.split()[0])
try:
    import ctypes, hashlib, http.server, json, ssl
except ImportError as error:
    sys.exit("lacks a part of the standard library (%s)" % error)
print(sys.executable or sys.argv[1])' "$1" </dev/null 2>&1
}

python_folders="/usr/bin /usr/local/bin /opt/homebrew/bin"

find_python() {
  tried=''
  if [ -n "$python_wanted" ]; then
    set -- "$python_wanted"
  else
    set --
    for folder in $python_folders; do
      [ ! -x "$folder/python3" ] || set -- "$@" "$folder/python3"
    done
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python3.8; do
      found=$(command -v "$name" 2>/dev/null) || continue
      # A machine's service must not run what lies in somebody's home.
      case $scope:$found in
        system:"${HOME:-/root}"/* | system:/home/* | system:/root/* | system:/Users/*) ;;
        *) set -- "$@" "$found" ;;
      esac
    done
  fi
  for python; do
    # Without the command line tools Apple's python3 opens a dialog instead of running.
    if [ "$system:$python" = Darwin:/usr/bin/python3 ] && ! xcode-select -p >/dev/null 2>&1; then
      continue
    fi
    if answer=$(try_python "$python"); then
      last_line "$answer"
      python=$line
      return
    fi
    last_line "$answer"
    tried="$tried; $python $line"
  done
  fail 10 "no Python 3.8 or newer was found${tried}" "Install one ($(python_advice)), or name one \
with --python PATH. Nothing was changed"
}

python_advice() {
  if [ "$system" = Darwin ]; then
    printf 'xcode-select --install, or brew install python'
    return
  fi
  # shellcheck disable=SC1091  # it is not there on every machine
  like=$( (. /etc/os-release && printf '%s' "${ID:-} ${ID_LIKE:-}") 2>/dev/null) || like=''
  case " $like " in
    *" debian "* | *" ubuntu "*) printf 'apt-get install python3' ;;
    *" alpine "*) printf 'apk add python3' ;;
    *" fedora "* | *" rhel "* | *" centos "*) printf 'dnf install python3.11' ;;
    *" suse "* | *" opensuse "*) printf 'zypper install python311' ;;
    *" arch "*) printf 'pacman -S python' ;;
    *) printf "with your distribution's tool" ;;
  esac
}

# download URL FILE: the first tool that brings it
download() {
  problem="no curl, no wget"
  if command -v curl >/dev/null 2>&1; then
    ! problem=$(curl -fsSL --connect-timeout 20 -o "$2" "$1" </dev/null 2>&1) || return 0
  fi
  if command -v wget >/dev/null 2>&1; then
    ! problem=$(wget -q -O "$2" "$1" </dev/null 2>&1) || return 0
  fi
  ! problem=$("$python" -I -c 'import shutil, sys, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=20) as reply, open(sys.argv[2], "wb") as file:
        shutil.copyfileobj(reply, file)
except OSError as error:
    sys.exit(str(error))' "$1" "$2" </dev/null 2>&1) || return 0
  last_line "$problem"
  fail 5 "cannot download $1: $line" "Nothing was changed"
}

make_stage() {
  stage=''
  trap '[ -z "$stage" ] || rm -rf "$stage"' EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  stage=$(mktemp -d) || fail 5 "cannot make a temporary folder" "Is the disk full?"
}

# The folder of install.sh itself, where it is a file and b9agent.py lies beside it.
find_neighbour() {
  case $0 in
    */*.sh) folder=${0%/*} ;;
    *.sh) folder=. ;;
    *) return 0 ;; # it comes over a pipe
  esac
  [ ! -f "$0" ] || [ ! -f "$folder/b9agent.py" ] || from=$folder
}

# Leaves a checked copy at $stage/b9agent.py.
get_agent() {
  [ -n "$from" ] || [ -n "$base_url" ] || find_neighbour
  if [ -n "$from" ]; then
    [ -f "$from/b9agent.py" ] || fail 2 "there is no b9agent.py in $from" "Nothing was changed"
    cp "$from/b9agent.py" "$stage/b9agent.py"
  elif [ -z "$base_url" ]; then
    fail 2 "there is no b9agent.py beside this script, and nowhere to download it from" "Put it \
there, or name its folder with --from DIR, or its place with --base-url URL. Nothing was changed"
  elif [ -n "$offline" ]; then
    fail 5 "--offline forbids to download b9agent.py" "Put it beside install.sh. Nothing was changed"
  else
    say "download ${base_url%/}/b9agent.py"
    download "${base_url%/}/b9agent.py" "$stage/b9agent.py"
  fi
  check_agent "$stage/b9agent.py"
}

# With Python, which is there in any case: so the check is never left out.
check_agent() {
  expected_sha256
  code=0
  found=$("$python" -I -c 'import hashlib, sys
with open(sys.argv[1], "rb") as file:
    data = file.read()
print(hashlib.sha256(data).hexdigest())
sys.exit(9 if b"\r" in data else 0)' "$1" </dev/null) || code=$?
  case $code in
    0) ;;
    9) fail 11 "b9agent.py has Windows line ends" "Copy it again, as a binary file. Nothing was changed" ;;
    *) fail 10 "$python cannot read b9agent.py" "Nothing was changed" ;;
  esac
  [ "$found" = "$sha256" ] || fail 11 "b9agent.py is not the one that this install.sh belongs to \
(SHA-256 $found, expected $sha256)" "Get both from one place. Nothing was changed"
  say "checked b9agent.py: SHA-256 $found"
}

# A question on the terminal, wherever standard input comes from; nobody there means yes.
confirm() {
  [ -z "$yes$dry_run" ] || return 0
  (: </dev/tty) 2>/dev/null || return 0
  printf '%s Go on? [Y/n] ' "$1" >/dev/tty
  read -r answer </dev/tty || answer=n
  case $answer in '' | y | Y | yes) ;; *) fail 2 "you said no" "Nothing was changed" ;; esac
}

as_root() {
  case $elevate:$yes in
    sudo:1 | doas:1) "$elevate" -n "$@" ;;
    sudo: | doas:) "$elevate" "$@" ;;
    *) "$@" ;;
  esac
}

# hand_over FILE ARGUMENT ...: what sudo would drop, and what ps must not show, goes over a pipe.
hand_over() {
  handed="https_proxy=${https_proxy:-${HTTPS_PROXY:-}}
no_proxy=${no_proxy:-${NO_PROXY:-}}"
  [ -z "$token" ] || handed="BETA9_TOKEN=$token
$handed"
  file=$1
  shift
  set -- "$python" -I "$file" "$@" --environment-stdin
  code=0
  case $(command -v printf) in
    /*) as_root "$@" <<END || code=$?
$handed
END
      ;; # a printf that is a program would show the token as its argument
    *) printf '%s\n' "$handed" | as_root "$@" || code=$? ;;
  esac
  finish "$code"
}

finish() {
  [ "$1" -ne 1 ] || [ -z "$elevate" ] ||
    fail 7 "$elevate did not let us" "Run this as root, or with --user. Nothing was changed"
  exit "$1"
}

remove() {
  # Without an installed copy there may still be a state folder to purge, with another one.
  file=$installed/b9agent.py
  [ -n "$from$base_url" ] || find_neighbour
  if [ ! -f "$file" ]; then
    [ -n "$from$base_url" ] || { say "nothing is installed in $installed"; exit 0; }
    make_stage
    get_agent
    file=$stage/b9agent.py
  fi
  set -- service uninstall --config /dev/null "--$scope"
  [ -z "$run_as" ] || set -- "$@" --run-as "$run_as"
  [ -z "$purge" ] || set -- "$@" --purge
  [ -z "$quiet" ] || set -- "$@" --quiet
  [ -z "$dry_run" ] || set -- "$@" --dry-run
  confirm "This removes b9agent from this machine${purge:+, with its configuration and token}."
  code=0
  as_root "$python" -I "$file" "$@" </dev/null || code=$?
  finish "$code"
}

main() {
  set -eu
  umask 022
  read_environment
  read_options "$@"
  find_platform
  find_python
  [ -z "$uninstall" ] || remove
  set -- service install "--$scope"
  [ -z "$gateway" ] || set -- "$@" --gateway "$gateway"
  [ -n "$gateway" ] || [ -z "${BETA9_GATEWAY_HOST:-}" ] ||
    set -- "$@" --gateway-host "$BETA9_GATEWAY_HOST"
  [ -n "$gateway" ] || [ -z "${BETA9_GATEWAY_PORT:-}" ] ||
    set -- "$@" --gateway-port "$BETA9_GATEWAY_PORT"
  [ -z "$pool" ] || set -- "$@" --pool "$pool"
  [ -z "$machine_id" ] || set -- "$@" --machine-id "$machine_id"
  [ -z "$token_file" ] || set -- "$@" --token-file "$token_file"
  [ -z "$run_as" ] || set -- "$@" --run-as "$run_as"
  for switch in ${offline:+--offline} ${no_service:+--no-service} ${no_start:+--no-start} \
    ${yes:+--yes} ${quiet:+--quiet} ${dry_run:+--dry-run} ${rollback:+--rollback}; do
    set -- "$@" "$switch"
  done
  if [ -n "$rollback" ]; then
    [ -f "$installed/b9agent.py" ] || fail 2 "nothing is installed in $installed" "Nothing was changed"
    hand_over "$installed/b9agent.py" "$@"
  fi
  make_stage
  get_agent
  confirm "This installs b9agent for the $scope${elevate:+, with $elevate} (--dry-run shows each step)."
  hand_over "$stage/b9agent.py" "$@"
}

main "$@"
}
