// C interface of all kernels. Integers come as int64, memory as addresses, the stream last; 0 or an error code returns.
#include "team.h"

extern "C" {

const char* ultraep_error(int code) {
#if defined(__CUDACC__)
  return cudaGetErrorString((cudaError_t)code);
#else
  (void)code;
  return "failed";
#endif
}

}  // extern "C"

#include "exchange_launch.h"
#include "plan_launch.h"
#include "reroute_launch.h"
