// Which wrong version of the kernels runs (mutants.py); 0: none.
#pragma once

namespace simt {
inline int mutant = 0;
}
