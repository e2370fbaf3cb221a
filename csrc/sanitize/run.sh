#!/bin/sh
# Builds the kernels and csrc/sanitize/driver.cpp with sanitizers and runs every operator over odd
# shapes. Exits non-zero on any finding.
#
#   csrc/sanitize/run.sh           AddressSanitizer and UndefinedBehaviorSanitizer
#   csrc/sanitize/run.sh thread    ThreadSanitizer
#
# CXX chooses the compiler, BUILD_DIR where the build goes (default build/sanitize-<kind>).
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
kind=${1:-address}
case $kind in
  address) flags="-fsanitize=address,undefined -fno-sanitize-recover=all" ;;
  thread) flags="-fsanitize=thread" ;;
  *) echo "usage: $0 [address|thread]" >&2; exit 2 ;;
esac
build=${BUILD_DIR:-$here/build/sanitize-$kind}
cmake -S "$here" -B "$build" -DUPFEAT_SANITIZE="$flags" -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
cmake --build "$build" --target sanitize_driver --parallel 2
# Not detect_stack_use_after_return=1: GCC's frames for it do not keep 64-byte vectors aligned.
ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=0} \
UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1} \
TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1} \
  "$build/sanitize_driver"
