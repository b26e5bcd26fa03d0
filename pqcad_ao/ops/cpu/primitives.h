// The primitives that the kernels are written against: chosen here, for the instruction set that is compiled for.
//
// An instruction set is one file that defines what generic.h does and says there. It is added below.
#pragma once

#if defined(PQCAD_GENERIC)
#include "generic.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include "neon.h"
#else
#define PQCAD_NO_PRIMITIVES
#endif
