#!/usr/bin/env bash
# Runs the suite on the shaders as Metal gets them, without a Mac: naga's MSL compiled as C++ and executed on the CPU thread by
# thread. It stands in for Apple's compiler and driver, and proves the translation, not them. For x86-64; installs g++ where it is missing.
#
#   tests/backends/metal.sh                              # all families and case files: prints N passed, N failed
#   tests/backends/metal.sh gemm --simd 8 --seed 7 ..    # see --help
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/backends/common.sh

have "${CXX:-g++}" || { [ -z "${CXX:-}" ] || die "there is no $CXX"; install_packages g++; }
cargo test --quiet --package gatefold-metal # what the harness must notice
[ $# -gt 0 ] || { mkdir -p "$reports"; set -- --report "$reports/metal"; }
count metal cargo run --quiet --package gatefold-metal -- --folder "$backends/metal" "$@"
