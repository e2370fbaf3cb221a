#!/bin/sh
# Compiles the library and csrc/sanitize/driver.cpp for Windows, on any system, with the compiler that
# builds the package there, and runs every operator over odd shapes under Wine.
#
#   pip install ziglang cmake ninja && csrc/windows.sh
#
# WINE chooses the program that runs the driver, BUILD_DIR where the build goes.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD_DIR:-$here/build/windows}
cmake -S "$here" -B "$build" -G Ninja -DUPFEAT_DRIVER=ON -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=AMD64 \
  "-DCMAKE_C_COMPILER=python-zig;cc" -DCMAKE_C_COMPILER_TARGET=x86_64-windows-gnu \
  "-DCMAKE_CXX_COMPILER=python-zig;c++" -DCMAKE_CXX_COMPILER_TARGET=x86_64-windows-gnu >/dev/null
cmake --build "$build"
cd "$build"  # Windows looks for the library beside the program
WINEDEBUG=${WINEDEBUG:--all} "${WINE:-wine}" sanitize_driver.exe
