// A CUDA driver without a GPU, for Triton: it loads and launches the code that torch.compile has made. See runtime.cc; what is not here
// returns 0.

#include <dlfcn.h>

#include <cstddef>

extern "C" {

void made_up_count(const char*);
static size_t handles = 0x900000;
static void* handle() { return reinterpret_cast<void*>(handles += 16); }

int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* number) { return *number = 1, 0; }
int cuDeviceGet(int* device, int number) { return *device = number, 0; }
int cuCtxGetCurrent(void** context) { return *context = &handles, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &handles, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
int cuDeviceGetAttribute(int* value, int what, int) {
    switch (what) {  // by the numbers of CUdevice_attribute
        case 1:                          // threads a block
        case 39: *value = 1024 * (1 + (what == 39)); break;  // and a multiprocessor
        case 8: *value = 49152; break;   // bytes of shared memory a block
        case 10: *value = 32; break;     // threads a warp
        case 12:                         // registers a block
        case 82: *value = 65536; break;  // and a multiprocessor
        case 13: *value = 1980000; break;  // kHz of the clock
        case 16: *value = 132; break;      // multiprocessors
        case 36: *value = 2619000; break;  // kHz of the memory
        case 37: *value = 6144; break;     // bits of its bus
        case 38: *value = 60 << 20; break;  // bytes of the L2 cache
        case 75: *value = 9; break;        // compute capability
        case 81:                           // bytes of shared memory a multiprocessor
        case 97: *value = 232448; break;   // and a block that asks for it
        default: *value = 0;
    }
    return 0;
}
int cuModuleLoadData(void** module, const void*) { return *module = handle(), 0; }
int cuModuleLoadDataEx(void** module, const void*, unsigned, void*, void*) { return *module = handle(), 0; }
int cuModuleLoad(void** module, const char*) { return *module = handle(), 0; }
int cuModuleGetFunction(void** function, void*, const char*) { return *function = handle(), 0; }
int cuFuncGetAttribute(int* value, int what, void*) { return *value = what == 0 ? 1024 : what == 4 ? 32 : 0, 0; }
int cuGetErrorString(int, const char** text) { return *text = "an error of the made-up GPU", 0; }
int cuPointerGetAttribute(void* found, int, size_t pointer) { return *static_cast<size_t*>(found) = pointer, 0; }
int cuStreamIsCapturing(void*, int* status) { return *status = 0, 0; }
int cuOccupancyMaxActiveClusters(int* number, void*, void*) { return *number = 1, 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, void*, int, size_t) { return *number = 2, 0; }
int cuGetProcAddress_v2(const char* name, void** found, int, size_t, void*) {
    return *found = dlsym(RTLD_DEFAULT, name), 0;
}
int cuLaunchKernel() { return made_up_count("kernel"), 0; }
int cuLaunchKernelEx() { return made_up_count("kernel"), 0; }

}  // extern "C"
