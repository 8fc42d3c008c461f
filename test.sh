#!/usr/bin/env bash
# Runs all tests, on a bare Debian or Ubuntu machine too: installs a C linker and software drivers of Vulkan and GL where
# there are none. A machine with a GPU and its driver needs nothing installed. Arguments go to `cargo test`.
#
#   ./test.sh                    every test on every device of this machine
#   ./test.sh --test kernels gl  some of them
set -euo pipefail
cd "$(dirname "$0")"
source tests/backends/common.sh

# Whether the Vulkan loader and at least one driver (a JSON file) are installed.
have_vulkan() {
  have_library libvulkan.so.1 || return 1
  local listed=${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}
  if [ -n "$listed" ]; then
    local place
    local -a places
    IFS=: read -ra places <<< "$listed"
    for place in "${places[@]}"; do [ -e "$place" ] && return 0; done
    die "VK_DRIVER_FILES or VK_ICD_FILENAMES names no file that exists: $listed"
  fi
  compgen -G '/usr/share/vulkan/icd.d/*.json' > /dev/null || compgen -G '/usr/local/share/vulkan/icd.d/*.json' > /dev/null ||
    compgen -G '/etc/vulkan/icd.d/*.json' > /dev/null || compgen -G "${HOME:-}/.local/share/vulkan/icd.d/*.json" > /dev/null
}

if [ "$(uname -s)" = Linux ]; then
  packages=()
  have cc || packages+=(gcc libc6-dev)
  have_vulkan || packages+=(libvulkan1 mesa-vulkan-drivers)
  have_library libEGL.so.1 || packages+=(libegl1 libgl1-mesa-dri)
  [ ${#packages[@]} -eq 0 ] || install_packages "${packages[@]}"
fi

have cargo || die "cargo is missing: install Rust with rustup, as the Rust project's home page describes"

start=$SECONDS
status=0
cargo test --all-features --no-fail-fast "$@" || status=$?
if [ "$status" -eq 0 ]; then
  echo "test.sh: ALL TESTS PASSED in $((SECONDS - start)) s"
else
  echo "test.sh: TESTS FAILED (cargo test ended with status $status) after $((SECONDS - start)) s"
fi
exit "$status"
