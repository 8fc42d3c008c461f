#!/usr/bin/env bash
# Builds the page that trains the character model in a browser. Any web server shows it, on this machine's own address or by HTTPS:
# browsers give WebGPU to no other page.
#
#   examples/web/build.sh [FOLDER]                 # default target/web
#   python3 -m http.server --directory target/web
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=tests/backends/common.sh
source tests/backends/common.sh

folder=${1:-target/web}
bundle gatefold-web examples/web/index.html "$folder"
echo "built: $folder/index.html"
