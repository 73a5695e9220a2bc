/* fused-ebm on NVIDIA GPUs in C: anomaly energies of collider events, and their score vectors, from a compiled model.
 *
 *     python -m kernels cubin models/demo demo-cuda        writes demo-cuda/model.febm-cuda, once; needs no GPU
 *
 *     fused_ebm_cuda_model *model;
 *     if (fused_ebm_cuda_open("demo-cuda/model.febm-cuda", 0, &model)) fail(fused_ebm_cuda_last_error());
 *     int level = fused_ebm_cuda_default_level(model);
 *     int code = fused_ebm_cuda_score(model, x, n, level, energy, NULL, flag);
 *     fused_ebm_cuda_close(model);
 *
 * Events are raw: float32 in the units of the model's features, in their order (fused_ebm_cuda_feature), row-major
 * (n, D) without gaps. Preprocessing belongs to the model. NaN, or the marker that the model was trained with, is a
 * missing value where the feature has an imputation. The energy E is the anomaly score: high = unusual. The score
 * s = -dE/dx, (n, D) in inverse units of x, points towards more normal events.
 *
 * The library needs NVIDIA's driver (libcuda.so.1) when a model is opened, and no part of the CUDA toolkit. A model
 * lives in the primary context of its GPU, which is that of the CUDA runtime, of PyTorch and of others; the caller's
 * current context is left as it was.
 *
 * Threads: any number of threads may call on one model at once, one after the other gets its turn; only
 * fused_ebm_cuda_close needs the model to itself. After fork the child cannot go on with it.
 *
 * Errors: a function that returns int gives FUSED_EBM_CUDA_OK (0) or one of the codes below, and
 * fused_ebm_cuda_last_error() says in one sentence what was given and what was expected. Nothing is written after
 * FUSED_EBM_CUDA_BAD_ARGUMENT.
 */
#ifndef FUSED_EBM_CUDA_H
#define FUSED_EBM_CUDA_H

#include <stdint.h>

#if defined(__GNUC__)
#define FUSED_EBM_CUDA_API __attribute__((visibility("default")))
#else
#define FUSED_EBM_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The codes of fused_ebm.h, and two more. */
enum {
  FUSED_EBM_CUDA_OK = 0,
  FUSED_EBM_CUDA_BAD_ARGUMENT = 1, /* NULL, a negative n, a noise level or device out of range, a misaligned pointer */
  FUSED_EBM_CUDA_CANNOT_READ = 2,  /* no such file, or it cannot be read */
  FUSED_EBM_CUDA_BAD_FILE = 3,     /* not a compiled model, or truncated or damaged */
  FUSED_EBM_CUDA_NEWER_FILE = 4,   /* a compiled model of a later format version */
  FUSED_EBM_CUDA_NOT_FINITE = 5,   /* results are written, but some event's energy is NaN or infinite */
  FUSED_EBM_CUDA_FAILED = 6,       /* out of memory, or what the driver said */
  FUSED_EBM_CUDA_NO_DEVICE = 7,    /* no NVIDIA driver, or no GPU */
  FUSED_EBM_CUDA_NO_KERNEL = 8     /* the file has no kernel for this GPU: compile the model for it, too */
};

typedef struct fused_ebm_cuda_model fused_ebm_cuda_model;

/* "0.1.0". */
FUSED_EBM_CUDA_API const char *fused_ebm_cuda_version(void);

/* What was wrong at this thread's last call that failed; "" before one. Valid until this thread's next failure. */
FUSED_EBM_CUDA_API const char *fused_ebm_cuda_last_error(void);

/* Opens a compiled model on GPU number `device`; *model is NULL on an error. The file is read, checked (SHA-256) and
 * closed before the driver is asked for. */
FUSED_EBM_CUDA_API int fused_ebm_cuda_open(const char *path, int device, fused_ebm_cuda_model **model);

/* Waits for what was begun with the model, but for captured graphs, and frees it; NULL is allowed. */
FUSED_EBM_CUDA_API void fused_ebm_cuda_close(fused_ebm_cuda_model *model);

/* D, the number of noise levels L, and the level that the model was calibrated at; -1 for NULL. */
FUSED_EBM_CUDA_API int32_t fused_ebm_cuda_n_features(const fused_ebm_cuda_model *model);
FUSED_EBM_CUDA_API int32_t fused_ebm_cuda_n_levels(const fused_ebm_cuda_model *model);
FUSED_EBM_CUDA_API int32_t fused_ebm_cuda_default_level(const fused_ebm_cuda_model *model);

/* flag = energy > threshold, strictly, at the default level. NaN where the model has none, and for NULL. */
FUSED_EBM_CUDA_API float fused_ebm_cuda_threshold(const fused_ebm_cuda_model *model);

/* Name of feature j, UTF-8; NULL where there is none. These strings live as long as the model. */
FUSED_EBM_CUDA_API const char *fused_ebm_cuda_feature(const fused_ebm_cuda_model *model, int32_t j);

/* Digest of the trained model, 64 hexadecimal digits, as Bundle.digest in Python; NULL for NULL. */
FUSED_EBM_CUDA_API const char *fused_ebm_cuda_digest(const fused_ebm_cuda_model *model);

/* Precision that the model was compiled in, "fp32" say; NULL for NULL. */
FUSED_EBM_CUDA_API const char *fused_ebm_cuda_precision(const fused_ebm_cuda_model *model);

/* Compute capability that the kernels in use were compiled for, 90 say; -1 for NULL. */
FUSED_EBM_CUDA_API int32_t fused_ebm_cuda_architecture(const fused_ebm_cuda_model *model);

/* Host memory to host memory: energies (n), and where the pointers are not NULL the scores (n, D) and the flags (n): 1
 * where energy > threshold, else 0. Flags need a model with a threshold, and its default level. `level` is 0 to L - 1.
 *
 * FUSED_EBM_CUDA_NOT_FINITE names the first event whose energy is not finite: Inf, or NaN in a feature without
 * imputation, gives NaN or Inf for that event alone; the flag of a NaN is 0. */
FUSED_EBM_CUDA_API int fused_ebm_cuda_score(fused_ebm_cuda_model *model, const float *x, int64_t n, int32_t level,
                                            float *energy, float *score, uint8_t *flag);

/* The same in memory of the model's GPU, in turn on `stream` (a CUstream or cudaStream_t; NULL is the default stream):
 * returns as soon as the work is enqueued. The pointers are multiples of 16 bytes, `score` and `flag` may be NULL, and n
 * is below 2^31. Flags, computed in the kernel, are those of fused_ebm_cuda_score. Nothing looks for energies that are not
 * finite. One model's calls run one after the other, on
 * whatever streams they are: open it once for each stream that is to run beside others, and for each that is captured
 * in a graph, since nothing orders the graph's runs and other calls. */
FUSED_EBM_CUDA_API int fused_ebm_cuda_score_device(fused_ebm_cuda_model *model, const float *x, int64_t n,
                                                   int32_t level, float *energy, float *score, uint8_t *flag,
                                                   void *stream);

#ifdef __cplusplus
}
#endif

#endif
