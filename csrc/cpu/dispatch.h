// Which implementations there are.
#ifndef SIGNVOTE_CPU_DISPATCH_H
#define SIGNVOTE_CPU_DISPATCH_H

#include <stddef.h>

#include "../kernels.h"

namespace signvote {

// The implementations that this CPU and its operating system can run, best first; the last is "portable".
const Kernels* const* implementations(size_t* count);

}  // namespace signvote

#endif
