#!/usr/bin/env bash
# Runs a command, or the suite, on a Vulkan driver of another release than the system's. The driver's packages are
# fetched from the mirror that this Debian machine already uses and unpacked into a folder of their own; nothing is installed.
#
#   tests/backends/vulkan.sh DRIVER                    # the suite: prints N passed, N failed
#   tests/backends/vulkan.sh DRIVER COMMAND [ARGS..]   # e.g. target/release/gatefold bench --device vulkan:llvmpipe
#
# DRIVER: mesa22 (Debian 12), mesa25 (its backports), mesa26 (unstable; has cooperative matrices), swiftshader (Chromium's)
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/backends/common.sh

case "${1:-}" in
  mesa22) suite=bookworm packages="libvulkan1 mesa-vulkan-drivers" icd=usr/share/vulkan/icd.d/lvp_icd.x86_64.json ;;
  mesa25) suite=bookworm-backports packages="libvulkan1 mesa-vulkan-drivers" icd=usr/share/vulkan/icd.d/lvp_icd.json ;;
  mesa26) suite=sid packages="libvulkan1 mesa-vulkan-drivers libgcc-s1" icd=usr/share/vulkan/icd.d/lvp_icd.json ;;
  swiftshader) suite=bookworm-security packages="libvulkan1 chromium-headless-shell" icd=usr/lib/chromium/vk_swiftshader_icd.json ;;
  *) sed -n '2,9s/^# \{0,1\}//p' tests/backends/vulkan.sh; exit 2 ;;
esac
driver=$1
shift
folder=$backends/$driver
# shellcheck disable=SC2086 # a list of words
[ -e "$folder" ] || unpack "$folder" "$suite" $packages
# The driver's description names its library by an absolute path of a system where it is installed, or from its own folder.
sed -i "s|\"/usr/lib/|\"$folder/usr/lib/|" "$folder/$icd"

libraries=$folder/usr/lib/x86_64-linux-gnu:$folder/lib/x86_64-linux-gnu
export VK_DRIVER_FILES=$folder/$icd VK_ICD_FILENAMES=$folder/$icd WGPU_BACKEND=vulkan

run() {
  if foreign "$suite"; then
    # The libraries need a newer C library than the system's: it came along, and so did its loader.
    "$folder/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$libraries" "$@"
  else
    LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$@"
  fi
}

if [ $# -gt 0 ]; then
  run "$@"
else
  gatefold=$(program build --bin gatefold)
  verify "$driver" vulkan: run "$gatefold"
fi
