#!/usr/bin/env bash
# Runs a command, or the kernel tests, on a Vulkan driver of another release than the system's. The driver's packages are
# fetched from the mirror that this Debian machine already uses and unpacked into a folder of their own; nothing is installed.
#
#   tests/backends/vulkan.sh DRIVER                    # the kernel tests: prints N passed, N failed
#   tests/backends/vulkan.sh DRIVER COMMAND [ARGS..]   # e.g. target/release/gatefold bench --device vulkan:llvmpipe
#
# DRIVER: mesa22 (Debian 12), mesa25 (its backports), mesa26 (unstable; has cooperative matrices), swiftshader (Chromium's)
set -euo pipefail
cd "$(dirname "$0")/../.."

case "${1:-}" in
  mesa22) suite=bookworm packages="libvulkan1 mesa-vulkan-drivers" icd=usr/share/vulkan/icd.d/lvp_icd.x86_64.json whole= ;;
  mesa25) suite=bookworm-backports packages="libvulkan1 mesa-vulkan-drivers" icd=usr/share/vulkan/icd.d/lvp_icd.json whole= ;;
  # Its libraries need a newer C library than the system's: all of them come along, with their loader.
  mesa26) suite=sid packages="libvulkan1 mesa-vulkan-drivers libgcc-s1" icd=usr/share/vulkan/icd.d/lvp_icd.json whole=yes ;;
  swiftshader) suite=bookworm-security packages="libvulkan1 chromium-headless-shell" icd=usr/lib/chromium/vk_swiftshader_icd.json whole= ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
driver=$1
shift
folder=$(realpath -m "${GATEFOLD_BACKENDS:-target/backends}")/$driver

# The archive that holds a suite, as the system's own package sources name it.
archive() {
  local release=$1
  [ "$release" = bookworm-security ] || release=bookworm
  apt-get indextargets --format '$(REPO_URI) $(RELEASE)' | awk -v release="$release" '$2 == release { print $1; exit }'
}

fetch() {
  local uri work=$folder.part
  [ -n "$(archive bookworm)" ] || apt-get update -qq
  uri=$(archive "$suite")
  [ -n "$uri" ] || { echo "vulkan.sh: the package sources of this machine name no Debian archive" >&2; exit 1; }
  rm -rf "$work"
  mkdir -p "$work"/apt/{lists,cache/archives}/partial
  # A suite of another release comes beside the system's own, from which its packages may take what they need.
  {
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite main"
    [ -n "$whole" ] || echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(archive bookworm) bookworm main"
  } > "$work/apt/sources.list"
  local options=(-qq -o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1)
  # With an empty list of installed packages all that a package needs is fetched.
  if [ -n "$whole" ]; then : > "$work/apt/status"; options+=(-o Dir::State::status="$work/apt/status"); fi
  apt-get "${options[@]}" update
  # shellcheck disable=SC2086 # a list of words
  apt-get "${options[@]}" -o APT::Install-Recommends=0 -y --download-only --reinstall -t "$suite" install $packages
  for package in "$work"/apt/cache/archives/*.deb; do dpkg -x "$package" "$work"; done
  rm -rf "$work/apt"
  # The driver's description names its library by an absolute path of a system where it is installed, or from its own folder.
  sed -i "s|\"/usr/lib/|\"$folder/usr/lib/|" "$work/$icd"
  rm -rf "$folder"
  mv "$work" "$folder"
}

[ -e "$folder/$icd" ] || fetch

libraries=$folder/usr/lib/x86_64-linux-gnu:$folder/lib/x86_64-linux-gnu
export VK_DRIVER_FILES=$folder/$icd VK_ICD_FILENAMES=$folder/$icd WGPU_BACKEND=vulkan
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

run() {
  if [ -n "$whole" ]; then
    "$folder/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$libraries" "$@"
  else
    LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$@"
  fi
}

if [ $# -gt 0 ]; then
  run "$@"
  exit
fi

program=$(cargo test --all-features --test kernels --no-run --message-format json-render-diagnostics |
  grep -o '"executable":"[^"]*/kernels-[^"]*"' | cut -d'"' -f4)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
run "$program" vulkan: 2>&1 | tee "$log" || status=$?
sed -n 's/^test result: .*\. \([0-9]* passed\); \([0-9]* failed\).*/\1, \2/p' "$log" | sed "s/^/$driver: /"
# Without an adapter of the driver there are no tests, and none that fails.
grep -Eq '^test result: .* [1-9][0-9]* passed' "$log" || status=1
exit "$status"
