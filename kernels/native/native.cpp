#include "common.h"

BERNINI_API int bernini_native_abi_version() { return BERNINI_NATIVE_ABI; }
