// Included first everywhere: the LibTorch stable ABI that the libraries are built for, and the marker that ties a
// library to the operators' schemas.
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020b000000000000 // 2.11: one binary for it and everything later
#endif
