# Sourced by the other scripts: where things are, and how they talk. Bash 3.2 is enough (macOS).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD
os=$(uname -s)
mlx_dir=$root/.mlx          # Linux: the wheel, mlx-c, bindings, tools; git-ignored
demo_model=$root/models/SmolLM2-135M-Instruct

say()  { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die()  { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root: directly, or through sudo.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"
  elif have sudo; then sudo "$@"
  else die "need root for: $*. Run it as root, or install sudo."
  fi
}

# What mpirun needs on this machine, as an array: more ranks than cores, no pinning (a pinned rank's
# threads would share one core), and root where we are root (containers, CI).
mpirun_flags=(--oversubscribe --bind-to none)
if [ "$(id -u)" -eq 0 ]; then mpirun_flags+=(--allow-run-as-root); fi
