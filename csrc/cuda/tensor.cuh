// What the ops share on the host: torch's stable ABI, its stream, and errors of a launch.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "tiles.cuh"

namespace perl_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

template <typename T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// The device of a tensor, as the launches of `op` in *.cuh ask for it.
class Device {
 public:
  Device(const Tensor& like, const char* op)
      : like_(like), op_(op), stream_(current_stream(like)) {
    const int index = like.get_device_index();
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index),
          "multiprocessors");
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          "shared memory");
  }

  float* floats(int64_t count) {
    memory_.push_back(torch::stable::new_empty(like_, {count}, ScalarType::Float));
    return static_cast<float*>(memory_.back().data_ptr());
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t x, int64_t y, int64_t z, int shared,
              Arguments... arguments) {
    if (shared > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
            op_);
    }
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    kernel<<<grid, THREADS, shared, stream_>>>(arguments...);
    check_launch(op_);
  }

  int multiprocessors = 0, shared_bytes = 0;

 private:
  const Tensor& like_;
  const char* op_;
  cudaStream_t stream_;
  std::vector<Tensor> memory_;
};

template <typename Run>
void for_dtype(const Tensor& tensor, Run run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "wanted float32, float16 or bfloat16");
  }
}

}  // namespace perl_kernels
