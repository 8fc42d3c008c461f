#!/usr/bin/env bash
# The suite, or the example `web`, in headless Chromium: real WebGPU on SwiftShader, the software driver that Chromium brings along.
#
#   tests/backends/webgpu.sh [FAMILY]                 # the suite, or what has FAMILY in its name, on WebGPU and on the CPU as
#                                                     # WebAssembly: prints N passed, N failed for each
#   tests/backends/webgpu.sh example [SCREENSHOT.png]  # the page trains on WebGPU, and on the CPU where the browser has no WebGPU
#
# The suite is written in calls that wait, which takes a browser with JavaScript Promise Integration.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/backends/common.sh
source tests/backends/common.sh

have python3 || install_packages python3
folder=$backends/chromium
[ -e "$folder" ] || unpack "$folder" "$release-security" chromium-headless-shell
libraries=$folder/usr/lib/x86_64-linux-gnu

# Opens a page: visit FOLDER PAGE [OPTION..]
visit() {
  LD_LIBRARY_PATH=$libraries:$libraries/pulseaudio \
    python3 tests/backends/browser.py "$folder/usr/lib/chromium/chromium-headless-shell" "$@"
}

case "${1:-}" in
  example)
    page=$backends/web
    examples/web/build.sh "$page"
    visit "$page" 'index.html?device=webgpu:&steps=40&hidden=64' --expect '(webgpu, ' ${2:+--screenshot "$2"}
    # Without its flags the browser has no adapter here, and the page trains on the CPU.
    visit "$page" 'index.html?steps=40&hidden=64' --expect '(native, ' --without-webgpu
    ;;
  *)
    page=$backends/webgpu-suite
    bundle gatefold-webgpu-suite tests/backends/webgpu/index.html "$page"
    mkdir -p "$reports"
    save=(--save "$reports")
    [ -z "${1:-}" ] || save=() # that of the whole suite stays
    status=0
    for query in 'device=cpu&name=wasm' 'device=webgpu:&name=webgpu'; do
      visit "$page" "index.html?$query&family=${1:-}" --seconds 5400 "${save[@]}" || status=1
    done
    exit "$status"
    ;;
esac
