// Memory that ends when a test says so. Preloaded: takes the place of malloc and its kind.

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stddef.h>

// Smaller blocks never fail: PyTorch ends with a segmentation fault if it cannot report an error.
enum { LARGE = 1 << 14 };

// Large blocks that may still be allocated. All later ones fail, because PyTorch's allocation may be tried twice.
atomic_int blocks_left = INT_MAX;

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static int fails(size_t size) { return size >= LARGE && atomic_fetch_sub(&blocks_left, 1) <= 0; }

void* malloc(size_t size) {
  if (!fails(size))
    return __libc_malloc(size);
  errno = ENOMEM;
  return NULL;
}

void* calloc(size_t count, size_t size) {
  if (!fails(count * size))
    return __libc_calloc(count, size);
  errno = ENOMEM;
  return NULL;
}

void* realloc(void* block, size_t size) {
  if (!fails(size))
    return __libc_realloc(block, size);
  errno = ENOMEM;
  return NULL;
}

void* aligned_alloc(size_t alignment, size_t size) {
  if (!fails(size))
    return __libc_memalign(alignment, size);
  errno = ENOMEM;
  return NULL;
}

void* memalign(size_t alignment, size_t size) { return aligned_alloc(alignment, size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  void* const made = fails(size) ? NULL : __libc_memalign(alignment, size);
  if (!made)
    return ENOMEM;
  *block = made;
  return 0;
}
