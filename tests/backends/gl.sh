#!/usr/bin/env bash
# Runs a command, or the suite, on GL without a GPU and without a display: the system's Mesa, on the CPU. Installs Mesa
# where it is missing.
#
#   tests/backends/gl.sh                     # the suite: prints N passed, N failed
#   tests/backends/gl.sh COMMAND [ARGS..]    # e.g. target/release/gatefold bench --device gl:
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/backends/common.sh

{ have_library libEGL_mesa.so.0 && compgen -G "/usr/lib/*/dri/swrast_dri.so" > /dev/null; } || install_packages libegl1 libgl1-mesa-dri
export WGPU_BACKEND=gl EGL_PLATFORM=surfaceless LIBGL_ALWAYS_SOFTWARE=1

if [ $# -gt 0 ]; then
  "$@"
else
  gatefold=$(program build --bin gatefold)
  verify gl gl: "$gatefold"
fi
