/* What a program with candle's CUDA backend is linked to beside the driver, for a machine without CUDA. candle makes a
   handle of cuBLAS and a generator of cuRAND with each device; whatever else of these libraries, of NVRTC and of the driver
   candle knows, its tests on the driver in crates/driver do not call, and a call ends the program. */

int cublasCreate_v2(void **handle) { *handle = (void *)1; return 0; }
int cublasSetStream_v2(void *handle, void *stream) { return 0; }
int cublasDestroy_v2(void *handle) { return 0; }

int curandCreateGenerator(void **generator, int type) { *generator = (void *)1; return 0; }
int curandSetStream(void *generator, void *stream) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void *generator, unsigned long long seed) { return 0; }
int curandDestroyGenerator(void *generator) { return 0; }

#define NOT_CALLED(name) void name(void) { __builtin_trap(); }
NOT_CALLED(cublasDgemmStridedBatched)
NOT_CALLED(cublasGemmStridedBatchedEx)
NOT_CALLED(curandGenerateNormal)
NOT_CALLED(curandGenerateNormalDouble)
NOT_CALLED(curandGenerateUniform)
NOT_CALLED(curandGenerateUniformDouble)
NOT_CALLED(curandSetGeneratorOffset)
NOT_CALLED(nvrtcCompileProgram)
NOT_CALLED(nvrtcCreateProgram)
NOT_CALLED(nvrtcDestroyProgram)
NOT_CALLED(nvrtcGetPTX)
NOT_CALLED(nvrtcGetPTXSize)
NOT_CALLED(nvrtcGetProgramLog)
NOT_CALLED(nvrtcGetProgramLogSize)
NOT_CALLED(cuMemAlloc_v2)
NOT_CALLED(cuMemFree_v2)
NOT_CALLED(cuMemcpyPeerAsync)
NOT_CALLED(cuModuleLoad)
