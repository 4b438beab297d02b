// What the native twins share. A family's native.cpp includes this file and exports plain C functions.
//
// The library links neither to libtorch nor to an OpenMP runtime: loader.py loads it after torch, so that its GOMP_*
// symbols meet the runtime torch already uses. Every exported function takes the thread count as its last argument.
#pragma once

#include <cstdint>

// Raised together with ABI in loader.py whenever the arguments of any exported function change.
#define BERNINI_NATIVE_ABI 1

#define BERNINI_API extern "C" __attribute__((visibility("default")))

// Compiles a function for plain x86-64, AVX2 and AVX-512; the dynamic linker picks by the CPU. Put it on the function
// that holds the arithmetic (GCC carries it over to the OpenMP regions inside); helpers it calls must be inline.
#if defined(BERNINI_HAVE_CLONES)
#define BERNINI_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define BERNINI_CLONES
#endif
