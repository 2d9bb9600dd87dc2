// A program with one fault, named by its argument, that the tool of compute-sanitizer of that name must find.
#include <cstdio>
#include <cstring>

__global__ void faulty(int* data, int* sink, int fault) {
  __shared__ int slots[64];
  const int thread = threadIdx.x;
  if (fault == 0 && thread == 63)
    data[1 << 20] = 1; // memcheck: beyond the end
  if (fault == 1) {
    slots[thread] = thread;
    sink[thread] = slots[63 - thread]; // racecheck: no barrier before another warp's slot is read
  }
  if (fault == 2)
    sink[thread] = data[thread]; // initcheck: nobody has written it
  if (fault == 3 && thread < 40)
    __syncthreads(); // synccheck: not the whole block
}

int main(int argc, char** argv) {
  const char* tools[] = {"memcheck", "racecheck", "initcheck", "synccheck"};
  int fault = 0;
  while (fault < 4 && (argc < 2 || std::strcmp(argv[1], tools[fault]) != 0))
    ++fault;
  int *data, *sink;
  cudaMalloc(&data, 64 * sizeof(int));
  cudaMalloc(&sink, 64 * sizeof(int));
  faulty<<<1, 64>>>(data, sink, fault);
  std::puts(cudaGetErrorString(cudaDeviceSynchronize()));
}
