# What the scripts of this folder share; sourced, from the repository's root.
#
# Packages of the system's own release are installed into the system. Those of other releases are unpacked into folders of
# their own under GATEFOLD_BACKENDS (default target/backends), from the archive that this Debian machine already uses.
# shellcheck shell=bash

backends=${GATEFOLD_BACKENDS:-target/backends}
[[ $backends = /* ]] || backends=$PWD/$backends
reports=$backends/reports
# The system's own release, as its archive names it: bookworm. None where the system is not Linux.
release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release 2> /dev/null || true)
# EGL, Mesa and Wine complain without it.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}}

have() { command -v "$1" > /dev/null; }

# Whether the dynamic linker knows a library: have_library libEGL.so.1
have_library() {
  local libraries
  libraries=$(ldconfig -p 2> /dev/null || /sbin/ldconfig -p) # no pipe: grep -q would break it, and pipefail call that a miss
  grep -qF "$1" <<< "$libraries"
}

die() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# A command by root: as_root COMMAND..
as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else
    have sudo || die "needs root, or sudo: $*"
    sudo "$@"
  fi
}

# Installs packages of the system's own release: install_packages PACKAGE..
install_packages() {
  have apt-get || die "missing, and there is no apt-get to install them with: $* (Debian's names)"
  echo "$(basename "$0"): installing $*" >&2
  as_root apt-get update -qq >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

# The archive that holds a suite, as the system's own package sources name it: archive SUITE
archive() {
  local named=$release
  case "$1" in *-security) named=$release-security ;; esac
  # shellcheck disable=SC2016 # names that apt-get fills in
  apt-get indextargets --format '$(REPO_URI) $(RELEASE)' | awk -v release="$named" '$2 == release && !found++ { print $1 }'
}

# Whether a suite is of another release than the system: all that its packages need comes along then, down to the C library.
foreign() {
  case "$1" in "$release" | "$release"-*) return 1 ;; *) return 0 ;; esac
}

# Fetches packages of a suite, with what they need and the system lacks, and unpacks them: unpack FOLDER SUITE PACKAGE..
# The folder must not exist; only a whole one gets its name.
unpack() {
  local folder=$1 suite=$2 work=$1.part uri package
  shift 2
  [ -n "$(archive "$release")" ] || as_root apt-get update -qq
  uri=$(archive "$suite")
  [ -n "$uri" ] || die "the package sources of this machine name no Debian archive for $suite"
  rm -rf "$work"
  mkdir -p "$work"/apt/{lists,cache/archives}/partial
  # What goes with the system takes from the system's own release what it needs.
  {
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite main"
    foreign "$suite" || echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(archive "$release") $release main"
  } > "$work/apt/sources.list"
  local options=(-qq -o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1)
  # With an empty list of installed packages all that a package needs is fetched.
  if foreign "$suite"; then : > "$work/apt/status"; options+=(-o Dir::State::status="$work/apt/status"); fi
  apt-get "${options[@]}" update
  apt-get "${options[@]}" -o APT::Install-Recommends=0 -y --download-only --reinstall -t "$suite" install "$@"
  for package in "$work"/apt/cache/archives/*.deb; do dpkg -x "$package" "$work"; done
  rm -rf "$work/apt"
  mv "$work" "$folder"
}

# cargo for another target, into the folder built_for TARGET: cross_cargo TARGET SUBCOMMAND [ARGUMENTS..]
# Where the user's toolchain lacks the target's standard library (`rustup target add` brings it), the library is built by a
# compiler that comes with its own sources: Debian's, kept recent for browsers.
cross_cargo() {
  local target=$1 subcommand=$2 toolchain=$backends/rust linker
  shift 2
  have cc || install_packages gcc libc6-dev # build scripts run here
  linker=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<< "$target")_LINKER
  case "$target" in
    *-pc-windows-gnu)
      have x86_64-w64-mingw32-gcc-win32 || install_packages gcc-mingw-w64-x86-64-win32
      local variables=("$linker=x86_64-w64-mingw32-gcc-win32")
      ;;
    wasm32-*) local variables=("$linker=$(rustc --print sysroot)/lib/rustlib/$(rustc --print host-tuple)/bin/rust-lld") ;;
    *) die "no linker is known for $target" ;;
  esac
  if compgen -G "$(rustc --print target-libdir --target "$target")/libstd-*" > /dev/null; then
    env "${variables[@]}" cargo "$subcommand" --target "$target" --target-dir "$backends/build" "$@"
    return
  fi
  [ "$(uname -m)" = x86_64 ] || die "missing: the standard library of $target; rustup target add $target brings it"
  [ -e "$toolchain" ] || unpack "$toolchain" "$release-security" rustc-web cargo-web rust-web-src
  # -Z is for nightly compilers, and for those that are told to be one.
  env "${variables[@]}" LD_LIBRARY_PATH="$toolchain/usr/lib/x86_64-linux-gnu" RUSTC="$toolchain/usr/bin/rustc" RUSTC_BOOTSTRAP=1 \
    "$toolchain/usr/bin/cargo" "$subcommand" -Zbuild-std=std,panic_abort --target "$target" --target-dir "$backends/build" "$@"
}

# Where cross_cargo leaves what it built, above the folder of the profile: built_for TARGET
built_for() { echo "$backends/build/$1"; }

# A crate as a page for browsers: its module, the JavaScript side, and the page beside them: bundle PACKAGE PAGE FOLDER
bundle() {
  local package=$1 page=$2 folder=$3 module
  RUSTFLAGS="-C target-feature=+simd128" CARGO_PROFILE_RELEASE_DEBUG=false \
    cross_cargo wasm32-unknown-unknown build --release --package "$package"
  module=$(built_for wasm32-unknown-unknown)/release/${package//-/_}.wasm
  mkdir -p "$folder"
  cargo run --quiet --package gatefold-bindgen --target-dir "$backends/build" -- "$module" "$folder"
  cp "$page" "$folder"
}

# Builds a program for this machine, with all features, and names it: program CARGO_SUBCOMMAND..
program() {
  have cc || install_packages gcc libc6-dev
  cargo "$@" --all-features --message-format json-render-diagnostics | sed -En 's/.*"executable":"([^"]*)".*/\1/p'
}

# Runs the suite of `gatefold verify` on a device, by the words before its arguments, and says what it counted; the report stays
# as NAME.md and NAME.json in the folder `reports`: verify NAME DEVICE COMMAND..
verify() {
  local name=$1 device=$2
  shift 2
  mkdir -p "$reports"
  echo "The report: $reports/$name.md" >&2
  count "$name" "$@" verify --device "$device" --cases tests/fixtures/cases --cases tests/fixtures/onnx --report "$reports/$name"
}

# Runs a suite by a command and says as the last line what the suite counted: count NAME COMMAND..
# Fails with the command, and when no test ran: without an adapter there are none, and none that fails.
count() {
  local name=$1 log counted status=0
  shift
  log=$(mktemp)
  "$@" 2>&1 | tee "$log" || status=$?
  counted=$(sed -En 's/^(test result: .*\. )?([0-9]+ passed)[;,] ([0-9]+ failed).*/\2, \3/p' "$log" | tail -1)
  rm "$log"
  [[ $counted = [1-9]* ]] || status=1
  echo "$name: ${counted:-0 passed, 0 failed}"
  return "$status"
}
