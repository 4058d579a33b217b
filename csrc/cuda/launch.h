// What the launchers share: argument checks, the device and stream of a call, and starting a kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/elements.h"
#include "common/tensor_view.h"

#if defined(MAGNET_FAST_EMULATE_CUDA)
#include "cuda/host_emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace magnet_fast {

/// How float32 products are made on tensor cores. kExact: of x = high + low in TF32 each, the sum
///     high high + high low + low high,
/// nearly as exact as float32. kTf32: of the numbers rounded to TF32.
enum class Float32Products : int { kExact = 0, kTf32 = 1 };

namespace cuda {

/// Where a call runs: CUDA's device number, and a cudaStream_t (0: the default stream).
struct Place {
    int device;
    void* stream;
};

/// Checks the address of a tensor's first element.
inline void check_address(const void* pointer, int64_t element_bytes, const std::string& argument) {
    require(pointer != nullptr, argument, "the address of a tensor", 0);
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)) % element_bytes;
    require(misaligned == 0, argument, "an address aligned for its dtype", misaligned);
}

/// float32, bfloat16 and float16 have kernels.
inline void check_kernel_dtype(const TensorView& view, const char* name) {
    const int code = static_cast<int>(view.dtype);
    require(code >= 0 && code <= 2, name, "dtype 0 (float32), 1 (bfloat16) or 2 (float16)", code);
}

/// Working memory, in bytes, of at least the size that the function named `asked` told.
inline void check_workspace(const TensorView& workspace, int64_t bytes, const char* asked) {
    check_tensor(workspace, "workspace", 1, Dtype::kByte);
    require(workspace.sizes[0] >= bytes, "workspace",
            "at least " + std::to_string(bytes) + " bytes, see " + asked, workspace.sizes[0]);
    if (bytes > 0) check_address(workspace.data, 16, "workspace");
}

#if defined(MAGNET_FAST_EMULATE_CUDA)

/// The emulated device: few multiprocessors, so that programs walk over several pieces of work.
struct Device {
    int multiprocessors = 2;
    int shared_bytes = emulation::machine().shared_limit;
    explicit Device(const Place&) {}

    template <typename Params>
    int programs_at_once(void (*)(Params), int, size_t) const {
        return multiprocessors;
    }
    template <typename Params>
    void start(void (*kernel)(Params), int64_t blocks, int threads, size_t shared,
               const Params& params) const {
        emulation::launch(blocks, threads, shared, [&] { kernel(params); });
    }
};

#else

inline void check(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();  // a failed call must not be reported again by somebody else's
    std::string message = std::string("CUDA: ") + doing + " failed: " + cudaGetErrorString(status);
    if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice)
        message += " (this needs an NVIDIA GPU and its driver; `nvidia-smi` shows whether they are there)";
    throw std::runtime_error(message);
}

/// Makes a call's device the current one for as long as it lives, and starts kernels on its stream.
class Device {
  public:
    int multiprocessors = 0;
    int shared_bytes = 0;  // that one block can have

    explicit Device(const Place& place) : stream_(static_cast<cudaStream_t>(place.stream)) {
        int devices = 0, major = 0;
        check(cudaGetDeviceCount(&devices), "counting devices");
        require(place.device >= 0 && place.device < devices, "device",
                "a device number below " + std::to_string(devices), place.device);
        check(cudaGetDevice(&before_), "asking for the current device");
        check(cudaSetDevice(place.device), "choosing the device");
        try {
            const std::pair<int*, cudaDeviceAttr> wanted[] = {
                {&multiprocessors, cudaDevAttrMultiProcessorCount},
                {&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&major, cudaDevAttrComputeCapabilityMajor},
            };
            for (const auto& [to, attribute] : wanted)
                check(cudaDeviceGetAttribute(to, attribute, place.device),
                      "asking for a device's properties");
            if (major < 8)
                throw std::runtime_error("CUDA: expected a device of compute capability 8.0 or newer, got " +
                                         std::to_string(major) + ".x");
        } catch (...) {
            (void)cudaSetDevice(before_);
            throw;
        }
    }
    ~Device() { (void)cudaSetDevice(before_); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    /// Blocks of a kernel that the device runs at the same time.
    template <typename Params>
    int programs_at_once(void (*kernel)(Params), int threads, size_t shared) const {
        allow(kernel, shared);
        int blocks = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, address(kernel), threads, shared),
              "asking for a kernel's occupancy");
        return multiprocessors * (blocks > 0 ? blocks : 1);
    }

    template <typename Params>
    void start(void (*kernel)(Params), int64_t blocks, int threads, size_t shared,
               const Params& params) const {
        require(blocks < int64_t{1} << 31, "batch", "fewer than 2^31 blocks", blocks);
        allow(kernel, shared);
        void* arguments[] = {const_cast<Params*>(&params)};
        check(cudaLaunchKernel(address(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                               shared, stream_),
              "starting a kernel");
        check(cudaGetLastError(), "starting a kernel");
    }

  private:
    template <typename Params>
    static const void* address(void (*kernel)(Params)) {
        return reinterpret_cast<const void*>(kernel);
    }
    /// More than 48 KiB of shared memory has to be asked for.
    template <typename Params>
    static void allow(void (*kernel)(Params), size_t shared) {
        if (shared > 48 * 1024)
            check(cudaFuncSetAttribute(address(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared)),
                  "asking for shared memory");
    }

    cudaStream_t stream_;
    int before_ = 0;
};

/// Null when the kernels can run on a device, else the reason why not.
inline std::optional<std::string> device_status(int device) {
    try {
        Device(Place{device, nullptr});
        return std::nullopt;
    } catch (const std::exception& error) {
        return error.what();
    }
}

#endif

}  // namespace cuda
}  // namespace magnet_fast
