// Kernels with a mistake each, which tests/cuda_on_cpu.h has to find: PLANT says which, 0 is none. Exit status 1:
// wrong result or an error reported.
#ifndef PLANT
#define PLANT 0
#endif

// Reverse each block's part of `values`, in tiles of a block's size, and count those above 0.
void reverse(const float* values, float* reversed, unsigned* positive, int tiles) {
  float* tile = shared_memory<float>();
  for (int i = 0; i < tiles; i++) {
    const int start = (blockIdx.x * tiles + i) * blockDim.x, me = threadIdx.x;
    tile[me] = values[start + me];
    if (PLANT != 1) __syncthreads();  // before the read
    reversed[start + me] = tile[blockDim.x - (PLANT == 3 ? 0 : 1) - me];
    if (PLANT != 2) __syncthreads();  // after the read
    if (PLANT == 4) *positive += values[start + me] > 0;
    else if (values[start + me] > 0) atomicAdd(positive, 1u);
    if (PLANT == 5 && me < 40) __syncthreads();
  }
}

int main() {
  constexpr int THREADS = 96, TILES = 3, BLOCKS = 2, ALL = THREADS * TILES * BLOCKS;
  std::vector<float> values(ALL), reversed(ALL);
  for (int i = 0; i < ALL; i++) values[i] = i % 7 - 3;
  for (int seed = 0; seed < 20; seed++) {
    std::vector<unsigned> positive(1);
    unsigned expected = 0;
    cuda_on_cpu_seed(seed);
    try {
      on_cpu::launch(dim3(BLOCKS), THREADS, THREADS * sizeof(float),
                     [&] { reverse(values.data(), reversed.data(), positive.data(), TILES); });
    } catch (const std::runtime_error& e) {
      return std::puts(e.what()), 1;
    }
    for (int i = 0; i < ALL; i++) {
      expected += values[i] > 0;
      if (reversed[i] != values[i / THREADS * THREADS + THREADS - 1 - i % THREADS])
        return std::printf("wrong with seed %d\n", seed), 1;
    }
    if (positive[0] != expected) return std::printf("%u counted, not %u\n", positive[0], expected), 1;
  }
  return std::puts("right"), 0;
}
