#!/bin/sh
# Builds the library with matrix tiles (AMX) emulated and runs the tests of the kernels that use
# them, in minutes, on a machine with AVX512-BF16 but without AMX.
#
#   csrc/emulate.sh [arguments of pytest]
#
# PYTHON chooses the interpreter, CXX the compiler, BUILD_DIR where the build goes.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD_DIR:-$here/build/emulated-tiles}
cmake -S "$here" -B "$build" -DUPFEAT_EMULATE_TILES=ON -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$build" --target upfeat --parallel 2
cd "$here"
UPFEAT_LIBRARY=$(find "$build" -name 'libupfeat.so' -print -quit) \
  "${PYTHON:-python3}" -m pytest tests/backends -k amx "$@"
