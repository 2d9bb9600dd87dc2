// Include this first: the version of LibTorch's stable ABI that the libraries are built for.
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020b000000000000 // 2.11: the binary runs with it and all later versions
#endif
