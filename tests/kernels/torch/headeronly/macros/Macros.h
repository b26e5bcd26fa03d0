// What the kernels' loops want of PyTorch's header.
#pragma once

#define C10_NOINLINE __attribute__((noinline))
