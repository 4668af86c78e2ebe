// The kernels for a CPU: the same source, compiled without CUDA.
#include "kernels.cu"
