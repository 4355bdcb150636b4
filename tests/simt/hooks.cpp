// What the tests ask of the emulation inside a library of kernels (emulation.py).
#include "simt.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Draws the order of all later launches.
EXPORTED void simt_seed(unsigned seed) { simt::seed(seed); }

// Launches so far.
EXPORTED unsigned long simt_launches() { return simt::launches(); }
