#!/bin/sh
# Stands for the C++ compiler and for nvcc where only the build's own behaviour is tested: leaves the files that they
# would, logs its arguments. STUB_BROKEN names a source that "does not compile", STUB_RELEASE and STUB_CODES what nvcc is.
case "$1" in
    --version) echo "stub compiler, release ${STUB_RELEASE:-13.0}, V0"; exit ;;
    --list-gpu-code) echo "${STUB_CODES:-sm_75 sm_80 sm_86 sm_90 sm_100 sm_103 sm_120 sm_121}"; exit ;;
esac
echo "$0 $*" >>"$STUB_LOG"
for word; do
    case "$before" in
        -o) output="$word" ;;
        -MF) dependencies="$word" ;;
        -c) source="$word" ;;
    esac
    before="$word"
done
if [ -n "$source" ]; then
    if [ "$source" = "$STUB_BROKEN" ]; then
        echo "$source(3): error: identifier \"nonsense\" is undefined" >&2
        exit 2
    fi
    echo "object : $source $(dirname "$source")/header.h" >"$dependencies"
    case "$source" in *.cu)
        echo "ptxas info    : Used 8 registers, used 0 barriers" >&2
        echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" >&2
        echo "ptxas warning : stub warning" >&2 ;;
    esac
fi
echo built >"$output"
