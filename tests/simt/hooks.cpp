// What the tests ask of the emulation inside a library of kernels (emulation.py).
#include "mutant.h"
#include "simt.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Draws the order of all later launches.
EXPORTED void simt_seed(unsigned seed) { simt::seed(seed); }

// Launches so far.
EXPORTED unsigned long simt_launches() { return simt::launches(); }

// Chooses a mutant, in a library that has them.
EXPORTED void simt_mutant(int number) { simt::mutant = number; }
