#!/usr/bin/env bash
# The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, for every instruction set that
# this processor has, and the reader of packed models on damaged files. Stops at the first finding.
#
#     tests/native/sanitize.sh BUILD_DIRECTORY      (python with the project's packages, cmake and g++ in PATH)
set -euo pipefail
source="$(cd "$(dirname "$0")/../.." && pwd)"
mkdir -p "$1"
build="$(cd "$1" && pwd)"
cd "$source"

# ThreadSanitizer wants its addresses where newer kernels may put libraries: no randomisation, where that is allowed.
run=()
if setarch "$(uname -m)" -R true 2>/dev/null; then run=(setarch "$(uname -m)" -R); fi

for sanitizer in address thread; do
  cmake -S . -B "$build/$sanitizer" -DFUSED_EBM_SANITIZE="$sanitizer" >"$build/$sanitizer.log"
  cmake --build "$build/$sanitizer" >>"$build/$sanitizer.log" || { cat "$build/$sanitizer.log"; exit 1; }
done
for isa in amx vnni avx512 avx2 generic; do
  echo -n "address, undefined: "
  FUSED_EBM_ISA="$isa" "$build/address/sanitize" all
  echo -n "thread: "
  FUSED_EBM_ISA="$isa" "${run[@]}" "$build/thread/sanitize" threads
done
python -m kernels pack models/demo "$build/demo.febm" >"$build/pack.log"
echo -n "address, undefined: "
"$build/address/fuzz_febm" "$build/demo.febm" "$build/damaged.febm"
