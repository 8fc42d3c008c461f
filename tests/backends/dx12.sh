#!/usr/bin/env bash
# Runs the Windows build of the `gatefold` command on Direct3D 12 without Windows or a GPU: Wine of Debian 13 in a folder of its
# own, vkd3d on Mesa's llvmpipe, shaders compiled by Microsoft's FXC.
#
#   tests/backends/dx12.sh                 # the suite: prints N passed, N failed
#   tests/backends/dx12.sh ARGUMENTS..     # of the command, e.g. devices, or bench --device dx12:
#
# Files are those of the repository: name them relative to its root. Needs root, or user namespaces.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/backends/common.sh

folder=$backends/dx12
target=x86_64-pc-windows-gnu

# Runs a Windows program in the Debian 13 root, which sees the repository and what was built, under their own paths. Namespaces
# see to it that no mount and no process outlives it, and that the X display's number is free.
wine() {
  local user=()
  [ "$(id -u)" -eq 0 ] || user=(--user --map-root-user)
  # shellcheck disable=SC2016 # scripts for the shells inside
  unshare "${user[@]}" --mount --net --pid --fork --kill-child bash -euc '
    root=$1 built=$2 reports=$3
    shift 3
    mount -t proc proc "$root/proc"
    for place in /dev /sys; do mount --rbind "$place" "$root$place"; done
    mount -t tmpfs tmpfs "$root/tmp"
    for place in "$PWD" "$built" "$reports"; do
      mkdir -p "$place" "$root$place"
      mount --bind "$place" "$root$place"
    done
    exec chroot "$root" env --ignore-environment --chdir="$PWD" "$@"
  ' bash "$folder" "$(built_for "$target")" "$reports" \
    HOME=/root PATH=/usr/bin XDG_RUNTIME_DIR=/tmp ${RUST_LOG:+"RUST_LOG=$RUST_LOG"} \
    WINEARCH=win64 WINEDEBUG="${WINEDEBUG:--all}" WINEDLLOVERRIDES='mscoree,mshtml=;d3dcompiler_47=n' \
    VK_DRIVER_FILES=/usr/share/vulkan/icd.d/lvp_icd.json WGPU_BACKEND=dx12 \
    sh -uc '
      mkfifo /tmp/display
      Xvfb -displayfd 3 3> /tmp/display > /tmp/xvfb.log 2>&1 &
      read -r display < /tmp/display || { cat /tmp/xvfb.log >&2; exit 1; }
      DISPLAY=:$display /usr/lib/wine/wine64 "$@"
      status=$?
      /usr/lib/wine/wineserver -k # writes its registry
      exit $status
    ' sh "$@"
}

set_up() {
  local part=$folder.new wheel=$folder.wheel zlib
  have pip3 || install_packages python3-pip
  rm -rf "$part" "$wheel"
  unpack "$part" trixie base-files bash coreutils dash mesa-vulkan-drivers libgl1 libgl1-mesa-dri libegl1 wine64 xvfb
  # What the package of Wine does when it is installed: zlib gets the mark of Wine's own libraries.
  zlib=$part/usr/lib/x86_64-linux-gnu/wine/x86_64-windows/zlib1.dll
  cp "$part/usr/x86_64-w64-mingw32/lib/zlib1.dll" "$zlib"
  { printf 'Wine builtin DLL'; head -c 16 /dev/zero; } | dd of="$zlib" bs=1 seek=64 conv=notrunc status=none
  folder=$part wine wineboot -i
  # FXC comes with Windows. Wine's own compiler cannot compile these shaders, so it is taken from a package for Windows programs
  # that ships it.
  pip3 download -q --no-deps --only-binary :all: --platform win_amd64 --python-version 3.11 --implementation cp --abi cp311 \
    --dest "$wheel" kivy-deps.angle==0.5.0
  python3 -m zipfile -e "$wheel"/*.whl "$wheel"
  cp "$(find "$wheel" -name d3dcompiler_47.dll)" "$part/root/.wine/drive_c/windows/system32/"
  rm -rf "$wheel"
  mv "$part" "$folder"
}

[ -e "$folder" ] || set_up
cross_cargo "$target" build --features cli --bin gatefold
gatefold=$(built_for "$target")/debug/gatefold.exe

if [ $# -gt 0 ]; then
  wine "$gatefold" "$@"
else
  verify dx12 dx12: wine "$gatefold"
fi
